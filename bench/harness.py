"""How a row is measured, on a GPU by events and on a CPU by the clock, and what the machine could do at best."""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastrpe.testing.cases import Case

Call = Callable[[], Any]

PEERS = ("liger-kernel", "flash-linear-attention", "fla-core", "mamba-ssm")


@dataclass(eq=False)
class Machine:
    """The device that is measured, with its ceilings, measured in the same run."""

    device: torch.device
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by family

    @property
    def name(self) -> str:
        if self.device.type == "cpu":
            return "cpu"
        name = torch.cuda.get_device_name()
        return name.lower().replace("nvidia", "").strip().replace(" ", "-")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        """More than the last cache holds."""
        return 4 * torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 0

    @cache  # noqa: B019  (one machine a run)
    def copy_rate(self) -> float:
        """Bytes read and written a second by a large copy."""
        source = torch.randn(2**29 if self.on_gpu else 2**26, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / (self.time([lambda: target.copy_(source)]) / 1e3)

    @cache  # noqa: B019
    def product_rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product; in float32 (no TF32) the rate of plain arithmetic."""
        size = 8192 if self.on_gpu and dtype != torch.float32 else 4096 if self.on_gpu else 1024
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / (self.time([lambda: a @ b]) / 1e3)

    def time(self, calls: list[Call]) -> float:
        """Milliseconds a call: the median over groups of back-to-back calls, which take ``calls`` in turn."""
        for call in calls * 3:
            call()
        once = min(self._group(calls) for _ in range(3)) / len(calls)
        if not self.on_gpu:
            return statistics.median(
                self._group(calls) / len(calls) for _ in range(max(9, min(300, round(500 / once))))
            )
        # A group is long enough that an event's own cost, and a gap before its first kernel, do not count.
        group = calls * max(1, min(round(2.0 / max(once, 1e-6)), 64) // len(calls))
        rounds = max(5, min(100, round(100.0 / max(once * len(group), 1e-6))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for start, end in events:
            start.record()
            for call in group:
                call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) / len(group) for start, end in events)

    def _group(self, calls: list[Call]) -> float:
        self.wait()
        start = time.perf_counter()
        for call in calls:
            call()
        self.wait()
        return (time.perf_counter() - start) * 1e3

    def time_graph(self, calls: list[Call]) -> float:
        """Milliseconds a call when a CUDA graph of all ``calls`` is replayed: no launch cost."""
        for call in calls:
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return self.time([graph.replay]) / len(calls)

    def peak(self, call: Call) -> float | None:
        """MiB allocated by a call at its peak: results and temporaries, not inputs. Not known on a CPU."""
        if not self.on_gpu:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        return dict(
            device=torch.cuda.get_device_name() if self.on_gpu else _processor(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            triton=_version("triton"),
            python=platform.python_version(),
            peers={p: _version(p) for p in PEERS if _version(p)},
            date=time.strftime("%Y-%m-%d"),
            copy_TBps=self.copy_rate() / 1e12,
            product_TFLOPs={
                str(d).removeprefix("torch."): self.product_rate(d) / 1e12
                for d in ((torch.bfloat16, torch.float32) if self.on_gpu else (torch.float32,))
            },
        )


def record(
    family: str,
    case: Case,
    dtype: torch.dtype,
    backend: str,
    mode: str,
    machine: Machine,
    benchmark: BenchmarkFixture,
    calls: list[Call],
    moved: int,
    operations: dict[torch.dtype, int],
) -> None:
    """Time ``calls`` and keep the row.

    Args:
        mode: ``fwd-graph`` and its like replay a CUDA graph.
        moved: bytes read and written once.
        operations: by the unit that computes them: float32 for plain arithmetic, else products of that dtype.
    """
    ms = machine.time_graph(calls) if mode.endswith("-graph") else machine.time(calls)
    floor = 1e3 * max(moved / machine.copy_rate(), *(n / machine.product_rate(unit) for unit, n in operations.items()))
    row = dict(
        op=case.op,
        case=case.name,
        mode=mode,
        backend=backend,
        device=machine.name,
        dtype=str(dtype).removeprefix("torch."),
        ms=round(ms, 5),
        bytes=moved,
        flops=sum(operations.values()),
        floor_ms=round(floor, 5),
        fraction_of_floor=round(floor / ms, 4),
        peak_mib=machine.peak(calls[0]),
        commit=commit(),
    )
    machine.rows.setdefault(family, []).append(row)
    benchmark.group = f"{case.op} {case.name} {row['dtype']} {mode}"
    benchmark.name = backend
    benchmark.extra_info.update(row)

    def waited() -> None:
        calls[0]()
        machine.wait()

    benchmark.pedantic(waited, rounds=1)


@cache
def commit() -> str:
    """The commit that is measured; FASTRPE_COMMIT names it where there is no repository."""
    named = os.environ.get("FASTRPE_COMMIT")
    if named:
        return named
    git = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return git.stdout.strip() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.processor())
