"""Public function of the reflection family: an orthogonal basis made of Householder reflections in disjoint blocks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...backend import resolve
from ...checks import check_dtype, check_no_tangents, check_type, fail

LARGEST, MOST = 128, 2048  # D and K D that the native kernel takes


def reflection_basis(
    v: Tensor,  # (..., K, D)
    block: int,
    shuffles: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    r"""An orthogonal basis that is a product of layers of reflections, for any number of heads.

    .. math:: P = F_1 \cdots F_K, \qquad F_l = \bigoplus_b \Big( I - 2 \frac{v_{lb} v_{lb}^\top}{|v_{lb}|^2} \Big)

    Equivalent to::

        P = reflect(eye, v, block, shuffles, inverse=True)       # row i is P^T e_i

    det P = (-1)^(K D / block). A v shorter than 1e-6 is not normalised to length 1: its reflection fades to the
    identity instead of dividing by 0.

    Args:
        v: the vectors of the reflections, ``v[..., l, i s : (i + 1) s]`` that of block i of layer l, ``(..., K, D)``,
            any strides; float16, bfloat16, float32 or float64.
        block: s, the size of a block; divides D.
        shuffles: for each layer, how often the coordinates are shuffled before they fall into blocks of neighbours.
            The perfect shuffle reads the coordinates, written by rows as a matrix (D / s, s), by columns.
        backend: ``"native"`` is one kernel for the CUDA device, D up to 128 and K D up to 2048; ``"reference"`` is
            PyTorch, and takes anything. None for the fastest that runs here.

    Returns:
        P, ``(..., D, D)``, contiguous, in float32 (float64 for float64), autocast or not; by the native kernel computed
        in float64. Deterministic. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or choice.
        NotImplementedError: the named backend cannot serve this v.
        RuntimeError: the named backend does not run on this machine.

    Source:
        STRING (arXiv 2502.02562) theorem 3.4, with another parametrisation of its P.
    """
    op = "reflection_basis"
    check_type(op, "v", v, Tensor)
    check_dtype(op, "v", v)
    if v.dim() < 2 or v.shape[-2] != len(shuffles):
        raise fail(op, "v", f"have shape (..., K, D) with K={len(shuffles)}", tuple(v.shape))
    K, D = v.shape[-2:]
    if block < 1 or D % block:
        raise fail(op, "block", f"be positive and divide D={D}", block)
    if any(times < 0 for times in shuffles):
        raise fail(op, "shuffles", "not be negative", min(shuffles))
    wide = v if v.dtype in (torch.float32, torch.float64) else v.float()
    serves = v.device.type == "cuda" and 0 < D <= LARGEST and K * D <= MOST
    name = resolve(op, v.device, backend, ("native",) if serves else ())
    if name != "reference" and not (name == "native" and serves):
        raise NotImplementedError(
            f"{op}: backend must be 'reference', or 'native' for CUDA, D up to {LARGEST} and K D up to {MOST}, got "
            f"{name!r} for {v.device.type}, D={D} and K={K}"
        )
    check_no_tangents(op, ("v", v))
    P: Tensor = torch.ops.fastrpe.reflection_basis(wide, block, list(shuffles), name)
    return P
