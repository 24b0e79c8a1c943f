"""The two native libraries; everything else about the package is in pyproject.toml.

Both use only torch's stable ABI and no Python symbol, so one build serves every torch since 2.10 and every Python.

    FASTRPE_CUDA=0|1|auto        build the CUDA library: never, always, or where nvcc is found (the default)
    FASTRPE_CUDA_ARCHS=...       what it is compiled for, "8.0;9.0;10.0;12.0+PTX" by default
    CXX, CUDA_HOME, MAX_JOBS     the C++ compiler, the CUDA toolkit, parallel compilations
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Faster than strict C++, yet every sum keeps its order and NaN its meaning: no -ffast-math. Machines are told apart at
# run time (function multiversioning), hence no -march.
HOST = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
HOST += ["-fmacro-prefix-map=../../="]  # messages name csrc/..., wherever it was built


def find_nvcc() -> str | None:
    wanted = os.environ.get("FASTRPE_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"setup.py: FASTRPE_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [f"{home}/bin" for home in homes if home] + [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if nvcc is None and wanted == "1":
        raise SystemExit("setup.py: FASTRPE_CUDA=1 needs nvcc in CUDA_HOME/bin or on PATH, got none")
    if nvcc is None:
        print("fastrpe: no nvcc in CUDA_HOME/bin or on PATH: building the CPU library alone", file=sys.stderr)
    return nvcc


def arch_flags(archs: str) -> list[str]:
    """``-gencode`` flags: "9.0" makes code for sm_90, "12.0+PTX" also the PTX that later GPUs compile at load."""
    flags = []
    for arch in archs.replace(";", " ").split():
        number = arch.removesuffix("+PTX").replace(".", "")
        real = "90a" if number == "90" else number  # Hopper's tensor cores are not in the code that others run, too
        flags.append(f"-gencode=arch=compute_{real},code=sm_{real}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")  # found, not imported: the build needs its headers alone
    if spec is None or spec.origin is None:
        raise SystemExit("setup.py: the build needs the headers of torch 2.10 or later; run 'pip install torch'")
    return Path(spec.origin).parent


class NinjaBuild(build_ext):
    """Both libraries by one ninja file in build/ninja, so that a second build compiles only what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def run(self) -> None:
        nvcc = find_nvcc()
        if nvcc is None:
            self.extensions = [ext for ext in self.extensions if "cuda" not in ext.name]
        for stale in Path(self.build_lib).glob("fastrpe/_native_*.so"):
            stale.unlink()  # a wheel takes everything that lies here
        self.ninja(nvcc)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.{os.getpid()}")
        try:  # never written over: a process may have the old library mapped
            shutil.copyfile(ROOT / "build/ninja" / target.name, fresh)
            os.replace(fresh, target)
        finally:
            fresh.unlink(missing_ok=True)

    def ninja(self, nvcc: str | None) -> None:
        torch, folder = torch_folder(), ROOT / "build/ninja"
        folder.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("FASTRPE_CUDA_ARCHS", "8.0;9.0;10.0;12.0+PTX")
        includes = ["-I../../csrc", f"-isystem {shlex.quote(str(torch / 'include'))}"]
        host = [*COMMON, *HOST, *includes]
        device = [*COMMON, *includes, "-DUSE_CUDA", "--threads=2", "--expt-relaxed-constexpr"]
        device += arch_flags(archs)
        device += [f"-ccbin={CXX.split()[-1]}", "-Xcompiler=" + ",".join(HOST)]
        step = "-MMD -MF $out.d -c $in -o $out\n depfile = $out.d\n deps = gcc"
        # Linked to an empty libtorch.so: at run time the shim is found through the real one, whichever build it is, and
        # nothing but the shim can come from it.
        link = "-L. -ltorch"
        lines = [
            f"rule stub\n command = {CXX} -shared -Wl,-soname,$out -x c /dev/null -o $out",
            "build libtorch.so: stub",
            f"rule cxx\n command = {CXX} {' '.join(host)} {step}",
            f"rule nvcc\n command = {nvcc} {' '.join(device)} {step}",
            f"rule link_cpu\n command = {CXX} -shared -o $out $in -Wl,--no-as-needed {link}",
            f"rule link_cuda\n command = {nvcc} -shared -ccbin={CXX.split()[-1]} -cudart=static -o $out $in "
            f"-Xlinker=--exclude-libs=ALL,--no-as-needed {link}",
        ]
        for ext in self.extensions:
            kind = ext.name.rpartition("_")[2]
            sources = [*(f"../../{source}" for source in ext.sources), describe(folder, kind, torch, nvcc, archs)]
            objects = [f"{Path(source).name}.o" for source in sources]
            rule = "nvcc" if kind == "cuda" else "cxx"
            lines += [f"build {o}: {rule} {source}" for o, source in zip(objects, sources)]
            lines.append(f"build _native_{kind}.so: link_{kind} {' '.join(objects)} | libtorch.so")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if "MAX_JOBS" in os.environ else []
        if subprocess.run([*ninja, "-C", str(folder), *jobs]).returncode:
            raise SystemExit("setup.py: the native libraries did not compile, see above")


def describe(folder: Path, kind: str, torch: Path, nvcc: str | None, archs: str) -> str:
    """A source with one string, the library's build, which ``python -m fastrpe.info`` prints."""
    tool = [*shlex.split(CXX), "--version"] if kind == "cpu" else [str(nvcc), "--version"]
    version = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    compiler = (
        version.splitlines()[0] if kind == "cpu" else f"nvcc {version.rpartition(' V')[2].split()[0]} for {archs}"
    )
    headers = (torch / "version.py").read_text().partition("__version__ = '")[2].partition("'")[0]
    build = f"{compiler}, headers of torch {headers}"
    text = f'extern "C" __attribute__((visibility("default"))) const char fastrpe_build[] = "{build}";\n'
    source = folder / f"build_{kind}.cpp"
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return source.name


class AnyPython(bdist_wheel):
    """One wheel for every Python: the libraries hold no Python symbol."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(kind: str, suffix: str) -> list[str]:
    found = [f"csrc/library_{kind}.cpp", *(f"csrc/{p.parent.name}/{p.name}" for p in ROOT.glob(f"csrc/*/*_{suffix}"))]
    return sorted(found)


setup(
    ext_modules=[
        Extension("fastrpe._native_cpu", sources("cpu", "cpu.cpp")),
        Extension("fastrpe._native_cuda", sources("cuda", "cuda.cu")),
    ],
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": AnyPython},
)
