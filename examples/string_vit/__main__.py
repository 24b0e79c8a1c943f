"""Train a small Vision Transformer with each encoding of the STRING family, and test it at larger images, too."""

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from examples.common import study
from examples.common.data import Images, load
from examples.common.options import add_options
from examples.common.train import Recipe, evaluate
from fastrpe.models import ViT, ViTConfig
from fastrpe.positions import grid_positions

from . import report
from .variants import STARTS, STUDIES, VARIANTS, build, configure

GROWTH = (1.25, 1.5, 2.0)  # of the test images' sides, to whole patches


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    wanted = [(dataset, variant, options.seeds) for dataset in options.datasets for variant in options.variants]
    study.main(STUDY, options, arguments, wanted)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.string_vit", description=__doc__)
    parser.add_argument("--datasets", choices=STUDIES, nargs="+", default=["cifar10", "mnist"])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), metavar="VARIANT")
    add_options(parser, out="runs/string_vit")
    study.add_options(parser)
    parser.add_argument("--start", choices=STARTS, default="mixed", help="of learned frequencies, by default mixed")
    options = parser.parse_args(arguments)
    if options.small:
        options.datasets, options.seeds = ["mnist-small"], options.seeds[:1]
        options.images = options.images or 2000
    return options


def measure(model: ViT, images: Images, accelerator: Accelerator) -> dict[str, Any]:
    larger = resolutions(model, images, accelerator)
    folded, _ = evaluate(model.fold(), images, accelerator)
    learned = sum(p.numel() for name, p in model.named_parameters() if "position" in name)
    return {"accuracy_folded": folded, "larger": larger, "parameters_of_position": learned}


class Resized(nn.Module):
    """A ViT on enlarged images: coordinates continue beyond the trained grid, or are rescaled into it."""

    def __init__(self, model: ViT, side: int, rescaled: bool) -> None:
        super().__init__()
        self.model = model
        self.size = side * model.config.patch_size
        positions = grid_positions(side, side, device=model.grid.device)
        trained = model.config.image_size // model.config.patch_size
        # A patch of the larger grid lies where the trained grid has the same part of the image.
        self.positions = (positions + 0.5) * (trained / side) - 0.5 if rescaled else positions

    def forward(
        self,
        images: Tensor,  # (B, C, H, W)
    ) -> Tensor:  # (B, classes)
        larger = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=False)
        return self.model(larger, self.positions)


def resolutions(model: ViT, images: Images, accelerator: Accelerator) -> list[dict[str, Any]]:
    """Accuracy on larger images, by the number of patches on a side."""
    trained = model.config.image_size // model.config.patch_size
    rows = []
    for side in (round(trained * growth) for growth in GROWTH):
        row: dict[str, Any] = {"side": side}
        for name, rescaled in (("continued", False), ("rescaled", True)):
            row[name], _ = evaluate(Resized(model, side, rescaled), images, accelerator, batch_size=500)
        rows.append(row)
    return rows


def plan(options: argparse.Namespace, dataset: str, variant: str) -> tuple[ViTConfig, Recipe]:
    config, recipe = STUDIES[dataset]
    recipe = replace(
        recipe,
        epochs=options.epochs or recipe.epochs,
        lr=options.lr or recipe.lr,
        compile=options.compile,
        capture=options.capture,
    )
    return configure(config, variant, options.start), recipe


def read(options: argparse.Namespace, dataset: str) -> Images:
    images = load(dataset, options.data_root)
    return images.head(options.images, options.images) if options.images else images


STUDY = study.Study(
    module="examples.string_vit",
    key="dataset",
    option="--datasets",
    read=read,
    plan=plan,
    build=lambda options, config, seed: build(config, seed, options.start),
    measure=measure,
    report=report.write,
    described=("start",),
)

if __name__ == "__main__":
    main()
