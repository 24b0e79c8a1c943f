import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from fastrpe.attention import MultiheadAttention
from fastrpe.positions import CayleySTRING, CirculantSTRING, RoPE, grid_positions
from fastrpe.testing.asserts import LAW_FLOAT64, assert_within
from python_tests.attention.formula import plain

E, H, D, B, L, S = 16, 2, 8, 3, 5, 7

FORMS = list(itertools.product((False, True), repeat=5))


def pair(bias: bool, add_bias_kv: bool, add_zero_attn: bool, sizes: bool, batch_first: bool) -> list[nn.Module]:
    """torch.nn's module and ours, from the same seed, with every parameter away from zero."""
    options = dict(bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn, batch_first=batch_first)
    options |= dict(kdim=6, vdim=10) if sizes else {}
    modules = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(0)
        modules.append(kind(E, H, **options, dtype=torch.float64))
    theirs, ours = modules
    for (name, p), (other, q) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other and torch.equal(p, q)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5)
    ours.load_state_dict(theirs.state_dict())
    return modules


def inputs(kdim: int, vdim: int, batch_first: bool, batched: bool) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    x = [torch.randn(B, n, size, dtype=torch.float64, generator=draw) for n, size in ((L, E), (S, kdim), (S, vdim))]
    if not batched:
        return [t[0] for t in x]
    return x if batch_first else [t.transpose(0, 1) for t in x]


def masks(batched: bool) -> Iterator[dict[str, Tensor | None]]:
    draw = torch.Generator().manual_seed(2)
    for attn, padding in itertools.product((None, bool, float), repeat=2):
        for shape in ((L, S), (B * H if batched else H, L, S)) if attn else ((L, S),):
            a, p = torch.rand(shape, generator=draw), torch.rand((B, S) if batched else (S,), generator=draw)
            a = None if attn is None else (a < 0.3) if attn is bool else a.double()
            p = None if padding is None else (p < 0.3) if padding is bool else p.double()
            for m in (a, p):
                if m is not None and m.dtype == torch.bool:
                    m[..., 0] = False  # torch.nn gives NaN where nothing is allowed
            yield dict(attn_mask=a, key_padding_mask=p)


def assert_same(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected) and len(actual) == len(expected)
    assert_within(actual[0], expected[0], LAW_FLOAT64, name="output")
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert_within(actual[1], expected[1], LAW_FLOAT64, name="weights")


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("batched", (True, False), ids=("batched", "unbatched"))
def test_equals_torch(form: tuple[bool, ...], batched: bool) -> None:
    theirs, ours = pair(*form)
    x = inputs(theirs.kdim, theirs.vdim, theirs.batch_first, batched)
    for mask in masks(batched):
        for need, average in ((False, True), (True, True), (True, False)):
            given = dict(need_weights=need, average_attn_weights=average, **mask)
            assert_same(ours(*x, **given), theirs(*x, **given))


@pytest.mark.parametrize("form", [f for f in FORMS if not f[3]], ids=str)
@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("grad", (False, True))
def test_self_attention_equals_torch(form: tuple[bool, ...], training: bool, grad: bool) -> None:
    theirs, ours = pair(*form)
    theirs.train(training), ours.train(training)
    x = inputs(E, E, theirs.batch_first, True)[0]
    padding = torch.arange(L) >= torch.tensor([L, 3, 1])[:, None]
    for mask, need in itertools.product((None, padding), (False, True)):
        with torch.set_grad_enabled(grad):
            results = [m(x, x, x, key_padding_mask=mask, need_weights=need) for m in (ours, theirs)]
        assert_same(*results)
        if grad:
            gradients = [
                torch.autograd.grad(y.square().sum(), list(m.parameters()))
                for (y, _), m in zip(results, (ours, theirs))
            ]
            for g, h in zip(*gradients):
                assert_within(g, h, LAW_FLOAT64)


@pytest.mark.parametrize("need", (False, True))
@pytest.mark.parametrize("keys", (L, S))
def test_causal_hint_equals_torch(keys: int, need: bool) -> None:
    theirs, ours = pair(True, False, False, False, True)
    q, k, _ = inputs(E, E, True, True)
    causal = torch.ones(L, S, dtype=torch.bool).triu(1)[:, :keys]
    padding = torch.arange(keys).expand(B, keys) >= 4
    for p in (None, padding):
        given = dict(attn_mask=causal, is_causal=True, need_weights=need, key_padding_mask=p)
        assert_same(ours(q, k[:, :keys], k[:, :keys], **given), theirs(q, k[:, :keys], k[:, :keys], **given))


def test_causal_hint_keeps_added_keys() -> None:
    """torch.nn's hint hides the tokens of add_bias_kv, which its mask leaves open; ours says the same in both ways."""
    theirs, ours = pair(True, True, False, False, True)
    q = inputs(E, E, True, True)[0]
    causal = torch.ones(L, L, dtype=torch.bool).triu(1)
    y, _ = ours(q, q, q, attn_mask=causal, is_causal=True, need_weights=False)
    assert_within(y, theirs(q, q, q, attn_mask=causal, is_causal=True)[0], LAW_FLOAT64)
    hidden, _ = theirs(q, q, q, attn_mask=causal, is_causal=True, need_weights=False)
    assert (y - hidden).abs().max() > LAW_FLOAT64


@pytest.mark.parametrize("need", (False, True))
def test_nothing_allowed_gives_zeros(need: bool) -> None:
    _, ours = pair(True, False, False, False, True)
    q = inputs(E, E, True, True)[0].requires_grad_()
    padding = torch.tensor([True, False, False])[:, None].expand(B, L)
    y, _ = ours(q, q, q, key_padding_mask=padding, need_weights=need)
    assert_within(y[0], ours.out_proj.bias.expand(L, E), LAW_FLOAT64)
    assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()


def test_dropout_is_for_training() -> None:
    m, x = MultiheadAttention(E, H, dropout=0.5, batch_first=True), torch.randn(B, L, E)
    for need in (False, True):
        m.train()
        assert not torch.equal(m(x, x, x, need_weights=need)[0], m(x, x, x, need_weights=need)[0])
        m.eval()
        assert torch.equal(m(x, x, x, need_weights=need)[0], m(x, x, x, need_weights=need)[0])


def encoding(kind: type, coords: int = 1) -> nn.Module:
    if kind is RoPE:
        return RoPE(D, coords=coords)
    return kind(D, H, coords=coords, init_std=0.3)


POSITIONS = pytest.mark.parametrize("kind", (RoPE, CayleySTRING, CirculantSTRING))


def encoded(kind: type, coords: int = 1, **options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    return MultiheadAttention(E, H, batch_first=True, position=encoding(kind, coords), **options).double()


def expected(m: MultiheadAttention, q: Tensor, k: Tensor, p: Tensor, r: Tensor, prefix: int, key_prefix: int) -> Any:
    weights = (
        m.in_proj_weight.chunk(3)
        if m.in_proj_weight is not None
        else (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    )
    heads = [
        (x @ w.mT + b).view(*x.shape[:2], H, D).transpose(1, 2)
        for x, w, b in zip((q, k, k), weights, m.in_proj_bias.chunk(3))
    ]
    qh, _ = m.position(heads[0], None, p, prefix=prefix)
    kh, _ = m.position(heads[1], None, r, prefix=key_prefix)
    y, weights = plain(qh, kh, heads[2])
    return m.out_proj(y.transpose(1, 2).flatten(2)), weights


@POSITIONS
@pytest.mark.parametrize("need", (False, True))
@pytest.mark.parametrize("sizes", ({}, dict(kdim=6, vdim=6)))
def test_positions(kind: type, need: bool, sizes: dict[str, int]) -> None:
    m = encoded(kind, 2, **sizes)
    q = torch.randn(B, 7, E, dtype=torch.float64)
    k = torch.randn(B, 10, m.kdim, dtype=torch.float64)
    small, grid = grid_positions(2, 3, dtype=torch.float64), grid_positions(2, 4, dtype=torch.float64)
    y, w = m(
        q,
        k,
        k,
        positions=small,
        key_positions=grid,
        prefix=1,
        key_prefix=2,
        need_weights=need,
        average_attn_weights=False,
    )
    same, weights = expected(m, q, k, small, grid, 1, 2)
    assert_same((y, w), (same, weights if need else None))


@POSITIONS
def test_self_attention_with_prefix(kind: type) -> None:
    m, x = encoded(kind, 2), torch.randn(B, 7, E, dtype=torch.float64)
    grid = grid_positions(2, 3, dtype=torch.float64)
    y, _ = expected(m, x, x, grid, grid, 1, 1)
    for key in (x, x.clone()):  # the keys have the queries' positions, however they are passed
        assert_within(m(x, key, key, positions=grid, prefix=1)[0], y, LAW_FLOAT64)


@POSITIONS
def test_layouts_agree(kind: type) -> None:
    m = encoded(kind)
    x, p = torch.randn(B, L, E, dtype=torch.float64), torch.rand(L, 1, dtype=torch.float64)
    y, _ = m(x, x, x, positions=p)
    assert_within(m(x[1], x[1], x[1], positions=p)[0], y[1], LAW_FLOAT64)
    m.batch_first = False
    z, _ = m(*(x.transpose(0, 1),) * 3, positions=p)
    assert_within(z.transpose(0, 1), y, LAW_FLOAT64)


@POSITIONS
@pytest.mark.parametrize(
    "options", ({}, dict(kdim=E, vdim=6), dict(bias=False), dict(add_bias_kv=True, add_zero_attn=True))
)
def test_fold_and_unfold(kind: type, options: dict[str, Any]) -> None:
    m, x = encoded(kind, **options).eval(), torch.randn(B, L, E, dtype=torch.float64)
    value = x[..., : m.vdim]
    before = m(x, x, value, prefix=1)
    weights = copy.deepcopy(m.state_dict())
    m.fold()
    name = "q_proj_weight" if "vdim" in options else "in_proj_weight"
    assert torch.equal(m.state_dict()[name], weights[name]) == (kind is RoPE)
    assert_same(m(x, x, value, prefix=1), before)
    m.unfold()
    assert_same(m(x, x, value, prefix=1), before)
    assert_within(m.state_dict()[name], weights[name], LAW_FLOAT64)


def test_fold_without_position_does_nothing() -> None:
    m, x = MultiheadAttention(E, H), torch.randn(L, B, E)
    y, _ = m(x, x, x)
    m.fold()
    m.unfold()
    assert torch.equal(m(x, x, x)[0], y)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("training", (False, True))
def test_transformer_encoder_keeps_positions(training: bool) -> None:
    """The encoder's fused inference path would read the weights and leave the positions out."""
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    layer.self_attn = encoded(RoPE)
    encoder = nn.TransformerEncoder(layer, 2).double()
    x = torch.randn(B, L, E, dtype=torch.float64)
    with torch.no_grad():
        y = encoder.train(training)(x)
        assert_within(y, encoder.train()(x), LAW_FLOAT64)
        assert (y - encoder(x.flip(1)).flip(1)).abs().max() > LAW_FLOAT64


def test_reset_parameters_again() -> None:
    a, b = MultiheadAttention(E, H), nn.MultiheadAttention(E, H)
    for m in (a, b):
        torch.manual_seed(3)
        m._reset_parameters()
    assert torch.equal(a.in_proj_weight, b.in_proj_weight)


def test_compile_export_and_copies() -> None:
    torch._dynamo.reset()
    m, x = encoded(CayleySTRING).eval(), torch.randn(B, L, E, dtype=torch.float64)
    z = torch.randn(2, 9, E, dtype=torch.float64)
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")
    program = export(m, (x, x, x), dynamic_shapes=({0: Dim("B"), 1: Dim("L", min=2, max=64)},) * 3)
    for y in (x, z):
        for other in (compiled, program.module(), copy.deepcopy(m)):
            assert_same(other(y, y, y), m(y, y, y))
        part = y[:, :4]
        assert_same(compiled(y, part, part, need_weights=False), m(y, part, part, need_weights=False))


def test_autocast() -> None:
    m, x = encoded(RoPE, add_bias_kv=True).float(), torch.randn(B, L, E)
    with torch.autocast("cpu", torch.bfloat16):
        for need in (False, True):
            y, _ = m(x, x, x, need_weights=need)
            assert y.dtype == torch.bfloat16 and y.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(embed_dim=15), "num_heads must divide embed_dim=15, got 2"),
        (dict(embed_dim=0), "num_heads must divide embed_dim=0, got 2"),
        (dict(num_heads=0), "num_heads must divide embed_dim=16, got 0"),
        (dict(dropout=-0.1), "dropout must lie between 0 and 1, got -0.1"),
        (dict(position=RoPE(4)), "position must have head_dim=8, got 4"),
        (dict(position=CayleySTRING(8, 4)), "position must have num_heads=2, the number of key heads, got 4"),
        (dict(position=nn.Identity()), "position and kernel must be a pair of .*, got Identity with Softmax"),
    ),
)
def test_constructor_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MultiheadAttention: {message}"):
        MultiheadAttention(**(dict(embed_dim=E, num_heads=H) | arguments))


X = torch.zeros(B, L, E)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(query=X[..., :4]), r"query must have shape \(B, L, E\) or \(L, E\) with E=16, got \(3, 5, 4\)"),
        (dict(query=X[None]), r"query must have shape \(B, L, E\) or \(L, E\) with E=16, got \(1, 3, 5, 16\)"),
        (dict(query=X[0]), r"key must have shape \(S, kdim\) with kdim=16, got \(3, 5, 16\)"),
        (dict(key=X[:2]), r"key must have shape \(B, S, kdim\) with kdim=16, B=3, got \(2, 5, 16\)"),
        (dict(value=X[:, :4]), r"value must have shape \(B, S, vdim\) with vdim=16, B=3, S=5, got \(3, 4, 16\)"),
        (
            dict(attn_mask=torch.zeros(L, 4)),
            r"attn_mask must have shape \(L, S\) or \(B \* H, L, S\) with .*, got \(5, 4\)",
        ),
        (dict(attn_mask=torch.zeros(2, L, L)), r"attn_mask must have shape .* L=5, S=5, B \* H=6, got \(2, 5, 5\)"),
        (dict(attn_mask=torch.zeros(L, L).int()), "attn_mask must have dtype bool, .*, got int32"),
        (
            dict(key_padding_mask=torch.zeros(B, 4)),
            r"key_padding_mask must have shape \(B, S\) with B=3, S=5, got \(3, 4\)",
        ),
        (dict(key_padding_mask=torch.zeros(B, L).int()), "key_padding_mask must have dtype bool, .*, got int32"),
        (dict(is_causal=True), "attn_mask must be given with is_causal=True, which is a hint about it, got None"),
    ),
)
def test_forward_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^MultiheadAttention: {message}"):
        MultiheadAttention(E, H, batch_first=True)(**(dict(query=X, key=X, value=X) | arguments))


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="^MultiheadAttention: key must be a Tensor, got NoneType"):
        MultiheadAttention(E, H)(X, None, X)
