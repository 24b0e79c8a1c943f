"""What setup.py decides before it compiles anything."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools.command.bdist_wheel", reason="setuptools is too old to build with")
import setuptools

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with the arguments of ``setup()`` as ``build.options``."""
    options: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: options.update(given))
    spec = importlib.util.spec_from_file_location("fastrpe_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.options = options
    return module


def test_every_native_source_is_in_one_library(build: ModuleType) -> None:
    listed = [source for ext in build.options["ext_modules"] for source in ext.sources]
    found = [str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    assert sorted(listed) == sorted(found)


def test_two_libraries_whose_names_no_python_marks(build: ModuleType) -> None:
    command = build.NinjaBuild(setuptools.Distribution())
    names = [command.get_ext_filename(ext.name) for ext in build.options["ext_modules"]]
    assert names == ["fastrpe/_native_cpu.so", "fastrpe/_native_cuda.so"]


def test_a_library_in_use_is_replaced_not_overwritten(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    built = tmp_path / "build/ninja/_native_cpu.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"new")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    command = build.NinjaBuild(setuptools.Distribution())
    command.build_lib = str(tmp_path / "lib")
    folder = tmp_path / "lib/fastrpe"
    folder.mkdir(parents=True)
    target = folder / "_native_cpu.so"
    target.write_bytes(b"old")
    with target.open("rb") as mapped:
        command.build_extension(build.options["ext_modules"][0])
        assert mapped.read() == b"old"
    assert target.read_bytes() == b"new"
    assert list(folder.iterdir()) == [target]


def test_arch_flags(build: ModuleType) -> None:
    assert build.arch_flags("8.0;12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_cuda_switch(build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: f"/toolkit/bin/{name}")
    for switch, nvcc in (("0", None), ("1", "/toolkit/bin/nvcc"), ("auto", "/toolkit/bin/nvcc")):
        monkeypatch.setenv("FASTRPE_CUDA", switch)
        assert build.find_nvcc() == nvcc
    assert capsys.readouterr().err == ""


def test_without_nvcc(build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path: None)
    monkeypatch.setenv("FASTRPE_CUDA", "auto")
    assert build.find_nvcc() is None
    assert capsys.readouterr().err == ("fastrpe: no nvcc in CUDA_HOME/bin or on PATH: building the CPU library alone\n")
    monkeypatch.setenv("FASTRPE_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTRPE_CUDA=1 needs nvcc in CUDA_HOME/bin or on PATH, got none"):
        build.find_nvcc()


def test_wrong_cuda_switch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRPE_CUDA", "yes")
    with pytest.raises(SystemExit, match="FASTRPE_CUDA must be 0, 1 or auto, got 'yes'"):
        build.find_nvcc()


def test_without_torch(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs the headers of torch 2.10 or later; run 'pip install torch'"):
        build.torch_folder()
