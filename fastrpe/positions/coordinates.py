"""Positions of tokens: patches of an image, and sequences packed into one row."""

import torch
from torch import Tensor

from ..checks import check_shape, check_type, fail


def grid_positions(
    height: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Coordinates (x, y) of the patches of an image, row by row, in patch units: ``(height * width, 2)``, x the column.

    Patch i has x = i % width and y = i // width.
    """
    for argument, size in (("height", height), ("width", width)):
        check_type("grid_positions", argument, size, int, torch.SymInt)
        if size < 1:
            raise fail("grid_positions", argument, "be at least 1", size)
    x = torch.arange(width, device=device, dtype=dtype).expand(height, width)
    y = torch.arange(height, device=device, dtype=dtype).unsqueeze(-1).expand(height, width)
    return torch.stack((x, y), -1).flatten(0, 1)


def packed_positions(
    length: int,
    *,
    cu_seqlens: Tensor | None = None,  # (N + 1,) or (B, N + 1)
    lengths: Tensor | None = None,  # (N,) or (B, N)
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Positions of sequences packed into rows of ``length`` tokens: each starts again at 0.

    Args:
        length: L, the tokens of a row; known on the host, so that nothing is read back from the device.
        cu_seqlens: where sequences start and the last one ends, 0 first, integers, ``(N + 1,)``, or ``(B, N + 1)`` for
            rows packed differently (fill up with repeats of the last end).
        lengths: the lengths of the sequences instead, ``(N,)`` or ``(B, N)`` (fill up with 0).

    Returns:
        ``(L, 1)`` or ``(B, L, 1)``; padding after the last sequence starts at 0, too.
    """
    op = "packed_positions"
    if (cu_seqlens is None) == (lengths is None):
        raise fail(op, "cu_seqlens", "be given or else lengths", "both" if lengths is not None else "neither")
    if lengths is not None:
        check_shape(op, "lengths", lengths, ("N",), ("B", "N"))
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(-1), (1, 0))
    assert cu_seqlens is not None
    check_shape(op, "cu_seqlens", cu_seqlens, ("N + 1",), ("B", "N + 1"))
    starts = cu_seqlens.contiguous()
    token = torch.arange(length, device=starts.device, dtype=starts.dtype).expand(*starts.shape[:-1], length)
    sequence = torch.searchsorted(starts, token.contiguous(), right=True) - 1
    return (token - starts.gather(-1, sequence)).to(dtype).unsqueeze(-1)
