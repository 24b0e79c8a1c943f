"""Where reflections meet rotations: the signs that make a rotation of planes a reflection."""

import torch
from torch import Tensor


def plane_signs(
    size: int,
    planes: int,
    *,
    interleaved: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The diagonal (D,) of the reflection diag(1, -1) in each of the first ``planes`` planes; 1 where nothing rotates.

    With it a rotation becomes a reflection: Ref(a) = [[cos a, sin a], [sin a, -cos a]] = Rot(a) diag(1, -1).
    """
    i = torch.arange(size, device=device)
    second = (i < 2 * planes) & (i % 2 == 1) if interleaved else (planes <= i) & (i < 2 * planes)
    return 1 - 2 * second.to(dtype)
