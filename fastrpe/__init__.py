"""Any relative position encoding, on any attention kernel, at the cost of a memory copy."""

from . import ops as ops

__version__ = "0.1.0"
