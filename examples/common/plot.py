"""Plots of a study, without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import by_variant, spread

# Okabe and Ito's, which people with any colour vision tell apart.
COLOURS = {
    "black": "#000000",
    "grey": "#7f7f7f",
    "blue": "#0072b2",
    "red": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
    "yellow": "#f0e442",
}


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def accuracy_figure(results: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Test accuracy over the epochs, and at the end with the time of training: mean, and spread over seeds."""
    plt = pyplot()
    figure, (curves, final, cost) = plt.subplots(
        1, 3, figsize=(13, 4), layout="constrained", gridspec_kw={"width_ratios": (2, 1.2, 1.2)}
    )
    variants = by_variant(results)
    palette = [colour for name, colour in COLOURS.items() if name != "black"]
    colours = {name: palette[i % len(palette)] for i, name in enumerate(variants)}
    lowest, labels = 100.0, []
    for place, (name, runs) in enumerate(variants.items()):
        epochs = zip(*(run["accuracy_by_epoch"] for run in runs))
        middle, deviation = zip(*(spread([100 * a for a in values]) for values in epochs))
        x = range(1, len(middle) + 1)
        curves.plot(x, middle, label=name, color=colours[name], marker="." if len(middle) < 30 else "")
        low, high = zip(*((m - d, m + d) for m, d in zip(middle, deviation)))
        curves.fill_between(x, low, high, color=colours[name], alpha=0.2, linewidth=0)
        last, error = middle[-1], deviation[-1]
        lowest = min(lowest, last - error)
        final.barh(place, last, xerr=error, color=colours[name], capsize=3)
        labels.append(f"{last:.1f}")
        seconds, error = spread([run["train_seconds_per_epoch"] for run in runs])
        cost.barh(place, seconds, xerr=error, color=colours[name], capsize=3)
    curves.set(xlabel="epoch", ylabel="test accuracy, %", title=title)
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right")
    left = max(0, lowest - 10)
    final.set(xlabel="test accuracy, %", xlim=(left, 100), title="after the last epoch")
    for place, text in enumerate(labels):
        final.text(left, place, f"  {text}", va="center", color="white")
    cost.set(xlabel="training, s / epoch", title="time")
    for axis in (final, cost):
        axis.set_yticks(range(len(variants)), variants)
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
