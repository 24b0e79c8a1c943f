"""What the operators with kernels for Hopper's tensor cores ask of a device and of a tensor."""

import functools
from math import gcd

import torch
from torch import Tensor


def is_hopper(device: int) -> bool:
    if torch.compiler.is_compiling():
        return bool(torch.cuda.get_device_properties(device).major == 9)
    return _is_hopper(device)


@functools.cache  # asking takes longer than a launch
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_properties(device).major == 9


def aligned(x: Tensor) -> Tensor:
    """x, or a copy, with every row at a multiple of 16 bytes, of 16-bit values."""
    strides = x.stride()
    if strides[-1] == 1 and gcd(*strides[:-1]) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
