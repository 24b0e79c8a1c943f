"""Write bench/REPORT.md and its plots from bench/results/<device>/*.json.

Usage: python bench/report.py [--results bench/results] [--output bench]
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

OURS = ("native", "triton", "reference", "reference-compile")
MODES = ("fwd", "fwd-graph", "bwd", "fwd+bwd", "fwd+bwd-graph")
HEAD = """# Benchmarks

Written by `make report` from `bench/results/`; `make bench` measures. Times are medians, in milliseconds, of
back-to-back calls after warm-up, on random data and on more memory than the last cache holds. *Floor* is the larger of
the bytes that must move (each input read once, each output written once) at the copy rate and the operations at their
unit's rate, both measured in the same run. In brackets beside a time: floor over time, 1.00 at best. MiB is what a call
allocates at its peak, results included. `-graph` replays a CUDA graph: no launch cost.

Our backends are in bold, the fastest time of a column in italics. `eager` and `compile` are the usual PyTorch formula
on ready tables of cosines, with a basis one product per head before it; `liger` and `fla` are those packages' kernels
(Liger overwrites q and k). For linear attention they are performer-pytorch's formula; `sdpa` is softmax attention,
another function; `fla` takes features that are there already and does not divide.
"""


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=here / "results")
    parser.add_argument("--output", type=Path, default=here)
    options = parser.parse_args()
    text = [HEAD]
    for path in sorted(options.results.glob("*/*.json"), reverse=True):
        found = json.loads(path.read_text())
        text += section(path, found["machine"], found["rows"])
        text += plots(path, found["rows"], options.output)
    (options.output / "REPORT.md").write_text("\n".join(text))
    print(f"wrote {options.output / 'REPORT.md'}")


def section(path: Path, machine: Row, rows: list[Row]) -> list[str]:
    """One results file: what measured it, then a table for each op, case and dtype."""
    rates = ", ".join(f"{name} product {rate:.3g} TFLOP/s" for name, rate in machine["product_TFLOPs"].items())
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items()) or "none"
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    text = [
        f"## {path.stem} on {path.parent.name}\n",
        f"{machine['device']}, {machine['threads']} CPU threads; copy {machine['copy_TBps']:.3g} TB/s, {rates}; torch "
        f"{machine['torch']}, Triton {machine['triton'] or 'absent'}; peers: {peers}; {machine['date']}, "
        f"commit {commits}.\n",
    ]
    tables: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        tables[row["op"], row["case"], row["dtype"]].append(row)
    for (op, case, dtype), part in tables.items():
        text += [f"### `{op}` {case}, {dtype}\n", *table(part), ""]
    return text


def table(rows: list[Row]) -> Iterable[str]:
    """Backends by modes, the fastest first; the fastest of a mode in italics."""
    modes = [m for m in MODES if any(row["mode"] == m for row in rows)]
    at = {(row["backend"], row["mode"]): row for row in rows}
    best = {m: min(row["ms"] for row in rows if row["mode"] == m) for m in modes}
    floors = {m: next(row["floor_ms"] for row in rows if row["mode"] == m) for m in modes}
    peaks = [
        m
        for m in modes
        if not m.endswith("-graph") and any(row["mode"] == m and row["peak_mib"] is not None for row in rows)
    ]
    yield (
        "| backend | " + " | ".join(f"{m} ms (floor {floors[m]:.4g})" for m in modes) + _each(peaks, " | {} MiB") + " |"
    )
    yield "|---" * (1 + len(modes) + len(peaks)) + "|"
    fastest = {b: min(r["ms"] for r in rows if r["backend"] == b) for b in {row["backend"] for row in rows}}
    backends = sorted(fastest, key=lambda b: (fastest[b], b))
    for backend in backends:
        cells = [f"**{backend}**" if backend in OURS else backend]
        for m in modes:
            row = at.get((backend, m))
            number = "" if row is None else f"{row['ms']:.4g}"
            if row is not None and row["ms"] == best[m]:
                number = f"*{number}*"
            cells.append("-" if row is None else f"{number} ({row['fraction_of_floor']:.2f})")
        for m in peaks:
            row = at.get((backend, m))
            cells.append("-" if row is None or row["peak_mib"] is None else f"{row['peak_mib']:.0f}")
        yield "| " + " | ".join(cells) + " |"


def _each(names: list[str], form: str) -> str:
    return "".join(form.format(n) for n in names)


def plots(path: Path, rows: list[Row], output: Path) -> list[str]:
    """Fraction of floor for every case, and time against length where lengths were swept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name = f"{path.stem}-{path.parent.name}"
    text = []
    for mode in ("fwd", "fwd+bwd"):
        part = [r for r in rows if r["mode"] == mode and not r["case"].startswith("length-")]
        cases = sorted({(r["op"], r["case"], r["dtype"]) for r in part}, reverse=True)
        backends = sorted({r["backend"] for r in part}, key=lambda b: (b not in OURS, b))
        figure, axes = plt.subplots(figsize=(8, 1 + 0.3 * len(cases)), layout="constrained")
        for i, backend in enumerate(backends):
            at = {(r["op"], r["case"], r["dtype"]): r["fraction_of_floor"] for r in part if r["backend"] == backend}
            y = [j for j, c in enumerate(cases) if c in at]
            axes.plot([at[cases[j]] for j in y], y, "osD^vPX*"[i % 8], label=backend, alpha=0.8)
        axes.set_yticks(range(len(cases)), [" ".join(c) for c in cases], fontsize=8)
        axes.axvline(1, color="0.6", lw=1)
        axes.set(xlim=(0, None), ylim=(-0.5, len(cases) - 0.5))
        axes.set(xlabel=f"fraction of floor, {mode} (1: the cost of a memory copy)")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        text.append(_save(figure, output, f"{name}-floor-{mode.replace('+', '-')}.png", f"fraction of floor, {mode}"))
        plt.close(figure)
    swept = [r for r in rows if r["case"].startswith("length-") or r["case"] == "long-131072"]
    swept = [r for r in swept if r["mode"] == "fwd" and r["dtype"] == "bfloat16"]
    if len({r["case"] for r in swept}) > 1:
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for i, backend in enumerate(sorted({r["backend"] for r in swept}, key=lambda b: (b not in OURS, b))):
            points = sorted((int(r["case"].split("-")[1]), r["ms"]) for r in swept if r["backend"] == backend)
            axes.plot(*zip(*points), marker="osD^vPX*"[i % 8], label=backend)
        floor = sorted({int(r["case"].split("-")[1]): r["floor_ms"] for r in swept}.items())
        axes.plot(*zip(*floor), "k--", lw=1, label="floor")
        axes.set(
            xscale="log", yscale="log", xlabel="length", ylabel="ms", title="q and k rotated, B1 H32 D128, bfloat16"
        )
        axes.legend(fontsize=8)
        text.append(_save(figure, output, f"{name}-length.png", "time against length"))
        plt.close(figure)
    return text


def _save(figure: Any, output: Path, name: str, title: str) -> str:
    folder = output / "plots"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=110)
    return f"![{title}](plots/{name})\n"


if __name__ == "__main__":
    main()
