"""Public functions of linear attention: Performers, and any other feature map."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...backend import resolve
from ...checks import (
    FLOATS,
    check_choice,
    check_device,
    check_dtype,
    check_no_tangents,
    check_shape,
    check_type,
    fail,
    wrong_shape,
    wrong_type,
)
from ..features.reference import EXPONENTIAL, SOFTMAX, WITHOUT_OMEGA, constant, default_scale, size_of
from ..hopper import is_hopper
from .op import KINDS, call, call_first, is_short
from .reference import EMPTY

SCALARS = (float, int, torch.SymFloat)


class State(NamedTuple):
    """Sums over the keys so far, from which decoding goes on: S = exp(log_scale) kv, and so for z.

    In float32 (float64 for float64), without the features' constant. N is B, or the number of packed sequences.
    Kernels count on a log_scale of 0 where features have no exponents, and one for all trigonometric ones of a head.
    """

    kv: Tensor  # (N, Hk, F, V)
    z: Tensor  # (N, Hk, F)
    log_scale: Tensor  # (N, Hk, F)


def linear_attention(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None = None,  # (M, D) or (Hk, M, D)
    kind: str = "positive",
    *,
    causal: bool = False,
    scale: float | None = None,
    a: Tensor | float | None = None,  # ()
    eps: float = 0.0,
    normalize: bool = True,
    mask: Tensor | None = None,  # (B, S)
    cu_seqlens: Tensor | None = None,  # (N + 1,)
    state: State | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, State]:
    r"""Attention in time linear in the length, by features computed inside: Performers and their kin.

    .. math:: o_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

    over all keys j, or those with j <= i when causal. Equivalent to, but for overflow and rounding::

        w = random_features(q, omega, kind) @ random_features(k, omega, kind).mT    # tril() when causal
        out = w / w.sum(-1, keepdim=True) @ v                                       # w @ v if not normalize

    No exponential is taken above 1: key features are held relative to the largest of the keys (when causal, of the
    keys so far, and the sums are rescaled as it grows), a query's relative to its row's largest. Both factors cancel.
    A denominator of positive features is at least 1, in every dtype and for any norm of q and k; and no key, however
    large, changes a causal output before it by a single bit (with a GPU's kernels, by more than rounding).

    Args:
        q: queries, ``(B, H, L, D)``, any strides; float16, bfloat16, float32 or float64.
        k: keys, ``(B, Hk, S, D)`` of the same dtype, ``H`` a multiple of ``Hk`` (grouped queries); causal: S = L.
        v: values, ``(B, Hk, S, V)``, of the same dtype.
        omega: projection, ``(M, D)``, or ``(Hk, M, D)`` for each key head and its group of query heads; None for relu,
            exp and elu of q and k themselves. It is rounded to the dtype of q, as autocast rounds a weight.
        kind: positive, hyperbolic, trigonometric, oprf, relu, exp or elu, as in `random_features`; or ``"features"``:
            q and k are features already.
        causal: each query sees the keys up to its own.
        scale: multiplies q and k before the projection; by default that of `random_features`.
        a: OPRF's A, a number or a tensor of no dimensions; given for oprf alone.
        eps: added to every feature, as in `random_features`; with relu it keeps rows from having no weight at all.
        normalize: divide by the sum of the weights. Without, the output overflows where its formula does.
        mask: ``(B, S)`` bool, True for keys that take part; what the others hold is not looked at.
        cu_seqlens: ``(N + 1,)`` int32, where each of N sequences packed into a batch of one begins, and the last ends:
            ``torch.nn.functional.pad(lengths.cumsum(0), (1, 0))``. Tokens outside give zeros; numbers that fall, or lie
            outside the tokens, raise on a CPU and give NaN on a GPU, which would have to be waited for.
        state: the keys before the first, from an earlier call with ``return_state``; causal alone.
        return_state: give the state behind the last key too, for the next call; causal alone.
        backend: ``"reference"``, ``"native"`` (CPU; on Hopper normalised positive, oprf or exp features in 16 bits,
            bfloat16 when causal, with D = V = 64 and 64, 128 or 256 features; Triton has the gradients of causal
            states and of 256 causal features), ``"triton"`` (GPU), or None for the fastest that runs here.

    Returns:
        ``(B, H, L, V)``, contiguous, of the dtype of q; with ``return_state`` a pair of it and the `State`. Rows whose
        weights sum to 0, with no key among others, give zeros. Features and sums are in float32 (float64 for float64),
        the result is rounded once. Deterministic. Gradients flow to q, k, v, omega, a and the state, and from the
        state's kv and z; log_scale is a constant to autograd. The backward computes features again and keeps none.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or choice.
        NotImplementedError: the named backend cannot serve this device, dtype, kind or size; it says which can.
        RuntimeError: the named backend does not run on this machine.

    Source:
        Performers (arXiv 2009.14794) section 2.1; Katharopoulos et al. (arXiv 2006.16236) eq. 5 and 9.
    """
    op = "linear_attention"
    # Small calls cost what their checks cost: look at a shape once, and call a check where it is going to fail.
    if not (isinstance(causal, bool) and isinstance(normalize, bool) and isinstance(return_state, bool)):
        for argument, flag in (("causal", causal), ("normalize", normalize), ("return_state", return_state)):
            check_type(op, argument, flag, bool)
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise wrong_shape(op, "q", q, ("B", "H", "L", "D"))
    B, H, L, D = q.shape
    device, dtype = q.device, q.dtype
    if dtype not in FLOATS:
        check_dtype(op, "q", q)
    if D == 0:
        raise fail(op, "q", "have D > 0", tuple(q.shape))
    if not isinstance(k, Tensor) or len(shape := k.shape) != 4 or shape[0] != B or shape[3] != D:
        raise wrong_shape(op, "k", k, ("B", "Hk", "S", "D"), B=B, D=D)
    _, Hk, S, _ = shape
    if Hk == 0 or (H != Hk and H % Hk):
        raise fail(op, "k", f"have a number of heads that divides H={H}", Hk)
    if causal and S != L:
        raise fail(op, "k", f"have as many tokens as q, L={L}, when causal", S)
    if not isinstance(v, Tensor) or len(shape := v.shape) != 4 or shape[:3] != (B, Hk, S):
        raise wrong_shape(op, "v", v, ("B", "Hk", "S", "V"), B=B, Hk=Hk, S=S)
    V = shape[3]
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device.type)
    if k.dtype != dtype or v.dtype != dtype or k.device != device or v.device != device:
        # Autocast brings all dtypes to one, but for float64.
        dtypes = tuple(d for d in FLOATS if d != torch.float64) if autocast and dtype != torch.float64 else (dtype,)
        for argument, x in (("k", k), ("v", v)):
            check_dtype(op, argument, x, dtypes)
            check_device(op, argument, x, device)
    if kind not in KINDS:
        check_choice(op, "kind", kind, KINDS)
    if omega is None:
        if kind not in (*WITHOUT_OMEGA, "features"):
            raise fail(op, "omega", f"be given for kind {kind!r}", None)
    else:
        if kind == "features":
            came = tuple(omega.shape) if isinstance(omega, Tensor) else repr(omega)
            raise fail(op, "omega", "be None for kind 'features'", came)
        _check_omega(op, omega, Hk, D, device)
    if scale is None:
        scale = default_scale(kind, D)
    elif kind == "features":
        raise fail(op, "scale", "be None for kind 'features'", scale)
    elif not isinstance(scale, SCALARS):
        check_type(op, "scale", scale, *SCALARS)
    if not isinstance(eps, (float, int)):
        check_type(op, "eps", eps, float, int)
    if not eps >= 0 or (eps and kind == "trigonometric"):  # a NaN neither
        raise fail(op, "eps", "be 0 for kind 'trigonometric'" if eps > 0 else "be at least 0", eps)
    a = _check_a(op, q, kind, a)
    N = B
    if cu_seqlens is not None:
        check_shape(op, "cu_seqlens", cu_seqlens, ("N + 1",))
        check_dtype(op, "cu_seqlens", cu_seqlens, (torch.int32,))
        check_device(op, "cu_seqlens", cu_seqlens, device)
        N = cu_seqlens.shape[0] - 1
        if N < 0:
            raise fail(op, "cu_seqlens", "have at least one number", 0)
        if B != 1 or S != L:
            raise fail(op, "q", f"have B=1 and L=S={S} where sequences are packed", tuple(q.shape))
    if mask is not None:
        check_shape(op, "mask", mask, ("B", "S"), B=B, S=S)
        check_dtype(op, "mask", mask, (torch.bool,))
        check_device(op, "mask", mask, device)
    if return_state and not causal:
        raise fail(op, "return_state", "be False unless causal", True)
    kv = z = log_scale = None
    F = size_of(q, omega, kind)
    if state is not None:
        kv, z, log_scale = _check_state(op, q, v, state, causal, N, F)
        if kind in EXPONENTIAL:  # where there is no key yet, whatever scale was given
            log_scale = torch.where(z == 0, EMPTY, log_scale)
    # The dtype that the operator will see.
    cast = torch.get_autocast_dtype(device.type) if autocast and dtype != torch.float64 else dtype
    name = _resolve(op, device, backend, cast, kind, causal, eps, normalize, cu_seqlens is not None, D, V, F)
    if forward_ad._current_level >= 0:
        check_no_tangents(op, ("q", q), ("k", k), ("v", v), ("omega", omega), ("a", a), ("state", kv), ("state", z))
    weighted = not normalize and kind in SOFTMAX
    if weighted and not autocast:  # by the features' constant, before the one rounding
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    need_state = return_state
    if torch.is_grad_enabled() and not return_state:
        need_state = not is_short(q, k, v, omega, kind, causal, normalize, cu_seqlens, name, cast)
    args = q, k, v, omega, kind, causal, scale, a, eps, normalize, mask, cu_seqlens, kv, z, log_scale, need_state, name
    if return_state:
        out, *sums = call(*args)
    else:
        out = call_first(*args)
    if weighted:
        out = (out * constant(kind, D if omega is None else omega.shape[-2], D, a) ** 2).to(
            out.dtype if autocast else dtype
        )
    return (out, State(*sums)) if return_state else out


def linear_attention_step(
    q: Tensor,  # (B, H, D)
    k: Tensor,  # (B, Hk, D)
    v: Tensor,  # (B, Hk, V)
    state: State | None = None,
    omega: Tensor | None = None,  # (M, D) or (Hk, M, D)
    kind: str = "positive",
    *,
    scale: float | None = None,
    a: Tensor | float | None = None,  # ()
    eps: float = 0.0,
    normalize: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    r"""One token of causal `linear_attention`, in time O(F V) however many came before.

    .. math:: S \leftarrow S + \phi(k) v^\top, \quad z \leftarrow z + \phi(k), \quad
        o = \frac{\phi(q)^\top S}{\phi(q)^\top z}

    Equivalent to ``linear_attention`` of a sequence of one, ``causal=True, state=state, return_state=True``.

    Args:
        q: query, ``(B, H, D)``.
        k: key, ``(B, Hk, D)``.
        v: value, ``(B, Hk, V)``.
        state: what the step before returned; None for the first token.
        omega, kind, scale, a, eps, normalize, backend: as in `linear_attention`.

    Returns:
        The output, ``(B, H, V)``, and the new state; as in `linear_attention`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as `linear_attention`.

    Source:
        Katharopoulos et al. (arXiv 2006.16236) eq. 18-20.
    """
    op = "linear_attention_step"
    check_shape(op, "q", q, ("B", "H", "D"))
    check_shape(op, "k", k, ("B", "Hk", "D"), B=q.shape[0], D=q.shape[2])
    check_shape(op, "v", v, ("B", "Hk", "V"), B=q.shape[0], Hk=k.shape[1])
    out, state = linear_attention(
        q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), omega, kind, causal=True, scale=scale, a=a, eps=eps,
        normalize=normalize, state=state, return_state=True, backend=backend,
    )  # fmt: skip
    return out.squeeze(2), state


def _check_state(
    op: str, q: Tensor, v: Tensor, state: State, causal: bool, N: int, F: int
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(state, tuple) or len(state) != 3:
        raise wrong_type(op, "state", state, State)
    if not causal:
        raise fail(op, "state", "be None unless causal", "a state")
    dtype = torch.promote_types(q.dtype, torch.float32)
    sizes = dict(N=N, Hk=v.shape[1], F=F, V=v.shape[-1])
    for argument, x, shape in zip(State._fields, state, (("N", "Hk", "F", "V"), ("N", "Hk", "F"), ("N", "Hk", "F"))):
        check_shape(op, f"state.{argument}", x, shape, **sizes)
        check_dtype(op, f"state.{argument}", x, (dtype,))
        check_device(op, f"state.{argument}", x, q.device)
    kv, z, log_scale = state
    return kv, z, log_scale


def _check_omega(op: str, omega: Tensor, Hk: int, D: int, device: torch.device) -> None:
    shape = omega.shape if isinstance(omega, Tensor) else ()
    if len(shape) < 2 or shape[-1] != D or shape[:-2] not in ((), (Hk,)):
        raise wrong_shape(op, "omega", omega, ("M", "D"), ("Hk", "M", "D"), Hk=Hk, D=D)
    if omega.dtype not in FLOATS or omega.device != device:
        check_dtype(op, "omega", omega)
        check_device(op, "omega", omega, device)
    if shape[-2] == 0:
        raise fail(op, "omega", "have at least one row", tuple(omega.shape))


def _check_a(op: str, q: Tensor, kind: str, a: Tensor | float | None) -> Tensor | None:
    """OPRF's A as a tensor; a tensor's value is not looked at, since that would wait for the device."""
    if kind != "oprf":
        if a is not None:
            raise fail(op, "a", f"be None for kind {kind!r}", a)
        return None
    if a is None:
        raise fail(op, "a", "be given for kind 'oprf'", None)
    if not isinstance(a, Tensor):
        check_type(op, "a", a, Tensor, float, int)
        if not a < 1 / 8:
            raise fail(op, "a", "be less than 1/8", a)
        return torch.full((), a, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    check_shape(op, "a", a, ())
    check_dtype(op, "a", a)
    check_device(op, "a", a, q.device)
    return a


def _triton_limit(
    dtype: torch.dtype, kind: str, causal: bool, eps: float, normalize: bool, packed: bool, D: int, V: int, F: int
) -> str:
    """What keeps the Triton kernels from a call, or an empty string."""
    if dtype == torch.float64:
        return "float64"
    if packed:
        return "packed sequences"
    if eps and kind in EXPONENTIAL:
        return "exponential features with eps"
    if kind == "trigonometric" and (causal or not normalize):
        return "trigonometric features that are causal or not normalised"
    if max(D, V) > 256 or F > 512 or (causal and _power(F) * (_power(D) + _power(V)) > 2**15):
        return f"D={D}, V={V} and F={F}"
    return ""


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length()) if n else 16


def _cuda_limit(
    device: torch.device, dtype: torch.dtype, kind: str, causal: bool, eps: float, normalize: bool, packed: bool,
    D: int, V: int, F: int,
) -> str:  # fmt: skip
    """What keeps the CUDA kernels from a call, or an empty string."""
    if dtype not in (torch.float16, torch.bfloat16):
        return str(dtype).removeprefix("torch.")
    if kind not in ("positive", "oprf", "exp"):
        return f"kind {kind!r}"
    if packed or eps or not normalize:
        return "packed sequences, eps, or sums that are not normalised"
    if causal and dtype == torch.float16:  # which has no room for the small weights of a row before a large key
        return "causal float16"
    if D != 64 or V != 64 or F not in (64, 128, 256):
        return f"D={D}, V={V} and F={F}"
    return "" if is_hopper(device.index) else "a GPU whose compute capability is not 9"


def _resolve(op: str, device: torch.device, backend: str | None, *options: Any) -> str:
    """The first that can: kernels for Hopper, then Triton's, of which a Performer's forward takes twice as long."""
    on_gpu = device.type == "cuda"
    native = _cuda_limit(device, *options) if on_gpu else ""
    if backend is None and not native and resolve(op, device, None, ("native",)) == "native":
        return "native"
    limits = {"triton": _triton_limit(*options)} | ({"native": native} if on_gpu else {})
    order = ("native", "triton") if on_gpu else ("native",)
    name = resolve(op, device, backend, tuple(b for b in order if not limits.get(b)))
    limit = limits.get(name)
    if limit:
        others = [*(b for b in limits if not limits[b]), "reference"]
        raise NotImplementedError(f"{op}: backend must be {' or '.join(map(repr, others))} for {limit}, got {name!r}")
    return name
