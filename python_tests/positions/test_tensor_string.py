"""Tensor-STRING: its scores, shift invariance, tokens without a position, and how attention scales them."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrpe.attention import Attention, KVCache
from fastrpe.positions import TensorSTRING, grid_positions
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import SHIFT, SIGMAS, TENSOR
from python_tests.positions.shared import HEADS, LENGTH, SIZE, points, scores, tokens

FEATURES = 3
laws = settings(max_examples=10, deadline=None)


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _make(coords: int = 2, **options: object) -> TensorSTRING:
    return TensorSTRING(
        SIZE, HEADS, coords=coords, **dict(features=FEATURES, init_std=0.4, generator=_draw()) | options
    )


def _kernel(module: TensorSTRING, r: Tensor) -> Tensor:
    """f(r_i).f(r_j), (HEADS, L, L), as the mean of cosines of displacements."""
    displacements = (r.unsqueeze(-2) - r.unsqueeze(-3)).to(module.freqs.dtype)
    return torch.einsum("ijc,hcm->hijm", displacements, module.freqs).cos().mean(-1).detach()


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("scaled", (False, True))
def test_scores_are_those_of_the_tokens_times_the_kernel(groups: int, scaled: bool) -> None:
    module = _make(scaled=scaled).double()
    q, k = tokens(groups * HEADS, dtype=torch.float64), tokens(dtype=torch.float64, seed=1)
    r = points(2, dtype=torch.float64)
    yq, yk = module(q, k, r)
    assert yq.shape == (2, groups * HEADS, LENGTH, module.out_dim) and yk.shape == (2, HEADS, LENGTH, module.out_dim)
    assert module.out_dim == 2 * FEATURES * SIZE
    expected = scores((q, k)) * _kernel(module, r).repeat_interleave(groups, 0)
    assert_within(scores((yq, yk)), expected * math.sqrt(2 * FEATURES) ** scaled, TENSOR)
    f = module.position_features(r)
    assert_within(f.norm(dim=-1), torch.full_like(f[..., 0], (2 * FEATURES) ** (scaled / 4)), TENSOR)
    assert_within(yq[0, 0, 5], torch.kron(f[0, 5], q[0, 0, 5]), TENSOR)


@pytest.mark.parametrize("coords", (1, 2, 3))
@laws
@given(st.integers(0, 99))
def test_2_shift_invariance_in_any_dimension(coords: int, seed: int) -> None:
    module = _make(coords, scaled=False, generator=_draw(seed))
    q, k = torch.randn(2, 1, HEADS, LENGTH, SIZE, generator=_draw(seed))
    r = 10 * torch.rand(LENGTH, coords, generator=_draw(seed))
    shift = 10 * torch.rand(coords, generator=_draw(seed + 1))
    norms = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert ((scores(module(q, k, r)) - scores(module(q, k, r + shift))).abs() <= SHIFT[torch.float32] * norms).all()


def test_far_positions_keep_their_phase() -> None:
    module, q = _make(1, scaled=False), tokens()
    near, far = (module(q, q, points(1) + start) for start in (0, 2**20))
    norms = q.norm(dim=-1).unsqueeze(-1) * q.norm(dim=-1).unsqueeze(-2)
    assert ((scores(near) - scores(far)).abs() <= SHIFT[torch.float32] * norms).all()


def test_many_features_approach_the_gaussian_kernel() -> None:
    module = TensorSTRING(1, 1, coords=2, features=20_000, init_std=0.4, scaled=False, generator=_draw()).double()
    r = points(2, dtype=torch.float64)
    f = module.position_features(r)[0].detach()
    gauss = (-(0.4**2) * torch.cdist(r, r).square() / 2).exp()
    assert ((f @ f.mT - gauss).abs() <= SIGMAS / math.sqrt(20_000)).all()  # a cosine's deviation is at most 1


def test_tokens_without_a_position_are_at_the_origin() -> None:
    module, prefix = _make().double(), 2
    q, k = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1)
    r = points(2, dtype=torch.float64)[: LENGTH - prefix]
    y = module(q, k, r, prefix=prefix)
    everywhere = torch.cat((torch.zeros(prefix, 2), r))
    for a, b in zip(y, module(q, k, everywhere)):
        assert_bitwise(a, b)
    among = slice(prefix)
    expected = scores((q, k))[..., among, among] * math.sqrt(2 * FEATURES)
    assert_within(scores(y)[..., among, among], expected, TENSOR)
    batched = module(q, k, r.expand(2, -1, -1), prefix=prefix)
    assert_bitwise(batched[0], y[0])


def test_offset_and_default_positions() -> None:
    module, q = _make(1), tokens()
    assert_bitwise(module(q, None, offset=3)[0], module(q, None, points(1) + 3)[0])
    whole = module(tokens(length=4), None)[0]
    assert_bitwise(module(tokens(length=4)[:, :, 3:], None, offset=3)[0], whole[:, :, 3:])


@pytest.mark.parametrize("kv", (HEADS, 2 * HEADS))
def test_attention_scales_by_the_size_before_the_encoding(kv: int) -> None:
    heads, dim = 2 * HEADS, 24
    torch.manual_seed(0)
    position = TensorSTRING(SIZE, kv, coords=2, features=FEATURES, init_std=0.4, generator=_draw())
    attention = Attention(dim, heads, num_kv_heads=kv, head_dim=SIZE, position=position).double()
    x, r = torch.randn(2, 7, dim, dtype=torch.float64, generator=_draw()), grid_positions(2, 3, dtype=torch.float64)
    q, k, v = (
        p(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    kernel = _kernel(position, torch.cat((torch.zeros(1, 2), r))).repeat_interleave(heads // kv, 0)
    weights = (scores((q, k)) * kernel / math.sqrt(SIZE)).softmax(-1)
    expected = attention.out_proj((weights @ v.repeat_interleave(heads // kv, 1)).transpose(1, 2).flatten(2))
    y = attention(x, positions=r, prefix=1)
    assert_within(y, expected, TENSOR)
    attention.fold()  # there is no basis: nothing happens
    assert_bitwise(attention(x, positions=r, prefix=1), y)


def test_decoding_with_a_cache_for_longer_keys() -> None:
    position = TensorSTRING(SIZE, HEADS, features=FEATURES, init_std=0.4, generator=_draw())
    torch.manual_seed(0)
    attention = Attention(24, HEADS, head_dim=SIZE, causal=True, position=position).double()
    x = torch.randn(2, 6, 24, dtype=torch.float64, generator=_draw())
    cache = KVCache(2, HEADS, 6, SIZE, key_dim=position.out_dim, dtype=torch.float64)
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split((3, 1, 2), 1)]
        assert_within(torch.cat(parts, 1), attention(x), TENSOR)


def test_gradcheck() -> None:
    module = TensorSTRING(4, 2, coords=2, features=2, init_std=0.4, generator=_draw()).double()
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=_draw(s)).requires_grad_() for s in range(2))
    r = torch.randn(2, 2, dtype=torch.float64, generator=_draw(2)).requires_grad_()

    def call(q: Tensor, k: Tensor, r: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = torch.func.functional_call(module, dict(freqs=freqs), (q, k, r), dict(prefix=1))
        return y

    assert torch.autograd.gradcheck(call, (q, k, r, module.freqs.detach().requires_grad_()))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_narrow_dtypes_round_once_and_leave_frequencies_alone(dtype: torch.dtype) -> None:
    module, r = _make().to(dtype), 1000 + points(2)
    assert module.freqs.dtype == torch.float32
    q, k = tokens(dtype=dtype), tokens(dtype=dtype, seed=1)
    y, wide = module(q, k, r), module(q.float(), k.float(), r)
    with torch.autocast("cpu", dtype):
        cast = module(q, k, r)
    for a, b, c in zip(y, wide, cast):
        assert_bitwise(a, b.to(dtype))
        assert_bitwise(c, a)


def test_copies_and_checkpoints() -> None:
    module, q, r = _make(), tokens(), points(2)
    twin, other = copy.deepcopy(module), _make(generator=_draw(1))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for m in (twin, other):
        assert m.freqs._no_weight_decay
        assert_bitwise(m(q, None, r)[0], module(q, None, r)[0])
    with torch.device("meta"):
        empty = _make(generator=None)
    empty.to_empty(device="cpu").reset_parameters(_draw())
    assert_bitwise(empty.freqs, module.freqs)
    assert set(_make(learned=False).state_dict()) == {"freqs"} and not list(_make(learned=False).parameters())


def test_compile_and_export() -> None:
    module, q, k, r = _make(), tokens(2 * HEADS), tokens(seed=1), points(2, LENGTH - 1)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    exported = torch.export.export(module, (q, k, r), {"prefix": 1}).module()
    for a, b, c in zip(*(f(q, k, r, prefix=1) for f in (module, compiled, exported))):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c, a)
    torch.testing.assert_close(compiled(q[:, :, :5], None, r[:5])[0], module(q[:, :, :5], None, r[:5])[0])


def test_edges_and_repr() -> None:
    module = _make()
    for q in (tokens()[:0], tokens()[:, :, :0]):
        y = module(q, q, points(2, q.shape[2]))
        assert y[0].shape == y[1].shape == (*q.shape[:3], module.out_dim)
    assert module(tokens(), None, points(2))[1].shape == (2, 0, LENGTH, module.out_dim)
    assert repr(module) == "TensorSTRING(head_dim=16, num_heads=2, coords=2, features=3, init_std=0.4, learned=True)"
    assert "scaled=False" in repr(_make(scaled=False)) and "learned" not in repr(_make(learned=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _make(features=0), "features must be at least 1, got 0"),
        (lambda: _make(init_std=0.0), "init_std must be positive, got 0.0"),
        (lambda: _make()(tokens(), tokens()), "positions must be given for C=2 coordinates, got None"),
        (
            lambda: _make()(tokens(4), tokens(4), points(2)),
            "k must have shape (B, Hk, L, D) with B=2, Hk=2, L=12, D=16, got (2, 4, 12, 16)",
        ),
        (lambda: _make()(tokens(3), None, points(2)), "q must have a number of heads that 2 divides, got 3"),
    ],
)
def test_bad_arguments_raise(call: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()  # type: ignore[operator]
    assert str(error.value) == f"TensorSTRING: {message}"


@pytest.mark.gpu
def test_no_call_synchronises() -> None:
    module, q, k, r = _make().cuda(), tokens().cuda(), tokens(seed=1).cuda(), points(2, LENGTH - 1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(y.square().sum() for y in module(q, k, r, prefix=1)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.freqs.grad.abs().sum() > 0
