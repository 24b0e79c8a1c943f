"""Rotation of queries and keys: our backends, the reference and peers, on the cases tagged bench.

Run ``pytest bench/bench_rotary.py``; results go to bench/results/<device>/rotary.json, `bench/report.py` reads them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import peers
import pytest
import torch
from harness import Machine, record
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastrpe.backend import problem
from fastrpe.testing.asserts import PEER_ERROR, assert_within
from fastrpe.testing.cases import Arguments, Case, cases
from fastrpe.testing.conformance import check, check_rows, convert, public, truth

OURS = ("native", "triton")
PEER_MODULES = {"liger": "liger_kernel.ops.rope", "fla": "fla.modules.rotary"}
# Where torch.compile is a row: compiling takes longer than measuring.
COMPILED = (
    *(f"{n}{v}" for n in ("llm-4096", "long-131072", "vit-256") for v in ("", "-cayley")),
    *("llm-4096-learned", "vit-256-learned"),
)
ROWS = (slice(0, 32), slice(-32, None))  # the first and last tokens, where a case is too large for a quick check of all
MODES = ("fwd", "bwd", "fwd+bwd")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def rows() -> list[Any]:
    """Case, dtype, backend and mode of every row."""
    found = []
    for case in (*cases("rotate", "bench"), *cases("rotate_cos_sin", "bench")):
        rope = "cayley" not in case.name and "circulant" not in case.name and "learned" not in case.tags
        backends = [*OURS, "eager"]
        if case.name in COMPILED and case.op == "rotate":
            backends += ["compile"]
        if rope:
            backends += ["liger"] if "gqa" in case.name else ["liger", "fla"]
        if case.name in ("llm-4096", "vit-256") and case.op == "rotate":
            backends += ["reference", "reference-compile"]
        found += [(case, BFLOAT16, b, m) for b in backends for m in (MODES[:1] if "length" in case.tags else MODES)]
        if case.name in ("vit-256", "vit-256-cayley"):
            found += [(case, BFLOAT16, b, "fwd-graph") for b in backends if not b.startswith("reference")]
        if case.name in ("llm-4096", "vit-256") and case.op == "rotate":
            found += [(case, FLOAT32, b, m) for b in (*OURS, "eager", "liger") for m in MODES]
    for case in cases("rotate", "cpu-bench"):
        found += [(case, FLOAT32, b, m) for b in ("native", "eager", "compile", "reference") for m in MODES]
    return sorted(found, key=lambda row: (str(row[0]), str(row[1]), row[2]))  # the modes of a backend share its build


@dataclass
class Work:
    """One case, built for one backend: as many sets of inputs as it takes to leave the cache."""

    f: Callable[..., tuple[Tensor, Tensor]]
    sets: list[list[Tensor]]
    bytes: dict[str, int]
    flops: dict[str, tuple[int, int]]  # plain arithmetic, and products with the basis

    def calls(self, mode: str) -> list[Callable[[], Any]]:
        return [self._call(mode, inputs) for inputs in self.sets]

    def _call(self, mode: str, inputs: list[Tensor]) -> Callable[[], Any]:
        if mode in ("fwd", "fwd-graph"):
            return torch.no_grad()(lambda: self.f(*inputs))
        leaves = [x.detach().requires_grad_() for x in inputs]
        dy = [torch.randn_like(x) for x in inputs[:2]]
        if mode == "bwd":
            y = self.f(*leaves)
            return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
        return lambda: torch.autograd.grad(self.f(*leaves), leaves, dy)


@lru_cache(maxsize=1)
def build(case: Case, dtype: torch.dtype, backend: str, machine: Machine) -> Work | str:
    """The work of a row once it passed its check, or why there is none."""
    torch.compiler.reset()
    why = missing(backend, machine)
    if why:
        return why
    arguments = case.make(machine.device, dtype, 0)
    moved = arguments["q"].nbytes + arguments["k"].nbytes
    sets = []
    for seed in range(max(1, -(-machine.cache_bytes // moved))):
        inputs, f = function(case, backend, case.make(machine.device, dtype, seed))
        sets.append(inputs)
    if backend.endswith("compile"):
        f = torch.compile(f, fullgraph=True, dynamic=False)
    confirm(case, dtype, backend, machine, arguments)
    learned, basis = "learned" in case.tags, arguments.get("basis")
    small = sum(x.nbytes for n, x in arguments.items() if isinstance(x, Tensor) and n not in "qk")
    count = arguments["q"].numel() + arguments["k"].numel()
    forward, backward = 2 * moved + small, 2 * moved + small
    planes, product = 3 * count, 0 if basis is None else 2 * basis.shape[-1] * count
    once, back = (planes, product), (planes, product)
    if learned:  # gradients of frequencies and basis read q and k again, and the basis's is one more product
        backward, back = backward + moved + small, (2 * planes, 2 * product)
    return Work(
        f,
        sets,
        {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward},
        {"fwd": once, "bwd": back, "fwd+bwd": (once[0] + back[0], once[1] + back[1])},
    )


def missing(backend: str, machine: Machine) -> str:
    """Why a backend cannot be measured here, or an empty string."""
    if backend in OURS:
        return problem(backend, machine.device.type)
    if backend in PEER_MODULES:
        if not machine.on_gpu:
            return f"{backend} needs a GPU"
        try:
            importlib.import_module(PEER_MODULES[backend])
        except Exception as error:  # whatever a peer's import may raise
            return f"{backend} does not import: {error}"
    return ""


def function(case: Case, backend: str, a: Arguments) -> peers.Built:
    """The tensors that a backend takes, q and k first, and its function of them."""
    learned = "learned" in case.tags
    if backend in PEER_MODULES:
        return getattr(peers, backend)(a)
    if backend in ("eager", "compile"):
        return (peers.eager_learned if learned else peers.eager)(a)
    names = [n for n in ("q", "k", *(("freqs", "basis") if learned else ())) if a[n] is not None]
    op = public(case, backend) if backend in OURS else truth(case)
    return [a[n] for n in names], lambda *xs: op(**a | dict(zip(names, xs)))


def confirm(case: Case, dtype: torch.dtype, backend: str, machine: Machine, a: Arguments) -> None:
    """A row is timed once it is right: ours by conformance (large cases by a twin and some tokens), peers by values."""
    if backend in OURS:
        if a["q"].numel() <= 2**24:
            return check(case, machine.device, dtype, backend)
        for twin in cases(case.op, "twin"):
            if twin.name == f"{case.name}-twin":
                check(twin, machine.device, dtype, backend)
        op = public(case, backend)
        leaves = a | {n: a[n].detach().requires_grad_() for n in "qk"}
        y = op(**leaves)
        back = a | {n: t.detach() for n, t in zip("qk", y)}
        dx = torch.autograd.grad(y, [leaves["q"], leaves["k"]], [back["q"], back["k"]])
        for rows in ROWS:
            check_rows(case, a, y, rows)
            check_rows(case, back, dx, rows, back=True)
    elif not backend.startswith("reference"):
        inputs, f = function(case, backend, convert(a, Tensor.clone))
        with torch.no_grad():
            y = f(*inputs)
        for rows in ROWS:
            part = a | {n: a[n][..., rows, :] for n in ("q", "k", "positions", "cos", "sin") if n in a}
            for actual, expected in zip(y, truth(case)(**convert(part, Tensor.double))):
                assert_within(actual[:, :, rows], expected, PEER_ERROR, name=backend)
    return None


@pytest.mark.parametrize(
    ("case", "dtype", "backend", "mode"), rows(), ids=lambda value: str(value).removeprefix("torch.")
)
def test_rotary(
    case: Case, dtype: torch.dtype, backend: str, mode: str, machine: Machine, benchmark: BenchmarkFixture
) -> None:
    if machine.on_gpu != ("bench" in case.tags):
        pytest.skip(f"{case.name} is not a case for {machine.device.type}")
    work = build(case, dtype, backend, machine)
    if isinstance(work, str):
        pytest.skip(work)
    calls = work.calls(mode)
    base = mode.removesuffix("-graph")
    planes, product = work.flops[base]
    operations = {torch.float32: planes, dtype: product} if dtype != torch.float32 else {dtype: planes + product}
    record("rotary", case, dtype, backend, mode, machine, benchmark, calls, work.bytes[base], operations)
