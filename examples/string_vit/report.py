"""Tables and plots of the study's results: all of them, or those that are named."""

import json
from collections.abc import Callable
from math import sqrt
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

from .variants import FRACTIONS, STUDIES, VARIANTS

RESULTS = Path(__file__).parent / "results"
TITLES = {"mnist": "MNIST", "cifar10": "CIFAR-10", "mnist-small": "MNIST subset"}
BARS = {"dense": 1.05, "sparse": 1.10, "folded": 1.02}  # times RoPE's
STRING = [name for name in VARIANTS if name.startswith(("cayley", "circulant", "reflection-s", "sparse"))]
FAMILIES = {  # prefix of the variants' names: colour, marker
    "none": (COLOURS["grey"], "X"),
    "learned": (COLOURS["black"], "P"),
    "rope-mixed": (COLOURS["blue"], "o"),
    "rope": (COLOURS["sky"], "o"),
    "cayley": (COLOURS["red"], "D"),
    "circulant": (COLOURS["green"], "^"),
    "reflection": (COLOURS["purple"], "s"),
    "sparse": (COLOURS["orange"], "v"),
}

Runs = list[dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    command("python -m examples.string_vit.report", PARTS, RESULTS, arguments)


def write(out: Path) -> str:
    """The whole report."""
    return make(PARTS, out)


# Reading -------------------------------------------------------------------------------------------------------------


def runs_of(out: Path) -> dict[str, dict[str, Runs]]:
    """Runs by data set and variant, both in the study's order."""
    found = results.read(out, "*-seed*.json")
    grouped = {
        dataset: {
            name: sorted((run for run in found if (run["dataset"], run["variant"]) == (dataset, name)), key=_seed)
            for name in VARIANTS
        }
        for dataset in STUDIES
    }
    kept = {dataset: {name: runs for name, runs in group.items() if runs} for dataset, group in grouped.items()}
    return {dataset: group for dataset, group in kept.items() if group}


def timing_of(out: Path, dataset: str) -> dict[str, Any] | None:
    path = out / f"timing-{dataset}.json"
    timing: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return timing


def any_timing(out: Path) -> dict[str, Any] | None:
    """CIFAR-10's, or else another."""
    return next(filter(None, (timing_of(out, dataset) for dataset in ("cifar10", *STUDIES))), None)


def middle(runs: Runs) -> float:
    return results.spread(accuracies(runs))[0]


def best(group: dict[str, Runs], prefixes: str | tuple[str, ...]) -> str | None:
    names = [name for name in group if name.startswith(prefixes)]
    return max(names, key=lambda name: middle(group[name])) if names else None


def _seed(run: dict[str, Any]) -> int:
    return int(run["seed"])


# Tables --------------------------------------------------------------------------------------------------------------


def accuracy(out: Path) -> str:
    """Accuracy, and what a training and a test pass of the variant take."""
    return "\n\n".join(_accuracy(out, dataset, group) for dataset, group in runs_of(out).items())


def _accuracy(out: Path, dataset: str, group: dict[str, Runs]) -> str:
    timing = timing_of(out, dataset)
    rows = timing["rows"] if timing else {}

    def cell(runs: Runs) -> str:
        mean, deviation = results.spread(accuracies(runs))
        return f"{mean:.2f} ± {deviation:.2f}" if len(runs) > 1 else f"{mean:.2f}"

    def folded(runs: Runs) -> str:
        return f"{results.spread([100 * run['accuracy_folded'] for run in runs])[0]:.2f}"

    def seconds(runs: Runs) -> str:
        row = rows.get(runs[0]["variant"])
        if row is None and rows:
            return "-"
        if row is None:
            return f"{sorted(run['train_seconds_per_epoch'] for run in runs)[len(runs) // 2]:.2f}"
        images = runs[0]["images"] or SIZES[dataset]
        return f"{images // runs[0]['recipe']['batch_size'] * row['step_ms'] / 1e3:.3f}"

    def inference(key: str) -> Callable[[Runs], str]:
        return lambda runs: f"{rows[runs[0]['variant']][key]:.1f}" if runs[0]["variant"] in rows else "-"

    columns = {
        "accuracy, %": cell,
        "folded": folded,
        "learned by the encoding": lambda runs: f"{runs[0]['parameters_of_position']:,}",
        "train, s/epoch": seconds,
        "inference, ms/10,000": inference("inference_ms_per_10000"),
        "folded, ms/10,000": inference("folded_ms_per_10000"),
    }
    first = next(iter(group.values()))
    seeds = seeds_of(group)
    epochs = first[0]["recipe"]["epochs"]
    head = f"**{TITLES[dataset]}** (epochs: {epochs}, seeds: {seeds}, {devices_of(group)}): mean and deviation of the "
    head += "accuracy; "
    head += "times without contention, as below." if rows else "time of training as it came."
    return head + "\n\n" + results.table([run for runs in group.values() for run in runs], columns)


def cost(out: Path) -> str:
    """Time of a step and of inference, as multiples of RoPE's."""
    texts = []
    for dataset in STUDIES:
        if not (timing := timing_of(out, dataset)):
            continue

        def times(key: str, unit: str, timing: dict[str, Any] = timing) -> Callable[[Runs], str]:
            return lambda runs: f"{timing['rows'][runs[0]['variant']][f'{key}_{unit}']:.2f}"

        def ratio(key: str, timing: dict[str, Any] = timing) -> Callable[[Runs], str]:
            return lambda runs: "{1:.3f} ({0:.3f}, {2:.3f})".format(*timing["rows"][runs[0]["variant"]][f"{key}_ratio"])

        columns = {
            "step, ms": times("step", "ms"),
            "step / RoPE's": ratio("step"),
            "inference, ms/10,000": times("inference", "ms_per_10000"),
            "inference / RoPE's": ratio("inference"),
            "folded, ms/10,000": times("folded", "ms_per_10000"),
            "folded / RoPE's": ratio("folded"),
        }
        step, test = timing["recipe"]["batch_size"], timing["inference_batch"]
        head = (
            f"**Time, {TITLES[dataset]}'s model**: step of {step} images, inference by {test}, {timing['precision']}, "
        )
        head += f"{timing['device']}; medians of {timing['rounds']} rounds, ratios with quartiles."
        texts.append(head + "\n\n" + results.table([{"variant": name} for name in _ordered(timing["rows"])], columns))
    return "\n\n".join(texts)


def resolution(out: Path) -> str:
    """Accuracy on larger images."""
    texts = []
    for dataset, group in runs_of(out).items():
        first = next(iter(group.values()))[0]
        trained = first["model"]["image_size"] // first["model"]["patch_size"]
        columns: dict[str, Callable[[Runs], str]] = {f"{trained} x {trained}": lambda runs: f"{middle(runs):.1f}"}
        for way in ("continued", "rescaled"):
            for i, row in enumerate(first["larger"]):
                columns[f"{row['side']} x {row['side']} {way}"] = _larger(i, way)
        head = f"**Larger images, {TITLES[dataset]}**: accuracy, %, by patches."
        texts.append(head + "\n\n" + results.table([run for runs in group.values() for run in runs], columns))
    return "\n\n".join(texts)


def _larger(i: int, way: str) -> Callable[[Runs], str]:
    return lambda runs: f"{results.spread([100 * run['larger'][i][way] for run in runs])[0]:.1f}"


def checks(out: Path) -> str:
    """What the study was to show, and whether it does."""
    rows: list[Check] = []
    for dataset, group in runs_of(out).items():
        name = best(group, tuple(STRING))
        for other in ("rope-mixed", "learned"):
            if name and other in group:
                what = f"{TITLES[dataset]}: {name} - {other}"
                rows.append(difference(what, group[name], group[other], least=-1))
        if "rope-mixed" in group and "learned" in group:
            what = f"{TITLES[dataset]}: rope-mixed - learned"
            rows.append(difference(what, group["rope-mixed"], group["learned"], least=0))
    for dataset in STUDIES:
        if timing := timing_of(out, dataset):
            times = timing["rows"]
            limits = {
                "step, dense and reflections": ("step", BARS["dense"], [n for n in STRING if n[:6] != "sparse"]),
                "step, sparse": ("step", BARS["sparse"], [n for n in STRING if n[:6] == "sparse"]),
                "inference, folded": ("folded", BARS["folded"], STRING),
            }
            for title, (key, bar, names) in limits.items():
                if among := [name for name in names if name in times]:
                    slowest = max(among, key=lambda name: times[name][f"{key}_ratio"][1])
                    value = times[slowest][f"{key}_ratio"][1]
                    label = f"{TITLES[dataset]}'s model, {title}: slowest, {slowest}"
                    rows.append((label, f"{value:.3f} x RoPE, at most {bar:.2f}", value <= bar))
    return check_table(rows)


# Plots ---------------------------------------------------------------------------------------------------------------


def accuracy_plot(out: Path) -> str:
    """Every run, and mean and deviation of each variant; the axis ends where the better variants do."""
    found = runs_of(out)
    if not found:
        return ""
    plt = pyplot()
    names = [name for name in VARIANTS if any(name in group for group in found.values())]
    figure, axes = plt.subplots(
        1, len(found), figsize=(1.8 + 4.2 * len(found), 1.3 + 0.27 * len(names)), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (dataset, group) in zip(axes[0], found.items()):
        ends = {name: results.spread(accuracies(runs)) for name, runs in group.items()}
        shown = [a for name, runs in group.items() if name != "none" for a in accuracies(runs)]
        shown = shown or accuracies(group["none"])
        margin = 0.12 * (max(shown) - min(shown)) or 0.5
        low, high = min(shown) - 2 * margin, max(shown) + margin
        axis.set_xlim(low, high)
        if "rope-mixed" in ends:
            mean, deviation = ends["rope-mixed"]
            error = deviation / sqrt(len(group["rope-mixed"]))
            axis.axvspan(mean - error, mean + error, color=COLOURS["blue"], alpha=0.13, linewidth=0)
            axis.axvline(mean, color=COLOURS["blue"], linewidth=0.8, alpha=0.6)
        for name, (mean, deviation) in ends.items():
            place, (colour, marker) = names.index(name), family(name)
            if mean < low:
                axis.annotate(
                    f"{mean:.1f}", (0, place), (14, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                    va="center", color=colour, fontsize=8, arrowprops={"arrowstyle": "->", "color": colour},
                )  # fmt: skip
                continue
            values = accuracies(group[name])
            axis.scatter(values, [place] * len(values), s=12, facecolors="none", edgecolors=colour, linewidths=0.8)
            axis.errorbar(mean, place, xerr=deviation, color=colour, marker=marker, markersize=6, capsize=2.5)
        axis.set(xlabel="test accuracy, %", title=TITLES[dataset])
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    return save(figure, out, "accuracy", "Test accuracy: runs, mean and deviation; the band is rope-mixed's error")


def cost_plot(out: Path) -> str:
    """Times of a step and of inference as multiples of RoPE's."""
    timing = any_timing(out)
    if timing is None:
        return ""
    plt, dataset = pyplot(), timing["dataset"]
    names = _ordered(timing["rows"])
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 1.4 + 0.27 * len(names)), sharey=True, layout="constrained")
    for key, filled in (("step", True), ("inference", False), ("folded", True)):
        axis = axes[0 if key == "step" else 1]
        for place, name in enumerate(names):
            low, value, high = timing["rows"][name][f"{key}_ratio"]
            colour = family(name)[0]
            look = dict(color=colour, marker="o", markersize=6, markerfacecolor=colour if filled else "white")
            axis.errorbar(value, place, xerr=[[value - low], [high - value]], capsize=2.5, **look)
    for axis in axes:
        axis.axvline(1, color=COLOURS["blue"], linewidth=0.8, alpha=0.6)
        axis.grid(axis="x", alpha=0.3)
    for bar, axis in ((BARS["dense"], axes[0]), (BARS["sparse"], axes[0]), (BARS["folded"], axes[1])):
        axis.axvline(bar, color=COLOURS["grey"], linewidth=1, linestyle="--")
        axis.annotate(f"{bar:.2f}", (bar, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=8, color=COLOURS["grey"])  # fmt: skip
    axes[0].set(xlabel=f"time of a step / RoPE's ({timing['rows']['rope']['step_ms']:.2f} ms)")
    axes[0].set_title("training", pad=16)
    rope = timing["rows"]["rope"]["inference_ms_per_10000"]
    axes[1].set(xlabel=f"time of inference / RoPE's ({rope:.1f} ms / 10,000)")
    axes[1].set_title("inference: open as trained, filled folded", pad=16)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    return save(figure, out, "cost", f"Times of {TITLES[dataset]}'s model against RoPE's")


def sparse_plot(out: Path) -> str:
    """Accuracy and time of sparse S against f, beside dense S and none."""
    found = {
        dataset: group for dataset, group in runs_of(out).items() if any(name.startswith("sparse") for name in group)
    }
    if not found:
        return ""
    timing = any_timing(out)
    plt = pyplot()
    count = len(found) + (timing is not None)
    figure, axes = plt.subplots(1, count, figsize=(0.6 + 3.9 * count, 4), squeeze=False, layout="constrained")
    fractions = {f"sparse-{f:.3g}": f for f in FRACTIONS}
    lines = (("cayley", "dense S, Cayley", "red", "--"), ("rope-mixed", "no S, rope-mixed", "blue", ":"))
    for axis, (dataset, group) in zip(axes[0], found.items()):
        there = [name for name in fractions if name in group]
        x = [fractions[name] for name in there]
        mean, deviation = zip(*(results.spread(accuracies(group[name])) for name in there))
        for name, label, colour, style in lines:
            if name in group:
                level, spread = results.spread(accuracies(group[name]))
                axis.axhline(level, color=COLOURS[colour], linestyle=style, label=label)
                axis.axhspan(level - spread, level + spread, color=COLOURS[colour], alpha=0.1, linewidth=0)
        axis.errorbar(x, mean, deviation, color=COLOURS["orange"], marker="v", capsize=3, label="sparse S")
        axis.set(title=TITLES[dataset], ylabel="test accuracy, %")
    if timing:
        axis, rows = axes[0, -1], timing["rows"]
        if "cayley" in rows:
            axis.axhline(rows["cayley"]["step_ratio"][1], color=COLOURS["red"], linestyle="--", label="step, dense S")
        for key, label, style, fill in (("step", "step", "-", "full"), ("inference", "inference", "--", "none"),
                                        ("folded", "inference, folded", ":", "full")):  # fmt: skip
            points = [(f, rows[name][f"{key}_ratio"][1]) for name, f in fractions.items() if name in rows]
            colour = COLOURS["black" if key == "folded" else "orange"]
            axis.plot(*zip(*points), color=colour, marker="v", linestyle=style, fillstyle=fill, label=label)
        axis.set(title=f"time, {TITLES[timing['dataset']]}'s model", ylabel="time / RoPE's")
    for axis in axes[0]:
        axis.set(xscale="log", xlabel="f, fraction of S learned")
        axis.set_xticks(FRACTIONS, ["1/64", *(f"{f:g}" for f in FRACTIONS[1:])])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in {axes[0, 0], axes[0, -1]}:
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False)
    return save(figure, out, "sparse", "Sparse S: accuracy and time against f; bands are deviations")


def resolution_plot(out: Path) -> str:
    """Accuracy against the number of patches: the baselines, and the best of each family."""
    found = runs_of(out)
    if not found:
        return ""
    plt = pyplot()
    figure, axes = plt.subplots(
        len(found), 2, figsize=(9.5, 0.7 + 3.1 * len(found)), sharey="row", squeeze=False, layout="constrained"
    )
    for line, (dataset, group) in zip(axes, found.items()):
        names = [str(name) for name in ("none", "learned", "rope", "rope-mixed", "cayley") if name in group]
        names += [name for prefix in ("circulant", "reflection-s", "sparse") if (name := best(group, prefix))]
        for axis, way in zip(line, ("continued", "rescaled")):
            for i, name in enumerate(names):
                runs, (colour, marker) = group[name], family(name)
                model = runs[0]["model"]
                x = [model["image_size"] // model["patch_size"], *(row["side"] for row in runs[0]["larger"])]
                y = zip(*([run["accuracy"], *(row[way] for row in run["larger"])] for run in runs))
                mean, deviation = zip(*(results.spread([100 * a for a in values]) for values in y))
                style = {"none": ":", "rope": "--"}.get(name, "-")
                beside = [side * (1 + 0.004 * (i - len(names) / 2)) for side in x]  # or they would hide one another
                look = dict(color=colour, marker=marker, linestyle=style, markersize=5, capsize=2)
                axis.errorbar(beside, mean, deviation, label=name, **look)
            axis.set_xticks(x, [f"{side}²" for side in x])
            axis.set(title=f"{TITLES[dataset]}, coordinates {way}", xlabel="patches (trained with the fewest)")
            axis.grid(alpha=0.3)
        line[0].set_ylabel("test accuracy, %")
        line[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return save(figure, out, "resolution", "Accuracy on larger images")


def family(name: str) -> tuple[str, str]:
    """Colour and marker of a variant."""
    style: tuple[str, str] = next(style for prefix, style in FAMILIES.items() if name.startswith(prefix))
    return style


def _ordered(rows: dict[str, Any]) -> list[str]:
    return [name for name in VARIANTS if name in rows]


SIZES = {"mnist": 60_000, "cifar10": 50_000, "mnist-small": 4_000}  # training images
PARTS: Parts = {
    "checks": checks,
    "accuracy": accuracy,
    "accuracy-plot": accuracy_plot,
    "cost": cost,
    "cost-plot": cost_plot,
    "sparse-plot": sparse_plot,
    "resolution": resolution,
    "resolution-plot": resolution_plot,
}

if __name__ == "__main__":
    main()
