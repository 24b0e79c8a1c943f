"""A plain call skips the dispatcher; whatever the dispatcher has something to do for does not."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastrpe.backend import problem
from fastrpe.ops import linear_attention, random_features, rotate
from fastrpe.ops.autograd import is_plain
from fastrpe.testing.asserts import assert_bitwise

pytestmark = pytest.mark.skipif(bool(problem("native", "cpu")), reason="needs the native library")


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 1, 4, 8), torch.randn(8, 8)


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = dict(
    linear_attention=lambda q, w: linear_attention(q, q, q, w),
    random_features=lambda x, w: random_features(x, w),
    rotate=lambda q, w: rotate(q, None, w[:4, :1], w[:1, :4])[0],
)
each = pytest.mark.parametrize("name", CALLS)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


@each
def test_a_mode_sees_the_operator_and_its_backward(name: str) -> None:
    q, w = inputs()
    q.requires_grad_()
    with Seen() as seen:
        y = CALLS[name](q, w)
    assert f"fastrpe.{name}.default" in seen.names
    y = CALLS[name](q, w)
    with Seen() as seen:
        torch.autograd.grad(y.sum(), q)
    assert any(n.startswith(f"fastrpe.{name}") for n in seen.names)


@pytest.mark.parametrize("kind", ("positive", "oprf"))
@pytest.mark.parametrize("causal", (False, True))
def test_a_mode_changes_no_bit(kind: str, causal: bool) -> None:
    """The backward of a plain call takes what its forward prepared; that of the operator prepares it again."""
    q, w = inputs()
    q, w = q.bfloat16().requires_grad_(), w.requires_grad_()
    a = torch.tensor(-0.1, requires_grad=True) if kind == "oprf" else None
    tensors = (q, w) if a is None else (q, w, a)
    found = []
    for mode in (contextlib.nullcontext(), Seen()):
        with mode:
            y = linear_attention(q, q, q, w, kind, a=a, causal=causal)
            found.append((y, *torch.autograd.grad(y, tensors, y.detach().flip(2))))
    for plain, seen in zip(*found):
        assert_bitwise(plain, seen)


@each
def test_a_graph_holds_the_operator(name: str) -> None:
    assert f"fastrpe.{name}.default" in make_fx(CALLS[name])(*inputs()).code
    assert f"fastrpe.{name}.default" in make_fx(torch.func.functionalize(CALLS[name]))(*inputs()).code


@each
def test_fake_tensors_outside_their_mode(name: str) -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs()]
    assert isinstance(CALLS[name](*fake), FakeTensor)


@each
def test_lazy_negation(name: str) -> None:
    q, w = inputs()
    lazy = torch.complex(q, q).conj().imag
    assert lazy.is_neg()
    assert_bitwise(CALLS[name](lazy, w), CALLS[name](-q, w))


@each
def test_inference_mode(name: str) -> None:
    q, w = inputs()
    with torch.inference_mode():
        y = CALLS[name](q, w)
    assert_bitwise(y, CALLS[name](q, w))


@each
def test_torch_func(name: str) -> None:
    """grad, and vmap of it for the gradients of each of several inputs; a second derivative never is a silent zero."""
    q, w = inputs()
    batch = torch.stack((q, -q, 2 * q)).requires_grad_()

    def loss(q: Tensor) -> Tensor:
        return CALLS[name](q, w).square().sum()

    expected = torch.autograd.grad(torch.stack([loss(x) for x in batch]).sum(), batch)[0]
    assert_bitwise(torch.func.grad(loss)(q), expected[0])
    assert_bitwise(torch.func.vmap(torch.func.grad(loss))(batch.detach()), expected)
    if name != "rotate":
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(q)


def test_is_plain() -> None:
    class Calls(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return f(*args, **(kwargs or {}))

    q, w = inputs()
    args = (q, torch.nn.Parameter(w), None, "positive", 1.0, 2, True)
    assert is_plain((*args, "native"))
    assert not is_plain((*args, "triton"))
    assert not is_plain((*args, [1], "native"))
    for mode in (Seen(), Calls(), FakeTensorMode(), torch.autocast("cpu"), torch.autograd.forward_ad.dual_level()):
        with mode:
            assert not is_plain((*args, "native"))
    assert is_plain((*args, "native"))
    with torch.inference_mode():
        assert is_plain((*args, "native"))
