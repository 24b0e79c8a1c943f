"""Relative position encodings: modules that turn (q, k, positions) into (q', k')."""

from .coordinates import grid_positions as grid_positions
from .coordinates import packed_positions as packed_positions
from .rope import RoPE as RoPE
from .string import CayleySTRING as CayleySTRING
from .string import CirculantSTRING as CirculantSTRING
