"""The mathematics of STRING's reflection variants: bases made of Householder reflections in disjoint blocks.

A layer F is the direct sum of the reflections H(v_b) = I - 2 v_b v_b^T / |v_b|^2 over disjoint blocks b of coordinates;
P = F_1 ... F_K. The functions are differentiable, compute in float32 at least, and use no matrix product, so neither
autocast nor TF32 makes P less orthogonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...checks import check_shape, fail

# A shorter v is not normalised to length 1, so that its reflection fades to the identity instead of dividing by 0.
LEAST_NORM = 1e-6


def reflect(
    x: Tensor,  # (B, H, L, D) or (H, L, D)
    v: Tensor,  # (Hv, K, D)
    block: int,
    shuffles: Sequence[int],
    *,
    inverse: bool = False,
) -> Tensor:
    """P x for every token, P = F_1 ... F_K, or P^T x when ``inverse``, in O(K D) operations.

    Args:
        x: tokens; H is a multiple of Hv.
        v: the vectors of the reflections, ``v[h, l, i s : (i + 1) s]`` that of block i of layer l.
        block: s, the size of a block; divides D.
        shuffles: for each layer, how often the coordinates are shuffled before they fall into blocks of neighbours.
            The perfect shuffle reads the coordinates, written by rows as a matrix (D / s, s), by columns.

    Returns:
        The shape and dtype of ``x``, computed in float32 at least.
    """
    op = "reflect"
    check_shape(op, "x", x, ("H", "L", "D"), ("B", "H", "L", "D"))
    H, D = x.shape[-3], x.shape[-1]
    check_shape(op, "v", v, ("Hv", "K", "D"), K=len(shuffles), D=D)
    if v.shape[0] == 0 or H % v.shape[0]:
        raise fail(op, "v", f"have a number of heads that divides H={H}", v.shape[0])
    if block < 1 or D % block:
        raise fail(op, "block", f"be positive and divide D={D}", block)
    dtype = torch.promote_types(torch.promote_types(x.dtype, v.dtype), torch.float32)
    unit = normalize(v.to(dtype).unflatten(-1, (-1, block)), dim=-1, eps=LEAST_NORM)
    if H > v.shape[0]:
        unit = unit.repeat_interleave(H // v.shape[0], 0)  # one P serves a key head and its queries
    y, done = x.to(dtype), 0
    for layer in range(len(shuffles)) if inverse else reversed(range(len(shuffles))):
        y, done = _shuffle(y, shuffles[layer] - done, block), shuffles[layer]
        parts, u = y.unflatten(-1, (-1, block)), unit[:, layer].unsqueeze(1)
        y = torch.addcmul(parts, u, (parts * u).sum(-1, keepdim=True), value=-2).flatten(-2)
    return _shuffle(y, -done, block).to(x.dtype)


def reflection_basis(
    v: Tensor,  # (H, K, D)
    block: int,
    shuffles: Sequence[int],
) -> Tensor:
    """The orthogonal P = F_1 ... F_K, ``(H, D, D)``, of `reflect`; float32 at least. det P = (-1)^(K D / block)."""
    H, _, D = v.shape
    dtype = torch.promote_types(v.dtype, torch.float32)
    eye = torch.eye(D, dtype=dtype, device=v.device).expand(H, -1, -1)
    return reflect(eye, v, block, shuffles, inverse=True)  # row i is P^T e_i


def plane_signs(
    size: int,
    planes: int,
    *,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The diagonal (D,) of the reflection diag(1, -1) in each of the first ``planes`` planes; 1 where nothing rotates.

    With it a rotation becomes a reflection: Ref(a) = [[cos a, sin a], [sin a, -cos a]] = Rot(a) diag(1, -1).
    """
    i = torch.arange(size, device=device)
    second = (i < 2 * planes) & (i % 2 == 1) if interleaved else (planes <= i) & (i < 2 * planes)
    return 1 - 2 * second.to(dtype)


def _shuffle(y: Tensor, times: int, block: int) -> Tensor:
    """Apply the perfect shuffle of the last axis ``times`` times, or its inverse where that is negative."""
    rows = -1, block
    if times < 0:
        rows = block, -1
    for _ in range(abs(times) if block < y.shape[-1] else 0):
        y = y.unflatten(-1, rows).mT.flatten(-2)
    return y
