"""Public functions of the rotary family: RoPE in all its forms and the STRING encodings."""

import torch
from torch import Tensor

from ...backend import resolve
from ...checks import check_device, check_dtype, check_shape, check_type, fail

# Measured (bench/REPORT.md): the native kernels win on every case, on a GPU and on a CPU.
PREFERENCE = ("native", "triton")


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
    k = _check_qk(op, q, k, prefix, interleaved, inverse)
    L = q.shape[2] - prefix
    check_shape(op, "positions", positions, ("L", "C"), ("B", "L", "C"), B=q.shape[0], L=L)
    C = positions.shape[-1]
    if not 1 <= C <= 4:
        raise fail(op, "positions", "have C = 1 to 4 coordinates", C)
    heads = _heads_of(op, "freqs", freqs, q, k)
    check_shape(op, "freqs", freqs, ("C", "R"), ("H", "C", "R"), H=heads, C=C)
    if 2 * freqs.shape[-1] > q.shape[3]:
        raise fail(op, "freqs", f"have at most R = D // 2 = {q.shape[3] // 2} planes", freqs.shape[-1])
    for name, x in (("positions", positions), ("freqs", freqs)):
        check_dtype(op, name, x)
        check_device(op, name, x, q.device)
    if basis is not None:
        heads = _heads_of(op, "basis", basis, q, k)
        check_shape(op, "basis", basis, ("D", "D"), ("H", "D", "D"), H=heads, D=q.shape[3])
        check_dtype(op, "basis", basis)
        check_device(op, "basis", basis, q.device)
    check_type(op, "factor", factor, float, int)
    name = resolve(op, q.device, backend, PREFERENCE)
    y: tuple[Tensor, Tensor] = torch.ops.fastrpe.rotate(
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
    k = _check_qk(op, q, k, prefix, interleaved, inverse)
    L = q.shape[2] - prefix
    check_shape(op, "cos", cos, ("L", "R"), ("B", "L", "R"), B=q.shape[0], L=L)
    check_type(op, "sin", sin, Tensor)
    if sin.shape != cos.shape:
        raise fail(op, "sin", f"have the shape of cos, {tuple(cos.shape)}", tuple(sin.shape))
    if 2 * cos.shape[-1] > q.shape[3]:
        raise fail(op, "cos", f"have at most R = D // 2 = {q.shape[3] // 2} planes", cos.shape[-1])
    for name, x in (("cos", cos), ("sin", sin)):
        check_dtype(op, name, x)
        check_device(op, name, x, q.device)
    name = resolve(op, q.device, backend, PREFERENCE)
    y: tuple[Tensor, Tensor] = torch.ops.fastrpe.rotate_cos_sin(q, k, cos, sin, interleaved, inverse, prefix, name)
    return y


def _check_qk(op: str, q: Tensor, k: Tensor | None, prefix: int, interleaved: bool, inverse: bool) -> Tensor:
    check_shape(op, "q", q, ("B", "H", "L", "D"))
    check_dtype(op, "q", q)
    if k is None:
        k = q[:, :0]
    else:
        check_shape(op, "k", k, ("B", "Hk", "L", "D"), B=q.shape[0], L=q.shape[2], D=q.shape[3])
        check_device(op, "k", k, q.device)
        # Autocast, which meta tensors do not have, brings both to one dtype.
        if k.dtype != q.dtype and not (q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type)):
            check_dtype(op, "k", k, (q.dtype,))
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise fail(op, "k", f"have a number of heads that divides H={q.shape[1]}", k.shape[1])
    check_type(op, "interleaved", interleaved, bool)
    check_type(op, "inverse", inverse, bool)
    check_type(op, "prefix", prefix, int, torch.SymInt)
    if not 0 <= prefix <= q.shape[2]:
        raise fail(op, "prefix", f"lie between 0 and L={q.shape[2]}", prefix)
    return k


def _heads_of(op: str, argument: str, x: Tensor, q: Tensor, k: Tensor) -> int:
    """The number of heads that a per-head ``x`` must have: the key heads, or without keys a divisor of H."""
    if k.shape[1]:
        return k.shape[1]
    check_type(op, argument, x, Tensor)
    heads = x.shape[0] if x.dim() == 3 else 1
    return heads if heads and q.shape[1] % heads == 0 else q.shape[1]
