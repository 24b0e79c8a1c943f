"""Optimal positive random features: FAVOR++ and FAVOR#."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_type, fail
from .feature_map import FeatureMap


def optimal_a(
    phi: Tensor,  # (...)
    head_dim: int,
) -> Tensor:  # (...)
    r"""The A that makes the second moment of OPRF least for |x + y|^2 = phi: at most 0, and 0 where phi is.

    .. math:: 16 A = 1 - 2 t - r, \qquad r^2 = (2 t + 1)^2 + 8 t, \quad t = \phi / D

    in a form without cancellation.

    Args:
        phi: |x + y|^2 of a scaled query and key, or its mean; at least 0, any shape.
        head_dim: D.

    Returns:
        A, of the shape and dtype of phi.

    Source:
        FAVOR++ (arXiv 2205.15317) theorem 2.
    """
    t = phi / head_dim
    r = torch.hypot(2 * t + 1, (8 * t).sqrt())
    return -(t * (4 * t + 12) / (r + 1) + 2 * t) / 16


class OPRFFeatures(FeatureMap):
    r"""FAVOR++: the positive features with the least variance for the queries and keys at hand.

    .. math:: \phi(x) = (1 - 4 A)^{D/4} M^{-1/2} \exp(A |w|^2 + \sqrt{1 - 4 A} \, w \cdot x - |x|^2 / 2)

    Unbiased for every A < 1/8, bounded for A < 0; A = 0 gives `PositiveFeatures`. By default A is the best for the mean
    of |x + y|^2 over queries, keys, heads and the batch, without a gradient; that looks at all keys, so causal
    attention needs a fixed ``a``.

    Args:
        a: A, or None to compute it in every call.

    The other arguments are those of `FeatureMap`.

    Source:
        FAVOR++ (arXiv 2205.15317) theorem 2.
    """

    kind = "oprf"

    def __init__(self, head_dim: int, *args: Any, a: float | None = None, **options: Any) -> None:
        if a is not None:
            name = type(self).__name__
            check_type(name, "a", a, float, int)
            if not a < 1 / 8:
                raise fail(name, "a", "be less than 1/8", a)
        super().__init__(head_dim, *args, **options)
        self.a = a

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.a is not None

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | float | None]:
        return q, k, self._a(q, k)

    def _a(self, q: Tensor, k: Tensor) -> Tensor | float:
        """A for the mean of |x + y|^2, which is mean |x|^2 + mean |y|^2 + 2 mean x . mean y."""
        if self.a is not None:
            return self.a
        with torch.no_grad():
            wide = torch.promote_types(q.dtype, torch.float32)
            x, y = q.to(wide), k.to(wide)
            mean_x = x.mean(2).unflatten(1, (k.shape[1], -1)).mean(2)  # (B, Hk, D): of the queries that meet a key head
            phi = x.square().sum(-1).mean() + y.square().sum(-1).mean() + 2 * (mean_x * y.mean(2)).sum(-1).mean()
            scale = self.head_dim**-0.25 if self.scale is None else self.scale
            return optimal_a(phi.clamp(min=0) * scale**2, self.head_dim)


class SADERF(OPRFFeatures):
    r"""FAVOR#: OPRF of queries and keys whose coordinates are balanced first.

    .. math:: x \to \Psi x, \quad y \to \Psi^{-1} y, \qquad
        \Psi_l = \big( \mathrm{mean}_j \, y_{jl}^2 / \mathrm{mean}_i \, x_{il}^2 \big)^{1/4}

    for each sequence and key head, which keeps x.y and makes the mean of |x|^2 + |y|^2 least. Coordinates that are 0 in
    all queries or all keys stay as they are. No gradient flows through Psi. It looks at all keys: not causal.

    The arguments are those of `OPRFFeatures`.

    Source:
        FAVOR# (arXiv 2302.00787) section 4.
    """

    causal = False

    def prepare(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | float | None]:
        with torch.no_grad():
            wide = torch.promote_types(q.dtype, torch.float32)
            groups = q.shape[1] // k.shape[1]
            x = q.to(wide).square().mean(2).unflatten(1, (-1, groups)).mean(2)  # (B, Hk, D)
            y = k.to(wide).square().mean(2)
            psi = torch.where((x > 0) & (y > 0), y / x, 1.0).pow(0.25).unsqueeze(2)  # (B, Hk, 1, D)
            spread = psi.repeat_interleave(groups, 1)
        q, k = (q * spread).to(q.dtype), (k / psi).to(k.dtype)
        return q, k, self._a(q, k)
