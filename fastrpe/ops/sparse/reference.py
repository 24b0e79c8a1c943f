"""The specification of the sparse Cayley transform: plain, differentiable PyTorch on dense matrices."""

import torch
from torch import Tensor


def sparse_cayley(
    x: Tensor,  # (..., H, L, D)
    theta: Tensor,  # (Hk, K)
    pairs: Tensor,  # (K, 2) or (Hk, K, 2)
    inverse: bool = False,
) -> Tensor:
    """Reference for `fastrpe.ops.sparse_cayley`."""
    wide = x if x.dtype == torch.float64 else x.float()
    eye = torch.eye(x.shape[-1], dtype=wide.dtype, device=x.device)
    system = eye + skew(theta.to(wide.dtype), pairs, x.shape[-1])
    system = system.repeat_interleave(x.shape[-3] // len(theta), 0)
    u: Tensor = torch.linalg.solve(system.mT if inverse else system, wide.mT)
    return (2 * u.mT - wide).to(x.dtype)


def skew(
    theta: Tensor,  # (H, K)
    pairs: Tensor,  # (K, 2) or (H, K, 2)
    size: int,
) -> Tensor:
    """The skew-symmetric S (H, D, D) with S_ab = theta and S_ba = -theta for the pairs (a, b)."""
    place = (pairs[..., 0] * size + pairs[..., 1]).expand(theta.shape)
    upper: Tensor = theta.new_zeros(len(theta), size * size).scatter(1, place, theta).unflatten(1, (size, size))
    return upper - upper.mT
