"""Public functions of the rotary family: RoPE in all its forms and the STRING encodings."""

import torch
from torch import Tensor

from ...backend import resolve
from ...checks import FLOATS, check_device, check_dtype, check_shape, check_type, fail, wrong_shape, wrong_type
from .op import call_rotate, call_rotate_cos_sin

# Measured (bench/REPORT.md): the native kernels win on every case, on a GPU and on a CPU.
PREFERENCE = ("native", "triton")
INTS = (int, torch.SymInt)


def rotate(
    q: Tensor,  # (B, H, L, D)
    k: Tensor | None,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    basis: Tensor | None = None,  # (D, D) or (Hk, D, D)
    *,
    interleaved: bool = False,
    inverse: bool = False,
    factor: float = 1.0,
    prefix: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rotate queries and keys by their positions: RoPE, and STRING when a basis is given.

    .. math:: y_l = \mathrm{RoPE}(p_l) \, P \, x_l, \qquad
        \mathrm{RoPE}(p)_r = f \begin{pmatrix} \cos a_r & -\sin a_r \\ \sin a_r & \cos a_r \end{pmatrix},
        \quad a_r = \sum_c p_c \, \omega_{cr}

    for each plane r of two coordinates, so that scores depend on positions through p_j - p_i alone. Equivalent to::

        a = positions @ freqs                                    # (L, R)
        x1, x2 = (x @ basis.mT)[..., : 2 * R].chunk(2, -1)       # or [0::2], [1::2] when interleaved
        y = cat(x1 * cos(a) - x2 * sin(a), x2 * cos(a) + x1 * sin(a), rest)

    Args:
        q: queries, ``(B, H, L, D)``, any strides; float16, bfloat16, float32 or float64.
        k: keys, ``(B, Hk, L, D)`` of the same dtype, ``H`` a multiple of ``Hk`` (grouped queries); or None to rotate
            ``q`` alone (the second result is then empty, ``(B, 0, L, D)``).
        positions: coordinates, ``(L - prefix, C)``, or ``(B, L - prefix, C)`` for packed or shifted sequences; any
            unit, floating point, C = 1 to 4.
        freqs: radians per unit of position, ``(C, R)``, or ``(Hk, C, R)`` for each key head and its group of query
            heads. With ``2 R < D`` the last ``D - 2 R`` coordinates are not rotated (partial rotary).
        basis: orthogonal P applied before the rotation, ``(D, D)`` or ``(Hk, D, D)``. Not checked for orthogonality.
        interleaved: plane r is ``(2 r, 2 r + 1)``; by default it is ``(r, r + R)``.
        inverse: apply the adjoint instead, ``P^T RoPE(p)^T x``; this is the inverse where ``factor`` is 1.
        factor: multiplies cos and sin (YaRN's and LongRoPE's attention factor).
        prefix: the first ``prefix`` tokens (CLS, registers) have no position and are copied bit for bit.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the fastest that runs here.

    Returns:
        ``(q', k')``, contiguous, of the shapes and dtype of ``q`` and ``k``. Computed in float32 (float64 for float64)
        and rounded once. The phase is reduced with a compensated product: for |position| up to 1e6 a bfloat16 result
        lies within one ulp, a float32 result within 2e-6, of its pair's norm. For 16-bit inputs the GPU kernels use
        the hardware's sine (absolute error 5e-7). Deterministic. Gradients flow to q, k, positions, freqs and basis.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or choice.
        RuntimeError: the named backend does not run on this machine.

    Source:
        RoFormer (arXiv 2104.09864) eq. 15-16; STRING (arXiv 2502.02562) theorem 3.4.
    """
    op = "rotate"
    k, B, H, Hk, L, D = _check_qk(op, q, k, prefix, interleaved, inverse)
    L = L - prefix
    if not isinstance(positions, Tensor) or positions.shape[:-1] != ((L,) if positions.dim() == 2 else (B, L)):
        raise wrong_shape(op, "positions", positions, ("L", "C"), ("B", "L", "C"), B=B, L=L)
    C = positions.shape[-1]
    if not 1 <= C <= 4:
        raise fail(op, "positions", "have C = 1 to 4 coordinates", C)
    heads = Hk or _heads_of(freqs, H)
    if not isinstance(freqs, Tensor) or freqs.shape[:-1] != ((C,) if freqs.dim() == 2 else (heads, C)):
        raise wrong_shape(op, "freqs", freqs, ("C", "R"), ("H", "C", "R"), H=heads, C=C)
    R = freqs.shape[-1]
    if 2 * R > D:
        raise fail(op, "freqs", f"have at most R = D // 2 = {D // 2} planes", R)
    device = q.device
    _check_table(op, "positions", positions, device)
    _check_table(op, "freqs", freqs, device)
    if basis is not None:
        heads = Hk or _heads_of(basis, H)
        if not isinstance(basis, Tensor) or basis.shape != ((D, D) if basis.dim() == 2 else (heads, D, D)):
            raise wrong_shape(op, "basis", basis, ("D", "D"), ("H", "D", "D"), H=heads, D=D)
        _check_table(op, "basis", basis, device)
    if not isinstance(factor, (float, int)):
        raise wrong_type(op, "factor", factor, float, int)
    name = resolve(op, device, backend, PREFERENCE)
    y: tuple[Tensor, Tensor] = call_rotate(
        q, k, positions, freqs, basis, interleaved, inverse, float(factor), prefix, name
    )
    return y


def rotate_cos_sin(
    q: Tensor,  # (B, H, L, D)
    k: Tensor | None,  # (B, Hk, L, D)
    cos: Tensor,  # (L - prefix, R) or (B, L - prefix, R)
    sin: Tensor,  # as cos
    *,
    interleaved: bool = False,
    inverse: bool = False,
    prefix: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Rotate queries and keys by tables of cosines and sines, for callers who have them.

    .. math:: y_{l,r} = \begin{pmatrix} \cos_{lr} & -\sin_{lr} \\ \sin_{lr} & \cos_{lr} \end{pmatrix} x_{l,r}

    Equivalent to `rotate` with ``cos, sin = cos(positions @ freqs), sin(positions @ freqs)``, at the tables' precision.

    Args:
        q: queries, ``(B, H, L, D)``, any strides; float16, bfloat16, float32 or float64.
        k: keys, ``(B, Hk, L, D)`` of the same dtype, ``H`` a multiple of ``Hk``; or None to rotate ``q`` alone.
        cos: ``(L - prefix, R)`` or ``(B, L - prefix, R)``, one column per plane (Hugging Face's tables repeat
            each column: pass ``cos[..., : cos.shape[-1] // 2]``).
        sin: as ``cos``.
        interleaved: plane r is ``(2 r, 2 r + 1)``; by default it is ``(r, r + R)``.
        inverse: apply the adjoint, that is, negate ``sin``.
        prefix: the first ``prefix`` tokens are copied bit for bit.
        backend: ``"reference"``, ``"native"``, ``"triton"``, or None for the fastest that runs here.

    Returns:
        ``(q', k')``, contiguous, computed in float32 (float64 for float64) and rounded once. Deterministic. Gradients
        flow to q, k, cos and sin.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or choice.
        RuntimeError: the named backend does not run on this machine.

    Source:
        RoFormer (arXiv 2104.09864) eq. 34.
    """
    op = "rotate_cos_sin"
    k, B, _, _, L, D = _check_qk(op, q, k, prefix, interleaved, inverse)
    check_shape(op, "cos", cos, ("L", "R"), ("B", "L", "R"), B=B, L=L - prefix)
    check_type(op, "sin", sin, Tensor)
    if sin.shape != cos.shape:
        raise fail(op, "sin", f"have the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))
    if 2 * cos.shape[-1] > D:
        raise fail(op, "cos", f"have at most R = D // 2 = {D // 2} planes", cos.shape[-1])
    device = q.device
    _check_table(op, "cos", cos, device)
    _check_table(op, "sin", sin, device)
    name = resolve(op, device, backend, PREFERENCE)
    y: tuple[Tensor, Tensor] = call_rotate_cos_sin(q, k, cos, sin, interleaved, inverse, prefix, name)
    return y


def _check_qk(
    op: str,
    q: Tensor,  # (B, H, L, D)
    k: Tensor | None,  # (B, Hk, L, D)
    prefix: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, int, int, int, int, int]:
    """Keys, empty if there are none, and B, H, Hk, L, D.

    Small rotations cost what their checks cost: look at a shape once, and call a check where it is going to fail.
    """
    if not isinstance(q, Tensor) or q.dim() != 4:
        raise wrong_shape(op, "q", q, ("B", "H", "L", "D"))
    B, H, L, D = q.shape
    device, dtype, Hk = q.device, q.dtype, 0
    if dtype not in FLOATS:
        check_dtype(op, "q", q)
    if k is None:
        k = q[:, :0]
    else:
        if not isinstance(k, Tensor) or k.dim() != 4 or k.shape != (B, Hk := k.shape[1], L, D):
            raise wrong_shape(op, "k", k, ("B", "Hk", "L", "D"), B=B, L=L, D=D)
        if k.device != device:
            check_device(op, "k", k, device)
        # Autocast, which meta tensors do not have, brings both to one dtype.
        if k.dtype != dtype and not (device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type)):
            check_dtype(op, "k", k, (dtype,))
        if Hk == 0 or H % Hk:
            raise fail(op, "k", f"have a number of heads that divides H={H}", Hk)
    if not (isinstance(interleaved, bool) and isinstance(inverse, bool) and isinstance(prefix, INTS)):
        check_type(op, "interleaved", interleaved, bool)
        check_type(op, "inverse", inverse, bool)
        check_type(op, "prefix", prefix, *INTS)
    if not 0 <= prefix <= L:
        raise fail(op, "prefix", f"lie between 0 and L={L}", prefix)
    return k, B, H, Hk, L, D


def _check_table(op: str, argument: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in FLOATS or x.device != device:
        check_dtype(op, argument, x)
        check_device(op, argument, x, device)


def _heads_of(x: Tensor, H: int) -> int:
    """The number of heads that a per-head ``x`` must have where there are no keys: a divisor of H."""
    heads = x.shape[0] if isinstance(x, Tensor) and x.dim() == 3 else 1
    return heads if heads and H % heads == 0 else H
