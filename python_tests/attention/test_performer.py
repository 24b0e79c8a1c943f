import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from fastrpe.attention import Attention, KVCache, LinearCache, Performer
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
    step,
)
from fastrpe.positions import (
    CayleySTRING,
    CirculantSTRING,
    ReflectionBasis,
    ReflectionRoPE,
    RoPE,
    SparseCayleySTRING,
    TensorSTRING,
    grid_positions,
)
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_within
from fastrpe.testing.bars import SIGMAS

DIM, H, D, M = 24, 4, 8, 6


class Squares(nn.Module):
    """A feature map of somebody else's: no kind, no sizes."""

    def forward(self, q: Tensor, k: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        return q.square(), k.square()


MAPS: dict[str, Callable[..., nn.Module]] = {
    "positive": lambda **o: PositiveFeatures(D, M, seed=1, **o),
    "relu": lambda **o: ReLUFeatures(D, **o),
    "relu-projected": lambda **o: ReLUFeatures(D, M, seed=1, **o),
    "exp": lambda **o: ExpFeatures(D, **o),
    "elu": lambda **o: EluFeatures(D, **o),
    "hyperbolic": lambda **o: HyperbolicFeatures(D, M, seed=1, **o),
    "oprf": lambda **o: OPRFFeatures(D, M, a=-0.2, seed=1, **o),
    "projection": lambda **o: LearnableFeatures(D, M, form="projection", seed=1, **o),
    "polynomial": lambda **o: LearnableFeatures(D, M, seed=1, **o),
    "mlp": lambda **o: LearnableFeatures(D, M, form="mlp", seed=1, **o),
    "hybrid": lambda **o: HybridFeatures(D, M, num_angles=2, seed=1, **o),
    "squares": lambda **o: Squares(),
}
BOTH = ("positive", "hyperbolic", "relu", "hybrid", "polynomial")
ORDERS = pytest.mark.parametrize("order", ("pre", "post"))
KV = pytest.mark.parametrize("heads", (H, 2, 1))
ENCODINGS: dict[str, Callable[..., Any]] = {
    "rope": lambda D, heads: RoPE(D, num_heads=heads, learned=True, coords=2),
    "mixed": lambda D, heads: RoPE(D, num_heads=heads, mode="mixed", learned=True, coords=2),
    "cayley": lambda D, heads: CayleySTRING(D, heads, init_std=0.3, coords=2),
    "circulant": lambda D, heads: CirculantSTRING(D, heads, init_std=0.3, coords=2),
    "reflection": lambda D, heads: ReflectionBasis(D, heads, layers=2, block=2, coords=2),
    "reflection-rope": lambda D, heads: ReflectionRoPE(D, num_heads=heads, coords=2, learned=True),
    "sparse": lambda D, heads: SparseCayleySTRING(D, heads, f=0.5, coords=2),
    "tensor": lambda D, heads: TensorSTRING(D, heads, coords=2, features=2),
}


def size(name: str) -> int:
    return Performer(MAPS[name]()).feature_dim(D, 2)


def attention(
    name: str = "positive", heads: int = H, order: str = "pre", *, position: bool = True, **options: Any
) -> Attention:
    torch.manual_seed(0)
    place = RoPE(D if order == "pre" else size(name), num_heads=heads, learned=True) if position else None
    kernel = Performer(MAPS[name](), order=order)
    return Attention(DIM, H, num_kv_heads=heads, head_dim=D, position=place, kernel=kernel, **options).double()


def tokens(B: int = 2, L: int = 7, size: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(B, L, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(
    a: Attention,
    x: Tensor,
    context: Tensor | None = None,
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
    keys: Tensor | None = None,
    prefix: int = 0,
    context_prefix: int = 0,
) -> Tensor:
    """What an `Attention` of a Performer should give: the weights of each pair, RoFormer's eq. 19 for "post"."""
    source = x if context is None else context
    if context is None:
        context_positions, context_prefix = positions, prefix
    q, k, v = (
        projection(z).unflatten(-1, (-1, a.head_dim)).transpose(1, 2)
        for projection, z in ((a.q_proj, x), (a.k_proj, source), (a.v_proj, source))
    )

    def placed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if a.position is None:
            return q, k
        return (
            a.position(q, None, positions, prefix=prefix)[0],
            a.position(k, None, context_positions, prefix=context_prefix)[0],
        )

    post = a.kernel.order == "post"
    q, k = (q, k) if post else placed(q, k)
    phi = a.kernel.feature_map(q, k, causal=a.causal)
    served = [h * k.shape[1] // q.shape[1] for h in range(q.shape[1])]
    above, below = (torch.einsum("bhlf,bhsf->bhls", f, g[:, served]) for f, g in (placed(*phi) if post else phi, phi))
    allowed = torch.ones(above.shape[2:], dtype=torch.bool)
    if a.causal:
        allowed = allowed.tril(above.shape[3] - above.shape[2])
    if keys is not None:
        allowed = allowed & keys[:, None, None]
    above, below = above.masked_fill(~allowed, 0), below.masked_fill(~allowed, 0).sum(-1, keepdim=True)
    y = above / below.masked_fill(below == 0, 1) @ v[:, served]
    return a.out_proj(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", MAPS)
@ORDERS
@pytest.mark.parametrize("causal", (False, True))
def test_every_map(name: str, order: str, causal: bool) -> None:
    a, x = attention(name, 2, order, causal=causal), tokens()
    assert_within(a(x), written_out(a, x), LAW_FLOAT64)


@ORDERS
@KV
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("S", (9, 7, 4))
def test_cross_attention(order: str, heads: int, causal: bool, S: int) -> None:
    a, x, context = attention("positive", heads, order, causal=causal), tokens(), tokens(L=S, seed=2)
    assert_within(a(x, context), written_out(a, x, context), LAW_FLOAT64)
    given = dict(positions=torch.rand(7, 1).double(), context_positions=torch.rand(2, S, 1).double())
    assert_within(a(x, context, **given), written_out(a, x, context, **given), LAW_FLOAT64)


@ORDERS
@KV
def test_projections_of_their_own_for_key_heads(order: str, heads: int) -> None:
    position = RoPE(D if order == "pre" else 2 * M)
    kernel = Performer(HyperbolicFeatures(D, M, num_heads=heads, seed=3), order=order)
    a = Attention(DIM, H, num_kv_heads=heads, head_dim=D, position=position, kernel=kernel).double()
    assert_within(a(tokens()), written_out(a, tokens()), LAW_FLOAT64)


@pytest.mark.parametrize(
    ("encoding", "order"), [(e, o) for e in ENCODINGS for o in ("pre", "post") if (e, o) != ("tensor", "post")]
)
@pytest.mark.parametrize("heads", (H, 2))
def test_every_encoding(encoding: str, order: str, heads: int) -> None:
    torch.manual_seed(0)
    position = ENCODINGS[encoding](D if order == "pre" else 2 * M, heads)
    kernel = Performer(HyperbolicFeatures(getattr(position, "out_dim", D), M, seed=1), order=order)
    a = Attention(DIM, H, num_kv_heads=heads, head_dim=D, position=position, kernel=kernel).double()
    x, grid = tokens(L=13), grid_positions(3, 4, dtype=torch.float64)
    y = a(x, positions=grid, prefix=1)
    assert_within(y, written_out(a, x, positions=grid, prefix=1), LAW_FLOAT64)
    assert (a(x, positions=2 * grid, prefix=1) - y).abs().max() > LAW_FLOAT64  # the encoding is not idle
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in a.parameters())


def test_post_is_relative_for_every_map() -> None:
    for name in BOTH:
        a, x = attention(name, 2, "post"), tokens()
        p = torch.rand(2, 7, 1).double()
        assert_within(a(x, positions=p + 100), a(x, positions=p), LAW_FLOAT64)


def test_pre_is_relative_in_the_mean() -> None:
    """Weights before normalisation, averaged over projections, do not see a shift; those of one projection do."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, D).double() / 2
    rope, v, shifts, draws = RoPE(D, base=10.0), torch.ones(1, 1, 1, 1).double(), (0.0, 3.0), []
    for seed in range(400):
        kernel = Performer(PositiveFeatures(D, 16, seed=seed), normalize=False).double()
        pairs = [(rope(q, None, torch.full((1, 1), s))[0], rope(k, None, torch.full((1, 1), s + 1))[0]) for s in shifts]
        draws.append(torch.stack([kernel(*pair, v).flatten()[0] for pair in pairs]))
    values = torch.stack(draws)
    gap = values[:, 0] - values[:, 1]
    assert gap.abs().max() > LAW_FLOAT64
    assert gap.mean().abs() < SIGMAS * gap.std() / math.sqrt(len(gap))
    turned, far = (rope(x, None, torch.full((1, 1), s))[0] for x, s in ((q, 0.0), (k, 1.0)))
    exact = ((turned * far).sum() / D**0.5).exp()
    assert (values.mean() - exact).abs() < SIGMAS * values.mean(1).std() / math.sqrt(len(values))


@pytest.mark.parametrize("name", BOTH)
@ORDERS
@pytest.mark.parametrize("causal", (False, True))
def test_key_padding(name: str, order: str, causal: bool) -> None:
    a, x = attention(name, 2, order, causal=causal), tokens()
    keys = torch.arange(7) < torch.tensor([5, 7])[:, None]
    y = a(x, key_mask=keys)
    assert_within(y[0, :5], a(x[:1, :5])[0], LAW_FLOAT64)
    assert_within(y[1], a(x[1:])[0], LAW_FLOAT64)
    # Whatever padding holds, and whichever shape says that it is padding.
    held = x.clone()
    held[0, 5:] = 50 * held[0, 5:]
    assert_within(a(held, key_mask=keys)[:, :5], y[:, :5], LAW_FLOAT64)
    for mask in (keys[:, None, None], keys[1], keys[1:, None, None]):
        assert_within(a(x[1:], mask=mask[-1:] if mask.dim() > 1 else mask), y[1:], LAW_FLOAT64)
    nobody = a(x, key_mask=torch.zeros(2, 7, dtype=torch.bool))
    assert torch.equal(nobody, a.out_proj.bias.expand_as(nobody))


@pytest.mark.parametrize("causal", (False, True))
def test_post_without_weights_gives_zeros(causal: bool) -> None:
    """Features that meet no key's may do so once they are turned: what is divided by 0 is 0, and learns nothing."""
    q, k, v = (torch.tensor(x).reshape(1, 1, 1, 2) for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 2.0]))
    v.requires_grad_()
    y = Performer(ReLUFeatures(2, eps=0.0), order="post")(q, k, v, causal=causal, encode=lambda q, k: (q, k.flip(-1)))
    y.sum().backward()
    assert not y.any() and not v.grad.any()


def test_causal_sees_no_later_token() -> None:
    for name in BOTH:
        for order in ("pre", "post"):
            a, x = attention(name, 2, order, causal=True), tokens()
            changed = x.clone()
            changed[:, 4:] += 1
            y, z = a(x), a(changed)
            assert torch.equal(y[:, :4], z[:, :4]) and not torch.equal(y[:, 4:], z[:, 4:])


@pytest.mark.parametrize("name", BOTH)
@ORDERS
@KV
@pytest.mark.parametrize("chunks", ([1] * 7, [3, 1, 1, 2]))
@torch.no_grad()
def test_streaming_equals_full_pass(name: str, order: str, heads: int, chunks: list[int]) -> None:
    a, x = attention(name, heads, order, causal=True), tokens()
    cache = LinearCache()
    for _ in range(2):
        y = torch.cat([a(part, cache=cache) for part in x.split(chunks, 1)], 1)
        assert cache.length == cache.offset == 7
        assert_within(y, a(x), LAW_FLOAT64)
        sizes = [t.shape for state in cache.states if state for t in state]
        assert len(sizes) == (3 if order == "pre" else 6) and all(7 not in s for s in sizes)
        cache.reset()
        assert cache.length == 0 and cache.states == (None, None)


@ORDERS
@torch.no_grad()
def test_streaming_with_prefix_positions_and_padding(order: str) -> None:
    a, x = attention("positive", 2, order, causal=True), tokens()
    cache = LinearCache()
    first = a(x[:, :4], cache=cache, prefix=3)
    assert cache.length == 4 and cache.offset == 1
    rest = [a(x[:, i : i + 1], cache=cache) for i in (4, 5, 6)]
    assert_within(torch.cat((first, *rest), 1), a(x, prefix=3), LAW_FLOAT64)
    cache.reset()
    assert cache.prefix == 0
    keys = torch.arange(7) >= torch.tensor([2, 0])[:, None]
    positions = (torch.arange(7.0).double() - torch.tensor([[2.0], [0.0]])).unsqueeze(-1)
    parts = [
        a(x[:, i:j], cache=cache, positions=positions[:, i:j], key_mask=keys[:, :j])
        for i, j in ((0, 5), (5, 6), (6, 7))
    ]
    assert_within(torch.cat(parts, 1), a(x, positions=positions, key_mask=keys), LAW_FLOAT64)


@ORDERS
def test_gradients_flow_through_the_cache_until_detached(order: str) -> None:
    a, x = attention("positive", 2, order, causal=True), tokens().requires_grad_()
    for detached in (False, True):
        cache = LinearCache()
        a(x[:, :4], cache=cache)
        if detached:
            cache.detach()
        a(x[:, 4:], cache=cache).sum().backward()
        assert (x.grad[:, :4] == 0).all() == detached
        x.grad = None
    a(x)[:, 4:].sum().backward()
    whole = x.grad
    cache = LinearCache()
    grad = torch.autograd.grad(torch.cat([a(part, cache=cache) for part in x.split(4, 1)], 1)[:, 4:].sum(), x)[0]
    assert_within(grad, whole, LAW_FLOAT64)


@ORDERS
def test_gradcheck(order: str) -> None:
    features = LearnableFeatures(2, 4, form="projection", base="exp", seed=0)
    options: dict[str, Any] = dict(num_kv_heads=1, head_dim=2, causal=True, kernel=Performer(features, order=order))
    a = Attention(4, 2, position=RoPE(2 if order == "pre" else 4, learned=True), **options).double()
    names = [n for n, _ in a.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(a, dict(zip(names, values)), (x,))

    values = [v.detach().requires_grad_() for v in a.parameters()]
    assert torch.autograd.gradcheck(call, (tokens(1, 3, 4).requires_grad_(), *values))


def test_unnormalised_is_the_sum_over_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, H, 5, D).double()
    for name in ("relu", "positive", "oprf"):
        kernel = Performer(MAPS[name](), normalize=False).double()
        f = kernel.feature_map
        assert isinstance(f, FeatureMap)
        phi_q, phi_k = (f._features(x, f.prepare(q, k)[2], None) for x in (q, k))
        assert_within(kernel(q, k, v), phi_q @ phi_k.mT @ v, LAW_FLOAT64)


@pytest.mark.parametrize("features", (OPRFFeatures, SADERF))
def test_maps_that_look_at_all_keys(features: type) -> None:
    a = Attention(DIM, H, head_dim=D, position=RoPE(D), kernel=Performer(features(D, M, seed=1))).double()
    assert_within(a(tokens()), written_out(a, tokens()), LAW_FLOAT64)
    held = tokens()
    held[:, 5:] = torch.nan
    x = held[:, :5]
    assert a(x, held, key_mask=torch.arange(7).expand(2, 7) < 5).isfinite().all()
    a.causal = True
    with pytest.raises(ValueError, match=f"^Performer: causal must be False with {features.__name__}, which looks at"):
        a(tokens())


@pytest.mark.parametrize("name", ("positive", "relu", "polynomial"))
@ORDERS
def test_autocast(name: str, order: str) -> None:
    a, x = attention(name, 2, order), tokens(L=33).float().double()
    exact = a(x)
    a, x = a.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, same = a(x), written_out(a, x)
    assert y.dtype == torch.bfloat16
    assert_accurate(y, same.to(y.dtype), exact)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in a.parameters())


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@ORDERS
def test_large_queries_in_half_precision(order: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = Performer(PositiveFeatures(D, M, seed=0), order=order)
    q, k, v = (torch.randn(1, 2, 9, D).to(dtype) for _ in range(3))
    q, k = (30 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    y = kernel(q, k, v, encode=(lambda q, k: (q, k)) if order == "post" else None)
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize(("name", "order"), (("positive", "pre"), ("positive", "post"), ("mlp", "pre"), ("exp", "pre")))
@pytest.mark.parametrize("causal", (False, True))
def test_compile(name: str, order: str, causal: bool) -> None:
    torch._dynamo.reset()
    a = attention(name, 2, order, causal=causal)
    compiled = torch.compile(a, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (5, 8):
        x, given = tokens(L=L), dict(key_mask=torch.arange(L).expand(2, -1) < 4)
        y, z = compiled(x, **given), a(x, **given)
        assert_within(y, z, LAW_FLOAT64)
        for g, h in zip(*(torch.autograd.grad(r.square().sum(), list(a.parameters())) for r in (y, z))):
            assert_within(g, h, LAW_FLOAT64)


@torch.no_grad()
def test_compiled_streaming_settles() -> None:
    torch._dynamo.reset()
    a, x = attention("positive", 2, causal=True), tokens()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(a, fullgraph=True, dynamic=True, backend=graphs)
    cache = LinearCache()
    first = [compiled(part, cache=cache) for part in x[:, :5].split([3, 1, 1], 1)]
    count = graphs.frame_count
    y = torch.cat([*first, *(compiled(x[:, i : i + 1], cache=cache) for i in (5, 6))], 1)
    assert_within(y, a(x), LAW_FLOAT64)
    assert cache.length == 7 and graphs.frame_count == count


def test_redraw_while_training_reaches_a_compiled_model() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    kernel = Performer(PositiveFeatures(D, M, redraw_every=2, seed=5))
    a, x = Attention(DIM, H, head_dim=D, kernel=kernel).double(), tokens()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(a, fullgraph=True, backend=graphs)
    place, drawn, outputs = kernel.feature_map.omega.data_ptr(), [], []
    for _ in range(4):
        drawn.append(kernel.feature_map.omega.clone())
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], a(x))  # nothing is drawn by looking
        step(a)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(outputs[1], outputs[2])
    assert graphs.frame_count == 1 and kernel.feature_map.omega.data_ptr() == place
    again = PositiveFeatures(D, M, seed=5).double()
    again.redraw()
    assert torch.equal(again.omega, drawn[2])
    state = a.state_dict()
    twin = Attention(DIM, H, head_dim=D, kernel=Performer(PositiveFeatures(D, M, redraw_every=2, seed=5))).double()
    twin.load_state_dict(state)
    for model in (a, twin):  # both draw the same next
        for _ in range(2):
            step(model)
    assert torch.equal(a(x), twin(x))
    a.eval()
    before = kernel.feature_map.omega.clone()
    for _ in range(4):
        step(a)
    assert torch.equal(kernel.feature_map.omega, before)


@pytest.mark.parametrize("name", ("positive", "polynomial"))
@ORDERS
@pytest.mark.parametrize("causal", (False, True))
def test_export(name: str, order: str, causal: bool) -> None:
    a = attention(name, 2, order, causal=causal).eval()
    program = export(a, (tokens(),), dynamic_shapes=({0: Dim("B"), 1: Dim("L", min=2, max=1024)},))
    assert_within(program.module()(tokens(3, 12)), a(tokens(3, 12)), LAW_FLOAT64)


@pytest.mark.parametrize("name", ("positive", "mlp"))
@ORDERS
def test_copies(name: str, order: str) -> None:
    a, x = attention(name, 2, order), tokens()
    fresh = attention(name, 2, order)
    for p in fresh.parameters():
        nn.init.zeros_(p)
    fresh.load_state_dict(a.state_dict())
    with torch.device("meta"):
        empty = attention(name, 2, order)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(a.state_dict())
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), fresh, empty):
        assert torch.equal(a(x), b(x))


def test_fold() -> None:
    a, x = attention("positive", 2), tokens()
    a.position = CayleySTRING(D, 2, init_std=0.3).double()
    a.eval()
    before = a(x, prefix=2)
    a.fold()
    assert_within(a(x, prefix=2), before, LAW_FLOAT64)
    a.unfold()
    with pytest.raises(ValueError, match=r"^Attention.fold: kernel must have order='pre': .*, got 'post'$"):
        attention(order="post").fold()


def test_no_position_makes_orders_equal() -> None:
    a, b = (attention("positive", 2, order, position=False) for order in ("pre", "post"))
    assert torch.equal(a(tokens()), b(tokens()))


def test_repr() -> None:
    assert "Performer(\n    order='post'" in repr(attention(order="post"))
    assert "order='pre', normalize=False" in repr(Performer(ReLUFeatures(D), normalize=False))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    (
        (ReLUFeatures(D), dict(order="both"), "order must be one of 'pre', 'post', got 'both'"),
        (ReLUFeatures(D), dict(order="post", normalize=False), "order must be 'pre' with normalize=False, got 'post'"),
        (
            LearnableFeatures(D),
            dict(normalize=False),
            "feature_map must have a kind with normalize=False: else its scale is free, got LearnableFeatures",
        ),
    ),
)
def test_constructor_errors(features: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Performer: {message}$"):
        Performer(features, **options)


def test_a_feature_map_is_a_module() -> None:
    with pytest.raises(TypeError, match="^Performer: feature_map must be a Module, got str$"):
        Performer("relu")


POST = Performer(PositiveFeatures(D, 16), order="post")
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(kernel=Performer(ReLUFeatures(16))), "kernel must have head_dim=8, got 16"),
        (
            dict(kernel=Performer(PositiveFeatures(D, M, num_heads=2))),
            "kernel must have num_heads=4, the number of key heads, got 2",
        ),
        (dict(kernel=Performer(ReLUFeatures(D)), position=RoPE(16)), "position must have head_dim=8, got 16"),
        (
            dict(kernel=Performer(ReLUFeatures(D)), position=TensorSTRING(D, 4, features=2)),
            "kernel must have head_dim=32, got 8",
        ),
        (
            dict(kernel=Performer(ReLUFeatures(16), order="post"), position=RoPE(16)),
            "kernel must have head_dim=8, got 16",
        ),
        (dict(kernel=POST, position=RoPE(D)), "position must have head_dim=16, got 8"),
        (
            dict(kernel=POST, position=TensorSTRING(16, 4)),
            "position must be a rotation without a factor of its own where it turns features, got TensorSTRING",
        ),
        (
            dict(kernel=POST, position=RoPE(16, scaling=YARN)),
            "position must be a rotation without a factor of its own where it turns features, got RoPE",
        ),
    ),
)
def test_pair_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Attention: {message}$"):
        Attention(DIM, H, head_dim=D, **arguments)


QKV = torch.zeros(2, H, 7, D)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    (
        (dict(q=QKV[..., :4]), ValueError, r"q must have shape \(B, H, L, D\) with D=8, got \(2, 4, 7, 4\)"),
        (dict(k=QKV[:1]), ValueError, r"k must have shape \(B, Hk, S, D\) with B=2, D=8, got \(1, 4, 7, 8\)"),
        (dict(dropout=0.1), NotImplementedError, "dropout must be 0, got 0.1; Softmax drops weights"),
        (dict(cache=LinearCache()), ValueError, "causal must be True with a cache, got False"),
        (
            dict(mask=torch.ones(7, 7, dtype=torch.bool)),
            NotImplementedError,
            r"mask must be boolean, of the shape \(B, 1, 1, S\) of a key padding mask, got bool \(7, 7\); Softmax .*",
        ),
        (
            dict(mask=torch.ones(2, H, 1, 7, dtype=torch.bool)),
            NotImplementedError,
            r"mask must be boolean, of the shape \(B, 1, 1, S\) .*, got bool \(2, 4, 1, 7\); Softmax takes any",
        ),
        (dict(mask=torch.zeros(7)), NotImplementedError, r"mask must be boolean, .*, got float32 \(7,\); Softmax .*"),
        (dict(mask=torch.ones(6).bool()), ValueError, r"mask must broadcast to \(B, H, L, S\) = .*, got \(6,\)"),
        (dict(mask=torch.ones(7).int()), ValueError, "mask must have dtype bool, .*, got int32"),
        (dict(mask=[True] * 7), TypeError, "mask must be a Tensor, got list"),
        (dict(cache=3, causal=True), TypeError, "cache must be a LinearCache, got int"),
    ),
)
def test_forward_errors(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^Performer: {message}$"):
        Performer(ReLUFeatures(D))(**(dict(q=QKV, k=QKV, v=QKV) | arguments))


def test_caches_belong_to_kernels() -> None:
    x = torch.zeros(2, 1, DIM)
    with pytest.raises(TypeError, match=r"^Attention: cache must be a LinearCache, got KVCache$"):
        Attention(DIM, H, causal=True, kernel=Performer(ReLUFeatures(6)))(x, cache=KVCache(2, H, 4, 6))
    with pytest.raises(TypeError, match=r"^Attention: cache must be a KVCache, got LinearCache$"):
        Attention(DIM, H, causal=True)(x, cache=LinearCache())
