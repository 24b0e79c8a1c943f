"""Time a training step and inference with every encoding, in turns, against RoPE: what one process measures drifts."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from statistics import median, quantiles
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from examples.common import results
from examples.common.data import Augment, Images
from examples.common.options import add_options, make_accelerator
from examples.common.train import Captured, Step
from fastrpe.models import ViT

from . import report
from .variants import STUDIES, VARIANTS, build, configure

BASELINE = "rope"
Times = dict[str, list[float]]  # of each variant, milliseconds in each round


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
    record(rows, "step", "ms", in_turns(steps, options.rounds, options.calls, accelerator.device))
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
        record(rows, key, "ms_per_10000", per_10_000)

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


def noise(count: int, shape: tuple[int, int, int]) -> Images:
    images = torch.randint(256, (count, *shape), dtype=torch.uint8)
    labels, one = torch.randint(10, (count,)), torch.ones(shape[0], 1, 1)
    return Images("noise", images, labels, images, labels, 0.5 * one, 0.25 * one, Augment(4, flip=True))


def training(step: Step) -> Callable[[], None]:
    plan = step.images.plan(0, 0)[:, : step.recipe.batch_size]
    return lambda: step(plan, 1e-4)


def inference(model: ViT, images: Images, batch: int, accelerator: Accelerator, capture: bool) -> Callable[[], None]:
    x = images.normalise(images.test_images[:batch])
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        with accelerator.autocast():
            model(x)

    return Captured(forward) if capture and accelerator.device.type == "cuda" else forward


def in_turns(calls: dict[str, Callable[[], None]], rounds: int, count: int, device: torch.device) -> Times:
    """Milliseconds of a call of each, after a warm-up; the order turns from round to round."""
    names = list(calls)
    for name in tqdm(names, desc="compile", disable=None):
        for _ in range(5):
            calls[name]()
    times: Times = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(calls[name], count, device))
    return times


def timed(call: Callable[[], None], count: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / count


def record(rows: dict[str, dict[str, Any]], key: str, unit: str, times: Times) -> None:
    """Medians over the rounds: the time, and its ratio to RoPE's in the same round with quartiles."""
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[BASELINE])]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows[name][f"{key}_{unit}"] = round(median(values), 4)
        rows[name][f"{key}_ratio"] = [round(ratio, 4) for ratio in (low, middle, high)]


if __name__ == "__main__":
    main()
