"""Tensor-STRING: positions enter as features that multiply every coordinate of a token."""

import torch
from torch import Tensor, nn

from ..checks import check_shape, fail
from .rotary import Rotary
from .string import normal


class TensorSTRING(Rotary):
    r"""Tensor-STRING: the scores of q and k times a learned kernel of the displacement.

    .. math:: q'_i = s \, \mathrm{vec}(f(r_i) \otimes q_i), \quad k'_j = s \, \mathrm{vec}(f(r_j) \otimes k_j), \qquad
        f(r) = m^{-1/2} [\cos \omega_k r, \sin \omega_k r]_{k = 1 \ldots m}

    .. math:: \langle q'_i, k'_j \rangle = s^2 \, \langle q_i, k_j \rangle \, \langle f(r_i), f(r_j) \rangle, \qquad
        \langle f(r), f(r') \rangle = \frac{1}{m} \sum_k \cos \omega_k (r - r')

    where RoPE turns each plane of a head by itself, every pair of coordinates meets the whole kernel here, at the price
    of a head that is 2 m times as large: (B, H, L, D) becomes (B, H, L, 2 m D), the features outermost. Values keep
    their size V = D. The kernel is 1 at a displacement of 0, and |f(r)| = 1.

    Attention kernels scale logits by the size of what they get, 1 / sqrt(2 m D). By default s = (2 m)^(1/4) makes up
    for it, so that the logits are <q, k> <f, f> / sqrt(D); ``scaled=False`` gives the paper's s = 1.

    Tokens without a position (``prefix``) count as at the origin, f(0), which is what no rotation means for RoPE: among
    themselves their scores are <q, k>; those with other tokens know where these are.

    Args:
        head_dim: D, the size of a head before the encoding.
        num_heads: the number of key heads; each has its frequencies.
        coords: C, the number of coordinates of a position, at most 4.
        features: m, the number of frequencies.
        learned: make the frequencies a parameter.
        init_std: the frequencies start from N(0, init_std^2), radians per unit of position, whose kernel is near
            exp(-init_std^2 |r - r'|^2 / 2) for many features. At 0 no gradient would reach them.
        scaled: see above.
        generator: draws the frequencies.

    Attributes:
        freqs: the frequencies, ``(num_heads, C, m)``.
        out_dim: 2 m D.

    Source:
        STRING (arXiv 2502.02562), extensions.
    """

    num_heads: int
    freqs: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        coords: int = 1,
        features: int = 4,
        learned: bool = True,
        init_std: float = 0.1,
        scaled: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, coords, False, None)
        name = "TensorSTRING"
        if features < 1:
            raise fail(name, "features", "be at least 1", features)
        if init_std <= 0:
            raise fail(name, "init_std", "be positive", init_std)
        self.features = features
        self.init_std = init_std
        self.scaled = scaled
        self._register("freqs", self._initial(generator), learned)

    @property
    def out_dim(self) -> int:
        return 2 * self.features * self.head_dim

    def frequencies(self, length: int) -> Tensor:
        return self.freqs

    def forward(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor | None,  # (B, Hk, L, D)
        positions: Tensor | None = None,  # (L - prefix, C) or (B, L - prefix, C)
        *,
        offset: int = 0,
        prefix: int = 0,
        basis: None = None,  # type: ignore[override]  # there is none
    ) -> tuple[Tensor, Tensor]:
        """As for every encoding (`RoPE`), with results of the shapes (B, H, L, 2 m D) and (B, Hk, L, 2 m D)."""
        name = "TensorSTRING"
        length = self._length(q, offset, prefix)
        positions = self._positions(q, positions, offset, length)
        if k is None:
            k = q[:, :0]
        else:
            sizes = dict(B=q.shape[0], Hk=self.num_heads, L=q.shape[2], D=self.head_dim)
            check_shape(name, "k", k, ("B", "Hk", "L", "D"), **sizes)
        if q.shape[1] % self.num_heads:
            raise fail(name, "q", f"have a number of heads that {self.num_heads} divides", q.shape[1])
        if prefix:
            positions = torch.nn.functional.pad(positions, (0, 0, prefix, 0))
        f = self.position_features(positions)
        return _tensor(f, q), _tensor(f, k)

    def position_features(
        self,
        positions: Tensor,  # (L, C) or (B, L, C)
    ) -> Tensor:
        """s f(r), ``(num_heads, L, 2 m)`` or ``(B, num_heads, L, 2 m)``, in float32 at least."""
        freqs = self.freqs
        # In float64, because a product of a far position has no fraction in float32.
        phase = torch.einsum("...lc,hcm->...hlm", positions.double(), freqs.double())
        size = self.features**-0.5 * (2 * self.features) ** (self.scaled / 4)
        return (torch.cat((phase.cos(), phase.sin()), -1) * size).to(freqs.dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the frequencies to their initial values, also after ``to_empty`` has brought them from "meta"."""
        with torch.no_grad():
            self.freqs.copy_(self._initial(generator))

    def _initial(self, generator: torch.Generator | None) -> Tensor:
        return normal((self.num_heads, self.coords, self.features), self.init_std, generator)

    def _describe(self) -> list[str]:
        parts = [f"features={self.features}", f"init_std={self.init_std:g}"]
        parts += ["learned=True"] * isinstance(self.freqs, nn.Parameter)
        return parts if self.scaled else [*parts, "scaled=False"]


def _tensor(
    f: Tensor,  # (Hk, L, 2m) or (B, Hk, L, 2m)
    x: Tensor,  # (B, H, L, D)
) -> Tensor:  # (B, H, L, 2m * D)
    """vec(f (x) x), rounded once."""
    if x.shape[1] > f.shape[-3]:
        f = f.repeat_interleave(x.shape[1] // f.shape[-3], -3)
    elif x.shape[1] == 0:
        f = f[..., :0, :, :]
    return (f.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2).to(x.dtype)
