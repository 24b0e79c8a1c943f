"""Random features as estimates of exp(x.y): their means and errors against closed forms, and against each other."""

import functools
import math

import pytest
import torch
from torch import Tensor

from fastrpe.feature_maps import optimal_a
from fastrpe.feature_maps.projections import PROJECTIONS
from fastrpe.ops import random_features
from fastrpe.testing import random_features_mse as closed
from fastrpe.testing.asserts import assert_within
from fastrpe.testing.bars import CLOSED_FORM, FORMULA, GRID, SIGMAS, TABLE

DRAWS, M, D = 200_000, 4, 8
KINDS = ("positive", "hyperbolic", "trigonometric")
every_projection = pytest.mark.parametrize(
    "projection", ("gaussian", "orthogonal", "rademacher", "orthogonal_rademacher")
)


def vectors(size: int = D, norm: float = 0.55, angle: float | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and y of a norm, at random or at an angle: |x + y| is at most 1.1."""
    draw = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, size, dtype=torch.float64, generator=draw)
    x = x / x.norm()
    if angle is not None:
        y = y - (y @ x) * x
        y = math.cos(angle) * x + math.sin(angle) * y / y.norm()
    return norm * x, norm * y / y.norm()


@functools.lru_cache(maxsize=1)
def projections(name: str, size: int = D) -> Tensor:
    return PROJECTIONS[name](M, size, batch=(DRAWS,), generator=torch.Generator().manual_seed(1))


def estimates(kind: str, omega: Tensor, x: Tensor, y: Tensor, **options: object) -> Tensor:
    """phi(x).phi(y) for each projection: one head for each."""
    pair = torch.stack((x, y)).expand(1, len(omega), 2, -1)
    phi = random_features(pair, omega, kind, scale=1.0, **options)  # type: ignore[arg-type]
    return (phi[0, :, 0] * phi[0, :, 1]).sum(-1)


def assert_mean(found: Tensor, expected: Tensor) -> None:
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - expected) <= SIGMAS * error, f"{found.mean():.6f} against {expected:.6f} +- {error:.2g}"


# 1 and 2: means, and mean squared errors -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@every_projection
def test_1_2_mean_and_error(projection: str, kind: str) -> None:
    if kind == "hyperbolic" and projection != "gaussian":
        pytest.skip("no closed form")
    x, y = vectors()
    found = estimates(kind, projections(projection), x, y)
    assert_mean(found, closed.mean(kind, projection, x, y))
    error = (found - closed.kernel(x, y)).square().mean()
    assert_within(error, closed.mse(kind, projection, x, y, M), CLOSED_FORM)


def test_2_rademacher_is_biased() -> None:
    """The bars above tell a biased estimate from an unbiased one."""
    x, _ = vectors(norm=0.6)
    found = estimates("positive", projections("rademacher"), x, x)
    with pytest.raises(AssertionError):
        assert_mean(found, closed.kernel(x, x))


@pytest.mark.parametrize("preconditioned", (False, True))
def test_1_simplex_and_preconditioning(preconditioned: bool) -> None:
    from fastrpe.feature_maps.projections import precondition

    x, y = vectors()
    draw = torch.Generator().manual_seed(2)
    omega = PROJECTIONS["simplex"](M, D, batch=(DRAWS,), generator=draw)
    found = estimates("positive", precondition(omega, generator=draw) if preconditioned else omega, x, y)
    assert_mean(found, closed.kernel(x, y))
    error = (found - closed.kernel(x, y)).square().mean()
    assert error < closed.mse("positive", "orthogonal", x, y, M) < closed.mse("positive", "gaussian", x, y, M)


def test_table_of_relative_errors() -> None:
    """x = y of norm 1 in 16 dimensions: along an axis, spread over all, and Gaussian rows."""
    axis, spread = torch.zeros(16, dtype=torch.float64), torch.full((16,), 0.25, dtype=torch.float64)
    axis[0] = 1
    table = {
        1: (0.481852, 18.07556, 53.59815),
        16: (0.255984, 1.135023, 3.349884),
        256: (0.241867, 0.076239, 0.209368),
        10_000: (0.240950, 0.007461, 0.005360),
        1_000_000: (0.240926, 0.005672, 5.36e-5),
    }
    for rows, expected in table.items():
        found = [
            closed.mse("positive", projection, x, x, rows) / closed.kernel(x, x) ** 2
            for projection, x in (("rademacher", axis), ("rademacher", spread), ("gaussian", axis))
        ]
        error = (torch.stack(found) - torch.tensor(expected, dtype=torch.float64)).abs()
        assert (error <= TABLE * torch.tensor(expected).clamp(min=1)).all(), rows


# 5: orthogonal rows repel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ("orthogonal", "orthogonal_rademacher"))
def test_5_covariance_is_never_positive(projection: str) -> None:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 2000, 12, dtype=torch.float64, generator=draw) * torch.rand(2000, 1, generator=draw)
    C = closed.covariance("positive", projection, x, y)
    assert (C < 0).all()
    small = torch.pi / 4 * (2 * torch.rand(2000, 12, dtype=torch.float64, generator=draw) - 1)
    assert (closed.covariance("trigonometric", "orthogonal_rademacher", small, torch.zeros_like(small)) <= 0).all()


def test_5_covariance_vanishes_on_an_axis() -> None:
    x = torch.zeros(8, dtype=torch.float64)
    x[2] = 0.7
    C = closed.covariance("positive", "orthogonal_rademacher", x, x)
    assert abs(C) <= FORMULA


@pytest.mark.parametrize("pair", (("gaussian", "orthogonal"), ("rademacher", "orthogonal_rademacher")))
def test_5_orthogonal_rows_err_less(pair: tuple[str, str]) -> None:
    x, y = vectors(seed=4)
    iid, other = ((estimates("positive", projections(p), x, y) - closed.kernel(x, y)).square().mean() for p in pair)
    assert other < iid


# 8: OPRF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", (0.01, 0.5, 2.0, 10.0))
def test_8_optimal_a_is_that_of_a_grid(phi: float) -> None:
    x = torch.full((6,), (phi / 24) ** 0.5, dtype=torch.float64)
    grid = torch.arange(-3, 0.12, GRID, dtype=torch.float64)
    best = grid[closed.oprf_second_moment(grid, x, x).argmin()]
    a = optimal_a(torch.tensor(phi, dtype=torch.float64), 6)
    assert abs(best - a) <= GRID
    without = -(1 - 2 * phi - (4 * phi**2 + 12 * phi + 1) ** 0.5) / 8  # the public note's, which forgets D
    assert abs(best + without) > GRID


def test_8_optimal_a_of_zero() -> None:
    assert optimal_a(torch.zeros(()), 64) == 0
    assert optimal_a(torch.tensor(1e-12, dtype=torch.float64), 64) < 0


@pytest.mark.parametrize("projection", ("gaussian", "orthogonal"))
def test_1_8_oprf(projection: str) -> None:
    """Unbiased, of the second moment that the closed form says, and of less variance than positive features."""
    x, y = vectors()
    a = optimal_a((x + y).square().sum(), D)
    omega = projections(projection)
    found = estimates("oprf", omega, x, y, a=a)
    assert_mean(found, closed.kernel(x, y))
    assert found.var() < estimates("positive", omega, x, y).var()
    one = estimates("oprf", omega[:, :1], x, y, a=a)
    assert_within(one.square().mean(), closed.oprf_second_moment(a, x, y), CLOSED_FORM)


# 9: the angular hybrid -----------------------------------------------------------------------------------------------


def hybrid(x: Tensor, y: Tensor, rows: int, angles: int, *, reversed: bool = False, draws: int = DRAWS) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    omega, T = (torch.randn(draws, n, len(x), dtype=torch.float64, generator=draw) for n in (rows, angles))
    share = (1 - ((T @ x).sign() * (T @ y).sign()).mean(-1)) / 2
    share = 1 - share if reversed else share
    return share * estimates("hyperbolic", omega, x, y) + (1 - share) * estimates("trigonometric", omega, x, y)


@pytest.mark.parametrize("angle", (0.1, 1.0, 3.0))
def test_1_9_hybrid(angle: float) -> None:
    """Unbiased, of the error that the closed form says; with the weights swapped it errs more at both ends."""
    x, y = vectors(angle=angle)
    found = hybrid(x, y, 4, 4)
    assert_mean(found, closed.kernel(x, y))
    square = (found - closed.kernel(x, y)).square()
    assert_mean(square, closed.hybrid_mse(x, y, 4, 4))
    if angle >= 1:  # below, lambda is so seldom above 0 that draws tell no more than their standard error
        assert_within(square.mean(), closed.hybrid_mse(x, y, 4, 4), CLOSED_FORM)
    if angle != 1:
        assert square.mean() < (hybrid(x, y, 4, 4, reversed=True) - closed.kernel(x, y)).square().mean()
        assert closed.hybrid_mse(x, y, 4, 4) < closed.hybrid_mse(x, y, 4, 4, reversed=True)


def test_9_reversed_hybrid_at_its_worst() -> None:
    x, y = vectors(norm=1.2, angle=3.0)
    right, wrong = (closed.hybrid_mse(x, y, 1, 4, reversed=r) / closed.kernel(x, y) ** 2 for r in (False, True))
    assert round(float(right), 2) == 1.96 and round(float(wrong)) == 141
