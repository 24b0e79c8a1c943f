"""What the reports of studies share: comparing runs seed by seed, saving plots, the place in a README."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

from .plot import pyplot
from .results import spread

Check = tuple[str, str, bool | None]  # what, its value, and whether it is met; None where that is open
Parts = dict[str, Callable[[Path], str]]  # each makes a table, or a plot and its place, from a folder of results
MARKS = "<!-- results -->\n", "<!-- end of results -->\n"


def command(prog: str, parts: Parts, out: Path, arguments: list[str] | None) -> None:
    """Print the parts that are named, all by default, and write them into a README if asked."""
    about = "Tables and plots of the study's results: all of them, or those that are named."
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument("parts", nargs="*", metavar="PART", help="of " + ", ".join(parts) + "; all by default")
    parser.add_argument("--out", type=Path, default=out, help="folder with the results, where plots are written")
    parser.add_argument("--readme", type=Path, help="also write the report between the marks of this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(parts):
        parser.error(f"PART must be among {', '.join(parts)}, got {', '.join(sorted(unknown))}")
    text = make(parts, options.out, options.parts)
    print(text)
    if options.readme:
        insert(text, options.readme, options.out)


def make(parts: Parts, out: Path, names: Iterable[str] = ()) -> str:
    """Make the plots and return the tables and the plots' places as Markdown."""
    texts = [parts[name](out) for name in names or parts]
    return "\n\n".join(text for text in texts if text)


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


def devices_of(group: dict[str, list[dict[str, Any]]]) -> str:
    return " and ".join(sorted({run["device"] for runs in group.values() for run in runs}))


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
