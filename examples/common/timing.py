"""Times of training steps and of inference, taken in turns in one process: what drifts meets all models alike."""

import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from .data import Augment, Images
from .train import Captured, Step

Times = dict[str, list[float]]  # of each variant, milliseconds in each round


def noise(count: int, shape: tuple[int, int, int], classes: int = 10) -> Images:
    images = torch.randint(256, (count, *shape), dtype=torch.uint8)
    labels, one = torch.randint(classes, (count,)), torch.ones(shape[0], 1, 1)
    return Images("noise", images, labels, images, labels, 0.5 * one, 0.25 * one, Augment(4, flip=True))


def training(step: Step) -> Callable[[], None]:
    plan = step.images.plan(0, 0)[:, : step.recipe.batch_size]
    return lambda: step(plan, 1e-4)


def inference(model: nn.Module, images: Images, batch: int, accelerator: Accelerator, capture: bool) -> Any:
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


def record(rows: dict[str, dict[str, Any]], key: str, unit: str, times: Times, baseline: str) -> None:
    """Medians over the rounds: the time, and its ratio to the baseline's in the same round with quartiles."""
    for name, values in times.items():
        ratios = [a / b for a, b in zip(values, times[baseline])]
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows[name][f"{key}_{unit}"] = round(median(values), 4)
        rows[name][f"{key}_ratio"] = [round(ratio, 4) for ratio in (low, middle, high)]
