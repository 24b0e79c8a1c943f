"""Linear attention and random features: our backends and peers, on the cases tagged bench.

Run ``pytest bench/bench_linear.py``; results go to bench/results/<device>/linear.json, `bench/report.py` reads them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import peers_linear
import pytest
import torch
from harness import Machine, record
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastrpe.backend import problem
from fastrpe.testing.asserts import PEER_ERROR, assert_within
from fastrpe.testing.cases import Arguments, Case, cases
from fastrpe.testing.conformance import check, convert, public, truth

OURS = ("native", "triton")
SHORT = 1024  # tokens up to which a CUDA graph is a row: launches cost as much as the work
INPUTS = {"linear_attention": ("q", "k", "v"), "random_features": ("x", "omega")}
MODES = ("fwd", "fwd+bwd")


def rows() -> list[Any]:
    """Case, dtype, backend and mode of every row."""
    found = []
    for case in cases("linear_attention", "bench"):
        causal, length = "causal" in case.name, int(case.name.split("-l")[1].split("-")[0])
        backends = ["native", "triton", "sdpa", "fla"] if causal else ["native", "triton", "sdpa", "eager", "compile"]
        modes = (*MODES, *(f"{m}-graph" for m in MODES)) if length <= SHORT else MODES
        found += [(case, torch.bfloat16, b, m) for b in backends for m in modes]
    for case in cases("random_features", "bench"):
        found += [(case, torch.bfloat16, b, m) for b in ("triton", "eager", "compile") for m in MODES]
    for op in INPUTS:
        for case in cases(op, "cpu-bench"):
            backends = ["native", "eager"] if "causal" in case.name else ["native", "eager", "compile"]
            found += [(case, torch.float32, b, m) for b in backends for m in MODES]
    return sorted(found, key=lambda row: (str(row[0]), str(row[1]), row[2]))  # the modes of a backend share its build


@dataclass
class Work:
    """One case, built for one backend: as many sets of inputs as it takes to leave the cache."""

    f: Callable[..., Tensor]
    sets: list[list[Tensor]]
    bytes: dict[str, int]
    products: dict[str, int]

    def calls(self, mode: str) -> list[Callable[[], Any]]:
        return [self._call(mode, inputs) for inputs in self.sets]

    def _call(self, mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
        if mode == "fwd":
            return torch.no_grad()(lambda: self.f(*inputs))
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.no_grad():
            dy = torch.randn_like(self.f(*inputs))
        return lambda: torch.autograd.grad(self.f(*leaves), leaves, dy)


@lru_cache(maxsize=1)
def build(case: Case, dtype: torch.dtype, backend: str, machine: Machine) -> Work | str:
    """The work of a row once it passed its check, or why there is none."""
    torch.compiler.reset()
    why = missing(backend, machine)
    if why:
        return why
    confirm(case, dtype, backend, machine)
    names = INPUTS[case.op]
    a = case.make(machine.device, dtype, 0)
    read = sum(a[n].nbytes for n in names)
    sets = []
    for seed in range(max(1, -(-machine.cache_bytes // read))):
        inputs, f = function(case, backend, case.make(machine.device, dtype, seed))
        sets.append(inputs)
    if backend == "compile":
        f = torch.compile(f, fullgraph=True, dynamic=False)
    B, H, L, D = a[names[0]].shape
    M = a["omega"].shape[-2]
    project = 2 * B * H * L * M * D
    if case.op == "random_features":
        written, once, back = B * H * L * M * dtype.itemsize, project, 2 * project
    else:
        S, V = a["v"].shape[-2:]
        product = 2 * B * H * L * M * V
        written = B * H * L * V * dtype.itemsize
        once = project * (L + S) // L + 2 * product
        back = 2 * once + 2 * product
    forward, backward = read + written, 2 * read + written  # the inputs and dy in, their gradients out
    return Work(f, sets, {"fwd": forward, "fwd+bwd": forward + backward}, {"fwd": once, "fwd+bwd": once + back})


def missing(backend: str, machine: Machine) -> str:
    """Why a backend cannot be measured here, or an empty string."""
    if backend in OURS:
        return problem(backend, machine.device.type)
    if backend == "fla":
        try:
            importlib.import_module("fla.ops.linear_attn")
        except Exception as error:  # whatever a peer's import may raise
            return f"fla does not import: {error}"
    return ""


def function(case: Case, backend: str, a: Arguments) -> peers_linear.Built:
    """The tensors that a backend takes, and its function of them."""
    if backend in OURS:
        names, op = INPUTS[case.op], public(case, backend)
        if case.op == "random_features":
            a = a | dict(stabilizer="row")
        return [a[n] for n in names], lambda *xs: op(**a | dict(zip(names, xs)))
    if case.op == "random_features":
        return peers_linear.features(a)
    return getattr(peers_linear, "eager" if backend == "compile" else backend)(a)


def confirm(case: Case, dtype: torch.dtype, backend: str, machine: Machine) -> None:
    """A row is timed once it is right on some tokens of some heads: ours by conformance, peers by values."""

    def some(device: torch.device, dtype: torch.dtype, seed: int) -> Arguments:
        a = case.make(device, dtype, seed)
        return a | {n: a[n][:1, :2, :300] for n in INPUTS[case.op] if a[n].dim() == 4}

    twin = replace(case, make=some)
    if backend in OURS:
        check(twin, machine.device, dtype, backend)
    elif backend != "sdpa":
        a = twin.make(machine.device, dtype, 0)
        inputs, f = function(twin, backend, convert(a, Tensor.clone))
        wide = convert(a, Tensor.double)
        if case.op == "random_features":
            wide["stabilizer"] = "row"
        with torch.no_grad():
            y = f(*inputs)
            if backend == "fla":
                phi_q, phi_k, v = (x.transpose(1, 2).double() for x in inputs)
                expected = (phi_q @ phi_k.mT).tril() @ v
            else:
                expected = truth(case)(**wide)
        expected = expected[0] if isinstance(expected, tuple) else expected
        if case.op == "random_features":  # performer-pytorch keeps a factor of each row
            y, expected = (x / x.amax(-1, keepdim=True) for x in (y, expected))
        assert_within(y, expected, PEER_ERROR, name=backend)


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "mode"), rows(), ids=lambda value: str(value).removeprefix("torch.")
)
def test_linear(
    case: Case, dtype: torch.dtype, backend: str, mode: str, machine: Machine, benchmark: BenchmarkFixture
) -> None:
    if machine.on_gpu != ("bench" in case.tags):
        pytest.skip(f"{case.name} is not a case for {machine.device.type}")
    work = build(case, dtype, backend, machine)
    if isinstance(work, str):
        pytest.skip(work)
    base = mode.removesuffix("-graph")
    calls, operations = work.calls(base), {dtype: work.products[base]}
    record("linear", case, dtype, backend, mode, machine, benchmark, calls, work.bytes[base], operations)
