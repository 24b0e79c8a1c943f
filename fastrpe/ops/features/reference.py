"""The specification of the random features: plain, differentiable PyTorch."""

import math

import torch
from torch import Tensor

# Kinds whose features are exponentials: the others have no exponents.
EXPONENTIAL = ("positive", "hyperbolic", "oprf", "exp")
# Kinds that estimate exp(q.k): their x is divided by D**0.25 and their exponent has its norm.
SOFTMAX = ("positive", "hyperbolic", "trigonometric", "oprf")
WITHOUT_OMEGA = ("relu", "exp", "elu")
KINDS = ("positive", "hyperbolic", "trigonometric", "oprf", "relu", "exp", "elu")
STABILIZERS = (None, "row", "global")


def random_features(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None = None,  # (M, D) or (H, M, D)
    kind: str = "positive",
    scale: float | None = None,
    eps: float = 0.0,
    a: Tensor | float | None = None,  # ()
    stabilizer: str | None = None,
) -> Tensor:
    """Reference for `fastrpe.ops.random_features`."""
    D = x.shape[-1]
    M = D if omega is None else omega.shape[-2]
    if kind in EXPONENTIAL:
        e = exponents(x, omega, kind, scale, a)
        y = (e - maximum(e, stabilizer)).exp() if stabilizer else e.exp()
    elif kind == "trigonometric":
        p, norm = project(x, omega, kind, scale), half_norm(x, kind, scale)
        size = (norm - maximum(norm, stabilizer) if stabilizer else norm).exp()
        y = torch.cat((size * p.cos(), size * p.sin()), -1)
    else:
        p = project(x, omega, kind, scale)
        y = p.relu() if kind == "relu" else torch.where(p > 0, p + 1, p.clamp(max=0).exp())
    return ((y + eps) * constant(kind, M, D, a)).to(x.dtype)


def exponents(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float | None = None,
    a: Tensor | float | None = None,  # ()
) -> Tensor:
    """Logarithms of exponential features, (B, H, L, F), in float32 or wider, less that of `constant`.

    With W = omega and x scaled: W x - |x|^2 / 2 (positive), [W x, -W x] - |x|^2 / 2 (hyperbolic),
    a |w|^2 + sqrt(1 - 4 a) W x - |x|^2 / 2 (oprf), W x or x (exp).
    """
    p = project(x, omega, kind, scale)
    if kind == "exp":
        return p
    if kind == "hyperbolic":
        p = torch.cat((p, -p), -1)
    elif kind == "oprf":
        assert omega is not None and a is not None
        square = omega.to(p.dtype).square().sum(-1).unsqueeze(-2)  # (1, M) or (H, 1, M)
        p = a * square + (1 - 4 * a) ** 0.5 * p
    return p - half_norm(x, kind, scale)


def constant(kind: str, M: int, D: int, a: Tensor | float | None = None) -> Tensor | float:
    """What multiplies the features: (1 - 4 a)^(D / 4) for oprf, and one over the root of their number."""
    if kind == "oprf":
        assert a is not None
        return (1 - 4 * a) ** (D / 4) / math.sqrt(M)
    if kind == "hyperbolic":
        return 1 / math.sqrt(2 * M)
    return 1 / math.sqrt(M) if kind in SOFTMAX else 1.0


def project(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float | None = None,
) -> Tensor:
    """W x of the scaled x, (B, H, L, M), in float32 or wider, with W rounded to the dtype of x."""
    z = _scaled(x, kind, scale)
    return z if omega is None else z @ rounded(omega, x.dtype).to(z.dtype).mT


def rounded(omega: Tensor, dtype: torch.dtype) -> Tensor:
    """A projection as tensor cores read it, in its own dtype; as autocast does with a weight, and with its gradient."""
    return omega.to(dtype).to(omega.dtype)


def half_norm(
    x: Tensor,  # (B, H, L, D)
    kind: str,
    scale: float | None = None,
) -> Tensor:
    """|x|^2 / 2 of the scaled x, (B, H, L, 1), in float32 or wider."""
    return _scaled(x, kind, scale).square().sum(-1, keepdim=True) / 2


def maximum(
    e: Tensor,  # (B, H, L, F)
    stabilizer: str,
) -> Tensor:
    """The largest exponent of each row, or of all rows of a head; no gradient flows to it."""
    dims = (-1,) if stabilizer == "row" else (-2, -1)
    return e.detach().amax(dims, keepdim=True) if e.numel() else e.new_zeros(())


def default_scale(kind: str, D: int) -> float:
    return D**-0.25 if kind in SOFTMAX and D else 1.0


def _scaled(x: Tensor, kind: str, scale: float | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * (default_scale(kind, x.shape[-1]) if scale is None else scale)


def size_of(
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
) -> int:
    """F, the number of features."""
    M = x.shape[-1] if omega is None else omega.shape[-2]
    return 2 * M if kind in ("hyperbolic", "trigonometric") else M


def random_features_bwd(
    dy: Tensor,  # (B, H, L, F)
    y: Tensor,  # (B, H, L, F)
    x: Tensor,  # (B, H, L, D)
    omega: Tensor | None,  # (M, D) or (H, M, D)
    kind: str,
    scale: float,
    eps: float,
    a: Tensor | None,  # ()
    need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and for each head the sums over rows of dp (scale x)^T, (H, M, D), and of dp, (H, M); empty if not needed."""
    wide = torch.promote_types(x.dtype, torch.float32)
    M, D = x.shape[-1] if omega is None else omega.shape[-2], x.shape[-1]
    z, dy, y = x.to(wide) * scale, dy.to(wide), y.to(wide)
    if kind == "trigonometric":
        (dcos, dsin), (cos, sin) = dy.split(M, -1), y.split(M, -1)
        dp, dnorm = dsin * cos - dcos * sin, (dy * y).sum(-1, keepdim=True)
    elif kind == "relu":
        dp, dnorm = torch.where(y > eps, dy, 0.0), None
    elif kind == "elu":
        dp, dnorm = dy * (y - eps).clamp(max=1), None
    else:
        dp = dy * (y - eps * constant(kind, M, D, a))
        dnorm = None if kind == "exp" else -dp.sum(-1, keepdim=True)
        if kind == "hyperbolic":
            dp = dp[..., :M] - dp[..., M:]
    outer = total = x.new_empty(0)
    dz = dp
    if omega is not None:
        dz = dp @ (omega if a is None else omega * (1 - 4 * a).sqrt())
        if need_sums:
            outer, total = torch.einsum("bhlm,bhld->hmd", dp, z), dp.sum((0, 2))
    if dnorm is not None:
        dz = dz + dnorm * z
    return (dz * scale).to(x.dtype).contiguous(), outer, total


def fwht(
    x: Tensor,  # (..., D)
    scale: float = 1.0,
) -> Tensor:
    """Reference for `fastrpe.ops.features.fwht`."""
    D, y = x.shape[-1], x.to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < D:
        pair = y.unflatten(-1, (D // (2 * half), 2, half))
        y = torch.stack((pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]), -2).flatten(-3)
        half *= 2
    return (y * scale).to(x.dtype)
