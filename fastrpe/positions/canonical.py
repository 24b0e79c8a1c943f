"""Coordinates in which rotations and scalings are translations, for encodings that should not see them.

A relative encoding sees differences of coordinates alone. In the coordinates of a commutative group of transformations
that group acts by translation, so all scores stay as they are when it transforms all points together (STRING, arXiv
2502.02562, on Abelian Lie groups). An angle has a period; `PeriodicRoPE` gives it frequencies that have it, too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_shape, fail
from .rope import RoPE


def log_polar(
    positions: Tensor,  # (L, 2) or (B, L, 2)
    *,
    least: float = 1e-6,
) -> Tensor:
    """(x, y) as (log rho, angle): a scaling about the origin shifts the first, a rotation the second.

    Args:
        positions: Cartesian coordinates, relative to the centre (subtract it first).
        least: a smaller rho counts as this one, so that the origin has a logarithm; half a patch, for patches. The
            origin's angle is 0. Scores are exactly invariant for points farther out.

    Returns:
        The shape of ``positions``; the angle lies in [-pi, pi] and jumps by 2 pi across the negative x axis, which
        frequencies must not see: they are whole numbers (`PeriodicRoPE`, ``periods=(None, 2 * math.pi)``).
    """
    check_shape("log_polar", "positions", positions, ("L", "C"), ("B", "L", "C"), C=2)
    log_rho, angle = _polar("log_polar", positions[..., 0], positions[..., 1], least)
    return torch.stack((log_rho, angle), -1)


def cylindrical(
    positions: Tensor,  # (L, 3) or (B, L, 3)
    *,
    least: float = 1e-6,
) -> Tensor:
    """(x, y, z) as (angle, z, log rho): rotations about the z axis and shifts along it are translations.

    Args:
        positions: Cartesian coordinates, relative to a point of the axis; the axis last.
        least: as for `log_polar`, for the distance rho from the axis.

    Returns:
        The shape of ``positions``; the angle is `log_polar`'s (``periods=(2 * math.pi, None, None)``).
    """
    check_shape("cylindrical", "positions", positions, ("L", "C"), ("B", "L", "C"), C=3)
    log_rho, angle = _polar("cylindrical", positions[..., 0], positions[..., 1], least)
    return torch.stack((angle, positions[..., 2], log_rho), -1)


class PeriodicRoPE(RoPE):
    r"""RoPE for coordinates with a period: angles, directions, hours of a day.

    A coordinate of period T has the frequencies :math:`2 \pi n / T`, n = 1, ..., g, which do not see whether T is added
    to it; the others have RoPE's. With `log_polar` or `cylindrical` coordinates scores do not change when all points
    are turned and scaled together. The frequencies do not train: between whole numbers there is no period.

    Args:
        head_dim: D, the size of a head.
        periods: the period of each coordinate, 2 pi for an angle, None where there is none.
        groups: planes of each coordinate, by default an equal share.
        base, rotary_dim, interleaved, backend: as for `RoPE`.

    Attributes:
        freqs: radians per unit of position, ``(C, R)``.
    """

    def __init__(
        self,
        head_dim: int,
        periods: Sequence[float | None],
        *,
        groups: Sequence[int] | None = None,
        base: float | None = None,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        backend: str | None = None,
    ) -> None:
        if any(period is not None and period <= 0 for period in periods):
            raise fail("PeriodicRoPE", "periods", "be positive numbers or None", tuple(periods))
        self.periods = tuple(periods)
        super().__init__(
            head_dim,
            coords=len(periods),
            groups=groups,
            base=base,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            backend=backend,
        )

    def _initial(self, learned: bool, generator: torch.Generator | None) -> tuple[Tensor, float]:
        freqs, factor = super()._initial(learned, generator)
        first = 0
        for row, period, planes in zip(freqs, self.periods, self.groups):
            if period is not None:
                n = torch.arange(1, planes + 1, dtype=freqs.dtype, device=freqs.device)
                row[first : first + planes] = n * (2 * math.pi / period)
            first += planes
        return freqs, factor

    def _describe(self) -> list[str]:
        return [*super()._describe(), f"periods={self.periods}"]


def _polar(op: str, x: Tensor, y: Tensor, least: float) -> tuple[Tensor, Tensor]:
    if least <= 0:
        raise fail(op, "least", "be positive", least)
    if not x.is_floating_point():
        x, y = x.float(), y.float()
    # The origin is kept out of both functions, which have no derivative there.
    x = torch.where((x == 0) & (y == 0), least, x)
    return torch.hypot(x, y).clamp(min=least).log(), torch.atan2(y, x)
