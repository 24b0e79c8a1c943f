"""Features of masked attention: their means and variances against closed forms, and what they are as a module."""

import copy
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrpe.attention import Performer
from fastrpe.feature_maps import MaskedFeatures, step
from fastrpe.ops import linear_attention, random_features
from fastrpe.testing import random_features_mse as closed
from fastrpe.testing.asserts import assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import CANCELLED_FACTOR, CLOSED_FORM, FORMULA, LINEAR_ATTENTION, SIGMAS

D, E, M, DRAWS = 8, 3, 6, 200_000
PI = (0.5, 0.2, 0.3)
FORMS: dict[str, dict[str, Any]] = {
    "tensor": dict(form="tensor"),
    "rademacher": dict(form="rademacher"),
    "coordinate": dict(form="coordinate"),
    "coordinate-pi": dict(form="coordinate", pi=PI),
    "coordinate-iid": dict(form="coordinate", pi=PI, stratified=False),
}
every_form = pytest.mark.parametrize("name", FORMS)


def tokens(H: int = 2, L: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, size: int = D) -> Tensor:
    return torch.randn(2, H, L, size, dtype=dtype, generator=torch.Generator().manual_seed(seed)) / 2


def inputs(H: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v_q and v_k: H query heads on 2 key heads."""
    q, k = tokens(H, dtype=dtype), tokens(2, 7, seed=1, dtype=dtype)
    return q, k, tokens(H, seed=2, dtype=dtype, size=E), tokens(2, 7, seed=3, dtype=dtype, size=E)


def build(name: str, **options: Any) -> MaskedFeatures:
    return MaskedFeatures(D, E, M, **{"seed": 0} | FORMS[name] | options).double()


# Estimates: one query, one key, and heads that have draws of their own -----------------------------------------------

DRAW = torch.Generator().manual_seed(4)
X, Y = (0.55 * x / x.norm() for x in torch.randn(2, D, dtype=torch.float64, generator=DRAW))
MASKS = torch.tensor(((0.9, 0.4, 0.7, -0.5), (0.8, 0.6, 0.3, 0.4)), dtype=torch.float64)


def estimates(name: str, projection: str, masks: Tensor, pi: tuple[float, ...] | None) -> Tensor:
    """phi_q.phi_k for each draw."""
    options = FORMS[name] | dict(projection=projection, scale=1.0, num_heads=DRAWS)
    if pi is not None:
        options["pi"] = pi
    draw = torch.Generator().manual_seed(5)
    f = MaskedFeatures(D, masks.shape[-1], M, generator=draw, **options).double()
    x, y, u, v = (t.expand(1, DRAWS, 1, -1) for t in (X, Y, *masks))
    phi_q, phi_k = f(x, y, u, v, stabilized=False)
    return (phi_q * phi_k).sum((0, 2, 3))


@pytest.mark.parametrize("size", (3, 4))  # 3 divides M, and uniform strata leave the coordinates no chance; 4 does not
@pytest.mark.parametrize("projection", ("gaussian", "orthogonal", "simplex"))
@every_form
def test_1_unbiased_and_of_the_closed_variance(name: str, projection: str, size: int) -> None:
    pi = (0.4, 0.2, 0.3, 0.1)[:size] if "pi" in FORMS[name] else None
    pi = pi and tuple(p / sum(pi) for p in pi)
    masks = MASKS[:, :size]
    found = estimates(name, projection, masks, pi)
    u, v = masks.relu()
    error = found.std() / DRAWS**0.5
    assert abs(found.mean() - closed.kernel(X, Y) * (u @ v)) <= SIGMAS * error
    if projection == "gaussian":
        options: dict[str, Any] = dict(pi=None if pi is None else torch.tensor(pi, dtype=torch.float64))
        options["stratified"] = FORMS[name].get("stratified", True)
        form = FORMS[name]["form"]
        assert_within(found.var(), closed.masked_variance(form, X, Y, u, v, M, **options), CLOSED_FORM)


def test_sketch_of_one_coordinate_is_the_tensor_form() -> None:
    """With E = 1 all forms are the same features, but for the signs of the Rademacher sketch, which cancel."""
    q, k, v_q, v_k = inputs()
    one, *others = (
        MaskedFeatures(D, 1, M, form=form, seed=0).double()(q, k, v_q[..., :1], v_k[..., :1])
        for form in ("tensor", "rademacher", "coordinate")
    )
    for other in others:
        assert_within(other[0] @ other[1].mT, one[0] @ one[1].mT, FORMULA)


def test_strata_draw_every_coordinate_its_share() -> None:
    f = MaskedFeatures(D, E, 10, form="coordinate", pi=PI, num_heads=50, seed=0)
    assert f.sketch is not None
    assert torch.equal((f.sketch > 0).sum(-2), torch.tensor((5, 2, 3)).expand(50, E))
    assert_within((f.sketch.mT @ f.sketch / 10).double(), torch.eye(E).expand(50, E, E), torch.finfo(torch.float32).eps)


# Values --------------------------------------------------------------------------------------------------------------


@every_form
def test_formula(name: str) -> None:
    f = build(name)
    q, _, v_q, _ = inputs()
    phi, u = random_features(q, f.omega, "positive"), v_q.relu()
    if f.sketch is None:
        expected = torch.stack([phi[..., r] * u[..., e] for r in range(M) for e in range(E)], -1)
    else:
        expected = torch.stack([phi[..., r] * (u * f.sketch[r]).sum(-1) for r in range(M)], -1)
    assert_within(f(q, q, v_q, v_q, stabilized=False)[0], expected, FORMULA)


@pytest.mark.parametrize("num_heads", (None, 2))
@pytest.mark.parametrize("causal", (False, True))
@every_form
def test_linear_attention(name: str, causal: bool, num_heads: int | None) -> None:
    """Linear attention of the features is the normalised estimate of the kernel, and stabilizers cancel."""
    f = build(name, num_heads=num_heads)
    q, k, v_q, v_k = inputs(4)
    k, v_k = (k[:, :, :5], v_k[:, :, :5]) if causal else (k, v_k)
    phi_q, phi_k = f(q, k, v_q, v_k, causal=causal)
    assert phi_q.shape == (2, 4, 5, M * E if name == "tensor" else M) and phi_k.shape[:3] == k.shape[:3]
    if name != "rademacher":
        assert (phi_q >= 0).all() and (phi_k >= 0).all()
    assert (phi_q.abs() <= 1).all()
    v = tokens(2, k.shape[2], seed=6)
    plain_q, plain_k = f(q, k, v_q, v_k, stabilized=False)
    weights = plain_q @ plain_k.repeat_interleave(2, 1).mT
    weights = weights.tril() if causal else weights
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total == 0, 0, weights / total)  # a query whose mask meets no key's
    expected = weights @ v.repeat_interleave(2, 1)
    y = linear_attention(phi_q, phi_k, v, kind="features", causal=causal)
    assert_within(y, expected, LINEAR_ATTENTION[torch.float64])


def test_masks_of_blocks() -> None:
    """One-hot masks, of any dtype, keep attention within their blocks: there the tensor form is FAVOR+."""
    f = build("tensor")
    q, v = tokens(), tokens(seed=1)
    block = torch.nn.functional.one_hot(torch.tensor((0, 0, 1, 1, 2)), E).bool().expand(2, 2, 5, E)
    y = linear_attention(*f(q, q, block, block), v, kind="features")
    for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
        assert f.omega is not None
        expected = linear_attention(*(x[:, :, part] for x in (q, q, v)), f.omega, "positive")
        assert_within(y[:, :, part], expected, CANCELLED_FACTOR)


@every_form
def test_causal_keys_know_no_later_ones(name: str) -> None:
    f = build(name)
    q, k, v_q, v_k = inputs()
    later, masks = k.clone(), v_k.clone()
    later[:, :, 3:] *= -10
    masks[:, :, 3:] += 5
    assert_within(f(q, k, v_q, v_k, causal=True)[1][:, :, :3], f(q, later, v_q, masks, causal=True)[1][:, :, :3], 0.0)


def test_docstring_runs() -> None:
    doc = inspect.getdoc(MaskedFeatures) or ""
    example = re.search(r"::\n\n((?:    .*\n)+)\nThe tensor form", doc)
    assert example is not None
    scope: dict[str, Any] = dict(torch=torch, MaskedFeatures=MaskedFeatures, linear_attention=linear_attention)
    exec(textwrap.dedent(example[1]), scope)
    assert scope["y"].shape == scope["v"].shape and scope["y"].isfinite().all()


# Draws and PyTorch's machinery ---------------------------------------------------------------------------------------


@every_form
def test_seeds_and_redraws(name: str) -> None:
    def make(**options: Any) -> MaskedFeatures:
        return MaskedFeatures(D, E, M, **FORMS[name], **options)

    one, same, other = (make(seed=seed) for seed in (0, 0, 1))
    assert_bitwise(same.omega, one.omega)
    if name == "tensor":
        assert one.sketch is None
    else:
        assert_bitwise(same.sketch, one.sketch)
    first = copy.deepcopy(one)
    args = inputs(dtype=torch.float32)
    one.redraw()
    assert one.draws == 2
    for a, b in zip(one(*args), other(*args)):  # draw n has the seed seed + n
        assert_bitwise(a, b)
    assert not torch.equal(one.omega, first.omega)
    one.redraw(torch.Generator().manual_seed(5))
    for a, b in zip(one(*args), make(generator=torch.Generator().manual_seed(5))(*args)):
        assert_bitwise(a, b)
    one.reset_parameters()
    for a, b in zip(one(*args), first(*args)):
        assert_bitwise(a, b)
    stepped = make(seed=0, redraw_every=1)
    step(stepped)
    assert_bitwise(stepped.omega, other.omega)


@every_form
def test_state_dict(name: str) -> None:
    f = build(name)
    f.redraw()
    other = build(name, seed=7)
    other.load_state_dict(f.state_dict())
    assert other.draws == 2
    for one, same in zip(f(*inputs()), other(*inputs())):
        assert_bitwise(one, same)


@pytest.mark.parametrize("name", ("tensor", "coordinate"))
def test_from_meta(name: str) -> None:
    with torch.device("meta"):
        f = MaskedFeatures(D, E, M, seed=0, **FORMS[name])
    assert all(x.is_meta for x in f.buffers())
    f.to_empty(device="cpu").reset_parameters()
    for key, value in MaskedFeatures(D, E, M, seed=0, **FORMS[name]).state_dict().items():
        assert_bitwise(f.state_dict()[key], value)


@every_form
def test_gradients(name: str) -> None:
    f = build(name)
    args = tuple(x.requires_grad_() for x in inputs())
    torch.autograd.gradcheck(lambda *a: f(*a, stabilized=False), args)
    linear_attention(*f(*args), tokens(2, 7, seed=6), kind="features").square().sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in args)


@every_form
def test_compile(name: str) -> None:
    f = build(name)
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for one, same in zip(f(*inputs()), compiled(*inputs())):
        assert_bitwise(one, same)


@every_form
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_half(name: str, dtype: torch.dtype) -> None:
    f = MaskedFeatures(D, E, M, seed=0, **FORMS[name])
    args = inputs(dtype=dtype)
    wide = copy.deepcopy(f).double()
    same, exact = f(*args), wide(*(x.double() for x in args))
    f.to(dtype)
    assert all(x.dtype == torch.float32 for x in f.buffers())
    for one, s, e in zip(f(*args), same, exact):
        assert one.dtype == dtype
        assert_accurate(one, s, e)
    q, k, v_q, v_k = args
    large = 30 / q.norm(dim=-1, keepdim=True) * q, 30 / k.norm(dim=-1, keepdim=True) * k, 1e4 * v_q, 1e4 * v_k
    for phi in f(*large):
        assert phi.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(phi.isfinite().all() for phi in f(*inputs(dtype=torch.float32)))


def test_small_and_empty() -> None:
    x = torch.ones(1, 1, 1, 1)
    for form in ("tensor", "rademacher", "coordinate"):
        f = MaskedFeatures(1, 1, 1, form=form, seed=0)
        assert_within(linear_attention(*f(x, x, x, x), x, kind="features"), x, 0.0)
        none = f(x[:, :, :0], x[:, :, :0], x[:, :, :0], x[:, :, :0])
        assert none[0].shape == none[1].shape == (1, 1, 0, 1)


def test_repr() -> None:
    assert repr(MaskedFeatures(D, E, M, form="rademacher", seed=3)) == (
        "MaskedFeatures(8, 6, projection='orthogonal', seed=3, mask_dim=3, form='rademacher')"
    )


# Errors --------------------------------------------------------------------------------------------------------------


def call(*shapes: tuple[int, ...], **options: Any) -> Any:
    """Features of zeros of these shapes, for q, k, v_q and v_k."""
    return MaskedFeatures(D, E, M, **options)(*(torch.zeros(s) for s in shapes))


Q, U = (2, 2, 5, D), (2, 2, 5, E)


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        (lambda: MaskedFeatures(D, 0), "mask_dim must be a positive integer, got 0"),
        (lambda: MaskedFeatures(0, E), "head_dim must be a positive integer, got 0"),
        (lambda: MaskedFeatures(D, E, None), "num_features must be a positive integer, got None"),
        (
            lambda: MaskedFeatures(D, E, form="count"),
            "form must be one of 'tensor', 'rademacher', 'coordinate', got 'count'",
        ),
        (lambda: MaskedFeatures(D, E, pi=PI), "pi must be None for form 'tensor', got (0.5, 0.2, 0.3)"),
        (
            lambda: MaskedFeatures(D, 2, form="coordinate", pi=PI),
            "pi must have shape (E,) with E=2, got (3,)",
        ),
        (
            lambda: MaskedFeatures(D, 2, form="coordinate", pi=[1.0, 0.0]),
            "pi must hold positive numbers, got [1.0, 0.0]",
        ),
        (lambda: call((2, 2, 5, 4), Q, U, U), "q must have shape (B, H, L, D) with D=8, got (2, 2, 5, 4)"),
        (
            lambda: call(Q, Q, (2, 2, 4, E), U),
            "v_q must have shape (B, H, L, E) with B=2, H=2, L=5, E=3, got (2, 2, 4, 3)",
        ),
        (
            lambda: call(Q, Q, U, (2, 1, 5, E)),
            "v_k must have shape (B, Hk, S, E) with B=2, Hk=2, S=5, E=3, got (2, 1, 5, 3)",
        ),
        (lambda: call(Q, Q, U, U, num_heads=1), "k must have num_heads=1 heads, got 2"),
        (
            lambda: MaskedFeatures(D, E, M)(*(torch.zeros(s) for s in (Q, Q, U)), torch.zeros(U, device="meta")),
            "v_k must be on the device of q, cpu, got meta",
        ),
    ),
)
def test_bad_arguments_raise(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        wrong()
    assert str(raised.value) == f"MaskedFeatures: {message}"


@pytest.mark.parametrize(
    ("wrong", "message"),
    (
        (
            lambda: MaskedFeatures(D, E, form="coordinate", pi=0.5),
            "pi must be a Tensor or list or tuple, got float",
        ),
        (lambda: MaskedFeatures(D, E, stratified=1), "stratified must be a bool, got int"),
        (
            lambda: MaskedFeatures(D, E, M)(torch.zeros(Q), torch.zeros(Q), None, torch.zeros(U)),
            "v_q must be a Tensor, got NoneType",
        ),
    ),
)
def test_wrong_types_raise(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError) as raised:
        wrong()
    assert str(raised.value) == f"MaskedFeatures: {message}"


def test_performers_cannot_take_it() -> None:
    """Which has no masks to give: better an error than attention without them."""
    with pytest.raises(TypeError, match="v_q"):
        Performer(MaskedFeatures(D, E, M))(tokens(), tokens(), tokens())
