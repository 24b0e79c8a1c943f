"""Random features and the Walsh-Hadamard transform, beyond what the conformance suite asks of every op."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastrpe.backend import problem
from fastrpe.ops.features import fwht, random_features, reference
from fastrpe.ops.features.reference import EXPONENTIAL, KINDS
from fastrpe.testing.asserts import assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import ADJOINT, CANCELLED_FACTOR, FORMULA

STABILIZED = (*EXPONENTIAL, "trigonometric")
every_kind = pytest.mark.parametrize("kind", KINDS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> Tensor:
    return torch.randn(shape, dtype=dtype, device=device, generator=torch.Generator(device).manual_seed(seed))


def inputs(
    kind: str, device: Any = "cpu", dtype: torch.dtype = torch.float64, L: int = 5, D: int = 6, M: int = 7
) -> dict[str, Any]:
    options = dict(a=-0.2) if kind == "oprf" else {}
    wide = torch.promote_types(dtype, torch.float32)
    x, omega = draw(1, 2, L, D, dtype=dtype, device=device), draw(M, D, seed=1, dtype=wide, device=device)
    return dict(x=x, omega=omega, kind=kind, **options)


# Values --------------------------------------------------------------------------------------------------------------


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "positive": lambda p, n, w: (p - n).exp() / len(w) ** 0.5,
    "hyperbolic": lambda p, n, w: torch.cat((p, -p), -1).sub(n).exp() / (2 * len(w)) ** 0.5,
    "trigonometric": lambda p, n, w: torch.cat((p.cos(), p.sin()), -1) * n.exp() / len(w) ** 0.5,
    "oprf": lambda p, n, w: (
        (-0.2 * w.square().sum(-1) + 1.8**0.5 * p - n).exp() * 1.8 ** (w.shape[-1] / 4) / len(w) ** 0.5
    ),
    "relu": lambda p, n, w: p.relu(),
    "exp": lambda p, n, w: p.exp(),
    "elu": lambda p, n, w: torch.nn.functional.elu(p) + 1,
}


@every_kind
def test_formula(device: torch.device, backend: str, kind: str) -> None:
    arguments = inputs(kind, device)
    x, w = arguments["x"], arguments["omega"]
    scale = 6**-0.25 if kind in reference.SOFTMAX else 1.0
    expected = FORMULAS[kind](scale * x @ w.mT, (scale * x).square().sum(-1, keepdim=True) / 2, w)
    y = random_features(**arguments, backend=backend)
    assert y.shape == (1, 2, 5, 14 if kind in ("hyperbolic", "trigonometric") else 7)
    assert_within(y, expected, FORMULA)
    half = random_features(**arguments, scale=scale / 2, backend=backend)
    assert_within(half, random_features(**arguments | dict(x=x / 2), backend=backend), FORMULA)


def test_each_head_has_its_projection(device: torch.device, backend: str) -> None:
    x, omega = draw(2, 3, 5, 6, device=device), draw(3, 7, 6, seed=1, device=device)
    y = random_features(x, omega, backend=backend)
    for h in range(3):
        assert_within(y[:, h : h + 1], random_features(x[:, h : h + 1], omega[h], backend=backend), FORMULA)


@pytest.mark.parametrize("kind", ("relu", "exp", "elu"))
def test_no_projection_is_the_identity(device: torch.device, backend: str, kind: str) -> None:
    x = draw(2, 3, 5, 6, device=device)
    one = random_features(x, torch.eye(6, dtype=x.dtype, device=device), kind, backend=backend)
    assert_within(random_features(x, None, kind, backend=backend), one, FORMULA)


def test_a_as_number_and_tensor(device: torch.device, backend: str) -> None:
    arguments = inputs("oprf", device)
    tensor = torch.tensor(-0.2, dtype=torch.float64, device=device)
    y = random_features(**arguments, backend=backend)
    assert_bitwise(random_features(**arguments | dict(a=tensor), backend=backend), y)
    zero = random_features(**arguments | dict(a=0), backend=backend)
    assert_within(zero, random_features(**inputs("positive", device), backend=backend), CANCELLED_FACTOR)


# Stabilizers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STABILIZED)
def test_stabilizers_cancel(device: torch.device, backend: str, kind: str) -> None:
    """Rows of queries and heads of keys are divided by one number each, which normalised attention cancels."""
    arguments = inputs(kind, device)
    plain = random_features(**arguments, backend=backend)
    row, one = (random_features(**arguments, stabilizer=s, backend=backend) for s in ("row", "global"))
    if kind == "trigonometric":
        size = plain.norm(dim=-1, keepdim=True)
    else:
        size = plain.amax(-1, keepdim=True) / reference.constant(kind, 7, 6, arguments.get("a"))
    assert_within(row, plain / size, CANCELLED_FACTOR)
    assert_within(one, plain / size.amax(2, keepdim=True), CANCELLED_FACTOR)
    weights = plain @ plain.mT
    stable = row @ one.mT
    assert_within(stable / stable.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True), CANCELLED_FACTOR)


def test_eps_is_added_before_the_constant(device: torch.device, backend: str) -> None:
    arguments = inputs("positive", device)
    for stabilizer in (None, "row", "global"):
        y, more = (random_features(**arguments, eps=eps, stabilizer=stabilizer, backend=backend) for eps in (0.0, 0.25))
        assert_within(more, y + 0.25 * 7**-0.5, FORMULA)


@pytest.mark.parametrize("kind", STABILIZED)
@pytest.mark.parametrize("stabilizer", ("row", "global"))
def test_no_gradient_through_the_stabilizer(device: torch.device, backend: str, kind: str, stabilizer: str) -> None:
    """The gradient is that of features divided by numbers that happen to be these."""
    arguments = inputs(kind, device)
    x = arguments["x"].requires_grad_()
    y = random_features(**arguments, stabilizer=stabilizer, backend=backend)
    plain = random_features(**arguments, backend=backend)
    factor = (y.norm(dim=-1, keepdim=True) / plain.norm(dim=-1, keepdim=True)).detach()
    dy = draw(*y.shape, seed=2, device=device)
    found, expected = (torch.autograd.grad(t, x, dy)[0] for t in (y, plain * factor))
    assert_within(found, expected, CANCELLED_FACTOR)


# 10: large inputs, small sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", STABILIZED)
def test_10_large_inputs_are_finite(device: torch.device, backend: str, kind: str, dtype: torch.dtype) -> None:
    """Entries up to 30, vectors of norm 30 along a row of the projection, gradients too."""
    options = dict(a=-0.1) if kind == "oprf" else {}
    omega = draw(16, 16, seed=1, dtype=torch.float32, device=device)
    entries = 30 * draw(1, 2, 8, 16, device=device).clamp(-1, 1)
    along = (30 * omega / omega.norm(dim=-1, keepdim=True)).expand(1, 2, 16, 16)
    for x in (entries.to(dtype), along.to(dtype)):
        for stabilizer in ("row", "global"):
            x, w = x.detach().requires_grad_(), omega.detach().requires_grad_()
            y = random_features(x, w, kind, stabilizer=stabilizer, backend=backend, **options)
            assert y.dtype == dtype and y.isfinite().all() and y.abs().max() > 0
            for g in torch.autograd.grad(y, (x, w), torch.ones_like(y)):
                assert g.isfinite().all()


@every_kind
def test_10_one_of_everything(device: torch.device, backend: str, kind: str) -> None:
    arguments = inputs(kind, device, L=1, D=1, M=1)
    y = random_features(**arguments, backend=backend)
    assert_within(y, reference.random_features(**arguments), FORMULA)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=lambda d: str(d)[6:])
@every_kind
def test_16_bit_gradients_do_not_see_the_rounded_features(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """Sums over many rows would: omega's gradient is as accurate as float32 inside makes it."""
    arguments = inputs(kind, device, dtype, L=200)
    arguments["omega"] = arguments["omega"].to(dtype).to(arguments["omega"].dtype)  # a rounding that is meant
    found = []
    for change in (Tensor.clone, Tensor.float, Tensor.double):
        leaves = {n: change(arguments[n]).requires_grad_() for n in ("x", "omega")}
        y = random_features(**arguments | leaves, eps=0.0 if kind == "trigonometric" else 1e-3)
        dy = draw(*y.shape, seed=2, device=device).to(dtype).to(y.dtype)
        found.append(torch.autograd.grad(y, leaves["omega"], dy)[0])
    assert_accurate(*found, name="domega")


def test_exponential_everywhere(device: torch.device, backend: str) -> None:
    """Denormals, overflow, infinities and NaN, as torch.exp has them."""
    ends = torch.tensor([-math.inf, -200, -104, -103.9, -88, -87.3, -0.0, 88.7, 88.73, 89, 1e9, math.inf, math.nan])
    x = torch.cat((ends, torch.linspace(-80, 80, 1001)))[None, None, :, None].to(device)
    y = random_features(x, None, "exp", backend=backend)
    assert_within(y[y < 1e-30], x.exp()[y < 1e-30], torch.finfo(torch.float32).eps)
    relative = (y / x.double().exp()).float()  # where both are infinite or 0, NaN
    assert_accurate(relative, (x.exp() / x.double().exp()).float(), x.double().exp() / x.double().exp())
    assert_bitwise(y.isinf() | y.isnan(), x.exp().isinf() | x.isnan())


def test_cosines_of_large_arguments(device: torch.device, backend: str) -> None:
    x = torch.linspace(-2000, 2000, 4001, device=device)[None, None, :, None]
    omega = torch.ones(1, 1, device=device)
    options: dict[str, Any] = dict(kind="trigonometric", scale=1.0, stabilizer="row")
    same, exact = (reference.random_features(t, omega, **options) for t in (x, x.double()))
    assert_accurate(random_features(x, omega, **options, backend=backend), same, exact)


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradient_of_a(device: torch.device, backend: str) -> None:
    arguments = inputs("oprf", device)
    for eps in (0.0, 0.5):
        a = torch.tensor(-0.2, dtype=torch.float64, device=device, requires_grad=True)
        f = lambda a, eps=eps: random_features(**arguments | dict(a=a), eps=eps, backend=backend)
        assert gradcheck(f, a, fast_mode=backend == "triton")


@pytest.mark.parametrize("kind", ("positive", "hyperbolic", "oprf", "relu"))
def test_upstream_of_any_strides(device: torch.device, backend: str, kind: str) -> None:
    arguments = inputs(kind, device)
    x = arguments["x"].requires_grad_()
    y = random_features(**arguments, backend=backend)
    for dy in (draw(*y.shape[::-1], device=device).permute(3, 2, 1, 0), draw(1, 1, 1, 1, device=device).expand_as(y)):
        strided, plain = (torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in (dy, dy.contiguous()))
        assert_within(strided, plain, FORMULA)


def test_deterministic_for_any_number_of_threads() -> None:
    if problem("native", "cpu"):
        pytest.skip(problem("native", "cpu"))
    x, omega = draw(2, 3, 300, 16, dtype=torch.float32), draw(24, 16, dtype=torch.float32)
    results: list[list[Tensor]] = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            leaves = [t.detach().requires_grad_() for t in (x, omega)]
            y = random_features(*leaves, stabilizer="global", backend="native")
            results.append([y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert_bitwise(a, b)


def test_no_second_derivative(device: torch.device, backend: str) -> None:
    arguments = inputs("positive", device)
    x = arguments["x"].requires_grad_()
    y = random_features(**arguments, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    message = (
        "random_features: x, omega and a must not require grad for a second derivative, got a gradient that depends"
    )
    with pytest.raises(RuntimeError, match=re.escape(message)):
        torch.autograd.grad(dx.square().sum(), x)


@every_kind
def test_opcheck_backward(device: torch.device, backend: str, kind: str) -> None:
    arguments = inputs(kind, device, torch.float32)
    y = random_features(**arguments, backend=backend)
    a = torch.tensor(-0.2, device=device) if kind == "oprf" else None
    for features in (y, None):
        args = (torch.randn_like(y), features, arguments["x"], arguments["omega"], kind, None, 0.0, a, None)
        op = torch.ops.fastrpe.random_features_bwd.default
        torch.library.opcheck(op, (*args, True, a is not None, backend))


def test_forward_mode_raises(device: torch.device) -> None:
    arguments = inputs("oprf", device) | dict(a=torch.tensor(-0.2, dtype=torch.float64, device=device))
    for name in ("x", "omega", "a"):
        x = arguments[name]
        message = f"random_features: {name} must have no forward-mode tangent, got one; use reverse mode"
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(lambda t, name=name: random_features(**arguments | {name: t}), (x,), (x,))
    with pytest.raises(NotImplementedError, match="fwht: x must have no forward-mode tangent"):
        torch.func.jvp(fwht, (draw(8, device=device),), (draw(8, device=device),))


# Walsh-Hadamard transform --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", (1, 2, 8, 64, 256))
def test_fwht(device: torch.device, backend: str, D: int) -> None:
    H = torch.from_numpy(scipy.linalg.hadamard(D)).double().to(device)
    x = draw(3, 5, D, device=device)
    assert_within(fwht(x, scale=0.5, backend=backend), 0.5 * x @ H, FORMULA)
    for y in (x[::2], x.mT.contiguous().mT, x[:1].expand_as(x), x[0, 0], x[:, :0]):
        assert_bitwise(fwht(y, backend=backend), fwht(y.contiguous(), backend=backend))
    back = fwht(fwht(x, scale=D**-0.5, backend=backend), scale=D**-0.5, backend=backend)
    assert_within(back, x, FORMULA)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=lambda d: str(d)[6:])
def test_fwht_is_rounded_once(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("interpreted Triton kernels truncate to bfloat16")
    x = draw(7, 64, device=device).to(dtype)
    same, exact = (reference.fwht(t, 0.125) for t in (x, x.double()))
    y = fwht(x, scale=0.125, backend=backend)
    assert y.is_contiguous()
    assert_accurate(y, same, exact)


def test_fwht_derivatives(device: torch.device, backend: str) -> None:
    x = draw(3, 8, device=device).requires_grad_()
    f = lambda x: fwht(x, scale=0.5, backend=backend)
    assert gradcheck(f, x) and gradgradcheck(f, x)
    u, v = draw(3, 8, device=device), draw(3, 8, seed=1, device=device)
    assert_within((f(u) * v).sum(), (u * f(v)).sum(), ADJOINT)
    torch.library.opcheck(torch.ops.fastrpe.fwht.default, (x, 0.5, backend))


def test_fwht_under_vmap_and_compile(device: torch.device, backend: str) -> None:
    f = lambda x: fwht(x, scale=0.5, backend=backend)
    x = draw(4, 3, 8, device=device)
    for axis in (0, 1):
        assert_bitwise(torch.vmap(f, axis, axis)(x).contiguous(), f(x))
    assert_bitwise(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


# Errors --------------------------------------------------------------------------------------------------------------

X, W = torch.zeros(2, 3, 5, 4), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=[1.0]), TypeError, "x must be a Tensor, got list"),
        (dict(x=X[0]), ValueError, "x must have shape (B, H, L, D), got (3, 5, 4)"),
        (dict(x=X[..., :0]), ValueError, "x must have D > 0, got (2, 3, 5, 0)"),
        (dict(x=X.long()), ValueError, "x must have dtype float16, bfloat16, float32, float64, got int64"),
        (dict(omega=None), ValueError, "omega must be given for kind 'positive', got None"),
        (dict(omega=W[:, :3]), ValueError, "omega must have shape (M, D) or (H, M, D) with H=3, D=4, got (6, 3)"),
        (dict(omega=W[None]), ValueError, "omega must have shape (M, D) or (H, M, D) with H=3, D=4, got (1, 6, 4)"),
        (dict(omega=W[:0]), ValueError, "omega must have at least one row, got (0, 4)"),
        (dict(omega=W.long()), ValueError, "omega must have dtype float16, bfloat16, float32, float64, got int64"),
        (dict(omega=W.to("meta")), ValueError, "omega must be on the device of x, cpu, got meta"),
        (
            dict(kind="cosine"),
            ValueError,
            "kind must be one of 'positive', 'hyperbolic', 'trigonometric', 'oprf', 'relu', 'exp', 'elu', got 'cosine'",
        ),
        (dict(stabilizer="max"), ValueError, "stabilizer must be one of None, 'row', 'global', got 'max'"),
        (dict(kind="relu", stabilizer="row"), ValueError, "stabilizer must be None for kind 'relu', got 'row'"),
        (dict(scale="big"), TypeError, "scale must be a float or int, got str"),
        (dict(eps="big"), TypeError, "eps must be a float or int, got str"),
        (dict(eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
        (dict(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
        (dict(kind="trigonometric", eps=0.1), ValueError, "eps must be 0 for kind 'trigonometric', got 0.1"),
        (dict(a=-0.1), ValueError, "a must be None for kind 'positive', got -0.1"),
        (dict(kind="oprf"), ValueError, "a must be given for kind 'oprf', got None"),
        (dict(kind="oprf", a="auto"), TypeError, "a must be a Tensor or float or int, got str"),
        (dict(kind="oprf", a=0.125), ValueError, "a must be less than 1/8, got 0.125"),
        (dict(kind="oprf", a=W[0]), ValueError, "a must have shape (), got (4,)"),
        (
            dict(kind="oprf", a=torch.tensor(1)),
            ValueError,
            "a must have dtype float16, bfloat16, float32, float64, got int64",
        ),
        (
            dict(kind="oprf", a=torch.zeros((), device="meta")),
            ValueError,
            "a must be on the device of x, cpu, got meta",
        ),
        (dict(backend="fast"), ValueError, "backend must be one of 'reference', 'native', 'triton', got 'fast'"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        random_features(**dict(x=X, omega=W) | arguments)
    assert str(raised.value) == f"random_features: {message}"


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (1.0, {}, TypeError, "x must be a Tensor, got float"),
        (torch.zeros(3, 6), {}, ValueError, "x must have a last axis that is a power of two, got (3, 6)"),
        (torch.zeros(()), {}, ValueError, "x must have a last axis that is a power of two, got ()"),
        (torch.zeros(4).long(), {}, ValueError, "x must have dtype float16, bfloat16, float32, float64, got int64"),
        (torch.zeros(4), dict(scale=None), TypeError, "scale must be a float or int, got NoneType"),
    ],
)
def test_fwht_bad_arguments_raise(x: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        fwht(x, **options)
    assert str(raised.value) == f"fwht: {message}"


def test_a_backend_that_cannot_serve_raises() -> None:
    if not problem("triton", "cpu"):
        with pytest.raises(NotImplementedError) as raised:
            random_features(torch.zeros(1, 1, 1, 300), torch.zeros(2, 300), backend="triton")
        assert str(raised.value) == (
            "random_features: backend must be 'reference' where D > 256, got 'triton' for D=300"
        )
    if torch.cuda.is_available() and not problem("native", "cuda"):
        with pytest.raises(NotImplementedError) as raised:
            random_features(X.cuda(), W.cuda(), backend="native")
        assert str(raised.value) == (
            "random_features: backend must be 'reference' or 'triton' on cuda, got 'native', which is for a CPU"
        )


# GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_kind
def test_cuda_graph(kind: str) -> None:
    """A graph captures forward and backward, so neither waits for the device."""
    arguments = inputs(kind, "cuda", torch.float32, L=70, D=32, M=40)
    if kind == "oprf":
        arguments["a"] = torch.tensor(-0.2, device="cuda")
    leaves = {n: arguments[n].requires_grad_() for n in ("x", "omega")}
    stabilizer = "global" if kind in STABILIZED else None

    def step() -> list[Tensor]:
        y = random_features(**arguments, stabilizer=stabilizer)
        return [y, *torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))]

    expected = [t.detach().clone() for t in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    graph.replay()
    for result, value in zip(results, expected):
        assert_bitwise(result.detach(), value)


def test_exponents_are_logarithms() -> None:
    """What linear attention builds on: features are exp of these, times their constant."""
    for kind in EXPONENTIAL:
        arguments = inputs(kind)
        e = reference.exponents(**arguments)
        y = e.exp() * reference.constant(kind, 7, 6, arguments.get("a"))
        assert_within(y, reference.random_features(**arguments), FORMULA)
        assert math.isfinite(float(e.abs().max()))
