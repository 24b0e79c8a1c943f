"""Public function of the Cayley family: the basis of Cayley-STRING from its parameters."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ...backend import resolve
from ...checks import check_dtype, check_type, fail
from .op import call
from .reference import size_of

LARGEST = 128  # D that the native kernel takes


def cayley_basis(
    params: Tensor,  # (..., D (D - 1) / 2)
    *,
    backend: str | None = None,
) -> Tensor:
    r"""The orthogonal basis of Cayley-STRING, for any number of heads.

    .. math:: P = (I - S)(I + S)^{-1} = 2 (I + S)^{-1} - I, \qquad S = -S^\top

    Equivalent to::

        S = skew(params)                                         # params above the diagonal, by rows
        P = torch.linalg.solve(eye + S, eye - S)

    I + S is never singular: its eigenvalues are 1 +- i lambda. Params of 0 give P = I.

    Args:
        params: S above its diagonal, by rows, ``(..., D (D - 1) / 2)``, any strides; float16, bfloat16, float32 or
            float64.
        backend: ``"native"`` is one kernel for the CUDA device, float32 and D up to 128; ``"reference"`` is LAPACK, or
            cuSOLVER, and takes anything. None for the fastest that runs here.

    Returns:
        P, ``(..., D, D)``, contiguous, in float32 (float64 for float64), autocast or not. Inverted in float64 by both
        backends: P^T P = I to 1e-5 in float32 and 1e-12 in float64 for norms of S up to 1000. A head with NaN or
        infinities spoils no other. Deterministic. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or choice.
        NotImplementedError: the named backend cannot serve these params.
        RuntimeError: the named backend does not run on this machine.

    Source:
        STRING (arXiv 2502.02562) section 3.2; the backward is two products with the inverse.
    """
    op = "cayley_basis"
    check_type(op, "params", params, Tensor)
    check_dtype(op, "params", params)
    if params.dim() == 0:
        raise fail(op, "params", "have shape (..., d (d - 1) / 2)", ())
    size = size_of(op, params)
    wide = params if params.dtype in (torch.float32, torch.float64) else params.float()
    serves = params.device.type == "cuda" and wide.dtype == torch.float32 and size <= LARGEST
    name = resolve(op, params.device, backend, ("native",) if serves else ())
    if name != "reference" and not (name == "native" and serves):
        raise NotImplementedError(
            f"{op}: backend must be 'reference', or 'native' for CUDA, float32 and d up to {LARGEST}, got {name!r} for "
            f"{params.device.type}, {str(wide.dtype).removeprefix('torch.')} and d={size}"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(wide).tangent is not None:
        raise NotImplementedError(f"{op}: params must have no forward-mode tangents, got one; use reverse mode")
    P: Tensor = call(wide, name)[0]
    return P
