"""Linear attention, forward: states of keys, their sums, and the rows of queries."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .short import short_attention
from .tiles import (
    EMPTY,
    EXP,
    LOG2E,
    MASKED,
    TRIG,
    VANISHED,
    Plan,
    State,
    Tiles,
    add_exponents,
    add_states,
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
    pad,
    phase,
    plan,
    project,
    project_t,
    query_state,
    query_weights,
    rows,
    state_before,
    steps,
    store_rows,
    store_state,
    times_columns,
)

SPLITS = 8  # parts of a state that every program of queries adds up; more are added up by a kernel of their own
MULTIPROCESSORS = 132


# States --------------------------------------------------------------------------------------------------------------


@triton.jit
def _state_kernel(
    x, y, omega, bias, mask, lse, delta, kv, z, c,
    scale, exponent, factor, eps, heads, groups, S, M, F, splits, span,
    x_b, x_h, x_l, y_b, y_h, y_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, QUERIES: tl.constexpr, SHIFT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j phi(x_j) y_j^T of a span of rows, relative to exp2(c).

    Of keys, y are values; of queries in the backward, with their row's log-sum taken off, y are gradients.
    """
    tiles = tl.cdiv(F, BF)
    pid = tl.program_id(0)
    i_f, i_s, i_bh = pid % tiles, pid // tiles % splits, (pid // tiles // splits).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    o_f, o_s = i_f * BF + tl.arange(0, BF), tl.arange(0, BS)
    b_omega = load_omega(omega + (i_h // groups) * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY).to(x.dtype.element_ty)
    p_x, p_y = x + i_b * x_b + i_h * x_h, y + i_b * y_b + i_h * y_h
    b_kv = tl.zeros((BF, BV), tl.float32)
    b_z = tl.zeros((BF,), tl.float32)
    b_c = tl.full((BF,), EMPTY if KIND == EXP or KIND == TRIG else 0.0, tl.float32)
    end = tl.minimum(S, (i_s + 1) * span)
    for i in steps(i_s * span, end, BS):
        m_s, b_x, b_y = load_keys(p_x, p_y, mask + i_b * S, i, x_l, y_l, end, D, V, BS, BD, BV, MASK, DTYPE)
        b_p = project_t(b_omega, b_x, PRECISION)
        if QUERIES:
            b_row = tl.load(lse + i_bh * S + i + o_s, mask=m_s, other=0.0)
            b_delta = tl.load(delta + i_bh * S + i + o_s, mask=m_s, other=0.0)
        if KIND == EXP:
            b_e = half_norm(b_x, scale) * -1.0 if NORM else tl.zeros((BS,), tl.float32)
            if QUERIES:
                m_s &= b_row > EMPTY
                b_e -= b_row
            b_e = tl.where(m_s, b_e, MASKED)
            b_p = b_p * exponent + b_e[None, :]
            b_n = tl.maximum(b_c, tl.max(b_p, 1) - SHIFT)
            b_p = tl.exp2(b_p - b_n[:, None])
            b_r = tl.exp2(b_c - b_n)
            b_kv *= b_r[:, None]
            b_z *= b_r
            b_c = b_n
        else:
            b_g = tl.where(m_s, 1.0, 0.0)
            b_t = b_p * scale
            if KIND == TRIG:
                b_t -= phase(o_f, M)[:, None]
            if QUERIES:
                b_g *= b_row
            elif KIND == TRIG:
                b_e = tl.where(m_s, half_norm(b_x, scale), MASKED)
                top = tl.max(b_e, 0)
                b_n = tl.maximum(b_c, top)
                b_r = tl.exp2(b_c - b_n)
                b_kv *= b_r[:, None]
                b_z *= b_r
                b_c = b_n
                b_t = tl.cos(b_t) * tl.exp2(b_e[None, :] - b_n[:, None])
            b_p = (b_t if KIND == TRIG and not QUERIES else nonlinear(b_t, eps, KIND)) * b_g[None, :]
        b_p_t = operand(b_p, DTYPE, PRECISION)
        if QUERIES:  # of the same weights as kv, which it is to cancel
            b_z -= tl.sum(b_p_t.to(tl.float32) * b_delta[None, :], 1)
        else:
            b_z += tl.sum(b_p, 1)
        b_kv = tl.dot(b_p_t, b_y, b_kv, input_precision=PRECISION)
    if QUERIES and KIND == TRIG:
        b_c = tl.zeros((BF,), tl.float32)
    if BIASED:
        b_c += tl.load(bias + (i_h // groups) * bias_h + o_f, mask=o_f < F, other=0.0) * LOG2E
    store_state(kv, z, c, b_kv, b_z, b_c, i_bh * splits + i_s, o_f, F, factor, V, BV)


@triton.jit
def _scan_kernel(
    kv, z, c, kv0, z0, c0, kv1, z1, c1,
    factor, unit, floor, parts, groups, F,
    V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
    START: tl.constexpr, PREFIX: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Adds a head's parts to an initial state; with PREFIX each part becomes the sum of what was before it.

    The first head of a group starts from the group's state. ``factor`` takes logarithms of states to base 2, ``unit``
    those of parts, and ``floor`` is the logarithm of a state of no keys.
    """
    i_f, i_bh = tl.program_id(1), tl.program_id(0).to(tl.int64)
    o_f = i_f * BF + tl.arange(0, BF)
    b_kv = tl.zeros((BF, BV), tl.float32)
    b_z = tl.zeros((BF,), tl.float32)
    b_c = tl.full((BF,), floor, tl.float32)
    if START:
        if i_bh % groups == 0:
            b_kv, b_z, b_c = load_state(kv0, z0, c0, i_bh // groups, o_f, F, factor, V, BV)
    for n in steps(parts):
        i = i_bh * parts + (parts - 1 - n if REVERSED else n)
        o_kv, o_z, o_c = load_state(kv, z, c, i, o_f, F, unit, V, BV)
        if PREFIX:
            tl.debug_barrier()  # all have read what is overwritten
            store_state(kv, z, c, b_kv, b_z, b_c, i, o_f, F, 1.0, V, BV)
        b_kv, b_z, b_c = add_states(b_kv, b_z, b_c, o_kv, o_z, o_c)
    store_state(kv1, z1, c1, b_kv, b_z, b_c, i_bh, o_f, F, 1.0 / factor, V, BV)


# Bidirectional rows --------------------------------------------------------------------------------------------------


@triton.jit
def _rows_kernel(
    q, omega, bias, kv, z, c, out, kv1, z1, c1,
    scale, exponent, factor, eps, heads, groups, L, M, F, parts, blocks, span,
    q_b, q_h, q_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, NORMALIZE: tl.constexpr, STORE: tl.constexpr, ONE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of the output from the parts of a head's state, whose sum its first program stores."""
    WIDE: tl.constexpr = DTYPE == tl.float32
    pid = tl.program_id(0)
    i_block, i_bh = pid % blocks, (pid // blocks).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_k = i_h // groups
    i_state = i_b * (heads // groups) + i_k
    p_q, p_out = q + i_b * q_b + i_h * q_h, out + i_bh * L * V
    p_w, p_bias = omega + i_k * omega_h, bias + i_k * bias_h
    end = tl.minimum(L, (i_block + 1) * span)
    if ONE:
        o_f = tl.arange(0, BF)
        b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
        b_kv, b_z, b_c = load_state(kv, z, c, i_state * parts, o_f, F, factor, V, BV)
        for n in steps(1, parts):
            o_kv, o_z, o_c = load_state(kv, z, c, i_state * parts + n, o_f, F, factor, V, BV)
            b_kv, b_z, b_c = add_states(b_kv, b_z, b_c, o_kv, o_z, o_c)
        if STORE:
            if i_block == 0 and i_h % groups == 0:
                store_state(kv1, z1, c1, b_kv, b_z, b_c, i_state, o_f, F, 1.0 / LOG2E, V, BV)
        b_u, b_z, b_c = query_state(b_kv, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
        b_u = operand(b_u, DTYPE, PRECISION)
    for i in steps(i_block * span, end, BL):
        b_q = load_rows(p_q, i, q_l, end, D, BL, BD)
        if ONE:
            b_p = project(b_q, b_omega, PRECISION)
            if KIND == EXP:
                b_p = add_exponents(b_p, b_c, exponent, WIDE)
                b_r = tl.max(b_p, 1)
                b_w = tl.exp2(b_p - b_r[:, None])
                b_den = tl.sum(b_w, 1)
            else:
                b_r = tl.zeros((BL,), tl.float32)
                b_t = b_p * scale
                if KIND == TRIG:
                    b_t -= phase(o_f, M)[None, :]
                    b_r += tl.max(b_c, 0)
                b_w = nonlinear(b_t, eps, KIND)
                b_den = tl.sum(b_w * b_z[None, :], 1)
            b_o = tl.dot(operand(b_w, DTYPE, PRECISION), b_u, input_precision=PRECISION)
        else:
            b_o = tl.zeros((BL, BV), tl.float32)
            b_den = tl.zeros((BL,), tl.float32)
            b_r = tl.full((BL,), EMPTY if KIND == EXP else 0.0, tl.float32)
            for f in steps(0, F, BF):
                o_f = f + tl.arange(0, BF)
                b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
                b_kv, b_z, b_c = load_state(kv, z, c, i_state, o_f, F, factor, V, BV)
                b_u, b_z, b_c = query_state(b_kv, b_z, b_c, p_bias, o_f, F, BIASED, KIND)
                b_p = project(b_q, b_omega, PRECISION)
                if KIND == EXP:
                    b_p = b_p * exponent + b_c[None, :]
                    b_n = tl.maximum(b_r, tl.max(b_p, 1))
                    b_w = tl.exp2(b_p - b_n[:, None])
                    b_s = tl.exp2(b_r - b_n)
                    b_o *= b_s[:, None]
                    b_den = b_den * b_s + tl.sum(b_w, 1)
                    b_r = b_n
                else:
                    b_t = b_p * scale
                    if KIND == TRIG:
                        b_t -= phase(o_f, M)[None, :]
                        b_r = tl.maximum(b_r * 0.0 + tl.max(b_c, 0), EMPTY)
                    b_w = nonlinear(b_t, eps, KIND)
                    b_den += tl.sum(b_w * b_z[None, :], 1)
                b_o = tl.dot(
                    operand(b_w, DTYPE, PRECISION), operand(b_u, DTYPE, PRECISION), b_o, input_precision=PRECISION
                )
        if NORMALIZE:
            b_o = b_o / tl.where(b_den == 0.0, float("inf"), b_den)[:, None]
        elif KIND == EXP:
            b_e = b_r - half_norm(b_q, scale) if NORM else b_r
            b_o *= tl.exp2(b_e)[:, None]
        elif KIND == TRIG:
            b_o *= tl.exp2(b_r + half_norm(b_q, scale))[:, None]
        store_rows(p_out, b_o, i, V, end, V, BL, BV)


# Causal rows ---------------------------------------------------------------------------------------------------------


@triton.jit
def _causal_kernel(
    q, k, v, omega, bias, mask, kv, z, c, kv0, z0, c0, out, kv1, z1, c1, flags,
    scale, exponent, eps, heads, groups, L, M, F, parts, span,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BL: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    KIND: tl.constexpr, NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr,
    BIASED: tl.constexpr, MASK: tl.constexpr, NORMALIZE: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of a span, chunk by chunk, from the state before it.

    A chunk's features are relative to c, the maximum over its own and all earlier keys, rounded up to an integer: a
    power of two, so that it rounds no result differently. In float32 an exponent is rounded once, before integers are
    taken off, and so is the same wherever it is computed. Where later keys of a chunk are larger than all that its
    earlier rows see, by 2^80 and more, these rows' sums vanish, and a flag asks for the span token by token.
    """
    WIDE: tl.constexpr = DTYPE == tl.float32
    pid = tl.program_id(0)
    i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
    i_b, i_h = i_bh // heads, i_bh % heads
    i_k = i_h // groups
    i_state = i_b * (heads // groups) + i_k
    p_q, p_out = q + i_b * q_b + i_h * q_h, out + i_bh * L * V
    p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
    o_f, o_l = tl.arange(0, BF), tl.arange(0, BL)
    p_w = omega + i_k * omega_h
    b_omega = load_omega(p_w, o_f, M, F, D, BD, SIGNED, IDENTITY).to(q.dtype.element_ty)
    b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
    b_kv, b_z, b_c = state_before(
        kv, z, c, kv0, z0, c0, i_state, i_state * parts + i_s, o_f, F, V, BF, BV, KIND, PARTS, START
    )
    vanished = tl.zeros((BL,), tl.int32)
    end = tl.minimum(L, (i_s + 1) * span)
    for i in steps(i_s * span, end, BL):
        m_l, b_k, b_v = load_keys(p_k, p_v, mask + i_b * L, i, k_l, v_l, end, D, V, BL, BD, BV, MASK, DTYPE)
        b_q = load_rows(p_q, i, q_l, end, D, BL, BD)
        # Keys, and the state with them, are done before queries, which registers could not hold as well.
        b_pk = project_t(b_omega, b_k, PRECISION)
        b_pk, b_n, b_old = chunk_keys(b_pk, b_k, m_l, b_c, b_bias, scale, exponent, eps, NORM, WIDE, KIND)
        b_sum = tl.sum(b_pk, 1)
        b_pk = operand(b_pk, DTYPE, PRECISION)
        b_kv *= b_old[:, None]
        b_z *= b_old
        b_s = operand(b_kv, DTYPE, PRECISION)
        b_kv = tl.dot(b_pk, b_v, b_kv, input_precision=PRECISION)
        b_pq = project(b_q, b_omega, PRECISION)
        if KIND == EXP:
            b_pq, b_r = query_weights(b_pq, b_n, b_bias, exponent, WIDE)
        else:
            b_pq = tl.where((o_f < F)[None, :], nonlinear(b_pq * scale, eps, KIND), 0.0)
            b_r = tl.zeros((BL,), tl.float32)
        b_pq = operand(b_pq, DTYPE, PRECISION)
        b_den = times_columns(b_pq, b_z, WIDE)
        b_a = tl.dot(b_pq, b_pk, input_precision=PRECISION)
        b_a = tl.where(o_l[:, None] >= o_l[None, :], b_a, 0.0)
        b_den += tl.sum(b_a, 1)
        b_o = tl.dot(b_pq, b_s, input_precision=PRECISION)
        b_norm = tl.where(b_den == 0.0, float("inf"), b_den)
        if WIDE and NORMALIZE:  # divided first: the weight of a row's one key is 1, and its value stays as it is
            b_o = tl.div_rn(b_o, tl.broadcast_to(b_norm[:, None], b_o.shape))
            b_a = tl.div_rn(b_a, tl.broadcast_to(b_norm[:, None], b_a.shape))
        b_o = tl.dot(operand(b_a, DTYPE, PRECISION), b_v, b_o, input_precision=PRECISION)
        if NORMALIZE and not WIDE:
            b_o = b_o / b_norm[:, None]
        elif not NORMALIZE and KIND == EXP:
            b_o *= tl.exp2(b_r - half_norm(b_q, scale) if NORM else b_r)[:, None]
        store_rows(p_out, b_o, i, V, end, V, BL, BV)
        b_kv = landed(b_kv)
        if KIND == EXP:
            vanished = tl.maximum(vanished, tl.where((i + o_l < end) & (b_den < VANISHED), 1, 0))
        b_z += b_sum
        b_c = b_n
    if KIND == EXP:
        tl.store(flags + pid, tl.max(vanished, 0))
    if i_s == parts - 1 and i_h % groups == 0:
        store_state(kv1, z1, c1, b_kv, b_z, b_c, i_state, o_f, F, 1.0 / LOG2E, V, BV)


@triton.jit
def _tokens_kernel(
    q, k, v, omega, bias, mask, kv, z, c, kv0, z0, c0, out, flags,
    scale, exponent, heads, groups, L, M, F, parts, span,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, omega_h, bias_h,
    D: tl.constexpr, V: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr, BIASED: tl.constexpr, MASK: tl.constexpr,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """Rows of a flagged span, token by token: exact whatever the keys, and slow."""
    pid = tl.program_id(0)
    if tl.load(flags + pid) != 0:
        i_s, i_bh = pid % parts, (pid // parts).to(tl.int64)
        i_b, i_h = i_bh // heads, i_bh % heads
        i_k = i_h // groups
        i_state = i_b * (heads // groups) + i_k
        p_q, p_out = q + i_b * q_b + i_h * q_h, out + i_bh * L * V
        p_k, p_v = k + i_b * k_b + i_k * k_h, v + i_b * v_b + i_k * v_h
        o_f, o_d, o_v = tl.arange(0, BF), tl.arange(0, BD), tl.arange(0, BV)
        b_w = load_omega(omega + i_k * omega_h, o_f, M, F, D, BD, SIGNED, IDENTITY)
        b_bias = feature_bias(bias + i_k * bias_h, o_f, F, BIASED)
        b_kv, b_z, b_c = state_before(
            kv, z, c, kv0, z0, c0, i_state, i_state * parts + i_s, o_f, F, V, BF, BV, EXP, PARTS, START
        )
        for i in steps(i_s * span, tl.minimum(L, (i_s + 1) * span), 1):
            row = tl.cast(i, tl.int64)
            b_kv, b_z, b_c = add_token(
                b_kv, b_z, b_c, b_w, b_bias, p_k + row * k_l, p_v + row * v_l, mask + i_b * L + row,
                o_d, o_v, scale, exponent, D, V, NORM, MASK,
            )  # fmt: skip
            b_q = tl.load(p_q + row * q_l + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            b_w_q = tl.sum(b_w * b_q[None, :], 1) * exponent + b_bias + b_c
            top = tl.max(b_w_q, 0)
            b_w_q = tl.exp2(b_w_q - top)
            b_o = tl.sum(b_w_q[:, None] * b_kv, 0)
            if NORMALIZE:
                den = tl.sum(b_w_q * b_z, 0)
                den = tl.where(den == 0.0, float("inf"), den)
                b_o = b_o / den
                # What the sum's roundings left, so that a row's one key gives its value; nothing of infinite values.
                b_rest = tl.sum(b_w_q[:, None] * (b_kv - b_z[:, None] * b_o[None, :]), 0) / den
                b_o += tl.where(b_rest == b_rest, b_rest, 0.0)
            else:
                b_o *= tl.exp2(top - tl.sum(b_q * b_q, 0) * (0.5 * LOG2E * scale * scale) if NORM else top)
            tl.store(p_out + row * V + o_v, b_o.to(out.dtype.element_ty), mask=o_v < V)


# Launches ------------------------------------------------------------------------------------------------------------


def linear_attention(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    causal: bool,
    scale: float,
    bias: Tensor | None,  # (M,) or (Hk, M): added to exponents
    eps: float,
    normalize: bool,
    mask: Tensor | None,  # (B, S)
    cu_seqlens: Tensor | None,  # (N + 1,)
    kv: Tensor | None,  # (B, Hk, F, V)
    z: Tensor | None,  # (B, Hk, F)
    log_scale: Tensor | None,  # (B, Hk, F)
    short: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and the state behind the last key: if ``short``, none, see short.py."""
    if in_float32(q, v, omega, kind, causal):
        omega = omega if omega is None else omega.float()
        out, *last = linear_attention(
            q.float(), k.float(), v.float(), omega, kind, causal, scale, bias, eps, normalize, mask, cu_seqlens,
            kv, z, log_scale, short,
        )  # fmt: skip
        return out.to(q.dtype), last[0], last[1], last[2]
    q, k, v = rows(q), rows(k), rows(v)
    p = plan(q, k, v, omega, kind, scale, bias, eps, normalize, mask)
    if short:
        kv, z, log_scale = (q.new_empty(0, dtype=torch.float32) for _ in range(3))
        return short_attention(p, q, k, v), kv, z, log_scale
    start = state(kv, z, log_scale)
    out = q.new_empty(p.B, p.H, p.L, p.V)
    with on_device(q):
        if causal:
            after = causal_rows(p, q, k, v, start, out)
        else:
            after = bidirectional_rows(p, q, k, v, start, out)
    kv, z, log_scale = (x.view(p.B, p.Hk, *x.shape[1:]) for x in after)
    return out, kv, z, log_scale


def bidirectional_rows(
    p: Plan,
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    start: State | None,
    out: Tensor,  # (B, H, L, V)
) -> State:
    t = p.tiles()
    parts, count = states(p, k, v, final=True)
    last, factor, store = parts, LOG2E.value, False
    if start is not None or not 0 < count <= SPLITS or not (t.one or count == 1):
        last = scan(p, parts, count, start, LOG2E.value if count == 1 else 1.0)
        parts, count = last, 1
    elif count > 1:
        last, factor, store = new_state(q, p, p.B * p.Hk), 1.0, True
    span, blocks = spans(p.L, t.rows, p.B * p.H)
    if p.L:
        _rows_kernel[(blocks * p.B * p.H,)](
            q, p.omega, p.bias, *parts, out, *last,
            p.scale, p.exponent, factor, p.eps, p.H, p.H // p.Hk, p.L, p.M, p.F, count, blocks, span,
            *q.stride()[:3], p.omega_h, p.bias_h,
            p.D, p.V, t.features, t.rows, p.BD, p.BV,
            **p.options("KIND NORM SIGNED IDENTITY BIASED NORMALIZE PRECISION"),
            STORE=store, ONE=t.one, DTYPE=p.dtype(bounded=True), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    elif store:
        last = scan(p, parts, count, None)
    return last


def causal_rows(
    p: Plan,
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, L, D)
    v: Tensor,  # (B, Hk, L, V)
    start: State | None,
    out: Tensor,  # (B, H, L, V)
) -> State:
    t = p.tiles(causal=True)
    span, count = causal_spans(p, t)
    last = new_state(q, p, p.B * p.Hk)
    if p.L == 0:
        return scan(p, last, 0, start)
    parts = start or last
    if count > 1:
        parts, count = states(p, k, v, span)
        scan(p, parts, count, start, prefix=True)
    grid = (count * p.B * p.H,)
    flags = torch.empty(grid, dtype=torch.int32, device=q.device)
    tensors = (q, k, v, p.omega, p.bias, p.mask, *parts, *(start or last), out)
    sizes = (p.H, p.H // p.Hk, p.L, p.M, p.F, count, span)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], p.omega_h, p.bias_h)
    common = p.options("NORM SIGNED IDENTITY BIASED MASK NORMALIZE") | {"PARTS": count > 1, "START": start is not None}
    _causal_kernel[grid](
        *tensors, *last, flags, p.scale, p.exponent, p.eps, *sizes, *strides,
        p.D, p.V, t.features, t.rows, p.BD, p.BV, **p.options("KIND PRECISION"), **common, DTYPE=p.dtype(),
        num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    if p.is_exp:
        _tokens_kernel[grid](
            *tensors, flags, p.scale, p.exponent, *sizes, *strides, p.D, p.V, t.features, p.BD, p.BV, **common,
            num_warps=8,
        )  # fmt: skip
    return last


def states(
    p: Plan,
    x: Tensor,  # (B, H or Hk, S, D)
    y: Tensor,  # (B, H or Hk, S, V)
    span: int | None = None,
    sums: tuple[Tensor, Tensor] | None = None,  # (B, H, S) each: log-sums and products with the output, of queries
    final: bool = False,
) -> tuple[State, int]:
    """Parts of states, (B H parts, F, ...), each of ``span`` rows, and how many a head has.

    Logarithms are to base 2, but to base e of a ``final`` state of one part.
    """
    B, H, S, _ = x.shape
    t = p.tiles(state=True)
    tiles = triton.cdiv(p.F, t.features)
    if span is None:
        span, count = spans(S, t.rows, B * H * tiles, 2)
    else:
        count = triton.cdiv(S, span)
    parts = new_state(x, p, B * H * count)
    if count * B * H:
        _state_kernel[(tiles * count * B * H,)](
            x, y, p.omega, p.bias, p.mask, *(sums or (parts[1], parts[1])), *parts,
            p.scale, p.exponent, 1.0 / LOG2E.value if final and count == 1 else 1.0, p.eps, H, H // p.Hk, S, p.M, p.F,
            count, span, *x.stride()[:3], *y.stride()[:3], p.omega_h, p.bias_h,
            p.D, p.V, t.features, t.rows, p.BD, p.BV,
            **p.options("KIND SIGNED IDENTITY BIASED PRECISION"),
            NORM=p.flags["NORM"] and not (sums and p.flags["NORMALIZE"]), MASK=p.flags["MASK"] and sums is None,
            QUERIES=sums is not None, DTYPE=p.dtype(bounded=sums is None),
            SHIFT=12.0 if p.dtype(bounded=sums is None) == tl.float16 else 0.0, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return parts, count


def scan(
    p: Plan,
    parts: State,
    count: int,
    start: State | None,
    unit: float = 1.0,
    prefix: bool = False,
    backward: bool = False,
) -> State:
    """The sum of every head's parts, logarithms to base e."""
    heads = parts[1].shape[0] // count if count else p.B * p.Hk
    total = new_state(parts[0], p, heads)
    if heads:
        BF = min(pad(p.F), 32)
        floor = EMPTY.value if p.kind in (EXP.value, TRIG.value) else 0.0
        _scan_kernel[(heads, triton.cdiv(p.F, BF))](
            *parts, *(start or parts), *total, LOG2E.value, unit, floor, count, heads // (p.B * p.Hk), p.F,
            p.V, BF, p.BV, START=start is not None, PREFIX=prefix, REVERSED=backward,
        )  # fmt: skip
    return total


def state(kv: Tensor | None, z: Tensor | None, log_scale: Tensor | None) -> State | None:
    """A state given, as kernels read it."""
    if kv is None or z is None or log_scale is None:
        return None
    return kv.float().contiguous(), z.float().contiguous(), log_scale.float().contiguous()


def new_state(like: Tensor, p: Plan, count: int) -> State:
    sizes = ((count, p.F, p.V), (count, p.F), (count, p.F))
    kv, z, c = (like.new_empty(size, dtype=torch.float32) for size in sizes)
    return kv, z, c


def spans(L: int, BL: int, heads: int, resident: int = 3, least: int = 256) -> tuple[int, int]:
    """How many rows a program takes, and how many programs share a head.

    All multiprocessors have ``resident`` programs, unless these would have fewer than ``least`` rows: a program's state
    costs as much as some rows.
    """
    count = max(1, min(MULTIPROCESSORS * resident // max(heads, 1), triton.cdiv(L, least)))
    span = triton.cdiv(triton.cdiv(L, count), BL) * BL
    return max(span, BL), triton.cdiv(L, span) if L else 0


def causal_spans(p: Plan, t: Tiles) -> tuple[int, int]:
    return spans(p.L, t.rows, p.B * p.H, 2, 1024)
