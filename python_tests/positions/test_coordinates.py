"""Positions: patches of images and volumes, packed sequences, and coordinates that suit a group of transformations."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastrpe.attention import Attention
from fastrpe.positions import (
    CayleySTRING,
    CirculantSTRING,
    PeriodicRoPE,
    ReflectionBasis,
    ReflectionRoPE,
    RoPE,
    cylindrical,
    grid_positions,
    log_polar,
    packed_positions,
)
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import DIFFERENT, SHIFT
from python_tests.positions.shared import scores


def _draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_grid_is_row_major_with_x_the_column() -> None:
    grid = grid_positions(2, 3)
    assert_bitwise(grid, torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]))
    index = torch.arange(35)
    expected = torch.stack((index % 7, index // 7), -1)
    assert_bitwise(grid_positions(5, 7, dtype=torch.float64), expected.double())


def test_volume_is_row_major_with_x_the_column_and_z_the_slice() -> None:
    index = torch.arange(24)
    expected = torch.stack((index % 4, index // 4 % 3, index // 12), -1)
    assert_bitwise(grid_positions(2, 3, 4, dtype=torch.float64), expected.double())
    assert_bitwise(grid_positions(1, 3, 4)[:, :2], grid_positions(3, 4))


@pytest.mark.parametrize("kind", ("rope", "rope-mixed", "cayley", "circulant", "reflection", "reflection-rope"))
def test_a_volume_has_the_same_scores_wherever_it_is(kind: str) -> None:
    size, heads = 24, 2
    module: nn.Module
    if kind == "rope":
        module = RoPE(size, coords=3)
    elif kind == "rope-mixed":
        module = RoPE(size, coords=3, mode="mixed", num_heads=heads, generator=_draw())
    elif kind == "cayley":
        module = CayleySTRING(size, heads, coords=3, init_std=0.3, generator=_draw())
    elif kind == "circulant":
        module = CirculantSTRING(size, heads, coords=3, init_std=0.2, generator=_draw())
    elif kind == "reflection":
        module = ReflectionBasis(size, heads, coords=3, generator=_draw())
    else:
        module = ReflectionRoPE(size, coords=3)
    grid = grid_positions(2, 3, 4)
    q, k = torch.randn(2, 1, heads, len(grid), size, generator=_draw())
    here = scores(module(q, k, grid))
    bar = SHIFT[torch.float32] * q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert ((scores(module(q, k, grid + torch.tensor([5.0, -3, 7]))) - here).abs() <= bar).all()
    for axis in range(3):  # and every coordinate counts
        other = grid.clone()
        other[:, axis] *= 2
        assert (scores(module(q, k, other)) - here).abs().max() >= DIFFERENT


def _turn(points: Tensor, angle: float) -> Tensor:
    """Turn x and y."""
    cos, sin = math.cos(angle), math.sin(angle)
    x, y, *rest = points.unbind(-1)
    return torch.stack((cos * x - sin * y, sin * x + cos * y, *rest), -1)


def test_canonical_coordinates_of_known_points() -> None:
    points = torch.tensor([[1.0, 0], [0, 2], [-math.e, 0], [0, -1], [3, 3]], dtype=torch.float64)
    log_rho = torch.tensor([0, math.log(2), 1, 0, math.log(18) / 2], dtype=torch.float64)
    angle = math.pi * torch.tensor([0, 0.5, 1, -0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(log_polar(points), torch.stack((log_rho, angle), -1))
    z = torch.arange(5.0, dtype=torch.float64)
    volume = torch.cat((points, z[:, None]), -1)
    torch.testing.assert_close(cylindrical(volume), torch.stack((angle, z, log_rho), -1))
    assert_bitwise(cylindrical(volume.expand(2, -1, -1))[1], cylindrical(volume))
    assert_bitwise(log_polar(torch.tensor([[3, 4]])), log_polar(torch.tensor([[3.0, 4]])))


def test_the_origin_has_finite_coordinates_and_gradients() -> None:
    points = torch.tensor([[0.0, 0], [0.1, 0], [2, 0]], requires_grad=True)
    y = log_polar(points, least=0.5)
    torch.testing.assert_close(y[:, 0], torch.tensor([0.5, 0.5, 2]).log())
    assert not y[:, 1].any()
    y.sum().backward()
    assert points.grad.isfinite().all() and points.grad[2].all()
    assert log_polar(torch.zeros(1, 2)).isfinite().all()


@pytest.mark.parametrize("scale", (1.0, 0.3, 40.0))
@pytest.mark.parametrize("angle", (0.0, 0.7, 3.1))
def test_turning_and_scaling_an_image_changes_no_score(scale: float, angle: float) -> None:
    module = PeriodicRoPE(24, (None, 2 * math.pi))
    grid = grid_positions(4, 5) - torch.tensor([2.0, 1.5])
    grid = grid + torch.tensor([0.1, 0.2])  # no patch at the origin, or on the cut
    q, k = torch.randn(2, 1, 2, len(grid), 24, generator=_draw())
    bar = SHIFT[torch.float32] * q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    here = scores(module(q, k, log_polar(grid)))
    there = log_polar(scale * _turn(grid, angle))
    assert ((scores(module(q, k, there)) - here).abs() <= bar).all()
    if angle:
        wrapped = (there - log_polar(grid))[:, 1]
        assert wrapped.max() - wrapped.min() > math.pi  # some points crossed the cut,
        plain = RoPE(24, coords=2)  # which other frequencies see
        gap = scores(plain(q, k, there)) - scores(plain(q, k, log_polar(grid)))
        assert gap.abs().max() >= DIFFERENT


def test_turning_a_volume_about_its_axis_and_moving_it_along_changes_no_attention() -> None:
    dim = 48
    torch.manual_seed(0)
    attention = Attention(dim, 2, position=PeriodicRoPE(24, (2 * math.pi, None, None))).double()
    grid = grid_positions(2, 3, 4, dtype=torch.float64) - torch.tensor([1.6, 1.1, 0])
    x = torch.randn(2, len(grid), dim, dtype=torch.float64, generator=_draw())

    def attend(points: Tensor) -> Tensor:
        y: Tensor = attention(x, positions=cylindrical(points))
        return y

    moved = 2.5 * _turn(grid, 2.0)
    moved[:, 2] = grid[:, 2] + 5
    assert_within(attend(moved), attend(grid), SHIFT[torch.float64])
    moved[:, 0] *= 2
    assert (attend(moved) - attend(grid)).abs().max() > SHIFT[torch.float64]


def test_periodic_frequencies() -> None:
    module = PeriodicRoPE(16, (24.0, None), groups=(3, 5))
    expected = torch.zeros(2, 8, dtype=torch.float64)
    expected[0, :3] = torch.arange(1, 4) * 2 * math.pi / 24
    expected[1, 3:] = 100.0 ** -(torch.arange(5) / 5)
    torch.testing.assert_close(module.freqs, expected.float())
    assert "periods=(24.0, None)" in repr(module)
    q, k = torch.randn(2, 1, 2, 5, 16, generator=_draw())
    r = 24 * torch.rand(5, 2, generator=_draw())
    days = torch.tensor([[1.0], [0], [-3], [2], [5]]) * torch.tensor([24.0, 0])
    bar = SHIFT[torch.float32] * q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)
    assert ((scores(module(q, k, r + days)) - scores(module(q, k, r))).abs() <= bar).all()


def test_packed_positions_start_again() -> None:
    expected = torch.tensor([0.0, 1, 2, 0, 0, 1, 0, 1])[:, None]
    for cu in (torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 4, 6], dtype=torch.int32)):
        assert_bitwise(packed_positions(8, cu_seqlens=cu), expected)  # the last two are padding
    assert_bitwise(packed_positions(8, lengths=torch.tensor([3, 1, 0, 2])), expected)
    assert packed_positions(8, lengths=torch.tensor([8]), dtype=torch.float64).dtype == torch.float64


def test_packed_positions_of_a_batch() -> None:
    rows = [[0, 2, 5, 5], [0, 1, 4, 5]]
    batch = packed_positions(5, cu_seqlens=torch.tensor(rows))
    assert_bitwise(batch, torch.stack([packed_positions(5, cu_seqlens=torch.tensor(r)) for r in rows]))
    assert_bitwise(batch, packed_positions(5, lengths=torch.tensor([[2, 3, 0], [1, 3, 1]])))


def test_packed_sequences_are_encoded_as_on_their_own() -> None:
    module, q = RoPE(8), torch.randn(1, 2, 7, 8)
    y, _ = module(q, None, packed_positions(7, lengths=torch.tensor([4, 3])))
    assert_bitwise(y, torch.cat([module(x, None)[0] for x in q.split([4, 3], 2)], 2))


def test_packed_positions_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(packed_positions, fullgraph=True, backend="eager")
    cu = torch.tensor([0, 3, 4, 6])
    assert_bitwise(compiled(8, cu_seqlens=cu), packed_positions(8, cu_seqlens=cu))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "grid_positions: height must be at least 1, got 0", lambda: grid_positions(0, 2)),
        (TypeError, "grid_positions: width must be a int or SymInt, got float", lambda: grid_positions(1, 2.0)),
        (ValueError, "grid_positions: depth must be at least 1, got -1", lambda: grid_positions(-1, 2, 2)),
        (
            ValueError,
            "grid_positions: sizes must be height, width or depth, height, width, got 1 numbers",
            lambda: grid_positions(3),
        ),
        (
            ValueError,
            "log_polar: positions must have shape (L, C) or (B, L, C) with C=2, got (4, 3)",
            lambda: log_polar(torch.ones(4, 3)),
        ),
        (
            ValueError,
            "cylindrical: positions must have shape (L, C) or (B, L, C) with C=3, got (4, 2)",
            lambda: cylindrical(torch.ones(4, 2)),
        ),
        (ValueError, "log_polar: least must be positive, got 0", lambda: log_polar(torch.ones(4, 2), least=0)),
        (
            ValueError,
            "PeriodicRoPE: periods must be positive numbers or None, got (None, 0.0)",
            lambda: PeriodicRoPE(8, (None, 0.0)),
        ),
        (
            ValueError,
            "packed_positions: cu_seqlens must be given or else lengths, got neither",
            lambda: packed_positions(3),
        ),
        (
            ValueError,
            "packed_positions: cu_seqlens must be given or else lengths, got both",
            lambda: packed_positions(3, cu_seqlens=torch.tensor([0, 3]), lengths=torch.tensor([3])),
        ),
        (
            ValueError,
            "packed_positions: lengths must have shape (N,) or (B, N), got (1, 1, 1)",
            lambda: packed_positions(3, lengths=torch.ones(1, 1, 1, dtype=torch.long)),
        ),
        (
            ValueError,
            "packed_positions: cu_seqlens must have shape (N + 1,) or (B, N + 1), got ()",
            lambda: packed_positions(3, cu_seqlens=torch.tensor(3)),
        ),
    ],
)
def test_bad_arguments_raise(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value) == message
