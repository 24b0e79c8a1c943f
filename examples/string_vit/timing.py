"""Time a training step and inference with every encoding, in turns, against RoPE: what one process measures drifts."""

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
from .variants import STUDIES, VARIANTS, build, configure

BASELINE = "rope"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    accelerator = make_accelerator(options)
    config, recipe = STUDIES[options.dataset]
    recipe = replace(recipe, compile=options.compile, capture=options.capture)
    shape = config.channels, config.image_size, config.image_size
    images = noise(max(recipe.batch_size, options.batch), shape).to(accelerator.device)
    # Every variant compiles the same functions anew, more often than torch's guard against endless compilation allows.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    variants = [BASELINE, *(name for name in options.variants if name != BASELINE)]
    models = {name: build(configure(config, name), seed=0).to(accelerator.device) for name in variants}
    rows: dict[str, dict[str, Any]] = {name: {} for name in variants}

    steps = {name: training(Step(model, images, recipe, accelerator)) for name, model in models.items()}
    record(rows, "step", "ms", in_turns(steps, options.rounds, options.calls, accelerator.device), BASELINE)
    del steps
    for key in ("inference", "folded"):
        if key == "folded":
            models = {name: model.fold() for name, model in models.items()}
        passes = {
            name: inference(model, images, options.batch, accelerator, options.capture)
            for name, model in models.items()
        }
        times = in_turns(passes, options.rounds, options.calls, accelerator.device)
        per_10_000 = {name: [10_000 / options.batch * ms for ms in values] for name, values in times.items()}
        record(rows, key, "ms_per_10000", per_10_000, BASELINE)

    path = options.out / f"timing-{options.dataset}.json"
    before = json.loads(path.read_text())["rows"] if options.resume and path.exists() else {}
    result = {
        "dataset": options.dataset,
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
    print(report.cost(options.out))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.string_vit.timing", description=__doc__)
    gpu = torch.cuda.is_available()
    parser.add_argument("--dataset", choices=STUDIES, default="cifar10", help="gives the sizes; the images are noise")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--rounds", type=int, default=21, help="each times every variant once")
    parser.add_argument("--calls", type=int, default=10 if gpu else 1, help="timed together")
    parser.add_argument("--batch", type=int, default=1000, help="of inference")
    add_options(parser, out="runs/string_vit")
    parser.set_defaults(compile="blocks" if gpu else "no", capture=gpu)
    options = parser.parse_args(arguments)
    if options.small:
        options.dataset, options.rounds, options.batch = "mnist-small", min(options.rounds, 5), 100
    return options


if __name__ == "__main__":
    main()
