"""The operator of the sparse Cayley transform: schema, kernels, fake, autograd, autocast and vmap rules."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import register_autograd
from .pattern import patterns_of
from .solvers import SOLVERS, sampled_product

LIB = torch.library.Library("fastrpe", "FRAGMENT")
LIB.define("sparse_cayley(Tensor x, Tensor theta, Tensor pairs, bool inverse, str solver) -> Tensor")
LIB.define(
    "sparse_cayley_bwd(Tensor dy, Tensor x, Tensor theta, Tensor pairs, bool inverse, str solver) -> (Tensor, Tensor)"
)


# Kernels -------------------------------------------------------------------------------------------------------------


def _sparse_cayley(
    x: Tensor,  # (..., H, L, D)
    theta: Tensor,  # (Hk, K)
    pairs: Tensor,  # (K, 2) or (Hk, K, 2)
    inverse: bool,
    solver: str,
) -> Tensor:
    if not x.numel():
        return _new(x)
    if solver == "lu" and x.device.type == "cpu":
        y: Tensor = torch.ops.fastrpe_native.sparse_cayley(_batched(x), *_native(theta, pairs, x.shape[-1]), inverse)
        return y.view(x.shape)
    wide = _by_head(x, len(theta))
    u = SOLVERS[solver](theta.double(), pairs, x.shape[-1])(wide, inverse)
    return _by_token(2 * u - wide, x)


def _sparse_cayley_bwd(
    dy: Tensor,  # (..., H, L, D)
    x: Tensor,  # (..., H, L, D)
    theta: Tensor,  # (Hk, K)
    pairs: Tensor,  # (K, 2) or (Hk, K, 2)
    inverse: bool,
    solver: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and theta.

    With u = (I + S)^{-1} x and w = (I - S)^{-1} dy: dx = 2 w - dy, and dtheta_ab = -2 sum over the tokens of
    w_a u_b - w_b u_a. The factors of I + S serve both solves; only theta's own entries of dS are computed.
    """
    if not x.numel():
        return _new(x), torch.zeros_like(theta, memory_format=torch.contiguous_format)
    if solver == "lu" and x.device.type == "cpu":
        dx, dtheta = torch.ops.fastrpe_native.sparse_cayley_bwd(
            _batched(dy), _batched(x), *_native(theta, pairs, x.shape[-1]), inverse
        )
        return dx.view(x.shape), dtheta.to(theta.dtype)
    solve = SOLVERS[solver](theta.double(), pairs, x.shape[-1])
    wide = _by_head(dy, len(theta))
    u, w = solve(_by_head(x, len(theta)), inverse), solve(wide, not inverse)
    product = _dense_product if solver == "dense" else sampled_product
    sums = product(*((u, w) if inverse else (w, u)), pairs)
    return _by_token(2 * w - wide, x), (-2 * sums).to(theta.dtype)


def _dense_product(
    left: Tensor,  # (H, N, D)
    right: Tensor,  # (H, N, D)
    pairs: Tensor,  # (K, 2) or (H, K, 2)
) -> Tensor:
    """As `sampled_product`, from all products."""
    H, _, D = left.shape
    product, (a, b) = (left.mT @ right).flatten(1), pairs.expand(H, -1, -1).unbind(-1)
    return product.gather(1, a * D + b) - product.gather(1, b * D + a)


def _native(theta: Tensor, pairs: Tensor, size: int) -> tuple[Tensor, ...]:
    """theta and the pattern as the native kernels take them."""
    e = patterns_of(pairs, size).elimination
    each = pairs if pairs.dim() == 3 else pairs.unsqueeze(0)
    return theta.double().contiguous(), each.contiguous(), e.order, e.start, e.rows, e.slots


def _batched(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-3:])


def _by_head(x: Tensor, heads: int) -> Tensor:
    """The tokens of each of theta's heads, (Hk, N, D), in float64."""
    groups: Tensor = _batched(x).unflatten(1, (heads, -1))  # a key head's queries follow one another
    return groups.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format).flatten(1, 3)


def _by_token(y: Tensor, like: Tensor) -> Tensor:
    H, L = like.shape[-3:-1]
    y = y.unflatten(1, (-1, H // len(y), L)).transpose(0, 1).reshape(like.shape)
    return y.to(like.dtype, memory_format=torch.contiguous_format)


LIB.impl("sparse_cayley", _sparse_cayley, "CompositeExplicitAutograd")
LIB.impl("sparse_cayley_bwd", _sparse_cayley_bwd, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastrpe::sparse_cayley", lib=LIB)
def _(x: Tensor, *_: Any) -> Tensor:
    return _new(x)


@torch.library.register_fake("fastrpe::sparse_cayley_bwd", lib=LIB)
def _(dy: Tensor, x: Tensor, theta: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new(x), _new(theta)


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, theta, pairs, ctx.inverse, ctx.solver = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, theta, pairs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, theta, pairs = ctx.saved_tensors
    need_x, need_theta = ctx.needs_input_grad[:2]
    if need_theta:
        dx, dtheta = torch.ops.fastrpe.sparse_cayley_bwd(dy, x, theta, pairs, ctx.inverse, ctx.solver)
        return dx if need_x else None, dtheta, None, None, None
    # The adjoint of an orthogonal map is its inverse: the same op, differentiable again.
    return torch.ops.fastrpe.sparse_cayley(dy, theta, pairs, not ctx.inverse, ctx.solver), None, None, None, None


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "sparse_cayley: theta must not require grad for a second derivative, got a gradient that depends on its own; "
        "solver='matrix' can be differentiated twice"
    )


register_autograd(LIB, "sparse_cayley", _sparse_cayley, _backward, _setup)
register_autograd(LIB, "sparse_cayley_bwd", _sparse_cayley_bwd, _no_double_backward)


# Autocast: x goes to the autocast dtype, theta stays ------------------------------------------------------------------


def _autocast(device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))
            y: Tensor = torch.ops.fastrpe.sparse_cayley(x, *rest)
            return y

    LIB.impl("sparse_cayley", cast, key)


_autocast("cuda", "AutocastCUDA")
_autocast("cpu", "AutocastCPU")


# vmap ----------------------------------------------------------------------------------------------------------------


@torch.library.register_vmap("fastrpe::sparse_cayley", lib=LIB)
def _(
    info: Any, in_dims: tuple[int | None, ...], x: Tensor, theta: Tensor, pairs: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """A mapped axis of x joins the batch; one of theta or pairs makes a loop of calls."""
    op = torch.ops.fastrpe.sparse_cayley
    if in_dims[1] is None and in_dims[2] is None:
        y: Tensor = op(x.movedim(in_dims[0] or 0, 0), theta, pairs, *rest)
        return y, 0
    tensors = [t if d is None else t.movedim(d, 0) for t, d in zip((x, theta, pairs), in_dims)]
    calls = [op(*(t if d is None else t[i] for t, d in zip(tensors, in_dims)), *rest) for i in range(info.batch_size)]
    return torch.stack(calls), 0
