"""Attention by its formula, which the tests compare with."""

from typing import Any

import torch
from torch import Tensor


def plain(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    bias: Tensor | None = None,  # (H, 2S - 1)
    mask: Tensor | None = None,  # broadcasts to (B, H, L, S)
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The output (B, H, L, V) and the weights (B, H, L, S)."""
    H, L, S = q.shape[1], q.shape[2], k.shape[2]
    served = [h * k.shape[1] // H for h in range(H)]
    logits = torch.einsum("bhld,bhsd->bhls", q, k[:, served]) * (q.shape[-1] ** -0.5 if scale is None else scale)
    i = torch.arange(S - L, S, device=q.device)[:, None]
    j = torch.arange(S, device=q.device)
    if bias is not None:
        logits = logits + bias[:, j - i + S - 1].to(q.dtype)
    if causal:
        logits = logits.masked_fill(j > i, -torch.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.to(q.dtype)
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    weights = torch.where(empty, 0.0, logits.where(~empty, 0.0).softmax(-1))
    return torch.einsum("bhls,bhsv->bhlv", weights, v[:, served]), weights


def attend(
    attention: Any,
    x: Tensor,  # (B, L, dim)
    context: Tensor | None = None,  # (B, S, context_dim)
    positions: Tensor | None = None,
    context_positions: Tensor | None = None,
    mask: Tensor | None = None,
    prefix: int = 0,
    context_prefix: int = 0,
) -> Tensor:
    """What an `Attention` should give: every projection and encoding on its own, the formula between."""
    source = x if context is None else context

    def heads(projection: torch.nn.Linear, z: Tensor) -> Tensor:
        return projection(z).view(*z.shape[:2], -1, attention.head_dim).transpose(1, 2)

    q, k, v = heads(attention.q_proj, x), heads(attention.k_proj, source), heads(attention.v_proj, source)
    if attention.position is not None:
        if context is None:
            context_positions, context_prefix = positions, prefix
        q, _ = attention.position(q, None, positions, prefix=prefix)
        k, _ = attention.position(k, None, context_positions, prefix=context_prefix)
    y, _ = plain(q, k, v, mask=mask, causal=attention.causal)
    return attention.out_proj(y.transpose(1, 2).flatten(2))
