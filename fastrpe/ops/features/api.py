"""Public functions of the random features: the maps phi of linear attention, and the Walsh-Hadamard transform."""

import torch
from torch import Tensor

from ...backend import resolve
from ...checks import check_choice, check_device, check_dtype, check_no_tangents, check_shape, check_type, fail
from .op import call, call_fwht
from .reference import KINDS, STABILIZERS, WITHOUT_OMEGA

LARGEST = 256  # D that the Triton kernels take


def random_features(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None = None,  # (M, D) or (H, M, D)
    kind: str = "positive",
    *,
    scale: float | None = None,
    eps: float = 0.0,
    a: Tensor | float | None = None,  # ()
    stabilizer: str | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Features whose dot products estimate, or replace, the kernel of softmax attention.

    .. math:: \phi(x) = c \, (\exp(e(x) - \max e) + \epsilon), \qquad e(x) = W x - |x|^2 / 2, \quad c = M^{-1/2}

    for positive features of the scaled x, W = omega, so that E phi(q).phi(k) = exp(q.k) for Gaussian rows. Equivalent
    to, of ``x = scale * x`` and ``p = x @ omega.mT``::

        positive       exp(p - |x|^2 / 2) / sqrt(M)
        hyperbolic     cat(exp(p), exp(-p)) * exp(-|x|^2 / 2) / sqrt(2 * M)
        trigonometric  cat(cos(p), sin(p)) * exp(|x|^2 / 2) / sqrt(M)
        oprf           exp(a * |omega|^2 + sqrt(1 - 4 * a) * p - |x|^2 / 2) * (1 - 4 * a) ** (D / 4) / sqrt(M)
        relu           relu(p)
        exp            exp(p)
        elu            elu(p) + 1

    Args:
        x: queries or keys, ``(B, H, L, D)``, any strides; float16, bfloat16, float32 or float64.
        omega: projection W, ``(M, D)`` or one for each head, ``(H, M, D)``; None for relu, exp and elu of x itself.
            It is rounded to the dtype of x, as autocast rounds a weight.
        kind: one of the rows above.
        scale: multiplies x; by default ``D ** -0.25`` for the kinds that estimate exp(q.k) (positive, hyperbolic,
            trigonometric, oprf), as attention's ``1 / sqrt(D)`` shared by queries and keys, and 1 for the others.
        eps: added to every feature before its constant, as in the formula; 0 for trigonometric.
        a: OPRF's A below 1/8, a number or a tensor of no dimensions; given for oprf alone. `optimal_a` of
            ``fastrpe.feature_maps`` finds the best.
        stabilizer: what is subtracted from the exponents: ``"row"``, each row's largest, for queries; ``"global"``, the
            largest over all rows and features of a head, for the keys of bidirectional attention alone: it looks at
            all positions; None, nothing. Both cancel in normalised attention where ``eps`` is 0. Of trigonometric
            features the exponent is ``|x|^2 / 2``; relu and elu have none.
        backend: ``"reference"``, ``"native"`` (CPU), ``"triton"`` (GPU), or None for the fastest that runs here.

    Returns:
        Features, ``(B, H, L, F)``, contiguous, of the dtype of x: F = M, 2 M for hyperbolic and trigonometric, D where
        omega is None. Computed in float32 (float64 for float64) and rounded once. With a stabilizer they are at most
        ``c (1 + eps)``, whatever x; without, they overflow where the formula does. Deterministic. Gradients flow to x,
        omega and a, not through the stabilizer's maximum.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype, device or choice.
        NotImplementedError: the named backend cannot serve this device or size.
        RuntimeError: the named backend does not run on this machine.

    Source:
        Performers (arXiv 2009.14794) lemmas 1 and 2; FAVOR++ (arXiv 2205.15317) section 3.1 for oprf.
    """
    op = "random_features"
    check_shape(op, "x", x, ("B", "H", "L", "D"))
    check_dtype(op, "x", x)
    _, H, _, D = x.shape
    if D == 0:
        raise fail(op, "x", "have D > 0", tuple(x.shape))
    check_choice(op, "kind", kind, KINDS)
    if omega is None:
        if kind not in WITHOUT_OMEGA:
            raise fail(op, "omega", f"be given for kind {kind!r}", None)
    else:
        check_shape(op, "omega", omega, ("M", "D"), ("H", "M", "D"), H=H, D=D)
        check_dtype(op, "omega", omega)
        check_device(op, "omega", omega, x.device, "x")
        if omega.shape[-2] == 0:
            raise fail(op, "omega", "have at least one row", tuple(omega.shape))
    check_choice(op, "stabilizer", stabilizer, STABILIZERS)
    if stabilizer is not None and kind in ("relu", "elu"):
        raise fail(op, "stabilizer", f"be None for kind {kind!r}", repr(stabilizer))
    if scale is not None:
        check_type(op, "scale", scale, float, int)
    check_type(op, "eps", eps, float, int)
    if not eps >= 0 or (eps and kind == "trigonometric"):  # a NaN neither
        raise fail(op, "eps", "be 0 for kind 'trigonometric'" if eps > 0 else "be at least 0", eps)
    a = _check_a(op, x, kind, a)
    name = _resolve(op, x, backend)
    check_no_tangents(op, ("x", x), ("omega", omega), ("a", a))
    y: Tensor = call(x, omega, kind, scale, eps, a, stabilizer, name)
    return y


def fwht(
    x: Tensor,  # (..., D)
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""The fast Walsh-Hadamard transform of the last axis.

    .. math:: y = s \, H_D x, \qquad H_{2 n} = \begin{pmatrix} H_n & H_n \\ H_n & -H_n \end{pmatrix}

    Equivalent to ``scale * x @ scipy.linalg.hadamard(D)``, in D log2 D additions. With ``scale = D ** -0.5`` it is
    orthogonal and its own inverse.

    Args:
        x: ``(..., D)``, any strides, D a power of two; float16, bfloat16, float32 or float64.
        scale: multiplies the result.
        backend: ``"reference"``, ``"native"`` (CPU), ``"triton"`` (GPU), or None for the fastest that runs here.

    Returns:
        ``(..., D)``, contiguous, of the dtype of x, summed in float32 (float64 for float64) and rounded once.
        Deterministic. Differentiable any number of times.

    Raises:
        TypeError, ValueError: a wrong type, shape, dtype or choice.
        NotImplementedError: the named backend cannot serve this device or size.
        RuntimeError: the named backend does not run on this machine.

    Source:
        Fino and Algazi, "Unified matrix treatment of the fast Walsh-Hadamard transform" (1976).
    """
    op = "fwht"
    check_type(op, "x", x, Tensor)
    check_dtype(op, "x", x)
    check_type(op, "scale", scale, float, int)
    D = x.shape[-1] if x.dim() else 0
    if D < 1 or D & (D - 1):
        raise fail(op, "x", "have a last axis that is a power of two", tuple(x.shape))
    name = _resolve(op, x, backend, largest=4096)
    check_no_tangents(op, ("x", x))
    y: Tensor = call_fwht(x, scale, name)
    return y


def _check_a(op: str, x: Tensor, kind: str, a: Tensor | float | None) -> Tensor | None:
    """OPRF's A as a tensor; a tensor's value is not looked at, since that would wait for the device."""
    if kind != "oprf":
        if a is not None:
            raise fail(op, "a", f"be None for kind {kind!r}", a)
        return None
    if a is None:
        raise fail(op, "a", "be given for kind 'oprf'", None)
    if not isinstance(a, Tensor):
        check_type(op, "a", a, Tensor, float, int)
        if not a < 1 / 8:
            raise fail(op, "a", "be less than 1/8", a)
        return torch.full((), a, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    check_shape(op, "a", a, ())
    check_dtype(op, "a", a)
    check_device(op, "a", a, x.device, "x")
    return a


def _resolve(op: str, x: Tensor, backend: str | None, largest: int = LARGEST) -> str:
    """Native kernels are for a CPU, Triton's for a GPU."""
    device, D = x.device, x.shape[-1]
    fits = D <= largest
    name = resolve(op, device, backend, ("native",) if device.type == "cpu" else ("triton",) if fits else ())
    if name == "native" and device.type != "cpu":
        raise NotImplementedError(
            f"{op}: backend must be 'reference' or 'triton' on {device.type}, got 'native', which is for a CPU"
        )
    if name == "triton" and not fits:
        raise NotImplementedError(f"{op}: backend must be 'reference' where D > {largest}, got 'triton' for D={D}")
    return name
