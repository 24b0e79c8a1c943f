"""Time the solvers of sparse STRING against the size of a head and the fraction of S that is learned."""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import groupby, product
from math import comb, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.common import results
from examples.common.plot import COLOURS, pyplot
from fastrpe.ops import sparse_cayley
from fastrpe.ops.sparse.api import SOLVERS, fastest
from fastrpe.ops.sparse.solvers import problem

SIZES = (64, 128, 256, 512, 1024)
FRACTIONS = ("1/d", "2/d", "4/d", "0.05", "0.1", "0.25", "0.5", "1")
TOKENS = (256, 4096)  # of each head: one image of 16 x 16 patches, and 16 of them
HEADS = 2
LU_BAR = 5.0  # how many times faster than dense LU, at d = 512 and f = 1/d, 2/d on a CPU
AUTO_BAR = 1.15  # how many times the time of the fastest solver
# Seconds of a forward pass, after which a solver is left out where size, tokens and learned pairs are no fewer.
PATIENCE = {"cpu": 2.0, "cuda": 0.1}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    device = torch.device(options.device)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # SuperLU's small blocks, beside torch's own threads
    if device.type == "cpu" and options.threads:
        torch.set_num_threads(options.threads)
    path = options.out / f"solvers-{device.type}.json"
    left_out = {s: why for s in SOLVERS if (why := trouble(s, device))}
    found = {**results.environment(device), "dtype": "float32", "heads": HEADS, "left_out": left_out, "cells": []}
    for cell in cells(options, device, [s for s in SOLVERS if s not in left_out]):
        found["cells"].append(cell)
        results.write(path, found)
    for solver, why in left_out.items():
        print(f"without {solver}: {why}")
    if found["cells"]:
        draw(found, path.with_suffix(".png"))
    print(f"\n{table(found)}\n\nresults: {path}, plot: {path.with_suffix('.png')}")
    if options.check and (missed := misses(found)):
        raise SystemExit("\n".join(missed))
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.string_vit.solvers", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default, help="by default the GPU if there is one")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="D")
    parser.add_argument("--fractions", nargs="+", default=FRACTIONS, metavar="F", help="of S, as numbers or as n/d")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="N", help="of each head")
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--seconds", type=float, help="of repetitions, the shortest counts; 0.5, on a GPU 0.03")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="go to no other place after so many")
    parser.add_argument("--small", action="store_true", help="a short run: under two minutes on a CPU")
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    parser.add_argument("--out", type=Path, default=Path("runs/string_vit"), help="folder, by default runs/string_vit")
    options = parser.parse_args(arguments)
    if options.small:
        options.sizes, options.fractions = (64, 128), ("1/d", "2/d", "0.1", "1")
        options.tokens, options.seconds = (256,), 0.05
    if options.seconds is None:
        options.seconds = 0.5 if options.device == "cpu" else 0.03
    return options


def trouble(solver: str, device: torch.device) -> str:
    """Why a solver is left out, or an empty string: it does not run here, or fails at a small problem."""
    if why := problem(solver, device.type):
        return why
    try:
        for call in passes(solver, *inputs(16, 16, 8, device)):
            call()
    except Exception as error:  # libraries have kinds of their own
        return f"{type(error).__name__}: {error}"
    return ""


def cells(options: argparse.Namespace, device: torch.device, solvers: list[str]) -> Iterator[dict[str, Any]]:
    """One head size, number of tokens, fraction and solver each."""
    end = time.monotonic() + 60 * options.minutes
    slow: list[tuple[str, tuple[int, ...]]] = []
    for size, tokens, label in product(options.sizes, options.tokens, options.fractions):
        if time.monotonic() > end:
            print(f"d = {size}, f = {label}, {tokens} tokens: no time left", flush=True)
            return
        place = size, tokens, pair_count(size, label)
        left = [s for s in solvers if not any(s == name and dominates(place, other) for name, other in slow)]
        tensors = inputs(size, place[2], tokens, device)
        for solver in left:
            forward, step = (shortest(call, options.seconds, device) for call in passes(solver, *tensors))
            if forward > 1000 * PATIENCE[device.type]:
                slow.append((solver, place))
            cell = {"d": size, "f": label, "pairs": place[2], "tokens": tokens, "solver": solver}
            yield cell | {"forward_ms": forward, "step_ms": step}
        print(f"d = {size}, f = {label}, {tokens} tokens: {len(left)} solvers", flush=True)


def dominates(place: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(place, other))


def pair_count(size: int, label: str) -> int:
    number, _, over = label.partition("/")
    return round(float(number) / (size if over else 1) * comb(size, 2))


def inputs(size: int, count: int, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """Places drawn alike on every device, the numbers learned there, tokens, and the gradient of what comes of them."""
    draw = torch.Generator().manual_seed(size)
    every = torch.triu_indices(size, size, 1).mT
    pairs = every[torch.randperm(len(every), generator=draw)[:count].sort().values].to(device)
    theta = (0.1 * torch.randn(HEADS, count, generator=draw)).to(device).requires_grad_()
    x, dy = (torch.randn(1, HEADS, tokens, size, device=device) for _ in range(2))
    return pairs, theta, x.requires_grad_(), dy


def passes(
    solver: str,
    pairs: Tensor,  # (K, 2)
    theta: Tensor,  # (H, K)
    x: Tensor,  # (1, H, L, D)
    dy: Tensor,  # (1, H, L, D)
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The forward pass, and the forward and the backward pass."""

    def forward() -> Any:
        with torch.no_grad():
            return sparse_cayley(x, theta, pairs, solver=solver)

    def step() -> Any:
        return torch.autograd.grad(sparse_cayley(x, theta, pairs, solver=solver), (x, theta), dy)

    return forward, step


def shortest(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Milliseconds of the fastest of many calls: what other processes take away is not the solver's."""

    def once() -> float:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()  # loads libraries, analyses the pattern, allocates
    end = time.perf_counter() + seconds
    best = once()
    while time.perf_counter() < end:
        best = min(best, once())
    return 1000 * best


def compare(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each place and pass: the times of all solvers, the fastest, and what "auto" takes today."""
    rows = []
    device = "cpu" if found["device"].startswith("cpu") else "cuda"
    for (d, f, tokens), group in groupby(found["cells"], key=lambda c: (c["d"], c["f"], c["tokens"])):
        cells = list(group)
        for kind in ("forward", "step"):
            times = {c["solver"]: c[f"{kind}_ms"] for c in cells}
            best = min(times, key=times.__getitem__)
            auto = fastest(
                device, d, cells[0]["pairs"], found["heads"], tokens, kind == "step", "lu" not in found["left_out"]
            )
            rows.append(
                {"d": d, "f": f, "tokens": tokens, "pass": kind, "times": times, "best": best, "auto": auto}
                | {"auto_over_best": times.get(auto, nan) / times[best]}
            )
    return rows


def misses(found: dict[str, Any]) -> list[str]:
    """Where "auto" is slower than the bar, or sparse LU no faster than it."""
    missed = []
    for row in compare(found):
        name = f"d = {row['d']}, f = {row['f']}, {row['tokens']} tokens, {row['pass']}"
        if row["auto_over_best"] > AUTO_BAR:
            missed.append(f"{name}: auto ({row['auto']}) takes {row['auto_over_best']:.2f} x {row['best']}")
        if found["device"].startswith("cpu") and row["d"] == 512 and row["f"] in ("1/d", "2/d"):
            ratio = row["times"]["dense"] / row["times"]["lu"]
            if ratio < LU_BAR:
                missed.append(f"{name}: sparse LU is {ratio:.1f} x faster than dense LU, not {LU_BAR:g} x")
    return missed


def table(found: dict[str, Any]) -> str:
    """Markdown: milliseconds of a forward and backward pass, the fastest in bold, and what "auto" takes."""
    names = [s for s in SOLVERS if s not in found["left_out"]]
    lines = [f"| d | f | tokens | {' | '.join(names)} | fastest | auto | auto / fastest | dense LU / fastest |"]
    lines.append("|--:|--:|--:|" + "--:|" * len(names) + "---|---|--:|--:|")
    for row in compare(found):
        if row["pass"] == "step":
            times = row["times"]
            shown = [f"{times[s]:.3g}" if s in times else "-" for s in names]
            shown = [f"**{t}**" if s == row["best"] else t for s, t in zip(names, shown)]
            dense = f"{times['dense'] / times[row['best']]:.1f}" if "dense" in times else "-"
            ratios = f"{row['auto_over_best']:.2f} | {dense}"
            head = f"| {row['d']} | {row['f']} | {row['tokens']} | "
            lines.append(head + " | ".join(shown) + f" | {row['best']} | {row['auto']} | {ratios} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Time against f, a plot for each head size; the most tokens, forward and backward."""
    plt = pyplot()
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    rows = [r for r in compare(found) if r["pass"] == "step"]
    tokens = max(r["tokens"] for r in rows)
    sizes = sorted({r["d"] for r in rows})
    figure, axes = plt.subplots(1, len(sizes), figsize=(3.4 * len(sizes), 3.6), layout="constrained", squeeze=False)
    colours = dict(zip(SOLVERS, list(COLOURS.values())))
    for axis, size in zip(axes[0], sizes):
        some = [r for r in rows if r["d"] == size and r["tokens"] == tokens]
        some.sort(key=lambda r: pair_count(size, r["f"]))
        for solver in SOLVERS:
            points = [
                (pair_count(size, r["f"]) / comb(size, 2), r["times"][solver]) for r in some if solver in r["times"]
            ]
            if points:
                axis.plot(*zip(*points), label=solver, color=colours[solver], marker=".")
        axis.set(xscale="log", yscale="log", xlabel="f", title=f"d = {size}")
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axes[0][0].set_ylabel(f"ms, forward and backward, {HEADS} x {tokens} tokens")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside right upper", fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
