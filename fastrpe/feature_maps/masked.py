"""Features of the softmax kernel times a kernel of masks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice, check_device, check_shape, check_type, fail
from ..ops import random_features
from ..ops.features.reference import maximum
from .feature_map import DEFAULT, FeatureMap, check_positive
from .projections import rademacher


class MaskedFeatures(FeatureMap):
    r"""Features of masked attention, whose mask has low rank: a dot product of non-negative vectors.

    .. math:: K(i, j) = \exp(q_i \cdot k_j / \sqrt D) \, \big( \mathrm{relu}(v_{q,i}) \cdot \mathrm{relu}(v_{k,j}) \big)

    estimated without bias by ``phi_q @ phi_k.mT``, with one of the forms, of positive features phi and u = relu(v)::

        tensor       phi[r] * u[l]            M E features, not negative: the least variance for the same M
        rademacher   phi[r] * (g[r] @ u)      M features, with signs; g[r] of random signs
        coordinate   phi[r] * u[l_r] / sqrt(pi[l_r])    M features, not negative; l_r of probabilities pi

    The mask takes the place of one that is multiplied into the L x L matrix of weights::

        features = MaskedFeatures(64, 8, 128, seed=0)
        q, k, v = torch.randn(3, 2, 4, 100, 64).unbind()  # (B, H, L, D)
        v_q, v_k = torch.randn(2, 2, 4, 100, 8).unbind()  # (B, H, L, E)
        phi_q, phi_k = features(q, k, v_q, v_k)
        y = linear_attention(phi_q, phi_k, v, kind="features")

    The tensor form is for small masks, up to about 8. A coordinate that no row of a coordinate sketch drew counts as 0,
    so M should be several times E there; denominators of Rademacher sketches may come close to 0.

    Args:
        mask_dim: E, the size of a mask vector.
        form: ``"tensor"``, ``"rademacher"`` or ``"coordinate"``.
        pi: E positive numbers, which are divided by their sum: how often the coordinate form draws each; by default all
            the same. The best are proportional to the products u_l u'_l of a query and a key.
        stratified: the coordinate form draws l_r from the r-th of M equal parts of pi, not from all of it.

    The other arguments are those of `FeatureMap`; ``eps`` is added to phi. `fastrpe.attention.Performer` has no masks
    to give and cannot take it.

    Attributes:
        sketch: g, ``(M, E)`` or ``(num_heads, M, E)``, drawn with omega and with E g g^T = I in the mean over its rows,
            those of the coordinate form having one entry, 1 / sqrt(pi_l); None for the tensor form.

    Raises:
        TypeError: a wrong type.
        ValueError: an unknown form, a size that is not positive, ``pi`` of other forms or of other numbers.

    Source:
        Performers (arXiv 2009.14794) lemma 1 for phi. A product of kernels has the tensor product of their features;
        the sketches follow from E (g.u)(g.u') = u.u' with g independent of phi.
    """

    sketch: Tensor | None

    def __init__(
        self,
        head_dim: int,
        mask_dim: int,
        num_features: int = DEFAULT,
        *,
        form: str = "tensor",
        pi: Tensor | Sequence[float] | None = None,
        stratified: bool = True,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        check_positive(name, "mask_dim", mask_dim)
        if num_features != DEFAULT:
            check_positive(name, "num_features", num_features)
        check_choice(name, "form", form, ("tensor", "rademacher", "coordinate"))
        check_type(name, "stratified", stratified, bool)
        self.form, self.mask_dim, self.stratified = form, mask_dim, stratified
        self.pi = None if pi is None else _check_pi(name, pi, form, mask_dim)
        super().__init__(head_dim, num_features, **options)

    def forward(  # type: ignore[override]
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        v_q: Tensor,  # (B, H, L, E)
        v_k: Tensor,  # (B, Hk, S, E)
        *,
        causal: bool = False,
        stabilized: bool = True,
    ) -> tuple[Tensor, Tensor]:  # (B, H, L, F), (B, Hk, S, F)
        """Features of queries and keys and their masks, up to a factor that normalised attention cancels.

        Args:
            q: queries, ``(B, H, L, D)``.
            k: keys, ``(B, Hk, S, D)``; H is a multiple of Hk.
            v_q: masks of the queries before their relu, ``(B, H, L, E)``, any strides, any real dtype.
            v_k: masks of the keys, ``(B, Hk, S, E)``.
            causal: the features are for causal attention: keys have no stabilizer, as in `FeatureMap`.
            stabilized: divide each query's features by its largest, and the keys' of a head by theirs. Without,
                ``phi_q @ phi_k.mT`` estimates K itself, and overflows where large queries or keys make phi do so.

        Returns:
            ``(phi_q, phi_k)``, ``(B, H, L, F)`` and ``(B, Hk, S, F)`` of the dtype of q and k, F = M, or M E of the
            tensor form; computed in float32 (float64 for float64) and rounded once. Gradients flow to all four.

        Raises:
            TypeError, ValueError: a wrong type, shape or device.
        """
        self._check(q, k, causal)
        name, E = type(self).__name__, self.mask_dim
        check_shape(name, "v_q", v_q, ("B", "H", "L", "E"), B=q.shape[0], H=q.shape[1], L=q.shape[2], E=E)
        check_shape(name, "v_k", v_k, ("B", "Hk", "S", "E"), B=k.shape[0], Hk=k.shape[1], S=k.shape[2], E=E)
        for argument, v in (("v_q", v_q), ("v_k", v_k)):
            check_device(name, argument, v, q.device)
        phi_q = self._masked(q, v_q, "row" if stabilized else None)
        return phi_q, self._masked(k, v_k, "global" if stabilized and not causal else None)

    def _draw(self, generator: torch.Generator | None) -> None:
        super()._draw(generator)
        assert self.omega is not None
        if self.form == "tensor":
            self.sketch = None
            return
        *batch, M, _ = self.omega.shape
        draw = self._coordinates if self.form == "coordinate" else rademacher
        rows = draw(M, self.mask_dim, batch=tuple(batch), generator=generator)
        if "sketch" not in self._buffers:
            self.register_buffer("sketch", self.omega.new_empty(rows.shape))
        assert self.sketch is not None
        self.sketch.copy_(rows)

    def _coordinates(self, M: int, E: int, *, batch: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        """Rows with 1 / sqrt(pi_l) in place l and 0 elsewhere: (*batch, M, E)."""
        device = torch.device("cpu") if generator is None else generator.device
        pi = torch.tensor(self.pi or [1 / E] * E, dtype=torch.float64, device=device)
        at = torch.rand(*batch, M, dtype=torch.float64, device=device, generator=generator)
        if self.stratified:
            at = (at + torch.arange(M, device=device)) / M
        drawn = torch.searchsorted(pi.cumsum(0), at, right=True).clamp(max=E - 1)  # the last sum may be just below 1
        return torch.nn.functional.one_hot(drawn, E) * pi**-0.5

    def _masked(self, x: Tensor, v: Tensor, stabilizer: str | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            phi = random_features(
                wide, self._omega_for(x), "positive",
                scale=self.scale, eps=self.eps, stabilizer=stabilizer, backend=self.backend,
            )  # fmt: skip
            u = v.to(wide.dtype).relu()
            if self.sketch is None:
                y = (phi.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)
            else:
                sketch = self.sketch.to(wide.dtype)
                if sketch.dim() == 3:
                    sketch = sketch.repeat_interleave(x.shape[1] // sketch.shape[0], 0)
                y = phi * (u @ sketch.mT)
            if stabilizer:
                # The features that a mask leaves may all be small ones of phi, which 16 bits would not hold.
                largest = maximum(y.abs(), stabilizer)
                y = y / largest.masked_fill(largest == 0, 1)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_dim={self.mask_dim}, form={self.form!r}"


def _check_pi(name: str, pi: Tensor | Sequence[float], form: str, mask_dim: int) -> list[float]:
    """pi as numbers whose sum is 1."""
    if form != "coordinate":
        raise fail(name, "pi", f"be None for form {form!r}", pi)
    check_type(name, "pi", pi, Tensor, list, tuple)
    numbers = torch.as_tensor(pi, dtype=torch.float64, device="cpu")
    check_shape(name, "pi", numbers, ("E",), E=mask_dim)
    if not (numbers.isfinite() & (numbers > 0)).all():
        raise fail(name, "pi", "hold positive numbers", numbers.tolist())
    return (numbers / numbers.sum()).tolist()
