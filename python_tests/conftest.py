"""Switches that must be set before the package is imported, and the fixtures that all tests share."""

import os
from collections.abc import Generator

import torch

# Without a GPU the Triton kernels run interpreted, which Triton decides when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# Fills what torch.empty returns with NaN, C++ and CUDA kernels' outputs too, so that an unwritten element is seen.
torch.use_deterministic_algorithms(True, warn_only=True)

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
        if item.get_closest_marker("large") and not _gpu_bytes() > 40e9:
            item.add_marker(pytest.mark.skip(reason="there is no GPU with 40 GB free"))


def _gpu_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Each backend that runs on ``device``; skips the others and says why. `test_built` fails where one is missing."""
    from fastrpe.backend import problem

    why = problem(request.param, device.type)
    if why:
        pytest.skip(why)
    name: str = request.param
    return name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A kernel that says it does not serve an argument on a GPU skips what crosses it with all arguments."""
    try:
        return (yield)
    except NotImplementedError as error:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("device") == "cuda" and "backend must be" in str(error):
            pytest.skip(str(error))
        raise
