"""Feature maps as modules: what they give, their draws, and PyTorch's machinery around them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrpe.feature_maps import (
    SADERF,
    EluFeatures,
    ExpFeatures,
    FeatureMap,
    HybridFeatures,
    HyperbolicFeatures,
    LearnableFeatures,
    OPRFFeatures,
    PositiveFeatures,
    ReLUFeatures,
    TrigonometricFeatures,
    optimal_a,
    step,
)
from fastrpe.ops import random_features
from fastrpe.testing import random_features_mse as closed
from fastrpe.testing.asserts import assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import CANCELLED_FACTOR, FORMULA, SIGMAS

D, M = 8, 12

Make = Callable[..., FeatureMap]
SOFTMAX: dict[str, Make] = {
    "positive": PositiveFeatures,
    "hyperbolic": HyperbolicFeatures,
    "trigonometric": TrigonometricFeatures,
    "oprf": OPRFFeatures,
    "oprf-fixed": lambda *a, **o: OPRFFeatures(*a, a=-0.1, **o),
    "saderf": SADERF,
    "hybrid": lambda *a, **o: HybridFeatures(*a, num_angles=3, **o),
    "hybrid-positive": lambda *a, **o: HybridFeatures(*a, num_angles=3, positive="positive", **o),
}
OTHERS: dict[str, Make] = {
    "relu": ReLUFeatures,
    "exp": ExpFeatures,
    "elu": EluFeatures,
    **{
        f"learned-{form}-{base}": lambda *a, form=form, base=base, **o: LearnableFeatures(*a, form=form, base=base, **o)
        for form in ("projection", "polynomial", "mlp")
        for base in ("relu", "exp")
    },
}
MAPS = SOFTMAX | OTHERS
every_map = pytest.mark.parametrize("name", MAPS)
NOT_CAUSAL = ("oprf", "saderf")


def tokens(H: int = 2, L: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64, B: int = 2) -> Tensor:
    return torch.randn(B, H, L, D, dtype=dtype, generator=torch.Generator().manual_seed(seed)) / 2


def build(name: str, **options: Any) -> FeatureMap:
    return MAPS[name](D, M, seed=0, **options).double()


def attention(phi_q: Tensor, phi_k: Tensor) -> Tensor:
    weights = phi_q @ phi_k.mT
    return weights / weights.sum(-1, keepdim=True)


# Values --------------------------------------------------------------------------------------------------------------


@every_map
def test_features_of_queries_and_keys(name: str) -> None:
    f = build(name)
    q, k = tokens(4), tokens(2, 7, seed=1)
    phi_q, phi_k = f(q, k)
    F = phi_q.shape[-1]
    assert phi_q.shape == (2, 4, 5, F) and phi_k.shape == (2, 2, 7, F)
    assert phi_q.dtype == phi_k.dtype == q.dtype
    if not name.startswith(("trigonometric", "hybrid")):
        assert (phi_q >= 0).all() and (phi_k >= 0).all()


@pytest.mark.parametrize("name", [n for n in MAPS if MAPS[n](D, M).kind is not None])
def test_kernels_may_compute_them(name: str) -> None:
    """`prepare`, kind and omega say all that the features depend on, up to what attention cancels."""
    f = build(name)
    q, k, a = f.prepare(tokens(), tokens(seed=1))
    options: dict[str, Any] = dict(kind=f.kind, scale=f.scale, eps=f.eps, a=a)
    plain = attention(*(random_features(x, f.omega, **options) for x in (q, k)))
    assert_within(attention(*f(tokens(), tokens(seed=1))), plain, CANCELLED_FACTOR)


@pytest.mark.parametrize("name", SOFTMAX)
def test_unbiased(name: str) -> None:
    """With many heads that have projections of their own, the mean over heads is exp(q.k / sqrt(D)) at any scale."""
    heads, n = 20_000, 3
    f = SOFTMAX[name](D, 4, num_heads=heads, generator=torch.Generator().manual_seed(1)).double()
    if isinstance(f, HybridFeatures):  # which draws its angles once
        pytest.skip("one draw of angles: test_hybrid_is_the_mixture and test_1_9_hybrid")
    q, k = (x.expand(1, heads, n, D) for x in (tokens(1, n, B=1), tokens(1, n, seed=1, B=1)))
    x, y, a = f.prepare(q, k)
    phi_q, phi_k = (random_features(t, f.omega, f.kind, scale=f.scale, a=a) for t in (x, y))
    found = (phi_q * phi_k).sum(-1)[0]  # (heads, n)
    exact = closed.kernel(q[0] * D**-0.25, k[0] * D**-0.25)[0]
    error = found.std(0) / heads**0.5
    assert ((found.mean(0) - exact).abs() <= SIGMAS * error).all()


@pytest.mark.parametrize("name", ("positive", "oprf-fixed", "relu", "learned-projection-exp"))
def test_heads_of_their_own(name: str) -> None:
    """A key head's projection serves its group of query heads."""
    f = build(name, num_heads=2)
    assert f.omega is not None and f.omega.shape == (2, M, D)
    q, k = tokens(4), tokens(2, seed=1)
    phi_q, phi_k = f(q, k)
    one = build(name)
    for h in range(2):
        with torch.no_grad():
            one.omega.copy_(f.omega[h])
        expected = one(q[:, 2 * h : 2 * h + 2], k[:, h : h + 1])
        assert_within(phi_q[:, 2 * h : 2 * h + 2], expected[0], FORMULA)
        assert_within(phi_k[:, h : h + 1], expected[1], FORMULA)


@pytest.mark.parametrize("name", [n for n in MAPS if n not in NOT_CAUSAL])
def test_causal_keys_know_no_later_ones(name: str) -> None:
    f = build(name)
    q, k = tokens(), tokens(seed=1)
    later = k.clone()
    later[:, :, 3:] *= -10
    for one, other in zip(f(q, k, causal=True), f(q, later, causal=True)):
        assert_within(one[:, :, :3], other[:, :, :3], 0.0)


def test_preconditioning_keeps_the_kernel() -> None:
    """Rademacher features of spread vectors are less biased; of Gaussian rows nothing changes in distribution."""
    z = torch.zeros(1, 1, 1, 16, dtype=torch.float64)
    z[..., 0] = 2.0
    heads = 4000
    options: dict[str, Any] = dict(projection="rademacher", num_heads=heads)
    bias = []
    for preconditioned in (False, True):
        draw = torch.Generator().manual_seed(0)
        f = PositiveFeatures(16, 16, preconditioned=preconditioned, generator=draw, **options).double()
        x = z.expand(1, heads, 1, 16)
        phi = random_features(x, f.omega, f.kind)
        bias.append((phi * phi).sum(-1).mean() - closed.kernel(z / 2, z / 2).squeeze())
    assert abs(bias[1]) < abs(bias[0])


# OPRF ----------------------------------------------------------------------------------------------------------------


def test_8_oprf_finds_a() -> None:
    f = OPRFFeatures(D, M, seed=0)
    q, k = tokens(4, 5), tokens(2, 7, seed=1)
    _, _, a = f.prepare(q, k)
    pairs = [q[b, h, i] + k[b, h // 2, j] for b in range(2) for h in range(4) for i in range(5) for j in range(7)]
    phi = torch.stack(pairs).square().sum(-1).mean() * D**-0.5
    assert_within(a, optimal_a(phi, D), FORMULA)
    assert not a.requires_grad
    assert OPRFFeatures(D, M, a=0.1).prepare(q, k)[2] == 0.1


def test_saderf_keeps_products_and_balances() -> None:
    spread = torch.logspace(-1, 1, D, dtype=torch.float64)
    q, k = tokens(4) * spread, tokens(2, seed=1) / spread
    k[..., 3] = 0
    x, y, a = SADERF(D, M).prepare(q, k)
    grouped = k.repeat_interleave(2, 1)
    assert_within(x @ y.repeat_interleave(2, 1).mT, q @ grouped.mT, FORMULA)
    sizes = [t.square().mean(2).unflatten(1, (2, -1)).mean(2) for t in (x, y)]
    kept = torch.arange(D) != 3
    assert_within(sizes[0][..., kept], sizes[1][..., kept], FORMULA)
    assert_within(x[..., 3], q[..., 3], 0.0)
    assert a > OPRFFeatures(D, M).prepare(q, k)[2]  # nearer to 0: a smaller |x + y|


# Hybrid --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positive", ("hyperbolic", "positive"))
def test_hybrid_is_the_mixture(positive: str) -> None:
    """One map gives lambda K_+ + (1 - lambda) K_t, lambda the share of T's rows that tell x from y."""
    f = HybridFeatures(D, M, num_angles=5, positive=positive, seed=0).double()
    q, k = tokens(), tokens(seed=1)
    x, y = (t / D**0.25 for t in (q, k))
    share = (1 - (x @ f.angles.mT).sign() @ (y @ f.angles.mT).sign().mT / 5) / 2
    one, other = (
        random_features(q, f.omega, kind) @ random_features(k, f.omega, kind).mT for kind in (positive, "trigonometric")
    )
    expected = share * one + (1 - share) * other
    phi_q, phi_k = f(q, k, causal=True)
    size = x.square().sum(-1, keepdim=True) / 2
    assert_within(phi_q @ phi_k.mT, expected * (-size).exp(), CANCELLED_FACTOR)
    assert_within(attention(*f(q, k)), expected / expected.sum(-1, keepdim=True), CANCELLED_FACTOR)


# Learned -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("projection", "polynomial", "mlp"))
@pytest.mark.parametrize(("base", "performer"), (("relu", ReLUFeatures), ("exp", ExpFeatures)))
def test_learned_starts_as_a_performer(form: str, base: str, performer: Make) -> None:
    q, k = tokens(), tokens(seed=1)
    for size in (None, D, M):
        f = LearnableFeatures(D, size, form=form, base=base, seed=0).double()
        like = performer(D, M if size == M else None, seed=0).double()
        assert_within(attention(*f(q, k)), attention(*like(q, k)), CANCELLED_FACTOR)


@pytest.mark.parametrize("form", ("projection", "polynomial", "mlp"))
@pytest.mark.parametrize("base", ("relu", "exp"))
def test_learned_learns_every_parameter(form: str, base: str) -> None:
    """From the second step on each parameter has a gradient; features stay positive."""
    f = LearnableFeatures(D, M, form=form, base=base, seed=0).double()
    target = torch.rand(2, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    optimiser = torch.optim.Adam(f.parameters(), 1e-3)
    losses = []
    for _ in range(5):
        loss = (attention(*f(tokens(), tokens(seed=1))) - target).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.any() for p in f.parameters())
    if form == "polynomial":  # as an update may make them
        with torch.no_grad():
            f.coefficients[:, 2] = -1
    phi = f(tokens(), tokens(seed=1))[0]
    assert (phi >= 0).all()
    phi.sum().backward()
    if form == "polynomial":
        assert f.coefficients.grad[:, 2].any()


def test_learned_resets() -> None:
    for form in ("projection", "polynomial", "mlp"):
        f = LearnableFeatures(D, form=form, base="relu", seed=0)
        with torch.no_grad():
            for p in f.parameters():
                p.add_(1)
        f.reset_parameters()
        like = ReLUFeatures(D)
        q = tokens(dtype=torch.float32)
        assert_bitwise(f(q, q)[0].detach(), like(q, q)[0])


# Draws ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOFTMAX)
def test_seeds_and_generators(name: str) -> None:
    one, same, other = (SOFTMAX[name](D, M, seed=seed) for seed in (0, 0, 1))
    for key, value in one.state_dict().items():
        if isinstance(value, Tensor):
            assert_bitwise(same.state_dict()[key], value)
    assert not torch.equal(one.omega, other.omega)
    draws = [one.omega.clone()]
    for _ in range(2):
        one.redraw()
        draws.append(one.omega.clone())
    assert one.draws == 3
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[1], draws[2])
    assert_bitwise(SOFTMAX[name](D, M, seed=2).omega, draws[2])  # draw n has the seed seed + n
    one.redraw(torch.Generator().manual_seed(5))
    assert_bitwise(one.omega, SOFTMAX[name](D, M, generator=torch.Generator().manual_seed(5)).omega)
    one.reset_parameters()
    assert_bitwise(one.omega, draws[0])


def test_global_generator() -> None:
    torch.manual_seed(0)
    one = PositiveFeatures(D, M)
    torch.manual_seed(0)
    assert_bitwise(PositiveFeatures(D, M).omega, one.omega)


def test_redraws_by_steps_in_training_alone() -> None:
    f = PositiveFeatures(D, M, redraw_every=3, seed=0)
    model = nn.Sequential(nn.Linear(2, 2), f)
    first = f.omega.clone()
    q = tokens(dtype=torch.float32)
    for _ in range(2):
        f(q, q)
        step(model)
    assert_bitwise(f.omega, first)
    f(q, q)
    step(model)
    assert f.draws == 2 and not torch.equal(f.omega, first)
    f.eval()
    second = f.omega.clone()
    for _ in range(6):
        f(q, q)
        step(model)
    assert_bitwise(f.omega, second)
    never = PositiveFeatures(D, M, seed=0)
    for _ in range(3):
        never.step()
    assert never.draws == 1


# PyTorch's machinery -------------------------------------------------------------------------------------------------


@every_map
def test_state_dict_and_copies(name: str) -> None:
    f = build(name)
    f.step()
    f.redraw()
    q, k = tokens(), tokens(seed=1)
    other = MAPS[name](D, M, seed=7).double()
    other.load_state_dict(f.state_dict())
    assert (other.draws, other.steps) == (2, 1)
    for g in (other, copy.deepcopy(f)):
        for one, same in zip(f(q, k), g(q, k)):
            assert_bitwise(one.detach(), same.detach())


@every_map
def test_gradients_reach_queries_and_keys(name: str) -> None:
    f = build(name)
    q, k = tokens().requires_grad_(), tokens(seed=1).requires_grad_()
    attention(*f(q, k)).square().sum().backward()
    for x in (q, k, *f.parameters()):
        assert x.grad is not None and x.grad.isfinite().all()
    assert q.grad.any() and k.grad.any()


@every_map
def test_compile(name: str) -> None:
    f = build(name)
    torch.compiler.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for causal in (True, False) if name not in NOT_CAUSAL else (False,):
        for one, same in zip(
            f(tokens(), tokens(seed=1), causal=causal), compiled(tokens(), tokens(seed=1), causal=causal)
        ):
            assert_bitwise(one.detach(), same.detach())


@pytest.mark.parametrize("name", ("positive", "saderf", "hybrid", "learned-mlp-relu"))
def test_export(name: str) -> None:
    f = build(name)
    args = tokens(), tokens(seed=1)
    program = torch.export.export(f, args)
    for one, same in zip(f(*args), program.module()(*args)):
        assert_bitwise(one.detach(), same.detach())


@every_map
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
def test_half_leaves_the_projection_wide(name: str, dtype: torch.dtype) -> None:
    f = MAPS[name](D, M, seed=0)
    q, k = tokens(dtype=dtype), tokens(seed=1, dtype=dtype)
    wide = copy.deepcopy(f).double()
    same, exact = f(q, k), wide(q.double(), k.double())
    f.to(dtype)
    assert all(x.dtype == torch.float32 for x in (*f.parameters(), *f.buffers()))
    for one, s, e in zip(f(q, k), same, exact):
        assert one.dtype == dtype
        assert_accurate(one, s, e)


@every_map
def test_autocast(name: str) -> None:
    f = MAPS[name](D, M, seed=0)
    q, k = tokens(dtype=torch.float32), tokens(seed=1, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        phi_q, phi_k = f(q, k)
    assert phi_q.isfinite().all() and phi_k.isfinite().all()
    assert phi_q.dtype == phi_k.dtype


@pytest.mark.parametrize("name", ("positive", "hybrid", "relu", "learned-projection-relu"))
def test_from_meta(name: str) -> None:
    with torch.device("meta"):
        f = MAPS[name](D, M, seed=0)
    assert all(x.is_meta for x in (*f.parameters(), *f.buffers()))
    f.to_empty(device="cpu")
    f.reset_parameters()
    like = MAPS[name](D, M, seed=0)
    for key, value in like.state_dict().items():
        assert_bitwise(f.state_dict()[key], value)


def test_default_number_of_features() -> None:
    assert PositiveFeatures(64).num_features == 266  # int(D log D)
    assert PositiveFeatures(1).num_features == 1
    assert ReLUFeatures(64).num_features is None and ReLUFeatures(64).omega is None
    assert EluFeatures(64).omega is None and ExpFeatures(64).omega is None


def test_repr() -> None:
    f = PositiveFeatures(D, M, num_heads=2, preconditioned=True, eps=1e-4, redraw_every=5, seed=3)
    assert repr(f) == (
        "PositiveFeatures(8, 12, projection='orthogonal', num_heads=2, seed=3, preconditioned=True, eps=0.0001, "
        "redraw_every=5)"
    )


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PositiveFeatures(0, 4), "PositiveFeatures: head_dim must be a positive integer, got 0"),
        (lambda: PositiveFeatures(8, 0), "PositiveFeatures: num_features must be a positive integer, got 0"),
        (lambda: PositiveFeatures(8, 4, num_heads=0), "PositiveFeatures: num_heads must be a positive integer, got 0"),
        (lambda: PositiveFeatures("8"), "PositiveFeatures: head_dim must be a positive integer, got '8'"),
        (lambda: PositiveFeatures(8, 1.5), "PositiveFeatures: num_features must be a positive integer, got 1.5"),
        (
            lambda: PositiveFeatures(8, None),
            "PositiveFeatures: num_features must be given for kind 'positive', got None",
        ),
        (lambda: HybridFeatures(8, None), "HybridFeatures: num_features must be a positive integer, got None"),
        (lambda: PositiveFeatures(8, 4, eps=-0.1), "PositiveFeatures: eps must be at least 0, got -0.1"),
        (lambda: TrigonometricFeatures(8, 4, eps=0.1), "TrigonometricFeatures: eps must be 0, got 0.1"),
        (
            lambda: PositiveFeatures(8, 4, projection="haar"),
            "PositiveFeatures: projection must be one of 'gaussian', 'orthogonal', 'simplex', 'rademacher', "
            "'orthogonal_rademacher', got 'haar'",
        ),
        (lambda: PositiveFeatures(8, 4, redraw_every=-1), "PositiveFeatures: redraw_every must be at least 0, got -1"),
        (lambda: OPRFFeatures(8, 4, a=0.2), "OPRFFeatures: a must be less than 1/8, got 0.2"),
        (lambda: HybridFeatures(8, 4, num_angles=0), "HybridFeatures: num_angles must be a positive integer, got 0"),
        (lambda: HybridFeatures(8, 4, eps=0.1), "HybridFeatures: eps must be 0, got 0.1"),
        (
            lambda: HybridFeatures(8, 4, positive="oprf"),
            "HybridFeatures: positive must be one of 'hyperbolic', 'positive', got 'oprf'",
        ),
        (
            lambda: LearnableFeatures(8, form="tanh"),
            "LearnableFeatures: form must be one of 'projection', 'polynomial', 'mlp', got 'tanh'",
        ),
        (
            lambda: LearnableFeatures(8, base="elu"),
            "LearnableFeatures: base must be one of 'relu', 'exp', got 'elu'",
        ),
        (lambda: LearnableFeatures(8, degree=0), "LearnableFeatures: degree must be a positive integer, got 0"),
        (lambda: LearnableFeatures(8, hidden=0), "LearnableFeatures: hidden must be a positive integer, got 0"),
        (
            lambda: LearnableFeatures(8, redraw_every=1),
            "LearnableFeatures: redraw_every must be 0: its projection is learned, got 1",
        ),
        (
            lambda: PositiveFeatures(8, 4)(tokens()[..., :4], tokens()),
            "PositiveFeatures: q must have shape (B, H, L, D) with D=8, got (2, 2, 5, 4)",
        ),
        (
            lambda: PositiveFeatures(8, 4)(tokens(), tokens()[:1]),
            "PositiveFeatures: k must have shape (B, Hk, S, D) with B=2, D=8, got (1, 2, 5, 8)",
        ),
        (
            lambda: PositiveFeatures(8, 4)(tokens(3), tokens(2)),
            "PositiveFeatures: k must have a number of heads that divides H=3, got 2",
        ),
        (
            lambda: PositiveFeatures(8, 4, num_heads=1)(tokens(), tokens()),
            "PositiveFeatures: k must have num_heads=1 heads, got 2",
        ),
        (
            lambda: OPRFFeatures(8, 4)(tokens(), tokens(), causal=True),
            "OPRFFeatures: causal must be False: its features depend on all keys, got True",
        ),
        (
            lambda: SADERF(8, 4, a=0.0)(tokens(), tokens(), causal=True),
            "SADERF: causal must be False: its features depend on all keys, got True",
        ),
    ],
)
def test_bad_arguments_raise(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("argument", "value", "types"),
    (
        ("scale", "1", "float or int"),
        ("eps", None, "float or int"),
        ("redraw_every", 0.5, "int"),
        ("seed", 1.5, "int"),
        ("generator", 3, "Generator"),
        ("a", "best", "float or int"),
    ),
)
def test_wrong_types_raise(argument: str, value: Any, types: str) -> None:
    with pytest.raises(TypeError) as raised:
        OPRFFeatures(8, 4, **{argument: value})
    assert str(raised.value) == f"OPRFFeatures: {argument} must be a {types}, got {type(value).__name__}"
