"""`rotate` and `rotate_cos_sin` by what they promise: errors, isolation of rows, precision far out, prefix, laws."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrpe.backend import available
from fastrpe.ops import rotate, rotate_cos_sin
from fastrpe.ops.rotary import reference
from fastrpe.testing.asserts import FAR_POSITION, LAW_FLOAT64, assert_bitwise, assert_far, assert_within
from fastrpe.testing.cases import Arguments, case, rope_freqs

CPU = torch.device("cpu")
B, H, Hk, L, D, C, R = 2, 4, 2, 5, 8, 2, 4


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    draw = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=draw).to(device, dtype)


def good(op: Callable[..., Any]) -> Arguments:
    qk = dict(q=tensor(B, H, L, D), k=tensor(B, Hk, L, D))
    if op is rotate_cos_sin:
        return qk | dict(cos=tensor(L, R), sin=tensor(L, R))
    return qk | dict(positions=tensor(L, C), freqs=tensor(C, R), basis=tensor(Hk, D, D))


# Bad input -----------------------------------------------------------------------------------------------------------

QK: list[tuple[Arguments, type[Exception], str]] = [
    (dict(q=[1.0]), TypeError, "q must be a Tensor, got list"),
    (dict(q=None), TypeError, "q must be a Tensor, got NoneType"),
    (dict(q=tensor(H, L, D)), ValueError, "q must have shape (B, H, L, D), got (4, 5, 8)"),
    (
        dict(q=tensor(B, H, L, D).int()),
        ValueError,
        "q must have dtype float16, bfloat16, float32, float64, got int32",
    ),
    (
        dict(q=tensor(B, H, L, D).to(torch.complex64)),
        ValueError,
        "q must have dtype float16, bfloat16, float32, float64, got complex64",
    ),
    (dict(k="k"), TypeError, "k must be a Tensor, got str"),
    (dict(k=tensor(Hk, L, D)), ValueError, "k must have shape (B, Hk, L, D) with B=2, L=5, D=8, got (2, 5, 8)"),
    (dict(k=tensor(3, Hk, L, D)), ValueError, "k must have shape (B, Hk, L, D) with B=2, L=5, D=8, got (3, 2, 5, 8)"),
    (dict(k=tensor(B, Hk, 6, D)), ValueError, "k must have shape (B, Hk, L, D) with B=2, L=5, D=8, got (2, 2, 6, 8)"),
    (dict(k=tensor(B, Hk, L, 6)), ValueError, "k must have shape (B, Hk, L, D) with B=2, L=5, D=8, got (2, 2, 5, 6)"),
    (dict(k=tensor(B, 3, L, D)), ValueError, "k must have a number of heads that divides H=4, got 3"),
    (dict(k=tensor(B, 0, L, D)), ValueError, "k must have a number of heads that divides H=4, got 0"),
    (dict(k=tensor(B, 8, L, D)), ValueError, "k must have a number of heads that divides H=4, got 8"),
    (dict(k=tensor(B, Hk, L, D).bfloat16()), ValueError, "k must have dtype float32, got bfloat16"),
    (dict(k=tensor(B, Hk, L, D, device="meta")), ValueError, "k must be on the device of q, cpu, got meta"),
    (dict(prefix=1.0), TypeError, "prefix must be a int or SymInt, got float"),
    (dict(prefix=None), TypeError, "prefix must be a int or SymInt, got NoneType"),
    (dict(prefix=-1), ValueError, "prefix must lie between 0 and L=5, got -1"),
    (dict(prefix=6), ValueError, "prefix must lie between 0 and L=5, got 6"),
    (dict(interleaved="yes"), TypeError, "interleaved must be a bool, got str"),
    (dict(interleaved=None), TypeError, "interleaved must be a bool, got NoneType"),
    (dict(inverse=1.5), TypeError, "inverse must be a bool, got float"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'reference', 'native', 'triton', got 'cuda'"),
    (dict(backend=1), ValueError, "backend must be one of 'reference', 'native', 'triton', got 1"),
]

FLOATS = "float16, bfloat16, float32, float64"

ROTATE: list[tuple[Arguments, type[Exception], str]] = [
    (dict(positions=None), TypeError, "positions must be a Tensor, got NoneType"),
    (dict(positions=3.0), TypeError, "positions must be a Tensor, got float"),
    (
        dict(positions=tensor(L)),
        ValueError,
        "positions must have shape (L, C) or (B, L, C) with B=2, L=5, got (5,)",
    ),
    (
        dict(positions=tensor(6, C)),
        ValueError,
        "positions must have shape (L, C) or (B, L, C) with B=2, L=5, got (6, 2)",
    ),
    (
        dict(positions=tensor(3, L, C)),
        ValueError,
        "positions must have shape (L, C) or (B, L, C) with B=2, L=5, got (3, 5, 2)",
    ),
    (
        dict(prefix=1),  # positions of the prefix too
        ValueError,
        "positions must have shape (L, C) or (B, L, C) with B=2, L=4, got (5, 2)",
    ),
    (dict(positions=tensor(L, 0)), ValueError, "positions must have C = 1 to 4 coordinates, got 0"),
    (dict(positions=tensor(L, 5)), ValueError, "positions must have C = 1 to 4 coordinates, got 5"),
    (dict(positions=torch.zeros(L, C).long()), ValueError, f"positions must have dtype {FLOATS}, got int64"),
    (dict(positions=tensor(L, C, device="meta")), ValueError, "positions must be on the device of q, cpu, got meta"),
    (dict(freqs=None), TypeError, "freqs must be a Tensor, got NoneType"),
    (dict(freqs=tensor(R)), ValueError, "freqs must have shape (C, R) or (H, C, R) with H=2, C=2, got (4,)"),
    (dict(freqs=tensor(3, R)), ValueError, "freqs must have shape (C, R) or (H, C, R) with H=2, C=2, got (3, 4)"),
    (dict(freqs=tensor(H, C, R)), ValueError, "freqs must have shape (C, R) or (H, C, R) with H=2, C=2, got (4, 2, 4)"),
    (dict(freqs=tensor(1, C, R)), ValueError, "freqs must have shape (C, R) or (H, C, R) with H=2, C=2, got (1, 2, 4)"),
    (dict(freqs=tensor(C, 5)), ValueError, "freqs must have at most R = D // 2 = 4 planes, got 5"),
    (dict(freqs=torch.ones(C, R).int()), ValueError, f"freqs must have dtype {FLOATS}, got int32"),
    (dict(freqs=tensor(C, R, device="meta")), ValueError, "freqs must be on the device of q, cpu, got meta"),
    (dict(basis=1.0), TypeError, "basis must be a Tensor, got float"),
    (dict(basis=tensor(D)), ValueError, "basis must have shape (D, D) or (H, D, D) with H=2, D=8, got (8,)"),
    (dict(basis=tensor(D, 6)), ValueError, "basis must have shape (D, D) or (H, D, D) with H=2, D=8, got (8, 6)"),
    (dict(basis=tensor(H, D, D)), ValueError, "basis must have shape (D, D) or (H, D, D) with H=2, D=8, got (4, 8, 8)"),
    (dict(basis=torch.eye(D).int()), ValueError, f"basis must have dtype {FLOATS}, got int32"),
    (dict(basis=tensor(D, D, device="meta")), ValueError, "basis must be on the device of q, cpu, got meta"),
    (dict(factor="2"), TypeError, "factor must be a float or int, got str"),
    (dict(factor=None), TypeError, "factor must be a float or int, got NoneType"),
    (dict(factor=tensor(1)), TypeError, "factor must be a float or int, got Tensor"),
]

COS_SIN: list[tuple[Arguments, type[Exception], str]] = [
    (dict(cos=None), TypeError, "cos must be a Tensor, got NoneType"),
    (dict(cos=tensor(R)), ValueError, "cos must have shape (L, R) or (B, L, R) with B=2, L=5, got (4,)"),
    (dict(cos=tensor(6, R)), ValueError, "cos must have shape (L, R) or (B, L, R) with B=2, L=5, got (6, 4)"),
    (dict(cos=tensor(3, L, R)), ValueError, "cos must have shape (L, R) or (B, L, R) with B=2, L=5, got (3, 5, 4)"),
    (
        dict(cos=tensor(L, 5), sin=tensor(L, 5)),
        ValueError,
        "cos must have at most R = D // 2 = 4 planes, got 5",
    ),
    (dict(cos=torch.ones(L, R).int()), ValueError, f"cos must have dtype {FLOATS}, got int32"),
    (dict(cos=tensor(L, R, device="meta")), ValueError, "cos must be on the device of q, cpu, got meta"),
    (dict(sin=None), TypeError, "sin must be a Tensor, got NoneType"),
    (dict(sin=tensor(L, 3)), ValueError, "sin must have the shape of cos, (5, 4), got (5, 3)"),
    (dict(sin=tensor(B, L, R)), ValueError, "sin must have the shape of cos, (5, 4), got (2, 5, 4)"),
    (dict(sin=torch.ones(L, R).int()), ValueError, f"sin must have dtype {FLOATS}, got int32"),
    (dict(sin=tensor(L, R, device="meta")), ValueError, "sin must be on the device of q, cpu, got meta"),
]


def _describe(value: object) -> str:
    return f"{tuple(value.shape)}-{value.dtype}-{value.device}" if isinstance(value, Tensor) else repr(value)


BAD = [
    pytest.param(
        op, wrong, error, message, id=f"{op.__name__}-" + "-".join(f"{n}={_describe(x)}" for n, x in wrong.items())
    )
    for op, more in ((rotate, ROTATE), (rotate_cos_sin, COS_SIN))
    for wrong, error, message in QK + more
    if not (op is rotate_cos_sin and "number of heads" in message and "got 8" in message)
]


@pytest.mark.parametrize(("op", "wrong", "error", "message"), BAD)
def test_bad_input(op: Callable[..., Any], wrong: Arguments, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(f"{op.__name__}: {message}") + "$"):
        op(**good(op) | wrong)


def test_keys_decide_per_head_shapes_without_keys() -> None:
    """Without keys, per-head frequencies and bases may serve any groups of query heads, but only whole ones."""
    arguments = good(rotate) | dict(k=None, basis=None)
    for sets in (1, 2, 4):
        rotate(**arguments | dict(freqs=tensor(sets, C, R)))
    with pytest.raises(
        ValueError, match=re.escape("freqs must have shape (C, R) or (H, C, R) with H=4, C=2, got (3, 2, 4)")
    ):
        rotate(**arguments | dict(freqs=tensor(3, C, R)))
    with pytest.raises(
        ValueError, match=re.escape("basis must have shape (D, D) or (H, D, D) with H=4, D=8, got (3, 8, 8)")
    ):
        rotate(**arguments | dict(basis=tensor(3, D, D)))


@pytest.mark.parametrize("backend", [b for b in available("cpu") if b != "triton"])
@pytest.mark.parametrize("op", (rotate, rotate_cos_sin))
def test_forward_mode_raises(op: Callable[..., Any], backend: str) -> None:
    """A tangent is refused on whichever input it comes, never dropped."""
    arguments = good(op)
    for name, x in arguments.items():
        with pytest.raises(NotImplementedError) as error:
            torch.func.jvp(lambda x, name=name: op(**arguments | {name: x}, backend=backend), (x,), (x,))
        words = f"{op.__name__}: inputs must have no forward-mode tangents, got one; use reverse mode"
        assert str(error.value) == words, name


def test_missing_backend() -> None:
    """A backend that is named and not there is an error that says how to mend it, never another backend."""
    meta = {n: x.to("meta") for n, x in good(rotate).items()}
    with pytest.raises(
        RuntimeError, match="rotate: backend must be available on meta, got 'native': there are no native"
    ):
        rotate(**meta, backend="native")


def test_meta_tensors() -> None:
    """Shapes alone can be asked for."""
    meta = {n: x.to("meta") for n, x in good(rotate).items()}
    q, k = rotate(**meta)
    assert (q.shape, k.shape, q.device.type) == ((B, H, L, D), (B, Hk, L, D), "meta")


def test_queries_alone_give_an_empty_key(device: torch.device, backend: str) -> None:
    arguments = case("rotate", "tiny-queries-alone").make(device, torch.float32, 0)
    _, k = rotate(**arguments, backend=backend)
    assert k.shape == (2, 0, 3, 4)


# Rows that are not finite reach no other -----------------------------------------------------------------------------

SPOILED = [float("nan"), float("inf"), float("-inf")]
ISOLATION = ("tiny-image-gqa-prefix", "tiny-basis", "tiny-basis-inverse", "tiny-basis-16", "tiny-packed-partial")
NATIVE_ISOLATION = ("vit-197-cayley", "gqa-mixed", "basis-prefix-gqa", "packed-prefix-mixed", "ragged-65")


def _isolation(device: torch.device, backend: str, name: str) -> Arguments:
    if name not in ISOLATION and backend == "triton" and device.type == "cpu":
        pytest.skip("interpreted Triton kernels run the tiny cases alone")
    return case("rotate", name).make(device, torch.bfloat16, 0)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Tokens (B, H, L) at which two results differ in any bit but those of equal NaNs."""
    return ~torch.isclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True).all(-1)


@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize("name", ISOLATION + NATIVE_ISOLATION)
def test_spoiled_row_of_q(name: str, device: torch.device, backend: str, value: float) -> None:
    arguments = _isolation(device, backend, name)
    clean = rotate(**arguments, backend=backend)
    token = arguments["q"].shape[2] - 1
    arguments["q"] = arguments["q"].clone()
    arguments["q"][1 % len(clean[0]), 1, token, 0] = value
    q, k = rotate(**arguments, backend=backend)
    where = torch.zeros_like(q[..., 0], dtype=torch.bool)
    where[1 % len(clean[0]), 1, token] = True
    assert not _differ(q, clean[0])[~where].any() and not q[where].isfinite().all()
    assert_bitwise(k, clean[1])


@pytest.mark.parametrize("value", SPOILED)
@pytest.mark.parametrize("name", ISOLATION + NATIVE_ISOLATION)
def test_spoiled_position(name: str, device: torch.device, backend: str, value: float) -> None:
    """A position that is not finite spoils its token in all heads (of its sequence) and no other."""
    arguments = _isolation(device, backend, name)
    clean = rotate(**arguments, backend=backend)
    arguments["positions"] = arguments["positions"].clone()
    arguments["positions"][..., -1, 0] = value
    if arguments["positions"].dim() == 3:
        arguments["positions"][1:] = case("rotate", name).make(device, torch.bfloat16, 0)["positions"][1:]
    spoiled = rotate(**arguments, backend=backend)
    for y, expected in zip(spoiled, clean):
        where = torch.zeros_like(y[..., 0], dtype=torch.bool)
        where[: 1 if arguments["positions"].dim() == 3 else None, :, -1] = True
        assert not _differ(y, expected)[~where].any()
        assert y[where].isnan().any(-1).all()


@pytest.mark.parametrize("name", ("tiny-basis", "vit-197-cayley"))
def test_spoiled_head_of_basis_and_freqs(name: str, device: torch.device, backend: str) -> None:
    """What one head alone reads spoils no other head."""
    arguments = _isolation(device, backend, name)
    clean = rotate(**arguments, backend=backend)
    for argument in ("basis", "freqs"):
        spoiled = arguments[argument].clone()
        spoiled[0, 0, 0] = torch.nan
        for y, expected in zip(rotate(**arguments | {argument: spoiled}, backend=backend), clean):
            assert_bitwise(y[:, 1:], expected[:, 1:])
            assert y[:, 0, arguments["prefix"] :].isnan().any(-1).all()


@pytest.mark.parametrize("name", ("tiny-image-gqa-prefix", "tiny-basis", "vit-197-cayley", "vit-197"))
def test_spoiled_row_of_gradient(name: str, device: torch.device, backend: str) -> None:
    """So too backward: a row of dq depends on its own row of dy."""
    arguments = _isolation(device, backend, name)
    q = arguments["q"].detach().requires_grad_()
    y, _ = rotate(**arguments | dict(q=q), backend=backend)
    dy = torch.randn_like(y)
    (clean,) = torch.autograd.grad(y, q, dy, retain_graph=True)
    dy[0, 0, -1, 0] = torch.nan
    (spoiled,) = torch.autograd.grad(y, q, dy)
    where = torch.zeros_like(y[..., 0], dtype=torch.bool)
    where[0, 0, -1] = True
    assert not _differ(spoiled, clean)[~where].any() and spoiled[where].isnan().any()


# Far out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", (False, True), ids=("forward", "inverse"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("coords", (1, 2, 3, 4))
def test_far_positions(device: torch.device, backend: str, coords: int, dtype: torch.dtype, inverse: bool) -> None:
    """To |position| = 1e6, whole and fractional, against float64 at the same float32 frequencies and positions."""
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("interpreted Triton kernels truncate to bfloat16")
    draw = torch.Generator(device).manual_seed(coords)
    tokens = 16 if backend == "triton" and device.type == "cpu" else 512
    exponents = torch.rand(tokens, coords, device=device, generator=draw) * 2 - 1
    positions = FAR_POSITION * exponents.sign() * exponents.abs() ** 4
    positions[::2].round_()
    positions[0], positions[1] = FAR_POSITION, -FAR_POSITION
    freqs = torch.rand(coords, 32, device=device, generator=draw) * 2 - 1
    freqs[:, :16] = rope_freqs(1, 16).to(freqs)
    q = torch.randn(1, 2, tokens, 64, device=device, generator=draw).to(dtype)
    y = rotate(q, q, positions, freqs, inverse=inverse, backend=backend)
    exact = reference.rotate(q.double(), q.double(), positions, freqs, inverse=inverse)
    for name, actual, expected in zip("qk", y, exact):
        assert_far(tuple(actual.chunk(2, -1)), tuple(expected.chunk(2, -1)), name=name)


# A basis in any dtype and layout -------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": Tensor.contiguous,
    "columns": lambda P: P.mT.contiguous().mT,
    "strided": lambda P: torch.stack((P, P), -1)[..., 0],
    "shifted": lambda P: torch.cat((P.new_zeros(1), P.flatten()))[1:].view_as(P),
    "expanded": lambda P: P[:1].expand_as(P),
}


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="only Hopper's kernels round it",
)
@pytest.mark.parametrize("inverse", (False, True), ids=("forward", "inverse"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", ("64", "64-interleaved", "128", "128-many"))
def test_fused_basis(size: str, layout: str, dtype: torch.dtype, inverse: bool) -> None:
    """A basis in float32, or of another layout, gives the bits of one rounded to q's dtype with contiguous rows."""
    heads, tokens, D = (16, 2100, 128) if size == "128-many" else (3, 197, int(size.partition("-")[0]))
    draw = torch.Generator("cuda").manual_seed(D)
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=draw)
    q, k, dq, dk = (normal(1, heads, tokens, D).to(dtype) for _ in range(4))
    positions, freqs = normal(tokens - 1, 2), normal(2, D // 2)
    P = LAYOUTS[layout](torch.linalg.qr(normal(heads, D, D))[0].contiguous())
    options: Arguments = dict(prefix=1, inverse=inverse, interleaved=size.endswith("interleaved"), backend="native")

    def run(basis: Tensor, *learned: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        y = rotate(*leaves, positions, freqs, basis, **options)
        return [*y, *torch.autograd.grad(y, [*leaves, *learned], (dq, dk))]

    expected = run(P.to(dtype).contiguous())
    for basis in (P, P.to(dtype)):
        for actual, wanted in zip(run(basis), expected):
            assert_bitwise(actual, wanted)
    if inverse or size == "128-many":
        return  # unfused, whose products keep the basis in float32; or as above
    rounded, learned = (x.detach().requires_grad_() for x in (P.to(dtype).contiguous(), P))
    *expected, dP = run(rounded, rounded)
    *results, dbasis = run(learned, learned)
    for actual, wanted in zip(results, expected):
        assert_bitwise(actual, wanted)
    assert dbasis.dtype == torch.float32
    assert_bitwise(dbasis.to(dtype), dP)


# Prefix --------------------------------------------------------------------------------------------------------------

PREFIXED = ("tiny-image-gqa-prefix", "tiny-basis-16", "basis-prefix-gqa-inverse", "prefix-all-basis")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize(
    "name", ("tiny-image-gqa-prefix", "tiny-basis-16", "basis-prefix-gqa-inverse", "prefix-all-basis")
)
def test_prefix_is_copied_bit_for_bit(name: str, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Also what arithmetic would not keep: NaN and its payload, minus zero, infinity, the smallest number."""
    arguments = _isolation(device, backend, name)
    prefix = arguments["prefix"]
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for n in ("q", "k", "basis"):
        if arguments[n] is not None:
            arguments[n] = arguments[n].to(dtype)
    for n in ("q", "k"):
        x = arguments[n] = arguments[n].clone()
        special = torch.tensor([torch.nan, -0.0, torch.inf, -torch.inf], dtype=dtype, device=device)
        x[..., :prefix, :4] = special
        x.view(bits)[..., :prefix, -1] = 1
        x.view(bits)[..., :prefix, 0] += 1  # another payload
    for n, y in zip("qk", rotate(**arguments, backend=backend)):
        assert_bitwise(y[:, :, :prefix], arguments[n][:, :, :prefix], name=n)


def test_position_zero_changes_nothing(device: torch.device, backend: str) -> None:
    q = tensor(1, 2, 3, 8).to(device)
    y, _ = rotate(q, q, torch.zeros(3, 1, device=device), torch.rand(1, 4, device=device), backend=backend)
    assert_bitwise(y, q)


# Laws, in float64 on the CPU kernels ---------------------------------------------------------------------------------

LAW_BACKENDS = [b for b in available("cpu") if b != "triton"]


@st.composite
def rotations(draw: st.DrawFn) -> tuple[Arguments, torch.Generator]:
    """Any sizes and options, with an orthogonal basis or none."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kv, groups, length, size = (draw(st.integers(1, n)) for n in (2, 3, 6, 9))
    coords, prefix = draw(st.integers(1, 4)), draw(st.integers(0, length))
    planes = draw(st.integers(0, size // 2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    freqs = normal(*draw(st.sampled_from([(), (kv,)])), coords, planes)
    basis = draw(st.sampled_from([None, (), (kv,)]))
    arguments = dict(
        q=normal(2, kv * groups, length, size),
        k=normal(2, kv, length, size),
        positions=10 * normal(*draw(st.sampled_from([(), (2,)])), length - prefix, coords),
        freqs=freqs,
        basis=None if basis is None else torch.linalg.qr(normal(*basis, size, size))[0],
        interleaved=draw(st.booleans()),
        prefix=prefix,
        backend=draw(st.sampled_from(LAW_BACKENDS)),
    )
    return arguments, g


def law(test: Callable[..., None]) -> Callable[..., None]:
    return settings(max_examples=60, deadline=None, derandomize=True)(given(rotations())(test))


@law
def test_inverse_undoes_and_is_the_adjoint(drawn: tuple[Arguments, torch.Generator]) -> None:
    arguments, g = drawn
    y = rotate(**arguments)
    back = rotate(**arguments | dict(q=y[0], k=y[1]), inverse=True)
    other = [torch.randn(t.shape, generator=g, dtype=t.dtype) for t in y]
    adjoint = rotate(**arguments | dict(q=other[0], k=other[1]), inverse=True)
    for i, n in enumerate("qk"):
        x = arguments[n]
        assert_within(back[i], x, LAW_FLOAT64)
        assert_within((x * adjoint[i]).sum() + 1, (y[i] * other[i]).sum() + 1, LAW_FLOAT64 * x.norm() * other[i].norm())


@law
def test_norms_are_kept(drawn: tuple[Arguments, torch.Generator]) -> None:
    arguments, _ = drawn
    for n, y in zip("qk", rotate(**arguments)):
        assert_within(y.norm(dim=-1), arguments[n].norm(dim=-1), LAW_FLOAT64)


@law
def test_scores_depend_on_differences(drawn: tuple[Arguments, torch.Generator]) -> None:
    arguments, g = drawn
    shift = 100 * torch.randn(arguments["positions"].shape[-1], generator=g, dtype=torch.float64)
    prefix = arguments["prefix"]

    def scores(positions: Tensor) -> Tensor:
        q, k = (x[:, :, prefix:] for x in rotate(**arguments | dict(positions=positions)))
        return q.unflatten(1, (k.shape[1], -1)) @ k.unsqueeze(2).mT

    scale = 1 + arguments["q"].norm() * arguments["k"].norm()
    positions = arguments["positions"]
    assert_within(
        (scores(positions + shift) - scores(positions)) / scale + 1, torch.ones_like(scores(positions)), LAW_FLOAT64
    )


@law
def test_factor_scales_the_planes(drawn: tuple[Arguments, torch.Generator]) -> None:
    """The attention factor multiplies cos and sin, so it leaves what is not rotated."""
    arguments, _ = drawn
    arguments = arguments | dict(basis=None)
    planes, prefix = 2 * arguments["freqs"].shape[-1], arguments["prefix"]
    for y, once in zip(rotate(**arguments, factor=1.5), rotate(**arguments)):
        assert_within(y[:, :, prefix:, :planes], once[:, :, prefix:, :planes] * 1.5, LAW_FLOAT64)
        assert_bitwise(y[..., planes:], once[..., planes:])


@law
def test_layouts_agree_through_a_permutation(drawn: tuple[Arguments, torch.Generator]) -> None:
    """Interleaved planes are the halves of the permuted vector, and the same basis seen through it."""
    arguments, _ = drawn
    R, D = arguments["freqs"].shape[-1], arguments["q"].shape[-1]
    order = torch.cat((2 * torch.arange(R), 2 * torch.arange(R) + 1, torch.arange(2 * R, D)))
    basis = arguments["basis"]
    permuted = {n: arguments[n][..., order] for n in "qk"} | dict(
        basis=None if basis is None else basis[..., order, :][..., order]
    )
    halves = rotate(**arguments | permuted | dict(interleaved=False))
    for y, expected in zip(rotate(**arguments | dict(interleaved=True)), halves):
        assert_within(y[..., order], expected, LAW_FLOAT64)


@law
def test_tables_agree_with_positions(drawn: tuple[Arguments, torch.Generator]) -> None:
    arguments, _ = drawn
    freqs = arguments["freqs"]
    arguments = arguments | dict(basis=None, freqs=freqs if freqs.dim() == 2 else freqs[0])
    angle = arguments["positions"] @ arguments["freqs"]
    tables = {n: x for n, x in arguments.items() if n not in ("positions", "freqs", "basis")}
    for inverse in (False, True):
        expected = rotate(**arguments, inverse=inverse)
        for y, e in zip(rotate_cos_sin(**tables, cos=angle.cos(), sin=angle.sin(), inverse=inverse), expected):
            assert_within(y, e, LAW_FLOAT64)
