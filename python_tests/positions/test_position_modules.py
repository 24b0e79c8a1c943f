"""What every encoding must survive: copies, checkpoints, dtypes, autocast, compile, export; and its error sentences."""

import copy
import io

import pytest
import torch
from torch import nn

from fastrpe.positions import CayleySTRING, CirculantSTRING, RoPE
from fastrpe.positions.rotary import Rotary
from fastrpe.testing.asserts import assert_bitwise
from python_tests.positions.shared import ENCODINGS, HEADS, LENGTH, SIZE, points, tokens


def _marked(module: nn.Module) -> bool:
    return all(getattr(p, "_no_weight_decay", False) for p in module.parameters())


def _assert_same(a: nn.Module, b: nn.Module) -> None:
    q, k, p = tokens(2 * HEADS), tokens(seed=1), points(a.coords, LENGTH - 1)
    for x, y in zip(a(q, k, p, prefix=1), b(q, k, p, prefix=1)):
        assert_bitwise(x, y)


def test_deepcopy(encoding: nn.Module) -> None:
    twin = copy.deepcopy(encoding)
    _assert_same(twin, encoding)
    assert _marked(encoding) and _marked(twin)
    for p in twin.parameters():
        p.data.zero_()
    assert all(p.any() for p in encoding.parameters())


@pytest.mark.parametrize("name", ENCODINGS)
def test_state_dict_round_trip(name: str) -> None:
    encoding, other = ENCODINGS[name](), ENCODINGS[name]()
    with torch.no_grad():
        for p in encoding.parameters():
            p.mul_(1.5)
    file = io.BytesIO()
    torch.save(encoding.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    _assert_same(other, encoding)


def test_what_the_arguments_determine_is_not_in_the_state_dict() -> None:
    assert not RoPE(SIZE, coords=2).state_dict()
    assert set(RoPE(SIZE, coords=2, mode="mixed", num_heads=2).state_dict()) == {"freqs"}
    assert set(CayleySTRING(SIZE, 2, learned=False).state_dict()) == {"skew", "_extra_state"}
    assert set(CirculantSTRING(SIZE, 2).state_dict()) == {"c", "_extra_state"}


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_narrow_dtypes_leave_angles_and_bases_alone(encoding: nn.Module, dtype: torch.dtype) -> None:
    model = nn.Sequential(copy.deepcopy(encoding), nn.Linear(2, 2)).to(dtype)
    assert model[1].weight.dtype == dtype
    for x in (*model[0].parameters(), *model[0].buffers()):
        assert x.dtype == torch.float32
    _assert_same(model[0], encoding)
    assert _marked(model[0])


def test_double_is_double_throughout(encoding: nn.Module) -> None:
    encoding = encoding.double()
    for x in (*encoding.parameters(), *encoding.buffers()):
        assert x.dtype == torch.float64
    q = tokens(dtype=torch.float64)
    assert encoding(q, q, points(encoding.coords))[1].dtype == torch.float64


def test_default_dtype() -> None:
    for default, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        torch.set_default_dtype(default)
        try:
            assert CayleySTRING(SIZE, HEADS).skew.dtype == RoPE(SIZE).freqs.dtype == expected
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ENCODINGS)
def test_construction_on_meta(name: str) -> None:
    with torch.device("meta"):
        encoding = ENCODINGS[name]()
    assert {x.device.type for x in (*encoding.parameters(), *encoding.buffers())} == {"meta"}
    encoding.to_empty(device="cpu")
    assert _marked(encoding)
    encoding.reset_parameters(torch.Generator().manual_seed(0))
    if "mixed" not in name:  # there the generator's draws come in another order or from another seed
        _assert_same(encoding, ENCODINGS[name]())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_autocast_keeps_angles_and_bases_in_float32(encoding: nn.Module, dtype: torch.dtype) -> None:
    q, k = tokens(2 * HEADS), tokens(seed=1)
    far = 1000 + points(encoding.coords, LENGTH - 1)  # whole numbers that bfloat16 does not hold
    encoding.backend = "reference"  # by default it may depend on the dtype that q has before autocast
    basis, freqs = encoding.basis(), encoding.frequencies(LENGTH)
    with torch.autocast("cpu", dtype):
        y = encoding(q, k, far, prefix=1)
        assert_bitwise(encoding.frequencies(LENGTH), freqs)
        if basis is not None:
            assert_bitwise(encoding.basis(), basis)
    for a, b in zip(y, encoding(q.to(dtype), k.to(dtype), far, prefix=1)):
        assert_bitwise(a, b)


def _assert_compiles(encoding: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(encoding, fullgraph=True, backend="eager", dynamic=True)
    for length, offset in ((LENGTH, 0), (7, 3), (LENGTH, 9)):
        q, k = tokens(2 * HEADS, length), tokens(HEADS, length, seed=1)
        p = points(encoding.coords, length - 1)
        expected = encoding(q, k, p, offset=offset, prefix=1)
        for a, b in zip(compiled(q, k, p, offset=offset, prefix=1), expected):
            torch.testing.assert_close(a, b)
        if encoding.coords == 1:
            torch.testing.assert_close(compiled(q, None, offset=offset)[0], encoding(q, None, offset=offset)[0])


def test_compile_fullgraph(encoding: nn.Module) -> None:
    _assert_compiles(encoding)


def test_compile_fullgraph_when_folded(string: nn.Module) -> None:
    string.eval().folded = True
    _assert_compiles(string)


def test_compile_gives_every_gradient(encoding: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(encoding, fullgraph=True, backend="aot_eager")
    q, k, p = tokens(), tokens(seed=1), points(encoding.coords)
    grads = []
    for call in (compiled, encoding):
        inputs = [q.clone().requires_grad_(), k.clone().requires_grad_(), *encoding.parameters()]
        yq, yk = call(inputs[0], inputs[1], p)
        grads.append(torch.autograd.grad((yq * q.flip(2)).sum() + (yk * k.flip(1)).sum(), inputs))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
        assert b.any()


def test_export(encoding: nn.Module) -> None:
    _assert_exports(encoding)


def test_export_when_folded(string: nn.Module) -> None:
    string.eval().folded = True
    _assert_exports(string)


def _assert_exports(encoding: nn.Module) -> None:
    q, k, p = tokens(2 * HEADS), tokens(seed=1), points(encoding.coords, LENGTH - 1)
    program = torch.export.export(encoding, (q, k, p), {"prefix": 1})
    for a, b in zip(program.module()(q, k, p, prefix=1), encoding(q, k, p, prefix=1)):
        torch.testing.assert_close(a, b)


def test_integer_positions_and_defaults() -> None:
    for encoding in (RoPE(SIZE), CayleySTRING(SIZE, HEADS, init_std=0.2)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            q = tokens(dtype=dtype)
            count = torch.arange(LENGTH).unsqueeze(-1)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            expected = encoding(q, q, count.to(wide))
            for y in (encoding(q, q), encoding(q, q, count), encoding(q, q, count.expand(2, -1, -1))):
                assert_bitwise(y[0], expected[0])
                assert_bitwise(y[1], expected[1])
    grid = points(2)
    module = ENCODINGS["rope-axial"]()
    assert_bitwise(module(tokens(), None, grid.long())[0], module(tokens(), None, grid)[0])


def test_offset_is_added_to_positions_given() -> None:
    module, grid = ENCODINGS["rope-mixed"](), points(2)
    assert_bitwise(module(tokens(), None, grid, offset=5)[0], module(tokens(), None, grid + 5)[0])


def test_queries_alone_give_empty_keys(encoding: nn.Module) -> None:
    q, p = tokens(), points(encoding.coords)
    yq, yk = encoding(q, None, p)
    assert yk.shape == (2, 0, LENGTH, SIZE)
    assert_bitwise(yq, encoding(q, q, p)[0])


def test_positions_get_gradients(encoding: nn.Module) -> None:
    p = points(encoding.coords).requires_grad_()
    encoding(tokens(), None, p)[0].sum().backward()
    assert p.grad.abs().sum() > 0


def test_batch_zero_and_length_zero(encoding: nn.Module) -> None:
    for q in (tokens()[:0], tokens()[:, :, :0]):
        y = encoding(q, q, points(encoding.coords, q.shape[2]))
        assert y[0].shape == y[1].shape == q.shape


def test_repr() -> None:
    assert repr(ENCODINGS["rope"]()) == "RoPE(head_dim=16, coords=1, rotary_dim=16, base=10000, mode='axial')"
    assert "scaling='yarn'" in repr(ENCODINGS["rope-yarn"]())
    assert "num_heads=2" in repr(ENCODINGS["cayley"]()) and "init_std=0.2" in repr(ENCODINGS["cayley"]())
    text = repr(ENCODINGS["circulant-block-3"]())
    assert "block=8, init='normal', interleaved=True" in text and "folded" not in text
    module = CirculantSTRING(SIZE, HEADS, backend="reference")
    module.folded = True
    assert repr(module).endswith("backend='reference', folded)")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "q must have shape (B, H, L, D) with D=16, got (2, 2, 12, 8)",
            lambda m, q, p: m(q[..., :8], None, p),
        ),
        (ValueError, "q must have shape (B, H, L, D) with D=16, got (2, 12, 16)", lambda m, q, p: m(q[:, 0], None, p)),
        (ValueError, "positions must be given for C=2 coordinates, got None", lambda m, q, p: m(q, q)),
        (
            ValueError,
            "positions must have shape (L, C) or (B, L, C) with B=2, L=12, C=2, got (12, 1)",
            lambda m, q, p: m(q, q, p[:, :1]),
        ),
        (
            ValueError,
            "positions must have shape (L, C) or (B, L, C) with B=2, L=11, C=2, got (12, 2)",
            lambda m, q, p: m(q, q, p, prefix=1),
        ),
        (TypeError, "positions must be a Tensor, got list", lambda m, q, p: m(q, q, [1])),
        (ValueError, "prefix must lie between 0 and L=12, got 13", lambda m, q, p: m(q, q, p, prefix=13)),
        (ValueError, "prefix must lie between 0 and L=12, got -1", lambda m, q, p: m(q, q, p, prefix=-1)),
        (TypeError, "prefix must be a int or SymInt, got float", lambda m, q, p: m(q, q, p, prefix=1.0)),
        (TypeError, "offset must be a int or SymInt, got float", lambda m, q, p: m(q, q, p, offset=1.0)),
    ],
)
def test_bad_calls_raise(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error) as raised:
        call(ENCODINGS["rope-mixed"](), tokens(), points(2))  # type: ignore[operator]
    assert str(raised.value) == f"RoPE: {message}"


def test_another_number_of_key_heads_raises(string: nn.Module) -> None:
    q, p = tokens(4), points(string.coords)
    with pytest.raises(ValueError, match="with H=4, .*got \\(2, "):
        string(q, q, p)


def test_the_base_has_no_frequencies() -> None:
    with pytest.raises(NotImplementedError):
        Rotary(SIZE, None, 1, False, None)(tokens(), None)


@pytest.mark.gpu
def test_no_call_synchronises_and_all_can_be_captured(encoding: nn.Module) -> None:
    encoding = encoding.cuda()
    q, k, p = tokens().cuda(), tokens(seed=1).cuda(), points(encoding.coords, LENGTH - 1).cuda()

    def step() -> tuple[torch.Tensor, ...]:
        x = q.clone().requires_grad_()
        yq, yk = encoding(x, k, p, prefix=1)
        grads = torch.autograd.grad(yq.square().sum() + yk.sum(), [x, *encoding.parameters()])
        return yq.detach(), yk.detach(), *grads

    expected = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
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
        assert_bitwise(a, b)


@pytest.mark.gpu  # on a CPU the C++ compiler takes most of a minute
@pytest.mark.parametrize("name", ("rope-dynamic", "cayley", "circulant"))
def test_compile_with_inductor(name: str) -> None:
    torch._dynamo.reset()
    module = ENCODINGS[name]().cuda()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for length in (5, LENGTH, LENGTH + 1):
        q = tokens(length=length).cuda()
        torch.testing.assert_close(compiled(q, None)[0], module(q, None)[0])
