"""Operators of the random features: schemas, kernel table, fake, autograd, autocast and vmap rules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autograd import register_autograd
from . import reference

LIB = torch.library.Library("fastrpe", "FRAGMENT")
LIB.define(
    "random_features(Tensor x, Tensor? omega, str kind, float? scale, float eps, Tensor? a, str? stabilizer, "
    "str backend) -> Tensor"
)
LIB.define(
    "random_features_bwd(Tensor dy, Tensor? y, Tensor x, Tensor? omega, str kind, float? scale, float eps, Tensor? a, "
    "str? stabilizer, bool need_omega, bool need_a, str backend) -> (Tensor, Tensor, Tensor)"
)
LIB.define("fwht(Tensor x, float scale, str backend) -> Tensor")

# What the native library calls a kind and a stabilizer: their index here.
KINDS, STABILIZERS = reference.KINDS, reference.STABILIZERS


# Kernels -------------------------------------------------------------------------------------------------------------


def _random_features(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float | None,
    eps: float,
    a: Tensor | None,  # ()
    stabilizer: str | None,
    backend: str,
) -> Tensor:
    omega, a = _projection(x, omega), _wide(x, a)
    scale = reference.default_scale(kind, x.shape[-1]) if scale is None else scale
    if backend == "reference":
        return reference.random_features(x, omega, kind, scale, eps, a, stabilizer).contiguous()
    y: Tensor
    if backend == "native":
        code = KINDS.index(kind), STABILIZERS.index(stabilizer)
        y = torch.ops.fastrpe_native.random_features.default(x, omega, code[0], scale, eps, a, code[1])
    else:
        from . import triton_impl

        y = triton_impl.random_features(x, omega, kind, scale, eps, a, stabilizer)
    return y


def _random_features_bwd(
    dy: Tensor,  # (B, H, L, F)
    y: Tensor | None,  # (B, H, L, F)
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float | None,
    eps: float,
    a: Tensor | None,  # ()
    stabilizer: str | None,
    need_omega: bool,
    need_a: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, omega and a; those of the last two are empty where not needed.

    Features tell their own derivative, so nothing is projected or exponentiated again, unless they were rounded to 16
    bits, which a sum over rows would show. Kernels give dx and, where needed, the sums over rows of dp (scale x)^T and
    of dp, with p what the nonlinearity is taken of.
    """
    W, A = _projection(x, omega), _wide(x, a)
    scale = reference.default_scale(kind, x.shape[-1]) if scale is None else scale
    need = need_omega or need_a
    if y is None:
        y = _random_features(x.to(_acc(x)), omega, kind, scale, eps, a, stabilizer, backend)
    if kind == "relu" and eps:  # features that are eps alone are told by being equal to it
        eps = torch.tensor(eps, dtype=y.dtype, device="cpu").item()
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]]
    if backend == "native":
        kind_code: Any = KINDS.index(kind)
        kernel = torch.ops.fastrpe_native.random_features_bwd.default
    else:
        kind_code, kernel = kind, reference.random_features_bwd
        if backend == "triton":
            from . import triton_impl

            kernel = triton_impl.random_features_bwd
    dx, outer, total = kernel(dy, y.contiguous(), x, W, kind_code, scale, eps, A, need)
    domega = da = x.new_empty(0)
    if omega is None or W is None or not need:
        return dx, domega, da
    if omega.dim() == 2 and outer.dim() == 3:
        outer, total = outer.sum(0), total.sum(0)
    if a is None or A is None:
        return dx, outer.to(omega.dtype), da
    # p = a |w|^2 + root w.x, and (1 - 4 a)^(D / 4) multiplies all features.
    root = (1 - 4 * A).sqrt()
    if need_omega:
        domega = (root * outer + 2 * A * total.unsqueeze(-1) * W).to(omega.dtype)
    if need_a:
        M, D = W.shape[-2:]
        c = reference.constant(kind, M, D, A)
        weight = total.sum() + (c * eps * dy.sum(dtype=W.dtype) if eps else 0.0)  # sum of dy y
        da = (total * W.square().sum(-1)).sum() - 2 / root * (outer * W).sum() - D / (1 - 4 * A) * weight
        da = da.to(a.dtype)
    return dx, domega, da


def _fwht(
    x: Tensor,  # (..., D)
    scale: float,
    backend: str,
) -> Tensor:
    if backend == "reference" or not x.numel():
        return reference.fwht(x, scale)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor
    if backend == "native":
        y = torch.ops.fastrpe_native.fwht.default(rows, scale)
    else:
        from . import triton_impl

        y = triton_impl.fwht(rows, scale)
    return y.view(x.shape)


def _projection(x: Tensor, omega: Tensor | None) -> Tensor | None:
    """Rounded to the dtype of x, as tensor cores read it."""
    return None if omega is None else _wide(x, omega.to(x.dtype))


def _wide(x: Tensor, other: Tensor | None) -> Tensor | None:
    """A parameter in the dtype that the kernels compute in."""
    return None if other is None else other.to(_acc(x)).contiguous()


def _acc(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


for _name, _kernel in (
    ("random_features", _random_features),
    ("random_features_bwd", _random_features_bwd),
    ("fwht", _fwht),
):
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastrpe::random_features", lib=LIB)
def _(x: Tensor, omega: Tensor | None, kind: str, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], reference.size_of(x, omega, kind))


@torch.library.register_fake("fastrpe::random_features_bwd", lib=LIB)
def _(
    dy: Tensor, y: Tensor | None, x: Tensor, omega: Tensor | None, kind: str, scale: float | None, eps: float,
    a: Tensor | None, stabilizer: str | None, need_omega: bool, need_a: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    empty = x.new_empty
    return (
        empty(x.shape),
        empty(0) if omega is None or not need_omega else omega.new_empty(omega.shape),
        empty(0) if a is None or not need_a else a.new_empty(()),
    )


@torch.library.register_fake("fastrpe::fwht", lib=LIB)
def _(x: Tensor, scale: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, omega, ctx.kind, ctx.scale, ctx.eps, a, ctx.stabilizer, ctx.backend = inputs
    ctx.save_for_backward(output if output.element_size() > 2 else None, x, omega, a)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    y, x, omega, a = ctx.saved_tensors
    need_x, need_omega, need_a = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[5]
    dx, domega, da = call_bwd(
        dy, y, x, omega, ctx.kind, ctx.scale, ctx.eps, a, ctx.stabilizer, need_omega, need_a, ctx.backend
    )
    return (
        dx if need_x else None, domega if need_omega else None, None, None, None, da if need_a else None, None, None,
    )  # fmt: skip


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "random_features: x, omega and a must not require grad for a second derivative, got a gradient that depends "
        "on theirs"
    )


def _setup_fwht(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[1:]


def _backward_fwht(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    return call_fwht(dy, *ctx.options), None, None  # Hadamard matrices are symmetric


call = register_autograd(LIB, "random_features", _random_features, _backward, _setup)
call_bwd = register_autograd(LIB, "random_features_bwd", _random_features_bwd, _no_double_backward)
call_fwht = register_autograd(LIB, "fwht", _fwht, _backward_fwht, _setup_fwht)


# Autocast: x goes to the autocast dtype, as in scaled_dot_product_attention; omega and a stay -------------------------


def _autocast(device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(x: Tensor, *rest: Any) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device_type))
            y: Tensor = call(x, *rest)
            return y

    LIB.impl("random_features", cast, key)


_autocast("cuda", "AutocastCUDA")
_autocast("cpu", "AutocastCPU")


# vmap ----------------------------------------------------------------------------------------------------------------


def _loop(op: Any, n: int, in_dims: tuple[int | None, ...], args: tuple[Any, ...]) -> list[Any]:
    tensors = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims)]
    return [op(*(t if d is None else t[i] for t, d in zip(tensors, in_dims))) for i in range(n)]


@torch.library.register_vmap("fastrpe::random_features", lib=LIB)
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    op, n = torch.ops.fastrpe.random_features.default, info.batch_size
    if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
        return torch.stack(_loop(op, n, in_dims, (x, *rest))), 0
    x = x.movedim(in_dims[0], 0)
    return op(x.flatten(0, 1), *rest).unflatten(0, x.shape[:2]), 0


@torch.library.register_vmap("fastrpe::random_features_bwd", lib=LIB)
def _(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    calls = _loop(torch.ops.fastrpe.random_features_bwd.default, info.batch_size, in_dims, args)
    return tuple(torch.stack(results) for results in zip(*calls)), (0, 0, 0)


@torch.library.register_vmap("fastrpe::fwht", lib=LIB)
def _(info: Any, in_dims: tuple[int, None, None], x: Tensor, *rest: Any) -> tuple[Tensor, int]:
    return torch.ops.fastrpe.fwht(x.movedim(in_dims[0], 0), *rest), 0
