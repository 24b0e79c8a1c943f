"""Triton kernels of the rotary family and their launchers.

One program holds the phases of a tile of rows and rotates with them a chunk of the vectors that share them, so that
sines cost little and the rest is a copy. A *set* is one set of frequencies with the heads it serves.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# 1 / (2 pi) in float32, that number as a sum of two 12-bit numbers, and what float32 leaves out
INV_2PI = tl.constexpr(0.15915493667125702)
INV_2PI_A = tl.constexpr(0.15911865234375)
INV_2PI_B = tl.constexpr(3.628432750701904e-05)
INV_2PI_LOW = tl.constexpr(6.4206382e-09)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Phases --------------------------------------------------------------------------------------------------------------


@triton.jit
def _split(x):
    """x = high + low, with so few bits each that products of such parts are exact in float32."""
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add(a, b):
    """The sum and what it rounded off."""
    s = a + b
    part = s - a
    return s, (a - (s - part)) + (b - part)


@triton.jit
def _cos_sin(turn, rest, HARDWARE: tl.constexpr):
    """cos and sin of turn + rest turns, |turn| <= 1/2 and rest small; absolute error 1e-7, with HARDWARE 5e-7."""
    if HARDWARE:
        angle = (turn + rest) * 6.2831854820251465
        c = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
        s = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1)
    else:
        half = tl.floor(2.0 * turn + 0.5)
        r = (turn - 0.5 * half) + rest  # [-1/4, 1/4]
        sign = 1.0 - 2.0 * (half - 2.0 * tl.floor(0.5 * half))
        u = r * r
        # minimax of (sin(2 pi r) - 2 pi r) / r^3 and of (cos(2 pi r) - 1) / r^2
        p = ((39.682708740234375 * u - 76.57188415527344) * u + 81.60215759277344) * u - 41.341678619384766
        g = (((-25.00679588317871 * u + 60.1482048034668) * u - 85.45382690429688) * u + 64.9393539428711) * u
        s = sign * (6.2831854820251465 * r + r * u * p)
        c = sign * (1.0 + u * (g - 19.739208221435547))
    return c, s


@triton.jit
def _phases(
    p_first, p_second, o_token, m_token, o_r, m_r, i_set, factor, sign,
    C: tl.constexpr, R: tl.constexpr, IS_TABLE: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """cos and sin, (BL, BR), of tokens o_token in planes o_r: from tables, or from positions and frequencies."""
    m = m_token[:, None] & m_r[None, :]
    if IS_TABLE:
        b_c = tl.load(p_first + o_token[:, None] * R + o_r[None, :], mask=m, other=0.0)
        b_s = tl.load(p_second + o_token[:, None] * R + o_r[None, :], mask=m, other=0.0)
    else:
        wide: tl.constexpr = p_first.dtype.element_ty == tl.float64
        for i in tl.static_range(C):
            b_p = tl.load(p_first + o_token * C + i, mask=m_token, other=0.0)
            b_f = tl.load(p_second + (i_set * C + i) * R + o_r, mask=m_r, other=0.0)
            if wide:
                term = b_p[:, None] * b_f[None, :]
                rest = term * 0.0
            else:
                # Frequencies in turns, as a sum of three numbers; every product but the last is exact, so that the
                # fraction of the phase of a position of 1e6 survives.
                fh, fl = _split(b_f)
                wh = b_f * INV_2PI
                error = ((fh * INV_2PI_A - wh) + fh * INV_2PI_B + fl * INV_2PI_A) + fl * INV_2PI_B + b_f * INV_2PI_LOW
                ph, pl = _split(b_p)
                wa, wb = _split(wh)
                t0 = ph[:, None] * wa[None, :]
                t1 = ph[:, None] * wb[None, :]
                t2 = pl[:, None] * wa[None, :]
                rest = pl[:, None] * wb[None, :] + b_p[:, None] * error[None, :]
                term, lost = _add(t0 - tl.floor(t0 + 0.5), t1 - tl.floor(t1 + 0.5))
                rest += lost
                term, lost = _add(term - tl.floor(term + 0.5), t2 - tl.floor(t2 + 0.5))
                rest += lost
            if i == 0:
                b_t, b_rest = term, rest
            else:
                b_t, lost = _add(b_t, term)
                b_rest += rest + lost
            if not wide:
                b_t -= tl.floor(b_t + 0.5)
        if wide:
            b_c, b_s = tl.cos(b_t), tl.sin(b_t)
        else:
            b_c, b_s = _cos_sin(b_t, b_rest, HARDWARE)
    return b_c * factor, b_s * (factor * sign)


# Rotation ------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_pair(p_x, d, o_r, m, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two coordinates of planes o_r of rows that start at p_x (BL, 1), in the type they are computed in."""
    o_a, o_b = (2 * o_r, 2 * o_r + 1) if INTERLEAVED else (o_r, R + o_r)
    a = tl.load(p_x + o_a[None, :] * d, mask=m, other=0.0)
    b = tl.load(p_x + o_b[None, :] * d, mask=m, other=0.0)
    return a, b


@triton.jit
def _store_pair(p_y, a, b, o_r, m, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = p_y.dtype.element_ty
    o_a, o_b = (2 * o_r, 2 * o_r + 1) if INTERLEAVED else (o_r, R + o_r)
    tl.store(p_y + o_a[None, :], a.to(dtype), mask=m)
    tl.store(p_y + o_b[None, :], b.to(dtype), mask=m)


@triton.jit
def _rotate_kernel(
    q, k, yq, yk, first, second,
    xq, xk, freq_sums, position_sums,  # of the backward
    factor, sign, angle_sign,
    L, prefix, heads, nq, rows, items,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d,
    xq_b, xq_h, xq_l, xq_d, xk_b, xk_h, xk_l, xk_d,
    D: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BL: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr,
    CHUNK: tl.constexpr, INTERLEAVED: tl.constexpr, IS_TABLE: tl.constexpr, HARDWARE: tl.constexpr,
    BATCH_POSITIONS: tl.constexpr, FREQ_GRADIENT: tl.constexpr, POSITION_GRADIENT: tl.constexpr,
):  # fmt: skip
    i_tile, i_chunk, i_set = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    acc = first.dtype.element_ty
    o_row = i_tile * BL + tl.arange(0, BL)
    m_row = o_row < rows
    o_l = o_row % L
    i_b = o_row // L  # the sequence, where each has positions of its own
    m_token = m_row & (o_l >= prefix)
    o_token = i_b * (L - prefix) + o_l - prefix
    o_r = tl.arange(0, BR)
    m_r = o_r < R
    b_c, b_s = _phases(
        first, second, o_token, m_token, o_r, m_r, i_set, factor, sign, C, R, IS_TABLE, HARDWARE
    )  # fmt: skip
    m = m_row[:, None] & m_r[None, :]
    turns = m_token[:, None]
    b_angle = tl.zeros((BL, BR), acc)
    o_p = 2 * R + tl.arange(0, BP)
    m_p = m_row[:, None] & (o_p < D)[None, :]
    for n in range(CHUNK):
        i = i_chunk * CHUNK + n
        if i < items:
            j = i % heads
            o_b = i_b if BATCH_POSITIONS else i_b * 0 + i // heads
            if j < nq:
                i_h = i_set * nq + j
                p_x = q + o_b * q_b + i_h * q_h + o_l * q_l
                p_y = yq + ((o_b * (nq * tl.num_programs(2)) + i_h) * L + o_l) * D
                x_d = q_d
            else:
                i_h = i_set * (heads - nq) + j - nq
                p_x = k + o_b * k_b + i_h * k_h + o_l * k_l
                p_y = yk + ((o_b * ((heads - nq) * tl.num_programs(2)) + i_h) * L + o_l) * D
                x_d = k_d
            a, b = _load_pair(p_x[:, None], x_d, o_r, m, R, INTERLEAVED)
            wa, wb = a.to(acc), b.to(acc)
            ya, yb = wa * b_c - wb * b_s, wb * b_c + wa * b_s
            if FREQ_GRADIENT or POSITION_GRADIENT:
                if j < nq:
                    p_z = xq + o_b * xq_b + i_h * xq_h + o_l * xq_l
                    z_d = xq_d
                else:
                    p_z = xk + o_b * xk_b + i_h * xk_h + o_l * xk_l
                    z_d = xk_d
                za, zb = _load_pair(p_z[:, None], z_d, o_r, m, R, INTERLEAVED)
                b_angle += tl.where(turns, za.to(acc) * yb - zb.to(acc) * ya, 0.0)
            ya = tl.where(turns, ya.to(a.dtype), a)
            yb = tl.where(turns, yb.to(a.dtype), b)
            _store_pair(p_y[:, None], ya, yb, o_r, m, R, INTERLEAVED)
            if 2 * R < D:
                b_rest = tl.load(p_x[:, None] + o_p[None, :] * x_d, mask=m_p, other=0.0)
                tl.store(p_y[:, None] + o_p[None, :], b_rest, mask=m_p)
    # Every program writes sums of its own, which are added in a fixed order afterwards.
    if FREQ_GRADIENT:
        i_part = (i_tile * tl.num_programs(1) + i_chunk) * tl.num_programs(2) + i_set
        for i in tl.static_range(C):
            b_p = tl.load(first + o_token * C + i, mask=m_token, other=0.0)
            b_f = angle_sign * tl.sum(b_p[:, None] * b_angle, 0)
            tl.store(freq_sums + (i_part * C + i) * R + o_r, b_f, mask=m_r)
    if POSITION_GRADIENT:
        i_part = i_set * tl.num_programs(1) + i_chunk
        points = rows // L * (L - prefix)
        for i in tl.static_range(C):
            b_f = tl.load(second + (i_set * C + i) * R + o_r, mask=m_r, other=0.0)
            b_p = angle_sign * tl.sum(b_f[None, :] * b_angle, 1)
            tl.store(position_sums + (i_part * points + o_token) * C + i, b_p, mask=m_token)


def rotate(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """`fastrpe.ops.rotate` without a basis."""
    return _launch(q, k, positions, freqs, interleaved, inverse, factor, prefix)[:2]


def rotate_cos_sin(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    cos: Tensor,  # (L - prefix, R) or (B, L - prefix, R)
    sin: Tensor,  # as cos
    interleaved: bool,
    inverse: bool,
    prefix: int,
) -> tuple[Tensor, Tensor]:
    """`fastrpe.ops.rotate_cos_sin`."""
    return _launch(q, k, cos, sin, interleaved, inverse, 1.0, prefix, is_table=True)[:2]


def rotate_bwd(
    dyq: Tensor,  # (B, H, L, D)
    dyk: Tensor,  # (B, Hk, L, D)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    positions: Tensor,  # (L - prefix, C) or (B, L - prefix, C)
    freqs: Tensor,  # (C, R) or (Hk, C, R)
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
    need_positions: bool,
    need_freqs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, positions and freqs; an empty tensor where not needed."""
    needs = (need_positions, need_freqs)
    return _launch(dyq, dyk, positions, freqs, interleaved, not inverse, factor, prefix, x=(q, k), needs=needs)


def _launch(
    q: Tensor,  # (B, H, L, D): what is rotated, dy in the backward
    k: Tensor,  # (B, Hk, L, D)
    first: Tensor,  # positions or cos
    second: Tensor,  # freqs or sin
    interleaved: bool,
    inverse: bool,
    factor: float,
    prefix: int,
    is_table: bool = False,
    x: tuple[Tensor, Tensor] | None = None,
    needs: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, L, D = q.shape
    R, C = second.shape[-1], 0 if is_table else first.shape[-1]
    sets = second.shape[0] if second.dim() == 3 and not is_table else 1
    heads, nq = (H + k.shape[1]) // sets, H // sets
    batch_positions = first.dim() == 3
    rows, items = (B if batch_positions else 1) * L, (1 if batch_positions else B) * heads
    yq, yk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    BR = max(16, triton.next_power_of_2(R))
    BL = max(1, 2048 // BR)
    chunk = max(8, triton.cdiv(items, 65535))
    grid = (triton.cdiv(rows, BL), triton.cdiv(items, chunk), sets) if rows * items * D else (0, 0, sets)
    need_positions, need_freqs = needs
    acc = first.dtype
    freq_sums = q.new_empty((grid[0] * grid[1] if need_freqs else 0, second.numel()), dtype=acc)
    position_sums = q.new_empty((sets * grid[1] if need_positions else 0, first.numel()), dtype=acc)
    xq, xk = x or (q, k)
    if 0 not in grid:
        sign = -1.0 if inverse else 1.0
        with _on_device(q):
            _rotate_kernel[grid](
                q, k, yq, yk, first, second, xq, xk, freq_sums, position_sums,
                factor, sign, -sign, L, prefix, heads, nq, rows, items,
                *q.stride(), *k.stride(), *xq.stride(), *xk.stride(),
                D, C, R, BL, BR, max(16, triton.next_power_of_2(D - 2 * R)), chunk, interleaved, is_table,
                _hardware(q), batch_positions, need_freqs, need_positions,
                enable_fp_fusion=False,  # a fused product would bypass the rounding that the exact sums rely on
            )  # fmt: skip
    empty = q.new_empty(0)
    return (
        yq,
        yk,
        position_sums.sum(0).view_as(first) if need_positions else empty,
        freq_sums.sum(0).view_as(second) if need_freqs else empty,
    )


def _hardware(q: Tensor) -> bool:
    # The hardware's sine: absolute error 5e-7, a thousandth of a 16-bit rounding.
    return q.dtype in (torch.float16, torch.bfloat16) and not INTERPRETED


def _on_device(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
