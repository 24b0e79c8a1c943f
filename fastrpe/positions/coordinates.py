"""Positions of tokens: patches of an image, and sequences packed into one row."""

import torch
from torch import Tensor

from ..checks import check_shape, check_type, fail


def grid_positions(*sizes: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Coordinates of the patches of an image or a volume, row by row, in patch units, x (the column) first.

    Args:
        sizes: ``height, width`` of an image, which gives (x, y), ``(height * width, 2)``, patch i at x = i % width and
            y = i // width; or ``depth, height, width`` of a volume or a film, which gives (x, y, z),
            ``(depth * height * width, 3)``.
    """
    op = "grid_positions"
    if len(sizes) not in (2, 3):
        raise fail(op, "sizes", "be height, width or depth, height, width", f"{len(sizes)} numbers")
    for argument, size in zip(("depth", "height", "width")[-len(sizes) :], sizes):
        check_type(op, argument, size, int, torch.SymInt)
        if size < 1:
            raise fail(op, argument, "be at least 1", size)
    axes = [torch.arange(n, device=device, dtype=dtype) for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).flatten(0, -2)


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
