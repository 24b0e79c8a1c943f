"""Operators of the rotary family: schemas, kernel table, fake, autograd, autocast and vmap rules."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import register_autograd
from ..hopper import is_hopper
from . import reference

LIB = torch.library.Library("fastrpe", "FRAGMENT")
LIB.define(
    "rotate(Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor? basis, bool interleaved, bool inverse, "
    "float factor, SymInt prefix, str backend) -> (Tensor, Tensor)"
)
LIB.define(
    "rotate_bwd(Tensor dyq, Tensor dyk, Tensor q, Tensor k, Tensor positions, Tensor freqs, Tensor? basis, "
    "bool interleaved, bool inverse, float factor, SymInt prefix, bool need_positions, bool need_freqs, "
    "bool need_basis, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIB.define(
    "rotate_cos_sin(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, SymInt prefix, "
    "str backend) -> (Tensor, Tensor)"
)

Pair = tuple[Tensor, Tensor]


# Kernels -------------------------------------------------------------------------------------------------------------


def _rotate(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    basis: Tensor | None,  # (D, D) or (Hk, D, D)
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
    backend: str,
) -> Pair:
    if backend == "reference":
        return reference.rotate(q, k, positions, freqs, basis, interleaved, inverse, factor, prefix)
    positions, freqs = _angles(q, positions, freqs)
    rotate: Callable[..., Pair]
    if backend == "native":
        rotate = torch.ops.fastrpe_native.rotate.default
    else:
        from . import triton_impl

        rotate = triton_impl.rotate
    if basis is None:
        return rotate(q, k, positions, freqs, interleaved, inverse, factor, prefix)
    if backend == "native" and _fuses(q, freqs):
        fused: Pair = torch.ops.fastrpe_native.rotate_basis.default(
            q, k, positions, freqs, basis, interleaved, inverse, factor, prefix
        )
        return fused
    # Unfused: the product with the basis is kept in float32, so that the result is rounded once.
    wide = (_wide(q), _wide(k))
    if not inverse:
        wide = (_apply(wide[0], basis), _apply(wide[1], basis))
    y = rotate(*wide, positions, freqs, interleaved, inverse, factor, prefix)
    if inverse:
        y = (_apply(y[0], basis, adjoint=True), _apply(y[1], basis, adjoint=True))
    y = (_narrow(y[0], q), _narrow(y[1], k))
    y[0][:, :, :prefix] = q[:, :, :prefix]
    y[1][:, :, :prefix] = k[:, :, :prefix]
    return y


def _rotate_bwd(
    dyq: Tensor,  # (B, H, L, D)
    dyk: Tensor,  # (B, Hk, L, D)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    basis: Tensor | None,  # (D, D) or (Hk, D, D)
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
    need_positions: bool,
    need_freqs: bool,
    need_basis: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, positions, freqs and basis; those of the last three are empty where not needed."""
    p, f = _angles(q, positions, freqs)
    if basis is not None and not (inverse or need_positions) and backend == "native" and _fuses(q, f):
        needs = need_freqs, need_basis
        return _fused_bwd(dyq, dyk, q, k, positions, freqs, basis, interleaved, factor, prefix, *needs)
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = reference.rotate_bwd
    if backend == "native":
        bwd = torch.ops.fastrpe_native.rotate_bwd.default
    elif backend == "triton":
        from . import triton_impl

        bwd = triton_impl.rotate_bwd
    flags = (interleaved, inverse, factor, prefix, need_positions, need_freqs)
    db = empty = q.new_empty(0)
    if basis is None:
        dq, dk, dp, df = bwd(dyq, dyk, q, k, p, f, *flags)
    else:
        # y = R P x, or y = P^T R^T x when inverse: the rotation's own backward with a product on either side of it.
        x, dy = (_wide(q), _wide(k)), (_wide(dyq), _wide(dyk))
        if inverse:
            u = _rotate(*x, positions, freqs, None, interleaved, True, factor, prefix, backend)
            dq, dk, dp, df = bwd(_apply(dy[0], basis), _apply(dy[1], basis), *x, p, f, *flags)
            pairs = (u, dy)
        else:
            dz = bwd(*dy, _apply(x[0], basis), _apply(x[1], basis), p, f, *flags)
            dq, dk, dp, df = _apply(dz[0], basis, adjoint=True), _apply(dz[1], basis, adjoint=True), *dz[2:]
            pairs = ((dz[0], dz[1]), x)
        if need_basis:
            db = _basis_gradient(*pairs, prefix, basis)
        dq, dk = _narrow(dq, q), _narrow(dk, k)
        dq[:, :, :prefix] = dyq[:, :, :prefix]
        dk[:, :, :prefix] = dyk[:, :, :prefix]
    dp = dp.to(positions.dtype).contiguous() if need_positions else empty
    df = df.to(freqs.dtype).contiguous() if need_freqs else empty
    return dq, dk, dp, df, db


def _fused_bwd(
    dyq: Tensor,  # (B, H, L, D)
    dyk: Tensor,  # (B, Hk, L, D)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    basis: Tensor,  # (D, D) or (Hk, D, D)
    interleaved: bool,
    factor: float,
    prefix: int,
    need_freqs: bool,
    need_basis: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients through a basis in one pass over memory; those of freqs and basis are empty where not needed."""
    angles = _angles(q, positions, freqs)
    dq, dk, db, df = torch.ops.fastrpe_native.rotate_basis_bwd.default(
        dyq, dyk, q, k, *angles, basis, interleaved, factor, prefix, need_freqs, need_basis
    )
    empty = q.new_empty(0)
    df = df.to(freqs.dtype) if need_freqs else empty
    return dq, dk, empty, df, db.to(basis.dtype) if need_basis else empty


def _rotate_cos_sin(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    cos: Tensor,  # (L - prefix, R) or (B, L - prefix, R)
    sin: Tensor,  # as cos
    interleaved: bool,
    inverse: bool,
    prefix: int,
    backend: str,
) -> Pair:
    if backend == "reference":
        return reference.rotate_cos_sin(q, k, cos, sin, interleaved, inverse, prefix)
    cos, sin = _angles(q, cos, sin)
    if backend == "triton":
        from . import triton_impl

        return triton_impl.rotate_cos_sin(q, k, cos, sin, interleaved, inverse, prefix)
    y: Pair = torch.ops.fastrpe_native.rotate_cos_sin.default(q, k, cos, sin, interleaved, inverse, prefix)
    return y


def _fuses(q: Tensor, freqs: Tensor) -> bool:
    # Hopper's tensor cores take 16-bit values, and read a head's basis where it lies in shared memory.
    D = q.shape[-1]
    sixteen_bits = q.dtype in (torch.float16, torch.bfloat16)
    shape = D in (64, 128) and 2 * freqs.shape[-1] == D
    return q.is_cuda and sixteen_bits and shape and is_hopper(q.get_device())


def _angles(q: Tensor, a: Tensor, b: Tensor) -> Pair:
    # Kernels read angles in float32, and in float64 for float64.
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if a.dtype != dtype or not a.is_contiguous():
        a = a.to(dtype).contiguous()
    if b.dtype != dtype or not b.is_contiguous():
        b = b.to(dtype).contiguous()
    return a, b


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _narrow(y: Tensor, like: Tensor) -> Tensor:
    # Never an alias of a kernel's output that a caller could hold, and contiguous whatever the product returned.
    return y.to(like.dtype, memory_format=torch.contiguous_format)


def _apply(x: Tensor, basis: Tensor, adjoint: bool = False) -> Tensor:
    """P x, or P^T x, for every token; a key head's basis serves its group of query heads."""
    basis = basis.to(x.dtype)
    if basis.dim() == 3:
        basis = basis.repeat_interleave(x.shape[1] // basis.shape[0], 0)
    return x @ (basis if adjoint else basis.mT)


def _basis_gradient(left: Pair, right: Pair, prefix: int, basis: Tensor) -> Tensor:
    """sum_l left_l right_l^T over queries and keys, and over all heads that share a basis."""
    total = torch.zeros_like(basis, dtype=left[0].dtype, memory_format=torch.contiguous_format)
    for a, b in zip(left, right):
        per_head = torch.einsum("bhli,bhlj->hij", a[:, :, prefix:], b[:, :, prefix:])
        if basis.dim() == 2:
            total += per_head.sum(0)
        elif len(per_head):
            total += per_head.unflatten(0, (basis.shape[0], -1)).sum(1)
    return total.to(basis.dtype)


for _name, _kernel in (("rotate", _rotate), ("rotate_bwd", _rotate_bwd), ("rotate_cos_sin", _rotate_cos_sin)):
    LIB.impl(_name, _kernel, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fastrpe::rotate", lib=LIB)
def _(q: Tensor, k: Tensor, *_: Any) -> Pair:
    return _new(q), _new(k)


@torch.library.register_fake("fastrpe::rotate_cos_sin", lib=LIB)
def _(q: Tensor, k: Tensor, *_: Any) -> Pair:
    return _new(q), _new(k)


@torch.library.register_fake("fastrpe::rotate_bwd", lib=LIB)
def _(
    dyq: Tensor, dyk: Tensor, q: Tensor, k: Tensor, positions: Tensor, freqs: Tensor, basis: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    needs = rest[4:7]
    return (
        _new(q),
        _new(k),
        *(_new(x) if x is not None and need else q.new_empty(0) for x, need in zip((positions, freqs, basis), needs)),
    )


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup_rotate(ctx: Any, inputs: Sequence[Any], output: Pair) -> None:
    q, k, positions, freqs, basis, *ctx.options, ctx.backend = inputs
    if not any(ctx.needs_input_grad[2:5]):
        q = k = None  # the adjoint needs neither: do not keep them alive
    ctx.save_for_backward(q, k, positions, freqs, basis)


def _backward_rotate(ctx: Any, dyq: Tensor, dyk: Tensor) -> tuple[Any, ...]:
    q, k, positions, freqs, basis = ctx.saved_tensors
    interleaved, inverse, factor, prefix = ctx.options
    need_q, need_k, *needs = ctx.needs_input_grad[:5]
    if any(needs):
        grads = call_rotate_bwd(dyq, dyk, q, k, positions, freqs, basis, *ctx.options, *needs, ctx.backend)
        found = [g if need else None for g, need in zip(grads, ctx.needs_input_grad)]
        return (*found, None, None, None, None, None)
    # A rotation's adjoint is its inverse: the same kernel, differentiable again, without the side nobody asked for.
    dq, dk = call_rotate(
        dyq if need_q else dyq[:, :0],
        dyk if need_k else dyk[:, :0],
        positions, freqs, basis, interleaved, not inverse, factor, prefix, ctx.backend,
    )  # fmt: skip
    return (dq if need_q else None, dk if need_k else None, *(None,) * 8)


def _setup_rotate_cos_sin(ctx: Any, inputs: Sequence[Any], output: Pair) -> None:
    q, k, cos, sin, *ctx.options, ctx.backend = inputs
    if not any(ctx.needs_input_grad[2:4]):
        q = k = None
    ctx.save_for_backward(q, k, cos, sin)


def _backward_rotate_cos_sin(ctx: Any, dyq: Tensor, dyk: Tensor) -> tuple[Any, ...]:
    q, k, cos, sin = ctx.saved_tensors
    interleaved, inverse, prefix = ctx.options
    need_q, need_k, need_cos, need_sin = ctx.needs_input_grad[:4]
    dq, dk = call_rotate_cos_sin(
        dyq if need_q else dyq[:, :0],
        dyk if need_k else dyk[:, :0],
        cos, sin, interleaved, not inverse, prefix, ctx.backend,
    )  # fmt: skip
    dcos = dsin = None
    if need_cos or need_sin:
        dcos, dsin = _table_gradients(((q, dyq), (k, dyk)), cos, interleaved, -1.0 if inverse else 1.0, prefix)
    return (
        dq if need_q else None, dk if need_k else None, dcos if need_cos else None, dsin if need_sin else None,
        *(None,) * 4,
    )  # fmt: skip


def _table_gradients(pairs: tuple[Pair, ...], cos: Tensor, interleaved: bool, sign: float, prefix: int) -> Pair:
    """dcos = <dy, x> and dsin = <dy, J x> in each plane, summed over the heads, in differentiable PyTorch."""
    sums = []
    for x, dy in pairs:
        a, b = reference.planes(_wide(x)[:, :, prefix:], cos.shape[-1], interleaved)
        da, db = reference.planes(_wide(dy)[:, :, prefix:], cos.shape[-1], interleaved)
        sums.append(torch.stack(((da * a + db * b).sum(1), sign * (db * a - da * b).sum(1))))
    total = sums[0] + sums[1]  # (2, B, L - prefix, R)
    dcos, dsin = (total.sum(1) if cos.dim() == 2 else total).to(cos.dtype)
    return dcos, dsin


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "rotate: positions, freqs and basis must not require grad for a second derivative, got a gradient that "
        "depends on theirs"
    )


call_rotate = register_autograd(LIB, "rotate", _rotate, _backward_rotate, _setup_rotate)
call_rotate_cos_sin = register_autograd(
    LIB, "rotate_cos_sin", _rotate_cos_sin, _backward_rotate_cos_sin, _setup_rotate_cos_sin
)
call_rotate_bwd = register_autograd(LIB, "rotate_bwd", _rotate_bwd, _no_double_backward)


# Autocast: q and k go to the autocast dtype, as in scaled_dot_product_attention; angles and the basis stay -----------


def _autocast(name: str, call: Callable[..., Pair], device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(q: Tensor, k: Tensor, *rest: Any) -> Pair:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            q, k = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k))
            return call(q, k, *rest)

    LIB.impl(name, cast, key)


for _name, _call in (("rotate", call_rotate), ("rotate_cos_sin", call_rotate_cos_sin)):
    _autocast(_name, _call, "cuda", "AutocastCUDA")
    _autocast(_name, _call, "cpu", "AutocastCPU")


# vmap ----------------------------------------------------------------------------------------------------------------


def _vmap(name: str, shared: tuple[int, ...]) -> None:
    """A mapped axis of q, k and the two angle tensors joins the batch; one of ``shared`` makes a loop of calls."""
    op = getattr(torch.ops.fastrpe, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Pair, tuple[int, int]]:
        n = info.batch_size
        tensors = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims)]
        if any(in_dims[i] is not None for i in shared):
            calls = [op(*(t if d is None else t[i] for t, d in zip(tensors, in_dims))) for i in range(n)]
            return (torch.stack([c[0] for c in calls]), torch.stack([c[1] for c in calls])), (0, 0)
        q, k, *tables = (t if d is not None else _repeat(t, n) for t, d in zip(tensors[:4], in_dims[:4]))
        batch = q.shape[1]
        for i in range(2, 4):
            t, table_dim = tables[i - 2], 3  # with the mapped axis; (L, C) tables have no batch axis of their own
            if i in shared:
                tables[i - 2] = args[i]
            elif in_dims[2] is None and in_dims[3] is None and args[i].dim() < table_dim:
                tables[i - 2] = args[i]
            else:
                t = t if t.dim() > table_dim else t.unsqueeze(1).expand(n, batch, *t.shape[1:])
                tables[i - 2] = t.flatten(0, 1)
        y = op(q.flatten(0, 1), k.flatten(0, 1), *tables, *args[4:])
        return (y[0].unflatten(0, (n, batch)), y[1].unflatten(0, (n, batch))), (0, 0)

    torch.library.register_vmap(f"fastrpe::{name}", rule, lib=LIB)


def _repeat(x: Any, n: int) -> Any:
    return x.expand(n, *x.shape) if isinstance(x, Tensor) else x


_vmap("rotate", shared=(3, 4))
_vmap("rotate_cos_sin", shared=())
