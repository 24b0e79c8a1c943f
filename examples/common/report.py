"""What the reports of studies share: comparing runs seed by seed, saving plots, the place in a README."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from .plot import pyplot
from .results import spread

MARKS = "<!-- results -->\n", "<!-- end of results -->\n"


def accuracies(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * run["accuracy"] for run in runs]


def paired(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean difference of accuracy over the seeds that both have, in points, and its standard error."""
    other = {run["seed"]: 100 * run["accuracy"] for run in theirs}
    gaps = [100 * run["accuracy"] - other[run["seed"]] for run in ours if run["seed"] in other]
    gap, deviation = spread(gaps or [float("nan")])
    return gap, deviation / sqrt(max(1, len(gaps)))


def save(figure: Any, out: Path, name: str, title: str) -> str:
    figure.savefig(out / f"{name}.png", dpi=130)
    pyplot().close(figure)
    return f"![{title}]({name}.png)"


def insert(text: str, readme: Path, out: Path) -> None:
    """Write the report of ``out`` between the marks of a README above it."""
    before, rest = readme.read_text().split(MARKS[0])
    folder = out.resolve().relative_to(readme.resolve().parent)
    inside = text.replace("](", f"]({folder.as_posix()}/")
    readme.write_text(f"{before}{MARKS[0]}\n{inside}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
