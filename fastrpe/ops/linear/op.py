"""The operator of linear attention: schema, kernel table, fake, autograd, autocast and vmap rules."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checks import fail
from ..autograd import first_result, is_plain, register_autograd
from ..features.reference import KINDS as FEATURE_KINDS
from ..features.reference import size_of
from ..hopper import aligned
from . import reference

LIB = torch.library.Library("fastrpe", "FRAGMENT")
INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? omega, str kind, bool causal, float scale, Tensor? a, float eps, "
    "bool normalize, Tensor? mask, Tensor? cu_seqlens, Tensor? kv, Tensor? z, Tensor? log_scale"
)
# The last three results are the state behind the last key; empty where neither the caller nor gradients need it.
LIB.define(f"linear_attention({INPUTS}, bool need_state, str backend) -> (Tensor, Tensor, Tensor, Tensor)")
# Takes the forward's state too, under names that begin with "last_"; gives the gradients of q, k, v, omega, a, kv, z.
LIB.define(
    f"linear_attention_bwd(Tensor dout, Tensor? dkv, Tensor? dz, {INPUTS}, Tensor last_kv, Tensor last_z, "
    "Tensor last_log_scale, bool need_omega, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

KINDS = (*FEATURE_KINDS, "features")
Results = tuple[Tensor, Tensor, Tensor, Tensor]
Prepared = tuple[Tensor | None, Tensor | None, str | int]


# Kernels -------------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(name: str, backend: str) -> Callable[..., Any]:
    """The kernel of a backend; `_prepare` says what it calls a kind."""
    if backend == "triton":
        from . import triton_impl

        kernel: Callable[..., Any] = getattr(triton_impl, name)
        return kernel
    native = getattr(torch.ops.fastrpe_native, name).default
    return functools.partial(torch._C._dispatch_call_boxed, native._handle)  # which looks for no overload


def _prepare(q: Tensor, omega: Tensor | None, kind: str, a: Tensor | None, backend: str) -> Prepared:
    """What kernels take: a projection, rounded to q's dtype, a bias of the exponents in that of the arithmetic, and
    their kind.

    OPRF's exponents are those of positive features with omega times sqrt(1 - 4 a) and the bias a |w|^2.
    """
    if omega is None:
        return None, None, KINDS.index(kind) if backend == "native" else kind
    dtype, bias = q.dtype, None
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if kind == "oprf" and a is not None:
        wide, a, kind = omega.to(acc), a.to(acc), "positive"
        omega, bias = wide * (1 - 4 * a) ** 0.5, (a * wide.square().sum(-1)).contiguous()
    on_gpu = q.is_cuda
    rounds = on_gpu and backend == "native" and omega.dtype == acc  # the kernel does, as it reads it
    if not rounds:
        omega = _to(omega, dtype)
    if not on_gpu:
        omega = _to(omega, acc)
    elif backend == "native":
        omega = aligned(omega)
    return omega.contiguous(), bias, KINDS.index(kind) if backend == "native" else kind


def _to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype=dtype)  # nothing to do is found sooner here, and a dtype by its name


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _forward(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    causal: bool,
    scale: float,
    a: Tensor | None,  # ()
    eps: float,
    normalize: bool,
    mask: Tensor | None,  # (B, S)
    cu_seqlens: Tensor | None,  # (N + 1,)
    kv: Tensor | None,  # (N, Hk, F, V)
    z: Tensor | None,  # (N, Hk, F)
    log_scale: Tensor | None,  # (N, Hk, F)
    need_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Prepared | None]:
    """The operator's results, and what the kernel was given, which its gradients take again."""
    if backend == "reference":
        if cu_seqlens is not None and not q.is_cuda:
            _check_packing(cu_seqlens, q.shape[2])
        results = reference.linear_attention(
            q, k, v, omega, kind, causal, scale, a, eps, normalize, mask, cu_seqlens, kv, z, log_scale
        )
        return *(results if need_state else _without_state(results)), None
    prepared = W, bias, code = _prepare(q, omega, kind, a, backend)
    if backend == "native" and q.is_cuda:
        q, k, v = aligned(q), aligned(k), aligned(v)
    rest = _contiguous(mask, cu_seqlens, kv, z, log_scale)
    args = (q, k, v, W, code, causal, scale, bias, eps, normalize, *rest)
    if backend == "native":
        return *_kernel("linear_attention", backend)(*args, need_state), prepared
    short = not need_state and is_short(q, k, v, omega, kind, causal, normalize, cu_seqlens, backend)
    results = _kernel("linear_attention", backend)(*args, short)
    return *(results if need_state else _without_state(results)), prepared


def _check_packing(cu_seqlens: Tensor, L: int) -> None:
    values = cu_seqlens.tolist()
    if values[0] < 0 or values[-1] > L:
        raise fail("linear_attention", "cu_seqlens", f"lie between 0 and L={L}", values)
    if any(a > b for a, b in itertools.pairwise(values)):
        raise fail("linear_attention", "cu_seqlens", "not fall", values)


def _linear_attention(*args: Any) -> Results:
    return _forward(*args)[:4]


def is_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor | None,
    kind: str,
    causal: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
    backend: str,
    dtype: torch.dtype | None = None,  # by default that of q
) -> bool:
    """Whether a backend takes a head's tokens at once and its gradients need no state: for up to 64 tokens the state
    is larger than they are."""
    native = backend == "native" and q.is_cuda
    if not (native or (backend == "triton" and (dtype or q.dtype) == torch.bfloat16)):
        return False
    if causal or not normalize or cu_seqlens is not None:
        return False
    F = size_of(q, omega, kind)
    if native:
        fits = F in (64, 128)
    else:
        heads = q.shape[-1] in (32, 64) and v.shape[-1] in (32, 64)
        fits = kind != "trigonometric" and heads and 32 <= F <= 128
    return fits and 0 < q.shape[2] <= 64 and 0 < k.shape[2] <= 64


def _without_state(results: Results) -> Results:
    out, kv, z, log_scale = results
    return out, kv.new_empty(0), z.new_empty(0), log_scale.new_empty(0)


def _gradients(
    prepared: Prepared | None,
    dout: Tensor,  # (B, H, L, V)
    dkv: Tensor | None,  # (N, Hk, F, V)
    dz: Tensor | None,  # (N, Hk, F)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    causal: bool,
    scale: float,
    a: Tensor | None,  # ()
    eps: float,
    normalize: bool,
    mask: Tensor | None,  # (B, S)
    cu_seqlens: Tensor | None,  # (N + 1,)
    kv: Tensor | None,  # (N, Hk, F, V)
    z: Tensor | None,  # (N, Hk, F)
    log_scale: Tensor | None,  # (N, Hk, F)
    last_kv: Tensor,  # (N, Hk, F, V)
    last_z: Tensor,  # (N, Hk, F)
    last_log_scale: Tensor,  # (N, Hk, F)
    need_omega: bool,
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, omega, a, kv and z; None for those of tensors that are not there, or not needed.

    ``prepared`` comes from `_forward`, or is made again.
    """
    if backend == "reference":
        inputs = (q, k, v, omega, kind, causal, scale, a, eps, normalize, mask, cu_seqlens, kv, z, log_scale)
        return _by_autograd((dout, dkv, dz), inputs, need_omega)
    if backend == "native" and q.is_cuda and not _has_gradients(q, omega, causal, kv, dkv, dz):
        backend, prepared = "triton", None
    W, bias, code = prepared or _prepare(q, omega, kind, a, backend)
    if backend == "native" and q.is_cuda:
        dout, q, k, v = aligned(dout), aligned(q), aligned(k), aligned(v)
    last = last_kv, last_z, last_log_scale
    dkv, dz, *rest = _contiguous(dkv, dz, mask, cu_seqlens, kv, z, log_scale, *last)
    args = dout, dkv, dz, q, k, v, W, code, causal, scale, bias, eps, normalize, *rest, need_omega
    if backend == "triton":
        short = not last_z.numel() and is_short(q, k, v, omega, kind, causal, normalize, cu_seqlens, backend)
        args = *args, short
    dq, dk, dv, domega, dbias, dkv0, dz0 = _kernel("linear_attention_bwd", backend)(*args)
    da = None
    if kv is None:
        dkv0 = dz0 = None
    if omega is None or not need_omega:
        domega = None
    else:
        if bias is not None and a is not None:
            wide, factor = omega.to(domega.dtype), (1 - 4 * a.to(domega.dtype)) ** 0.5
            square = wide.square().sum(-1)
            if normalize and not eps and kv is None and dkv is None and dz is None:
                # A bias that all features have cancels: dbias sums to 0, but for rounding, which need not be magnified.
                square = square - square.mean(-1, keepdim=True)
            da = ((dbias * square).sum() - (domega * wide).sum() * 2 / factor).to(a.dtype)
            domega = domega * factor + 2 * a.to(domega.dtype) * dbias.unsqueeze(-1) * wide
        domega = _to(domega, omega.dtype)
    return dq, dk, dv, domega, da, dkv0, dz0


def _has_gradients(
    q: Tensor, omega: Tensor | None, causal: bool, kv: Tensor | None, dkv: Tensor | None, dz: Tensor | None
) -> bool:
    """Whether CUDA kernels have the gradients of a call that they take forwards; Triton's have the others."""
    few = omega is None or omega.shape[-2] <= 128
    return kv is None and dkv is None and dz is None and (few or not causal)


def _linear_attention_bwd(*args: Any) -> tuple[Tensor, ...]:
    q = args[3]  # an operator's results are tensors: empty where there is no gradient
    return tuple(q.new_empty(0) if x is None else x for x in _gradients(None, *args))


DIFFERENTIABLE = (0, 1, 2, 3, 7, 12, 13)  # q, k, v, omega, a, kv and z among the inputs


def _by_autograd(dy: tuple[Tensor | None, ...], inputs: tuple[Any, ...], need_omega: bool) -> tuple[Tensor | None, ...]:
    """The reference's backward; below an operator autograd is off twice, by its mode and by the dispatcher's keys."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    tls = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set() - keys
    wanted = [i for i in DIFFERENTIABLE if inputs[i] is not None and (need_omega or i not in (3, 7))]
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(*tls):
        leaves = {i: inputs[i].detach().requires_grad_() for i in wanted}
        y = reference.linear_attention(*(leaves.get(i, x) for i, x in enumerate(inputs)))
        pairs = [(t, g.to(t.dtype)) for t, g in zip(y, dy) if g is not None and t.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:  # none where there are no rows
            outputs, upstream = zip(*pairs)
            found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    grads = {
        i: torch.zeros_like(x, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for (i, x), g in zip(leaves.items(), found)
    }
    return tuple(grads.get(i) for i in DIFFERENTIABLE)


LIB.impl("linear_attention", _linear_attention, "CompositeExplicitAutograd")
LIB.impl("linear_attention_bwd", _linear_attention_bwd, "CompositeExplicitAutograd")


# Fake ----------------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fastrpe::linear_attention", lib=LIB)
def _(q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None, kind: str, *rest: Any) -> Results:
    cu_seqlens, need_state = rest[-6], rest[-2]
    wide = v.new_empty(0, dtype=torch.promote_types(q.dtype, torch.float32))
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if not need_state:
        return out, wide, wide.new_empty(0), wide.new_empty(0)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = N, k.shape[1], size_of(q, omega, kind)
    return out, wide.new_empty(*heads, v.shape[-1]), wide.new_empty(heads), wide.new_empty(heads)


@torch.library.register_fake("fastrpe::linear_attention_bwd", lib=LIB)
def _(
    dout: Tensor, dkv: Tensor | None, dz: Tensor | None, q: Tensor, k: Tensor, v: Tensor, omega: Tensor | None,
    kind: str, causal: bool, scale: float, a: Tensor | None, eps: float, normalize: bool, mask: Tensor | None,
    cu_seqlens: Tensor | None, kv: Tensor | None, z: Tensor | None, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    need_omega = rest[-2]
    there = (q, k, v, *((omega, a) if need_omega else (None, None)), kv, z)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in there)


# Autograd ------------------------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    q, k, v, omega, kind, causal, _, _, _, normalize, _, cu_seqlens, *_, need_state, backend = inputs
    if not (need_state or is_short(q, k, v, omega, kind, causal, normalize, cu_seqlens, backend)):
        raise RuntimeError("linear_attention: need_state must be True where an input requires grad, got False")
    _save(ctx, inputs, (*output, None))
    ctx.mark_non_differentiable(output[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, omega, kind, causal, scale, a, eps, normalize, mask, cu_seqlens, kv, z, log_scale, _, backend = inputs
    _, *last, prepared = output
    # A projection that the kernel took as it is may change before the backward, where hooks have saved a copy.
    ctx.prepared = None if prepared is not None and prepared[0] is omega else prepared
    ctx.options = kind, causal, scale, eps, normalize, backend
    ctx.save_for_backward(q, k, v, omega, a, mask, cu_seqlens, kv, z, log_scale, *last)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dout: Tensor | None, dkv: Tensor | None = None, dz: Tensor | None = None, _: Any = None
) -> tuple[Any, ...]:
    q, k, v, omega, a, mask, cu_seqlens, kv, z, log_scale, *last = ctx.saved_tensors
    kind, causal, scale, eps, normalize, backend = ctx.options
    needs = ctx.needs_input_grad
    if dout is None and dkv is None and dz is None:
        return (None,) * 17
    if dout is None:
        dout = q.new_zeros(()).expand(*q.shape[:-1], v.shape[-1])
    args = (
        dout, dkv, dz, q, k, v, omega, kind, causal, scale, a, eps, normalize, mask, cu_seqlens, kv, z, log_scale,
        *last, needs[3] or needs[7], backend,
    )  # fmt: skip
    plain = not torch.is_grad_enabled() and is_plain(args)
    grads = _gradients(ctx.prepared, *args) if plain else torch.ops.fastrpe.linear_attention_bwd.default(*args)
    dq, dk, dv, domega, da, dkv0, dz0 = grads
    # The state is exp(log_scale) times kv and z.
    dlog_scale = (dkv0 * kv).sum(-1) + dz0 * z if needs[14] else None
    return (
        dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None, domega if needs[3] else None,
        None, None, None, da if needs[7] else None, None, None, None, None, dkv0 if needs[12] else None,
        dz0 if needs[13] else None, dlog_scale, None, None,
    )  # fmt: skip


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "linear_attention: inputs must not require grad for a second derivative, got a gradient that depends on theirs"
    )


call = register_autograd(LIB, "linear_attention", _linear_attention, _backward, _setup)
call_first = first_result(LIB, "linear_attention", _forward, _backward, _save)
register_autograd(LIB, "linear_attention_bwd", _linear_attention_bwd, _no_double_backward)


# Autocast: q, k and v go to the autocast dtype, as in scaled_dot_product_attention; omega, a and the state stay -------


def _autocast(device_type: str, key: str) -> None:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Results:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
            y: Results = call(q, k, v, *rest)
            return y

    LIB.impl("linear_attention", cast, key)


_autocast("cuda", "AutocastCUDA")
_autocast("cpu", "AutocastCPU")


# vmap: a loop, since a mapped projection or packing is a problem of its own ------------------------------------------


def _vmap(name: str) -> None:
    op = getattr(torch.ops.fastrpe, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tensors = [x if d is None else x.movedim(d, 0) for x, d in zip(args, in_dims)]
        calls = [op(*(t if d is None else t[i] for t, d in zip(tensors, in_dims))) for i in range(info.batch_size)]
        results = tuple(torch.stack(parts) for parts in zip(*calls))
        return results, (0,) * len(results)

    torch.library.register_vmap(f"fastrpe::{name}", rule, lib=LIB)


_vmap("linear_attention")
_vmap("linear_attention_bwd")
