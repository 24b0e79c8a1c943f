"""Train a small Vision Transformer with each encoding of the STRING family, and test it at larger images, too."""

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from examples.common import results
from examples.common.data import Images, load
from examples.common.jobs import finished, locked, side_by_side
from examples.common.options import add_options, make_accelerator
from examples.common.train import Recipe, evaluate, fit
from fastrpe.models import ViT, ViTConfig
from fastrpe.positions import grid_positions

from . import report
from .variants import STARTS, STUDIES, VARIANTS, build, configure

GROWTH = (1.25, 1.5, 2.0)  # of the test images' sides, to whole patches
Part = tuple[str, str, list[int]]  # data set, variant, seeds: they share what is compiled


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    parts: list[Part] = []
    for dataset in options.datasets:
        for variant in options.variants:
            same = describe(options, dataset, variant)
            done = [options.resume and finished(path_of(options, dataset, variant, s), same) for s in options.seeds]
            seeds = [seed for seed, there in zip(options.seeds, done) if not there]
            parts += [(dataset, variant, seeds)] if seeds else []
    slots = [gpu for _ in range(options.jobs) for gpu in options.gpus]
    failed = []
    if len(slots) == 1:
        train(options, parts, end)
    else:
        print(f"{sum(len(seeds) for *_, seeds in parts)} runs, {len(slots)} processes", flush=True)
        jobs = [
            (f"{name} {variant}", ["--datasets", name, "--variants", variant, "--seeds", *map(str, seeds)])
            for name, variant, seeds in parts
        ]
        failed = side_by_side("examples.string_vit", arguments, jobs, options.out, slots, end)
    if not options.worker and int(os.environ.get("RANK", 0)) == 0:
        print("\n" + report.write(options.out))
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def parse(arguments: list[str]) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1  # by accelerate or torchrun: one training over all processes
    parser = argparse.ArgumentParser(prog="python -m examples.string_vit", description=__doc__)
    parser.add_argument("--datasets", choices=STUDIES, nargs="+", default=["cifar10", "mnist"])
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), metavar="VARIANT")
    add_options(parser, out="runs/string_vit")
    parser.set_defaults(seeds=[0, 1, 2], compile="blocks" if gpus else "no", capture=gpus > 0 and not launched)
    parser.add_argument("--start", choices=STARTS, default="mixed", help="of learned frequencies, by default mixed")
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--images", type=int, help="train on the first so many images, test on as many at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes on each device; on a GPU one trains at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many; see --resume")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.small:
        options.datasets, options.seeds = ["mnist-small"], options.seeds[:1]
        options.images = options.images or 2000
    options.gpus = list(range(gpus)) if gpus and options.device != "cpu" and not launched else [None]
    return options


def train(options: argparse.Namespace, parts: list[Part], end: float) -> None:
    """All of ``parts`` in this process, one after the other."""
    accelerator = make_accelerator(options)
    data: dict[str, Images] = {}
    for dataset, variant, seeds in parts:
        torch.compiler.reset()  # graphs of the variants before this one count against the limit on recompilations
        for seed in seeds:
            if time.monotonic() > end:
                return
            if dataset not in data:
                with accelerator.main_process_first():
                    data[dataset] = read(options, dataset).to(accelerator.device)
            run(options, data[dataset], variant, seed, accelerator)


def run(options: argparse.Namespace, images: Images, variant: str, seed: int, accelerator: Accelerator) -> None:
    """Train one model, test it at every size, and record it."""
    start = time.monotonic()
    config, recipe = plan(options, images.name, variant)
    model = build(config, seed, options.start)
    turn = locked(options.turn) if options.turn else None
    label = f"{images.name} {variant}, seed {seed}"
    history = fit(model, images, recipe, accelerator, seed, label=label, turn=turn)
    larger = resolutions(model, images, accelerator)
    folded, _ = evaluate(model.fold(), images, accelerator)
    result = {
        "variant": variant,
        "seed": seed,
        "accuracy": history.accuracy[-1],
        "accuracy_folded": folded,
        "larger": larger,
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_position": sum(p.numel() for name, p in model.named_parameters() if "position" in name),
        "train_seconds_per_epoch": history.seconds_per_epoch,
        "train_seconds": sum(history.seconds),
        "wall_seconds": time.monotonic() - start,
        "epochs_evaluated": history.evaluated,
        "accuracy_by_epoch": history.accuracy,
        "test_loss_by_epoch": [round(loss, 5) for loss in history.test_loss],
        "train_loss_by_epoch": [round(loss, 5) for loss in history.train_loss],
        **describe(options, images.name, variant),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **results.environment(accelerator.device),
    }
    if accelerator.is_main_process:
        results.write(path_of(options, images.name, variant, seed), result)
        print(f"{label}: {100 * result['accuracy']:.2f} %, {result['wall_seconds']:.0f} s", flush=True)


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


def describe(options: argparse.Namespace, dataset: str, variant: str) -> dict[str, Any]:
    """What a result is of; a result of something else does not count as finished."""
    config, recipe = plan(options, dataset, variant)
    return {
        "dataset": dataset,
        "images": options.images,
        "start": options.start,
        "model": asdict(config),
        "recipe": asdict(recipe),
    }


def path_of(options: argparse.Namespace, dataset: str, variant: str, seed: int) -> Path:
    path: Path = options.out / f"{dataset}-{variant}-seed{seed}.json"
    return path


if __name__ == "__main__":
    main()
