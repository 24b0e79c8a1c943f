import pytest
import torch
from torch import Tensor

from fastrpe.attention import Softmax
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_within
from python_tests.attention.formula import plain

MASKS = ("none", "pairs", "keys", "rows", "additive")


def make_mask(kind: str, B: int, H: int, L: int, S: int, device: torch.device) -> Tensor | None:
    draw = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "additive":
        return torch.randn(1, H, L, S, generator=draw).to(device)
    shape = {"pairs": (B, H, L, S), "keys": (B, 1, 1, S), "rows": (L, S)}[kind]
    return (torch.rand(shape, generator=draw) < 0.7).to(device)


def make(H: int, Hk: int, L: int, S: int, device: torch.device, B: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = (B, H, L, 8), (B, Hk, S, 8), (B, Hk, S, 6), (B, H, L, 6)
    return [torch.randn(s, generator=draw, dtype=torch.float64).to(device) for s in shapes]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("H", "Hk"), ((3, 3), (4, 2), (3, 1)))
@pytest.mark.parametrize(
    ("L", "S", "bias"),
    ((5, 5, False), (1, 7, False), (3, 7, False), (6, 4, False), (5, 5, True), (1, 7, True), (3, 7, True)),
)
def test_formula(L: int, S: int, bias: bool, H: int, Hk: int, causal: bool, mask: str, device: torch.device) -> None:
    *inputs, dy = make(H, Hk, L, S, device)
    if bias:
        inputs.append(torch.randn(H, 2 * S - 1, dtype=torch.float64, device=device))
    for x in inputs:
        x.requires_grad_()
    m = make_mask(mask, 2, H, L, S, device)
    actual = Softmax()(*inputs, mask=m, causal=causal)
    expected, _ = plain(*inputs, mask=m, causal=causal)
    assert_within(actual, expected, LAW_FLOAT64, name="y")
    grads = (torch.autograd.grad(y, inputs, dy) for y in (actual, expected))
    for name, x, y in zip(("dq", "dk", "dv", "dbias"), *grads):
        assert_within(x, y, LAW_FLOAT64, name=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(("L", "S"), ((65, 65), (1, 65)))
def test_groups_are_repeated_heads(
    L: int, S: int, causal: bool, mask: str, dtype: torch.dtype, device: torch.device
) -> None:
    B = 64  # the tolerance is the largest of a sample of errors: one row of queries must give many
    q, k, v = (x.to(dtype) for x in make(4, 2, L, S, device, B)[:3])
    m = make_mask(mask, B, 4, L, S, device)
    actual = Softmax()(q, k, v, mask=m, causal=causal)
    same = Softmax()(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask=m, causal=causal)
    m = m if m is None or m.dtype == torch.bool else m.to(dtype)
    if dtype == torch.float32:  # PyTorch may choose another kernel for repeated heads, with other last bits
        same = plain(q, k, v, mask=m, causal=causal)[0]
    assert_accurate(actual, same, plain(q.double(), k.double(), v.double(), mask=m, causal=causal)[0])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", (False, True))
def test_weights(mask: str, causal: bool, device: torch.device) -> None:
    q, k, v, _ = make(4, 2, 3, 7, device)
    m = make_mask(mask, 2, 4, 3, 7, device)
    expected = plain(q, k, v, mask=m, causal=causal, scale=0.3)[1]
    assert_within(Softmax().weights(q, k, mask=m, causal=causal, scale=0.3), expected, LAW_FLOAT64)


@pytest.mark.parametrize("additive", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_empty_rows_give_zeros(dtype: torch.dtype, additive: bool, device: torch.device) -> None:
    q, k, v = (torch.randn(1, 2, 4, 8, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    allowed = torch.tensor([True, False, True, True], device=device)[:, None].expand(4, 4)
    mask = torch.zeros(4, 4, device=device, dtype=dtype).masked_fill(~allowed, -torch.inf) if additive else allowed
    for y in (Softmax()(q, k, v, mask=mask), Softmax().weights(q, k, mask=mask) @ v):
        assert (y[:, :, 1] == 0).all() and (y[:, :, 0] != 0).any()
        grads = torch.autograd.grad(y.sum(), (q, k, v))
        assert all(g.isfinite().all() for g in grads) and (grads[0][:, :, 1] == 0).all()


@pytest.mark.parametrize("sizes", ((0, 4, 4), (2, 0, 4), (2, 1, 1)))
def test_edges(sizes: tuple[int, int, int], device: torch.device) -> None:
    B, L, S = sizes
    q, k = torch.randn(B, 4, L, 8, device=device), torch.randn(B, 2, S, 8, device=device)
    for causal in (False, True):
        assert Softmax()(q, k, k, causal=causal).shape == q.shape


def test_dropout(device: torch.device) -> None:
    q = torch.randn(1, 2, 16, 8, device=device)
    torch.manual_seed(0)
    assert not torch.equal(Softmax()(q, q, q, dropout=0.5), Softmax()(q, q, q, dropout=0.5))


Q, K = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    (
        (ValueError, dict(q=Q[0]), r"q must have shape \(B, H, L, D\), got \(4, 3, 8\)"),
        (ValueError, dict(k=K[..., :6]), r"k must have shape \(B, Hk, S, D\) with B=2, D=8, got \(2, 2, 5, 6\)"),
        (ValueError, dict(q=Q[:, :3]), "k must have a number of heads that divides H=3, got 2"),
        (ValueError, dict(k=K[:, :0]), "k must have a number of heads that divides H=4, got 0"),
        (ValueError, dict(v=K[:, :, :4]), r"v must have shape \(B, Hk, S, V\) with B=2, Hk=2, S=5, got \(2, 2, 4, 8\)"),
        (
            ValueError,
            dict(bias=torch.zeros(4, 5)),
            r"bias must have shape \(H, 2S - 1\) with H=4, 2S - 1=9, got \(4, 5\)",
        ),
        (
            ValueError,
            dict(q=Q.repeat(1, 1, 2, 1), bias=torch.zeros(4, 9)),
            "q must have at most S=5 tokens with a bias",
        ),
        (
            ValueError,
            dict(mask=torch.zeros(3, 4)),
            r"mask must broadcast to \(B, H, L, S\) = \(2, 4, 3, 5\), got \(3, 4\)",
        ),
        (ValueError, dict(mask=torch.zeros(1, 2, 4, 3, 5)), r"mask must broadcast to .*got \(1, 2, 4, 3, 5\)"),
        (ValueError, dict(mask=torch.zeros(3, 5, dtype=torch.int64)), "mask must have dtype bool, .*got int64"),
        (TypeError, dict(q=None), "q must be a Tensor, got NoneType"),
    ),
)
def test_errors(kind: type[Exception], arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(kind, match=f"^Softmax: {message}"):
        Softmax()(**(dict(q=Q, k=K, v=K) | arguments))
