"""What a user would call today in place of linear attention.

A peer is a function of a case's arguments that gives ``(inputs, f)``: leaf tensors, and a function of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Built = tuple[list[Tensor], Callable[..., Tensor]]
CHUNK = 128  # performer-pytorch's


def positive(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor,  # (M, D)
    over: int | tuple[int, int],  # axes of the stabiliser
) -> Tensor:
    """performer-pytorch's `softmax_kernel`, with its epsilon of 1e-4 at 0."""
    x = x * x.shape[-1] ** -0.25
    u = (x @ omega.mT.to(x.dtype)).float()
    half = x.float().square().sum(-1, keepdim=True) / 2
    return ((u - half - u.amax(over, keepdim=True)).exp() * omega.shape[0] ** -0.5).to(x.dtype)


def eager(a: dict[str, Any]) -> Built:
    """performer-pytorch: features in memory, then two products; causal by cumulative sums of chunks."""
    omega, causal = a["omega"], a.get("causal", False)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = positive(q, omega, -1), positive(k, omega, (-1, -2))
        return _causal(phi_q, phi_k, v) if causal else _full(phi_q, phi_k, v)

    return [a["q"], a["k"], a["v"]], f


def _full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weight = q.float() @ k.float().sum(-2).unsqueeze(-1)
    return ((q @ (k.mT @ v)).float() / weight).to(v.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sums, context, parts = 0, 0, []
    for qs, ks, vs in zip(*(x.split(CHUNK, -2) for x in (q, k, v))):
        running = sums + ks.cumsum(-2)
        inverse = 1 / (qs * running).sum(-1)
        whole = context + torch.einsum("...nd,...ne->...nde", ks, vs).cumsum(-3)
        parts.append(torch.einsum("...nde,...nd,...n->...ne", whole, qs, inverse))
        sums, context = running[..., -1:, :], whole[..., -1:, :, :]
    return torch.cat(parts, -2)


def features(a: dict[str, Any]) -> Built:
    """Features alone, each row with its own stabiliser."""
    return [a["x"], a["omega"]], lambda x, omega: positive(x, omega, -1)


def sdpa(a: dict[str, Any]) -> Built:
    """Softmax attention of the same tokens: another function, at whose speed people look."""
    causal = a.get("causal", False)
    return [a["q"], a["k"], a["v"]], lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def fla(a: dict[str, Any]) -> Built:
    """flash-linear-attention's causal kernel, of features that are there already, and without a division."""
    from fla.ops.linear_attn import chunk_linear_attn

    phi_q, phi_k = positive(a["q"], a["omega"], -1), positive(a["k"], a["omega"], (-1, -2))
    inputs = [x.transpose(1, 2).contiguous() for x in (phi_q, phi_k, a["v"])]
    return inputs, lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0].transpose(1, 2)
