"""The sparse Cayley transform: SPEC 2.8, items 1, 7 and 8, for every solver; and what every operator must survive."""

import gc
import itertools
import sys
import types

import pytest
import scipy.sparse
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastrpe.ops import sparse_cayley
from fastrpe.ops.sparse import api, pattern, reference, solvers
from fastrpe.ops.sparse.api import SOLVERS, fastest
from fastrpe.ops.sparse.pattern import Pattern, patterns_of
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import ORTHOGONAL, SKEW_RANGE, SPARSE, SPARSE_GRADIENT

SIZE, HEADS = 16, 2
FRACTIONS = ("0", "1/d", "0.05", "0.1", "0.5", "1")


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if why := solvers.problem(name, device.type):
        pytest.skip(why)
    return name


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _count(f: str, size: int = SIZE) -> int:
    number, _, over = f.partition("/")
    return round(float(number) / (size if over else 1) * size * (size - 1) / 2)


def _pairs(count: int, size: int = SIZE, heads: int | None = None, device: torch.device | str = "cpu") -> Tensor:
    every = torch.triu_indices(size, size, 1).mT
    draws = [every[torch.randperm(len(every), generator=_generator(i))[:count]] for i in range(heads or 1)]
    return (torch.stack(draws) if heads else draws[0]).to(device)


def _normal(
    *shape: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64, seed: int = 0
) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator(seed)).to(device, dtype)


def _assert_again(a: Tensor, b: Tensor, solver: str) -> None:
    """The same bits, but by cuDSS, which is deterministic for one right-hand side alone."""
    if solver == "lu" and a.is_cuda:
        assert_within(a, b, SPARSE if a.dtype == torch.float64 else torch.finfo(a.dtype).eps)
    else:
        assert_bitwise(a, b)


def _run(
    x: Tensor, theta: Tensor, pairs: Tensor, dy: Tensor, solver: str | None, inverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and both gradients; of the reference for None."""
    x, theta = (t.detach().requires_grad_() for t in (x, theta))
    if solver is None:
        y = reference.sparse_cayley(x, theta, pairs, inverse)
    else:
        y = sparse_cayley(x, theta, pairs, solver=solver, inverse=inverse)
    return (y.detach(), *torch.autograd.grad(y, (x, theta), dy.to(y.dtype)))


# 2.8.1, 2.8.7 and 2.8.8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", (None, HEADS), ids=("one-pattern", "per-head"))
@pytest.mark.parametrize("f", FRACTIONS)
@pytest.mark.parametrize("size", (SIZE, 41))
def test_8_every_solver_equals_the_dense_solve(
    f: str, size: int, heads: int | None, solver: str, device: torch.device
) -> None:
    count = _count(f, size)
    pairs = _pairs(count, size, heads, device)
    theta = _normal(HEADS, count, device=device)
    x, dy = (_normal(3, HEADS, 5, size, device=device, seed=s) for s in (1, 2))
    for inverse in (False, True):
        y, dx, dtheta = _run(x, theta, pairs, dy, solver, inverse)
        exact = _run(x, theta, pairs, dy, None, inverse)
        assert_within(y, exact[0], SPARSE)
        assert_within(dx, exact[1], SPARSE)
        assert_within(dtheta, exact[2], SPARSE_GRADIENT)
        assert_within(sparse_cayley(y, theta, pairs, solver=solver, inverse=not inverse), x, SPARSE)


def test_8_no_pair_gives_the_identity(solver: str, device: torch.device) -> None:
    x = _normal(2, HEADS, 5, SIZE, device=device, dtype=torch.float32)
    empty = torch.empty(0, 2, dtype=torch.int64, device=device)
    assert_bitwise(sparse_cayley(x, x.new_empty(HEADS, 0), empty, solver=solver), x)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("scale", (1.0, 30.0, SKEW_RANGE))
@pytest.mark.parametrize("f", ("1/d", "0.1", "1"))
def test_1_orthogonal_for_a_large_S(
    f: str, scale: float, dtype: torch.dtype, solver: str, device: torch.device
) -> None:
    size = 40
    pairs = _pairs(_count(f, size), size, device=device)
    theta = _normal(HEADS, len(pairs), device=device)
    theta = theta * scale / torch.linalg.matrix_norm(reference.skew(theta, pairs, size), 2).unsqueeze(-1)
    eye = torch.eye(size, dtype=dtype, device=device)
    P = sparse_cayley(eye.expand(HEADS, -1, -1), theta.to(dtype), pairs, solver=solver).double()
    for product in (P @ P.mT, P.mT @ P):
        assert (product - eye).abs().max() <= ORTHOGONAL[dtype]


def test_1_one_entry_alone_is_large(solver: str) -> None:
    """Elimination meets the small pivot first: a growth by theta^2, which refinement takes back."""
    pairs, size = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]]), 5
    theta = torch.tensor([[SKEW_RANGE, 1.0, SKEW_RANGE / 3, 0.3]], dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    P = sparse_cayley(eye.unsqueeze(0), theta, pairs, solver=solver)[0]
    assert (P @ P.mT - eye).abs().max() <= ORTHOGONAL[torch.float64]


@pytest.mark.parametrize("heads", (None, HEADS), ids=("one-pattern", "per-head"))
@pytest.mark.parametrize("inverse", (False, True))
def test_7_gradcheck(inverse: bool, heads: int | None, solver: str, device: torch.device) -> None:
    pairs = _pairs(6, 6, heads, device)
    theta = _normal(HEADS, 6, device=device).requires_grad_()
    x = _normal(2, 2 * HEADS, 2, 6, device=device).requires_grad_()  # two query heads for each of theta's
    loose = SPARSE if device.type == "cuda" and solver == "lu" else 0.0  # `_assert_again`
    assert gradcheck(
        lambda x, t: sparse_cayley(x, t, pairs, inverse=inverse, solver=solver), (x, theta), nondet_tol=loose
    )
    assert gradgradcheck(
        lambda x: sparse_cayley(x, theta.detach(), pairs, inverse=inverse, solver=solver), x, nondet_tol=loose
    )


def test_second_derivatives_with_respect_to_theta(solver: str, device: torch.device) -> None:
    pairs, x = _pairs(6, 6, device=device), _normal(HEADS, 2, 6, device=device)
    theta = _normal(HEADS, 6, device=device).requires_grad_()
    if solver == "matrix":
        assert gradgradcheck(lambda t: sparse_cayley(x, t, pairs, solver=solver), theta)
        return
    (first,) = torch.autograd.grad(sparse_cayley(x, theta, pairs, solver=solver).sum(), theta, create_graph=True)
    with pytest.raises(RuntimeError, match="sparse_cayley: theta must not require grad for a second derivative, got"):
        torch.autograd.grad(first.sum(), theta)


# Shapes and dtypes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_narrow_dtypes(dtype: torch.dtype, solver: str, device: torch.device) -> None:
    pairs = _pairs(20, device=device)
    theta = 0.5 * _normal(HEADS, 20, device=device, dtype=torch.float32)
    x, dy = (_normal(2, 2 * HEADS, 33, SIZE, device=device, dtype=dtype, seed=s) for s in (1, 2))
    actual = _run(x, theta, pairs, dy, solver)
    same = _run(x, theta, pairs, dy, None)
    exact = _run(x.double(), theta.double(), pairs, dy.double(), None)
    for name, a, s, e in zip(("y", "dx", "dtheta"), actual, same, exact):
        assert a.is_contiguous()
        assert_accurate(a, s, e, name=name, dtype=dtype)


@pytest.mark.parametrize("shape", [(HEADS, 1, SIZE), (1, HEADS, 17, SIZE), (2, 3, 3 * HEADS, 4, SIZE)], ids=str)
def test_any_leading_shape_and_groups_of_queries(shape: tuple[int, ...], solver: str, device: torch.device) -> None:
    pairs, theta = _pairs(20, heads=HEADS, device=device), _normal(HEADS, 20, device=device)
    x, dy = _normal(*shape, device=device), _normal(*shape, device=device, seed=1)
    for actual, expected in zip(_run(x, theta, pairs, dy, solver), _run(x, theta, pairs, dy, None)):
        assert_within(actual, expected, SPARSE)


@pytest.mark.parametrize("shape", [(0, HEADS, 3, SIZE), (2, HEADS, 0, SIZE)], ids=str)
def test_no_tokens(shape: tuple[int, ...], solver: str, device: torch.device) -> None:
    pairs, theta, x = _pairs(20, device=device), _normal(HEADS, 20, device=device), _normal(*shape, device=device)
    y, dx, dtheta = _run(x, theta, pairs, x, solver)
    assert y.shape == dx.shape == shape
    assert dtheta.shape == theta.shape and not dtheta.any()


def test_any_strides(solver: str, device: torch.device) -> None:
    pairs, theta = _pairs(20, device=device), _normal(20, HEADS, device=device).mT
    x = _normal(2, HEADS, 18, SIZE, device=device)
    views = [
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((x, x), -1).flatten(-2)[..., ::2],
        torch.cat((x[..., :1], x), -1)[..., 1:],
    ]
    expected = _run(x, theta.contiguous(), pairs, x, solver)
    for view in views:
        for a, e in zip(_run(view, theta, pairs.mT.contiguous().mT, view, solver), expected):
            assert_within(a, e, SPARSE)


def test_deterministic_and_inputs_left_alone(solver: str, device: torch.device) -> None:
    pairs, theta = _pairs(30, heads=HEADS, device=device), _normal(HEADS, 30, device=device, dtype=torch.float32)
    x = _normal(2, HEADS, 300, SIZE, device=device, dtype=torch.float32)
    before = x.clone(), theta.clone(), pairs.clone()
    first, second = (_run(x, theta, pairs, x, solver) for _ in range(2))
    for a, b in zip(before, (x, theta, pairs)):
        assert_bitwise(a, b)
    for a, b in zip(first, second):
        _assert_again(a, b, solver)


@pytest.mark.parametrize("threads", (1, 2))
def test_threads_do_not_change_bits(threads: int, solver: str) -> None:
    if solver not in ("lu", "superlu"):
        pytest.skip("PyTorch's own products")
    pairs, theta = _pairs(30), _normal(HEADS, 30, dtype=torch.float32)
    x = _normal(2, HEADS, 300, SIZE, dtype=torch.float32)
    before, expected = torch.get_num_threads(), _run(x, theta, pairs, x, solver)
    torch.set_num_threads(threads)
    try:
        for a, b in zip(_run(x, theta, pairs, x, solver), expected):
            assert_bitwise(a, b)
    finally:
        torch.set_num_threads(before)


def test_large_heads_with_threads_of_their_own(solver: str) -> None:
    """PyTorch's batched LU is wrong here, without an error: pytorch/pytorch#142815."""
    size = 160
    pairs, theta = _pairs(size, size), _normal(HEADS, size)
    eye, before = torch.eye(size, dtype=torch.float64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        P = sparse_cayley(eye.expand(HEADS, -1, -1), theta, pairs, solver=solver)
    finally:
        torch.set_num_threads(before)
    assert (P @ P.mT - eye).abs().max() <= ORTHOGONAL[torch.float64]


# PyTorch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", (None, HEADS), ids=("one-pattern", "per-head"))
def test_opcheck(heads: int | None, solver: str, device: torch.device) -> None:
    if solver == "matrix":
        pytest.skip("made of PyTorch's operators")
    pairs, theta = _pairs(6, 6, heads, device), _normal(HEADS, 6, device=device, dtype=torch.float32).requires_grad_()
    x = _normal(2, HEADS, 3, 6, device=device, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.fastrpe.sparse_cayley.default, (x, theta, pairs, False, solver))
    args = tuple(t.detach() for t in (x, x, theta, pairs))
    torch.library.opcheck(torch.ops.fastrpe.sparse_cayley_bwd.default, (*args, False, solver))


@pytest.mark.parametrize("name", ("auto", *SOLVERS))
def test_compile(name: str, device: torch.device) -> None:
    if why := solvers.problem(name, device.type):
        pytest.skip(why)
    pairs, theta = _pairs(20, device=device), _normal(HEADS, 20, device=device, dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(sparse_cayley, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, batch in enumerate((7, 11, 13)):
        x = _normal(batch, HEADS, 5, SIZE, device=device, dtype=torch.float32, seed=i)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            leaves = [t.detach().requires_grad_() for t in (x, theta)]
            y = compiled(*leaves, pairs, solver=name)
            actual = y.detach(), *torch.autograd.grad(y, leaves, x)
        for a, e in zip(actual, _run(x, theta, pairs, x, name)):
            _assert_again(a.contiguous(), e.contiguous(), name)


def test_export(solver: str, device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, theta: Tensor, pairs: Tensor) -> Tensor:
            return sparse_cayley(x, theta, pairs, solver=solver)

    args = _normal(3, HEADS, 5, SIZE, device=device), _normal(HEADS, 20, device=device), _pairs(20, device=device)
    program = torch.export.export(Model(), args)
    assert solver == "matrix" or repr(solver) in program.graph_module.code
    _assert_again(program.module()(*args), Model()(*args), solver)


def test_vmap(solver: str, device: torch.device) -> None:
    pairs = _pairs(20, heads=3, device=device)
    args = _normal(3, 2, 1, 5, SIZE, device=device), _normal(3, 1, 20, device=device), pairs
    for mapped in ((0, None, None), (0, 0, None), (None, 0, None), (0, 0, 0), (None, None, 0)):
        inputs = [t if d is not None else t[0] for t, d in zip(args, mapped)]
        actual = torch.vmap(lambda *a: sparse_cayley(*a, solver=solver), mapped)(*inputs)
        loop = [
            sparse_cayley(*(t if d is None else t[i] for t, d in zip(inputs, mapped)), solver=solver) for i in range(3)
        ]
        assert_within(actual, torch.stack(loop), SPARSE)


def test_autocast(solver: str, device: torch.device) -> None:
    """x goes to the autocast dtype, theta does not; float64 stays."""
    pairs, theta = _pairs(20, device=device), _normal(HEADS, 20, device=device, dtype=torch.float32)
    for dtype in (torch.float32, torch.float64):
        x = _normal(2, HEADS, 5, SIZE, device=device, dtype=dtype)
        with torch.autocast(device.type, torch.bfloat16):
            y = sparse_cayley(x, theta, pairs, solver=solver)
        low = x.bfloat16() if dtype == torch.float32 else x
        _assert_again(y, sparse_cayley(low, theta, pairs, solver=solver), solver)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ("auto", "matrix", "dense", "components", "cg"))
def test_a_known_pattern_can_be_captured(solver: str) -> None:
    """Nothing waits for the device but the first sight of a pattern."""
    device = torch.device("cuda")
    pairs, theta = _pairs(20, device=device), _normal(HEADS, 20, device=device, dtype=torch.float32)
    x = _normal(2, HEADS, 5, SIZE, device=device, dtype=torch.float32)
    leaves = [t.detach().requires_grad_() for t in (x, theta)]

    def step() -> list[Tensor]:
        y = sparse_cayley(*leaves, pairs, solver=solver)
        return [y.detach(), *torch.autograd.grad(y, leaves, x)]

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected):
        assert_within(a, b, LAW_FLOAT64)


# Patterns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "count"), [(1, 0), (6, 5), (20, 10), (20, 25), (12, 66)])
def test_elimination_knows_the_fill(size: int, count: int) -> None:
    """Its nonzeros are those of L in exact arithmetic without cancellation, which random values do not meet."""
    pairs = _pairs(count, size)
    e = patterns_of(pairs, size).elimination
    assert sorted(e.order[0].tolist()) == list(range(size))
    S = reference.skew(_normal(1, count), pairs, size)[0]
    order = e.order[0].long()
    A = (torch.eye(size, dtype=torch.float64) + S)[order][:, order]
    for k, v in enumerate(order.tolist()):
        column = A[k + 1 :, k] / A[k, k]
        below = {int(order[k + 1 + i]) for i in column.nonzero()}
        found = e.rows[e.start[0, k] : e.start[0, k + 1]].tolist()
        assert below == set(found), v
        assert found == sorted(found, key=order.tolist().index)
        A[k + 1 :] -= column.unsqueeze(-1) * A[k]


@pytest.mark.parametrize("count", (0, 5, 12, 30))
def test_components(count: int) -> None:
    pairs = _pairs(count, 25)
    graph = scipy.sparse.coo_array(([1] * count, pairs.mT.numpy()), shape=(25, 25))
    _, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    expected = {frozenset((label == i).nonzero()[0].tolist()) for i in set(label)}
    found = Pattern(25, [(a, b) for a, b in pairs.tolist()]).components
    assert {frozenset(c) for c in found} == {c for c in expected if len(c) > 1}


def test_a_pattern_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = _pairs(5)
    first = patterns_of(pairs, SIZE)
    assert patterns_of(pairs, SIZE) is first
    assert patterns_of(pairs.clone(), SIZE).each[0] is first.each[0]
    pairs[0] = torch.tensor([0, 1]) if pairs[0].tolist() != [0, 1] else torch.tensor([0, 2])
    assert patterns_of(pairs, SIZE).each[0] is not first.each[0]
    with torch.inference_mode():
        other = _pairs(5)
        assert patterns_of(other, SIZE) is patterns_of(other, SIZE)
    monkeypatch.setattr(pattern, "_pattern", None)  # a second analysis would call it
    assert patterns_of(other, SIZE).each[0] is first.each[0]


def test_auto_takes_what_the_shapes_say() -> None:
    if solvers.problem("lu", "cpu"):
        assert fastest("cpu", 512, 256, 2, 4096, grad=False) == "matrix"
        pytest.skip("the native library is not built")
    for grad in (False, True):
        assert fastest("cpu", 512, 256, 2, 4096, grad) == fastest("cpu", 512, 511, 2, 4096, grad) == "lu"
        assert fastest("cpu", 512, 512 * 511 // 2, 2, 4096, grad) == fastest("cpu", 64, 2016, 2, 4096, grad) == "matrix"
        assert fastest("cpu", 1024, 1024 * 1023 // 2, 2, 256, grad) == "dense"
        assert {fastest("cuda", d, 4 * d, 2, 4096, grad, lu=True) for d in (64, 128, 256, 512)} == {"matrix"}
        assert fastest("cuda", 1024, 1023, 2, 256, grad, lu=True) == "lu"
        assert fastest("cuda", 1024, 1023, 2, 256, grad, lu=False) == "matrix"
        assert fastest("cuda", 1024, 512, 2, 4096, grad, lu=True) == "components"
    for count, size in itertools.product((5, 120), (16,)):
        pairs, theta, x = _pairs(count), _normal(HEADS, count), _normal(HEADS, 3, size)
        name = fastest("cpu", size, count, HEADS, 3, grad=False)
        assert_bitwise(sparse_cayley(x, theta, pairs), sparse_cayley(x, theta, pairs, solver=name))


def test_auto_knows_whether_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(api, "fastest", lambda *arguments: asked.append(arguments[-1]) or "components")
    pairs, theta, x = _pairs(5), _normal(HEADS, 5), _normal(HEADS, 3, SIZE)
    learned, fixed = theta.clone().requires_grad_(), x.clone().requires_grad_()
    for inputs, wanted in (((x, theta), False), ((x, learned), True), ((fixed, theta), True)):
        sparse_cayley(*inputs, pairs)
        with torch.no_grad():
            sparse_cayley(*inputs, pairs)
        assert asked == [wanted, False]
        asked.clear()


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x must be a Tensor, got list", dict(x=[1])),
        (ValueError, "x must have shape (..., H, L, D), got (3, 16)", dict(x=torch.zeros(3, 16))),
        (
            ValueError,
            "x must have dtype float16, bfloat16, float32, float64, got int64",
            dict(x=torch.zeros(2, 3, 16, dtype=torch.int64)),
        ),
        (ValueError, "theta must have shape (Hk, K), got (5,)", dict(theta=torch.zeros(5))),
        (
            ValueError,
            "theta must have dtype float16, bfloat16, float32, float64, got int64",
            dict(theta=torch.zeros(2, 5, dtype=torch.int64)),
        ),
        (
            ValueError,
            "theta must be on the device of x, cpu, got meta",
            dict(theta=torch.zeros(2, 5, device="meta")),
        ),
        (ValueError, "theta must have a number of heads that divides H=2, got 3", dict(theta=torch.zeros(3, 5))),
        (ValueError, "theta must have a number of heads that divides H=2, got 0", dict(theta=torch.zeros(0, 5))),
        (
            ValueError,
            "pairs must have shape (K, 2) or (Hk, K, 2) with Hk=2, K=5, 2=2, got (4, 2)",
            dict(pairs=torch.zeros(4, 2, dtype=torch.int64)),
        ),
        (ValueError, "pairs must have dtype int64, got float32", dict(pairs=torch.zeros(5, 2))),
        (
            ValueError,
            "pairs must be on the device of x, cpu, got meta",
            dict(pairs=torch.zeros(5, 2, dtype=torch.int64, device="meta")),
        ),
        (TypeError, "inverse must be a bool, got int", dict(inverse=1)),
        (
            ValueError,
            "solver must be one of 'auto', 'matrix', 'lu', 'superlu', 'components', 'cg', 'dense', got 'qr'",
            dict(solver="qr"),
        ),
        (
            ValueError,
            "pairs must be two different numbers from 0 to D - 1 = 15, got (3, 16)",
            dict(pairs=torch.tensor([[3, 16], [0, 1], [0, 2], [0, 3], [0, 4]]), solver="components"),
        ),
        (
            ValueError,
            "pairs must be two different numbers from 0 to D - 1 = 15, got (3, 3)",
            dict(pairs=torch.tensor([[3, 3], [0, 1], [0, 2], [0, 3], [0, 4]]), solver="components"),
        ),
        (
            ValueError,
            "pairs must be distinct, got 5 with a repetition",
            dict(pairs=torch.tensor([[1, 0], [0, 1], [0, 2], [0, 3], [0, 4]]), solver="components"),
        ),
    ],
)
def test_bad_arguments_raise(error: type[Exception], message: str, changes: dict[str, object]) -> None:
    arguments = dict(x=torch.zeros(2, 3, SIZE), theta=torch.zeros(2, 5), pairs=_pairs(5)) | changes
    with pytest.raises(error) as raised:
        sparse_cayley(**arguments)  # type: ignore[arg-type]
    assert str(raised.value) == f"sparse_cayley: {message}"


class Solver:
    """Solves as nvmath's does, by what stands in its operands at the time of each call."""

    alive = 0

    def __init__(self, a: Tensor, b: Tensor, options: object) -> None:
        assert a.crow_indices().dtype == a.col_indices().dtype == torch.int32 and b.stride(0) == 1
        self.a, self.b, self.config_ptr = a, b, 0
        Solver.alive += 1

    def plan(self) -> None:
        pass

    def factorize(self) -> None:
        self.factors = torch.linalg.lu_factor(self.a.to_dense())

    def solve(self) -> Tensor:
        return torch.linalg.lu_solve(*self.factors, self.b)

    def free(self) -> None:
        Solver.alive -= 1


@pytest.mark.parametrize("heads", (None, HEADS), ids=("one-pattern", "per-head"))
def test_cudss_is_asked_for_the_right_systems(heads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = types.SimpleNamespace(set_current=lambda: None)
    parts = {
        "cuda": {},
        "cuda.core": {"Device": lambda index: device},
        "nvmath": {},
        "nvmath.sparse": {},
        "nvmath.sparse.advanced": {"DirectSolver": Solver},
    }
    for name, content in parts.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    pairs, theta, x = _pairs(20, heads=heads), _normal(HEADS, 20), _normal(HEADS, 7, SIZE)
    system = torch.eye(SIZE, dtype=torch.float64) + reference.skew(theta, pairs, SIZE)
    for scale in (1.0, 2.0):  # the same plan for other values
        scaled = torch.eye(SIZE, dtype=torch.float64) + scale * (system - torch.eye(SIZE, dtype=torch.float64))
        solve = solvers.cudss(scale * theta, pairs, SIZE)
        for adjoint in (False, True):
            matrix = scaled.mT if adjoint else scaled
            assert_within(solve(x, adjoint), torch.linalg.solve(matrix, x.mT).mT, SPARSE)
    assert Solver.alive == 2
    del pairs, solve
    gc.collect()
    assert Solver.alive == 0


@pytest.mark.parametrize(
    ("package", "needed", "extra", "device_type", "name"),
    [
        ("no_such_scipy", "SciPy", "superlu", "cpu", "superlu"),
        ("no_such_nvmath", "nvmath-python", "cudss", "cuda", "lu"),
    ],
)
def test_a_solver_whose_library_is_missing(
    package: str, needed: str, extra: str, device_type: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    why = solvers._missing(package, needed, extra)
    assert why == f"{needed} is not installed; run 'pip install fastrpe[{extra}]'"
    monkeypatch.setitem(solvers.PROBLEMS[device_type], name, why)
    assert solvers.problem(name, device_type) == why
    assert solvers.problem(name, "xpu") == "there is none for device type 'xpu'"
    if device_type == "cpu":
        with pytest.raises(RuntimeError) as raised:
            sparse_cayley(torch.zeros(2, 3, SIZE), torch.zeros(2, 5), _pairs(5), solver=name)
        assert str(raised.value) == f"sparse_cayley: solver must be available on cpu, got '{name}': {why}"
