"""What the reports of studies share: comparing runs seed by seed, saving plots, the place in a README."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from .plot import pyplot
from .results import spread

Check = tuple[str, str, bool | None]  # what, its value, and whether it is met; None where that is open
MARKS = "<!-- results -->\n", "<!-- end of results -->\n"


def accuracies(runs: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * run["accuracy"] for run in runs]


def paired(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
    """Mean difference of accuracy over the seeds that both have, in points, its standard error, and how many."""
    other = {run["seed"]: 100 * run["accuracy"] for run in theirs}
    gaps = [100 * run["accuracy"] - other[run["seed"]] for run in ours if run["seed"] in other]
    gap, deviation = spread(gaps or [float("nan")])
    return gap, deviation / sqrt(max(1, len(gaps))), len(gaps)


def difference(what: str, ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], least: float) -> Check:
    """A check that a difference is ``least`` standard errors at least; open where fewer than two seeds tell."""
    gap, error, seeds = paired(ours, theirs)
    if seeds < 2:
        return what, f"{gap:+.2f} points, seeds: {seeds}", None
    return what, f"{gap:+.2f} ± {error:.2f} points, seeds: {seeds}", gap >= least * error


def check_table(rows: Sequence[Check]) -> str:
    words = {True: "yes", False: "no", None: "open"}
    lines = [f"| {what} | {value} | {words[met]} |" for what, value, met in rows]
    return "\n".join(["| check | value | met |", "| --- | --- | --- |", *lines]) if lines else ""


def seeds_of(group: dict[str, Any]) -> str:
    """How many runs the variants have."""
    fewest, most = (f(len(runs) for runs in group.values()) for f in (min, max))
    return str(most) if fewest == most else f"{fewest} to {most}"


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
