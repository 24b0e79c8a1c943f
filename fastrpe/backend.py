"""Which kernel runs: three backends, one policy.

``"reference"`` is plain PyTorch and runs anywhere. ``"native"`` is the compiled library: C++ on a CPU, CUDA on a GPU.
``"triton"`` needs Triton and a GPU (or ``TRITON_INTERPRET=1``). ``python -m fastrpe.info`` prints what works and why
not.
"""

import importlib.util
import os
from pathlib import Path

import torch

from .checks import check_choice

BACKENDS = ("reference", "native", "triton")


def _load(library: str) -> str:
    """Load a compiled library beside this file; return why it cannot be used, or an empty string."""
    path = Path(__file__).with_name(library)
    if not path.exists():
        return f"{library} is not built; run 'pip install .' in the source tree"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        why = error.__cause__ or error
        return f"{library} does not load ({why}); run 'pip install --force-reinstall .' in the source tree"
    return ""


def _triton_problem() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run 'pip install triton'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton needs a GPU; set TRITON_INTERPRET=1 to run its kernels slowly on a CPU"
    return ""


# Why a backend cannot run on a type of device; an empty string where it can. Looked up once, at import, so that the
# choice below is a plain table look-up, also while torch.compile traces it.
_native_cpu = _load("_native_cpu.so")
PROBLEMS: dict[str, dict[str, str]] = {
    "cpu": {
        "reference": "",
        "native": _native_cpu,
        "triton": "" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton has no kernels for the CPU",
    },
    "cuda": {
        "reference": "",
        "native": _native_cpu
        or (_load("_native_cuda.so") if torch.version.cuda else "this build of torch has no CUDA support"),
        "triton": _triton_problem(),
    },
}


def problem(backend: str, device_type: str) -> str:
    """Why ``backend`` cannot run on this type of device, or an empty string."""
    if backend == "reference":
        return ""
    return PROBLEMS.get(device_type, {}).get(backend, f"there are no {backend} kernels for device type {device_type!r}")


def available(device: str | torch.device) -> tuple[str, ...]:
    """The backends that run on this device."""
    return tuple(b for b in BACKENDS if not problem(b, torch.device(device).type))


def resolve(op: str, device: torch.device, backend: str | None, preference: tuple[str, ...]) -> str:
    """The backend that runs: the one named, never another, or else the first of ``preference`` that is available."""
    if backend is None:
        problems = PROBLEMS.get(device.type, {})
        for name in preference:
            if problems.get(name) == "":
                return name
        return "reference"
    check_choice(op, "backend", backend, BACKENDS)
    why = problem(backend, device.type)
    if why:
        raise RuntimeError(f"{op}: backend must be available on {device.type}, got {backend!r}: {why}")
    return backend
