"""Closed forms for estimates of exp(x.y) by random features: their mean, their mean squared error and its parts.

Vectors x and y, (..., D), float64; M is the number of rows of the projection. With z = x + y, u = x - y,
N2 = |x|^2 + |y|^2, a positive estimate is exp(-N2 / 2) mean exp(w.z), a trigonometric one exp(N2 / 2) mean cos(w.u).
Section 4.3 of the method specification.
"""

import math

import torch
from torch import Tensor


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """What is estimated."""
    return (x * y).sum(-1).exp()


def mean(kind: str, projection: str, x: Tensor, y: Tensor) -> Tensor:
    """The mean of an estimate, which Rademacher entries make biased."""
    if not projection.endswith("rademacher"):
        return kernel(x, y)
    size = _size(x, y)
    if kind == "trigonometric":
        return (size / 2).exp() * (x - y).cos().prod(-1)
    return (-size / 2).exp() * (x + y).cosh().prod(-1)


def mse(kind: str, projection: str, x: Tensor, y: Tensor, M: int) -> Tensor:
    """The mean squared error of an estimate."""
    if kind == "hyperbolic":  # Gaussian rows
        return (1 - (-_square(x + y)).exp()) / 2 * mse("positive", projection, x, y, M)
    sign = -1 if kind == "trigonometric" else 1
    s, size = _square(x + sign * y), _size(x, y)
    if projection.endswith("rademacher"):
        bias = mean(kind, projection, x, y) - kernel(x, y)
        return _rademacher_variance(kind, x, y) / M + bias.square() + _repulsion(kind, projection, x, y, M)
    if kind == "trigonometric":
        variance = size.exp() * (1 - (-s).exp()).square() / 2
    else:
        variance = (2 * s - size).exp() * (1 - (-s).exp())
    return variance / M + _repulsion(kind, projection, x, y, M)


def covariance(kind: str, projection: str, x: Tensor, y: Tensor) -> Tensor:
    """Of the estimates by two rows of one orthogonal projection; 0 where rows are independent."""
    sign, size = (-1, -_size(x, y)) if kind == "trigonometric" else (1, _size(x, y))
    z = x + sign * y
    D = z.shape[-1]
    if projection == "orthogonal":  # exp(|w1 + w2| z_1), whose norm is that of 2 D Gaussian numbers
        s = sign * _square(z)
        return (-size).exp() * (_hypergeometric(D, D / 2, s / 2) - s.exp())
    if projection == "orthogonal_rademacher":  # two rows agree on a random half of the coordinates
        a = (2 * z).cos() if sign < 0 else (2 * z).cosh()
        return (-size).exp() * (_elementary(a, D // 2) / math.comb(D, D // 2) - ((1 + a) / 2).prod(-1))
    return torch.zeros_like(size)


def oprf_second_moment(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """E of the squared OPRF estimate by one row."""
    D, phi = x.shape[-1], _square(x + y)
    power = 2 * (1 - 4 * a) / (1 - 8 * a) * phi - _size(x, y)
    return (1 - 4 * a) ** D * (1 - 8 * a) ** (-D / 2) * power.exp()


def hybrid_mse(x: Tensor, y: Tensor, M: int, angles: int, *, reversed: bool = False) -> Tensor:
    """Of the angular hybrid with hyperbolic features, for |x| = |y|; or with the two estimates' weights swapped."""
    cosine = (x * y).sum(-1) / (_square(x) * _square(y)).sqrt()
    p = cosine.clamp(-1, 1).acos() / math.pi
    spread = (p - p * p) / angles  # the variance of lambda, whose mean is p
    one, other = ("trigonometric", "hyperbolic") if reversed else ("hyperbolic", "trigonometric")
    first, second = mse(one, "gaussian", x, y, M), mse(other, "gaussian", x, y, M)
    return (p * p + spread) * first + ((1 - p).square() + spread) * second


def masked_variance(
    form: str, x: Tensor, y: Tensor, u: Tensor, v: Tensor, M: int, pi: Tensor | None = None, *, stratified: bool = True
) -> Tensor:
    """Of an estimate of exp(x.y) (u.v) by positive features of Gaussian rows and masks u and v, (E,), not negative.

    With one row's variance K2 - K^2, tau = u.v and S2 = E (g.u)^2 (g.v)^2, it is (K2 S2 - K^2 tau^2) / M where rows are
    independent. Strata of pi leave of the second part's K^2 (S2 - tau^2) what coordinates differ within a stratum.
    Sections 3.5 and 4.6 of the method specification.
    """
    K, one = kernel(x, y), mse("positive", "gaussian", x, y, 1)
    products, tau = u * v, (u * v).sum()
    if form == "tensor":
        return tau.square() * one / M
    if form == "rademacher":
        S2 = _square(u) * _square(v) + 2 * tau.square() - 2 * _square(products)
        spread = S2 - tau.square()
    else:
        pi = torch.full_like(u, 1 / len(u)) if pi is None else pi
        a = products / pi
        S2 = (pi * a.square()).sum()
        ends = pi.cumsum(0)
        row = torch.arange(M if stratified else 1, dtype=u.dtype).unsqueeze(-1) / M
        upper = row + 1 / M if stratified else row + 1
        share = (torch.minimum(ends, upper) - torch.maximum(ends - pi, row)).clamp(min=0) / (upper - row)
        spread = (share @ a.square() - (share @ a).square()).mean()
    return (one * S2 + K.square() * spread) / M


def _rademacher_variance(kind: str, x: Tensor, y: Tensor) -> Tensor:
    if kind == "trigonometric":
        u = x - y
        return _size(x, y).exp() * ((1 + (2 * u).cos().prod(-1)) / 2 - u.cos().square().prod(-1))
    z = x + y
    return (-_size(x, y)).exp() * ((2 * z).cosh().prod(-1) - z.cosh().square().prod(-1))


def _repulsion(kind: str, projection: str, x: Tensor, y: Tensor, M: int) -> Tensor:
    return (M - 1) / M * covariance(kind, projection, x, y)


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _size(x: Tensor, y: Tensor) -> Tensor:
    return _square(x) + _square(y)


def _hypergeometric(a: float, b: float, s: Tensor) -> Tensor:
    """1F1(a; b; s) by its series."""
    term = total = torch.ones_like(s)
    for k in range(100):
        term = term * (a + k) / (b + k) * s / (k + 1)
        total = total + term
    return total


def _elementary(a: Tensor, k: int) -> Tensor:
    """The elementary symmetric polynomial of degree k of (..., D)."""
    e = torch.zeros(*a.shape[:-1], k + 1, dtype=a.dtype)
    e[..., 0] = 1
    for value in a.unbind(-1):
        e[..., 1:] = e[..., 1:] + e[..., :-1] * value.unsqueeze(-1)
    return e[..., k]
