"""Bidirectional attention of few tokens: a head at once, with its weights as a matrix and no state.

With features phi of L queries and S keys, A = phi(q) phi(k)^T and den its rows' sums, out = (A / den) v. Backwards,
with dP = dout v^T and delta the mean of a row of dP with weights A / den, dA = (dP - delta) / den.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import (
    EMPTY,
    EXP,
    Plan,
    add_rest,
    chunk_keys,
    feature_bias,
    load_keys,
    load_omega,
    load_rows,
    nonlinear,
    on_device,
    operand,
    operands,
    pad,
    project,
    project_t,
    query_weights,
    slope,
    steps,
    store_rows,
)

PROGRAMS = 264  # that walk over heads where omega's gradient is wanted, for each of a slot: two a multiprocessor


@triton.jit
def _keys(
    b_k, m_s, b_omega, o_f, F, b_bias, scale, exponent, eps,
    KIND: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of keys (BF, BS), and what they are relative to."""
    b_c = tl.full((b_omega.shape[0],), EMPTY if KIND == EXP else 0.0, tl.float32)
    b_pk = project_t(b_omega, b_k, PRECISION)
    b_pk, b_n, _ = chunk_keys(b_pk, b_k, m_s, b_c, b_bias, scale, exponent, eps, NORM, WIDE, KIND)
    if KIND != EXP:
        b_pk = tl.where((o_f < F)[:, None], b_pk, 0.0)
    return b_pk, b_n


@triton.jit
def _queries(
    b_q, b_omega, b_n, b_bias, scale, exponent, eps,
    KIND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of queries (BL, BF), relative to what cancels."""
    b_pq = project(b_q, b_omega, PRECISION)
    if KIND == EXP:
        b_pq, _ = query_weights(b_pq, b_n, b_bias, exponent, WIDE)
    else:
        b_pq = nonlinear(b_pq * scale, eps, KIND)
    return b_pq


@triton.jit
def _short_kernel(
    q, k, v, omega, bias, mask, out,
    scale, exponent, eps, H, groups, L, S, M, F,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = DTYPE == tl.float32
    i_bh = tl.program_id(0).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_k = i_h // groups
    o_f = tl.arange(0, BF)
    b_omega = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
    b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
    p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
    m_s, b_k, b_v = load_keys(p_k, p_v, mask + i_b * S, 0, k_l, v_l, S, D, V, BS, BD, BV, MASK, DTYPE)
    b_q = load_rows(q + i_b * q_b + i_h * q_h, 0, q_l, L, D, BL, BD)
    b_pk, b_n = _keys(b_k, m_s, b_omega, o_f, F, b_bias, scale, exponent, eps, KIND, NORM, WIDE, PRECISION)
    b_pq = _queries(b_q, b_omega, b_n, b_bias, scale, exponent, eps, KIND, WIDE, PRECISION)
    b_pk, b_pq = operand(b_pk, DTYPE, PRECISION), operand(b_pq, DTYPE, PRECISION)
    b_a = operand(tl.dot(b_pq, b_pk, input_precision=PRECISION), DTYPE, PRECISION)
    b_den = tl.sum(b_a.to(tl.float32), 1)  # as rounded: what weights add up to is what they are divided by
    b_o = tl.dot(b_a, b_v, input_precision=PRECISION) / tl.where(b_den == 0.0, float("inf"), b_den)[:, None]
    store_rows(out + i_bh * L * V, b_o, 0, V, L, V, BL, BV)


@triton.jit
def _short_gradients_kernel(
    dout, q, k, v, omega, bias, mask, dq, dk, dv, domega, dbias,
    scale, exponent, eps, H, groups, L, S, M, F, sets, units, walkers,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
    BV: tl.constexpr, KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, OMEGA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of query heads walker, walker + walkers, ... of a set of them, which have the same projection."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    i_set, walker = tl.program_id(0) % sets, tl.program_id(0) // sets
    heads = H // sets
    o_f, o_d = tl.arange(0, BF), tl.arange(0, BD)
    b_omega = load_omega(omega + i_set.to(tl.int64) * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY)
    b_omega = b_omega.to(q.dtype.element_ty)
    b_bias = feature_bias(bias + i_set.to(tl.int64) * bias_h, o_f, F, BIASED)
    b_dw = tl.zeros((BF, BD), tl.float32)
    b_db = tl.zeros((BF,), tl.float32)
    for u in steps(walker, units, walkers):
        i_b, i_h = tl.cast(u // heads, tl.int64), tl.cast(i_set * heads + u % heads, tl.int64)
        i_k, i_bh = i_h // groups, i_b * H + i_h
        p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
        m_s, b_k, b_v = load_keys(p_k, p_v, mask + i_b * S, 0, k_l, v_l, S, D, V, BS, BD, BV, MASK, DTYPE)
        b_q = load_rows(q + i_b * q_b + i_h * q_h, 0, q_l, L, D, BL, BD)
        b_dout = load_rows(dout + i_b * dout_b + i_h * dout_h, 0, dout_l, L, V, BL, BV).to(DTYPE)
        b_pk, b_n = _keys(b_k, m_s, b_omega, o_f, F, b_bias, scale, exponent, eps, KIND, NORM, WIDE, PRECISION)
        b_pq = _queries(b_q, b_omega, b_n, b_bias, scale, exponent, eps, KIND, WIDE, PRECISION)
        # What nearly cancels, where attention is nearly uniform or of one key, enters products in two numbers.
        b_pk, b_pk_rest = operands(b_pk, KIND, DTYPE, PRECISION)
        b_pq = operand(b_pq, DTYPE, PRECISION)
        b_a = tl.dot(b_pq, b_pk, input_precision=PRECISION)
        b_a = add_rest(b_a, b_pq, b_pk_rest, KIND, DTYPE, PRECISION)
        b_den = tl.sum(b_a, 1)
        b_g = tl.where(b_den == 0.0, 0.0, 1.0 / tl.where(b_den == 0.0, 1.0, b_den))[:, None]
        b_a *= b_g
        b_da = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_da = (b_da - tl.sum(b_a * b_da, 1)[:, None]) * b_g
        b_da, b_da_rest = operands(b_da, KIND, DTYPE, PRECISION)
        b_a = operand(b_a, DTYPE, PRECISION)
        b_dv = tl.dot(tl.trans(b_a), b_dout, input_precision=PRECISION)
        store_rows(dv + i_bh * S * V, b_dv, 0, V, S, V, BS, BV)
        # Projections are made again where their slopes are wanted: registers do not hold them as well.
        b_ds = tl.dot(b_da, tl.trans(b_pk), input_precision=PRECISION)
        b_ds = add_rest(b_ds, b_da_rest, tl.trans(b_pk), KIND, DTYPE, PRECISION)
        b_ds = add_rest(b_ds, b_da, tl.trans(b_pk_rest), KIND, DTYPE, PRECISION)
        b_ds *= b_pq.to(tl.float32) if KIND == EXP else slope(project(b_q, b_omega, PRECISION) * scale, KIND)
        b_ds = operand(b_ds, DTYPE, PRECISION)
        b_dq = tl.dot(b_ds, b_omega.to(DTYPE), input_precision=PRECISION) * scale
        store_rows(dq + i_bh * L * D, b_dq, 0, D, L, D, BL, BD)
        if OMEGA:
            b_dw = tl.dot(tl.trans(b_ds), b_q.to(DTYPE), b_dw, input_precision=PRECISION)
            if BIASED:
                b_db += tl.sum(b_ds.to(tl.float32), 0)
        b_ds = tl.dot(tl.trans(b_pq), b_da, input_precision=PRECISION)
        b_ds = add_rest(b_ds, tl.trans(b_pq), b_da_rest, KIND, DTYPE, PRECISION)
        if KIND == EXP:
            b_ds *= b_pk.to(tl.float32)
        else:
            b_ds = tl.where(m_s[None, :], b_ds * slope(project_t(b_omega, b_k, PRECISION) * scale, KIND), 0.0)
        if NORM:
            b_sum = tl.sum(b_ds, 0) * scale * scale
        if OMEGA and BIASED:
            b_db += tl.sum(b_ds, 1)
        b_ds = operand(b_ds, DTYPE, PRECISION)
        b_dk = tl.dot(tl.trans(b_ds), b_omega.to(DTYPE), input_precision=PRECISION) * scale
        if NORM:
            b_dk -= b_k.to(tl.float32) * b_sum[:, None]
        store_rows(dk + i_bh * S * D, b_dk, 0, D, S, D, BS, BD)
        if OMEGA:
            b_dw = tl.dot(b_ds, b_k.to(DTYPE), b_dw, input_precision=PRECISION)
    if OMEGA:
        p = tl.program_id(0).to(tl.int64) * F + o_f
        m = (o_f < F)[:, None] & (o_d < D)[None, :]
        tl.store(domega + p[:, None] * D + o_d[None, :], b_dw * scale, mask=m)
        if BIASED:
            tl.store(dbias + p, b_db, mask=o_f < F)


# Launches ------------------------------------------------------------------------------------------------------------


def short_attention(
    p: Plan,
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
) -> Tensor:
    out = q.new_empty(p.B, p.H, p.L, p.V)
    if out.numel():
        with on_device(q):
            _short_kernel[(p.B * p.H,)](
                q, k, v, p.omega, p.bias, p.mask, out,
                p.scale, p.exponent, p.eps, p.H, p.H // p.Hk, p.L, p.S, p.M, p.F,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], p.omega_h, p.bias_h, *_sizes(p),
                **p.options("KIND NORM SIGNED IDENTITY BIASED MASK PRECISION"),
                DTYPE=p.dtype(), num_warps=_warps(p), num_stages=1,
            )  # fmt: skip
    return out


def short_gradients(
    p: Plan,
    dout: Tensor,  # (B, H, L, V)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    need_omega: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and parts (walkers, 1 or Hk, 1, F, ...) of those of omega and its bias."""
    groups = p.H // p.Hk if p.Hk else 1
    wide = q.dtype if groups == 1 else torch.float32  # of a group's heads, added afterwards
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (q.new_empty((p.B, p.H, p.S, n), dtype=wide) for n in (p.D, p.V))
    sets = p.Hk if p.omega_h else 1
    units = p.B * p.H // max(sets, 1)
    walkers = min(units, max(PROGRAMS // max(sets, 1), 1)) if need_omega else units
    parts = (walkers if need_omega else 0, sets, 1, p.F)
    domega, dbias = (q.new_empty((*parts, *n), dtype=torch.float32) for n in ((p.D,), ()))
    if units * sets:
        with on_device(q):
            _short_gradients_kernel[(sets * walkers,)](
                dout, q, k, v, p.omega, p.bias, p.mask, dq, dk, dv, domega, dbias,
                p.scale, p.exponent, p.eps, p.H, p.H // p.Hk, p.L, p.S, p.M, p.F, sets, units, walkers,
                *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], p.omega_h, p.bias_h,
                *_sizes(p), **p.options("KIND NORM SIGNED IDENTITY BIASED MASK PRECISION"),
                OMEGA=need_omega, DTYPE=p.dtype(), num_warps=_warps(p), num_stages=1,
            )  # fmt: skip
    if groups > 1:
        dk, dv = (p.add_groups(x) for x in (dk, dv))
    return dq, dk, dv, domega, dbias


def _sizes(p: Plan) -> tuple[int, ...]:
    return p.D, p.V, pad(p.F), pad(p.L), pad(p.S), p.BD, p.BV


def _warps(p: Plan) -> int:
    return 8 if pad(p.F) > 64 else 4
