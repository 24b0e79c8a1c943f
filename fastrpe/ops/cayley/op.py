"""The operator of the Cayley basis: schema, kernels, fake, autograd and vmap rules."""

from typing import Any

import torch
from torch import Tensor

from ..autograd import register_autograd
from . import reference

LIB = torch.library.Library("fastrpe", "FRAGMENT")
# The second result is (I + S)^{-1} in float64, for the backward: where |S| is large, P has lost it to rounding.
LIB.define("cayley_basis(Tensor params, str backend) -> (Tensor, Tensor)")
LIB.define("cayley_basis_bwd(Tensor dy, Tensor inverse, str backend) -> Tensor")


# Kernels -------------------------------------------------------------------------------------------------------------


def _cayley_basis(
    params: Tensor,  # (..., D (D - 1) / 2)
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "native":
        heads = params.shape[:-1]
        flat = params.reshape(heads.numel(), params.shape[-1]).contiguous()
        P, X = torch.ops.fastrpe_native.cayley_basis.default(flat)
        return P.view(*heads, *P.shape[1:]), X.view(*heads, *P.shape[1:])
    X = reference.inverse(reference.skew(params)).contiguous()
    P = reference.orthogonal(X)
    return P.to(params.dtype), X


def _cayley_basis_bwd(
    dy: Tensor,  # (..., D, D)
    inverse: Tensor,  # (..., D, D)
    backend: str,
) -> Tensor:
    """The gradient of params, (..., D (D - 1) / 2)."""
    if backend == "native":
        heads, size = dy.shape[:-2], dy.shape[-1]
        flat = [x.reshape(heads.numel(), size, size).contiguous() for x in (dy, inverse)]
        dparams: Tensor = torch.ops.fastrpe_native.cayley_basis_bwd.default(*flat)
        return dparams.view(*heads, dparams.shape[-1])
    return reference.cayley_basis_bwd(dy, inverse)


LIB.impl("cayley_basis", _cayley_basis, "CompositeExplicitAutograd")
LIB.impl("cayley_basis_bwd", _cayley_basis_bwd, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastrpe::cayley_basis", lib=LIB)
def _(params: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    size = reference.size_of("cayley_basis", params)
    P = params.new_empty(*params.shape[:-1], size, size)
    return P, torch.empty_like(P, dtype=torch.float64)


@torch.library.register_fake("fastrpe::cayley_basis_bwd", lib=LIB)
def _(dy: Tensor, inverse: Tensor, backend: str) -> Tensor:
    size = dy.shape[-1]
    return dy.new_empty(*dy.shape[:-2], size * (size - 1) // 2)


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.backend, ctx.dtype = inputs[1], output[0].dtype
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dinverse: Tensor | None) -> tuple[Tensor | None, None]:
    (inverse,) = ctx.saved_tensors
    if dinverse is not None:  # from a second derivative; P = 2 X - I
        half = (dinverse / 2).to(ctx.dtype)
        dy = half if dy is None else dy + half
    return None if dy is None else call_bwd(dy, inverse, ctx.backend), None


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward_bwd(ctx: Any, ddparams: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """In PyTorch, so differentiable again. With U skew of ddparams, the op is <U, -2 X^T dy X^T>."""
    dy, X = ctx.saved_tensors
    U, wide = reference.skew(ddparams).to(X.dtype), dy.to(X.dtype)
    need_dy, need_inverse = ctx.needs_input_grad[:2]
    ddy = (-2 * X @ U @ X).to(dy.dtype) if need_dy else None
    return ddy, 2 * (wide @ X.mT @ U + U @ X.mT @ wide) if need_inverse else None, None


call = register_autograd(LIB, "cayley_basis", _cayley_basis, _backward, _setup)
call_bwd = register_autograd(LIB, "cayley_basis_bwd", _cayley_basis_bwd, _backward_bwd, _setup_bwd)


# vmap: all leading axes are heads ------------------------------------------------------------------------------------


@torch.library.register_vmap("fastrpe::cayley_basis", lib=LIB)
def _(info: Any, in_dims: tuple[int, None], params: Tensor, backend: str) -> tuple[Any, tuple[int, int]]:
    return torch.ops.fastrpe.cayley_basis(params.movedim(in_dims[0], 0), backend), (0, 0)


@torch.library.register_vmap("fastrpe::cayley_basis_bwd", lib=LIB)
def _(
    info: Any, in_dims: tuple[int | None, int | None, None], dy: Tensor, inverse: Tensor, backend: str
) -> tuple[Tensor, int]:
    n = info.batch_size
    dy, inverse = (
        x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip((dy, inverse), in_dims)
    )
    return torch.ops.fastrpe.cayley_basis_bwd(dy, inverse, backend), 0
