"""Reflections in disjoint blocks of coordinates, in plain, differentiable PyTorch.

A layer F is the direct sum of the reflections H(v_b) = I - 2 v_b v_b^T / |v_b|^2 over disjoint blocks b of coordinates;
P = F_1 ... F_K. The functions compute in float32 at least, and use no matrix product, so neither autocast nor TF32
makes P less orthogonal.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

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
    if H > v.shape[0]:
        v = v.repeat_interleave(H // v.shape[0], 0)  # one P serves a key head and its queries
    y, done = x.to(dtype), 0
    unit = _unit(v.to(dtype), block)[0]
    for layer in range(len(shuffles)) if inverse else reversed(range(len(shuffles))):
        y, done = _shuffle(y, shuffles[layer] - done, block), shuffles[layer]
        parts, u = y.unflatten(-1, (-1, block)), unit[:, layer].unsqueeze(1)
        y = torch.addcmul(parts, u, (parts * u).sum(-1, keepdim=True), value=-2).flatten(-2)
    return _shuffle(y, -done, block).to(x.dtype)


def reflection_basis(
    v: Tensor,  # (..., K, D)
    block: int,
    shuffles: Sequence[int],
) -> Tensor:
    """Reference for `fastrpe.ops.reflection.reflection_basis`."""
    rows = _rows(v, block, shuffles)[-1]
    return _shuffle(rows.flatten(-2), -shuffles[-1] if shuffles else 0, block)


def reflection_basis_bwd(
    dy: Tensor,  # (..., D, D)
    v: Tensor,  # (..., K, D)
    block: int,
    shuffles: Sequence[int],
) -> Tensor:
    """The gradient of v.

    With rows y before a layer and g of the gradient behind it, dF = sum g^T y over the rows, and for F = I - 2 u u^T

        du = -2 sum (u.g) y + (u.y) g,   dv = (du - u (u.du)) / |v|.
    """
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    unit, length, regular = _unit(wide, block)
    rows, g, done, grads = _rows(v, block, shuffles), dy.to(wide.dtype), 0, []
    for layer in reversed(range(len(shuffles))):
        g, done = _shuffle(g, shuffles[layer] - done, block), shuffles[layer]
        y, g, u = rows[layer], g.unflatten(-1, (-1, block)), unit[..., layer, :, :].unsqueeze(-3)
        with_y, with_g = (y * u).sum(-1, keepdim=True), (g * u).sum(-1, keepdim=True)
        grads.append(-2 * (with_g * y + with_y * g).sum(-3))
        g = torch.addcmul(g, u, with_g, value=-2).flatten(-2)
    du = torch.stack(grads[::-1], -3) if grads else torch.zeros_like(unit)
    along = torch.where(regular, (unit * du).sum(-1, keepdim=True), 0)
    return ((du - along * unit) / length).flatten(-2).to(v.dtype)


def _shuffle(y: Tensor, times: int, block: int) -> Tensor:
    """Apply the perfect shuffle of the last axis ``times`` times, or its inverse where that is negative."""
    rows = -1, block
    if times < 0:
        rows = block, -1
    for _ in range(abs(times) if block < y.shape[-1] else 0):
        y = y.unflatten(-1, rows).mT.flatten(-2)
    return y


def _rows(v: Tensor, block: int, shuffles: Sequence[int]) -> list[Tensor]:
    """The rows of I, F_1, F_1 F_2, ..., P in the order and the blocks of the layer that comes next, or came last."""
    D = v.shape[-1]
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    unit, done = _unit(wide, block)[0], 0
    y = torch.eye(D, dtype=wide.dtype, device=v.device).expand(*v.shape[:-2], -1, -1)
    rows = []
    for layer, times in enumerate(shuffles):
        y, done = _shuffle(y, times - done, block).unflatten(-1, (-1, block)), times
        rows.append(y)
        u = unit[..., layer, :, :].unsqueeze(-3)
        y = torch.addcmul(y, u, (y * u).sum(-1, keepdim=True), value=-2).flatten(-2)
    return [*rows, y.unflatten(-1, (-1, block))]


def _unit(v: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """u = v / |v| of each block, (..., K, D / s, s); |v|, or what takes its place; and where it does not."""
    parts = v.unflatten(-1, (-1, block))
    norm = torch.linalg.vector_norm(parts, dim=-1, keepdim=True)
    length = norm.clamp_min(LEAST_NORM)
    return parts / length, length, norm >= LEAST_NORM
