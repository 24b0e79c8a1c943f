"""Linear attention: SPEC 4.9, items 6, 7 and 10, its options, its state, and PyTorch's machinery around it."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from fastrpe.backend import problem
from fastrpe.ops.features import random_features
from fastrpe.ops.linear import State, linear_attention, linear_attention_step, reference
from fastrpe.testing.asserts import LAW_FLOAT64, ROUNDINGS, assert_accurate, assert_bitwise, assert_same, assert_within
from fastrpe.testing.bars import CAUSAL_GRADIENTS, LINEAR_ATTENTION, LINEAR_GRADIENTS, MILLION_SECONDS

KINDS = ("positive", "hyperbolic", "trigonometric", "oprf", "relu", "exp", "elu", "features")
DTYPES = pytest.mark.parametrize("dtype", LINEAR_ATTENTION, ids=lambda d: str(d).removeprefix("torch."))
HALVES = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
CAUSAL = pytest.mark.parametrize("causal", (False, True), ids=("bidirectional", "causal"))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(
    B: int = 2,
    H: int = 4,
    Hk: int = 2,
    L: int = 70,
    D: int = 8,
    V: int = 5,
    M: int = 12,
    *,
    kind: str = "positive",
    seed: int = 0,
    **where: Any,
) -> dict[str, Any]:
    q, k, v = (draw(B, h, L, n, seed=seed + i, **where) for i, (h, n) in enumerate(((H, D), (Hk, D), (Hk, V))))
    if kind == "features":
        return dict(q=q.abs(), k=k.abs(), v=v, kind=kind)
    a = dict(a=torch.tensor(-0.1, dtype=q.dtype, device=q.device)) if kind == "oprf" else {}
    return dict(q=q, k=k, v=v, omega=draw(M, D, seed=seed + 3, **where), kind=kind, **a)


def skip_slow(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("too slow for interpreted Triton kernels, which the conformance suite runs")


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    omega: Tensor | None = None,
    kind: str = "positive",
    causal: bool = False,
    eps: float = 0.0,
    normalize: bool = True,
    mask: Tensor | None = None,
    a: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention by its matrix of weights."""

    def features(x: Tensor) -> Tensor:
        if kind == "features":
            return x + eps
        return random_features(x, omega, kind, eps=eps, a=a, scale=scale, backend="reference")

    groups = q.shape[1] // k.shape[1]
    weights = features(q) @ features(k).repeat_interleave(groups, 1).mT
    weights = weights.tril() if causal else weights
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None, None], 0)
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, math.inf)
    return weights @ v.repeat_interleave(groups, 1)


# Values: SPEC 4.9.6 --------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@CAUSAL
def test_6_is_attention_by_weights(
    device: torch.device, backend: str, causal: bool, kind: str, dtype: torch.dtype
) -> None:
    skip_slow(backend, device)
    normalize = kind != "trigonometric"  # whose weights may sum to nearly 0
    options: dict[str, Any] = dict(causal=causal, normalize=normalize, eps=0.0 if kind == "trigonometric" else 0.01)
    one = inputs(kind=kind, device=device, dtype=dtype)
    exact = written_out(**{n: x.double() if isinstance(x, Tensor) else x for n, x in one.items()}, **options)
    assert_within(linear_attention(**one, **options, backend=backend), exact, LINEAR_ATTENTION[dtype])


@CAUSAL
def test_estimates_softmax_attention(device: torch.device, causal: bool) -> None:
    """Positive features of many directions come near; 4 standard errors of a run with other directions."""
    q, k, v = (draw(1, 2, 40, 8, seed=i, device=device) / 2 for i in range(3))
    found = torch.stack(
        [linear_attention(q, k, v, draw(4096, 8, seed=9 + i, device=device), causal=causal) for i in range(16)]
    )
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    error = (found.mean(0) - exact).abs()
    assert (error <= 4 * found.std(0) / 4 + error.mean()).all()


@CAUSAL
def test_rows_without_keys_give_zeros(device: torch.device, backend: str, causal: bool) -> None:
    skip_slow(backend, device)
    one = inputs(device=device, L=20)
    mask = torch.ones(2, 20, dtype=torch.bool, device=device)
    mask[0] = False
    mask[1, :7] = False
    one["q"].requires_grad_()
    for normalize in (True, False):
        y = linear_attention(**one, mask=mask, causal=causal, normalize=normalize, backend=backend)
        assert not y[0].any() and y[1, :, 7:].all()
        assert y[1, :, :7].any() != causal
        (dq,) = torch.autograd.grad(y.sum(), one["q"])
        assert dq.isfinite().all() and not dq[0].any()


def test_relu_rows_without_weights_give_zeros(device: torch.device, backend: str) -> None:
    skip_slow(backend, device)
    one = inputs(device=device, kind="relu", L=5)
    one["q"][:, :, 2] = 0
    one["q"].requires_grad_()
    y = linear_attention(**one, backend=backend)
    assert not y[:, :, 2].any() and y.isfinite().all()
    assert torch.autograd.grad(y.sum(), one["q"])[0].isfinite().all()


@CAUSAL
def test_weights_that_cancel_give_zeros(device: torch.device, backend: str, causal: bool) -> None:
    """Rows whose weights, of both signs, sum to 0, and no gradient to what they weigh."""
    q, k, v = (torch.tensor(x, device=device).reshape(1, 1, 2, 1) for x in ([1.0, 1.0], [1.0, -1.0], [1.0, 3.0]))
    v.requires_grad_()
    y = linear_attention(q, k, v, kind="features", causal=causal, backend=backend)
    assert y.flatten().tolist() == [1.0 if causal else 0.0, 0.0]
    (dv,) = torch.autograd.grad(y.sum(), v)
    assert dv.flatten().tolist() == [1.0 if causal else 0.0, 0.0]


@CAUSAL
def test_results_bear_changes_in_place(device: torch.device, backend: str, causal: bool) -> None:
    skip_slow(backend, device)
    one = inputs(device=device, dtype=torch.float32)
    one["q"].requires_grad_()
    y = linear_attention(**one, causal=causal, backend=backend)
    y += 1
    y.sum().backward()


# The stabiliser: SPEC 4.9.7 and 4.9.10 -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_7_no_gradient_to_the_future(device: torch.device, backend: str, kind: str) -> None:
    skip_slow(backend, device)
    one = inputs(B=1, L=70, kind=kind, device=device, dtype=torch.float32)
    for n in ("q", "k", "v"):
        one[n].requires_grad_()
    y = linear_attention(**one, causal=True, eps=0.0 if kind == "trigonometric" else 1e-3, backend=backend)
    for row in (0, 15, 16, 40, 63, 64):
        dq, dk, dv = torch.autograd.grad(y[:, :, row].sum(), [one[n] for n in "qkv"], retain_graph=True)
        assert not dk[:, :, row + 1 :].any() and not dv[:, :, row + 1 :].any()
        assert dv[:, :, : row + 1].any() and not dq[:, :, :row].any() and not dq[:, :, row + 1 :].any()


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.float16, torch.bfloat16), ids=("float32", "float16", "bfloat16")
)
@pytest.mark.parametrize("kind", ("positive", "hyperbolic", "oprf", "exp", "relu"))
def test_7_later_keys_change_no_bit(device: torch.device, backend: str, kind: str, dtype: torch.dtype) -> None:
    """Keys of norm 30 along a row of omega, the worst there are: rows before them keep their bits, and stay finite.

    A GPU's kernels hold the keys of a chunk relative to its largest, so that rows before that are rounded anew.
    """
    skip_slow(backend, device)
    on_gpu = device.type == "cuda"
    sizes = dict(D=64, V=64, M=64) if backend == "native" and on_gpu else {}  # which its kernel takes
    one = inputs(B=1, L=130, kind=kind, device=device, dtype=dtype, **sizes)
    before = linear_attention(**one, causal=True, backend=backend)
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in one.items()}
    same, exact = (linear_attention(**x, causal=True, backend="reference") for x in (one, wide))
    direction = one["omega"][0] / one["omega"][0].norm()
    for row in (1, 17, 37, 63, 64, 100):
        k = one["k"].clone()
        k[:, :, row] = (30 * direction).to(dtype)
        k[:, :, row + 1 :: 5] = (-30 * direction).to(dtype)
        v = one["v"].clone()
        v[:, :, row:] *= 1000
        y = linear_attention(**one | dict(k=k, v=v), causal=True, backend=backend)
        assert y.isfinite().all()
        if backend == "triton" or (backend == "native" and on_gpu):
            assert_accurate(y[:, :, :row], same[:, :, :row], exact[:, :, :row], dtype=dtype)
        else:
            assert_bitwise(y[:, :, :row], before[:, :, :row])


@CAUSAL
@pytest.mark.parametrize("kind", ("positive", "hyperbolic", "oprf", "exp"))
def test_10_large_inputs_are_accurate(device: torch.device, backend: str, causal: bool, kind: str) -> None:
    """Norms from 0.1 to 30, in float32, growing, falling and mixed; features from exp(-450) to exp(450)."""
    skip_slow(backend, device)
    one = inputs(B=3, L=150, D=16, kind=kind, device=device, dtype=torch.float32)
    size = torch.logspace(-1, math.log10(30), 150, device=device)
    size = torch.stack((size, size.flip(0), size[torch.randperm(150, generator=torch.Generator().manual_seed(0))]))
    for n in ("q", "k"):
        one[n] = (one[n] / one[n].norm(dim=-1, keepdim=True) * size[:, None, :, None]).requires_grad_()
    wide = {n: x.detach().double().requires_grad_() if isinstance(x, Tensor) else x for n, x in one.items()}
    size = ROUNDINGS * torch.finfo(torch.float32).eps
    off = {n: x * (1 + size * draw(*x.shape, device=device)) if n in "qkv" else x for n, x in wide.items()}
    results = []
    for arguments, backend_ in ((one, backend), (off, "reference"), (wide, "reference")):
        y = linear_attention(**arguments, causal=causal, backend=backend_)
        grads = torch.autograd.grad(y, [arguments["q"], arguments["k"]], draw(*y.shape, seed=7).to(y))
        results.append((y, *grads))
    for actual, same, exact in zip(*results):
        assert_accurate(actual, same.float(), exact, dtype=torch.float32)


@HALVES
@CAUSAL
@pytest.mark.parametrize("kind", ("positive", "hyperbolic", "oprf", "exp", "relu", "elu"))
def test_10_halves_stay_finite(device: torch.device, backend: str, causal: bool, kind: str, dtype: torch.dtype) -> None:
    skip_slow(backend, device)
    one = inputs(L=90, D=16, kind=kind, device=device, dtype=dtype)
    for n in ("q", "k"):
        one[n] = (one[n] / one[n].norm(dim=-1, keepdim=True) * 30).requires_grad_()
    y = linear_attention(**one, causal=causal, eps=1e-3, backend=backend)
    assert y.isfinite().all()
    assert y.abs().amax() <= one["v"].abs().amax()
    for g in torch.autograd.grad(y.float().square().sum(), [one["q"], one["k"]]):
        assert g.isfinite().all()


@CAUSAL
def test_10_one_of_everything(device: torch.device, backend: str, causal: bool) -> None:
    skip_slow(backend, device)
    one = inputs(1, 1, 1, 1, 1, 1, 1, device=device, dtype=torch.float32)
    assert_within(linear_attention(**one, causal=causal, backend=backend), one["v"], LINEAR_ATTENTION[torch.float32])


# Options -------------------------------------------------------------------------------------------------------------


@CAUSAL
def test_masked_keys_are_as_if_not_there(device: torch.device, backend: str, causal: bool) -> None:
    """Whatever they hold, and wherever they are: NaN among others, and before all others."""
    sizes, dtype = (16, 16, 16), torch.float32 if backend == "triton" else torch.float64
    if backend == "native" and device.type == "cuda":
        sizes, dtype = (64, 64, 64), torch.bfloat16
    one = inputs(1, 2, 1, 80, *sizes, device=device, dtype=dtype)
    keep = torch.arange(80, device=device) % 3 > 0
    keep[:20] = False
    left = {n: one[n][:, :, keep] for n in ("k", "v")} | (dict(q=one["q"][:, :, keep]) if causal else {})
    expected = linear_attention(**one | left, causal=causal, backend=backend)
    for n, x in (("k", math.nan), ("v", math.inf)):
        one[n] = one[n].masked_fill(~keep[:, None], x).requires_grad_()
    one["q"].requires_grad_()
    y = linear_attention(**one, causal=causal, mask=keep[None], backend=backend)
    assert y.isfinite().all()
    bar = LAW_FLOAT64 if dtype == torch.float64 else ROUNDINGS * torch.finfo(dtype).eps
    assert_within(y[:, :, keep] if causal else y, expected, bar)
    dq, dk, dv = torch.autograd.grad(y.float().square().sum(), [one[n] for n in "qkv"])
    for g in (dk, dv):
        assert not g[:, :, ~keep].any() and g.isfinite().all()
    assert dq.isfinite().all()


@CAUSAL
def test_grouped_queries_are_repeated_keys(device: torch.device, backend: str, causal: bool) -> None:
    skip_slow(backend, device)
    one = inputs(H=6, Hk=2, device=device)
    one["omega"] = draw(2, 12, 8, seed=5, device=device)
    repeated = {n: one[n].repeat_interleave(3, 1) for n in ("k", "v")} | dict(
        omega=one["omega"].repeat_interleave(3, 0)
    )
    y = linear_attention(**one, causal=causal, backend=backend)
    assert_within(y, linear_attention(**one | repeated, causal=causal, backend=backend), LAW_FLOAT64)


@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@CAUSAL
def test_packed_sequences_are_separate(device: torch.device, backend: str, causal: bool, masked: bool) -> None:
    skip_slow(backend, device)
    lengths, first = (5, 70, 0, 1, 33), 2
    one = inputs(B=1, L=sum(lengths) + 5, device=device)
    cu_seqlens = torch.tensor((0, *lengths), device=device).cumsum(0).int() + first
    mask = draw(1, one["k"].shape[2], seed=6, device=device) > -1 if masked else None
    leaves = {n: one[n].requires_grad_() for n in ("q", "k", "v", "omega")}
    y = linear_attention(**one, causal=causal, cu_seqlens=cu_seqlens, mask=mask, backend=backend)
    parts, at = [torch.zeros_like(y[:, :, :first])], first
    for n in lengths:
        part = {name: one[name][:, :, at : at + n] for name in "qkv"}
        some = None if mask is None else mask[:, at : at + n]
        parts.append(linear_attention(**one | part, causal=causal, mask=some, backend=backend))
        at += n
    expected = torch.cat((*parts, torch.zeros_like(y[:, :, at:])), 2)
    assert_within(y, expected, LAW_FLOAT64)
    dy = draw(*y.shape, seed=8, device=device)
    grads = [torch.autograd.grad(t, list(leaves.values()), dy) for t in (y, expected)]
    for name, g, e in zip(leaves, *grads):
        assert_within(g, e, LAW_FLOAT64, name=name)


def test_oprf_without_a_bias_is_positive(device: torch.device, backend: str) -> None:
    skip_slow(backend, device)
    one = inputs(device=device)
    expected = linear_attention(**one, backend=backend)
    assert_within(linear_attention(**one | dict(kind="oprf"), a=0.0, backend=backend), expected, LAW_FLOAT64)


@HALVES
def test_sums_are_rounded_once(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Without normalisation the features' constant is applied before the rounding."""
    skip_slow(backend, device)
    one = inputs(device=device, dtype=dtype)
    y = linear_attention(**one, normalize=False, scale=0.1, backend=backend)
    assert y.dtype == dtype
    wide = {n: x.float() if isinstance(x, Tensor) else x for n, x in one.items()}
    assert_bitwise(y, linear_attention(**wide, normalize=False, scale=0.1, backend=backend).to(dtype))


# State ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(cut=st.lists(st.integers(0, 90), max_size=4), kind=st.sampled_from(KINDS), eps=st.sampled_from((0.0, 0.01)))
@pytest.mark.parametrize("name", ("reference", "native"))
def test_state_splits_anywhere(name: str, cut: list[int], kind: str, eps: float) -> None:
    """Output and gradients of a sequence in parts are those of the whole."""
    one = inputs(B=1, L=90, kind=kind)
    one["k"] = one["k"] * torch.linspace(0.2, 6, 90, dtype=torch.float64)[:, None]
    options: dict[str, Any] = dict(causal=True, eps=0.0 if kind == "trigonometric" else eps, return_state=True)
    options |= dict(normalize=kind != "trigonometric", backend=name)
    leaves = [one[n].requires_grad_() for n in ("q", "k", "v", "omega", "a") if n in one]
    whole, last = linear_attention(**one, **options)
    state, parts, at = None, [], 0
    for end in (*sorted(cut), 90):
        part = {n: one[n][:, :, at:end] for n in "qkv"}
        y, state = linear_attention(**one | part, **options, state=state)
        parts.append(y)
        at = end
    assert state is not None
    split = torch.cat(parts, 2)
    assert_within(split, whole, LAW_FLOAT64)
    total = [s.log_scale.exp().unsqueeze(-1) * s.kv for s in (state, last)]
    assert_within(total[0], total[1], LAW_FLOAT64)
    dy = draw(*whole.shape, seed=8)
    dtotal = draw(*total[0].shape, seed=9) / float(total[0].detach().abs().max())
    grads = [torch.autograd.grad((y, t), leaves, (dy, dtotal)) for y, t in ((split, total[0]), (whole, total[1]))]
    for g, expected in zip(*grads):
        assert_within(g, expected, LAW_FLOAT64)


def test_long_sequences_are_cut() -> None:
    """The native kernel gives the spans of a long sequence to several threads; parts of it are not that long."""
    one = inputs(B=1, L=20_000, Hk=1, H=2, M=6)
    one["k"] = one["k"] * torch.linspace(0.2, 8, 20_000, dtype=torch.float64)[:, None]
    leaves = [one[n].requires_grad_() for n in ("q", "k", "v", "omega")]
    whole, last = linear_attention(**one, causal=True, return_state=True)
    state, parts = None, []
    for at in range(0, 20_000, 5000):
        part = {n: one[n][:, :, at : at + 5000] for n in "qkv"}
        y, state = linear_attention(**one | part, causal=True, state=state, return_state=True)
        parts.append(y)
    split = torch.cat(parts, 2)
    assert_within(split, whole, LAW_FLOAT64)
    assert state is not None
    dy, dkv = draw(*whole.shape, seed=8), draw(*last.kv.shape, seed=9)
    grads = [torch.autograd.grad((y, t.kv), leaves, (dy, dkv)) for y, t in ((split, state), (whole, last))]
    for g, expected in zip(*grads):
        assert_within(g, expected, LAW_FLOAT64)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_whole(device: torch.device, backend: str, kind: str) -> None:
    skip_slow(backend, device)
    one = inputs(L=20, kind=kind, device=device)
    expected = linear_attention(**one, causal=True, backend=backend)
    state = None
    rest = {n: x for n, x in one.items() if n not in ("q", "k", "v")}
    for i in range(20):
        q, k, v = (one[n][:, :, i] for n in "qkv")
        y, state = linear_attention_step(q, k, v, state, **rest, backend=backend)
        assert_within(y, expected[:, :, i], LAW_FLOAT64)
    assert isinstance(state, State)


@pytest.mark.parametrize("kind", ("positive", "relu"))
def test_state_behind_no_token(device: torch.device, backend: str, kind: str) -> None:
    """It is the state before, and so are the gradients."""
    if backend == "native" and device.type == "cuda":
        pytest.skip("the native kernel has no gradient of a state")
    one = inputs(L=5, kind=kind, device=device, dtype=torch.float32)
    kv, z, log_scale = state_of(one)
    none = one | {n: one[n][:, :, :0] for n in "qkv"}
    start = State(kv.requires_grad_(), z.requires_grad_(), log_scale)
    y, after = linear_attention(**none, causal=True, state=start, return_state=True, backend=backend)
    bar = LINEAR_ATTENTION[torch.float32]
    assert_within(after.kv * after.log_scale.exp().unsqueeze(-1), kv * log_scale.exp().unsqueeze(-1), bar)
    for outputs, expected in (((after.kv * 3).sum() + after.z.sum(), (3.0, 1.0)), (y.sum(), (0.0, 0.0))):
        for gradient, value in zip(torch.autograd.grad(outputs, (kv, z), retain_graph=True), expected):
            assert_within(gradient, torch.full_like(gradient, value), bar)


def test_state_without_values(device: torch.device, backend: str) -> None:
    """Weights alone: z goes on, and its gradient back, as with values."""
    skip_slow(backend, device)
    one = inputs(device=device, L=5)
    state = state_of(one)
    found = []
    for V in (5, 0):
        z = state.z.clone().requires_grad_()
        start = State(state.kv[..., :V], z, state.log_scale)
        options = dict(causal=True, state=start, return_state=True, backend=backend)
        y, after = linear_attention(**one | {"v": one["v"][..., :V]}, **options)
        assert y.shape[-1] == V
        found.append((after.z.detach(), *torch.autograd.grad(after.z.sum(), z)))
    for some, none in zip(*found):
        assert_within(none, some, LAW_FLOAT64)


def test_zeros_are_no_keys(device: torch.device, backend: str) -> None:
    """A state of zeros, of any scale, is as none at all."""
    skip_slow(backend, device)
    one = inputs(device=device)
    one["k"] = one["k"] * 20
    state = State(
        *(torch.zeros(s, dtype=torch.float64, device=device) for s in ((2, 2, 12, 5), (2, 2, 12), (2, 2, 12)))
    )
    expected = linear_attention(**one, causal=True, backend=backend)
    assert_within(linear_attention(**one, causal=True, state=state, backend=backend), expected, LAW_FLOAT64)


@pytest.mark.parametrize("kind", ("positive", "hyperbolic", "relu", "trigonometric"))
def test_gradcheck_of_the_state(device: torch.device, backend: str, kind: str) -> None:
    """Of all that a state is, and of what follows from it; log_scale is constant to autograd, so S = exp(c) kv."""
    skip_slow(backend, device)
    one = inputs(1, 2, 1, 4, 3, 2, 3, kind=kind, device=device)
    F = 6 if kind in ("hyperbolic", "trigonometric") else 3
    state = (
        draw(1, 1, F, 2, device=device),
        draw(1, 1, F, seed=5, device=device).abs(),
        draw(1, 1, F, device=device) / 4,
    )
    exponential = kind not in ("relu", "trigonometric")
    state = state if exponential else (*state[:2], torch.zeros_like(state[2]))

    def f(q: Tensor, k: Tensor, v: Tensor, omega: Tensor, kv: Tensor, z: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y, last = linear_attention(
            q, k, v, omega, kind, causal=True, state=State(kv, z, c), return_state=True, backend=backend,
            normalize=kind != "trigonometric",
        )  # fmt: skip
        size = last.log_scale.exp()
        return y, size.unsqueeze(-1) * last.kv, size * last.z

    tensors = [one[n] for n in ("q", "k", "v", "omega")]
    leaves = [x.clone().requires_grad_() for x in (*tensors, *state)]
    if not exponential:
        leaves[-1].requires_grad_(False)
    assert gradcheck(f, leaves, nondet_tol=0.0)


def test_log_scale_has_no_gradient(device: torch.device, backend: str) -> None:
    skip_slow(backend, device)
    one = inputs(device=device)
    one["k"].requires_grad_()
    _, state = linear_attention(**one, causal=True, return_state=True, backend=backend)
    assert state.kv.requires_grad and state.z.requires_grad and not state.log_scale.requires_grad


# PyTorch's machinery -------------------------------------------------------------------------------------------------


def state_of(one: dict[str, Any]) -> State:
    _, state = linear_attention(**one, causal=True, return_state=True, backend="reference")
    return State(*(x.detach() for x in state))


def arguments_of(one: dict[str, Any], backend: str, causal: bool, state: State | None) -> tuple[Any, ...]:
    parts: tuple[Any, ...] = state or (None, None, None)
    mask = torch.ones(one["k"].shape[0], one["k"].shape[2], dtype=torch.bool, device=one["k"].device)
    head = (one["q"], one["k"], one["v"], one.get("omega"), one["kind"], causal, 0.7, one.get("a"), 0.0, True)
    return (*head, mask, None, *parts, True, backend)


def test_triton_kernels_fit_a_gpu() -> None:
    """They compile for Hopper, within its shared memory: interpreted kernels do not show it."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_triton.py")
    path = os.pathsep.join((str(script.parents[2]), environment.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, script], env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "17 kernels compiled"


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "huge"), ((1.0, 1.0), (4.0, 1.0), (1.0, 1e3)), ids=("normal", "large", "one-huge"))
@pytest.mark.parametrize(("H", "L", "M"), ((2, 200, 128), (4, 129, 64), (2, 5000, 128)), ids=str)
def test_causal_gradients_on_hopper(H: int, L: int, M: int, size: float, huge: float) -> None:
    """Of long and short heads, however much exponents differ within a tile; nothing flows to what comes later."""
    where: dict[str, Any] = dict(device=torch.device("cuda"), dtype=torch.bfloat16)
    one = inputs(1, H, 2, L, 64, 64, M, **where)
    one |= dict(q=size * one["q"], k=size * one["k"])
    one["k"][:, :, L // 2 + 7] *= huge
    names, mask = ("q", "k", "v", "omega"), draw(1, L, seed=8, device=where["device"]) < 1
    dout = draw(1, H, L, 64, seed=9, **where)
    dout[:, :, L // 2 + 20 :] = 0
    leaves = [one[n].double().requires_grad_() for n in names]
    rest: tuple[Any, ...] = ("positive", True, 64**-0.25, None, 0.0, True, mask, None, None, None, None)
    exact = torch.ops.fastrpe.linear_attention(*leaves, *rest, True, "reference")[0]
    expected = torch.autograd.grad(exact, leaves, dout.double())
    tensors = [one[n] for n in names]
    state = [x.float() for x in torch.ops.fastrpe.linear_attention(*tensors, *rest, True, "reference")[1:]]
    need_omega = huge == 1  # a huge key times what is only rounding is no gradient
    for _ in range(2):
        bwd = torch.ops.fastrpe.linear_attention_bwd
        found = bwd(dout, None, None, *tensors, *rest, *state, need_omega, "native")
        for y, x in zip(found, expected[: 4 if need_omega else 3]):
            assert (y - x).norm() <= CAUSAL_GRADIENTS * x.norm()
        for y in found[:3]:
            assert (y[:, :, L // 2 + 20 :] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize(
    ("B", "H", "Hk", "L", "S", "M"),
    ((200, 3, 3, 64, 64, 128), (150, 6, 3, 64, 49, 128), (100, 6, 3, 130, 49, 128), (150, 4, 4, 49, 197, 64)),
    ids=str,
)
@pytest.mark.parametrize("need_omega", (False, True), ids=("frozen", "learned"))
def test_gradients_of_many_short_heads(
    B: int, H: int, Hk: int, L: int, S: int, M: int, dtype: torch.dtype, need_omega: bool
) -> None:
    """Several to a block, one after another, with a projection for each head or for all; the same each time, and of a
    tile without a state."""
    where: dict[str, Any] = dict(device=torch.device("cuda"), dtype=dtype)
    q, dout = (draw(B, H, L, 64, seed=seed, **where) for seed in (0, 1))
    k, v = (draw(B, Hk, S, 64, seed=seed, **where) for seed in (2, 3))
    omega = draw(*((Hk,) if H == Hk else ()), M, 64, seed=4, **where)
    mask = draw(B, S, seed=5, device=where["device"]) < 1
    mask[1] = False
    rest: tuple[Any, ...] = ("positive", False, 64**-0.25, None, 0.0, True, mask, None, None, None, None)
    leaves = [x.double().requires_grad_() for x in (q, k, v, omega)]
    exact = torch.ops.fastrpe.linear_attention(*leaves, *rest, True, "reference")
    expected = torch.autograd.grad(exact[0], leaves, dout.double())
    state = [x.detach().float().contiguous() for x in exact[1:]]
    gone = ~mask[:, None, :, None]
    k, v = k.masked_fill(gone, math.nan), v.masked_fill(gone, math.inf)
    bwd = torch.ops.fastrpe.linear_attention_bwd
    found, again = (
        bwd(dout, None, None, q, k, v, omega, *rest, *given, need_omega, "native")[: 4 if need_omega else 3]
        for given in (state, [x.new_empty(0) for x in state] if max(L, S) <= 64 else state)
    )
    for y, other, x in zip(found, again, expected):
        assert_bitwise(y, other)
        assert (y - x).norm() <= LINEAR_GRADIENTS[dtype] * x.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
@pytest.mark.parametrize("kind", ("positive", "oprf"))
@pytest.mark.parametrize(
    ("B", "H", "Hk", "L", "S", "M"),
    (
        (600, 3, 3, 64, 64, 128),
        (600, 6, 3, 49, 64, 128),
        (900, 2, 2, 64, 7, 64),
        (400, 6, 2, 1, 49, 64),
        (2, 2, 2, 7, 1, 128),
    ),
    ids=str,
)
def test_many_short_heads(B: int, H: int, Hk: int, L: int, S: int, M: int, kind: str, dtype: torch.dtype) -> None:
    """Several to a block, one after another, with a projection for each head or for all; the same each time."""
    where: dict[str, Any] = dict(device=torch.device("cuda"), dtype=dtype)
    q = draw(B, H, L, 64, seed=0, **where)
    k, v = (draw(B, Hk, S, 64, seed=seed, **where) for seed in (2, 3))
    omega = draw(*((Hk,) if H == Hk else ()), M, 64, seed=4, **where)
    a = torch.tensor(-0.1, **where) if kind == "oprf" else None
    mask = draw(B, S, seed=5, device=where["device"]) < 1
    mask[1] = False
    rest: tuple[Any, ...] = (0.0, True, mask, None, None, None, None, False)
    op = torch.ops.fastrpe.linear_attention
    same = op(q, k, v, omega, kind, False, 64**-0.25, a, *rest, "reference")[0]
    wide = [x if x is None else x.double() for x in (q, k, v, omega, a)]
    exact = op(*wide[:4], kind, False, 64**-0.25, wide[4], *rest, "reference")[0]
    gone = ~mask[:, None, :, None]
    k, v = k.masked_fill(gone, math.nan), v.masked_fill(gone, math.inf)
    y, again = (op(q, k, v, omega, kind, False, 64**-0.25, a, *rest, "native")[0] for _ in range(2))
    assert_bitwise(y, again)
    assert_accurate(y, same, exact, dtype=dtype)


@pytest.mark.gpu
@CAUSAL
@pytest.mark.parametrize("L", (40, 150))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_exp_alone_is_exp_of_the_identity(dtype: torch.dtype, L: int, causal: bool) -> None:
    device = torch.device("cuda")
    one = inputs(2, 4, 2, L, 64, 64, 64, kind="exp", device=device, dtype=dtype)
    found = []
    for omega in (None, torch.eye(64, device=device)):
        leaves = [one[n].detach().requires_grad_() for n in "qkv"]
        y = linear_attention(*leaves, omega, "exp", causal=causal)
        is_triton = causal and dtype == torch.float16  # whose gradients need not round alike
        found.append([y] if is_triton else [y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for a, b in zip(*found):
        assert_bitwise(a, b)


@CAUSAL
@pytest.mark.parametrize("kind", ("positive", "oprf", "features"))
def test_opcheck(device: torch.device, backend: str, causal: bool, kind: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch of both operators, with dynamic shapes."""
    if backend == "triton" and device.type == "cpu" and (kind != "positive" or causal):
        pytest.skip("too slow for interpreted Triton kernels")
    on_hopper = backend == "native" and device.type == "cuda"
    if on_hopper and kind == "features":
        pytest.skip("beyond the limits of the CUDA kernels")
    sizes, dtype = ((64, 64, 64), torch.bfloat16) if on_hopper else ((3, 2, 4), torch.float32)
    one = inputs(1, 2, 1, 5, *sizes, kind=kind, device=device, dtype=dtype)
    state = state_of(one) if causal else None
    leaves = {n: x.requires_grad_() for n, x in one.items() if isinstance(x, Tensor)}
    if state is not None:
        state = State(*(x.clone().requires_grad_(n != "log_scale") for n, x in zip(State._fields, state)))
    args = arguments_of(one | leaves, backend, causal, state)
    op = torch.ops.fastrpe.linear_attention.default
    torch.library.opcheck(op, args)
    y, *last = (x.detach() for x in op(*args))
    dy = [torch.randn_like(x) for x in (y, *last[:2])]
    plain = [x.detach() if isinstance(x, Tensor) else x for x in args]
    bwd = torch.ops.fastrpe.linear_attention_bwd.default
    torch.library.opcheck(bwd, (*dy, *plain[:-2], *last, True, backend))


@CAUSAL
def test_state_that_nobody_needs(device: torch.device, backend: str, causal: bool) -> None:
    """It is not made, and changes nothing."""
    on_hopper = backend == "native" and device.type == "cuda"
    sizes, dtype = ((64, 64, 64), torch.bfloat16) if on_hopper else ((3, 2, 4), torch.float32)
    args = arguments_of(inputs(2, 2, 1, 70, *sizes, device=device, dtype=dtype), backend, causal, None)
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    op, without = torch.ops.fastrpe.linear_attention.default, (*args[:-2], False, backend)
    y, *state = op(*without)
    assert [x.numel() for x in state] == [0, 0, 0]
    assert_bitwise(y, op(*args)[0])
    torch.library.opcheck(op, without)
    with pytest.raises(RuntimeError, match="need_state must be True where an input requires grad, got False"):
        op(args[0].requires_grad_(), *without[1:])


def test_compile(device: torch.device) -> None:
    """One graph for all lengths, with the bits of eager, state and all."""

    def f(q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
        head, state = linear_attention(q, k, v, omega, causal=True, return_state=True)
        return head + linear_attention(q, k, v, omega, causal=True, state=state) + linear_attention(q, k, v, omega)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.compiler.reset()
    for i, L in enumerate((37, 41, 43)):
        one = inputs(L=L, D=9, device=device, dtype=torch.float32)
        tensors = [one[n].requires_grad_() for n in ("q", "k", "v", "omega")]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = compiled(*tensors)
        expected = f(*tensors)
        assert_bitwise(actual, expected)
        grads = [torch.autograd.grad(y.sum(), tensors) for y in (actual, expected)]
        for g, e in zip(*grads):
            assert_bitwise(g, e)


def test_export(device: torch.device) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, omega: Tensor) -> Any:
            return linear_attention(q, k, v, omega, causal=True, backend="reference")

    one = inputs(device=device, dtype=torch.float32)
    tensors = tuple(one[n] for n in ("q", "k", "v", "omega"))
    program = torch.export.export(Model(), tensors)
    assert "'reference'" in program.graph_module.code
    assert_bitwise(program.module()(*tensors), Model()(*tensors))


def test_vmap(device: torch.device, backend: str) -> None:
    skip_slow(backend, device)
    draws = [inputs(L=9, seed=10 * i, device=device) for i in range(2)]
    names = ("q", "k", "v", "omega")
    stacked = [torch.stack([d[n] for d in draws]) for n in names]

    def f(*tensors: Tensor) -> Tensor:
        y = linear_attention(*tensors, causal=True, backend=backend)
        assert isinstance(y, Tensor)
        return y

    for mapped in ((0, 1, 2, 3), (0,), (3,), (1, 2)):
        args = [stacked[i] if i in mapped else draws[0][n] for i, n in enumerate(names)]
        actual = torch.vmap(f, tuple(0 if i in mapped else None for i in range(4)))(*args)
        for j in range(2):
            assert_bitwise(actual[j], f(*(draws[j if i in mapped else 0][n] for i, n in enumerate(names))))
    leaves = [draws[0][n].requires_grad_() for n in names]
    y = f(*leaves)
    dy = torch.stack([draw(*y.shape, seed=i, device=device) for i in range(3)])
    batched = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    for j in range(3):
        for g, expected in zip(batched, torch.autograd.grad(y, leaves, dy[j], retain_graph=True)):
            assert_bitwise(g[j], expected)


@CAUSAL
def test_autocast(device: torch.device, backend: str, causal: bool) -> None:
    """q, k and v go to the autocast dtype, omega does not; wide keys beside narrow queries are no error."""
    skip_slow(backend, device)
    one = inputs(device=device, dtype=torch.float32)
    low = {n: one[n].bfloat16() for n in "qkv"}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = linear_attention(**one, causal=causal, backend=backend)
        mixed = linear_attention(**one | dict(q=low["q"]), causal=causal, backend=backend)
        total = linear_attention(**one, causal=causal, normalize=False, backend=backend)
    assert y.dtype == mixed.dtype == total.dtype == torch.bfloat16
    assert_bitwise(y, linear_attention(**one | low, causal=causal, backend=backend))
    assert_bitwise(mixed, y)


@CAUSAL
def test_deterministic_with_any_number_of_threads(causal: bool) -> None:
    one = inputs(B=1, L=700, dtype=torch.float32)
    leaves = [one[n].requires_grad_() for n in ("q", "k", "v", "omega")]
    found, threads = [], torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        y = linear_attention(**one, causal=causal)
        found.append((y, *torch.autograd.grad(y.sum(), leaves)))
    torch.set_num_threads(threads)
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            assert_bitwise(a, b)


def test_any_strides(device: torch.device, backend: str) -> None:
    skip_slow(backend, device)
    one = inputs(device=device, dtype=torch.float32)
    expected = linear_attention(**one, causal=True, backend=backend)
    strided = {
        n: torch.stack((one[n], torch.full_like(one[n], math.nan)), -1)[..., 0] for n in ("q", "k", "v", "omega")
    }
    turned = {n: one[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    for other in (strided, turned):
        leaves = {n: x.requires_grad_() for n, x in other.items()}
        y = linear_attention(**one | leaves, causal=True, backend=backend)
        assert y.is_contiguous()
        assert_same(y, expected, backend)
        for upstream in (torch.ones_like(y), torch.ones((), device=device).expand(y.shape)):
            for g in torch.autograd.grad(y, list(leaves.values()), upstream, retain_graph=True):
                assert g.isfinite().all()


def test_one_gradient_alone(device: torch.device, backend: str) -> None:
    """Asking for one gradient gives what asking for all of them does."""
    skip_slow(backend, device)
    one = inputs(device=device, kind="oprf")
    names = ("q", "k", "v", "omega", "a")

    def grads(*wanted: str) -> dict[str, Tensor]:
        leaves = {n: one[n].detach().requires_grad_() for n in wanted}
        y = linear_attention(**one | leaves, causal=True, backend=backend)
        return dict(zip(wanted, torch.autograd.grad(y, list(leaves.values()), draw(*y.shape, device=device))))

    together = grads(*names)
    for n in names:
        assert_within(grads(n)[n], together[n], LAW_FLOAT64, name=n)


@CAUSAL
def test_what_hooks_have_saved_is_used(device: torch.device, backend: str, causal: bool) -> None:
    """A projection drawn anew in place, behind the back of hooks that saved the old one: gradients are of the old."""
    skip_slow(backend, device)
    on_gpu = backend == "native" and device.type == "cuda"
    sizes, dtype = ((64, 64, 64), torch.bfloat16) if on_gpu else ((3, 2, 4), torch.float32)
    one = inputs(2, 2, 1, 70, *sizes, device=device, dtype=dtype)
    omega = one["omega"] = one["omega"].float()
    one["q"].requires_grad_()
    (expected,) = torch.autograd.grad(linear_attention(**one, causal=causal, backend=backend).sum(), one["q"])
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        y = linear_attention(**one, causal=causal, backend=backend)
    omega.mul_(2)
    assert_bitwise(torch.autograd.grad(y.sum(), one["q"])[0], expected)


def test_second_derivatives_are_refused(device: torch.device, backend: str) -> None:
    one = inputs(1, 1, 1, 3, 2, 2, 2, device=device, dtype=torch.float32)
    q = one["q"].requires_grad_()
    (dq,) = torch.autograd.grad(linear_attention(**one, backend=backend).sum(), q, create_graph=True)
    with pytest.raises(
        RuntimeError, match="linear_attention: inputs must not require grad for a second derivative, got"
    ):
        torch.autograd.grad(dq.sum(), q)


def test_million_tokens() -> None:
    """Linear in time and in memory, forward and backward."""
    one = inputs(1, 1, 1, 2**20, 16, 16, 16, dtype=torch.float32)
    q = one["q"].requires_grad_()
    start = time.perf_counter()
    for causal in (False, True):
        y = linear_attention(**one, causal=causal)
        assert y.isfinite().all()
        assert torch.autograd.grad(y.sum(), q)[0].isfinite().all()
    assert time.perf_counter() - start < MILLION_SECONDS


# Errors --------------------------------------------------------------------------------------------------------------

BAD: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    (dict(q=1), TypeError, "q must be a Tensor, got int"),
    (dict(q=torch.zeros(2, 4, 8)), ValueError, "q must have shape (B, H, L, D), got (2, 4, 8)"),
    (dict(q=torch.zeros(2, 4, 70, 8).int()), ValueError, "q must have dtype float16, bfloat16, float32, float64, got"),
    (dict(q=torch.zeros(2, 4, 70, 0)), ValueError, "q must have D > 0, got (2, 4, 70, 0)"),
    (dict(k=torch.zeros(2, 2, 70, 7)), ValueError, "k must have shape (B, Hk, S, D) with B=2, D=8, got (2, 2, 70, 7)"),
    (dict(k=torch.zeros(2, 3, 70, 8)), ValueError, "k must have a number of heads that divides H=4, got 3"),
    (
        dict(q=torch.zeros(2, 0, 70, 8), k=torch.zeros(2, 0, 70, 8)),
        ValueError,
        "k must have a number of heads that divides H=0, got 0",
    ),
    (
        dict(k=torch.zeros(2, 2, 69, 8), causal=True),
        ValueError,
        "k must have as many tokens as q, L=70, when causal, got",
    ),
    (dict(v=torch.zeros(2, 2, 69, 5)), ValueError, "v must have shape (B, Hk, S, V) with B=2, Hk=2, S=70, got"),
    (dict(v=torch.zeros(2, 2, 70, 5).half()), ValueError, "v must have dtype float32, got float16"),
    (dict(k=torch.zeros(2, 2, 70, 8, device="meta")), ValueError, "k must be on the device of q, cpu, got meta"),
    (dict(causal=1), TypeError, "causal must be a bool, got int"),
    (dict(causal="no", k=torch.zeros(2, 2, 69, 8)), TypeError, "causal must be a bool, got str"),
    (dict(normalize=None), TypeError, "normalize must be a bool, got NoneType"),
    (dict(return_state="yes"), TypeError, "return_state must be a bool, got str"),
    (dict(kind="softmax"), ValueError, "kind must be one of 'positive', 'hyperbolic', "),
    (dict(omega=None), ValueError, "omega must be given for kind 'positive', got None"),
    (dict(kind="features"), ValueError, "omega must be None for kind 'features', got (12, 8)"),
    (dict(kind="features", omega=[1.0]), ValueError, "omega must be None for kind 'features', got [1.0]"),
    (dict(omega=torch.zeros(12, 7)), ValueError, "omega must have shape (M, D) or (Hk, M, D) with Hk=2, D=8, got"),
    (dict(omega=torch.zeros(12, 8).int()), ValueError, "omega must have dtype"),
    (dict(omega=torch.zeros(12, 8, device="meta")), ValueError, "omega must be on the device of q, cpu, got meta"),
    (dict(omega=torch.zeros(0, 8)), ValueError, "omega must have at least one row, got (0, 8)"),
    (dict(kind="features", omega=None, scale=1.0), ValueError, "scale must be None for kind 'features', got 1.0"),
    (dict(scale="small"), TypeError, "scale must be a float or int or SymFloat, got str"),
    (dict(eps="small"), TypeError, "eps must be a float or int, got str"),
    (dict(eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    (dict(eps=float("nan")), ValueError, "eps must be at least 0, got nan"),
    (dict(eps=0.1, kind="trigonometric"), ValueError, "eps must be 0 for kind 'trigonometric', got 0.1"),
    (dict(a=0.1), ValueError, "a must be None for kind 'positive', got 0.1"),
    (dict(kind="oprf"), ValueError, "a must be given for kind 'oprf', got None"),
    (dict(kind="oprf", a=0.125), ValueError, "a must be less than 1/8, got 0.125"),
    (dict(kind="oprf", a="best"), TypeError, "a must be a Tensor or float or int, got str"),
    (dict(kind="oprf", a=torch.zeros(1)), ValueError, "a must have shape (), got (1,)"),
    (dict(kind="oprf", a=torch.tensor(0)), ValueError, "a must have dtype float16, bfloat16, float32, float64, got"),
    (dict(kind="oprf", a=torch.zeros((), device="meta")), ValueError, "a must be on the device of q, cpu, got meta"),
    (dict(mask=torch.ones(2, 69, dtype=torch.bool)), ValueError, "mask must have shape (B, S) with B=2, S=70, got"),
    (dict(mask=torch.ones(2, 70)), ValueError, "mask must have dtype bool, got float32"),
    (dict(mask=torch.ones(2, 70, device="meta").bool()), ValueError, "mask must be on the device of q, cpu, got meta"),
    (dict(cu_seqlens=torch.zeros(1, 2).int()), ValueError, "cu_seqlens must have shape (N + 1,), got (1, 2)"),
    (dict(cu_seqlens=torch.zeros(0).int()), ValueError, "cu_seqlens must have at least one number, got 0"),
    (dict(cu_seqlens=torch.zeros(2).long()), ValueError, "cu_seqlens must have dtype int32, got int64"),
    (
        dict(cu_seqlens=torch.zeros(2, device="meta").int()),
        ValueError,
        "cu_seqlens must be on the device of q, cpu, got",
    ),
    (dict(cu_seqlens=torch.zeros(2).int()), ValueError, "q must have B=1 and L=S=70 where sequences are packed, got"),
    (dict(return_state=True), ValueError, "return_state must be False unless causal, got True"),
    (dict(state=3, causal=True), TypeError, "state must be a State, got int"),
    (dict(state=(1, 2), causal=True), TypeError, "state must be a State, got tuple"),
    (dict(state=State(*[torch.zeros(1)] * 3)), ValueError, "state must be None unless causal, got a state"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'reference', 'native', 'triton', got 'cuda'"),
)


@pytest.mark.parametrize(("wrong", "error", "message"), BAD, ids=[f"{i}-{next(iter(b[0]))}" for i, b in enumerate(BAD)])
def test_bad_arguments(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    one = inputs(dtype=torch.float32) | wrong
    with pytest.raises(error) as raised:
        linear_attention(**one)
    assert str(raised.value).startswith(f"linear_attention: {message}")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    (
        ("kv", torch.zeros(2, 2, 12, 4), "state.kv must have shape (N, Hk, F, V) with N=2, Hk=2, F=12, V=5, got"),
        ("z", torch.zeros(2, 2, 11), "state.z must have shape (N, Hk, F) with N=2, Hk=2, F=12, got (2, 2, 11)"),
        ("log_scale", torch.zeros(2, 2, 12).double(), "state.log_scale must have dtype float32, got float64"),
        ("z", torch.zeros(2, 2, 12, device="meta"), "state.z must be on the device of q, cpu, got meta"),
    ),
)
def test_bad_states(field: str, value: Tensor, message: str) -> None:
    one = inputs(dtype=torch.float32)
    state = state_of(one)._replace(**{field: value})
    with pytest.raises(ValueError) as raised:
        linear_attention(**one, causal=True, state=state)
    assert str(raised.value).startswith(f"linear_attention: {message}")


@pytest.mark.skipif(bool(problem("native", "cpu")), reason="needs the native library")
@pytest.mark.parametrize("missing", (0, 1, 2))
def test_a_part_of_a_state_is_not_read(missing: int) -> None:
    one = inputs(dtype=torch.float32)
    args = list(arguments_of(one, "native", True, state_of(one)))
    args[12 + missing] = None
    with pytest.raises(RuntimeError, match="kv, z and log_scale must be given together"):
        torch.ops.fastrpe.linear_attention.default(*args)


@pytest.mark.parametrize("argument", ("q", "k", "v"))
@pytest.mark.parametrize("shape", ((3,), (3, 3, 3)))
def test_bad_steps(argument: str, shape: tuple[int, ...]) -> None:
    one = {n: x[:, :, 0] for n, x in inputs(dtype=torch.float32).items() if n in ("q", "k", "v")}
    blamed = "k" if argument == "q" and len(shape) == 3 else argument
    with pytest.raises(ValueError, match=rf"linear_attention_step: {blamed} must have shape"):
        linear_attention_step(**one | {argument: torch.zeros(shape)}, omega=torch.zeros(12, 8))


@pytest.mark.parametrize("argument", ("q", "k"))
def test_autocast_leaves_float64(argument: str) -> None:
    one = inputs(dtype=torch.float32)
    one[argument] = one[argument].double()
    with torch.autocast("cpu"), pytest.raises(ValueError, match="linear_attention: k must have dtype"):
        linear_attention(**one)


@pytest.mark.parametrize(
    ("values", "message"), (((0, 71), "must lie between 0 and L"), ((-1, 4), "must lie"), ((0, 9, 4), "must not fall"))
)
def test_bad_packing_is_not_read(values: tuple[int, ...], message: str) -> None:
    """What memory safety needs of numbers that only the kernel reads; where the host does not, rows are NaN."""
    one, cu_seqlens = inputs(B=1, dtype=torch.float32), torch.tensor(values, dtype=torch.int32)
    for backend, error in (("native", RuntimeError), ("reference", ValueError)):
        with pytest.raises(error, match=f"linear_attention: cu_seqlens {message}"):
            linear_attention(**one, cu_seqlens=cu_seqlens, backend=backend)
    args = arguments_of(one, "reference", True, None)
    rows, *_ = reference.linear_attention(*args[:-6], cu_seqlens, *args[-5:-2])
    assert rows.isnan().all()


@pytest.mark.parametrize(
    ("options", "limit"),
    (
        (dict(cu_seqlens=torch.tensor((0, 70), dtype=torch.int32)), "packed sequences"),
        (dict(eps=0.1), "exponential features with eps"),
        (dict(kind="trigonometric", causal=True), "trigonometric features that are causal or not normalised"),
        (dict(omega=torch.zeros(513, 8)), "D=8, V=5 and F=513"),
    ),
)
def test_limits_of_the_triton_kernels(options: dict[str, Any], limit: str) -> None:
    from fastrpe.backend import problem

    if problem("triton", "cpu"):
        pytest.skip("Triton is not interpreted here")
    with pytest.raises(NotImplementedError, match=f"linear_attention: backend must be 'reference' for {limit}, got"):
        linear_attention(**inputs(B=1, dtype=torch.float32) | options, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("M", (64, 128, 256))
@pytest.mark.parametrize("kind", ("positive", "oprf", "exp"))
def test_state_splits_the_native_kernel(kind: str, M: int) -> None:
    """Parts with a carried state, and a head divided among blocks, are as accurate as the whole by the reference."""
    one = inputs(1, 2, 1, 1500, 64, 64, M, kind=kind, device="cuda", dtype=torch.bfloat16)
    mask = draw(1, 1500, seed=6, device="cuda") > -0.5
    mask[:, :70] = False
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in one.items()}
    options: dict[str, Any] = dict(causal=True, return_state=True)
    same, exact = (linear_attention(**x, **options, mask=mask, backend="reference")[0] for x in (one, wide))
    for cuts in ((1500,), (1, 65, 700, 700, 1500)):
        state, parts, at = None, [], 0
        for end in cuts:
            part = {n: one[n][:, :, at:end] for n in "qkv"}
            y, state = linear_attention(**one | part, **options, mask=mask[:, at:end], state=state, backend="native")
            parts.append(y)
            at = end
        assert_accurate(torch.cat(parts, 2), same, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("L, causal", ((200, True), (200, False), (40000, False)))
@pytest.mark.parametrize("kind", ("positive", "oprf", "exp"))
def test_10_large_inputs_of_the_native_kernel(kind: str, L: int, causal: bool) -> None:
    """Norms from 0.1 to 30 in bfloat16, growing, falling and mixed, and one key a thousand times as large."""
    one = inputs(4, 2, 1, L, 64, 64, 128, kind=kind, device="cuda", dtype=torch.bfloat16)
    size = torch.logspace(-1, math.log10(30), L)
    mixed = size[torch.randperm(L, generator=torch.Generator().manual_seed(0))]
    late = torch.ones(L).index_fill(0, torch.tensor(100), 1000)
    size = torch.stack((size, size.flip(0), mixed, late)).cuda()[:, None, :, None]
    for n in ("q", "k"):
        one[n] = (one[n] / one[n].norm(dim=-1, keepdim=True) * size).to(torch.bfloat16)
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in one.items()}
    same, exact = (linear_attention(**x, causal=causal, backend="reference") for x in (one, wide))
    assert_accurate(linear_attention(**one, causal=causal, backend="native"), same, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", (False, True), ids=("all", "masked"))
@pytest.mark.parametrize("kind", ("positive", "oprf", "exp"))
def test_many_tokens_of_the_native_kernel(kind: str, masked: bool) -> None:
    """Heads divided among blocks that have many tiles each, with a projection for each head."""
    one = inputs(2, 8, 4, 20003, 64, 64, 128, kind=kind, device="cuda", dtype=torch.bfloat16)
    one["omega"] = draw(4, 128, 64, seed=3, device="cuda", dtype=torch.bfloat16)
    mask = draw(2, 20003, seed=6, device="cuda") > -0.5 if masked else None
    wide = {n: x.double() if isinstance(x, Tensor) else x for n, x in one.items()}
    same, exact = (linear_attention(**x, mask=mask, backend="reference") for x in (one, wide))
    y, again = (linear_attention(**one, mask=mask, backend="native") for _ in range(2))
    assert_bitwise(y, again)
    assert_accurate(y, same, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize(
    "B, H, Hk, L, S, M",
    (
        (1, 2, 2, 300, 1100, 128),
        (2, 6, 2, 77, 700, 128),
        (3, 3, 3, 129, 200, 128),
        (1, 1, 1, 1, 65, 64),
        (2, 4, 2, 90, 901, 64),
        (12, 12, 12, 129, 600, 128),
        (10, 28, 14, 70, 1025, 128),
    ),
)
def test_heads_that_two_blocks_share(B: int, H: int, Hk: int, L: int, S: int, M: int, dtype: torch.dtype) -> None:
    """Few heads, each by two blocks of the native kernel, and more, some by one: half of one masked, and gradients."""
    one = inputs(B, H, Hk, L, 64, 64, M, device="cuda", dtype=dtype)
    one |= {n: draw(B, Hk, S, 64, seed=i, device="cuda", dtype=dtype) for i, n in enumerate("kv", 1)}
    mask, dy = draw(B, S, seed=6, device="cuda") > -0.5, draw(B, H, L, 64, seed=7, device="cuda", dtype=dtype)
    mask[-1, : S // 2] = False

    def results(backend: str, to: torch.dtype) -> tuple[Tensor, ...]:
        x = {n: t.detach().to(to) if isinstance(t, Tensor) else t for n, t in one.items()}
        x["v"].requires_grad_()
        y = linear_attention(**x, mask=mask, backend=backend)
        return y.detach(), *torch.autograd.grad(y, x["v"], dy.to(to))

    for y, same, exact in zip(
        results("native", dtype), results("reference", dtype), results("reference", torch.float64)
    ):
        assert_accurate(y, same, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("L", (300, 40000))
@pytest.mark.parametrize("causal", (False, True), ids=("all", "causal"))
def test_heads_that_are_one_of_the_native_kernel(L: int, causal: bool) -> None:
    """Keys and values without a stride between heads and batches."""
    one = inputs(2, 4, 4, L, 64, 64, 128, device="cuda", dtype=torch.bfloat16)
    same = linear_attention(
        **one | {n: one[n][:1, :1].repeat(2, 4, 1, 1) for n in "kv"}, causal=causal, backend="native"
    )
    one |= {n: one[n][:1, :1].expand(2, 4, L, 64) for n in "kv"}
    assert_bitwise(linear_attention(**one, causal=causal, backend="native"), same)


@pytest.mark.gpu
def test_native_names_who_can() -> None:
    for dtype, others in ((torch.float64, "'reference'"), (torch.float32, "'triton' or 'reference'")):
        message = f"linear_attention: backend must be {others} for {str(dtype)[6:]}, got 'native'"
        with pytest.raises(NotImplementedError, match=message):
            linear_attention(**inputs(device="cuda", dtype=dtype), backend="native")
    half = inputs(D=64, V=64, M=64, device="cuda", dtype=torch.float16)
    with pytest.raises(NotImplementedError, match="must be 'triton' or 'reference' for causal float16, got 'native'"):
        linear_attention(**half, causal=True, backend="native")


def test_forward_mode_is_refused() -> None:
    one = inputs(dtype=torch.float32)
    for n in ("q", "k", "v", "omega"):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(one[n], torch.ones_like(one[n]))
            with pytest.raises(NotImplementedError, match=f"linear_attention: {n} must have no forward-mode tangent"):
                linear_attention(**one | {n: dual})
