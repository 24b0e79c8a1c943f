"""Learned feature maps, which start as Performer-ReLU or Performer-exp."""

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, fail
from .feature_map import FeatureMap, check_positive


class LearnableFeatures(FeatureMap):
    r"""Performer-f_theta: attention of the kernel f(q).f(k) with a learned, positive f.

    .. math:: f(x)_m = \begin{cases}
        b_m + \epsilon & \text{projection} \\
        \sum_p c_{mp} \, b_m^p + \epsilon & \text{polynomial} \\
        b_m + g_m \, \mathrm{softplus}(V_2 \, \mathrm{gelu}(V_1 x))_m + \epsilon & \text{mlp}
        \end{cases} \qquad b = \mathrm{base}(W x)

    At the start f is Performer-ReLU or, up to a factor that attention cancels, Performer-exp, and learns from there:

    - ``"projection"``: W is the identity at first where M = D, otherwise a drawn projection. Of a kind that attention
      kernels compute themselves.
    - ``"polynomial"``: p = 0 ... degree and c >= 0, at first c_m1 = 1 alone. A c whose update would make it negative is
      0 but keeps its gradient.
    - ``"mlp"``: V with biases, and g >= 0, at first 0.

    Args:
        num_features: M; None for D.
        form: one of the above.
        base: ``"relu"`` or ``"exp"``.
        degree: of the polynomial.
        hidden: size of the hidden layer of the MLP; by default 2 M.
        eps: added to every feature: by default 1e-3 for relu and 0 for exp.

    The other arguments are those of `FeatureMap`. Polynomials and MLPs of exp have no stabilizer: q and k should be of
    moderate size there (normalised, say).

    Attributes:
        omega: W, a parameter.
        coefficients: c, ``(M, degree + 1)``.
        gate: g, ``(M,)``.

    Source:
        Performers (arXiv 2009.14794) section 4.3, generalized attention, with a learned f.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = None,
        *,
        form: str = "polynomial",
        base: str = "relu",
        degree: int = 3,
        hidden: int | None = None,
        eps: float | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        check_choice(name, "form", form, ("projection", "polynomial", "mlp"))
        check_choice(name, "base", base, ("relu", "exp"))
        check_positive(name, "degree", degree)
        if hidden is not None:
            check_positive(name, "hidden", hidden)
        if options.get("redraw_every"):
            raise fail(name, "redraw_every", "be 0: its projection is learned", options["redraw_every"])
        self.form, self.base = form, base
        self.kind = base if form == "projection" else None
        self._identity = num_features in (None, head_dim)
        M = head_dim if num_features is None else num_features
        floor = 1e-3 if base == "relu" else 0.0
        super().__init__(head_dim, M, eps=floor if eps is None else eps, **options)
        omega = self.omega
        assert omega is not None
        del self.omega
        self.omega = nn.Parameter(omega)
        if form == "polynomial":
            self.coefficients = nn.Parameter(torch.zeros(M, degree + 1))
        elif form == "mlp":
            self.mlp = nn.Sequential(
                nn.Linear(head_dim, hidden or 2 * M), nn.GELU(), nn.Linear(hidden or 2 * M, M), nn.Softplus()
            )
            self.gate = nn.Parameter(torch.zeros(M))
        self._start()

    def forward(self, q: Tensor, k: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        if self.kind is not None:
            return super().forward(q, k, causal=causal)
        self._check(q, k, causal)
        return self._learned(q), self._learned(k)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        super().reset_parameters(generator)
        if self.form == "mlp":
            for layer in self.mlp:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        if self._identity:
            assert self.omega is not None
            self.omega.copy_(torch.eye(self.head_dim, dtype=self.omega.dtype, device=self.omega.device))
        if self.form == "polynomial":
            self.coefficients.zero_()
            self.coefficients[:, 1] = 1
        elif self.form == "mlp":
            self.gate.zero_()

    def _learned(self, x: Tensor) -> Tensor:
        omega = self._omega_for(x)
        assert omega is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) * (1.0 if self.scale is None else self.scale)
        with torch.autocast(x.device.type, enabled=False):
            p = wide @ omega.to(wide.dtype).mT
            y = p.relu() if self.base == "relu" else p.exp()
            if self.form == "polynomial":
                c = _at_least_zero(self.coefficients).to(y.dtype)
                total = c[:, -1]
                for i in range(c.shape[1] - 2, -1, -1):  # Horner
                    total = total * y + c[:, i]
                y = total
            else:
                y = y + _at_least_zero(self.gate).to(y.dtype) * self.mlp(wide.to(self.gate.dtype)).to(y.dtype)
        return (y + self.eps).to(x.dtype)


def _at_least_zero(x: Tensor) -> Tensor:
    """max(x, 0) with the gradient of x, so that what reached 0 may leave it again."""
    return x + (x.clamp(min=0) - x).detach()
