"""MNIST and CIFAR-10 held whole on the device as bytes; batches are cut, moved, flipped and normalised there."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrpe.checks import check_choice

DATASETS = ("mnist", "cifar10", "mnist-small")
SHIPPED = Path(__file__).parent.parent / "vit" / "mnist_small.npz"


@dataclass(frozen=True)
class Augment:
    """Random shifts of up to ``shift`` pixels (a crop after padding with zeros) and, if ``flip``, mirror images."""

    shift: int = 0
    flip: bool = False

    def draw(self, count: int, generator: torch.Generator) -> Tensor:  # (3, count)
        """For each image where its crop starts, row and column of the padded image, and whether it is mirrored."""
        starts = torch.randint(2 * self.shift + 1, (2, count), generator=generator)
        mirrored = torch.randint(1 + self.flip, (1, count), generator=generator)
        return torch.cat((starts, mirrored))

    def __call__(
        self,
        images: Tensor,  # (N, C, H, W)
        index: Tensor,  # (B,)
        moves: Tensor,  # (3, B), of `draw`
    ) -> Tensor:  # (B, C, H, W)
        """The images ``index``, moved."""
        C, H, W = images.shape[1:]
        top, left, mirrored = (move[:, None, None, None] for move in moves)
        channel, row, column = (torch.arange(n, device=images.device) for n in (C, H, W))
        channel, row = channel[:, None, None], row[:, None] + top - self.shift
        column = torch.where(mirrored > 0, W - 1 - column, column) + left - self.shift
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        return images[index[:, None, None, None], channel, row.clamp(0, H - 1), column.clamp(0, W - 1)] * inside


@dataclass(frozen=True)
class Images:
    """A data set: bytes, labels, and the mean and deviation of its pixels (of 0 to 1) in each channel."""

    name: str
    train_images: Tensor  # (N, C, H, W) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, C, H, W) uint8
    test_labels: Tensor  # (M,) int64
    mean: Tensor  # (C, 1, 1)
    std: Tensor  # (C, 1, 1)
    augment: Augment

    def to(self, device: torch.device | str) -> "Images":
        tensors: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)

    def head(self, train: int, test: int) -> "Images":
        """The first images of each part."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def normalise(
        self,
        images: Tensor,  # (B, C, H, W) uint8
    ) -> Tensor:  # (B, C, H, W) float32
        return (images.float() / 255 - self.mean) / self.std

    def plan(self, epoch: int, seed: int) -> Tensor:  # (4, N)
        """One epoch on the images' device: their order, and how each is moved; a function of (seed, epoch) alone."""
        generator = _generator(seed, epoch)
        order = torch.randperm(len(self.train_images), generator=generator)
        moves = self.augment.draw(len(order), generator)
        return torch.cat((order[None], moves)).to(self.train_images.device)

    def train_batch(
        self,
        plan: Tensor,  # (4, B), columns of `plan`
    ) -> tuple[Tensor, Tensor]:  # (B, C, H, W), (B,)
        index = plan[0]
        return self.normalise(self.augment(self.train_images, index, plan[1:])), self.train_labels[index]

    def test_batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.test_images[rank::world], self.test_labels[rank::world]
        for start in range(0, len(images), batch_size):
            yield self.normalise(images[start : start + batch_size]), labels[start : start + batch_size]


def load(name: str, root: str | Path | None = None) -> Images:
    """``"mnist"``, ``"cifar10"`` or ``"mnist-small"``, the subset in this repository.

    Without ``root`` torchvision downloads into ``data/``. A ``root`` is only read: torchvision's own layout, or for
    CIFAR-10 also the binary version in ``root/cifar-10-batches-bin``.
    """
    check_choice("data", "name", name, DATASETS)
    if name == "mnist-small":
        with np.load(SHIPPED) as file:
            parts = [file[key] for key in ("train_images", "train_labels", "test_images", "test_labels")]
    elif name == "cifar10" and root is not None and (Path(root) / "cifar-10-batches-bin").is_dir():
        folder = Path(root) / "cifar-10-batches-bin"
        train = [folder / f"data_batch_{i}.bin" for i in range(1, 6)]
        parts = [*_records(train), *_records([folder / "test_batch.bin"])]
    else:
        parts = [*_torchvision(name, root, train=True), *_torchvision(name, root, train=False)]
    images, labels, test_images, test_labels = (torch.from_numpy(part) for part in parts)
    if name == "cifar10":
        mean, std, augment = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616], Augment(4, flip=True)
    else:
        mean, std, augment = [0.1307], [0.3081], Augment(2)
    centre, scale = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
    return Images(name, images, labels.long(), test_images, test_labels.long(), centre, scale, augment)


def _generator(*key: int) -> torch.Generator:
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(seed)


def _records(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10's binary version: one byte of label, then 3 x 32 x 32 bytes, for each image."""
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _torchvision(name: str, root: str | Path | None, train: bool) -> tuple[np.ndarray, np.ndarray]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"data: torchvision must be installed to read {name}, got none; run 'pip install torchvision'"
        ) from error
    kind: Any = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[name]
    try:
        part = kind(root or "data", train=train, download=root is None)
    except RuntimeError as error:
        raise FileNotFoundError(f"data: root must hold {name} in torchvision's layout, got {str(root)!r}") from error
    images = np.asarray(part.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images), np.asarray(part.targets)
