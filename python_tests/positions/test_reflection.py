"""Reflections: SPEC bars 2.8.2, 2.8.5, 2.8.6, 2.8.9 and 2.8.11, and both ways to apply a basis."""

import copy
import itertools
import math
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrpe.ops import rotate
from fastrpe.ops.reflection import reflection_basis
from fastrpe.ops.reflection.reference import LEAST_NORM, reflect
from fastrpe.ops.rotary.reflection import plane_signs
from fastrpe.positions import CayleySTRING, CirculantSTRING, ReflectionBasis, ReflectionRoPE, RoPE, TensorSTRING
from fastrpe.testing.asserts import assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import CANCELLED, DIFFERENT, NO_OP, ORTHOGONAL, REFLECTED, SHIFT, SIGMAS
from python_tests.positions.shared import HEADS, LENGTH, SIZE, scores, tokens

Module = TypeVar("Module", ReflectionBasis, ReflectionRoPE)
laws = settings(max_examples=10, deadline=None)
SHAPES = ((16, 1, 4), (16, 3, 4), (24, 4, 8), (12, 2, 3), (12, 3, 12), (8, 2, 2), (6, 4, 1))  # D, K, s


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_draw(seed))


def _householder(v: Tensor) -> Tensor:
    return torch.eye(len(v), dtype=v.dtype) - 2 * torch.outer(v, v) / v.dot(v)


def _shuffled(D: int, s: int, times: int) -> list[int]:
    """The coordinate that comes to each place."""
    order = list(range(D))
    for _ in range(times):
        order = [order[b * s + i] for i in range(s) for b in range(D // s)]
    return order


def _product(v: Tensor, s: int, shuffles: tuple[int, ...]) -> Tensor:
    """F_1 ... F_K of one head, written out."""
    D = v.shape[-1]
    P = torch.eye(D, dtype=v.dtype)
    for layer, times in zip(v, shuffles):
        F = torch.block_diag(*map(_householder, layer.split(s)))
        order = torch.tensor(_shuffled(D, s, times))
        Q = torch.eye(D, dtype=v.dtype)[order]
        P = P @ (Q.mT @ F @ Q)
    return P


def _by_tokens(module: Module, by_tokens: bool) -> Module:
    module = copy.deepcopy(module)
    module._goes_by_tokens = lambda q: by_tokens  # type: ignore[method-assign]
    return module


# The basis -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("D", "K", "s"), SHAPES)
@pytest.mark.parametrize("kind", ("shuffled", "same", "mirrored"))
def test_basis_is_the_product_of_the_layers(D: int, K: int, s: int, kind: str) -> None:
    shuffles = {"shuffled": range(K), "same": [0] * K, "mirrored": [min(i, K - 1 - i) for i in range(K)]}[kind]
    v, x = _normal(2, K, D), _normal(3, 4, 5, D, seed=1)
    P = torch.stack([_product(head, s, tuple(shuffles)) for head in v])
    assert_within(reflection_basis(v, s, shuffles), P, REFLECTED)
    per_query_head = P.repeat_interleave(2, 0)
    assert_within(reflect(x, v, s, shuffles), x @ per_query_head.mT, REFLECTED)
    assert_within(reflect(x, v, s, shuffles, inverse=True), x @ per_query_head, REFLECTED)


@pytest.mark.parametrize("dtype", ORTHOGONAL, ids=str)
@pytest.mark.parametrize(("D", "K", "s"), (*SHAPES, (64, 4, 4), (128, 8, 128)))
@pytest.mark.parametrize("length", (1e-3, 1.0, 1e3))
def test_1_basis_is_orthogonal(dtype: torch.dtype, D: int, K: int, s: int, length: float) -> None:
    P = reflection_basis((_normal(3, K, D) * length).to(dtype), s, range(K))
    assert P.dtype == dtype
    assert ((P.mT @ P - torch.eye(D, dtype=dtype)).abs() <= ORTHOGONAL[dtype]).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_autocast_and_narrow_tokens_leave_the_basis_orthogonal(dtype: torch.dtype) -> None:
    v = _normal(2, 3, SIZE).float()
    expected = reflection_basis(v, 4, range(3))
    with torch.autocast("cpu", dtype):
        assert_bitwise(reflection_basis(v, 4, range(3)), expected)
    x = tokens(dtype=dtype)
    assert_bitwise(reflect(x, v, 4, range(3)), reflect(x.float(), v, 4, range(3)).to(dtype))


@pytest.mark.parametrize(("D", "K", "s"), SHAPES)
def test_9_determinant_counts_the_reflections(D: int, K: int, s: int) -> None:
    sign = (-1) ** (K * D // s)
    P = reflection_basis(_normal(3, K, D), s, range(K))
    assert_within(torch.linalg.det(P), torch.full((3,), float(sign), dtype=P.dtype), REFLECTED)


def test_the_length_of_a_vector_has_no_effect_and_zero_reflects_nothing() -> None:
    v = _normal(1, 2, SIZE)
    P = reflection_basis(v, 4, range(2))
    assert_within(reflection_basis(-1e-3 * v, 4, range(2)), P, REFLECTED)
    eye = torch.eye(SIZE, dtype=torch.float64)
    for length in (0.0, LEAST_NORM**2):
        small = (length * v).requires_grad_()
        P = reflection_basis(small, 4, range(2))
        assert_within(P, eye.unsqueeze(0), LEAST_NORM)
        P.square().sum().backward()
        assert small.grad.isfinite().all()


def test_each_shuffle_mixes_a_power_of_the_block() -> None:
    D, s = 64, 4
    for K, reach in ((1, 4), (2, 16), (3, 64)):
        P = reflection_basis(_normal(1, K, D), s, range(K))[0]
        assert (P.abs() > REFLECTED).sum(-1).eq(reach).all()
    assert (reflection_basis(_normal(1, 3, D), s, [0, 0, 0])[0].abs() > REFLECTED).sum(-1).eq(s).all()


@pytest.mark.parametrize("D", (2, 5))
def test_as_many_whole_reflections_as_coordinates_make_any_orthogonal_matrix(D: int) -> None:
    """Cartan-Dieudonne: reflect the remaining matrix's column i onto e_i, D times."""
    Q = torch.linalg.qr(_normal(D, D))[0]
    vectors, rest = [], Q
    for i in range(D):
        v = rest[:, i] - torch.eye(D, dtype=Q.dtype)[i]
        vectors.append(v)
        rest = rest if v.norm() < LEAST_NORM else _householder(v) @ rest
    P = reflection_basis(torch.stack(vectors).unsqueeze(0), D, [0] * D)
    assert_within(P[0], Q, ORTHOGONAL[torch.float64])


# 2.8.2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("basis", "basis-by-tokens", "rope"))
@pytest.mark.parametrize("coords", (1, 2, 3))
@laws
@given(st.integers(0, 99))
def test_2_shift_invariance_in_any_dimension(kind: str, coords: int, seed: int) -> None:
    size = 24
    module: nn.Module
    options = dict(num_heads=HEADS, coords=coords, mode="mixed", generator=_draw(seed))
    if kind == "rope":
        module = ReflectionRoPE(size, **options)
    else:
        module = _by_tokens(ReflectionBasis(size, layers=3, block=4, **options), kind == "basis-by-tokens")
    q, k = torch.randn(2, 1, HEADS, LENGTH, size, generator=_draw(seed))
    r = 10 * torch.rand(LENGTH, coords, generator=_draw(seed))
    shift = 10 * torch.rand(coords, generator=_draw(seed + 1))
    norms = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert ((scores(module(q, k, r)) - scores(module(q, k, r + shift))).abs() <= SHIFT[torch.float32] * norms).all()


# 2.8.5 and 2.8.6 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", (2, 4, 6))
@pytest.mark.parametrize("shuffle", (False, True))
@pytest.mark.parametrize("by_tokens", (False, True))
def test_5_layers_that_cancel_are_rope(layers: int, shuffle: bool, by_tokens: bool) -> None:
    options = dict(layers=layers, block=4, shuffle=shuffle, init="rope", generator=_draw())
    module = _by_tokens(ReflectionBasis(SIZE, HEADS, **options), by_tokens)
    assert torch.equal(module.v, module.v.flip(1)) and module.shuffles == module.shuffles[::-1]
    assert max(module.shuffles) == shuffle * (layers // 2 - 1)
    q, k = tokens(), tokens(seed=1)
    for a, b in zip(module(q, k), RoPE(SIZE)(q, k)):
        assert_within(a, b, CANCELLED)
    (module(q, k)[0] * k).sum().backward()
    assert module.v.grad.abs().sum() > 0  # the start can be left


def test_6_P_after_rope_changes_no_score_and_P_before_does() -> None:
    module = ReflectionBasis(SIZE, HEADS, layers=3, block=4, generator=_draw()).double()
    q, k, P = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1), module.basis()
    yq, yk = RoPE(SIZE).double()(q, k)
    plain = scores((yq, yk))
    assert_within(scores((yq @ P.mT, yk @ P.mT)), plain, NO_OP)
    assert ((scores(module(q, k)) - plain).abs().max() >= DIFFERENT * plain.abs().max()).all()


# 2.8.9 ---------------------------------------------------------------------------------------------------------------


def _rope_scores(q: Tensor, k: Tensor, freqs: Tensor, basis: Tensor | None = None, interleaved: bool = True) -> Tensor:
    return scores(rotate(q, k, _normal(LENGTH, 1, seed=7), freqs, basis, interleaved=interleaved))


def test_9_reflections_in_the_planes_of_rope_only_negate_frequencies() -> None:
    q, k, freqs = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1), _normal(1, SIZE // 2)
    P = reflection_basis(_normal(HEADS, 1, SIZE), 2, [0])
    assert_within(_rope_scores(q, k, freqs, P), _rope_scores(q, k, -freqs), REFLECTED)
    plain = _rope_scores(q, k, freqs, P, interleaved=False)  # planes (t, t + R): the same P is no such thing
    assert (plain - _rope_scores(q, k, -freqs, interleaved=False)).abs().max() >= DIFFERENT * plain.abs().max()


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("rotary_dim", (SIZE, 12))
def test_9_reflection_rope_is_the_matrix_and_rope_in_its_scores(interleaved: bool, rotary_dim: int) -> None:
    options = dict(coords=2, interleaved=interleaved, rotary_dim=rotary_dim)
    module, rope = ReflectionRoPE(SIZE, **options).double(), RoPE(SIZE, **options).double()
    q, k, r = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1), _normal(LENGTH, 2)
    angle, R = r @ module.freqs, rotary_dim // 2
    expected = q.clone()
    for t in range(R):
        i, j = (2 * t, 2 * t + 1) if interleaved else (t, t + R)
        cos, sin = angle[:, t].cos(), angle[:, t].sin()
        expected[..., i] = cos * q[..., i] + sin * q[..., j]
        expected[..., j] = sin * q[..., i] - cos * q[..., j]
    assert_within(module(q, k, r)[0], expected, REFLECTED)

    D = plane_signs(SIZE, R, interleaved=interleaved, dtype=torch.float64)
    assert_bitwise(module.basis(), D.diag())
    reflected = scores(module(q, k, r))
    assert_within(reflected, scores(rope(q * D, k * D, r)), REFLECTED)
    assert_within(reflected, scores(rope(q, k, -r)), REFLECTED)
    assert (reflected - scores(rope(q, k, r))).abs().max() >= DIFFERENT * reflected.abs().max()


def test_9_reflection_rope_is_symmetric_and_no_identity_at_the_origin() -> None:
    module, eye = ReflectionRoPE(SIZE).double(), torch.eye(SIZE, dtype=torch.float64)
    q = eye[None, :, None]  # every unit vector as a head with one token

    def matrix(position: float) -> Tensor:
        y: Tensor = module(q, None, torch.tensor([[position]], dtype=torch.float64))[0][0, :, 0].mT
        return y

    R = matrix(3.0)
    assert_within(R, R.mT, REFLECTED)
    assert_within(R @ R, eye, REFLECTED)
    assert_within(matrix(0.0), module.signs.diag(), REFLECTED)
    assert (matrix(1.0) @ matrix(2.0) - R).abs().max() >= DIFFERENT
    assert_within(matrix(2.0).mT @ matrix(3.0), RoPE(SIZE).double()(q, None, -eye[:1, :1])[0][0, :, 0].mT, REFLECTED)


def test_9_two_reflections_turn_by_twice_the_angle_between_them() -> None:
    """So an encoding by two reflections in each plane, with frequencies w1 and w2, is RoPE with 2 (w2 - w1)."""
    r, w1, w2 = _normal(LENGTH, 1), _normal(1, SIZE // 2, seed=1), _normal(1, SIZE // 2, seed=2)
    q = tokens(dtype=torch.float64)

    def mirrored(x: Tensor, freqs: Tensor) -> Tensor:
        angle = r @ freqs
        v = torch.stack((angle.cos(), angle.sin()), -1).flatten(-2)
        y = [reflect(x[:, :, i : i + 1], v[i][None, None], 2, [0]) for i in range(LENGTH)]  # v depends on the token
        return torch.cat(y, 2)

    turned = rotate(q, None, r, 2 * (w2 - w1), interleaved=True)[0]
    assert_within(mirrored(mirrored(q, w1), w2), turned, REFLECTED)


def _relative_gap(third: float) -> float:
    """How much H(v(r)) H(v(r + t)) changes with r, for v(r) = (cos r, sin r, third)."""
    r, t = torch.linspace(0, 2 * math.pi, 50, dtype=torch.float64), 1.0

    def v(r: Tensor) -> Tensor:
        return torch.stack((r.cos(), r.sin(), torch.tensor(third, dtype=r.dtype)))

    products = torch.stack([_householder(v(x)) @ _householder(v(x + t)) for x in r])
    traces = products.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_within(traces, traces[:1].expand_as(traces), REFLECTED)  # which a look at traces would not tell apart
    return float((products - products[0]).abs().max())


def test_9_a_cone_of_reflections_is_not_relative_and_a_plane_is() -> None:
    assert _relative_gap(0.7) >= DIFFERENT
    assert _relative_gap(0.0) <= REFLECTED


# 2.8.11 --------------------------------------------------------------------------------------------------------------

UNBIASED = {
    "rope": lambda: RoPE(SIZE, coords=2),
    "cayley": lambda: CayleySTRING(SIZE, HEADS, coords=2, init_std=0.3, generator=_draw()),
    "circulant": lambda: CirculantSTRING(SIZE, HEADS, coords=2, init_std=0.2, generator=_draw()),
    "reflection": lambda: ReflectionBasis(SIZE, HEADS, coords=2, layers=3, block=4, generator=_draw()),
    "reflection-rope": lambda: ReflectionRoPE(SIZE, coords=2),
    "tensor": lambda: TensorSTRING(SIZE, HEADS, coords=2, features=2, init_std=0.5, scaled=False, generator=_draw()),
}


@pytest.mark.parametrize("name", UNBIASED)
def test_11_positive_features_of_encoded_tokens_are_unbiased(name: str) -> None:
    """FAVOR+: E exp(w.q' - |q'|^2 / 2) exp(w.k' - |k'|^2 / 2) = exp(q'.k') = exp(q^T R(r_j - r_i) k), w ~ N(0, I)."""
    module = UNBIASED[name]().double()
    q, k = (nn.functional.normalize(tokens(dtype=torch.float64, seed=s), dim=-1) for s in range(2))
    r = 3 * _normal(LENGTH, 2)
    omega = _normal(50_000, module(q, k, r)[0].shape[-1], seed=2)
    features = [(y @ omega.mT - y.square().sum(-1, keepdim=True) / 2).exp() for y in module(q, k, r)]
    differs = False
    for i, j in itertools.product((0, 3), (1, 7)):
        draws = features[0][:, :, i] * features[1][:, :, j]
        mean, error = draws.mean(-1), draws.std(-1) / math.sqrt(draws.shape[-1])
        # R(r_j - r_i) from the other side: the query at the origin, the key at the displacement
        yq, _ = module(q[:, :, [i]], None, torch.zeros_like(r[[0]]))
        yk, _ = module(k[:, :, [j]], None, r[[j]] - r[[i]])
        assert ((mean - (yq * yk).sum(-1)[..., 0].exp()).abs() <= SIGMAS * error).all()
        plain = (q[:, :, i] * k[:, :, j]).sum(-1).exp()
        differs |= bool(((mean - plain).abs() > SIGMAS * error).any())
    assert differs  # the gate can tell an encoding from none


# Two ways to apply a basis -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("prefix", (0, 2))
@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize(("layers", "block"), ((1, SIZE), (3, 4)))
def test_both_ways_agree_in_values_and_gradients(
    dtype: torch.dtype, prefix: int, groups: int, layers: int, block: int
) -> None:
    basis = ReflectionBasis(SIZE, HEADS, layers=layers, block=block, generator=_draw()).to(dtype)
    results = []
    for by_tokens in (False, True):
        module = _by_tokens(basis, by_tokens)
        q, k = tokens(groups * HEADS, dtype=dtype).requires_grad_(), tokens(dtype=dtype, seed=1).requires_grad_()
        r = _normal(LENGTH - prefix, 1).to(dtype).requires_grad_()
        yq, yk = module(q, k, r, prefix=prefix)
        assert yq.is_contiguous() and yq.dtype == dtype
        loss = (yq * yq.detach().flip(2)).sum() + (yk * yk.detach().flip(1)).sum()
        grads = torch.autograd.grad(loss, [q, k, r, *module.parameters()])
        alone, none = module(q, None, r, prefix=prefix)
        assert_within(alone, yq, ORTHOGONAL[dtype])
        assert none.shape[1] == 0
        assert_bitwise(yq[:, :, :prefix], q[:, :, :prefix])
        results.append((yq, yk, *grads))
    for a, b in zip(*results):
        assert_within(b, a, ORTHOGONAL[dtype])


def test_by_tokens_in_a_compiled_and_an_exported_graph() -> None:
    module = ReflectionBasis(32, HEADS, layers=1, block=32, generator=_draw())
    q, k = torch.randn(2, 2, HEADS, LENGTH, 32, generator=_draw())
    assert module._goes_by_tokens(q)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    exported = torch.export.export(module, (q, k), {"prefix": 1}).module()
    for a, b, c in zip(module(q, k, prefix=1), compiled(q, k, prefix=1), exported(q, k, prefix=1)):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
    torch.testing.assert_close(compiled(q[:, :, :5], None, offset=3)[0], module(q[:, :, :5], None, offset=3)[0])


@pytest.mark.parametrize(
    ("size", "layers", "block", "by_tokens"),
    [(64, 1, 4, True), (64, 2, 16, True), (64, 2, 8, False), (64, 4, 64, False), (128, 2, 4, True), (128, 4, 8, False)],
)
def test_the_way_is_chosen_by_shape_dtype_and_autocast(size: int, layers: int, block: int, by_tokens: bool) -> None:
    module = ReflectionBasis(size, 1, layers=layers, block=block)
    q = torch.zeros(1, 1, 2, size)
    assert module._goes_by_tokens(q) == module._goes_by_tokens(q.double()) == by_tokens
    assert not module._goes_by_tokens(q.bfloat16()) and not module._goes_by_tokens(q.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not module._goes_by_tokens(q)


def test_reflection_rope_keeps_prefix_tokens_and_every_dtype() -> None:
    module = ReflectionRoPE(SIZE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        q, k = tokens(dtype=dtype), tokens(dtype=dtype, seed=1)
        y = module(q, k, prefix=3)
        for x, z in zip((q, k), y):
            assert_bitwise(z[:, :, :3], x[:, :, :3])
            signs = module.signs.to(dtype)
            assert_bitwise(z[:, :, 3:], RoPE(SIZE)(x[:, :, 3:] * signs, None)[0])


@pytest.mark.parametrize("interleaved", (False, True))
def test_signs_and_their_matrix_agree(interleaved: bool) -> None:
    module = ReflectionRoPE(SIZE, rotary_dim=12, interleaved=interleaved)
    q, k = tokens(2 * HEADS), tokens(seed=1)
    for a, b in zip(*(_by_tokens(module, flag)(q, k, offset=4, prefix=2) for flag in (False, True))):
        assert_bitwise(a, b)


@pytest.mark.gpu
def test_on_a_gpu_the_matrix_of_signs_is_taken_where_a_kernel_fuses_it() -> None:
    q, k = torch.randn(2, 2, HEADS, LENGTH, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for module, fuses in (
        (ReflectionRoPE(64), True),
        (ReflectionRoPE(64, learned=True), False),
        (ReflectionRoPE(64, rotary_dim=32), False),
    ):
        module = module.cuda()
        narrow = q.bfloat16(), k.bfloat16()
        assert module._goes_by_tokens(q) and module._goes_by_tokens(narrow[0]) != fuses
        with torch.autocast("cuda", torch.bfloat16):
            assert module._goes_by_tokens(q) != fuses
            cast = module(q, k, prefix=1)
        ways = [_by_tokens(module, flag)(*narrow, prefix=1) for flag in (False, True)]
        exact = _by_tokens(module, True)(*(x.double() for x in narrow), prefix=1)
        for a, b, c, e in zip(*ways, cast, exact):
            assert_accurate(a, b, e)
            assert_accurate(b, a, e)
            assert_accurate(c, b, e)


def test_gradchecks() -> None:
    v, x = _normal(2, 3, 8).requires_grad_(), _normal(1, 2, 3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: reflection_basis(v, 4, range(3)), v)
    assert torch.autograd.gradcheck(lambda x, v: reflect(x, v, 4, range(3)), (x, v))
    assert torch.autograd.gradcheck(lambda x, v: reflect(x, v, 8, [0] * 3, inverse=True), (x, v))
    assert torch.autograd.gradgradcheck(lambda x, v: reflect(x, v, 4, range(3)), (x, v))


# Start, text and errors ----------------------------------------------------------------------------------------------


def test_start() -> None:
    module = ReflectionBasis(64, 8, layers=4, generator=_draw())
    assert module.v.shape == (8, 4, 64)
    n = module.v.numel()
    # Four standard errors of a sample's variance
    assert abs(float(module.v.detach().double().var()) - 1) <= SIGMAS * math.sqrt(2 / n)
    assert_bitwise(ReflectionBasis(64, 8, layers=4, generator=_draw()).v, module.v)
    assert module.freqs.requires_grad and not ReflectionBasis(64, 8, learned=False).freqs.requires_grad
    assert not ReflectionRoPE(SIZE).state_dict().keys() - {"_extra_state"}


def test_repr() -> None:
    text = repr(ReflectionBasis(SIZE, HEADS, layers=2, block=4, shuffle=False, init="rope"))
    assert text.startswith("ReflectionBasis(head_dim=16, num_heads=2, coords=1, ")
    assert text.endswith("layers=2, block=4, init='rope', shuffle=False)")
    assert repr(ReflectionRoPE(SIZE)).startswith("ReflectionRoPE(head_dim=16, coords=1, ")


def test_a_folded_basis_does_not_train_and_constant_signs_do() -> None:
    q = tokens()
    module = ReflectionBasis(SIZE, HEADS)
    module.folded = True
    with pytest.raises(RuntimeError) as error:
        module(q, q)
    assert str(error.value) == (
        "ReflectionBasis: the basis must not be folded while it trains, got forward in training mode with gradients "
        "after fold_into; call unfold_from or eval"
    )
    with torch.no_grad():
        module(q, q)
    module.eval()(q, q)
    signs = ReflectionRoPE(SIZE, learned=True)
    signs.folded = True
    signs(q, q)[0].square()[..., 0].sum().backward()
    assert signs.freqs.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ReflectionBasis(SIZE, 2, init="identity"),
            "ReflectionBasis: init must be one of 'normal', 'rope', got 'identity'",
        ),
        (
            lambda: ReflectionBasis(SIZE, 2, layers=0),
            "ReflectionBasis: layers must be positive, and even for init 'rope', got 0",
        ),
        (
            lambda: ReflectionBasis(SIZE, 2, layers=3, init="rope"),
            "ReflectionBasis: layers must be positive, and even for init 'rope', got 3",
        ),
        (
            lambda: ReflectionBasis(SIZE, 2, block=6),
            "ReflectionBasis: block must be at least 2 and divide head_dim=16, got 6",
        ),
        (
            lambda: ReflectionBasis(SIZE, 2, block=1),
            "ReflectionBasis: block must be at least 2 and divide head_dim=16, got 1",
        ),
        *(
            (
                lambda options=options: ReflectionBasis(SIZE, 2, block=2, **options),
                "ReflectionBasis: block must be at least 3 where blocks of 2 are RoPE's planes, whose frequencies they "
                "would negate, got 2",
            )
            for options in (dict(interleaved=True), dict(rotary_dim=2))
        ),
        (
            lambda: _by_tokens(ReflectionBasis(SIZE, 2), True)(tokens(4), tokens(4)),
            "ReflectionBasis: v must have shape (H, K, D) with H=4, D=16, got (2, 2, 16)",
        ),
        (
            lambda: _by_tokens(ReflectionBasis(SIZE, 2), True)(tokens(), tokens(2, 5)),
            "ReflectionBasis: k must have shape (B, Hk, L, D) with B=2, L=12, D=16, got (2, 2, 5, 16)",
        ),
        (
            lambda: ReflectionRoPE(SIZE)(tokens(), tokens(), prefix=13),
            "ReflectionRoPE: prefix must lie between 0 and L=12, got 13",
        ),
        (
            lambda: reflect(tokens()[0, 0], torch.ones(1, 1, SIZE), 4, [0]),
            "reflect: x must have shape (H, L, D) or (B, H, L, D), got (12, 16)",
        ),
        (
            lambda: reflect(tokens(), torch.ones(1, 2, SIZE), 4, [0]),
            "reflect: v must have shape (Hv, K, D) with K=1, D=16, got (1, 2, 16)",
        ),
        (
            lambda: reflect(tokens(), torch.ones(3, 1, SIZE), 4, [0]),
            "reflect: v must have a number of heads that divides H=2, got 3",
        ),
        (
            lambda: reflect(tokens(), torch.ones(1, 1, SIZE), 5, [0]),
            "reflect: block must be positive and divide D=16, got 5",
        ),
    ],
)
def test_bad_arguments_raise(make: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert str(error.value) == message


def test_the_words_of_a_wrong_type() -> None:
    for call, message in (
        (lambda: ReflectionRoPE(SIZE)([1], None), "q must be a Tensor, got list"),
        (lambda: ReflectionRoPE(SIZE)(tokens(), None, offset=1.0), "offset must be a int or SymInt, got float"),
        (lambda: ReflectionRoPE(SIZE)(tokens(), None, prefix=1.0), "prefix must be a int or SymInt, got float"),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert str(error.value) == f"ReflectionRoPE: {message}"
