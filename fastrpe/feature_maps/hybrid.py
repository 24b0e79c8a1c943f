"""Estimators of the softmax kernel combined by the angle of query and key."""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, fail
from ..ops import random_features
from .feature_map import DEFAULT, FeatureMap, check_positive


class HybridFeatures(FeatureMap):
    r"""Angular hybrid: positive features where the kernel is small, trigonometric ones where it is large.

    .. math:: K = \lambda K_+ + (1 - \lambda) K_t, \qquad \lambda = (1 - \tau(x) \cdot \tau(y)) / 2, \quad
        \tau(x) = n^{-1/2} \mathrm{sign}(T x)

    with Gaussian T independent of W: E lambda is the angle of x and y over pi, so that K is unbiased; its error is that
    of the positive features times the angle's share, and of the trigonometric ones times the rest. As one map::

        cat(phi_+, phi_t, tau x phi_+, tau x phi_t) / sqrt(2)        # keys: the third part negated

    The features have signs, so denominators may come close to 0. Their two parts share one stabilizer, |x|^2 / 2.

    Args:
        num_angles: n, rows of T.
        positive: ``"hyperbolic"`` or ``"positive"``.

    The other arguments are those of `FeatureMap`, with ``eps`` 0.

    Attributes:
        angles: T, ``(n, D)``, drawn with omega.

    Source:
        Hybrid random features (arXiv 2110.04367) section 2.2. Its public notebook weighs the parts the other way round.
    """

    angles: Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int = DEFAULT,
        *,
        num_angles: int = 8,
        positive: str = "hyperbolic",
        **options: Any,
    ) -> None:
        name = type(self).__name__
        check_choice(name, "positive", positive, ("hyperbolic", "positive"))
        check_positive(name, "num_angles", num_angles)
        if num_features != DEFAULT:
            check_positive(name, "num_features", num_features)
        if options.get("eps"):
            raise fail(name, "eps", "be 0", options["eps"])
        self._size = num_angles, head_dim
        super().__init__(head_dim, num_features, **options)
        self.positive = positive

    def forward(self, q: Tensor, k: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        self._check(q, k, causal)
        return self._hybrid(q, "row", 1.0), self._hybrid(k, None if causal else "global", -1.0)

    def _draw(self, generator: torch.Generator | None) -> None:
        super()._draw(generator)
        if "angles" not in self._buffers:
            assert self.omega is not None
            self.register_buffer("angles", torch.empty(self._size, dtype=self.omega.dtype))
        device = "cpu" if generator is None else generator.device
        self.angles.copy_(torch.randn(self._size, dtype=torch.float64, device=device, generator=generator))

    def _hybrid(self, x: Tensor, stabilizer: str | None, sign: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        omega, scale = self._omega_for(x), self.head_dim**-0.25 if self.scale is None else self.scale
        options: dict[str, Any] = dict(scale=scale, backend=self.backend)
        with torch.autocast(x.device.type, enabled=False):
            trigonometric = random_features(wide, omega, "trigonometric", stabilizer=stabilizer, **options)
            positive = random_features(wide, omega, self.positive, **options)
            if stabilizer:
                # What the trigonometric features were divided by: exp(|x|^2 / 2), of each row or the largest.
                size = (scale * wide.detach()).square().sum(-1, keepdim=True) / 2
                size = size if stabilizer == "row" or not size.numel() else size.amax(2, keepdim=True)
                positive = positive * (-size).exp()
            tau = (wide @ self.angles.to(wide.dtype).mT).sign() * self.angles.shape[0] ** -0.5
            parts = [p.unsqueeze(-2) * tau.unsqueeze(-1) for p in (sign * positive, trigonometric)]
            y = torch.cat((positive, trigonometric, *(p.flatten(-2) for p in parts)), -1) * 0.5**0.5
        return y.to(x.dtype)
