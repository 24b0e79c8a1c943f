"""Triton kernels of the random features, and their launchers."""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = ("hyperbolic", "trigonometric")  # kinds of 2 M features
WITH_NORM = (*PAIRS, "positive", "oprf")  # kinds whose exponent has |x|^2 / 2
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STAGES = 1  # tiles loaded ahead: more would not fit the shared memory of smaller GPUs
PARTS = 512  # programs that keep sums over rows of their own


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    """a b in full float32 (or wider): tensor cores round float32 to ten bits, unless it is split in three."""
    if DOT == "":
        return tl.sum(a[:, :, None] * b[None, :, :], 1)
    return tl.dot(a, b, input_precision=DOT, out_dtype=a.dtype)


@triton.jit
def _exponents(
    b_x, b_norm, p_omega, a, o_m, o_d,
    SCALE: tl.constexpr, M: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, HAS_OMEGA: tl.constexpr,
    DOT: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """What the nonlinearity is taken of, (BL, BM); |x|^2 / 2 is subtracted for OPRF and positive features."""
    acc = b_x.dtype
    if HAS_OMEGA:
        m_w = (o_m < M)[:, None] & (o_d < D)[None, :]
        b_w = tl.load(p_omega + o_m[:, None] * D + o_d[None, :], mask=m_w, other=0.0)
        if TYPE is None:
            b_p = _dot(b_x, tl.trans(b_w), DOT) * SCALE
        else:  # of 16 bits both, as they came: the product is exact
            b_p = tl.dot(b_x.to(TYPE), tl.trans(b_w).to(TYPE)) * SCALE
        if KIND == "oprf":
            b_a = tl.load(a)
            b_p = b_a * tl.sum(b_w * b_w, 1)[None, :] + tl.sqrt(1.0 - 4.0 * b_a) * b_p
    else:
        b_p = b_x * SCALE
    if KIND == "oprf" or KIND == "positive":
        b_p = b_p - b_norm[:, None]
    return b_p.to(acc)


@triton.jit
def _load_rows(x, i_b, i_h, o_l, o_d, L, x_b, x_h, x_l, x_d, D: tl.constexpr, acc: tl.constexpr):
    m = (o_l < L)[:, None] & (o_d < D)[None, :]
    p = x + i_b * x_b + i_h * x_h + o_l[:, None] * x_l + o_d[None, :] * x_d
    return tl.load(p, mask=m, other=0.0).to(acc)


@triton.jit
def _largest(b_p, b_norm, o_m, M: tl.constexpr, KIND: tl.constexpr):
    """The largest exponent of each row among those of one tile."""
    if KIND == "hyperbolic":
        b_p = tl.abs(b_p) - b_norm[:, None]
    return tl.max(tl.where((o_m < M)[None, :], b_p, float("-inf")), 1)


@triton.jit
def _features_kernel(
    x, omega, a, factor, most, y, H, L, F, omega_h,
    x_b, x_h, x_l, x_d,
    SCALE: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, KIND: tl.constexpr,
    STABILIZER: tl.constexpr, FIND: tl.constexpr, HAS_OMEGA: tl.constexpr, DOT: tl.constexpr, TYPE: tl.constexpr,
    acc: tl.constexpr,
):  # fmt: skip
    """Features of BL rows of a head; with FIND, the largest exponent of each row instead, into most (B, H, L)."""
    blocks = tl.cdiv(L, BL)
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    i_b, i_h = i_bh // H, i_bh % H
    o_l = tl.program_id(0).to(tl.int64) % blocks * BL + tl.arange(0, BL)
    o_d = tl.arange(0, BD)
    m_l = o_l < L
    b_x = _load_rows(x, i_b, i_h, o_l, o_d, L, x_b, x_h, x_l, x_d, D, acc)
    b_norm = tl.sum(b_x * b_x, 1) * (SCALE * SCALE * 0.5)
    p_omega = omega + i_h * omega_h
    b_most = tl.zeros((BL,), acc)
    if KIND == "trigonometric":
        if FIND:
            tl.store(most + i_bh * L + o_l, b_norm, mask=m_l)
        if STABILIZER == "row":
            b_most = b_norm
    elif FIND or STABILIZER == "row":
        b_most = tl.full((BL,), float("-inf"), acc)
        for start in range(0, M, BM):
            o_m = start + tl.arange(0, BM)
            b_p = _exponents(b_x, b_norm, p_omega, a, o_m, o_d, SCALE, M, D, KIND, HAS_OMEGA, DOT, TYPE)
            b_most = tl.maximum(b_most, _largest(b_p, b_norm, o_m, M, KIND))
        if FIND:
            tl.store(most + i_bh * L + o_l, b_most, mask=m_l)
    if STABILIZER == "global":
        b_most += tl.load(most + i_bh)
    if not FIND:
        b_factor = tl.load(factor) if KIND == "oprf" else tl.full((), FACTOR, acc)
        for start in range(0, M, BM):
            o_m = start + tl.arange(0, BM)
            b_p = _exponents(b_x, b_norm, p_omega, a, o_m, o_d, SCALE, M, D, KIND, HAS_OMEGA, DOT, TYPE)
            p_y = y + (i_bh * L + o_l)[:, None] * F + o_m[None, :]
            m_y = m_l[:, None] & (o_m < M)[None, :]
            if KIND == "trigonometric":
                b_size = b_factor * tl.exp(b_norm - b_most)[:, None]
                b_y = b_size * tl.cos(b_p)
                tl.store(p_y + M, (b_size * tl.sin(b_p)).to(y.dtype.element_ty), mask=m_y)
            elif KIND == "hyperbolic":
                b_shift = (b_norm + b_most)[:, None]
                b_y = b_factor * (tl.exp(b_p - b_shift) + EPS)
                b_z = b_factor * (tl.exp(-b_p - b_shift) + EPS)
                tl.store(p_y + M, b_z.to(y.dtype.element_ty), mask=m_y)
            elif KIND == "relu":
                b_y = tl.maximum(b_p, 0.0, propagate_nan=tl.PropagateNan.ALL) + EPS
            elif KIND == "elu":
                b_y = tl.where(b_p > 0, b_p + 1.0, tl.exp(tl.minimum(b_p, 0.0))) + EPS
            else:
                b_y = b_factor * (tl.exp(b_p - b_most[:, None]) + EPS)
            tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_y)


@triton.jit
def _gradient(
    p_dy, p_y, factor, m, dy_f,
    EPS: tl.constexpr, FACTOR: tl.constexpr, M: tl.constexpr, KIND: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """The gradient of what the nonlinearity is taken of, from the features, and of |x|^2 / 2; a tile and a column."""
    b_factor = tl.load(factor) if KIND == "oprf" else tl.full((), FACTOR, acc)
    b_dy = tl.load(p_dy, mask=m, other=0.0).to(acc)
    b_y = tl.load(p_y, mask=m, other=0.0).to(acc)
    if KIND == "relu":
        b_dp = tl.where(b_y > EPS, b_dy, 0.0)
        b_norm = b_dp
    elif KIND == "elu":
        b_dp = b_dy * tl.minimum(b_y - EPS, 1.0)
        b_norm = b_dp
    elif KIND == "trigonometric":
        b_dsin = tl.load(p_dy + M * dy_f, mask=m, other=0.0).to(acc)
        b_sin = tl.load(p_y + M, mask=m, other=0.0).to(acc)
        b_dp = b_dsin * b_y - b_dy * b_sin
        b_norm = b_dy * b_y + b_dsin * b_sin
    elif KIND == "hyperbolic":
        b_up = b_dy * (b_y - b_factor * EPS)
        b_dz = tl.load(p_dy + M * dy_f, mask=m, other=0.0).to(acc)
        b_down = b_dz * (tl.load(p_y + M, mask=m, other=0.0).to(acc) - b_factor * EPS)
        b_dp = b_up - b_down
        b_norm = -(b_up + b_down)
    else:
        b_dp = b_dy * (b_y - b_factor * EPS)
        b_norm = -b_dp
    return b_dp, tl.sum(b_norm, 1)


@triton.jit
def _dx_kernel(
    dy, y, x, omega, a, factor, dx, H, L, F, omega_h,
    dy_b, dy_h, dy_l, dy_f, x_b, x_h, x_l, x_d,
    SCALE: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, KIND: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_OMEGA: tl.constexpr, DOT: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(L, BL)
    i_bh = tl.program_id(0).to(tl.int64) // blocks
    i_b, i_h = i_bh // H, i_bh % H
    o_l = tl.program_id(0).to(tl.int64) % blocks * BL + tl.arange(0, BL)
    o_d = tl.arange(0, BD)
    m_l = o_l < L
    row = (i_bh * L + o_l)[:, None]
    b_dz = tl.zeros((BL, BD), acc)
    b_norm = tl.zeros((BL,), acc)
    for start in range(0, M, BM):
        o_m = start + tl.arange(0, BM)
        p_dy = dy + i_b * dy_b + i_h * dy_h + o_l[:, None] * dy_l + o_m[None, :] * dy_f
        m = m_l[:, None] & (o_m < M)[None, :]
        b_dp, b_more = _gradient(p_dy, y + row * F + o_m[None, :], factor, m, dy_f, EPS, FACTOR, M, KIND, acc)
        b_norm += b_more
        if HAS_OMEGA:
            m_w = (o_m < M)[:, None] & (o_d < D)[None, :]
            b_w = tl.load(omega + i_h * omega_h + o_m[:, None] * D + o_d[None, :], mask=m_w, other=0.0)
            b_dz += _dot(b_dp, b_w, DOT)
        else:
            b_dz = b_dp
    if KIND == "oprf":
        b_dz *= tl.sqrt(1.0 - 4.0 * tl.load(a))
    if HAS_NORM:
        b_dz += b_norm[:, None] * SCALE * _load_rows(x, i_b, i_h, o_l, o_d, L, x_b, x_h, x_l, x_d, D, acc)
    m = m_l[:, None] & (o_d < D)[None, :]
    tl.store(dx + row * D + o_d[None, :], (b_dz * SCALE).to(dx.dtype.element_ty), mask=m)


@triton.jit
def _sums_kernel(
    dy, y, x, factor, outer, total, B, H, L, F, sets, per_part,
    dy_b, dy_h, dy_l, dy_f, x_b, x_h, x_l, x_d,
    SCALE: tl.constexpr, EPS: tl.constexpr, FACTOR: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, KIND: tl.constexpr,
    DOT: tl.constexpr, acc: tl.constexpr,
):  # fmt: skip
    """Sums over the rows of a part of dp x^T, (sets, parts, M, D), and of dp, (sets, parts, M), for BM features.

    Apart from `_dx_kernel`: that one has all features of some rows, this one all rows of some features, so that each
    keeps its sum in registers. Parts are added in a fixed order afterwards.
    """
    i_part, i_set = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    blocks, heads = tl.cdiv(L, BL), H // sets
    o_m, o_d = tl.program_id(2) * BM + tl.arange(0, BM), tl.arange(0, BD)
    b_outer = tl.zeros((BM, BD), acc)
    b_total = tl.zeros((BM,), acc)
    i = i_part * per_part
    end = tl.minimum(i + per_part, B * heads * blocks)
    while i < end:
        i_b, i_h = i // blocks // heads, i_set + i // blocks % heads
        o_l = i % blocks * BL + tl.arange(0, BL)
        p_dy = dy + i_b * dy_b + i_h * dy_h + o_l[:, None] * dy_l + o_m[None, :] * dy_f
        p_y = y + ((i_b * H + i_h) * L + o_l)[:, None] * F + o_m[None, :]
        m = (o_l < L)[:, None] & (o_m < M)[None, :]
        b_dp, _ = _gradient(p_dy, p_y, factor, m, dy_f, EPS, FACTOR, M, KIND, acc)
        b_x = _load_rows(x, i_b, i_h, o_l, o_d, L, x_b, x_h, x_l, x_d, D, acc)
        b_outer += _dot(tl.trans(b_dp), b_x, DOT)
        b_total += tl.sum(b_dp, 0)
        i += 1
    o = (i_set * tl.num_programs(0) + i_part) * M + o_m
    m_m = o_m < M
    tl.store(outer + o[:, None] * D + o_d[None, :], b_outer * SCALE, mask=m_m[:, None] & (o_d < D)[None, :])
    tl.store(total + o, b_total, mask=m_m)


@triton.jit
def _fwht_kernel(
    x, y, rows, SCALE: tl.constexpr, D: tl.constexpr, PASSES: tl.constexpr, BL: tl.constexpr, acc: tl.constexpr
):
    o_l = tl.program_id(0).to(tl.int64) * BL + tl.arange(0, BL)
    o = o_l[:, None] * D + tl.arange(0, D)[None, :]
    m = (o_l < rows)[:, None]
    b = tl.load(x + o, mask=m, other=0.0).to(acc)
    # Each pass pairs the two halves of the axis and lays sums and differences side by side, which turns the bits of the
    # index by one; after log2(D) passes they are back in place.
    for _ in tl.static_range(PASSES):
        u, v = tl.split(tl.permute(tl.reshape(b, (BL, 2, D // 2)), (0, 2, 1)))
        b = tl.reshape(tl.join(u + v, u - v), (BL, D))
    tl.store(y + o, (b * SCALE).to(y.dtype.element_ty), mask=m)


def random_features(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float,
    eps: float,
    a: Tensor | None,  # ()
    stabilizer: str | None,
) -> Tensor:
    """`fastrpe.ops.random_features`."""
    B, H, L, D = x.shape
    sizes, factor = _sizes(x, omega), _factor(x, omega, kind, a)
    y = x.new_empty(B, H, L, sizes["M"] * (2 if kind in PAIRS else 1))
    if not x.numel():
        return y
    most = x.new_empty((B, H, L) if stabilizer == "global" else 1, dtype=_acc(x))
    BL = sizes["BL"]
    grid = (triton.cdiv(L, BL) * B * H,)
    for find in (True, False) if stabilizer == "global" else (False,):
        with _on_device(x):
            _features_kernel[grid](
                x, x if omega is None else omega, x if a is None else a, factor[0], most, y,
                H, L, y.shape[-1], _head_step(omega), *x.stride(), scale, eps, factor[1],
                sizes["M"], D, sizes["BD"], BL, sizes["BM"], kind, None if find else stabilizer, find,
                omega is not None, sizes["DOT"], TYPES.get(x.dtype), ACC[_acc(x)], num_stages=STAGES,
            )  # fmt: skip
        if find:
            most = most.amax(-1)
    return y


def random_features_bwd(
    dy: Tensor,  # (B, H, L, F)
    y: Tensor,  # (B, H, L, F)
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float,
    eps: float,
    a: Tensor | None,  # ()
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and for each projection the sums over rows of dp (scale x)^T, (sets, M, D), and of dp, (sets, M)."""
    B, H, L, D = x.shape
    sizes, factor = _sizes(x, omega), _factor(x, omega, kind, a)
    M, F, BL = sizes["M"], y.shape[-1], sizes["BL"]
    tiles = D, sizes["BD"], BL, sizes["BM"], kind
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        with _on_device(x):
            _dx_kernel[(triton.cdiv(L, BL) * B * H,)](
                dy, y, x, x if omega is None else omega, x if a is None else a, factor[0], dx,
                H, L, F, _head_step(omega), *dy.stride(), *x.stride(), scale, eps, factor[1],
                M, *tiles, kind in WITH_NORM, omega is not None, sizes["DOT"], ACC[_acc(x)],
                num_stages=STAGES,
            )  # fmt: skip
    empty = x.new_empty(0)
    if omega is None or not need_sums:
        return dx, empty, empty
    sets = H if omega.dim() == 3 else 1
    blocks = B * (H // sets if sets else 0) * triton.cdiv(L, BL)
    parts = min(blocks, max(1, PARTS // max(sets, 1)))
    outer = x.new_empty((sets, parts, M, D), dtype=_acc(x))
    total = x.new_empty((sets, parts, M), dtype=_acc(x))
    if x.numel():
        with _on_device(x):
            _sums_kernel[(parts, sets, triton.cdiv(M, sizes["BM"]))](
                dy, y, x, factor[0], outer, total, B, H, L, F, sets, triton.cdiv(blocks, parts),
                *dy.stride(), *x.stride(), scale, eps, factor[1], M, *tiles, sizes["DOT"], ACC[_acc(x)],
                num_stages=STAGES,
            )  # fmt: skip
    return dx, outer.sum(1), total.sum(1)


def fwht(
    x: Tensor,  # (rows, D)
    scale: float,
) -> Tensor:
    """`fastrpe.ops.features.fwht` of contiguous rows."""
    rows, D = x.shape
    y = torch.empty_like(x)
    BL = max(1, 2048 // D)
    with _on_device(x):
        _fwht_kernel[(triton.cdiv(rows, BL),)](x, y, rows, scale, D, D.bit_length() - 1, BL, ACC[_acc(x)])
    return y


ACC = {torch.float32: tl.float32, torch.float64: tl.float64}
# NumPy, which the interpreter runs on, has no bfloat16.
TYPES = {torch.float16: tl.float16} | ({} if INTERPRETED else {torch.bfloat16: tl.bfloat16})


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _sizes(x: Tensor, omega: Tensor | None) -> dict[str, Any]:
    """M, and the tiles: rows, features and coordinates of a program."""
    D = x.shape[-1]
    BD = max(16, triton.next_power_of_2(D))
    M = D if omega is None else omega.shape[-2]
    # Without a projection the features are the coordinates, in one tile.
    BM = BD if omega is None else min(64, max(16, triton.next_power_of_2(M)))
    BL = 64 if BD <= 64 else 32 if BD <= 128 else 16
    if x.dtype == torch.float64:
        return dict(M=M, BD=BD, BM=BM, BL=1, DOT="")
    return dict(M=M, BD=BD, BM=BM, BL=BL, DOT="ieee" if x.dtype == torch.float32 else "tf32x3")


def _factor(x: Tensor, omega: Tensor | None, kind: str, a: Tensor | None) -> tuple[Tensor, float]:
    """What multiplies the features: for OPRF it depends on A, and stays on the device."""
    M, D = x.shape[-1] if omega is None else omega.shape[-2], x.shape[-1]
    if a is not None:
        return (1 - 4 * a) ** (D / 4) * M**-0.5, 1.0
    return x, (2 * M if kind == "hyperbolic" else M) ** -0.5 if kind in WITH_NORM else 1.0


def _head_step(omega: Tensor | None) -> int:
    return omega.stride(0) if omega is not None and omega.dim() == 3 else 0


def _on_device(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
