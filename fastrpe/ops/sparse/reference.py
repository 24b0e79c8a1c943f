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
    if inverse:
        system = system.mT
    group = x.shape[-3] // len(theta)
    # Head by head: PyTorch may spoil a batch of large matrices on a CPU (pytorch/pytorch#142815).
    parts = [torch.linalg.solve(A, part.mT).mT for A, part in zip(system, wide.unflatten(-3, (-1, group)).unbind(-4))]
    u = torch.cat(parts, -3)
    return (2 * u - wide).to(x.dtype)


def skew(
    theta: Tensor,  # (H, K)
    pairs: Tensor,  # (K, 2) or (H, K, 2)
    size: int,
) -> Tensor:
    """The skew-symmetric S (H, D, D) with S_ab = theta and S_ba = -theta for the pairs (a, b)."""
    place = (pairs[..., 0] * size + pairs[..., 1]).expand(theta.shape)
    upper: Tensor = theta.new_zeros(len(theta), size * size).scatter(1, place, theta).unflatten(1, (size, size))
    return upper - upper.mT
