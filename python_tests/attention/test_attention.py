import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.func import functional_call

from fastrpe.attention import Attention, KVCache, Softmax
from fastrpe.positions import CayleySTRING, CirculantSTRING, RoPE, grid_positions
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_within
from python_tests.attention.formula import attend

DIM, H, D = 24, 4, 8


def rope(heads: int, coords: int = 1, **options: Any) -> RoPE:
    return RoPE(D, coords=coords, num_heads=heads, learned=True, **options)


def cayley(heads: int, coords: int = 1) -> CayleySTRING:
    return CayleySTRING(D, heads, coords=coords, init_std=0.3)


def circulant(heads: int, coords: int = 1) -> CirculantSTRING:
    return CirculantSTRING(D, heads, coords=coords, init_std=0.3)


POSITIONS = pytest.mark.parametrize("make", (rope, cayley, circulant))
KV = pytest.mark.parametrize("heads", (H, 2, 1))


def attention(
    make: Callable[..., nn.Module] | None = rope, heads: int = H, *, coords: int = 1, **options: Any
) -> Attention:
    torch.manual_seed(0)
    position = None if make is None else make(heads, coords)
    return Attention(DIM, H, num_kv_heads=heads, head_dim=D, position=position, **options).double()


def tokens(B: int = 2, L: int = 7, size: int = DIM, seed: int = 1) -> Tensor:
    return torch.randn(B, L, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", (None, rope, cayley, circulant))
@KV
@pytest.mark.parametrize("causal", (False, True))
def test_self_attention(make: Callable[..., nn.Module] | None, heads: int, causal: bool) -> None:
    a, x = attention(make, heads, causal=causal), tokens()
    assert_within(a(x), attend(a, x), LAW_FLOAT64)


@pytest.mark.parametrize("make", (None, rope, cayley, circulant))
@KV
@pytest.mark.parametrize("causal", (False, True))
def test_cross_attention(make: Callable[..., nn.Module] | None, heads: int, causal: bool) -> None:
    a, x, context = attention(make, heads, causal=causal, context_dim=10, bias=False), tokens(), tokens(L=9, size=10)
    assert_within(a(x, context), attend(a, x, context), LAW_FLOAT64)
    given = dict(positions=torch.rand(7, 1).double(), context_positions=torch.rand(2, 9, 1).double())
    assert_within(a(x, context, **given), attend(a, x, context, **given), LAW_FLOAT64)


@POSITIONS
def test_images_with_prefix(make: Callable[..., nn.Module]) -> None:
    a, x, context = attention(make, 2, coords=2), tokens(L=13), tokens(L=8)
    grid, small = grid_positions(3, 4, dtype=torch.float64), grid_positions(2, 3, dtype=torch.float64)
    given: dict[str, Any] = dict(positions=grid, prefix=1)
    assert_within(a(x, **given), attend(a, x, **given), LAW_FLOAT64)
    given |= dict(context_positions=small, context_prefix=2)
    assert_within(a(x, context, **given), attend(a, x, context, **given), LAW_FLOAT64)


def test_prefix_stands_nowhere() -> None:
    """A prefix token's query meets a prefix token's key the same wherever the others are."""
    a, x = attention(), tokens()
    mask = torch.ones(7, 7, dtype=torch.bool)
    mask[:2, 2:] = False
    p = torch.arange(5.0, dtype=torch.float64)[:, None]
    near, far = (a(x, positions=q, prefix=2, mask=mask)[:, :2] for q in (p, p + 1000))
    assert torch.equal(near, far)


@KV
def test_groups_equal_repeated_heads(heads: int) -> None:
    shared = RoPE(D)
    a = Attention(DIM, H, num_kv_heads=heads, head_dim=D, position=shared, causal=True).double()
    b = Attention(DIM, H, head_dim=D, position=shared, causal=True).double()
    state = a.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (heads, D)).repeat_interleave(H // heads, 0).flatten(0, 1)
    b.load_state_dict(state)
    assert_within(a(tokens()), b(tokens()), LAW_FLOAT64)


def test_causal_sees_no_later_token() -> None:
    a, x = attention(causal=True), tokens()
    changed = x.clone()
    changed[:, 4:] += 1
    y, z = a(x), a(changed)
    assert torch.equal(y[:, :4], z[:, :4]) and not torch.equal(y[:, 4:], z[:, 4:])


def test_masks() -> None:
    a, x = attention(heads=2), tokens()
    pairs = torch.rand(2, H, 7, 7, generator=torch.Generator().manual_seed(2)) < 0.7
    added = torch.randn(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    keys = torch.arange(7) < torch.tensor([5, 7])[:, None]
    for mask in (None, pairs, added):
        assert_within(a(x, mask=mask), attend(a, x, mask=mask), LAW_FLOAT64)
        both = keys[:, None, None]
        if mask is not None:
            both = mask & both if mask.dtype == torch.bool else mask.masked_fill(~both, -torch.inf)
        assert_within(a(x, mask=mask, key_mask=keys), attend(a, x, mask=both), LAW_FLOAT64)


def test_padding_equals_absence() -> None:
    a, x = attention(causal=False), tokens()
    y = a(x, key_mask=torch.arange(7).expand(2, 7) < 5)
    assert_within(y[:, :5], a(x[:, :5]), LAW_FLOAT64)


@POSITIONS
@KV
@pytest.mark.parametrize("chunks", ([1] * 7, [4, 1, 1, 1], [3, 4], [2, 3, 2]))
@torch.no_grad()
def test_decode_equals_full_pass(make: Callable[..., nn.Module], heads: int, chunks: list[int]) -> None:
    a, x = attention(make, heads, causal=True), tokens()
    cache = KVCache(2, heads, 8, D, dtype=torch.float64)
    for _ in range(2):
        y = torch.cat([a(part, cache=cache) for part in x.split(chunks, 1)], 1)
        assert cache.length == 7
        assert_within(y, a(x), LAW_FLOAT64)
        cache.reset()


@torch.no_grad()
def test_decode_with_prefix_positions_and_padding() -> None:
    a, x = attention(causal=True), tokens()
    keys = torch.arange(7) >= torch.tensor([2, 0])[:, None]
    positions = (torch.arange(7.0).double() - torch.tensor([[2.0], [0.0]])).unsqueeze(-1)
    cache = KVCache(2, H, 7, D, dtype=torch.float64)
    first = a(x[:, :4], cache=cache, prefix=3)
    rest = [a(x[:, i : i + 1], cache=cache) for i in (4, 5, 6)]
    assert_within(torch.cat((first, *rest), 1), a(x, prefix=3), LAW_FLOAT64)
    cache.reset()
    parts = [
        a(x[:, i:j], cache=cache, positions=positions[:, i:j], key_mask=keys[:, :j])
        for i, j in ((0, 5), (5, 6), (6, 7))
    ]
    assert_within(torch.cat(parts, 1), a(x, positions=positions, key_mask=keys), LAW_FLOAT64)


@POSITIONS
@pytest.mark.parametrize("shift", (1.5, -37.0, 1000.0))
def test_shift_changes_nothing(make: Callable[..., nn.Module], shift: float) -> None:
    a, x, context = attention(make, 2), tokens(), tokens(L=9)
    p, r = torch.rand(2, 7, 1).double() * 10, torch.rand(9, 1).double() * 10
    assert_within(a(x, positions=p + shift), a(x, positions=p), LAW_FLOAT64)
    moved = a(x, context, positions=p + shift, context_positions=r + shift)
    assert_within(moved, a(x, context, positions=p, context_positions=r), LAW_FLOAT64)
    assert (a(x, positions=p * 2) - a(x, positions=p)).abs().max() > LAW_FLOAT64  # the encoding is not idle


@POSITIONS
@KV
def test_fold_and_unfold(make: Callable[..., nn.Module], heads: int) -> None:
    a, x, context = attention(make, heads).eval(), tokens(), tokens(L=9)
    before, cross = a(x, prefix=2), a(x, context, prefix=1, context_prefix=3)
    weights = copy.deepcopy(a.state_dict())
    a.fold()
    if make is not rope:
        assert not torch.equal(a.q_proj.weight, weights["q_proj.weight"])
    assert_within(a(x, prefix=2), before, LAW_FLOAT64)
    assert_within(a(x, context, prefix=1, context_prefix=3), cross, LAW_FLOAT64)
    a.unfold()
    assert_within(a(x, prefix=2), before, LAW_FLOAT64)
    for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"):
        assert_within(a.state_dict()[name], weights[name], LAW_FLOAT64, name=name)


def test_fold_without_position_does_nothing() -> None:
    a, x = attention(None), tokens()
    y = a(x)
    a.fold()
    a.unfold()
    assert torch.equal(a(x), y)


@pytest.mark.parametrize("make", (rope, cayley))
def test_gradcheck(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    position = RoPE(2, num_heads=1, learned=True) if make is rope else CayleySTRING(2, 1, init_std=0.3)
    a = Attention(4, 2, num_kv_heads=1, head_dim=2, causal=True, position=position).double()
    names = [n for n, _ in a.named_parameters()]
    p = torch.rand(2, 1, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, p: Tensor, *values: Tensor) -> Tensor:
        return functional_call(a, dict(zip(names, values)), (x,), dict(positions=p, prefix=1))

    values = [v.detach().requires_grad_() for v in a.parameters()]
    assert torch.autograd.gradcheck(call, (tokens(1, 3, 4).requires_grad_(), p, *values))


@POSITIONS
@pytest.mark.parametrize("context", (False, True))
def test_autocast(make: Callable[..., nn.Module], context: bool) -> None:
    a = attention(make, 2, causal=True)
    x, z = (t.float().double() for t in (tokens(L=33), tokens(L=40)))
    exact = a(x, z if context else None)
    a, x, z = a.float(), x.float(), z.float() if context else None
    with torch.autocast("cpu", torch.bfloat16):
        y, same = a(x, z), attend(a, x, z)
    assert y.dtype == torch.bfloat16
    assert_accurate(y, same.to(y.dtype), exact)
    (y.float().square().sum()).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in a.parameters())


@torch.no_grad()
def test_autocast_decode() -> None:
    a, x = attention(causal=True).float(), tokens().float()
    cache = KVCache(2, H, 8, D, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        full = a(x)
        y = torch.cat([a(part, cache=cache) for part in x.split(2, 1)], 1)
    assert_accurate(y, full, a.double()(x.double()))


@pytest.mark.parametrize(
    ("make", "heads", "causal", "cross"),
    ((rope, 2, True, False), (cayley, H, True, True), (circulant, 2, False, False)),
)
def test_compile(make: Callable[..., nn.Module], heads: int, causal: bool, cross: bool) -> None:
    torch._dynamo.reset()
    a = attention(make, heads, causal=causal)
    compiled = torch.compile(a, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (5, 8):
        x, S = tokens(L=L), L + 3
        given = dict(context=tokens(L=S), key_mask=torch.arange(S).expand(2, -1) < 4) if cross else dict(prefix=1)
        y, z = compiled(x, **given), a(x, **given)
        assert_within(y, z, LAW_FLOAT64)
        grads = (torch.autograd.grad(r.square().sum(), list(a.parameters())) for r in (y, z))
        for g, h in zip(*grads):
            assert_within(g, h, LAW_FLOAT64)


@torch.no_grad()
def test_compile_inductor() -> None:
    torch._dynamo.reset()
    a = attention(causal=True)
    compiled = torch.compile(a, fullgraph=True, dynamic=True)
    for L in (5, 8):
        assert_within(compiled(tokens(L=L)), a(tokens(L=L)), LAW_FLOAT64)


@torch.no_grad()
def test_compiled_decode_settles() -> None:
    torch._dynamo.reset()
    a, x = attention(heads=2, causal=True), tokens()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(a, fullgraph=True, dynamic=True, backend=graphs)
    cache = KVCache(2, 2, 8, D, dtype=torch.float64)
    first = [compiled(part, cache=cache) for part in x[:, :5].split([3, 1, 1], 1)]
    count = graphs.frame_count
    y = torch.cat([*first, *(compiled(x[:, i : i + 1], cache=cache) for i in (5, 6))], 1)
    assert_within(y, a(x), LAW_FLOAT64)
    assert cache.length == 7 and graphs.frame_count == count


@POSITIONS
@pytest.mark.parametrize("heads", (H, 2))
@pytest.mark.parametrize("causal", (False, True))
def test_export(make: Callable[..., nn.Module], heads: int, causal: bool) -> None:
    a = attention(make, heads, causal=causal).eval()
    sizes = {0: Dim("B"), 1: Dim("L", min=2, max=1024)}
    program = export(a, (tokens(),), dynamic_shapes=(sizes,))
    assert_within(program.module()(tokens(3, 12)), a(tokens(3, 12)), LAW_FLOAT64)


def test_export_cross_attention() -> None:
    a = attention(heads=2, context_dim=10).eval()
    B = Dim("B")
    sizes = {0: B, 1: Dim("L", min=2, max=64)}, {0: B, 1: Dim("S", min=2, max=64)}
    program = export(a, (tokens(), tokens(L=9, size=10)), dynamic_shapes=sizes)
    given = tokens(3, 12), tokens(3, 5, 10)
    assert_within(program.module()(*given), a(*given), LAW_FLOAT64)


@POSITIONS
def test_copies(make: Callable[..., nn.Module]) -> None:
    a, x = attention(make, 2), tokens()
    fresh = attention(make, 2)
    nn.init.zeros_(fresh.q_proj.weight)
    fresh.load_state_dict(a.state_dict())
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), fresh):
        assert torch.equal(a(x), b(x))
        assert {n for n, p in b.named_parameters() if getattr(p, "_no_weight_decay", False)} == {
            n for n, p in a.named_parameters() if getattr(p, "_no_weight_decay", False)
        }
    assert set(attention(None).state_dict()) == {
        f"{name}.{part}" for name in ("q_proj", "k_proj", "v_proj", "out_proj") for part in ("weight", "bias")
    }


def test_dropout_is_for_training() -> None:
    a, x = attention(dropout=0.5), tokens()
    assert not torch.equal(a(x), a(x))
    a.eval()
    assert torch.equal(a(x), a(x))


def test_kernel_plug() -> None:
    class Halved(Softmax):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            return super().forward(q, k, v / 2, **options)

    a, x = attention(bias=False), tokens()
    y = a(x)
    a.kernel = Halved()
    assert_within(a(x), y / 2, LAW_FLOAT64)


def test_repr() -> None:
    assert "24, 4, num_kv_heads=2, head_dim=8, causal=True" in repr(attention(heads=2, causal=True))


PAIRS = (
    r"position and kernel must be a pair of None, RoPE, CayleySTRING, CirculantSTRING or .* with Softmax or .*, got "
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(dim=30), "num_heads must divide dim=30 where head_dim is not given, got 4"),
        (dict(num_heads=0), "num_heads must divide dim=32 .*, got 0"),
        (dict(dim=0), "num_heads must divide dim=0 .*, got 4"),
        (dict(num_kv_heads=3), "num_kv_heads must divide num_heads=4, got 3"),
        (dict(num_kv_heads=0), "num_kv_heads must divide num_heads=4, got 0"),
        (dict(dropout=1.5), "dropout must lie between 0 and 1, got 1.5"),
        (dict(position=RoPE(16)), "position must have head_dim=8, got 16"),
        (dict(position=cayley(2)), "position must have num_heads=4, the number of key heads, got 2"),
        (dict(position=nn.Linear(8, 8)), PAIRS + "Linear with Softmax"),
        (dict(position="rope"), PAIRS + "str with Softmax"),
        (dict(kernel=RoPE(8)), PAIRS + "None with RoPE"),
        (dict(position=RoPE(8), kernel=nn.Identity()), PAIRS + "RoPE with Identity"),
    ),
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Attention: {message}"):
        Attention(**(dict(dim=32, num_heads=4) | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(x=tokens(size=5)), r"x must have shape \(B, L, dim\) with dim=24, got \(2, 7, 5\)"),
        (dict(x=tokens()[0]), r"x must have shape \(B, L, dim\) with dim=24, got \(7, 24\)"),
        (dict(context=tokens()), r"context must have shape .* with B=2, context_dim=10, got \(2, 7, 24\)"),
        (dict(context=tokens(3, size=10)), r"context must have shape .* with B=2, context_dim=10, got \(3, 7, 10\)"),
        (dict(), r"context must have shape \(B, S, 10\), got None"),
    ),
)
def test_forward_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Attention: {message}"):
        attention(context_dim=10)(**(dict(x=tokens()) | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(context_positions=torch.zeros(7, 1)), "context must be given with context_positions or context_prefix"),
        (dict(context_prefix=1), "context must be given with context_positions or context_prefix, got None"),
        (dict(mask=torch.ones(2, 7)), r"mask must broadcast to \(B, H, L, S\) = \(2, 4, 7, 7\), got \(2, 7\)"),
        (dict(mask=torch.ones(7, 7).int()), "mask must have dtype bool, .*, got int32"),
        (dict(key_mask=torch.ones(2, 6).bool()), r"key_mask must have shape \(B, S\) with B=2, S=7, got \(2, 6\)"),
        (dict(key_mask=torch.ones(2, 7)), "key_mask must have dtype bool, got float32"),
        (dict(context=tokens(), cache=KVCache(2, H, 8, D)), "cache must be None with a context, got KVCache"),
    ),
)
def test_self_attention_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^Attention: {message}"):
        attention()(**(dict(x=tokens()) | arguments))


def test_two_coordinates_need_positions() -> None:
    with pytest.raises(ValueError, match="positions must"):
        attention(coords=2)(tokens())
