"""``python -m fastrpe.info``: which backends work on this machine, and why another does not."""

import ctypes
import importlib.metadata
import platform
import sys
from pathlib import Path

import torch

from . import __version__
from .backend import BACKENDS, problem
from .ops import rotate


def state(backend: str, device_type: str) -> str:
    """``works``, or why this backend does not on this type of device; found out by running it."""
    if why := problem(backend, device_type):
        return why
    x = torch.zeros(1, 1, 2, 4, device=device_type)
    try:
        rotate(x, None, x[0, 0, :, :1], x[0, 0, :1, :2], backend=backend)
        if device_type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever it is, it is what the reader asks for
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "works"


def build(library: str) -> str:
    """How a native library was built, from the string that setup.py compiles into it."""
    path = Path(__file__).with_name(library)
    if not path.exists():
        return "not built"
    try:
        text = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(ctypes.CDLL(str(path)), "fastrpe_build")))
    except (OSError, ValueError) as error:
        return f"does not load: {error}"
    return f"{path.stat().st_size / 2**20:.1f} MiB, {text.decode()}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def report() -> str:
    cuda = torch.version.cuda or "none"
    lines = [
        f"fastrpe {__version__}, torch {torch.__version__} (CUDA {cuda}), triton {version('triton')}, "
        f"Python {platform.python_version()}, {sys.platform} {platform.machine()}",
        "",
        f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        *(f"  {backend:10} {state(backend, 'cpu')}" for backend in BACKENDS),
    ]
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        lines.append(f"cuda: {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
        lines += [f"  {backend:10} {state(backend, 'cuda')}" for backend in BACKENDS]
    else:
        lines.append("cuda: torch sees no GPU")
    lines += ["native libraries:", *(f"  {name:16} {build(name)}" for name in ("_native_cpu.so", "_native_cuda.so"))]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
