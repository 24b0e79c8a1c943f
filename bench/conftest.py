"""One row for each benchmark, written to bench/results/<device>/<family>.json."""

import json
from pathlib import Path

import pytest
import torch
from harness import Machine

RESULTS = Path(__file__).with_name("results")
KEY = ("op", "case", "dtype", "mode", "backend")
MACHINE = pytest.StashKey[Machine]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.addoption("--results", type=Path, default=RESULTS, help="the folder that results are written to")


@pytest.fixture(scope="session")
def machine(request: pytest.FixtureRequest) -> Machine:
    found = Machine(torch.device(request.config.getoption("--bench-device")))
    request.config.stash[MACHINE] = found
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the rows measured, in place of older rows of the same key; keep the others."""
    machine = session.config.stash.get(MACHINE, None)
    if machine is None or not machine.rows:
        return
    for family, new in machine.rows.items():
        path = session.config.getoption("--results") / machine.name / f"{family}.json"
        old = json.loads(path.read_text())["rows"] if path.exists() else []
        keys = {tuple(row[k] for k in KEY) for row in new}
        rows = [row for row in old if tuple(row[k] for k in KEY) not in keys] + new
        rows.sort(key=lambda row: [str(row[k]) for k in KEY])
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        path.write_text(f'{{"machine": {json.dumps(machine.describe())},\n "rows": [\n{lines}\n ]}}\n')
