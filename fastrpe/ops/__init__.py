"""Operators: pure functions on tensors, each with a reference, native and Triton kernels."""

from .features import random_features as random_features
from .linear import linear_attention as linear_attention
from .linear import linear_attention_step as linear_attention_step
from .rotary import rotate as rotate
from .rotary import rotate_cos_sin as rotate_cos_sin
from .sparse import sparse_cayley as sparse_cayley
