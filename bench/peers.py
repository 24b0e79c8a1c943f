"""What a user would call today for the same work, each in the memory layout that it likes best.

A peer is a function of a case's arguments that gives ``(inputs, f)``: leaf tensors, q and k first, and a function of
them that rotates both. Tables of cos and sin are made outside, as a model would, except where frequencies are learned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Built = tuple[list[Tensor], Callable[..., tuple[Tensor, Tensor]]]


def angles(positions: Tensor, freqs: Tensor) -> Tensor:
    """Phases (L, R), or (H, L, R) of frequencies per head."""
    return positions @ freqs


def tables(a: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if "cos" in a:
        return a["cos"], a["sin"]
    angle = angles(a["positions"].double(), a["freqs"].double())
    return angle.cos().float(), angle.sin().float()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def eager(a: dict[str, Any]) -> Built:
    """Plain PyTorch; with a basis, STRING as its paper writes it: a product per head, then RoPE."""
    cos, sin = tables(a)
    basis = a.get("basis")

    def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if basis is not None:
            q, k = q @ basis.mT, k @ basis.mT
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    return [a["q"], a["k"]], f


def eager_learned(a: dict[str, Any]) -> Built:
    """The same with learned frequencies (and basis): cos and sin are part of the work."""
    positions = a["positions"]

    def f(q: Tensor, k: Tensor, freqs: Tensor, basis: Tensor | None = None) -> tuple[Tensor, Tensor]:
        angle = angles(positions, freqs)
        cos, sin = angle.cos(), angle.sin()
        if basis is not None:
            q, k = q @ basis.mT, k @ basis.mT
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    return [a[n] for n in ("q", "k", "freqs", "basis") if a[n] is not None], f


def _by_token(x: Tensor) -> Tensor:
    """(B, H, L, D) in the memory of (B, L, H, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def liger(a: dict[str, Any]) -> Built:
    """Liger-Kernel writes over its inputs: it reads and writes the same lines, and the caller loses q and k."""
    from liger_kernel.ops.rope import LigerRopeFunction

    cos, sin = (torch.cat((t, t), -1)[None].to(a["q"].dtype) for t in tables(a))
    return [_by_token(a["q"]), _by_token(a["k"])], lambda q, k: LigerRopeFunction.apply(q, k, cos, sin)


def fla(a: dict[str, Any]) -> Built:
    """flash-linear-attention's rotary kernel (flash-attention's), one call each for q and k."""
    from fla.modules.rotary import rotary_embedding

    cos, sin = (t.to(a["q"].dtype) for t in tables(a))

    def f(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        y = [rotary_embedding(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k)]
        return y[0], y[1]

    return [_by_token(a["q"]), _by_token(a["k"])], f
