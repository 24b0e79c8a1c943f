"""STRING's bars, SPEC 2.8, items 1 to 6, and its parametrisations."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrpe.ops import rotate
from fastrpe.ops.rotary.string import (
    cayley,
    circulant_freqs,
    circulant_params,
    circulant_rotate,
    fourier_basis,
    skew,
)
from fastrpe.positions import CayleySTRING, CirculantSTRING, RoPE
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import (
    COMMUTE,
    DIFFERENT,
    EXPM,
    FOURIER,
    NO_OP,
    ORTHOGONAL,
    SHIFT,
    SKEW_RANGE,
    ZERO_GRADIENT,
)
from python_tests.positions.shared import HEADS, LENGTH, SIZE, scores, tokens

laws = settings(max_examples=10, deadline=None)
BLOCKS = ((8, None), (9, None), (12, 4), (12, 3), (15, 5))  # even and odd, whole and block-circulant


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_draw(seed))


def _spectral_norm(S: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(S.double(), 2)


# 2.8.1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ORTHOGONAL, ids=str)
@pytest.mark.parametrize("size", (2, 3, 16, 64, 128))
@pytest.mark.parametrize("norm", (0.0, 1e-3, 1.0, 30.0, SKEW_RANGE))
def test_1_cayley_is_orthogonal(dtype: torch.dtype, size: int, norm: float) -> None:
    S = skew(_normal(3, size * (size - 1) // 2))
    S = (S * (norm / _spectral_norm(S))[:, None, None]).to(dtype)
    P = cayley(S)
    assert P.dtype == dtype and P.shape == S.shape
    eye = torch.eye(size, dtype=dtype)
    assert ((P.mT @ P - eye).abs() <= ORTHOGONAL[dtype]).all()
    assert_within(
        P.double(), torch.linalg.solve(eye.double() + S.double(), eye.double() - S.double()), ORTHOGONAL[dtype]
    )


def test_1_cayley_of_zero_is_the_identity() -> None:
    assert_bitwise(cayley(torch.zeros(2, 5, 5)), torch.eye(5).expand(2, -1, -1))


def test_1_cayley_has_determinant_one() -> None:
    P = cayley(skew(_normal(4, 21)))
    assert_within(torch.linalg.det(P), torch.ones(4), ORTHOGONAL[torch.float64])


@pytest.mark.parametrize(("size", "block"), BLOCKS)
@pytest.mark.parametrize("interleaved", (False, True))
def test_1_fourier_basis_is_orthogonal(size: int, block: int | None, interleaved: bool) -> None:
    B = fourier_basis(size, block, interleaved=interleaved)
    assert ((B @ B.mT - torch.eye(size)).abs() <= ORTHOGONAL[torch.float64]).all()


def test_fourier_basis_rows() -> None:
    t = torch.arange(8, dtype=torch.float64)
    B = fourier_basis(8)
    torch.testing.assert_close(B[0], torch.full((8,), 1 / math.sqrt(8), dtype=torch.float64))
    torch.testing.assert_close(B[4], (-1) ** t / math.sqrt(8))
    torch.testing.assert_close(B[3], (2 * math.pi * 3 * t / 8).cos() / 2)
    torch.testing.assert_close(B[7], (2 * math.pi * 3 * t / 8).sin() / 2)
    assert_bitwise(fourier_basis(8, interleaved=True), B[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert_bitwise(fourier_basis(9, interleaved=True), fourier_basis(9)[[0, 4, 1, 5, 2, 6, 3, 7, 8]])
    torch.testing.assert_close(fourier_basis(9)[8], torch.full((9,), 1 / 3, dtype=torch.float64))
    assert fourier_basis(8, dtype=torch.float32).dtype == torch.float32


def test_skew_fills_the_upper_triangle_by_rows() -> None:
    S = skew(torch.tensor([1.0, 2, 3]))
    assert_bitwise(S, torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]))
    assert skew(torch.zeros(2, 0)).shape == (2, 1, 1)


# 2.8.2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("cayley", "circulant"))
@pytest.mark.parametrize("coords", (1, 2, 3))
@laws
@given(st.integers(0, 99))
def test_2_shift_invariance_in_any_dimension(kind: str, coords: int, seed: int) -> None:
    size = 24
    module: nn.Module
    if kind == "cayley":
        options = dict(coords=coords, mode="mixed", init_std=0.3, generator=_draw(seed))
        module = CayleySTRING(size, HEADS, **options)
    else:
        module = CirculantSTRING(size, HEADS, coords=coords, init_std=0.2, generator=_draw(seed))
    q, k = torch.randn(2, 1, HEADS, LENGTH, size, generator=_draw(seed))
    r = 10 * torch.rand(LENGTH, coords, generator=_draw(seed))
    shift = 10 * torch.rand(coords, generator=_draw(seed + 1))
    norms = q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert ((scores(module(q, k, r)) - scores(module(q, k, r + shift))).abs() <= SHIFT[torch.float32] * norms).all()


# 2.8.3 and 2.8.4 -----------------------------------------------------------------------------------------------------


def _generator_matrix(c: Tensor, block: int | None) -> np.ndarray:
    """L = C - C^T, block-diagonal where c falls into blocks."""
    parts = c.numpy().reshape(-1, block or len(c))
    return scipy.linalg.block_diag(*(scipy.linalg.circulant(x) - scipy.linalg.circulant(x).T for x in parts))


@pytest.mark.parametrize(("size", "block"), BLOCKS)
def test_3_fft_form_is_the_exponential_of_the_generators(size: int, block: int | None) -> None:
    c, r, x = _normal(2, 2, size), _normal(5, 2, seed=1), _normal(3, 4, 5, size, seed=2)
    y = circulant_rotate(x, r, c, block)
    for head, token in itertools.product(range(4), range(5)):
        L = sum(float(r[token, i]) * _generator_matrix(c[head // 2, i], block) for i in range(2))
        expected = torch.from_numpy(x[:, head, token].numpy() @ scipy.linalg.expm(L).T)
        assert_within(y[:, head, token], expected, EXPM)


@pytest.mark.parametrize(("size", "block"), BLOCKS)
def test_3_generators_commute(size: int, block: int | None) -> None:
    c = _normal(2, size)
    a, b = (_generator_matrix(x, block) for x in c)
    assert np.abs(a @ b - b @ a).max() <= COMMUTE


@pytest.mark.parametrize(("size", "block"), BLOCKS)
@pytest.mark.parametrize("interleaved", (False, True))
def test_4_fft_form_is_rope_in_the_fourier_basis(size: int, block: int | None, interleaved: bool) -> None:
    c, x = _normal(2, 2, size), _normal(3, 4, 5, size, seed=2)
    positions = _normal(3, 5, 2, seed=1)
    B = fourier_basis(size, block, interleaved=interleaved)
    k = x[:, :2]  # gives the two sets of frequencies their key heads
    y, yk = rotate(x, k, positions, circulant_freqs(c, block), B, interleaved=interleaved)
    assert_within(y @ B, circulant_rotate(x, positions, c, block), FOURIER)
    assert_within(yk @ B, circulant_rotate(k, positions, c, block), FOURIER)


@pytest.mark.parametrize(("size", "block"), BLOCKS)
@pytest.mark.parametrize("interleaved", (False, True))
def test_4_module_scores_are_those_of_the_fft_form(size: int, block: int | None, interleaved: bool) -> None:
    module = CirculantSTRING(size, 2, coords=2, block=block, interleaved=interleaved, generator=_draw()).double()
    q, k, positions = _normal(3, 4, 5, size), _normal(3, 2, 5, size, seed=1), _normal(5, 2, seed=2)
    expected = scores(
        (circulant_rotate(q, positions, module.c, block), circulant_rotate(k, positions, module.c, block))
    )
    assert_within(scores(module(q, k, positions)), expected, FOURIER)


@pytest.mark.parametrize("size", (3, 4, 8, 9, 16))
def test_4_rank_of_c_to_L_is_half(size: int) -> None:
    eye = np.eye(size)
    columns = [(scipy.linalg.circulant(e) - scipy.linalg.circulant(e).T).ravel() for e in eye]
    assert np.linalg.matrix_rank(np.stack(columns, 1)) == (size - 1) // 2
    jacobian = torch.autograd.functional.jacobian(circulant_freqs, _normal(size))
    assert torch.linalg.matrix_rank(jacobian) == (size - 1) // 2


@pytest.mark.parametrize(("size", "block"), [b for b in BLOCKS if (b[1] or b[0]) % 2 == 0])
@pytest.mark.parametrize("form", ("fft", "module"))
def test_4_ends_of_c_get_no_gradient(size: int, block: int | None, form: str) -> None:
    module = CirculantSTRING(size, 1, block=block, init_std=0.3, generator=_draw()).double()
    x, positions = _normal(1, 1, 6, size), _normal(6, 1, seed=1)
    y = circulant_rotate(x, positions, module.c, block) if form == "fft" else module(x, None, positions)[0]
    (y * _normal(1, 1, 6, size, seed=2)).sum().backward()
    grad = module.c.grad.unflatten(-1, (-1, block or size))
    half = grad.shape[-1] // 2
    assert (grad[..., [0, half]].abs() <= ZERO_GRADIENT).all()
    assert (grad[..., 1:half].abs() > ZERO_GRADIENT).any()


def test_the_module_gives_the_frequencies_of_the_fft() -> None:
    for size, block in BLOCKS:
        module = CirculantSTRING(size, 3, coords=2, block=block, init_std=1.0, generator=_draw()).double()
        assert_within(module.frequencies(1), circulant_freqs(module.c, block), FOURIER)


def test_circulant_params_give_the_frequencies() -> None:
    for size, block in BLOCKS:
        freqs = _normal(2, size // (block or size) * ((block or size) // 2))
        turning = circulant_freqs(circulant_params(freqs, size, block), block)
        planes = torch.arange(freqs.shape[-1]) % ((block or size) // 2)
        still = (planes == 0) & ((block or size) % 2 == 0)
        assert_within(turning, freqs.masked_fill(still, 0), FOURIER)


# 2.8.5 and 2.8.6 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_5_zero_S_is_rope_exactly(learned: bool, dtype: torch.dtype) -> None:
    q, k = tokens(dtype=dtype), tokens(dtype=dtype, seed=1)
    y = CayleySTRING(SIZE, HEADS, learned=learned)(q, k)
    for a, b in zip(y, RoPE(SIZE)(q, k)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_6_P_after_rope_changes_no_score_and_P_before_does() -> None:
    module = CayleySTRING(SIZE, HEADS, init_std=0.3, generator=_draw()).double()
    q, k, P = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1), module.basis()
    yq, yk = RoPE(SIZE).double()(q, k)
    plain = scores((yq, yk))
    assert_within(scores((yq @ P.mT, yk @ P.mT)), plain, NO_OP)  # the public bug: a no-op
    assert ((scores(module(q, k)) - plain).abs().max() >= DIFFERENT * plain.abs().max()).all()


def test_a_basis_that_commutes_with_rope_changes_no_score() -> None:
    module = RoPE(SIZE).double()
    q, k = tokens(dtype=torch.float64), tokens(dtype=torch.float64, seed=1)
    angles = torch.ones(LENGTH, 1, dtype=torch.float64), _normal(1, SIZE // 2)  # one turn of each plane for all tokens
    assert_within(scores(module(*rotate(q, k, *angles))), scores(module(q, k)), NO_OP)


# Gradients -----------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_cayley_basis() -> None:
    params = _normal(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: cayley(skew(p)), params)
    assert torch.autograd.gradgradcheck(lambda p: cayley(skew(p)), params)


def test_gradcheck_of_the_circulant_forms() -> None:
    c, x, r = _normal(2, 2, 6).requires_grad_(), _normal(1, 2, 3, 6).requires_grad_(), _normal(3, 2).requires_grad_()
    assert torch.autograd.gradcheck(circulant_rotate, (x, r, c))
    assert torch.autograd.gradcheck(lambda c: circulant_freqs(c, 3), c)


def test_gradcheck_of_every_parameter(string: nn.Module) -> None:
    module = string.double()
    names, values = zip(*module.named_parameters())
    q, k = (tokens(length=2, dtype=torch.float64, seed=s)[:1] for s in range(2))
    positions = _normal(2, module.coords)

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = torch.func.functional_call(module, dict(zip(names, values)), (q, k, positions))
        return y

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


def test_the_basis_is_never_stale() -> None:
    module = CayleySTRING(SIZE, HEADS)
    q, k, target = tokens(), tokens(seed=1), tokens(seed=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen = []
    for _ in range(3):
        y = module(q, k)
        expected = rotate(q, k, torch.arange(LENGTH).float().unsqueeze(-1), module.freqs, cayley(skew(module.skew)))
        assert_bitwise(y[0], expected[0])
        seen.append(y[0].detach())
        optimizer.zero_grad()
        (y[0] - target).square().mean().add(y[1].mean()).backward()
        optimizer.step()
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# Start ---------------------------------------------------------------------------------------------------------------


def test_numbers_of_parameters() -> None:
    d, C = SIZE, 2
    assert sum(p.numel() for p in CayleySTRING(d, 1, coords=C).parameters()) == C * d // 2 + d * (d - 1) // 2
    assert sum(p.numel() for p in CirculantSTRING(d, 1, coords=C).parameters()) == C * d


def test_cayley_starts_from_normal_draws() -> None:
    module = CayleySTRING(64, 8, init_std=0.01, generator=_draw())
    n, variance = module.skew.numel(), 2 * 0.01**2
    # Four standard errors of a sample variance
    assert abs(float(module.skew.detach().double().var()) - variance) <= 4 * variance * math.sqrt(2 / n)
    assert_bitwise(CayleySTRING(64, 8, init_std=0.01, generator=_draw()).skew, module.skew)


def test_circulant_starts_from_normal_draws() -> None:
    size, std = 64, 0.02
    module = CirculantSTRING(size, 64, init_std=std, generator=_draw())
    freqs = module.frequencies(0)[..., 1:].detach().double()
    variance = std**2 * 2 * size
    assert abs(float(freqs.var()) - variance) <= 4 * variance * math.sqrt(2 / freqs.numel())


@pytest.mark.parametrize("block", (None, 4))
def test_circulant_starts_from_rope(block: int | None) -> None:
    size, C = 16, 2
    freqs = CirculantSTRING(size, 3, coords=C, init="rope", block=block).double().frequencies(0).detach()
    still = torch.arange(size // 2) % ((block or size) // 2) == 0
    assert (freqs[..., still] == 0).all()
    turning = freqs[..., ~still]
    first, second = (len(share) for share in torch.arange(turning.shape[-1]).tensor_split(C))
    expected = torch.zeros(C, first + second, dtype=torch.float64)
    expected[0, :first] = 100.0 ** -(torch.arange(first) / first)
    expected[1, first:] = 100.0 ** -(torch.arange(second) / second)
    torch.testing.assert_close(turning, expected.expand(3, -1, -1), rtol=0, atol=torch.finfo(torch.float32).eps)


def test_odd_head_sizes() -> None:
    module = CirculantSTRING(9, HEADS, init_std=0.3)
    q, k = torch.randn(2, 1, HEADS, 5, 9)
    assert scores(module(q, k)).isfinite().all()
    assert module.frequencies(0).shape == (HEADS, 1, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CayleySTRING(8, 2, init_std=-1.0), "CayleySTRING: init_std must be at least 0, got -1.0"),
        (lambda: CayleySTRING(8, 0), "CayleySTRING: num_heads must be a positive integer, got 0"),
        (lambda: CayleySTRING(6, 2, coords=2), "CayleySTRING: rotary_dim must be a multiple of 2 C = 4, got 6"),
        (
            lambda: CirculantSTRING(8, 2, init="zero"),
            "CirculantSTRING: init must be one of 'normal', 'rope', got 'zero'",
        ),
        (lambda: CirculantSTRING(8, 2, init_std=-1.0), "CirculantSTRING: init_std must be at least 0, got -1.0"),
        (lambda: CirculantSTRING(8, 2, base=0.0), "CirculantSTRING: base must be positive, got 0.0"),
        (
            lambda: CirculantSTRING(8, 2, block=3),
            "CirculantSTRING: block must be at least 3 and divide head_dim=8, got 3",
        ),
        (lambda: CirculantSTRING(2, 2), "CirculantSTRING: block must be at least 3 and divide head_dim=2, got 2"),
        (
            lambda: CirculantSTRING(4, 2, coords=2, init="rope"),
            "CirculantSTRING: head_dim must give C=2 planes or more that turn, got 1",
        ),
        (lambda: skew(torch.zeros(4)), "skew: params must have d (d - 1) / 2 entries for some d, got 4"),
        (lambda: fourier_basis(8, 5), "fourier_basis: block must be at least 3 and divide d=8, got 5"),
    ],
)
def test_bad_arguments_raise(make: object, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()  # type: ignore[operator]
    assert str(error.value) == message
