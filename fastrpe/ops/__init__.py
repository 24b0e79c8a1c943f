"""Operators: pure functions on tensors, each with a reference, native and Triton kernels."""

from .rotary import rotate as rotate
from .rotary import rotate_cos_sin as rotate_cos_sin
from .sparse import sparse_cayley as sparse_cayley
