"""Relative position encodings: modules that turn (q, k, positions) into (q', k')."""

from .canonical import PeriodicRoPE as PeriodicRoPE
from .canonical import cylindrical as cylindrical
from .canonical import log_polar as log_polar
from .coordinates import grid_positions as grid_positions
from .coordinates import packed_positions as packed_positions
from .reflection import ReflectionBasis as ReflectionBasis
from .reflection import ReflectionRoPE as ReflectionRoPE
from .rope import RoPE as RoPE
from .rotary import bases as bases
from .sparse import SparseCayleySTRING as SparseCayleySTRING
from .string import CayleySTRING as CayleySTRING
from .string import CirculantSTRING as CirculantSTRING
from .tensor_string import TensorSTRING as TensorSTRING
