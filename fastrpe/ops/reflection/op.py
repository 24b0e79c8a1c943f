"""The operator of the reflections' basis: schema, kernels, fake, autograd and vmap rules."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import register_autograd
from . import reference

LIB = torch.library.Library("fastrpe", "FRAGMENT")
LIB.define("reflection_basis(Tensor v, int block, int[] shuffles, str backend) -> Tensor")
LIB.define("reflection_basis_bwd(Tensor dy, Tensor v, int block, int[] shuffles, str backend) -> Tensor")


# Kernels -------------------------------------------------------------------------------------------------------------


def _reflection_basis(
    v: Tensor,  # (..., K, D)
    block: int,
    shuffles: Sequence[int],
    backend: str,
) -> Tensor:
    if backend == "native":
        P: Tensor = torch.ops.fastrpe_native.reflection_basis.default(_heads(v), block, shuffles)
        return P.view(*v.shape[:-2], *P.shape[1:])
    return reference.reflection_basis(v, block, shuffles).contiguous()


def _reflection_basis_bwd(
    dy: Tensor,  # (..., D, D)
    v: Tensor,  # (..., K, D)
    block: int,
    shuffles: Sequence[int],
    backend: str,
) -> Tensor:
    """The gradient of v."""
    if backend == "native":
        dv: Tensor = torch.ops.fastrpe_native.reflection_basis_bwd.default(_heads(dy), _heads(v), block, shuffles)
        return dv.view(v.shape)
    return reference.reflection_basis_bwd(dy, v, block, shuffles).contiguous()


def _heads(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-2].numel(), *x.shape[-2:]).contiguous()


LIB.impl("reflection_basis", _reflection_basis, "CompositeExplicitAutograd")
LIB.impl("reflection_basis_bwd", _reflection_basis_bwd, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastrpe::reflection_basis", lib=LIB)
def _(v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(*v.shape[:-2], v.shape[-1], v.shape[-1])


@torch.library.register_fake("fastrpe::reflection_basis_bwd", lib=LIB)
def _(dy: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, *ctx.options = inputs
    ctx.save_for_backward(v)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    return torch.ops.fastrpe.reflection_basis_bwd(dy, *ctx.saved_tensors, *ctx.options), None, None, None


def _setup_bwd(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block, ctx.shuffles, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward_bwd(ctx: Any, ddv: Tensor) -> tuple[Any, ...]:
    """Of the reference, by autograd, so differentiable again."""
    with torch.enable_grad():
        # Views, so that what they lead to still depends on what came.
        dy, v = (x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors)
        dv = reference.reflection_basis_bwd(dy, v, ctx.block, ctx.shuffles)
        grads = torch.autograd.grad(dv, (dy, v), ddv, create_graph=True)
    found = (g if need else None for g, need in zip(grads, ctx.needs_input_grad))
    return (*found, None, None, None)


register_autograd(LIB, "reflection_basis", _reflection_basis, _backward, _setup)
register_autograd(LIB, "reflection_basis_bwd", _reflection_basis_bwd, _backward_bwd, _setup_bwd)


# vmap: all leading axes are heads ------------------------------------------------------------------------------------


@torch.library.register_vmap("fastrpe::reflection_basis", lib=LIB)
def _(info: Any, in_dims: tuple[Any, ...], v: Tensor, *options: Any) -> tuple[Tensor, int]:
    return torch.ops.fastrpe.reflection_basis(v.movedim(in_dims[0], 0), *options), 0


@torch.library.register_vmap("fastrpe::reflection_basis_bwd", lib=LIB)
def _(info: Any, in_dims: tuple[Any, ...], dy: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, int]:
    n = info.batch_size
    dy, v = (x.expand(n, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip((dy, v), in_dims))
    return torch.ops.fastrpe.reflection_basis_bwd(dy, v, *options), 0
