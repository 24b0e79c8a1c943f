"""The specification of linear attention: plain, differentiable PyTorch."""

import math

import torch
from torch import Tensor

from ..features.reference import EXPONENTIAL, exponents, half_norm, project, random_features, rounded

# Kinds whose features overflow without a stabiliser; the others have no exponents.
STABILIZED = (*EXPONENTIAL, "trigonometric")
EMPTY = -1e30  # log_scale of a feature that no key has reached: below any exponent, yet no infinity to subtract
CHUNK = 16  # rows whose pairs are held at a time

State = tuple[Tensor, Tensor, Tensor]


def linear_attention(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reference for `fastrpe.ops.linear_attention`: the output and the state; N is B where nothing is packed.

    A feature is y = amplitude exp(exponent) + eps. Of keys it is held relative to exp(c), with c the largest exponent
    of that feature so far, of a query relative to exp(r - c), with r the largest exponent + c of its row: nothing
    overflows, a denominator of positive features is at least 1, and c and r cancel. A causal row has its own c, of the
    keys up to it, so that a later key, however large, neither rounds it differently nor makes it 0 / 0.
    """
    packed = None
    if cu_seqlens is not None:
        # Each sequence takes all tokens and masks those of the others: N times the work, and nothing read by the host.
        place = torch.arange(k.shape[2], device=k.device)
        packed = (place >= cu_seqlens[:-1, None]) & (place < cu_seqlens[1:, None])
        is_sound = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] >= 0) & (cu_seqlens[-1] <= len(place))
        mask = packed if mask is None else packed & mask
        q, k, v = (x.expand(len(packed), *x.shape[1:]) for x in (q, k, v))
    dtype, sets = q.dtype, k.shape[1]
    bias = None
    if omega is not None:
        omega = omega.to(torch.promote_types(dtype, torch.float32))
        if kind == "oprf" and a is not None:  # positive features of another projection, and a bias
            bias = a * omega.square().sum(-1).unsqueeze(-2)  # (1, M) or (Hk, 1, M)
            omega, kind = (1 - 4 * a) ** 0.5 * omega, "positive"
        omega = rounded(omega, dtype)
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    if mask is not None:
        mask = mask[:, None, :, None]
        k, v = k.masked_fill(~mask, 0), v.masked_fill(~mask, 0)
    q = q.unflatten(1, (sets, q.shape[1] // sets))  # (B, Hk, G, L, D)
    query, b = (x.unflatten(2, q.shape[2:4]) for x in features(q.flatten(2, 3), omega, kind, scale, bias, eps))
    key, e = features(k, omega, kind, scale, bias, eps)
    if mask is not None:
        key, e = key.masked_fill(~mask, 0), e.masked_fill(~mask, -math.inf)
    floor = math.log(eps) if eps and kind in STABILIZED else -math.inf
    if kv is None or z is None or log_scale is None:
        size = (*k.shape[:2], key.shape[-1])
        empty = v.new_full(size, EMPTY if kind in STABILIZED else 0.0).clamp(min=floor)
        state = v.new_zeros(*size, v.shape[-1]), v.new_zeros(size), empty
    else:
        grow = (log_scale - log_scale.detach()).exp()  # 1, with a gradient
        state = kv * grow.unsqueeze(-1), z * grow, log_scale.detach()
    if causal:
        parts = [q.new_zeros(q.shape[0], q.shape[1] * q.shape[2], 0, v.shape[-1])]
        for at in range(0, q.shape[3], CHUNK):
            chunk = [x[..., at : at + CHUNK, :] for x in (query, b, key, e, v)]
            part, state = _causal(chunk[0], chunk[1], chunk[2], chunk[3], chunk[4], state, floor, normalize)
            parts.append(part)
        out = torch.cat(parts, -2)
    else:
        out, state = _full(query, b, key, e, v, state, floor, normalize)
    if packed is not None:
        out = out.masked_fill(~packed[:, None, :, None], 0).sum(0, keepdim=True).masked_fill(~is_sound, math.nan)
    kv, z, c = state
    return out.to(dtype).contiguous(), kv.contiguous(), z.contiguous(), c.clone(memory_format=torch.contiguous_format)


def features(
    x: Tensor,  # (B, Hk, L, D)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    scale: float,
    bias: Tensor | None,  # (1, M) or (Hk, 1, M)
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Amplitudes and exponents, of which one may broadcast."""
    if kind in EXPONENTIAL:
        e = exponents(x, omega, kind, scale)
        e = e if bias is None else e + bias
        return torch.ones_like(e), e
    if kind == "trigonometric":
        p = project(x, omega, kind, scale)
        return torch.cat((p.cos(), p.sin()), -1), half_norm(x, kind, scale)
    y = x + eps if kind == "features" else random_features(x, omega, kind, scale, eps)
    return y, torch.zeros_like(y[..., :1])


def _full(
    query: Tensor,  # (B, Hk, G, L, F)
    b: Tensor,  # (B, Hk, G, L, F or 1)
    key: Tensor,  # (B, Hk, S, F)
    e: Tensor,  # (B, Hk, S, F or 1)
    v: Tensor,  # (B, Hk, S, V)
    state: State,
    floor: float,
    normalize: bool,
) -> tuple[Tensor, State]:
    """All keys before all queries."""
    kv, z, old = state
    c = torch.cat((old.unsqueeze(-2), e.detach().expand_as(key)), -2).amax(-2).clamp(min=floor)
    phi = _relative(key, e, c.unsqueeze(-2), floor)
    shrink = (old - c).exp()
    kv, z = kv * shrink.unsqueeze(-1) + phi.mT @ v, z * shrink + phi.sum(-2)
    w, r = _weights(query, b, c[:, :, None, None], floor)
    num, den = w @ kv.unsqueeze(2), (w @ z[:, :, None, :, None])
    return _divide(num, den, r, normalize), (kv, z, c)


def _causal(
    query: Tensor,  # (B, Hk, G, T, F)
    b: Tensor,  # (B, Hk, G, T, F or 1)
    key: Tensor,  # (B, Hk, T, F)
    e: Tensor,  # (B, Hk, T, F or 1)
    v: Tensor,  # (B, Hk, T, V)
    state: State,
    floor: float,
    normalize: bool,
) -> tuple[Tensor, State]:
    """A chunk of as many queries as keys: each row sees the state before it and the keys up to its own."""
    kv, z, old = state
    running = torch.maximum(e.detach().cummax(-2).values, old.unsqueeze(-2)).clamp(min=floor)  # (B, Hk, T, F)
    w, r = _weights(query, b, running.unsqueeze(2), floor)
    before = w * (old.unsqueeze(-2) - running).exp().unsqueeze(2)
    # Each pair relative to its row's c, (B, Hk, T, T, F); the later keys of a row are gone before the exponential.
    later = torch.ones(key.shape[-2], key.shape[-2], dtype=torch.bool, device=e.device).triu(1).unsqueeze(-1)
    pairs = e.unsqueeze(-3).expand(*key.shape[:-1], *key.shape[-2:]).masked_fill(later, -math.inf)
    phi = _relative(key.unsqueeze(-3).masked_fill(later, 0), pairs, running.unsqueeze(-2), floor)
    scores = (w.unsqueeze(-2) @ phi.unsqueeze(2).mT).squeeze(-2)  # (B, Hk, G, T, T)
    num = before @ kv.unsqueeze(2) + scores @ v.unsqueeze(2)
    den = before @ z[:, :, None, :, None] + scores.sum(-1, keepdim=True)
    c, last = running[..., -1, :], phi[..., -1, :, :]
    shrink = (old - c).exp()
    kv, z = kv * shrink.unsqueeze(-1) + last.mT @ v, z * shrink + last.sum(-2)
    return _divide(num, den, r, normalize), (kv, z, c)


def _relative(
    amplitude: Tensor,  # (..., T, F)
    e: Tensor,  # (..., T, F or 1)
    c: Tensor,  # (..., 1, F)
    floor: float,
) -> Tensor:
    """Features of keys divided by exp(c); those with an exponent of -inf take no part."""
    phi = amplitude * (e - c).exp()
    return phi if floor == -math.inf else phi + (floor - c).exp() * (e > -math.inf)


def _weights(
    amplitude: Tensor,  # (B, Hk, G, L, F)
    b: Tensor,  # (B, Hk, G, L, F or 1)
    c: Tensor,  # (B, Hk, 1, L or 1, F)
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Features of queries multiplied by exp(c - r), and r, (B, Hk, G, L, 1)."""
    r = (b.detach().clamp(min=floor) + c).amax(-1, keepdim=True)
    w = amplitude * (b + c - r).exp()
    return (w if floor == -math.inf else w + (floor + c - r).exp()), r


def _divide(
    num: Tensor,  # (B, Hk, G, L, V)
    den: Tensor,  # (B, Hk, G, L, 1)
    r: Tensor,  # (B, Hk, G, L, 1)
    normalize: bool,
) -> Tensor:  # (B, H, L, V), no view, since what an operator returns must bear changes in place
    num, den, r = (x.flatten(1, 2) for x in (num, den, r))
    # Divided by infinity, a row whose weights sum to 0 is 0, and so is its gradient.
    return num / den.masked_fill(den == 0, math.inf) if normalize else num * r.exp()
