"""The wheel in dist/ (``make test-wheel`` builds it): its name, what it holds, and that one build runs on every torch.

Each release of torch is installed in an environment of its own; one that cannot be installed is a failure.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastrpe

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parent.parent
CHECK = Path(__file__).with_name("wheel_check.py")
LARGEST = 30 * 10**6  # bytes
LIBRARIES = ("_native_cpu.so", "_native_cuda.so")
TORCHES = ("2.11.0", "2.13.0", "2.15.0")  # 2.13.0 is the CPU build where the package index has one
# What a library may take from outside: the C and C++ runtimes, whose symbols carry a version, and torch's C shim.
RUNTIME = re.compile(r"@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
SHIM = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+$")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # The releases that are named here, whatever a machine's pip is told to prefer.
    environment = os.environ | {"PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(*command, done.stdout, sep="\n" if len(done.stdout) > 80 else " ")
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}: {done.stdout[-4000:]}"
    return done.stdout


def pip(python: Path, *arguments: str | Path) -> None:
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *arguments)


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = list((ROOT / "dist").glob("*.whl"))
    assert len(found) == 1, f"dist/ must hold one wheel ('make wheel'), got {found}"
    return found[0]


@pytest.fixture
def python() -> Iterator[Path]:
    """The interpreter of a fresh virtual environment, removed afterwards: each holds gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", folder)
        yield Path(folder, "bin/python")


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


def test_name_and_size(wheel: Path) -> None:
    assert wheel.name == f"fastrpe-{fastrpe.__version__}-py3-none-linux_x86_64.whl"
    assert wheel.stat().st_size < LARGEST


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    outside = [n for n in names if not n.startswith(("fastrpe/", f"fastrpe-{fastrpe.__version__}.dist-info/"))]
    assert not outside
    libraries = {Path(n).name for n in names if n.endswith(".so")}
    assert libraries == set(LIBRARIES if has_nvcc() else LIBRARIES[:1])
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "fastrpe").rglob("*.py")} | {"fastrpe/py.typed"}
    assert {n for n in names if n.startswith("fastrpe/") and not n.endswith(".so")} == sources


@pytest.mark.parametrize("library", LIBRARIES)
def test_symbols(wheel: Path, library: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if library == "_native_cuda.so" and not has_nvcc():
            pytest.skip("built without nvcc")
        archive.extract(f"fastrpe/{library}", tmp_path)
    path = tmp_path / "fastrpe" / library
    wanted = [line.split()[-2:] for line in run("nm", "-D", "--undefined-only", path).splitlines()]
    strong = [name for kind, name in wanted if kind == "U"]
    assert any(SHIM.match(name) for name in strong)
    assert not [name for name in strong if not RUNTIME.search(name) and not SHIM.match(name)]
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", path)))
    assert {n for n in needed if "torch" in n or "c10" in n or "python" in n or "cuda" in n} == {"libtorch.so"}


@pytest.mark.parametrize("torch", TORCHES)
def test_runs_beside(torch: str, wheel: Path, python: Path, tmp_path: Path) -> None:
    pip(python, f"torch=={torch}", wheel)
    run(python, CHECK, torch, cwd=tmp_path)


def test_installs_with_build_isolation(python: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    pip(python, f"torch=={TORCHES[0]}")
    pip(python, tmp_path / "source")
    run(python, CHECK, TORCHES[0], cwd=tmp_path)
