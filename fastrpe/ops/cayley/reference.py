"""The Cayley transform of a skew-symmetric matrix in plain, differentiable PyTorch."""

import math

import torch
from torch import Tensor

from ...checks import fail


def cayley_basis(
    params: Tensor,  # (..., D (D - 1) / 2)
) -> Tensor:
    """Reference for `fastrpe.ops.cayley.cayley_basis`."""
    return cayley(skew(params))


def skew(
    params: Tensor,  # (..., D (D - 1) / 2)
) -> Tensor:
    """The skew-symmetric S (..., D, D) with ``params`` above its diagonal, by rows."""
    size = size_of("skew", params)
    row, column = torch.triu_indices(size, size, 1, device=params.device).unbind()
    upper = params.new_zeros(*params.shape[:-1], size, size)
    upper[..., row, column] = params
    return upper - upper.mT


def cayley(
    S: Tensor,  # (..., D, D)
) -> Tensor:
    """The orthogonal P = (I - S)(I + S)^{-1} = 2 (I + S)^{-1} - I of a skew-symmetric S, both (..., D, D).

    I + S is never singular (its eigenvalues are 1 +- i lambda), but its condition number grows as |S|: the inverse is
    taken in float64, which autocast leaves alone, and keeps P^T P = I to float32's rounding for |S| of 1000 and more.
    """
    return orthogonal(inverse(S)).to(torch.promote_types(S.dtype, torch.float32))


def inverse(
    S: Tensor,  # (..., D, D)
) -> Tensor:
    """(I + S)^{-1} in float64."""
    eye = torch.eye(S.shape[-1], dtype=torch.float64, device=S.device)
    # The inverse rather than a solve: its derivative is two products, not two triangular solves. And inv_ex rather than
    # inv, which reads its error flag back from the device.
    A = eye + S.double()
    if A.device.type == "cpu" and A.shape[-1] > 128 and A.shape[:-2].numel() > 1:
        # One by one: PyTorch may spoil a batch of large matrices on a CPU (pytorch/pytorch#142815).
        return torch.stack([torch.linalg.inv_ex(one)[0] for one in A.flatten(0, -3)]).view_as(A)
    X: Tensor = torch.linalg.inv_ex(A)[0]
    return X


def orthogonal(
    X: Tensor,  # (..., D, D)
) -> Tensor:
    """P = 2 X - I of X = (I + S)^{-1}."""
    return 2 * X - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)


def cayley_basis_bwd(
    dy: Tensor,  # (..., D, D)
    inverse: Tensor,  # (..., D, D)
) -> Tensor:
    """The gradient of params: dS = -2 X^T dy X^T, and each number stands in S twice, once negated."""
    dS = -2 * inverse.mT @ dy.to(inverse.dtype) @ inverse.mT
    row, column = torch.triu_indices(dS.shape[-1], dS.shape[-1], 1, device=dS.device).unbind()
    return (dS - dS.mT)[..., row, column].to(dy.dtype)


def size_of(op: str, params: Tensor) -> int:
    """D."""
    entries = params.shape[-1]
    size = int((1 + math.sqrt(1 + 8 * entries)) / 2)  # a float, which torch.compile can trace for any size
    if size * (size - 1) // 2 != entries:
        raise fail(op, "params", "have d (d - 1) / 2 entries for some d", entries)
    return size
