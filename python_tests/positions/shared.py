"""Encodings that all tests of positions share, each with parameters away from their start."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastrpe.positions import (
    CayleySTRING,
    CirculantSTRING,
    PeriodicRoPE,
    ReflectionBasis,
    ReflectionRoPE,
    RoPE,
    grid_positions,
)

HEADS, SIZE, LENGTH = 2, 16, 12


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


ENCODINGS: dict[str, Callable[[], nn.Module]] = {
    "rope": lambda: RoPE(SIZE),
    "rope-partial-interleaved": lambda: RoPE(SIZE, rotary_dim=12, interleaved=True),
    "rope-axial": lambda: RoPE(SIZE, coords=2),
    "rope-learned-axial-3": lambda: RoPE(SIZE, coords=3, groups=(3, 3, 2), learned=True),
    "rope-mixed": lambda: RoPE(SIZE, coords=2, mode="mixed", num_heads=HEADS, generator=_draw()),
    "rope-mixed-learned": lambda: RoPE(SIZE, coords=2, mode="mixed", num_heads=HEADS, learned=True, generator=_draw()),
    "rope-yarn": lambda: RoPE(
        SIZE,
        scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1},
    ),
    "rope-dynamic": lambda: RoPE(
        SIZE, scaling={"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8}
    ),
    "cayley": lambda: CayleySTRING(SIZE, HEADS, init_std=0.2, generator=_draw()),
    "cayley-mixed": lambda: CayleySTRING(SIZE, HEADS, coords=2, mode="mixed", init_std=0.2, generator=_draw()),
    "cayley-fixed-freqs": lambda: CayleySTRING(SIZE, HEADS, learned=False, init_std=0.2, generator=_draw()),
    "circulant": lambda: CirculantSTRING(SIZE, HEADS, init_std=0.1, generator=_draw()),
    "circulant-rope": lambda: CirculantSTRING(SIZE, HEADS, coords=2, init="rope"),
    "circulant-block-3": lambda: CirculantSTRING(
        SIZE, HEADS, coords=3, block=8, interleaved=True, init_std=0.1, generator=_draw()
    ),
    "reflection": lambda: ReflectionBasis(SIZE, HEADS, layers=3, block=4, generator=_draw()),
    "reflection-mixed": lambda: ReflectionBasis(SIZE, HEADS, coords=2, mode="mixed", generator=_draw()),
    "reflection-rope": lambda: ReflectionRoPE(SIZE, num_heads=HEADS, learned=True),
    "reflection-rope-partial-interleaved": lambda: ReflectionRoPE(
        SIZE, num_heads=HEADS, coords=2, learned=True, rotary_dim=12, interleaved=True
    ),
    "periodic": lambda: PeriodicRoPE(SIZE, (None, 12.0)),
}


def tokens(heads: int = HEADS, length: int = LENGTH, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """(2, heads, length, SIZE)"""
    return torch.randn(2, heads, length, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def points(coords: int, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> Tensor:
    """Positions (length, coords): token numbers, the patches of an image, or scattered points."""
    if coords == 1:
        return torch.arange(length, dtype=dtype).unsqueeze(-1)
    if coords == 2:
        return grid_positions(LENGTH, 3, dtype=dtype)[:length]
    return 14 * torch.rand(length, coords, dtype=dtype, generator=torch.Generator().manual_seed(1))


def scores(pair: tuple[Tensor, Tensor]) -> Tensor:
    q, k = pair
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
