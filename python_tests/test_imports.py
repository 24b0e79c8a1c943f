"""The package imports and runs its reference whatever is missing around it; imports point one way."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastrpe"
RUN = """
import torch
from fastrpe.backend import problem
from fastrpe.ops import rotate

def call(backend):
    q = torch.ones(1, 1, 2, 4)
    return rotate(q, q, torch.arange(2.0)[:, None], torch.ones(1, 2), backend=backend)[0]

cos, sin = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
turned = torch.stack([cos - sin] * 2 + [cos + sin] * 2)
for backend in (None, "reference"):
    torch.testing.assert_close(call(backend)[0, 0], torch.stack([torch.ones(4), turned]))
"""


def fresh(code: str, folder: Path) -> str:
    """What a new process that imports the package from ``folder`` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without native libraries."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(PACKAGE, folder / "fastrpe", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def test_without_native_libraries(source: Path) -> None:
    code = RUN + "print(problem('native', 'cpu'))"
    assert fresh(code, source) == "_native_cpu.so is not built; run 'pip install .' in the source tree\n"


def test_native_named_without_its_library(source: Path) -> None:
    code = RUN + "\ntry:\n    call('native')\nexcept RuntimeError as error:\n    print(error)"
    assert fresh(code, source) == (
        "rotate: backend must be available on cpu, got 'native': "
        "_native_cpu.so is not built; run 'pip install .' in the source tree\n"
    )


def test_broken_native_library(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source / "fastrpe", tmp_path / "fastrpe")
    (tmp_path / "fastrpe/_native_cpu.so").write_bytes(b"not a library")
    why = fresh(RUN + "print(problem('native', 'cpu'))", tmp_path)
    assert why.startswith("_native_cpu.so does not load (")
    assert "file too short" in why or "invalid ELF header" in why
    assert why.endswith("run 'pip install --force-reinstall .' in the source tree\n")


def test_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\n" + RUN + "print(problem('triton', 'cuda'))"
    assert fresh(code, ROOT) == "Triton is not installed; run 'pip install triton'\n"


def test_import_loads_no_kernel_language() -> None:
    listed = "\nimport sys; print(sorted(m for m in sys.modules if m.partition('.')[0] == 'triton'))"
    assert fresh("import fastrpe" + listed, ROOT) == fresh("import torch" + listed, ROOT)


def test_import_makes_no_cuda_context() -> None:
    assert fresh("import fastrpe, torch; print(torch.cuda.is_initialized())", ROOT) == "False\n"


def test_info(source: Path) -> None:
    printed = fresh("import runpy; runpy.run_module('fastrpe.info', run_name='__main__')", source)
    assert "\n  reference  works\n" in printed
    assert "\n  native     _native_cpu.so is not built; run 'pip install .' in the source tree\n" in printed
    assert "\n  _native_cuda.so  not built\n" in printed


def test_info_of_this_build() -> None:
    from fastrpe import info
    from fastrpe.backend import BACKENDS, problem

    printed = info.report()
    for backend in BACKENDS:
        assert f"\n  {backend:10} {problem(backend, 'cpu') or 'works'}\n" in printed


# One way down: attention -> positions -> ops -> api -> op -> reference, Triton --------------------------------------

LAYERS = ("checks", "backend", "ops", "positions", "feature_maps", "attention", "models")


def imports(path: Path) -> set[str]:
    """Dotted names of the package's own modules that a file imports."""
    parts = ("fastrpe", *path.relative_to(PACKAGE).parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*parts[: -node.level], *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def files(pattern: str) -> list[Path]:
    return sorted(PACKAGE.glob(pattern))


@pytest.mark.parametrize("path", files("*/**/*.py"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_imports_upward(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    if layer in LAYERS:
        above = LAYERS[LAYERS.index(layer) + 1 :]
        assert not {name for name in imports(path) for a in above if f"{name}.".startswith(f"fastrpe.{a}.")}


@pytest.mark.parametrize(
    "path", files("ops/*/reference.py") + files("ops/*/triton_impl.py") + files("ops/*/triton_impl/*.py"), ids=str
)
def test_implementations_import_no_sibling(path: Path) -> None:
    family, role = path.relative_to(PACKAGE / "ops").with_suffix("").parts[:2]
    siblings = {f"fastrpe.ops.{family}.{p.stem}" for p in (PACKAGE / "ops" / family).glob("*.py") if p.stem != role}
    assert not imports(path) & siblings


@pytest.mark.parametrize("path", files("**/*.py"), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_triton_is_imported_by_its_own_files_alone(path: Path) -> None:
    if "triton_impl" not in str(path):
        assert not {name for name in imports(path) if name.partition(".")[0] == "triton"}
