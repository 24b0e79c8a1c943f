"""Random projections: what their rows are, exactly and in distribution."""

import pytest
import scipy.linalg
import scipy.stats
import torch
from torch import Tensor

from fastrpe.feature_maps.projections import (
    PROJECTIONS,
    gaussian,
    haar,
    hadamard,
    orthogonal,
    orthogonal_rademacher,
    precondition,
    rademacher,
    simplex,
)
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import ORTHOGONAL, SIGMAS, UNIFORM

EXACT = ORTHOGONAL[torch.float64]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def sigmas(x: Tensor) -> Tensor:
    """How many standard errors the mean over the first axis is from 0."""
    return x.mean(0).abs() / x.std(0) * len(x) ** 0.5


# All of them ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_shapes_and_generators(name: str) -> None:
    for batch in ((), (3,), (2, 0), (2, 3)):
        W = PROJECTIONS[name](5, 8, batch=batch, generator=draw())
        assert W.shape == (*batch, 5, 8) and W.dtype == torch.float64
    one, same, other = (PROJECTIONS[name](5, 8, generator=draw(seed)) for seed in (0, 0, 1))
    assert_bitwise(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(3)
    first = PROJECTIONS[name](5, 8)
    torch.manual_seed(3)
    assert_bitwise(PROJECTIONS[name](5, 8), first)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_entries_have_mean_0_and_variance_1(name: str) -> None:
    W = PROJECTIONS[name](6, 8, batch=(20_000,), generator=draw())
    assert (sigmas(W) <= SIGMAS).all()
    assert (sigmas(W.square() - 1).nan_to_num() <= SIGMAS).all()


@pytest.mark.parametrize("name", PROJECTIONS)
def test_drawn_under_another_default(name: str) -> None:
    with torch.device("meta"):
        assert PROJECTIONS[name](4, 4).device.type == "cpu"
    torch.set_default_dtype(torch.float64)
    try:
        wide = PROJECTIONS[name](4, 4, generator=draw())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_bitwise(PROJECTIONS[name](4, 4, generator=draw()), wide)


# Gaussian, orthogonal, simplex ---------------------------------------------------------------------------------------


def test_4_haar_has_no_preferred_sign() -> None:
    Q = haar(8, batch=(20_000,), generator=draw())
    assert_within(Q @ Q.mT, eye(8).expand(20_000, 8, 8), EXACT)
    assert (sigmas(Q) <= SIGMAS).all()


def test_4_without_the_signs_it_has() -> None:
    """The transposed Q of a QR decomposition as it comes, which public code takes for uniform."""
    q, _ = torch.linalg.qr(gaussian(8, 8, batch=(20_000,), generator=draw()))
    assert (sigmas(q.mT)[0, 0] > SIGMAS).all()


@pytest.mark.parametrize("M", (3, 8, 19))
def test_orthogonal_within_blocks(M: int) -> None:
    W = orthogonal(M, 8, generator=draw())
    for block in W.split(8):
        Q = block / block.norm(dim=-1, keepdim=True)
        assert_within(Q @ Q.mT, eye(len(block)), EXACT)
    fixed = orthogonal(M, 8, norms="sqrt", generator=draw())
    assert_within(fixed.norm(dim=-1), torch.full((M,), 8**0.5, dtype=torch.float64), EXACT)


def test_orthogonal_rows_have_gaussian_norms() -> None:
    """chi_D: |w|^2 has mean D and variance 2 D."""
    square = orthogonal(4, 6, batch=(20_000,), generator=draw()).square().sum(-1)
    assert (sigmas(square - 6) <= SIGMAS).all()
    assert (sigmas((square - 6).square() - 12) <= SIGMAS).all()


@pytest.mark.parametrize("D", (2, 3, 8))
def test_simplex_directions(D: int) -> None:
    W = simplex(D, D, generator=draw())
    U = W / W.norm(dim=-1, keepdim=True)
    assert_within(U @ U.mT, eye(D) - (1 - eye(D)) / (D - 1), EXACT)


# Signs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 60, 64))
def test_3_hadamard(D: int) -> None:
    H = hadamard(D)
    assert H.abs().eq(1).all()
    assert torch.equal(H @ H.mT, D * eye(D))
    if D & (D - 1) == 0:
        assert torch.equal(H, torch.from_numpy(scipy.linalg.hadamard(D)).double())


def test_3_orthogonal_rademacher_is_orthogonal() -> None:
    for D in (4, 12, 64):
        W = orthogonal_rademacher(D, D, generator=draw())
        assert W.abs().eq(1).all()
        assert torch.equal(W @ W.mT, D * eye(D))


@pytest.mark.parametrize("row", (0, 3))
def test_3_rows_are_uniform(row: int) -> None:
    """Every one of the 16 sign vectors of 4 is as likely."""
    W = orthogonal_rademacher(4, 4, batch=(50_000,), generator=draw())[:, row]
    code = ((W > 0).long() * torch.tensor([8, 4, 2, 1])).sum(-1)
    assert scipy.stats.chisquare(torch.bincount(code, minlength=16).numpy()).pvalue > UNIFORM


def test_3_permuted_columns_matter() -> None:
    """Sylvester's rows agree in the first coordinate; a permutation of its columns spreads that over all."""
    W = orthogonal_rademacher(4, 8, batch=(20_000,), generator=draw())
    agree = W[:, 0] * W[:, 1]  # 1 where two rows agree
    assert (sigmas(agree) <= SIGMAS).all()
    assert (hadamard(8)[:, 0] == 1).all()


def test_rademacher_entries() -> None:
    assert rademacher(3, 5, generator=draw()).abs().eq(1).all()


# Preconditioning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", (8, 12))
def test_preconditioning_is_orthogonal(D: int) -> None:
    for batch in ((), (2,)):
        P = precondition(eye(D).expand(*batch, D, D), generator=draw())
        assert_within(P @ P.mT, eye(D).expand(*batch, D, D), EXACT)
        assert_within(P.abs(), torch.full((*batch, D, D), D**-0.5, dtype=torch.float64), EXACT)


def test_preconditioning_spreads() -> None:
    """E |z'|_4^4 = (3 |z|^4 - 2 |z|_4^4) / D exactly, over the signs."""
    z = torch.tensor([1.0, -0.5, 0.25, 2.0, 0, 0, 0, 0], dtype=torch.float64)
    P = precondition(eye(8).expand(20_000, 8, 8), generator=draw())
    fourth = (P @ z).pow(4).sum(-1)
    expected = (3 * z.square().sum() ** 2 - 2 * z.pow(4).sum()) / 8
    assert sigmas(fourth - expected) <= SIGMAS


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: orthogonal_rademacher(5, 4),
            "orthogonal_rademacher: M must lie between 1 and D=4: no more signs are orthogonal, got 5",
        ),
        (
            lambda: orthogonal_rademacher(3, 5),
            "hadamard: D must be 1, 2 or a multiple of 4 that Sylvester's or Paley's construction reaches, got 5",
        ),
        (
            lambda: hadamard(6),
            "hadamard: D must be 1, 2 or a multiple of 4 that Sylvester's or Paley's construction reaches, got 6",
        ),
        (
            lambda: hadamard(0),
            "hadamard: D must be 1, 2 or a multiple of 4 that Sylvester's or Paley's construction reaches, got 0",
        ),
        (lambda: simplex(1, 1), "simplex: D must be at least 2, got 1"),
        (lambda: orthogonal(2, 2, norms="one"), "orthogonal: norms must be one of 'chi', 'sqrt', got 'one'"),
    ],
)
def test_bad_arguments_raise(call: object, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value) == message
