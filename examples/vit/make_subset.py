"""Regenerate mnist_small.npz: 400 training and 100 test images of each digit, drawn from MNIST with a fixed seed.

Usage: python -m examples.vit.make_subset [--data-root DIR] [--out FILE]
"""

import argparse
from pathlib import Path

import numpy as np

from examples.common.data import SHIPPED, load


def draw(
    labels: np.ndarray,  # (N,)
    per_class: int,
    random: np.random.RandomState,
) -> np.ndarray:  # (10 * per_class,)
    """Indices of ``per_class`` examples of each class, in random order."""
    chosen = [random.permutation(np.flatnonzero(labels == label))[:per_class] for label in range(10)]
    return random.permutation(np.concatenate(chosen))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", help="a folder that holds MNIST; without it torchvision downloads into data/")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    full = load("mnist", options.data_root)
    random = np.random.RandomState(0)  # its stream is frozen, unlike that of numpy's newer generators
    arrays = {}
    for part, per_class in (("train", 400), ("test", 100)):
        images, labels = getattr(full, f"{part}_images").numpy(), getattr(full, f"{part}_labels").numpy()
        index = draw(labels, per_class, random)
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images[index], labels[index].astype(np.uint8)
    np.savez_compressed(options.out, **arrays)
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
