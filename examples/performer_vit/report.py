"""Tables and plots of the study's results: all of them, or those that are named."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from examples.common import results
from examples.common.plot import COLOURS, pyplot
from examples.common.report import MARKS as MARKS
from examples.common.report import (
    Check,
    Parts,
    accuracies,
    check_table,
    command,
    devices_of,
    difference,
    make,
    save,
    seeds_of,
)

from .variants import FTHETA, OF_FOLDERS, OF_LENGTH, STUDIES, VARIANTS, tokens

RESULTS = Path(__file__).parent / "results"
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "mnist-small": "MNIST subset"}
TITLES |= {"imagenet": "ImageNet", "places365": "Places365"}
SIZES = {"mnist": 60_000, "cifar10": 50_000, "mnist-small": 4_000}  # training images
BARS = {64: 1.0, 256: 1.0, 1024: 1 / 1.5}  # most of the softmax step's time, by tokens
LOOKS = {  # colour, marker
    "softmax": (COLOURS["black"], "s"),
    "relu": (COLOURS["green"], "^"),
    "exp": (COLOURS["orange"], "v"),
    "favor": (COLOURS["blue"], "o"),
    "ftheta": (COLOURS["red"], "D"),
    "ftheta-relu": (COLOURS["purple"], "P"),
    "ftheta-square": (COLOURS["yellow"], "X"),
    "ftheta-polynomial": (COLOURS["sky"], "*"),
    "ftheta-mlp": (COLOURS["grey"], "d"),
}

Runs = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    command("python -m examples.performer_vit.report", PARTS, RESULTS, arguments)


def write(out: Path) -> str:
    """The whole report."""
    return make(PARTS, out)


# Reading -------------------------------------------------------------------------------------------------------------


def runs_of(out: Path, studies: Iterable[str]) -> dict[str, dict[str, Runs]]:
    """Runs by study and variant, both in the study's order."""
    found = sorted(results.read(out, "*-seed*.json"), key=lambda run: int(run["seed"]))
    grouped = {
        study: {name: [run for run in found if (run["study"], run["variant"]) == (study, name)] for name in VARIANTS}
        for study in studies
    }
    kept = {study: {name: runs for name, runs in group.items() if runs} for study, group in grouped.items()}
    return {study: group for study, group in kept.items() if group}


def timings_of(out: Path) -> dict[str, dict[str, Any]]:
    paths = {study: out / f"timing-{study}.json" for study in STUDIES}
    return {study: json.loads(path.read_text()) for study, path in paths.items() if path.exists()}


def epoch_seconds(timing: dict[str, Any], variant: str) -> float:
    """Steps of an epoch times the time of one."""
    steps = SIZES[STUDIES[timing["study"]][0]] // timing["recipe"]["batch_size"]
    return float(steps * timing["rows"][variant]["step_ms"]) / 1e3


def title(study: str) -> str:
    return TITLES.get(study) or f"CIFAR-10, {tokens(study)} tokens"


def at_fixed_length() -> list[str]:
    return [study for study in STUDIES if study not in OF_LENGTH]


# Tables --------------------------------------------------------------------------------------------------------------


def checks(out: Path) -> str:
    """What the study was to show, and whether it does."""
    rows: list[Check] = []
    for study, group in runs_of(out, at_fixed_length()).items():
        for name in (name for name in FTHETA if name in group):
            for other in (other for other in ("relu", "exp") if other in group):
                rows.append(difference(f"{title(study)}: {name} - {other}", group[name], group[other], least=1))
    for study, timing in timings_of(out).items():
        bar = BARS.get(tokens(study))
        if bar is not None and study not in OF_FOLDERS:
            for name in (name for name in timing["rows"] if name != "softmax"):
                ratio = timing["rows"][name]["step_ratio"][1]
                what = f"{title(study)}: an epoch of {name}"
                rows.append((what, f"{ratio:.3f} x softmax's, at most {bar:.2f}", ratio <= bar))
    return check_table(rows)


def accuracy(out: Path) -> str:
    """Accuracy, and what a training and a test pass of the variant take."""
    timings = timings_of(out)
    found = runs_of(out, at_fixed_length()).items()
    return "\n\n".join(_accuracy(study, group, timings.get(study)) for study, group in found)


def _accuracy(study: str, group: dict[str, Runs], timing: dict[str, Any] | None) -> str:
    rows = timing["rows"] if timing else {}

    def seconds(runs: Runs) -> str:
        name = runs[0]["variant"]
        if timing:  # times that came with other work do not stand beside times that did not
            return f"{epoch_seconds(timing, name):.3f}" if name in rows else "-"
        return f"{_middle(runs, 'train_seconds_per_epoch'):.2f}"

    def inference(runs: Runs) -> str:
        name = runs[0]["variant"]
        if timing:
            return f"{rows[name]['inference_ms_per_10000']:.1f}" if name in rows else "-"
        return f"{10 * _middle(runs, 'inference_ms_per_1000'):.1f}"

    columns = {
        "accuracy, %": _cell,
        "learned by the features": lambda runs: f"{runs[0]['parameters_of_features']:,}",
        "train, s/epoch": seconds,
        "inference, ms/10,000": inference,
    }
    first = next(iter(group.values()))
    seeds = seeds_of(group)
    head = f"**{title(study)}** (tokens: {tokens(study)}, epochs: {first[0]['recipe']['epochs']}, seeds: {seeds}, "
    head += f"{devices_of(group)}): mean and deviation of the accuracy; "
    head += "times without contention, as below." if rows else "times as they came."
    return head + "\n\n" + results.table([run for runs in group.values() for run in runs], columns)


def length(out: Path) -> str:
    """Accuracy and time of an epoch against the number of tokens."""
    found, timings = runs_of(out, OF_LENGTH), timings_of(out)
    there = [study for study in OF_LENGTH if study in found or study in timings]
    names = [name for name in VARIANTS if any(name in found.get(s, ()) or _timed(timings, s, name) for s in there)]
    columns: dict[str, Callable[[Runs], str]] = {}
    for study in there:
        columns[f"{tokens(study)}: accuracy, %"] = lambda runs, study=study: (  # type: ignore[misc]
            _cell(found[study][runs[0]["variant"]]) if runs[0]["variant"] in found.get(study, ()) else "-"
        )
    for study in there:
        columns[f"{tokens(study)}: s/epoch"] = lambda runs, study=study: _seconds(  # type: ignore[misc]
            found, timings, study, runs[0]["variant"]
        )
    if not names:
        return ""
    head = "**CIFAR-10 against the number of tokens**: accuracy, and the time of an epoch."
    return head + "\n\n" + results.table([{"variant": name} for name in names], columns)


def cost(out: Path) -> str:
    """Time of a step and of inference, as multiples of softmax's."""
    texts = []
    for study, timing in timings_of(out).items():

        def times(key: str, unit: str, timing: dict[str, Any] = timing) -> Callable[[Runs], str]:
            return lambda runs: f"{timing['rows'][runs[0]['variant']][f'{key}_{unit}']:.2f}"

        def ratio(key: str, timing: dict[str, Any] = timing) -> Callable[[Runs], str]:
            return lambda runs: "{1:.3f} ({0:.3f}, {2:.3f})".format(*timing["rows"][runs[0]["variant"]][f"{key}_ratio"])

        columns = {
            "step, ms": times("step", "ms"),
            "step / softmax's": ratio("step"),
            "inference, ms/10,000": times("inference", "ms_per_10000"),
            "inference / softmax's": ratio("inference"),
        }
        step, test = timing["recipe"]["batch_size"], timing["inference_batch"]
        head = f"**Time, {title(study)}** ({tokens(study)} tokens): step of {step} images, inference by {test}, "
        head += (
            f"{timing['precision']}, {timing['device']}; medians of {timing['rounds']} rounds, ratios with quartiles."
        )
        names = [name for name in VARIANTS if name in timing["rows"]]
        texts.append(head + "\n\n" + results.table([{"variant": name} for name in names], columns))
    return "\n\n".join(texts)


def _cell(runs: Runs) -> str:
    mean, deviation = results.spread(accuracies(runs))
    return f"{mean:.2f} ± {deviation:.2f}" if len(runs) > 1 else f"{mean:.2f}"


def _middle(runs: Runs, key: str) -> float:
    return sorted(float(run[key]) for run in runs)[len(runs) // 2]


def _timed(timings: dict[str, dict[str, Any]], study: str, name: str) -> bool:
    return study in timings and name in timings[study]["rows"]


def _seconds(found: dict[str, dict[str, Runs]], timings: dict[str, dict[str, Any]], study: str, name: str) -> str:
    """Of an epoch: timed in turns, or where no length was, as it came."""
    if _timed(timings, study, name):
        return f"{epoch_seconds(timings[study], name):.3f}"
    runs = [] if any(s in timings for s in OF_LENGTH) else found.get(study, {}).get(name, [])
    return f"{_middle(runs, 'train_seconds_per_epoch'):.2f}" if runs else "-"


# Plots ---------------------------------------------------------------------------------------------------------------


def tradeoff_plot(out: Path) -> str:
    """Accuracy against the time of an epoch and of inference."""
    found, timings = runs_of(out, at_fixed_length()), timings_of(out)
    if not found:
        return ""
    plt = pyplot()
    figure, axes = plt.subplots(len(found), 2, figsize=(9.5, 0.6 + 3.2 * len(found)), squeeze=False, sharey="row",
                                layout="constrained")  # fmt: skip
    for line, (study, group) in zip(axes, found.items()):
        for name, runs in group.items():
            colour, marker = LOOKS[name]
            mean, deviation = results.spread(accuracies(runs))
            x = [_middle(runs, "train_seconds_per_epoch"), 10 * _middle(runs, "inference_ms_per_1000")]
            if study in timings and not _timed(timings, study, name):
                continue
            if study in timings:
                x = [epoch_seconds(timings[study], name), timings[study]["rows"][name]["inference_ms_per_10000"]]
            for axis, time in zip(line, x):
                look = dict(color=colour, marker=marker, markersize=7, capsize=3, linestyle="")
                axis.errorbar(time, mean, deviation, label=name, **look)
        line[0].set(xlabel="training, s / epoch", ylabel="test accuracy, %", title=title(study))
        line[1].set(xlabel="inference, ms / 10,000 images", title=title(study))
        line[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
        for axis in line:
            axis.grid(alpha=0.3)
    return save(figure, out, "tradeoff", "Test accuracy, mean and deviation, against time")


def length_plot(out: Path) -> str:
    """Time of an epoch, and accuracy, against the number of tokens."""
    found, timings = runs_of(out, OF_LENGTH), timings_of(out)
    if not found and not any(study in timings for study in OF_LENGTH):
        return ""
    plt = pyplot()
    panels = 3 if found else 2  # without trainings there is no accuracy
    figure, axes = plt.subplots(1, panels, figsize=(1 + 4 * panels, 4), layout="constrained")
    time, ratio, right = axes[0], axes[1], axes[-1]
    for name, (colour, marker) in LOOKS.items():
        look = dict(color=colour, marker=marker, label=name)
        there = [study for study in OF_LENGTH if _timed(timings, study, name)]
        if there:
            x = [tokens(study) for study in there]
            time.plot(x, [epoch_seconds(timings[study], name) for study in there], **look)
            ratio.plot(x, [timings[study]["rows"][name]["step_ratio"][1] for study in there], **look)
        there = [study for study in OF_LENGTH if name in found.get(study, ())]
        if there:
            mean, deviation = zip(*(results.spread(accuracies(found[study][name])) for study in there))
            right.errorbar([tokens(study) for study in there], mean, deviation, capsize=3, **look)
    time.set(ylabel="training, s / epoch", yscale="log")
    ratio.set(ylabel="time of an epoch / softmax's")
    for n, bar in BARS.items():
        ratio.plot([n / 1.2, n * 1.2], [bar, bar], color=COLOURS["grey"], linestyle="--", linewidth=1.5)
    if found:
        right.set(ylabel="test accuracy, %")
    x = [tokens(study) for study in OF_LENGTH]
    for axis in axes:
        axis.set(xscale="log", xlabel="tokens")
        axis.set_xticks(x, x)
        axis.xaxis.set_minor_locator(plt.NullLocator())
        axis.grid(alpha=0.3)
    time.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    time.yaxis.set_major_formatter("{x:g}")
    time.yaxis.set_minor_locator(plt.NullLocator())
    right.legend(*max((axis.get_legend_handles_labels() for axis in (time, right)), key=lambda both: len(both[0])),
                 loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)  # fmt: skip
    return save(figure, out, "length", "Time of an epoch and accuracy against the number of tokens; dashed: the bars")


PARTS: Parts = {
    "checks": checks,
    "accuracy": accuracy,
    "tradeoff-plot": tradeoff_plot,
    "length": length,
    "length-plot": length_plot,
    "cost": cost,
}

if __name__ == "__main__":
    main()
