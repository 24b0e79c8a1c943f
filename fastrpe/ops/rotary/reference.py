"""The specification of the rotary family: plain, differentiable PyTorch."""

import torch
from torch import Tensor


def rotate(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    basis: Tensor | None = None,  # (D, D) or (Hk, D, D)
    interleaved: bool = False,
    inverse: bool = False,
    factor: float = 1.0,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reference for `fastrpe.ops.rotate`."""
    # Products up to 1e6 x 1 need float64: float32 would lose the phase's fraction.
    equation = "...lc,cr->...lr" if freqs.dim() == 2 else "...lc,hcr->...hlr"
    angle = torch.einsum(equation, positions.double(), freqs.double())
    if freqs.dim() == 2:
        angle = angle.unsqueeze(-3)
    cos, sin = angle.cos() * factor, angle.sin() * factor  # (B or nothing, Hk or 1, L - prefix, R)
    y = [_rotate(x, cos, sin, basis, interleaved, inverse, prefix) for x in (q, k)]
    return y[0], y[1]


def rotate_cos_sin(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    cos: Tensor,  # (L - prefix, R) or (B, L - prefix, R)
    sin: Tensor,  # as cos
    interleaved: bool = False,
    inverse: bool = False,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Reference for `fastrpe.ops.rotate_cos_sin`."""
    cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    y = [_rotate(x, cos, sin, None, interleaved, inverse, prefix) for x in (q, k)]
    return y[0], y[1]


def rotate_bwd(
    dyq: Tensor,  # (B, H, L, D)
    dyk: Tensor,  # (B, Hk, L, D)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
    need_positions: bool,
    need_freqs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `rotate` without a basis: with dx = R^T dy and J a quarter turn, d angle = <dx, J x> per plane."""
    wide = torch.promote_types(q.dtype, torch.float32)
    dyq, dyk = dyq.to(wide), dyk.to(wide)
    dq, dk = rotate(dyq, dyk, positions, freqs, None, interleaved, not inverse, factor, prefix)
    per_set = freqs if freqs.dim() == 3 else freqs.unsqueeze(0)  # (Hk or 1, C, R)
    B, L, sets = q.shape[0], q.shape[2] - prefix, per_set.shape[0]
    dangle = q.new_zeros(B, sets, L, freqs.shape[-1], dtype=wide)
    for x, dx in ((q, dq), (k, dk)):
        a, b = planes(x[:, :, prefix:].to(wide), freqs.shape[-1], interleaved)
        da, db = planes(dx[:, :, prefix:], freqs.shape[-1], interleaved)
        if x.shape[1]:
            dangle += (a * db - b * da).unflatten(1, (sets, -1)).sum(2)
    if inverse:
        dangle = -dangle
    dpositions = dfreqs = q.new_empty(0)
    if need_positions:
        dpositions = torch.einsum("bhlr,hcr->blc", dangle, per_set.to(wide))
        dpositions = (dpositions.sum(0) if positions.dim() == 2 else dpositions).to(positions.dtype)
    if need_freqs:
        points = positions.to(wide).expand(B, L, positions.shape[-1])
        dfreqs = torch.einsum("bhlr,blc->hcr", dangle, points).reshape_as(freqs).to(freqs.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dpositions, dfreqs


def planes(x: Tensor, count: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two coordinates of each rotation plane, each (..., R)."""
    rotary = x[..., : 2 * count]
    if interleaved:
        return rotary[..., 0::2], rotary[..., 1::2]
    return rotary[..., :count], rotary[..., count:]


def _rotate(
    x: Tensor,  # (B, H, L, D)
    cos: Tensor,
    sin: Tensor,
    basis: Tensor | None,
    interleaved: bool,
    inverse: bool,
    prefix: int,
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    head, z = x[:, :, :prefix], x[:, :, prefix:].to(dtype)
    # A key head's frequencies and basis serve its group of query heads.
    if cos.shape[-3] > 1:
        cos, sin = (t.repeat_interleave(x.shape[1] // t.shape[-3], -3) for t in (cos, sin))
    if basis is not None:
        basis = basis.to(dtype)
        if basis.dim() == 3:
            basis = basis.repeat_interleave(x.shape[1] // basis.shape[0], 0)
    if basis is not None and not inverse:
        z = z @ basis.mT
    cos, sin = cos.to(dtype), sin.to(dtype)
    if inverse:
        sin = -sin
    a, b = planes(z, cos.shape[-1], interleaved)
    y = (a * cos - b * sin, b * cos + a * sin)
    rotary = torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)
    z = torch.cat((rotary, z[..., 2 * cos.shape[-1] :]), -1)
    if basis is not None and inverse:
        z = z @ basis
    return torch.cat((head, z.to(x.dtype)), 2)
