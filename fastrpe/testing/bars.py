"""The numbers that tests hold the code to, each with its bar in the method specification (section and item).

Where the specification asks for equality and gives no number, the comment says "ours".
"""

import torch

# 1.7.1 and 2.8.2: |<R(i+s) q, R(j+s) k> - <R(i) q, R(j) k>| relative to |q| |k|, for |s| up to SHIFT_RANGE.
SHIFT = {torch.float32: 1e-5, torch.float64: 1e-9}
SHIFT_RANGE = 1000

# 1.7.2: change of a norm, relative.
NORM = 1e-6

# 1.7.7: <R x, y> - <x, R^T y> relative to |x| |y|, in float64; ours.
ADJOINT = 1e-12

# 1.4: frequencies against those that transformers computes, which it does in float32; relative; ours.
TRANSFORMERS_FREQS = 2e-6

# 2.8.1: entries of P^T P - I, for |S|_2 up to SKEW_RANGE.
ORTHOGONAL = {torch.float32: 1e-5, torch.float64: 1e-12}
SKEW_RANGE = 1000.0

# 2.8.3: the FFT form against scipy.linalg.expm, and [L_1, L_2]; float64.
EXPM = 1e-10
COMMUTE = 1e-12

# 2.8.4: the FFT form against RoPE in the Fourier basis, and gradients that are zero; float64; ours.
FOURIER = 1e-10
ZERO_GRADIENT = 1e-12

# 2.8.6: P after RoPE changes no score by more than NO_OP (float64); P before it some by DIFFERENT and
# more, relative to the largest; ours.
NO_OP = 1e-12
DIFFERENT = 1e-1

# 2.8.10: logits of folded projections against those that apply the basis; relative to the largest.
FOLDED = 1e-5

# 2.8.5: scores of a reflection basis whose layers cancel against RoPE's; relative to the largest.
CANCELLED = 1e-6

# 2.8.9: laws of reflections, float64; ours.
REFLECTED = 1e-12

# 2.4: tensor-STRING's scores against q.k f.f, float64, relative to the largest; ours.
TENSOR = 1e-12

# 2.8.11: standard errors between the mean of an unbiased estimator and what it estimates.
SIGMAS = 4

# 2.8.8: a sparse solver against the dense solve, float64, relative to the largest; ours. Its gradients (2.8.7).
SPARSE = 1e-12
SPARSE_GRADIENT = 1e-6

# 4.9.6: linear attention against its weights written out, relative to the largest; in float64 ours.
LINEAR_ATTENTION = {torch.float32: 1e-5, torch.float64: 1e-12}

# Causal gradients of linear attention in bfloat16 against those in float64, norms; ours.
CAUSAL_GRADIENTS = 0.015

# Bidirectional ones, the same; ours.
LINEAR_GRADIENTS = {torch.float16: 0.001, torch.bfloat16: 0.006}

# A million tokens, D = V = M = 16, on a CPU, forward and backward, bidirectional and causal: seconds; ours.
MILLION_SECONDS = 60

# 4.9.2: mean squared errors of random features against their closed forms, relative.
CLOSED_FORM = 0.03

# 4.3: the table of relative errors, by its digits, relative above 1; 4.9.8: A* against a grid of this step, ours.
TABLE = 1e-6
GRID = 1e-3

# 4.9.3: probability below which a chi-square test of uniform rows fails, that of SIGMAS standard errors; ours.
UNIFORM = 6e-5

# 4.1: a stabilizer cancels in normalised attention, OPRF at A = 0 is positive, and their like; float64, relative; ours.
CANCELLED_FACTOR = 1e-10

# 4.1: features against their formulas written out, float64, relative to the largest; ours.
FORMULA = 1e-12
