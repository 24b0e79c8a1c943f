"""Train a small Vision Transformer with softmax attention and with Performers, also at 16 to 1024 tokens an image."""

import argparse
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from examples.common import folders, results
from examples.common.data import load
from examples.common.jobs import finished, locked, side_by_side
from examples.common.options import add_options, make_accelerator
from examples.common.train import Recipe, fit, inference_ms
from fastrpe.models import ViTConfig

from . import report
from .variants import MAIN, OF_FOLDERS, OF_LENGTH, SETS, STUDIES, VARIANTS, build, configure

GROUPS = {"main": ["mnist", "cifar10"], "lengths": OF_LENGTH}
Part = tuple[str, str, list[int]]  # study, variant, seeds: they share what is compiled


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    parts: list[Part] = []
    for study in options.studies:
        for variant in options.variants or SETS.get(study, MAIN):
            same = describe(options, study, variant)
            done = [options.resume and finished(path_of(options, study, variant, s), same) for s in options.seeds]
            seeds = [seed for seed, there in zip(options.seeds, done) if not there]
            parts += [(study, variant, seeds)] if seeds else []
    slots = [gpu for _ in range(options.jobs) for gpu in options.gpus]
    failed = []
    if len(slots) == 1:
        train(options, parts, end)
    else:
        print(f"{sum(len(seeds) for *_, seeds in parts)} runs, {len(slots)} processes", flush=True)
        jobs = [
            (f"{study} {variant}", ["--studies", study, "--variants", variant, "--seeds", *map(str, seeds)])
            for study, variant, seeds in parts
        ]
        failed = side_by_side("examples.performer_vit", arguments, jobs, options.out, slots, end)
    if not options.worker and int(os.environ.get("RANK", 0)) == 0:
        print("\n" + report.write(options.out))
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def parse(arguments: list[str]) -> argparse.Namespace:
    gpus = torch.cuda.device_count()
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1  # by accelerate or torchrun: one training over all processes
    parser = argparse.ArgumentParser(prog="python -m examples.performer_vit", description=__doc__)
    choices = [*GROUPS, *STUDIES]
    parser.add_argument(
        "--studies", choices=choices, nargs="+", default=list(GROUPS), metavar="STUDY", help="of " + ", ".join(choices)
    )
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", metavar="VARIANT", help="by default the study's")
    add_options(parser, out="runs/performer_vit")
    parser.set_defaults(seeds=[0, 1, 2], compile="blocks" if gpus else "no", capture=gpus > 0 and not launched)
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--redraw-every", type=int, default=0, help="steps between new projections of favor")
    parser.add_argument("--images", type=int, help="train on the first so many images, test on as many at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes on each device; on a GPU one trains at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many; see --resume")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.small:
        options.studies, options.seeds, options.images = ["mnist-small"], options.seeds[:1], options.images or 2000
    options.studies = [study for name in options.studies for study in GROUPS.get(name, [name])]
    if options.data_root is None and (there := [study for study in options.studies if study in OF_FOLDERS]):
        parser.error(f"--data-root must be given for {there[0]}, which is not downloaded")
    options.gpus = list(range(gpus)) if gpus and options.device != "cpu" and not launched else [None]
    return options


def train(options: argparse.Namespace, parts: list[Part], end: float) -> None:
    """All of ``parts`` in this process, one after the other."""
    accelerator = make_accelerator(options)
    data: dict[str, Any] = {}
    for study, variant, seeds in parts:
        torch.compiler.reset()  # graphs of the variants before this one count against the limit on recompilations
        for seed in seeds:
            if time.monotonic() > end:
                return
            name = STUDIES[study][0]
            if name not in data:
                with accelerator.main_process_first():
                    data[name] = read(options, study).to(accelerator.device)
            run(options, data[name], study, variant, seed, accelerator)


def run(
    options: argparse.Namespace, images: Any, study: str, variant: str, seed: int, accelerator: Accelerator
) -> None:
    """Train, time and record one model."""
    start = time.monotonic()
    config, recipe = plan(options, study, variant)
    model = build(config, seed)
    turn = locked(options.turn) if options.turn else None
    label = f"{study} {variant}, seed {seed}"
    history = fit(model, images, recipe, accelerator, seed, label=label, turn=turn)
    result = {
        "variant": variant,
        "seed": seed,
        "accuracy": history.accuracy[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_features": sum(p.numel() for name, p in model.named_parameters() if "feature_map" in name),
        "train_seconds_per_epoch": history.seconds_per_epoch,
        "train_seconds": sum(history.seconds),
        "inference_ms_per_1000": inference_ms(model, images, accelerator),
        "wall_seconds": time.monotonic() - start,
        "epochs_evaluated": history.evaluated,
        "accuracy_by_epoch": history.accuracy,
        "test_loss_by_epoch": [round(loss, 5) for loss in history.test_loss],
        "train_loss_by_epoch": [round(loss, 5) for loss in history.train_loss],
        **describe(options, study, variant),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **results.environment(accelerator.device),
    }
    if accelerator.is_main_process:
        results.write(path_of(options, study, variant, seed), result)
        print(f"{label}: {100 * result['accuracy']:.2f} %, {result['wall_seconds']:.0f} s", flush=True)


def plan(options: argparse.Namespace, study: str, variant: str) -> tuple[ViTConfig, Recipe]:
    _, config, recipe = STUDIES[study]
    recipe = replace(
        recipe,
        epochs=options.epochs or recipe.epochs,
        lr=options.lr or recipe.lr,
        batch_size=options.batch_size or recipe.batch_size,
        compile=options.compile,
        capture=options.capture and study not in OF_FOLDERS,  # their batches come from the host
    )
    config = configure(config, variant)
    if options.redraw_every and config.kernel == "performer-favor":
        config = replace(config, kernel_options={**config.kernel_options, "redraw_every": options.redraw_every})
    return config, recipe


def read(options: argparse.Namespace, study: str) -> Any:
    name, config, _ = STUDIES[study]
    if study in OF_FOLDERS:
        images: Any = folders.load(name, options.data_root, config.image_size)
    else:
        images = load(name, options.data_root)
    return images.head(options.images, options.images) if options.images else images


def describe(options: argparse.Namespace, study: str, variant: str) -> dict[str, Any]:
    """What a result is of; a result of something else does not count as finished."""
    config, recipe = plan(options, study, variant)
    return {"study": study, "images": options.images, "model": asdict(config), "recipe": asdict(recipe)}


def path_of(options: argparse.Namespace, study: str, variant: str, seed: int) -> Path:
    path: Path = options.out / f"{study}-{variant}-seed{seed}.json"
    return path


if __name__ == "__main__":
    main()
