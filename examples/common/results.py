"""Results of a study: one JSON file a run, and a table over seeds."""

import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside its configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit()}


def commit() -> str | None:
    """What FASTRPE_COMMIT says, for copies without git; or this checkout's, ``-dirty`` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    if named := os.environ.get("FASTRPE_COMMIT"):
        return named
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(path: Path, result: dict[str, Any]) -> None:
    """Write at once or not at all: what reads the folder meanwhile, or after an interruption, finds no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.rename(path)


def read(folder: Path, pattern: str = "*.json") -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def by_variant(results: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each variant, in the order of first appearance."""
    groups = defaultdict(list)
    for result in results:
        groups[result["variant"]].append(result)
    return dict(groups)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def table(results: Sequence[dict[str, Any]], columns: dict[str, Callable[[list[dict[str, Any]]], str]]) -> str:
    """A Markdown table: a row for each variant; a column is made from the variant's runs."""
    rows = [["variant", *columns]]
    rows += [[name, *(show(runs) for show in columns.values())] for name, runs in by_variant(results).items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in rows
    )
