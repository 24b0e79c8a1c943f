"""Train a small Vision Transformer with softmax attention and with Performers, also at 16 to 1024 tokens an image."""

import argparse
import sys
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from examples.common import folders, study
from examples.common.data import load
from examples.common.options import add_options
from examples.common.train import Recipe, inference_ms
from fastrpe.models import ViT, ViTConfig

from . import report
from .variants import MAIN, OF_FOLDERS, OF_LENGTH, SETS, STUDIES, VARIANTS, build, configure, seeds_of

GROUPS = {"main": ["mnist", "cifar10"], "lengths": OF_LENGTH}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    wanted = [
        (name, variant, options.seeds or seeds_of(name))
        for name in options.studies
        for variant in options.variants or SETS.get(name, MAIN)
    ]
    study.main(STUDY, options, arguments, wanted)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.performer_vit", description=__doc__)
    choices = [*GROUPS, *STUDIES]
    parser.add_argument(
        "--studies", choices=choices, nargs="+", default=list(GROUPS), metavar="STUDY", help="of " + ", ".join(choices)
    )
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", metavar="VARIANT", help="by default the study's")
    add_options(parser, out="runs/performer_vit")
    study.add_options(parser)
    parser.set_defaults(seeds=None)
    parser.add_argument("--batch-size", type=int, help="instead of the recipe's")
    parser.add_argument("--redraw-every", type=int, default=0, help="steps between new projections of favor")
    options = parser.parse_args(arguments)
    if options.small:
        options.studies, options.seeds = ["mnist-small"], (options.seeds or [0])[:1]
        options.images = options.images or 2000
    options.studies = [name for given in options.studies for name in GROUPS.get(given, [given])]
    if options.data_root is None and (there := [name for name in options.studies if name in OF_FOLDERS]):
        parser.error(f"--data-root must be given for {there[0]}, which is not downloaded")
    return options


def measure(model: ViT, images: Any, accelerator: Accelerator) -> dict[str, Any]:
    learned = sum(p.numel() for name, p in model.named_parameters() if "feature_map" in name)
    return {"parameters_of_features": learned, "inference_ms_per_1000": inference_ms(model, images, accelerator)}


def plan(options: argparse.Namespace, name: str, variant: str) -> tuple[ViTConfig, Recipe]:
    _, config, recipe = STUDIES[name]
    recipe = replace(
        recipe,
        epochs=options.epochs or recipe.epochs,
        lr=options.lr or recipe.lr,
        batch_size=options.batch_size or recipe.batch_size,
        compile=options.compile,
        capture=options.capture and name not in OF_FOLDERS,  # their batches come from the host
    )
    config = configure(config, variant)
    if options.redraw_every and config.kernel == "performer-favor":
        config = replace(config, kernel_options={**config.kernel_options, "redraw_every": options.redraw_every})
    return config, recipe


def read(options: argparse.Namespace, name: str) -> Any:
    data_set, config, _ = STUDIES[name]
    if name in OF_FOLDERS:
        images: Any = folders.load(data_set, options.data_root, config.image_size)
    else:
        images = load(data_set, options.data_root)
    return images.head(options.images, options.images) if options.images else images


STUDY = study.Study(
    module="examples.performer_vit",
    key="study",
    option="--studies",
    read=read,
    plan=plan,
    build=lambda options, config, seed: build(config, seed),
    measure=measure,
    report=report.write,
)

if __name__ == "__main__":
    main()
