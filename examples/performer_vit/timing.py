"""Time a training step and inference with every kernel, in turns, against softmax: what one process measures drifts."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from examples.common import results
from examples.common.options import add_options, make_accelerator
from examples.common.timing import in_turns, inference, noise, record, training
from examples.common.train import Step

from . import report
from .variants import MAIN, OF_LENGTH, SETS, STUDIES, VARIANTS, build, configure

BASELINE = "softmax"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    accelerator = make_accelerator(options)
    # Every variant compiles the same functions anew, more often than torch's guard against endless compilation allows.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    for study in options.studies:
        torch.compiler.reset()
        measure(options, study, accelerator)
    print(report.cost(options.out))


def measure(options: argparse.Namespace, study: str, accelerator: Any) -> None:
    """Time and record one part of the study."""
    _, config, recipe = STUDIES[study]
    recipe = replace(recipe, compile=options.compile, capture=options.capture)
    shape = config.channels, config.image_size, config.image_size
    images = noise(max(recipe.batch_size, options.batch), shape).to(accelerator.device)
    chosen = options.variants or SETS.get(study, MAIN)
    variants = [BASELINE, *(name for name in chosen if name != BASELINE)]
    models = {name: build(configure(config, name), seed=0).to(accelerator.device) for name in variants}
    rows: dict[str, dict[str, Any]] = {name: {} for name in variants}

    steps = {name: training(Step(model, images, recipe, accelerator)) for name, model in models.items()}
    record(rows, "step", "ms", in_turns(steps, options.rounds, options.calls, accelerator.device), BASELINE)
    del steps
    passes = {
        name: inference(model, images, options.batch, accelerator, options.capture) for name, model in models.items()
    }
    times = in_turns(passes, options.rounds, options.calls, accelerator.device)
    per_10_000 = {name: [10_000 / options.batch * ms for ms in values] for name, values in times.items()}
    record(rows, "inference", "ms_per_10000", per_10_000, BASELINE)

    path = options.out / f"timing-{study}.json"
    before = json.loads(path.read_text())["rows"] if options.resume and path.exists() else {}
    result = {
        "study": study,
        "model": asdict(config),
        "recipe": asdict(recipe),
        "inference_batch": options.batch,
        "rounds": options.rounds,
        "calls": options.calls,
        "precision": accelerator.mixed_precision,
        **results.environment(accelerator.device),
        "rows": {**before, **rows},
    }
    results.write(path, result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.performer_vit.timing", description=__doc__)
    gpu = torch.cuda.is_available()
    default = ["mnist", "cifar10", *OF_LENGTH]
    parser.add_argument(
        "--studies", choices=STUDIES, nargs="+", default=default, metavar="STUDY",
        help="of " + ", ".join(STUDIES) + "; gives the sizes; the images are noise",
    )  # fmt: skip
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", metavar="VARIANT", help="by default the study's")
    parser.add_argument("--rounds", type=int, default=21, help="each times every variant once")
    parser.add_argument("--calls", type=int, default=10 if gpu else 1, help="timed together")
    parser.add_argument("--batch", type=int, default=500, help="of inference")
    add_options(parser, out="runs/performer_vit")
    parser.set_defaults(compile="blocks" if gpu else "no", capture=gpu)
    options = parser.parse_args(arguments)
    if options.small:
        options.studies, options.rounds, options.batch = ["mnist-small"], min(options.rounds, 5), 100
    return options


if __name__ == "__main__":
    main()
