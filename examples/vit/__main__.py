"""Train one small Vision Transformer with each position encoding under one recipe, and compare them."""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from examples.common import plot, results
from examples.common.data import DATASETS, Images, load
from examples.common.options import add_options, make_accelerator
from examples.common.train import Recipe, fit, inference_ms
from fastrpe.models import ViT, ViTConfig
from fastrpe.models.vit import POSITIONS

BAR = 0.92  # what the rotary encodings reach on the shipped subset, in the recipe below
DEMO = ("none", "learned", "rope", "cayley", "circulant")
STUDIES = {
    "mnist-small": (
        ViTConfig(image_size=28, patch_size=7, channels=1, dim=64, depth=4, heads=4),
        Recipe(epochs=16, batch_size=50, lr=2e-3),
    ),
    "mnist": (
        ViTConfig(image_size=28, patch_size=4, channels=1, dim=128, depth=6, heads=4),
        Recipe(epochs=20, batch_size=256, lr=2e-3),
    ),
    "cifar10": (
        ViTConfig(image_size=32, patch_size=4, channels=3, dim=192, depth=8, heads=6, drop_path=0.1),
        Recipe(epochs=100, batch_size=512, lr=2e-3, weight_decay=0.1),
    ),
}


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parse(arguments)
    accelerator = make_accelerator(options)
    with accelerator.main_process_first():
        images = load(options.dataset, options.data_root)
    config, recipe = STUDIES[options.dataset]
    if options.small:
        images = images.head(2000, 1000)
        config, recipe = replace(config, dim=64, depth=4, heads=4), replace(recipe, epochs=4, batch_size=50)
    recipe = replace(recipe, epochs=options.epochs or recipe.epochs, compile=options.compile, capture=options.capture)
    runs = [(position, seed) for seed in options.seeds for position in options.positions]
    shape = f"{len(images.train_images):,} + {len(images.test_images):,} images"
    accelerator.print(f"{options.dataset}: {shape}, {recipe.epochs} epochs on {accelerator.device}, {len(runs)} runs")
    found = []
    for position, seed in runs:
        path = options.out / f"{options.dataset}-{position}-seed{seed}.json"
        one = replace(config, position=position)
        if not (options.resume and (last := finished(path, one, recipe, images))):
            last = run(one, recipe, images, seed, accelerator, path, options.resume)
            accelerator.print(f"{position}, seed {seed}: {100 * last['accuracy']:.2f} %, {last['train_seconds']:.0f} s")
        found.append(last)
    if accelerator.is_main_process:
        picture = options.out / f"{options.dataset}.png"
        plot.accuracy_figure(found, picture, f"ViT on {options.dataset}")
        print(f"\n{show(found)}\n\nplot: {picture}")
    if options.check and (missed := misses(found)):
        raise SystemExit("\n".join(missed))
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.vit", description=__doc__)
    parser.add_argument("--demo", action="store_true", help="five encodings on the shipped subset; no download")
    parser.add_argument("--dataset", choices=DATASETS, default="mnist-small", help="by default the shipped subset")
    parser.add_argument("--positions", choices=POSITIONS, nargs="+", default=list(DEMO))
    parser.add_argument(
        "--check", action="store_true", help=f"fail where RoPE or STRING is under {BAR} or not above no position"
    )
    add_options(parser, out="runs/vit")
    options = parser.parse_args(arguments)
    if options.demo:
        options.dataset, options.positions = "mnist-small", list(DEMO)
    return options


def run(
    config: ViTConfig,
    recipe: Recipe,
    images: Images,
    seed: int,
    accelerator: Accelerator,
    path: Path,
    resume: bool,
) -> dict[str, Any]:
    """Train, time and record one model."""
    torch.compiler.reset()  # graphs of the models before this one count against the limit on recompilations
    set_seed(seed)
    model = ViT(config)
    label = f"{config.position}, seed {seed}"
    checkpoint = path.with_suffix(".checkpoint")
    history = fit(model, images, recipe, accelerator, seed, checkpoint, resume, label)
    plain = folded = inference_ms(model, images, accelerator)
    if config.position not in ("none", "learned", "rope", "rope-mixed"):
        model.fold()
        folded = inference_ms(model, images, accelerator)
        model.unfold()
    result = {
        "variant": config.position,
        "seed": seed,
        "accuracy": history.accuracy[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds_per_epoch": history.seconds_per_epoch,
        "train_seconds": sum(history.seconds),
        "inference_ms_per_1000": plain,
        "inference_ms_per_1000_folded": folded,
        "accuracy_by_epoch": history.accuracy,
        "train_loss_by_epoch": history.train_loss,
        "test_loss_by_epoch": history.test_loss,
        **describe(config, recipe, images),
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        **results.environment(accelerator.device),
    }
    if accelerator.is_main_process:
        results.write(path, result)
        shutil.rmtree(checkpoint)
    return result


def finished(path: Path, config: ViTConfig, recipe: Recipe, images: Images) -> dict[str, Any] | None:
    """The result in ``path``, if it is of the same model, recipe and images."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    same = describe(config, recipe, images)
    return result if {key: result[key] for key in same} == same else None


def describe(config: ViTConfig, recipe: Recipe, images: Images) -> dict[str, Any]:
    count = [len(images.train_images), len(images.test_images)]
    return {"dataset": images.name, "images": count, "model": asdict(config), "recipe": asdict(recipe)}


def misses(found: list[dict[str, Any]]) -> list[str]:
    """What falls short, of encodings of queries and keys: ``BAR``, or no position under the same seed."""
    none = {run["seed"]: run["accuracy"] for run in found if run["variant"] == "none"}
    missed = []
    for run in found:
        accuracy, floor = run["accuracy"], none.get(run["seed"], 0.0)
        if run["variant"] not in ("none", "learned") and not (accuracy >= BAR and accuracy > floor):
            name = f"{run['variant']}, seed {run['seed']}"
            missed.append(f"{name}: accuracy must be at least {BAR} and above {floor}, got {accuracy}")
    return missed


def show(found: list[dict[str, Any]]) -> str:
    """Accuracy as mean and deviation over seeds, times as medians."""

    def accuracy(runs: list[dict[str, Any]]) -> str:
        mean, deviation = results.spread([100 * run["accuracy"] for run in runs])
        return f"{mean:.2f} +- {deviation:.2f}" if len(runs) > 1 else f"{mean:.2f}"

    def middle(key: str, form: str) -> Any:
        return lambda runs: format(median(run[key] for run in runs), form)

    columns = {
        "accuracy, %": accuracy,
        "parameters": lambda runs: f"{runs[0]['parameters']:,}",
        "train, s/epoch": middle("train_seconds_per_epoch", ".2f"),
        "inference, ms/1000": middle("inference_ms_per_1000", ".1f"),
        "folded": middle("inference_ms_per_1000_folded", ".1f"),
    }
    return results.table(found, columns)


if __name__ == "__main__":
    main()
