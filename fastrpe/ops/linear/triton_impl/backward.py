"""Linear attention, backward. Features are recomputed; the gradient of a state is itself a state, summed over queries.

With g = dout / den and delta = dout . out, the weight phi(q_i) . phi(k_j) has the gradient g_i . v_j - delta_i / den_i:
queries see the state sum_j phi(k_j) [v_j, 1], keys the state sum_i phi(q_i) [g_i, -delta_i / den_i].
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import causal_spans, new_state, scan, spans, state, states
from .short import short_gradients
from .tiles import (
    EMPTY,
    EXP,
    LOG2E,
    MASKED,
    TRIG,
    VANISHED,
    Plan,
    State,
    add_columns,
    add_exponents,
    add_outer,
    add_rest,
    add_token,
    chunk_keys,
    feature_bias,
    half_norm,
    in_float32,
    landed,
    load_keys,
    load_omega,
    load_rows,
    load_state,
    nonlinear,
    on_device,
    operand,
    operands,
    phase,
    plan,
    project,
    project_t,
    query_state,
    query_weights,
    rows,
    slope,
    state_before,
    steps,
    store_rows,
    store_state,
    times_columns,
)

SPREAD = tl.constexpr(80.0)  # bits between a feature's queries of one chunk, above which the smaller may have vanished


# Bidirectional -------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_kernel(
    dout, q, omega, bias, kv, z, c, dq, lse, delta,
    scale, exponent, eps, heads, groups, L, M, F, blocks, span,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, NORMALIZE: tl.constexpr, ONE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and of every row the log-sum of its weights (1 / den of features without exponents) and delta."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, (pid // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_k = i_h // groups
    i_state = i_b * (heads // groups) + i_k
    p_q, p_dout, p_dq = q + i_b * q_b + i_h * q_h, dout + i_b * dout_b + i_h * dout_h, dq + i_bh * L * D
    p_w, p_bias = omega + i_k * omega_h, bias + i_k * bias_h
    o_l = tl.arange(0, BL)
    end = tl.minimum(L, (i_block + 1) * span)
    if ONE:
        o_f = tl.arange(0, BF)
        b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
        b_u, b_z, b_c = load_state(kv, z, c, i_state, o_f, F, LOG2E, V, BV)
        b_u, b_z, b_c = query_state(b_u, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
        b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
    for i in steps(i_block * span, end, BL):
        b_q = load_rows(p_q, i, q_l, end, D, BL, BD)
        b_dout = load_rows(p_dout, i, dout_l, end, V, BL, BV).to(DTYPE)
        b_dq = tl.zeros((BL, BD), tl.float32)
        b_den = tl.zeros((BL,), tl.float32)
        b_delta = tl.zeros((BL,), tl.float32)
        b_r = tl.full((BL,), EMPTY if KIND == EXP else 0.0, tl.float32)
        b_total = tl.zeros((BL,), tl.float32)
        b_row = tl.zeros((BL,), tl.float32)
        b_mean = tl.zeros((BL,), tl.float32)
        if not ONE:
            for f in steps(0, F, BF):
                o_f = f + tl.arange(0, BF)
                b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
                b_u, b_z, b_c = load_state(kv, z, c, i_state, o_f, F, LOG2E, V, BV)
                b_u, b_z, b_c = query_state(b_u, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
                b_p = project(b_q, b_omega, PRECISION)
                b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
                b_dw = tl.dot(b_dout, tl.trans(b_u), input_precision=PRECISION)
                b_dw = add_rest(b_dw, b_dout, tl.trans(b_rest), KIND, DTYPE, PRECISION)
                if KIND == EXP:
                    b_p = b_p * exponent + b_c[None, :]
                    b_n = tl.maximum(b_r, tl.max(b_p, 1))
                    b_w = tl.exp2(b_p - b_n[:, None])
                    b_s = tl.exp2(b_r - b_n)
                    b_den = b_den * b_s + tl.sum(b_w, 1)
                    b_delta = b_delta * b_s + tl.sum(b_w * b_dw, 1)
                    b_r = b_n
                else:
                    b_t = b_p * scale
                    if KIND == TRIG:
                        b_t -= phase(o_f, M)[None, :]
                    b_w = nonlinear(b_t, eps, KIND)
                    b_den += tl.sum(b_w * b_z[None, :], 1)
                    b_delta += tl.sum(b_w * b_dw, 1)
        for f in steps(0, 1 if ONE else F, BF):
            if not ONE:
                o_f = f + tl.arange(0, BF)
                b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
                b_u, b_z, b_c = load_state(kv, z, c, i_state, o_f, F, LOG2E, V, BV)
                b_u, b_z, b_c = query_state(b_u, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
                b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
            b_p = project(b_q, b_omega, PRECISION)
            b_ds = tl.dot(b_dout, tl.trans(b_u), input_precision=PRECISION)
            b_ds = add_rest(b_ds, b_dout, tl.trans(b_rest), KIND, DTYPE, PRECISION)
            if KIND == EXP:
                b_p = add_exponents(b_p, b_c, exponent, WIDE)
                if ONE:
                    b_r = tl.max(b_p, 1)
                b_w = tl.exp2(b_p - b_r[:, None])
                if ONE:
                    b_den = tl.sum(b_w, 1)
            else:
                b_t = b_p * scale
                if KIND == TRIG:
                    b_t -= phase(o_f, M)[None, :]
                b_w = nonlinear(b_t, eps, KIND)
                if ONE:
                    b_den = tl.sum(b_w * b_z[None, :], 1)
            if NORMALIZE:
                there = b_den != 0.0
                b_g = tl.where(there, 1.0 / tl.where(there, b_den, 1.0), 0.0)
                if ONE:
                    b_delta = tl.sum(b_w * b_ds, 1)
                b_mean = b_delta * b_g
                b_ds -= b_mean[:, None] if KIND == EXP else b_mean[:, None] * b_z[None, :]
                if KIND == EXP:
                    b_row = b_r + tl.log2(tl.where(there, b_den, 1.0))
                else:
                    b_row = b_g
            else:
                b_g = tl.full((BL,), 1.0, tl.float32)
                if KIND == EXP:
                    b_g = tl.exp2(b_r - half_norm(b_q, scale) if NORM else b_r)
                else:
                    b_row = b_g
            b_ds = b_ds * b_g[:, None] * (b_w if KIND == EXP else slope(b_t, KIND))
            if NORM and not NORMALIZE:
                b_total += tl.sum(b_ds, 1)
            b_dq = tl.dot(operand(b_ds, DTYPE, PRECISION), b_omega.to(DTYPE), b_dq, input_precision=PRECISION)
        b_dq *= scale
        if NORM and not NORMALIZE:
            b_dq -= b_q.to(tl.float32) * (b_total * scale * scale)[:, None]
        store_rows(p_dq, b_dq, i, D, end, D, BL, BD)
        tl.store(lse + i_bh * L + i + o_l, b_row, mask=i + o_l < end)
        tl.store(delta + i_bh * L + i + o_l, b_mean, mask=i + o_l < end)


@triton.jit
def _dk_kernel(
    k, v, omega, bias, mask, kv, z, c, log_scale, dk, dv,
    scale, exponent, eps, heads, S, M, F, blocks, span,
    k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, ONE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv from the gradient of the state."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, (pid // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    p_k, p_v = k + i_b * k_b + i_h * k_h, v + i_b * v_b + i_h * v_h
    p_w, p_bias = omega + i_h * omega_h, bias + i_h * bias_h
    end = tl.minimum(S, (i_block + 1) * span)
    if ONE:
        o_f = tl.arange(0, BF)
        b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(k.dtype.element_ty)
        b_u, b_z, b_c = load_state(kv, z, c, i_bh, o_f, F, LOG2E, V, BV)
        b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
        if BIASED:
            b_c += tl.load(p_bias + o_f, mask=o_f < F, other=0.0) * LOG2E
    for i in steps(i_block * span, end, BL):
        m_l, b_k, b_v = load_keys(p_k, p_v, mask + i_b * S, i, k_l, v_l, end, D, V, BL, BD, BV, MASK, DTYPE)
        b_e = half_norm(b_k, scale) if NORM or KIND == TRIG else tl.zeros((BL,), tl.float32)
        if KIND == TRIG:
            b_e -= tl.load(log_scale + i_bh * F) * LOG2E
        b_e = tl.where(m_l, b_e if KIND == TRIG else -b_e, MASKED)
        b_dk = tl.zeros((BL, BD), tl.float32)
        b_dv = tl.zeros((BL, BV), tl.float32)
        b_total = tl.zeros((BL,), tl.float32)
        for f in steps(0, 1 if ONE else F, BF):
            if not ONE:
                o_f = f + tl.arange(0, BF)
                b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(k.dtype.element_ty)
                b_u, b_z, b_c = load_state(kv, z, c, i_bh, o_f, F, LOG2E, V, BV)
                b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
                if BIASED:
                    b_c += tl.load(p_bias + o_f, mask=o_f < F, other=0.0) * LOG2E
            b_p = project(b_k, b_omega, PRECISION)
            if KIND == EXP:
                b_p = tl.exp2(add_exponents(b_p, b_c, exponent, WIDE) + b_e[:, None])
            else:
                b_t = b_p * scale
                if KIND == TRIG:
                    b_t -= phase(o_f, M)[None, :]
                b_g = tl.exp2(b_e)[:, None]
                b_p = nonlinear(b_t, eps, KIND) * b_g
            b_p_t = operand(b_p, DTYPE, PRECISION)  # the one copy that stays in registers
            b_dv = tl.dot(b_p_t, b_u, b_dv, input_precision=PRECISION)
            b_da = tl.dot(b_v, tl.trans(b_u), input_precision=PRECISION)
            b_da = add_columns(add_rest(b_da, b_v, tl.trans(b_rest), KIND, DTYPE, PRECISION), b_z, WIDE)
            if KIND == EXP:
                b_da *= b_p_t.to(tl.float32)
                if NORM:
                    b_total -= tl.sum(b_da, 1)
            else:
                if KIND == TRIG:
                    b_total += tl.sum(b_da * b_p_t.to(tl.float32), 1)
                b_da *= slope(b_t, KIND) * b_g
            b_dk = tl.dot(operand(b_da, DTYPE, PRECISION), b_omega.to(DTYPE), b_dk, input_precision=PRECISION)
        b_dk *= scale
        if NORM or KIND == TRIG:
            b_dk += b_k.to(tl.float32) * (b_total * scale * scale)[:, None]
        store_rows(dk + i_bh * S * D, b_dk, i, D, end, D, BL, BD)
        store_rows(dv + i_bh * S * V, b_dv, i, V, end, V, BL, BV)


@triton.jit
def _domega_kernel(
    x, y, omega, bias, mask, kv, z, c, log_scale, lse, delta, domega, dbias,
    scale, exponent, eps, heads, groups, S, M, F, splits, span,
    x_b, x_h, x_l, y_b, y_h, y_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A span's part of domega and dbias, from queries and their gradients, or from keys and values."""
    tiles = tl.cdiv(F, BF)
    pid = tl.program_id(0)
    i_f, i_s, i_bh = pid % tiles, pid // tiles % splits, (pid // tiles // splits).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_state = i_bh // groups
    o_f, o_s, o_d = i_f * BF + tl.arange(0, BF), tl.arange(0, BS), tl.arange(0, BD)
    p_w, p_bias = omega + (i_h // groups) * omega_h, bias + (i_h // groups) * bias_h
    b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(x.dtype.element_ty)
    b_u, b_z, b_c = load_state(kv, z, c, i_state, o_f, F, LOG2E, V, BV)
    if QUERIES:
        b_u, b_z, b_c = query_state(b_u, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
    elif BIASED:
        b_c += tl.load(p_bias + o_f, mask=o_f < F, other=0.0) * LOG2E
    b_u, b_rest = operands(b_u, KIND, DTYPE, PRECISION)
    p_x, p_y = x + i_b * x_b + i_h * x_h, y + i_b * y_b + i_h * y_h
    b_dw = tl.zeros((BF, BD), tl.float32)
    b_db = tl.zeros((BF,), tl.float32)
    end = tl.minimum(S, (i_s + 1) * span)
    for i in steps(i_s * span, end, BS):
        m_s, b_x, b_y = load_keys(p_x, p_y, mask + i_b * S, i, x_l, y_l, end, D, V, BS, BD, BV, MASK, DTYPE)
        b_p = project_t(b_omega, b_x, PRECISION)
        b_ds = tl.dot(b_u, tl.trans(b_y), input_precision=PRECISION)
        b_ds = add_rest(b_ds, b_rest, tl.trans(b_y), KIND, DTYPE, PRECISION)
        b_e = half_norm(b_x, scale) if NORM or (KIND == TRIG and not QUERIES) else tl.zeros((BS,), tl.float32)
        if KIND != TRIG:
            b_e *= -1.0
        if QUERIES:
            b_row = tl.load(lse + i_bh * S + i + o_s, mask=m_s, other=0.0)
            b_delta = tl.load(delta + i_bh * S + i + o_s, mask=m_s, other=0.0)
            if KIND == EXP:
                m_s &= b_row > EMPTY
                b_e -= b_row
                b_ds -= b_delta[None, :]
            else:
                b_ds = (b_ds - b_z[:, None] * b_delta[None, :]) * b_row[None, :]
        else:
            b_ds += b_z[:, None]
            if KIND == TRIG:
                b_e -= tl.load(log_scale + i_state * F) * LOG2E
        b_e = tl.where(m_s, b_e, MASKED)
        if KIND == EXP:
            b_ds *= tl.exp2(b_p * exponent + b_c[:, None] + b_e[None, :])
        else:
            b_t = b_p * scale
            if KIND == TRIG:
                b_t -= phase(o_f, M)[:, None]
            b_ds *= slope(b_t, KIND) * tl.exp2(b_e)[None, :]
        b_db += tl.sum(b_ds, 1)
        b_dw = landed(tl.dot(operand(b_ds, DTYPE, PRECISION), b_x.to(DTYPE), b_dw, input_precision=PRECISION))
    p = (i_bh * splits + i_s) * F + o_f
    m = (o_f < F)[:, None] & (o_d < D)[None, :]
    tl.store(domega + p[:, None] * D + o_d[None, :], b_dw * scale, mask=m)
    tl.store(dbias + p, b_db, mask=o_f < F)


# Causal --------------------------------------------------------------------------------------------------------------


@triton.jit
def _causal_dq_kernel(
    dout, q, k, v, omega, bias, mask, kv, z, c, kv0, z0, c0, dq, lse, delta, dens, domega, dbias, flags,
    scale, exponent, eps, heads, groups, L, M, F, parts, span,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, NORMALIZE: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr,
    OMEGA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a span, chunk by chunk, and of every row its log-sum (or 1 / den) and delta."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    pid = tl.program_id(0)
    i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_k = i_h // groups
    i_state = i_b * (heads // groups) + i_k
    p_q, p_dout, p_dq = q + i_b * q_b + i_h * q_h, dout + i_b * dout_b + i_h * dout_h, dq + i_bh * L * D
    p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
    o_f, o_l, o_d = tl.arange(0, BF), tl.arange(0, BL), tl.arange(0, BD)
    b_omega = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
    b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
    b_kv, b_z, b_c = state_before(
        kv, z, c, kv0, z0, c0, i_state, i_state * parts + i_s, o_f, F, V, BF, BV, KIND, PARTS, START
    )
    b_dw = tl.zeros((BF, BD), tl.float32)
    b_db = tl.zeros((BF,), tl.float32)
    vanished = tl.zeros((BL,), tl.int32)
    end = tl.minimum(L, (i_s + 1) * span)
    for i in steps(i_s * span, end, BL):
        m_row = i + o_l < end
        m_l, b_k, b_v = load_keys(p_k, p_v, mask + i_b * L, i, k_l, v_l, end, D, V, BL, BD, BV, MASK, DTYPE)
        b_q = load_rows(p_q, i, q_l, end, D, BL, BD)
        b_dout = load_rows(p_dout, i, dout_l, end, V, BL, BV).to(DTYPE)
        b_pk = project_t(b_omega, b_k, PRECISION)
        b_pk, b_n, b_old = chunk_keys(b_pk, b_k, m_l, b_c, b_bias, scale, exponent, eps, NORM, WIDE, KIND)
        b_sum = tl.sum(b_pk, 1)
        b_pk_t = operand(b_pk, DTYPE, PRECISION)
        b_kv *= b_old[:, None]
        b_z *= b_old
        b_s = operand(b_kv, DTYPE, PRECISION)
        b_kv = tl.dot(b_pk_t, b_v, b_kv, input_precision=PRECISION)
        b_pq = project(b_q, b_omega, PRECISION)
        if KIND == EXP:
            b_pq, b_r = query_weights(b_pq, b_n, b_bias, exponent, WIDE)
        else:
            b_slope = slope(b_pq * scale, KIND)
            b_pq = tl.where((o_f < F)[None, :], nonlinear(b_pq * scale, eps, KIND), 0.0)
            b_r = tl.zeros((BL,), tl.float32)
        b_pq_t = operand(b_pq, DTYPE, PRECISION)
        b_den = times_columns(b_pq_t, b_z, WIDE)
        pair = o_l[:, None] >= o_l[None, :]
        if NORMALIZE:
            b_a = tl.where(pair, tl.dot(b_pq_t, b_pk_t, input_precision=PRECISION), 0.0)
            b_den += tl.sum(b_a, 1)
        b_da = tl.where(pair, tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION), 0.0)
        b_ds = tl.dot(b_dout, tl.trans(b_s), input_precision=PRECISION)
        if NORMALIZE:
            # Rows whose sums vanish here, see the forward, are done token by token.
            there = b_den >= VANISHED if KIND == EXP else b_den != 0.0
            b_g = tl.where(there, 1.0 / tl.where(there, b_den, 1.0), 0.0)
            b_delta = (tl.sum(b_a * b_da, 1) + tl.sum(b_pq_t.to(tl.float32) * b_ds, 1)) * b_g
            b_ds = add_outer(b_ds, -b_delta, b_z, WIDE)
            b_da = tl.where(pair, b_da - b_delta[:, None], 0.0)
            b_row = tl.where(there, b_r + tl.log2(tl.where(there, b_den, 1.0)), EMPTY) if KIND == EXP else b_g
            vanished = tl.maximum(vanished, tl.where(m_row & (b_den < VANISHED), 1, 0))
        else:
            b_delta = tl.zeros((BL,), tl.float32)
            b_row = tl.full((BL,), 0.0 if KIND == EXP else 1.0, tl.float32)
            b_g = tl.full((BL,), 1.0, tl.float32)
            if KIND == EXP:
                b_g = tl.exp2(b_r - half_norm(b_q, scale) if NORM else b_r)
        b_ds = tl.dot(operand(b_da, DTYPE, PRECISION), tl.trans(b_pk_t), b_ds, input_precision=PRECISION)
        b_ds *= (b_pq_t.to(tl.float32) if KIND == EXP else b_slope) * b_g[:, None]
        b_dq = tl.dot(operand(b_ds, DTYPE, PRECISION), b_omega.to(DTYPE), input_precision=PRECISION) * scale
        if NORM and not NORMALIZE:
            b_dq -= b_q.to(tl.float32) * (tl.sum(b_ds, 1) * scale * scale)[:, None]
        store_rows(p_dq, b_dq, i, D, end, D, BL, BD)
        tl.store(lse + i_bh * L + i + o_l, b_row, mask=m_row)
        tl.store(delta + i_bh * L + i + o_l, b_delta, mask=m_row)
        if WIDE and KIND == EXP and NORMALIZE:
            tl.store(dens + i_bh * L + i + o_l, tl.where(there, b_den, 1.0), mask=m_row)
        if OMEGA:
            b_dw = tl.dot(tl.trans(operand(b_ds, DTYPE, PRECISION)), b_q.to(DTYPE), b_dw, input_precision=PRECISION)
            b_dw = landed(b_dw)
            b_db += tl.sum(b_ds, 0)
        b_kv = landed(b_kv)
        b_z += b_sum
        b_c = b_n
    if KIND == EXP:
        tl.store(flags + pid, tl.max(vanished, 0))
    if OMEGA:
        p = pid.to(tl.int64) * F + o_f
        m = (o_f < F)[:, None] & (o_d < D)[None, :]
        tl.store(domega + p[:, None] * D + o_d[None, :], b_dw * scale, mask=m)
        tl.store(dbias + p, b_db, mask=o_f < F)


@triton.jit
def _tokens_dq_kernel(
    dout, q, k, v, omega, bias, mask, kv, z, c, kv0, z0, c0, dq, lse, delta, dens, domega, dbias, flags,
    scale, exponent, heads, groups, L, M, F, parts, span,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr, BIASED: tl.constexpr, MASK: tl.constexpr,
    PARTS: tl.constexpr, START: tl.constexpr, OMEGA: tl.constexpr,
):  # fmt: skip
    """What `_causal_dq_kernel` left out: the rows of a flagged span whose sums vanished, token by token."""
    pid = tl.program_id(0)
    if tl.load(flags + pid) != 0:
        i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
        i_b, i_h = i_bh // heads, i_bh % heads
        i_k = i_h // groups
        p_q, p_dout, p_dq = q + i_b * q_b + i_h * q_h, dout + i_b * dout_b + i_h * dout_h, dq + i_bh * L * D
        p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
        o_f, o_d, o_v = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, BV)
        b_w = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY)
        i_state = i_b * (heads // groups) + i_k
        b_kv, b_z, b_c = state_before(
            kv, z, c, kv0, z0, c0, i_state, i_state * parts + i_s, o_f, F, V, BF, BV, EXP, PARTS, START
        )
        b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
        b_dw = tl.zeros((BF, BD), tl.float32)
        b_db = tl.zeros((BF,), tl.float32)
        for i in steps(i_s * span, tl.minimum(L, (i_s + 1) * span), 1):
            row = tl.cast(i, tl.int64)
            b_kv, b_z, b_c = add_token(
                b_kv, b_z, b_c, b_w, b_bias, p_k + row * k_l, p_v + row * v_l, mask + i_b * L + row,
                o_d, o_v, scale, exponent, D, V, NORM, MASK,
            )  # fmt: skip
            b_q = tl.load(p_q + row * q_l + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_dout = tl.load(p_dout + row * dout_l + o_v, mask=o_v < V, other=0.0).to(tl.float32)
            b_e = tl.sum(b_w * b_q[None, :], 1) * exponent + b_bias + b_c
            top = tl.max(b_e, 0)
            b_e = tl.exp2(b_e - top)
            den = tl.sum(b_e * b_z, 0)
            p_row = i_bh * L + row
            if (den > 0.0) & (tl.load(lse + p_row) <= EMPTY):
                b_ds = tl.sum(b_kv * b_dout[None, :], 1)
                mean = tl.sum(b_e * b_ds, 0) / den
                b_ds = (b_ds - mean * b_z) * b_e / den
                b_dq = tl.sum(b_ds[:, None] * b_w, 0) * scale
                tl.store(p_dq + row * D + o_d, b_dq.to(dq.dtype.element_ty), mask=o_d < D)
                tl.store(lse + p_row, top + tl.log2(den))
                tl.store(dens + p_row, den * tl.exp2(top - tl.ceil(top)))
                tl.store(delta + p_row, mean)
                b_dw += b_ds[:, None] * b_q[None, :]
                b_db += b_ds
        if OMEGA:
            p = pid.to(tl.int64) * F + o_f
            m = (o_f < F)[:, None] & (o_d < D)[None, :]
            p_w = domega + p[:, None] * D + o_d[None, :]
            tl.store(p_w, tl.load(p_w, mask=m) + b_dw * scale, mask=m)
            tl.store(dbias + p, tl.load(dbias + p, mask=o_f < F) + b_db, mask=o_f < F)


@triton.jit
def _causal_dk_kernel(
    dout, q, k, v, omega, bias, mask, lse, delta, dens, kv, z, c, kv0, z0, c0, dk, dv, kv1, z1, c1,
    domega, dbias, flags,
    scale, exponent, eps, heads, groups, L, M, F, parts, span,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, NORMALIZE: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr,
    OMEGA: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a span, from the last chunk to the first, and the gradient of the state before it."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    # Weights relative to an integer, divided afterwards: a row's lse would be rounded to what |lse| has left.
    SPLIT: tl.constexpr = WIDE and KIND == EXP and NORMALIZE
    pid = tl.program_id(0)
    i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_k = i_h // groups
    i_state = i_b * (heads // groups) + i_k
    p_q, p_dout = q + i_b * q_b + i_h * q_h, dout + i_b * dout_b + i_h * dout_h
    p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
    o_f, o_l, o_d = tl.arange(0, BF), tl.arange(0, BL), tl.arange(0, BD)
    b_omega = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
    b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
    b_kv = tl.zeros((BF, BV), tl.float32)
    b_z = tl.zeros((BF,), tl.float32)
    b_c = tl.full((BF,), EMPTY if KIND == EXP else 0.0, tl.float32)
    if PARTS:
        b_kv, b_z, b_c = load_state(kv, z, c, i_bh * parts + i_s, o_f, F, 1.0, V, BV)
    elif START:
        if i_h % groups == 0:
            b_kv, b_z, b_c = load_state(kv0, z0, c0, i_state, o_f, F, LOG2E, V, BV)
    b_dw = tl.zeros((BF, BD), tl.float32)
    b_db = tl.zeros((BF,), tl.float32)
    spread = tl.zeros((BF,), tl.float32)
    begin, end = i_s * span, tl.minimum(L, (i_s + 1) * span)
    chunks = tl.cdiv(end - begin, BL)
    for n in steps(0, chunks, 1):
        i = begin + (chunks - 1 - n) * BL
        m_row = i + o_l < end
        m_l, b_k, b_v = load_keys(p_k, p_v, mask + i_b * L, i, k_l, v_l, end, D, V, BL, BD, BV, MASK, DTYPE)
        b_q = load_rows(p_q, i, q_l, end, D, BL, BD)
        b_dout = load_rows(p_dout, i, dout_l, end, V, BL, BV).to(DTYPE)
        b_row = tl.load(lse + i_bh * L + i + o_l, mask=m_row, other=0.0)
        b_delta = tl.load(delta + i_bh * L + i + o_l, mask=m_row, other=0.0)
        if SPLIT:
            b_den = tl.load(dens + i_bh * L + i + o_l, mask=m_row, other=1.0)
        b_pq = project_t(b_omega, b_q, PRECISION)
        if KIND == EXP:
            m_row &= b_row > EMPTY
            b_e = -b_row
            if SPLIT:
                b_e = -tl.floor(b_row - tl.log2(b_den) + 0.5)
            if NORM and not NORMALIZE:
                b_e -= half_norm(b_q, scale)
            b_e = tl.where(m_row, b_e, MASKED)
            b_x = b_pq * exponent
            b_add = b_bias
            if WIDE:
                b_x += b_bias[:, None]
                b_add = tl.zeros((BF,), tl.float32)
            b_pq = b_x + b_e[None, :]
            b_n = tl.maximum(b_c, tl.ceil(tl.max(b_pq, 1) + b_add))
            # What a key's own queries are at least, relative to those of earlier rows that it does not see.
            b_least = tl.min(tl.where(m_row[None, :], b_pq, -EMPTY), 1) + b_add
            spread = tl.maximum(spread, tl.where(o_f < F, b_n - tl.maximum(b_c, b_least), 0.0))
            if SPLIT:
                b_pq = tl.exp2(b_x + (b_e[None, :] - b_n[:, None]))
            else:
                b_pq = tl.exp2(b_pq + (b_add - b_n)[:, None])
            b_old = tl.exp2(b_c - b_n)
        else:
            b_pq = nonlinear(b_pq * scale, eps, KIND) * tl.where(m_row, b_row, 0.0)[None, :]
            b_pq = tl.where((o_f < F)[:, None], b_pq, 0.0)
            b_old = tl.full((BF,), 1.0, tl.float32)
            b_n = b_c
        b_g, b_g_delta = b_dout, b_delta
        if SPLIT:
            b_g = operand(tl.div_rn(b_dout, tl.broadcast_to(b_den[:, None], b_dout.shape)), DTYPE, PRECISION)
            b_g_delta = tl.div_rn(b_delta, b_den)
        b_sum = tl.sum(b_pq * b_g_delta[None, :], 1)
        b_pq_t = operand(b_pq, DTYPE, PRECISION)
        b_kv *= b_old[:, None]
        b_z *= b_old
        b_s = operand(b_kv, DTYPE, PRECISION)
        b_kv = tl.dot(b_pq_t, b_g, b_kv, input_precision=PRECISION)
        b_pk = project(b_k, b_omega, PRECISION)
        if KIND == EXP:
            b_e = half_norm(b_k, scale) * -1.0 if NORM else tl.zeros((BL,), tl.float32)
            b_e = tl.where(m_l, b_e, MASKED)
            # Above 0 only for queries of earlier rows, which do not see the key.
            if WIDE:
                b_pk = b_pk * exponent + b_bias[None, :] + b_e[:, None] + b_n[None, :]
            else:
                b_pk = add_columns(b_pk, (b_n + b_bias) / exponent, WIDE) * exponent + b_e[:, None]
            b_pk = tl.exp2(tl.minimum(b_pk, 100.0))
        else:
            m_k = tl.where(m_l, 1.0, 0.0)[:, None]
            b_slope = slope(b_pk * scale, KIND) * m_k
            b_pk = nonlinear(b_pk * scale, eps, KIND) * m_k
        b_pk_t = operand(b_pk, DTYPE, PRECISION)
        pair = o_l[:, None] <= o_l[None, :]
        b_a = tl.where(pair, tl.dot(b_pk_t, b_pq_t, input_precision=PRECISION), 0.0)
        if SPLIT:
            b_a = tl.div_rn(b_a, tl.broadcast_to(b_den[None, :], b_a.shape))
        b_dv = tl.dot(b_pk_t, b_s, input_precision=PRECISION)
        b_dv = tl.dot(operand(b_a, DTYPE, PRECISION), b_dout, b_dv, input_precision=PRECISION)
        store_rows(dv + i_bh * L * V, b_dv, i, V, end, V, BL, BV)
        b_da = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION) - b_delta[None, :]
        if SPLIT:
            b_da = tl.div_rn(b_da, tl.broadcast_to(b_den[None, :], b_da.shape))
        b_da = tl.where(pair, b_da, 0.0)
        b_ds = add_columns(tl.dot(b_v, tl.trans(b_s), input_precision=PRECISION), b_z, WIDE)
        b_ds = tl.dot(operand(b_da, DTYPE, PRECISION), tl.trans(b_pq_t), b_ds, input_precision=PRECISION)
        b_ds *= b_pk_t.to(tl.float32) if KIND == EXP else b_slope
        b_dk = tl.dot(operand(b_ds, DTYPE, PRECISION), b_omega.to(DTYPE), input_precision=PRECISION) * scale
        if NORM:
            b_dk -= b_k.to(tl.float32) * (tl.sum(b_ds, 1) * scale * scale)[:, None]
        store_rows(dk + i_bh * L * D, b_dk, i, D, end, D, BL, BD)
        if OMEGA:
            b_dw = tl.dot(tl.trans(operand(b_ds, DTYPE, PRECISION)), b_k.to(DTYPE), b_dw, input_precision=PRECISION)
            b_dw = landed(b_dw)
            b_db += tl.sum(b_ds, 0)
        b_kv = landed(b_kv)
        b_z -= b_sum
        b_c = b_n
    if KIND == EXP:
        tl.store(flags + pid, tl.where(tl.max(spread, 0) > SPREAD, 1, 0))
    if i_s == 0:
        store_state(kv1, z1, c1, b_kv, b_z, b_c, i_bh, o_f, F, 1.0 / LOG2E, V, BV)
    if OMEGA:
        p = pid.to(tl.int64) * F + o_f
        m = (o_f < F)[:, None] & (o_d < D)[None, :]
        tl.store(domega + p[:, None] * D + o_d[None, :], b_dw * scale, mask=m)
        tl.store(dbias + p, b_db, mask=o_f < F)


@triton.jit
def _tokens_dk_kernel(
    dout, q, k, v, omega, bias, mask, lse, delta, dens, kv, z, c, kv0, z0, c0, dk, dv, domega, dbias, flags,
    scale, exponent, heads, groups, L, M, F, parts, span,
    dout_b, dout_h, dout_l, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr, BIASED: tl.constexpr, MASK: tl.constexpr,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr, OMEGA: tl.constexpr,
):  # fmt: skip
    """dk and dv of a flagged span anew, token by token from the last: exact whatever the queries, and slow."""
    pid = tl.program_id(0)
    if tl.load(flags + pid) != 0:
        i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
        i_b, i_h = i_bh // heads, i_bh % heads
        i_k = i_h // groups
        p_q, p_dout = q + i_b * q_b + i_h * q_h, dout + i_b * dout_b + i_h * dout_h
        p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
        o_f, o_d, o_v = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, BV)
        m_d, m_v = o_d < D, o_v < V
        b_w = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY)
        i_state = i_b * (heads // groups) + i_k
        b_kv, b_z, b_c = state_before(
            kv, z, c, kv0, z0, c0, i_state, i_bh * parts + i_s, o_f, F, V, BF, BV, EXP, PARTS, START
        )
        if START and not PARTS:
            if i_h % groups != 0:
                b_kv, b_z, b_c = b_kv * 0.0, b_z * 0.0, tl.full((BF,), EMPTY, tl.float32)
        b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
        half = 0.5 * LOG2E * scale * scale
        b_dw = tl.zeros((BF, BD), tl.float32)
        b_db = tl.zeros((BF,), tl.float32)
        begin, end = i_s * span, tl.minimum(L, (i_s + 1) * span)
        for n in steps(0, end - begin, 1):
            row = tl.cast(end - 1 - n, tl.int64)
            b_q = tl.load(p_q + row * q_l + o_d, mask=m_d, other=0.0).to(tl.float32)
            b_dout = tl.load(p_dout + row * dout_l + o_v, mask=m_v, other=0.0).to(tl.float32)
            b_row = tl.load(lse + i_bh * L + row)
            b_e = tl.sum(b_w * b_q[None, :], 1) * exponent + b_bias - b_row
            if NORM and not NORMALIZE:
                b_e -= tl.sum(b_q * b_q, 0) * half
            b_e = tl.where(b_row > EMPTY, b_e, MASKED)
            b_n = tl.maximum(b_c, b_e)
            b_r = tl.exp2(b_c - b_n)
            b_e = tl.exp2(b_e - b_n)
            b_kv = b_kv * b_r[:, None] + b_e[:, None] * b_dout[None, :]
            b_z = b_z * b_r - b_e * tl.load(delta + i_bh * L + row)
            b_c = b_n
            m_k, m_u = m_d, m_v
            if MASK:
                taken = tl.load(mask + i_b * L + row) != 0
                m_k &= taken
                m_u &= taken
            b_k = tl.load(p_k + row * k_l + o_d, mask=m_k, other=0.0).to(tl.float32)
            b_v = tl.load(p_v + row * v_l + o_v, mask=m_u, other=0.0).to(tl.float32)
            b_e = tl.sum(b_w * b_k[None, :], 1) * exponent + b_bias + b_c
            if NORM:
                b_e -= tl.sum(b_k * b_k, 0) * half
            if MASK:
                b_e = tl.where(taken, b_e, MASKED)
            b_e = tl.exp2(b_e)
            b_ds = (tl.sum(b_kv * b_v[None, :], 1) + b_z) * b_e
            b_dk = tl.sum(b_ds[:, None] * b_w, 0) * scale
            if NORM:
                b_dk -= b_k * tl.sum(b_ds, 0) * scale * scale
            b_dv = tl.sum(b_e[:, None] * b_kv, 0)
            tl.store(dk + (i_bh * L + row) * D + o_d, b_dk.to(dk.dtype.element_ty), mask=m_d)
            tl.store(dv + (i_bh * L + row) * V + o_v, b_dv.to(dv.dtype.element_ty), mask=m_v)
            b_dw += b_ds[:, None] * b_k[None, :]
            b_db += b_ds
        if OMEGA:
            p = pid.to(tl.int64) * F + o_f
            m = (o_f < F)[:, None] & m_d[None, :]
            tl.store(domega + p[:, None] * D + o_d[None, :], b_dw * scale, mask=m)
            tl.store(dbias + p, b_db, mask=o_f < F)


# Launches ------------------------------------------------------------------------------------------------------------

Gradients = tuple[Tensor, Tensor, Tensor, State, list[Tensor], list[Tensor]]


def linear_attention_bwd(
    dout: Tensor,  # (B, H, L, V)
    dkv: Tensor | None,  # (B, Hk, F, V)
    dz: Tensor | None,  # (B, Hk, F)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    causal: bool,
    scale: float,
    bias: Tensor | None,  # (M,) or (Hk, M)
    eps: float,
    normalize: bool,
    mask: Tensor | None,  # (B, S)
    cu_seqlens: Tensor | None,  # (N + 1,)
    kv: Tensor | None,  # (B, Hk, F, V)
    z: Tensor | None,  # (B, Hk, F)
    log_scale: Tensor | None,  # (B, Hk, F)
    last_kv: Tensor,  # (B, Hk, F, V)
    last_z: Tensor,  # (B, Hk, F)
    last_log_scale: Tensor,  # (B, Hk, F)
    need_omega: bool,
    short: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, omega, bias, kv and z; those of the last four are empty where not there or needed. If
    ``short``, the forward has kept no state."""
    if in_float32(q, v, omega, kind, causal):
        omega = omega if omega is None else omega.float()
        dq, dk, dv, *others = linear_attention_bwd(
            dout.float(), dkv, dz, q.float(), k.float(), v.float(), omega, kind, causal, scale, bias, eps, normalize,
            mask, cu_seqlens, kv, z, log_scale, last_kv, last_z, last_log_scale, need_omega, short,
        )  # fmt: skip
        return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), others[0], others[1], others[2], others[3]
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    p = plan(q, k, v, omega, kind, scale, bias, eps, normalize, mask)
    need_omega = need_omega and omega is not None
    empty = q.new_empty(0)
    if short:
        dq, dk, dv, *parts = short_gradients(p, dout, q, k, v, need_omega)
        domega, dbias = sums(p, [[x] for x in parts], omega) if need_omega else (empty, empty)
        return dq, dk, dv, domega, dbias, empty, empty
    last = last_kv, last_z, last_log_scale
    late = None
    if dkv is not None or dz is not None:
        # The gradient of the true state, which kv and z are relative to exp(log_scale); that of a feature which no
        # key has reached stays zero.
        there = (last_log_scale > EMPTY.value / 2).to(last_kv.dtype)
        c = torch.zeros_like(last_z) if p.kind == TRIG.value else -last_log_scale * there
        late = state(
            torch.zeros_like(last_kv) if dkv is None else dkv * there.unsqueeze(-1),
            torch.zeros_like(last_z) if dz is None else dz * there,
            c,
        )
    start = state(kv, z, log_scale)
    with on_device(q):
        grads = (causal_gradients if causal else bidirectional_gradients)(
            p, dout, q, k, v, start, last, late, need_omega
        )
    dq, dk, dv, dstate, domegas, dbiases = grads
    domega = dbias = dkv0 = dz0 = empty
    if need_omega:
        domega, dbias = sums(p, [domegas, dbiases], omega)
    if start is not None:
        # Of every query head when causal, of every key head when not.
        dkv0, dz0, c = (x.view(p.B, p.Hk, -1, *x.shape[1:]) for x in dstate)
        if p.kind == TRIG.value:
            c = c - last_log_scale.unsqueeze(2)
        factor = (c + start[2].unsqueeze(2)).exp()
        dkv0, dz0 = (dkv0 * factor.unsqueeze(-1)).sum(2), (dz0 * factor).sum(2)
    return dq, dk, dv, domega, dbias, dkv0, dz0


def bidirectional_gradients(
    p: Plan,
    dout: Tensor,  # (B, H, L, V)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    start: State | None,
    last: State,
    late: State | None,
    need_omega: bool,
) -> Gradients:
    t = p.tiles()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    lse, delta = (q.new_empty((p.B, p.H, p.L), dtype=torch.float32) for _ in range(2))
    common = {"ONE": t.one, "DTYPE": p.dtype(), "num_warps": t.warps, "num_stages": t.stages}
    sizes = (p.D, p.V, t.features, t.rows, p.BD, p.BV)
    span, blocks = spans(p.L, t.rows, p.B * p.H)
    if blocks * p.B * p.H:
        _dq_kernel[(blocks * p.B * p.H,)](
            dout, q, p.omega, p.bias, *last, dq, lse, delta,
            p.scale, p.exponent, p.eps, p.H, p.H // p.Hk, p.L, p.M, p.F, blocks, span,
            *dout.stride()[:3], *q.stride()[:3], p.omega_h, p.bias_h, *sizes,
            **p.options("KIND NORM SIGNED IDENTITY BIASED NORMALIZE PRECISION"), **common,
        )  # fmt: skip
    parts, count = states(p, q, dout, sums=(lse, delta))
    dstate = scan(p, parts, count * (p.H // p.Hk), late)
    span, blocks = spans(p.S, t.rows, p.B * p.Hk)
    if blocks * p.B * p.Hk:
        _dk_kernel[(blocks * p.B * p.Hk,)](
            k, v, p.omega, p.bias, p.mask, *dstate, last[2], dk, dv,
            p.scale, p.exponent, p.eps, p.Hk, p.S, p.M, p.F, blocks, span,
            *k.stride()[:3], *v.stride()[:3], p.omega_h, p.bias_h, *sizes,
            **p.options("KIND NORM SIGNED IDENTITY BIASED MASK PRECISION"), **common,
        )  # fmt: skip
    domegas, dbiases = [], []
    if need_omega:
        for x, y, which, queries in ((q, dout, last, True), (k, v, dstate, False)):
            domega, dbias = omega_gradient(p, x, y, which, last[2], lse, delta, queries)
            domegas.append(domega)
            dbiases.append(dbias)
    return dq, dk, dv, dstate, domegas, dbiases


def omega_gradient(
    p: Plan,
    x: Tensor,  # (B, H or Hk, S, D)
    y: Tensor,  # (B, H or Hk, S, V)
    which: State,
    log_scale: Tensor,  # (B, Hk, F)
    lse: Tensor,  # (B, H, L)
    delta: Tensor,  # (B, H, L)
    queries: bool,
) -> tuple[Tensor, Tensor]:
    """Parts of domega (B, H, parts, F, D) and dbias (B, H, parts, F)."""
    B, H, S, _ = x.shape
    t = p.tiles(state=True)
    tiles = triton.cdiv(p.F, t.features)
    span, count = spans(S, t.rows, B * H * tiles)
    domega, dbias = (x.new_empty((B, H, count, p.F, *n), dtype=torch.float32) for n in ((p.D,), ()))
    if count * B * H:
        _domega_kernel[(tiles * count * B * H,)](
            x, y, p.omega, p.bias, p.mask, *which, log_scale, lse, delta, domega, dbias,
            p.scale, p.exponent, p.eps, H, H // p.Hk, S, p.M, p.F, count, span,
            *x.stride()[:3], *y.stride()[:3], p.omega_h, p.bias_h,
            p.D, p.V, t.features, t.rows, p.BD, p.BV,
            **p.options("KIND SIGNED IDENTITY BIASED PRECISION"),
            NORM=p.flags["NORM"] and not (queries and p.flags["NORMALIZE"]),
            MASK=p.flags["MASK"] and not queries, QUERIES=queries, DTYPE=p.dtype(),
            num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return domega, dbias


def causal_gradients(
    p: Plan,
    dout: Tensor,  # (B, H, L, V)
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    v: Tensor,  # (B, Hk, L, V)
    start: State | None,
    last: State,
    late: State | None,
    need_omega: bool,
) -> Gradients:
    t = p.tiles(causal=True, backward=True)
    groups = p.H // p.Hk
    span, count = causal_spans(p, t)
    wide = q.dtype if groups == 1 else torch.float32  # of a group's heads, added afterwards
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (q.new_empty((p.B, p.H, p.L, n), dtype=wide) for n in (p.D, p.V))
    lse, delta = (q.new_empty((p.B, p.H, p.L), dtype=torch.float32) for _ in range(2))
    dens = torch.empty_like(lse)  # lse is an integer and the logarithm of this
    dstate = new_state(q, p, p.B * p.H)
    parts_of = (p.B, p.H, count if need_omega else 0, p.F)
    outs = [[q.new_empty((*parts_of, *n), dtype=torch.float32) for n in ((p.D,), ())] for _ in range(2)]
    if count * p.B * p.H:
        common = p.options("KIND NORM SIGNED IDENTITY BIASED MASK NORMALIZE PRECISION") | {
            "PARTS": count > 1, "OMEGA": need_omega, "DTYPE": p.dtype(), "num_warps": t.warps, "num_stages": t.stages
        }  # fmt: skip
        numbers = (
            p.scale, p.exponent, p.eps, p.H, groups, p.L, p.M, p.F, count, span,
            *dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], p.omega_h, p.bias_h,
            p.D, p.V, t.features, t.rows, p.BD, p.BV,
        )  # fmt: skip
        parts = last
        if count > 1:
            parts, _ = states(p, k, v, span)
            scan(p, parts, count, start, prefix=True)
        grid = (count * p.B * p.H,)
        flags = torch.empty(grid, dtype=torch.int32, device=q.device)
        tensors = (
            dout, q, k, v, p.omega, p.bias, p.mask, *parts, *(start or last), dq, lse, delta, dens, *outs[0],
            flags,
        )  # fmt: skip
        _causal_dq_kernel[grid](*tensors, *numbers, START=start is not None, **common)
        tokens = p.options("NORM SIGNED IDENTITY BIASED MASK") | {"PARTS": count > 1, "OMEGA": need_omega}
        if p.is_exp and p.flags["NORMALIZE"]:
            _tokens_dq_kernel[grid](
                *tensors, p.scale, p.exponent, *numbers[3:-6], p.D, p.V, t.features, p.BD, p.BV,
                START=start is not None, **tokens, num_warps=8,
            )  # fmt: skip
        if count > 1:
            parts, _ = states(p, q, dout, span, (lse, delta))
            scan(p, parts, count, late, prefix=True, backward=True)
        tensors = dout, q, k, v, p.omega, p.bias, p.mask, lse, delta, dens, *parts, *(late or last), dk, dv
        _causal_dk_kernel[grid](
            *tensors, *dstate, *outs[1], flags, *numbers, START=late is not None, **common,
        )  # fmt: skip
        if p.is_exp:
            _tokens_dk_kernel[grid](
                *tensors, *outs[1], flags, p.scale, p.exponent, *numbers[3:-6], p.D, p.V, t.features, p.BD, p.BV,
                START=late is not None, **tokens, NORMALIZE=p.flags["NORMALIZE"], num_warps=8,
            )  # fmt: skip
    if p.L == 0 and start is not None:  # what the state behind no token gets, that before it gets
        kv, z, c = late or (torch.zeros_like(start[0]), torch.zeros_like(start[1]), -start[2])
        dstate = kv.flatten(0, 1), z.flatten(0, 1), c.flatten(0, 1)
    if groups > 1:
        dk, dv = (p.add_groups(x) for x in (dk, dv))
    return dq, dk, dv, dstate, [x[0] for x in outs], [x[1] for x in outs]


def sums(p: Plan, parts: list[list[Tensor]], omega: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of omega and of its bias, which features in pairs have none of."""
    domega, dbias = (sum_heads(p, x, omega is not None and omega.dim() == 3) for x in parts)
    if p.F == p.M:
        return domega, dbias
    one, other = domega.split(p.M, -2)
    return one - other if p.flags["SIGNED"] else one + other, domega.new_empty(0)


def sum_heads(
    p: Plan,
    parts: list[Tensor],  # (B, H or Hk, parts, F, ...)
    per_head: bool,
) -> Tensor:
    """The sum over everything, or over what shares a key head's projection."""
    if per_head:
        total = [x.unflatten(1, (p.Hk, -1)).sum((0, 2, 3)) for x in parts]
    else:
        total = [x.sum((0, 1, 2)) for x in parts]
    y: Tensor = functools.reduce(torch.add, total)
    return y
