"""Many trainings on one machine: processes side by side, one at a time on each device, and what need not run again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from fastrpe.models import ViTConfig

ROOT = Path(__file__).parents[2]


def side_by_side(
    module: str,
    common: Sequence[str],
    jobs: Sequence[tuple[str, list[str]]],
    out: Path,
    slots: Sequence[int | None],
    end: float,
) -> list[str]:
    """Run ``python -m module`` with ``common`` and each job's arguments, one process in each slot (a GPU, or None).

    Jobs have names. None starts after the time ``end``, and none starts trainings after it (``--minutes``). Returns
    the names of those that failed.
    """
    free: SimpleQueue[int | None] = SimpleQueue()
    for gpu in slots:
        free.put(gpu)
    out.mkdir(parents=True, exist_ok=True)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = str(max(1, (os.cpu_count() or 1) // len(slots)))

    def one(job: tuple[str, list[str]]) -> str | None:
        name, arguments = job
        gpu = free.get()
        try:
            minutes = (end - time.monotonic()) / 60
            if minutes < 0:
                return None
            environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": path}
            command = [
                sys.executable,
                "-m",
                module,
                *common,
                *arguments,
                "--jobs",
                "1",
                "--worker",
                "--minutes",
                str(minutes),
            ]
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if any(visible) else str(gpu)
                command += ["--turn", str(out / f".turn-{gpu}")]
            return name if subprocess.run(command, env=environment).returncode else None
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(len(slots)) as pool:
        failed = [name for name in pool.map(one, jobs) if name]
    for lock in out.glob(".turn-*"):
        lock.unlink()
    return failed


def finished(path: Path, same: dict[str, Any]) -> bool:
    """Whether ``path`` holds a result of ``same``: its model, recipe, images."""
    if not path.exists():
        return False
    return is_of(json.loads(path.read_text()), same)


def is_of(result: dict[str, Any], same: dict[str, Any]) -> bool:
    """Whether a result is of this model, recipe and images; options that are younger than it had their defaults."""
    known = result | {"model": asdict(ViTConfig(**result["model"]))}
    return {key: known[key] for key in same} == same


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time, and released when it ends, however it ends."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
