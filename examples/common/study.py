"""A study as a command: every variant trained in each part of the study under several seeds, side by side if asked."""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from fastrpe.models import ViTConfig

from . import results
from .jobs import finished, locked, side_by_side
from .options import make_accelerator
from .train import Recipe, fit

Options = argparse.Namespace
Part = tuple[str, str, list[int]]  # part, variant, seeds: they share what is compiled


@dataclass(frozen=True)
class Study:
    """What a study says of itself. A part of it is a data set, or another setting in which variants are compared."""

    module: str  # of ``python -m``
    key: str  # what results call a part
    option: str  # that names parts
    read: Callable[[Options, str], Any]  # the images of a part
    plan: Callable[[Options, str, str], tuple[ViTConfig, Recipe]]  # of a part and a variant
    build: Callable[[Options, ViTConfig, int], nn.Module]  # the model as it starts under a seed
    measure: Callable[[Any, Any, Accelerator], dict[str, Any]]  # what it adds to the result of a trained model
    report: Callable[[Path], str]  # of a folder of results
    described: Sequence[str] = ()  # options that change what a result is of

    def describe(self, options: Options, part: str, variant: str) -> dict[str, Any]:
        """What a result is of; a result of something else does not count as finished."""
        config, recipe = self.plan(options, part, variant)
        named = {name: getattr(options, name) for name in ("images", *self.described)}
        return {self.key: part, **named, "model": asdict(config), "recipe": asdict(recipe)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is asked of many trainings, beside `options.add_options`."""
    gpu = torch.cuda.is_available()
    parser.set_defaults(seeds=[0, 1, 2], compile="blocks" if gpu else "no", capture=gpu and not _launched())
    parser.add_argument("--lr", type=float, help="instead of the recipe's")
    parser.add_argument("--images", type=int, help="train on the first so many images, test on as many at most")
    parser.add_argument("--jobs", type=int, default=1, help="processes on each device; on a GPU one trains at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many; see --resume")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)


def main(study: Study, options: Options, arguments: list[str], wanted: Iterable[Part]) -> None:
    """Train what is ``wanted`` and not finished, then report on all there is."""
    end = time.monotonic() + 60 * options.minutes
    parts: list[Part] = []
    for part, variant, seeds in wanted:
        same = study.describe(options, part, variant)
        done = [options.resume and finished(path_of(options, part, variant, seed), same) for seed in seeds]
        if left := [seed for seed, there in zip(seeds, done) if not there]:
            parts.append((part, variant, left))
    gpus = range(torch.cuda.device_count() if options.device != "cpu" and not _launched() else 0)
    slots = [gpu for _ in range(options.jobs) for gpu in gpus or [None]]
    failed = []
    if len(slots) == 1:
        train(study, options, parts, end)
    else:
        print(f"{sum(len(seeds) for *_, seeds in parts)} runs, {len(slots)} processes", flush=True)
        jobs = [
            (f"{part} {variant}", [study.option, part, "--variants", variant, "--seeds", *map(str, seeds)])
            for part, variant, seeds in parts
        ]
        failed = side_by_side(study.module, arguments, jobs, options.out, slots, end)
    if not options.worker and int(os.environ.get("RANK", 0)) == 0:
        print("\n" + study.report(options.out))
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def train(study: Study, options: Options, parts: list[Part], end: float) -> None:
    """All of ``parts`` in this process, one after the other."""
    accelerator = make_accelerator(options)
    images, held = None, None
    for part, variant, seeds in parts:
        torch.compiler.reset()  # graphs of the variants before this one count against the limit on recompilations
        for seed in seeds:
            if time.monotonic() > end:
                return
            if part != held:
                with accelerator.main_process_first():
                    images, held = study.read(options, part).to(accelerator.device), part
            run(study, options, images, part, variant, seed, accelerator)


def run(
    study: Study, options: Options, images: Any, part: str, variant: str, seed: int, accelerator: Accelerator
) -> None:
    """Train, measure and record one model."""
    start = time.monotonic()
    config, recipe = study.plan(options, part, variant)
    model = study.build(options, config, seed)
    turn = locked(options.turn) if options.turn else None
    label = f"{part} {variant}, seed {seed}"
    history = fit(model, images, recipe, accelerator, seed, label=label, turn=turn)
    result = {
        "variant": variant,
        "seed": seed,
        "accuracy": history.accuracy[-1],
        **study.measure(model, images, accelerator),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds_per_epoch": history.seconds_per_epoch,
        "train_seconds": sum(history.seconds),
        "wall_seconds": time.monotonic() - start,
        "epochs_evaluated": history.evaluated,
        "accuracy_by_epoch": history.accuracy,
        "test_loss_by_epoch": [round(loss, 5) for loss in history.test_loss],
        "train_loss_by_epoch": [round(loss, 5) for loss in history.train_loss],
        **study.describe(options, part, variant),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **results.environment(accelerator.device),
    }
    if accelerator.is_main_process:
        results.write(path_of(options, part, variant, seed), result)
        print(f"{label}: {100 * result['accuracy']:.2f} %, {result['wall_seconds']:.0f} s", flush=True)


def path_of(options: Options, part: str, variant: str, seed: int) -> Path:
    path: Path = options.out / f"{part}-{variant}-seed{seed}.json"
    return path


def _launched() -> bool:
    """By accelerate or torchrun: one training over all processes."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1
