"""What the Triton kernels of linear attention share: tiles, features, states and the plan of a launch.

Exponents are in base 2 inside. Performer attention is softmax attention twice: features attend over keys, queries over
features; the running maximum of a feature over keys, c, and of a row over features stay out of the results.
"""

import dataclasses
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...features.reference import size_of

LOG2E = tl.constexpr(1.4426950408889634)
EMPTY = tl.constexpr(-1e20)  # the maximum of no exponent at all
MASKED = tl.constexpr(-1e30)  # the exponent of a row that takes no part: far below EMPTY, yet no infinity to subtract
VANISHED = tl.constexpr(8e-25)  # a causal row's sum, 2^-80, below which its largest weight may have been flushed to 0
EXP, RELU, ELU, READY, TRIG = (tl.constexpr(i) for i in range(5))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_BFLOAT16 = tl.constexpr(INTERPRETED)  # NumPy, which the interpreter runs on, would multiply its bits


def _steps(*bounds: Any) -> range:
    return range(*(int(b.handle.data.item()) if isinstance(b, tl.tensor) else int(b) for b in bounds))


# Triton 3.6's interpreter cannot loop up to a tensor's value with NumPy 2.4.
steps: Any = _steps if INTERPRETED else tl.range


# Tiles ---------------------------------------------------------------------------------------------------------------


@triton.jit
def load_rows(p_x, i, x_l, rows, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows i to i + BR of a matrix of C columns, (BR, BC), zero outside."""
    return load_rows_of(p_x, i, x_l, i + tl.arange(0, BR) < rows, C, BR, BC)


@triton.jit
def load_rows_of(p_x, i, x_l, m_r, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The same, zero where not m_r."""
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    m = m_r[:, None]
    if C != BC:
        m &= (o_c < C)[None, :]
    return tl.load(p_x + tl.cast(i, tl.int64) * x_l + o_r[:, None] * x_l + o_c[None, :], mask=m, other=0.0)


@triton.jit
def load_keys(
    p_k, p_v, p_mask, i, k_l, v_l, rows,
    D: tl.constexpr, V: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, MASK: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Which of the keys i to i + BR take part, they, and their values: zero where they do not, and may hold NaN."""
    o_r = tl.arange(0, BR)
    m_r = i + o_r < rows
    if MASK:
        m_r &= tl.load(p_mask + i + o_r, mask=m_r, other=0) != 0
    b_k = load_rows_of(p_k, i, k_l, m_r, D, BR, BD)
    return m_r, b_k, load_rows_of(p_v, i, v_l, m_r, V, BR, BV).to(DTYPE)


@triton.jit
def store_rows(p_y, b_y, i, y_l, rows, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    o_r, o_c = tl.arange(0, BR), tl.arange(0, BC)
    m = (i + o_r < rows)[:, None]
    if C != BC:
        m &= (o_c < C)[None, :]
    p = p_y + tl.cast(i, tl.int64) * y_l + o_r[:, None] * y_l + o_c[None, :]
    tl.store(p, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def load_omega(
    p_w, o_f, M, F, D: tl.constexpr, BD: tl.constexpr, SIGNED: tl.constexpr, IDENTITY: tl.constexpr
):  # fmt: skip
    """Rows o_f of the projection, (BF, BD): of the second half of the features those of the first again, or negated."""
    o_d = tl.arange(0, BD)
    if IDENTITY:
        return tl.where(o_f[:, None] == o_d[None, :], 1.0, 0.0)
    m = (o_f < F)[:, None] & (o_d < D)[None, :]
    b_w = tl.load(p_w + (o_f % M)[:, None] * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if SIGNED:
        b_w = tl.where(o_f[:, None] < M, b_w, -b_w)
    return b_w


@triton.jit
def operand(b_x, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What was computed, as a product's operand. Tensor cores cut float32 off to TF32, which is rounding to nearest
    only where this has been done before."""
    if DTYPE != tl.float32:
        b_x = b_x.to(DTYPE)
    elif PRECISION == "tf32" and not NO_BFLOAT16:
        b_x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [b_x], tl.float32, is_pure=True, pack=1)
    return b_x


@triton.jit
def operands(b_x, KIND: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """The same, and of exponential features' means and their gradients in bfloat16 what rounding has left: they are
    nearly equal to each other, or to a value of the key that has most of a feature's weight."""
    b_y = operand(b_x, DTYPE, PRECISION)
    b_rest = b_y
    if KIND == EXP and DTYPE == tl.bfloat16:
        b_rest = (b_x - b_y.to(tl.float32)).to(DTYPE)
    return b_y, b_rest


@triton.jit
def add_rest(b_s, b_x, b_y, KIND: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """s + x y, one of them a rest, where `operands` leaves one."""
    if KIND == EXP and DTYPE == tl.bfloat16:
        b_s = tl.dot(b_x, b_y, b_s, input_precision=PRECISION)
    return b_s


@triton.jit
def project_t(b_omega, b_x, PRECISION: tl.constexpr):
    """W x^T, (BF, BS)."""
    return tl.dot(b_omega, tl.trans(b_x), input_precision=PRECISION)


@triton.jit
def project(b_x, b_omega, PRECISION: tl.constexpr):
    """x W^T, (BL, BF)."""
    return tl.dot(b_x, tl.trans(b_omega), input_precision=PRECISION)


@triton.jit
def half_norm(b_x, scale):
    """|scale x|^2 / 2 of rows, times log2 e."""
    b_x = b_x.to(tl.float32)
    return tl.sum(b_x * b_x, 1) * (0.5 * LOG2E * scale * scale)


@triton.jit
def landed(b_y):
    """A sum of products, waited for before its loop goes on.

    Triton 3.6 does not wait by itself, and overwrites the rows of the last product with those of a later iteration
    while tensor cores read them, wherever these rows are read by anything else too.
    """
    if not NO_BFLOAT16:
        b_y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [b_y], tl.float32, is_pure=True, pack=1)
    return b_y


# Vectors over the columns of a product take a register for every column of a thread; as a thin product they take none.


@triton.jit
def _three(a, b, c):
    o = tl.arange(0, 16)[None, :]
    y = tl.where(o == 0, a[:, None], tl.where(o == 1, b[:, None], tl.where(o == 2, c[:, None], 0.0)))
    return y.to(tl.bfloat16)


@triton.jit
def _parts(x):
    """x in float32 as the sum of three numbers of 16 bits."""
    a = x.to(tl.bfloat16).to(tl.float32)
    b = (x - a).to(tl.bfloat16).to(tl.float32)
    return a, b, x - a - b


@triton.jit
def add_columns(b_y, b_x, WIDE: tl.constexpr):
    """y + x[None, :]."""
    if WIDE or NO_BFLOAT16:
        b_y += b_x[None, :]
    else:
        a, b, c = _parts(b_x)
        ones = tl.where(tl.arange(0, 16)[None, :] < 3, 1.0, tl.zeros((b_y.shape[0], 16), tl.float32))
        b_y = tl.dot(ones.to(tl.bfloat16), tl.trans(_three(a, b, c)), b_y)
    return b_y


@triton.jit
def add_exponents(b_p, b_x, exponent, WIDE: tl.constexpr):
    """exponent p + x[None, :]."""
    if WIDE:
        b_p = b_p * exponent + b_x[None, :]
    else:
        b_p = add_columns(b_p, b_x / exponent, WIDE) * exponent
    return b_p


@triton.jit
def add_outer(b_y, b_r, b_x, WIDE: tl.constexpr):
    """y + r[:, None] x[None, :]."""
    if WIDE or NO_BFLOAT16:
        b_y += b_r[:, None] * b_x[None, :]
    else:
        ra, rb, _ = _parts(b_r)
        xa, xb, _ = _parts(b_x)
        b_y = tl.dot(_three(ra, ra, rb), tl.trans(_three(xa, xb, xa)), b_y)
    return b_y


@triton.jit
def times_columns(b_y, b_x, WIDE: tl.constexpr):
    """sum(y * x[None, :], 1) of y in the products' dtype."""
    if WIDE or NO_BFLOAT16:
        b_s = tl.sum(b_y.to(tl.float32) * b_x[None, :], 1)
    else:
        a, b, c = _parts(b_x)
        b_s = tl.sum(tl.dot(b_y.to(tl.bfloat16), _three(a, b, c)), 1)
    return b_s


# Features ------------------------------------------------------------------------------------------------------------


@triton.jit
def nonlinear(t, eps, KIND: tl.constexpr):
    """Features without exponents."""
    if KIND == RELU:
        y = tl.maximum(t, 0.0) + eps
    elif KIND == ELU:
        y = tl.where(t > 0.0, t + 1.0, tl.exp(tl.minimum(t, 0.0))) + eps
    elif KIND == TRIG:
        y = tl.cos(t)
    else:
        y = t + eps
    return y


@triton.jit
def slope(t, KIND: tl.constexpr):
    if KIND == RELU:
        y = tl.where(t > 0.0, 1.0, 0.0)
    elif KIND == ELU:
        y = tl.where(t > 0.0, 1.0, tl.exp(tl.minimum(t, 0.0)))
    elif KIND == TRIG:
        y = -tl.sin(t)
    else:
        y = tl.full(t.shape, 1.0, tl.float32)
    return y


@triton.jit
def phase(o_f, M):
    """Of cos(p - phase): the second half of trigonometric features are sines."""
    return tl.where(o_f < M, 0.0, 1.5707963267948966)


# States --------------------------------------------------------------------------------------------------------------


@triton.jit
def load_state(kv, z, c, i_state, o_f, F, factor, V: tl.constexpr, BV: tl.constexpr):
    """A state's kv (BF, BV), z and c (BF,); ``factor`` takes its logarithms to base 2."""
    o_v, m_f = tl.arange(0, BV), o_f < F
    p = i_state * F + o_f
    b_kv = tl.load(kv + p[:, None] * V + o_v[None, :], mask=m_f[:, None] & (o_v < V)[None, :], other=0.0)
    b_z = tl.load(z + p, mask=m_f, other=0.0)
    b_c = tl.load(c + p, mask=m_f, other=EMPTY) * factor
    return b_kv, b_z, tl.maximum(b_c, EMPTY)


@triton.jit
def store_state(kv, z, c, b_kv, b_z, b_c, i_state, o_f, F, factor, V: tl.constexpr, BV: tl.constexpr):
    o_v, m_f = tl.arange(0, BV), o_f < F
    p = i_state * F + o_f
    tl.store(kv + p[:, None] * V + o_v[None, :], b_kv, mask=m_f[:, None] & (o_v < V)[None, :])
    tl.store(z + p, b_z, mask=m_f)
    tl.store(c + p, b_c * factor, mask=m_f)


@triton.jit
def add_states(b_kv, b_z, b_c, o_kv, o_z, o_c):
    b_n = tl.maximum(b_c, o_c)
    b_r, o_r = tl.exp2(b_c - b_n), tl.exp2(o_c - b_n)
    return b_kv * b_r[:, None] + o_kv * o_r[:, None], b_z * b_r + o_z * o_r, b_n


@triton.jit
def mean_state(b_kv, b_z, b_c, KIND: tl.constexpr):
    """Exponential features' state as each feature's mean value, and c + log2 z: bounded by the values themselves."""
    if KIND == EXP:
        there = b_z > 0.0
        b_kv = b_kv * tl.where(there, 1.0 / tl.where(there, b_z, 1.0), 0.0)[:, None]
        b_c = tl.where(there, b_c + tl.log2(tl.where(there, b_z, 1.0)), EMPTY)
    return b_kv, b_z, b_c


@triton.jit
def query_state(b_kv, b_z, b_c, p_bias, o_f, F, BIASED: tl.constexpr, KIND: tl.constexpr):
    """What rows of queries need: a mean state, with the exponents that queries add."""
    b_kv, b_z, b_c = mean_state(b_kv, b_z, b_c, KIND)
    if BIASED:
        b_c += tl.load(p_bias + o_f, mask=o_f < F, other=0.0) * LOG2E
    return b_kv, b_z, tl.where(o_f < F, b_c, MASKED)


@triton.jit
def feature_bias(p_bias, o_f, F, BIASED: tl.constexpr):
    """What every exponent of a feature has, in base 2; of the padding, what makes it vanish."""
    b_bias = tl.where(o_f < F, 0.0, MASKED)
    if BIASED:
        b_bias += tl.load(p_bias + o_f, mask=o_f < F, other=0.0) * LOG2E
    return b_bias


@triton.jit
def state_before(
    kv, z, c, kv0, z0, c0, i_state, i_part, o_f, F,
    V: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr, KIND: tl.constexpr, PARTS: tl.constexpr, START: tl.constexpr,
):  # fmt: skip
    """The state before a span: of its part, of the start, or of no keys."""
    b_kv = tl.zeros((BF, BV), tl.float32)
    b_z = tl.zeros((BF,), tl.float32)
    b_c = tl.full((BF,), EMPTY if KIND == EXP else 0.0, tl.float32)
    if PARTS:
        b_kv, b_z, b_c = load_state(kv, z, c, i_part, o_f, F, 1.0, V, BV)
    elif START:
        b_kv, b_z, b_c = load_state(kv0, z0, c0, i_state, o_f, F, LOG2E, V, BV)
    return b_kv, b_z, b_c


@triton.jit
def query_weights(b_pq, b_n, b_bias, exponent, WIDE: tl.constexpr):
    """Weights exp2(exponent p + n + bias - r) of rows over features, (BL, BF), and the integers r."""
    if WIDE:
        b_pq = b_pq * exponent + b_bias[None, :]
        b_r = tl.ceil(tl.max(b_pq + b_n[None, :], 1))
        b_pq += b_n[None, :] - b_r[:, None]
        b_pq = tl.exp2(tl.where(b_pq > 1.0, 1.0, b_pq))  # above 0 where no key has been yet
    else:
        b_pq = add_columns(b_pq, (b_n + b_bias) / exponent, WIDE) * exponent
        b_r = tl.ceil(tl.max(b_pq, 1))
        b_pq = tl.exp2(b_pq - b_r[:, None])
    return b_pq, b_r


@triton.jit
def chunk_keys(
    b_pk, b_k, m_l, b_c, b_bias, scale, exponent, eps, NORM: tl.constexpr, WIDE: tl.constexpr, KIND: tl.constexpr
):  # fmt: skip
    """A chunk's features of keys (BF, BL) from projections, what they are relative to, and the factor of old sums."""
    if KIND == EXP:
        b_e = half_norm(b_k, scale) * -1.0 if NORM else tl.zeros((b_pk.shape[1],), tl.float32)
        b_e = tl.where(m_l, b_e, MASKED)
        if WIDE:
            b_pk = b_pk * exponent + b_bias[:, None] + b_e[None, :]
            b_n = tl.maximum(b_c, tl.ceil(tl.max(b_pk, 1)))
            b_pk = tl.exp2(b_pk - b_n[:, None])
        else:
            b_pk = b_pk * exponent + b_e[None, :]
            b_n = tl.maximum(b_c, tl.ceil(tl.max(b_pk, 1) + b_bias))
            b_pk = tl.exp2(b_pk + (b_bias - b_n)[:, None])
        b_old = tl.exp2(b_c - b_n)
    else:
        b_pk = nonlinear(b_pk * scale, eps, KIND) * tl.where(m_l, 1.0, 0.0)[None, :]
        b_old = tl.full((b_pk.shape[0],), 1.0, tl.float32)
        b_n = b_c
    return b_pk, b_n, b_old


# Token by token: exact whatever the keys, and slow -------------------------------------------------------------------


@triton.jit
def add_token(
    b_kv, b_z, b_c, b_w, b_bias, p_k, p_v, p_mask, o_d, o_v, scale, exponent,
    D: tl.constexpr, V: tl.constexpr, NORM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    m_d, m_v = o_d < D, o_v < V
    if MASK:
        taken = tl.load(p_mask) != 0
        m_d &= taken
        m_v &= taken
    b_k = tl.load(p_k + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + o_v, mask=m_v, other=0.0).to(tl.float32)
    b_e = tl.sum(b_w * b_k[None, :], 1) * exponent + b_bias
    if NORM:
        b_e -= tl.sum(b_k * b_k, 0) * (0.5 * LOG2E * scale * scale)
    if MASK:
        b_e = tl.where(taken, b_e, MASKED)
    b_n = tl.maximum(b_c, b_e)
    b_e = tl.exp2(b_e - b_n)
    b_r = tl.exp2(b_c - b_n)
    return b_kv * b_r[:, None] + b_e[:, None] * b_v[None, :], b_z * b_r + b_e, b_n


# Launches ------------------------------------------------------------------------------------------------------------


State = tuple[Tensor, Tensor, Tensor]  # kv (B Hk, F, V), z and c (B Hk, F)


@dataclasses.dataclass
class Tiles:
    features: int
    rows: int
    one: bool  # one tile holds all features
    warps: int
    stages: int


@dataclasses.dataclass
class Plan:
    """Sizes and constants of a call."""

    B: int
    H: int
    Hk: int
    L: int
    S: int
    D: int
    V: int
    M: int
    F: int
    BD: int
    BV: int
    kind: int
    scale: float
    exponent: float  # what turns projections into exponents of base 2
    omega: Tensor  # (M, D) or (Hk, M, D), or anything where the projection is the identity
    omega_h: int
    bias: Tensor  # (M,) or (Hk, M), or anything
    bias_h: int
    mask: Tensor  # (B, S), or anything
    eps: float
    input: torch.dtype
    flags: dict[str, Any]

    @property
    def is_exp(self) -> bool:
        return self.kind == int(EXP.value)

    @property
    def is_half(self) -> bool:
        return self.input in (torch.float16, torch.bfloat16)

    def add_groups(self, x: Tensor) -> Tensor:
        """Gradients (B, H, ...) of what a group of query heads shares, added, in the inputs' dtype."""
        y: Tensor = x.unflatten(1, (self.Hk, -1)).sum(2).to(self.input)
        return y

    def options(self, names: str) -> dict[str, Any]:
        return {name: self.flags[name] for name in names.split()}

    def dtype(self, bounded: bool = False) -> Any:
        """Of features, states and gradients in products: float16 only for numbers that cannot leave its range."""
        if self.input == torch.bfloat16:
            return tl.bfloat16
        return tl.float16 if self.input == torch.float16 and bounded and self.is_exp else tl.float32

    def tiles(self, causal: bool = False, state: bool = False, backward: bool = False) -> Tiles:
        """Tiles of features and rows, such that registers and shared memory hold what a kernel keeps."""
        F, wide = pad(self.F), max(self.BD, self.BV)
        if not self.is_half:
            # Products of float32 are sums of registers, not tensor cores: small tiles.
            features = F if causal else min(F, 32 if wide <= 64 else 16)
            return Tiles(features, 16, features == F, 4, 1)
        if causal:
            bfloat16, fits = self.input == torch.bfloat16, F * (self.BD + self.BV) <= 2**14
            # Measured for bfloat16, D = V = 64 and F = 128, forward: 64 rows of 4 warps take half the time of 32 of 8.
            # With V = 17 they were wrong, as compiled by Triton 3.6.
            small = bfloat16 and self.BD == self.BV == 64 and F <= (64 if backward else 128)
            return Tiles(F, 64 if small else 32, True, 4 if small else 8, 2 if fits and bfloat16 else 1)
        if state:
            largest = 128 if wide <= 128 else 64
            features = min(F, largest if self.input == torch.bfloat16 else 8192 // wide)
            return Tiles(features, 64, features == F, 8 if features > 64 else 4, 3 if wide <= 64 else 2)
        largest = 256 if wide <= 64 else 8192 * 2 // wide
        if self.input == torch.float16:  # whose products take three of TF32, of operands of 32 bits
            largest = 4096 // wide
        features = min(F, largest)
        warps = 8 if features * wide > 8192 and wide <= 128 else 4
        stages = 3 if self.input == torch.bfloat16 else 1
        return Tiles(features, 16 * warps, features == F, warps, stages if wide <= 64 else 1)


def plan(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    scale: float,
    bias: Tensor | None,  # (M,) or (Hk, M)
    eps: float,
    normalize: bool,
    mask: Tensor | None,  # (B, S)
) -> Plan:
    B, H, L, D = q.shape
    Hk, S, V = v.shape[1:]
    M = D if omega is None else omega.shape[-2]
    twice = kind in ("hyperbolic", "trigonometric")
    code = {"relu": RELU, "elu": ELU, "features": READY, "trigonometric": TRIG}.get(kind, EXP).value
    flags = {
        "KIND": code,
        "NORM": kind in ("positive", "hyperbolic"),
        "SIGNED": kind == "hyperbolic",
        "IDENTITY": omega is None,
        "BIASED": bias is not None,
        "MASK": mask is not None,
        "NORMALIZE": normalize,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32x3",
    }
    return Plan(
        B, H, Hk, L, S, D, V, M, 2 * M if twice else M, pad(D), pad(V), code, scale, scale * LOG2E.value,
        q if omega is None else omega.contiguous(), 0 if omega is None or omega.dim() == 2 else M * D,
        q if bias is None else bias, 0 if bias is None or bias.dim() == 1 else M,
        q if mask is None else mask.contiguous().view(torch.uint8), eps, q.dtype, flags,
    )  # fmt: skip


def in_float32(
    q: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, Hk, S, V)
    omega: Tensor | None,  # (M, D) or (Hk, M, D)
    kind: str,
    causal: bool,
) -> bool:
    """Whether numbers of 16 bits are computed as float32 ones.

    Sums of fewer than 32 products would not average the roundings of their operands out. Rows of other lengths than
    powers of two do not come by the asynchronous copies that the kernels have been tested with.
    """
    if q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if INTERPRETED and q.dtype == torch.bfloat16:  # NumPy has none
        return True
    D, V = q.shape[-1], v.shape[-1]
    F = size_of(q, omega, kind)
    if min(D, V, F) < 32 or D != pad(D) or V != pad(V):
        return True
    # A causal kernel's tile holds all features; as TF32 it is twice as large.
    return causal and q.dtype == torch.float16 and pad(F) * (D + V) > 2**14


def pad(n: int) -> int:
    return max(16, int(triton.next_power_of_2(n)))


def rows(x: Tensor) -> Tensor:
    """Any strides, but a vector's numbers side by side; of 16 bits, vectors that asynchronous copies can take whole.

    Triton 3.6 compiles the causal kernels' loops wrongly where it must load number by number.
    """
    if x.dtype in (torch.float16, torch.bfloat16) and x.numel():
        if x.stride(-1) != 1 or x.data_ptr() % 16 or any(n % 16 for n in x.stride()[:-1]):
            return x.clone(memory_format=torch.contiguous_format)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def on_device(x: Tensor) -> Any:
    return torch.cuda.device_of(x)
