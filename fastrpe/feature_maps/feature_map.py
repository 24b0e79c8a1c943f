"""What the feature maps share: a projection and its draws, and the call of `random_features`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_shape, check_type, fail
from ..ops import random_features
from ..ops.features.reference import WITHOUT_OMEGA
from .projections import PROJECTIONS, precondition

DEFAULT = -1  # num_features: int(D log D)


class FeatureMap(nn.Module):
    """Base of the feature maps: turns queries and keys into features, ``phi_q, phi_k = feature_map(q, k)``.

    An attention kernel may call it, or compute the features itself: those of ``q', k', a = feature_map.prepare(q, k)``
    by ``random_features(x, omega, kind, scale=scale, eps=eps, a=a)``, where ``kind`` is not None.

    Args:
        head_dim: D, the size of a head.
        num_features: M, rows of the projection; None for none (features of the coordinates themselves).
        projection: ``"gaussian"``, ``"orthogonal"``, ``"simplex"``, ``"rademacher"`` or ``"orthogonal_rademacher"``.
        num_heads: heads that have projections of their own: the number of key heads; by default all share one.
        preconditioned: spread q and k over all coordinates by a randomised Hadamard transform, which W absorbs.
        scale: multiplies q and k; None for D ** -0.25 of the kinds that estimate exp(q.k / sqrt(D)), 1 of the others.
        eps: added to every feature before its constant.
        redraw_every: `step` draws a new projection every so many steps; 0 for never.
        seed: of the projections: draw n, from 0, has the seed ``seed + n`` on any device; None for PyTorch's generator.
        generator: of the first projection, in place of the seed.
        backend: of `fastrpe.ops.random_features`.

    Attributes:
        kind: of `fastrpe.ops.random_features`; None where the features are not one of its kinds.
        omega: the projection, ``(M, D)`` or ``(num_heads, M, D)``, a buffer (a parameter where it is learned) that
            stays in float32; None without one.
        draws: how many projections have been drawn; with the steps taken, part of the state dict.

    Raises:
        ValueError: a size that is not positive, an unknown projection, a negative ``redraw_every``.
    """

    kind: str | None = None
    causal = True  # whether a row's features depend on that row alone, but for a stabilizer
    omega: Tensor | None

    def __init__(
        self,
        head_dim: int,
        num_features: int | None = DEFAULT,
        *,
        projection: str = "orthogonal",
        num_heads: int | None = None,
        preconditioned: bool = False,
        scale: float | None = None,
        eps: float = 0.0,
        redraw_every: int = 0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_positive(name, "head_dim", head_dim)
        if num_features is None:
            if self.kind not in (None, *WITHOUT_OMEGA):
                raise fail(name, "num_features", f"be given for kind {self.kind!r}", None)
        elif num_features == DEFAULT:
            num_features = max(1, int(head_dim * math.log(head_dim)))
        else:
            check_positive(name, "num_features", num_features)
        if num_heads is not None:
            check_positive(name, "num_heads", num_heads)
        check_choice(name, "projection", projection, PROJECTIONS)
        for argument, value, types in (
            ("scale", scale, (float, int)),
            ("eps", eps, (float, int)),
            ("redraw_every", redraw_every, (int,)),
            ("seed", seed, (int,)),
            ("generator", generator, (torch.Generator,)),
        ):
            if value is not None or argument in ("eps", "redraw_every"):
                check_type(name, argument, value, *types)
        if not eps >= 0 or (eps and self.kind == "trigonometric"):  # a NaN neither
            raise fail(name, "eps", "be 0" if eps > 0 else "be at least 0", eps)
        if redraw_every < 0:
            raise fail(name, "redraw_every", "be at least 0", redraw_every)
        self.head_dim, self.num_features, self.num_heads = head_dim, num_features, num_heads
        self.projection, self.preconditioned = projection, preconditioned
        self.scale, self.eps, self.redraw_every, self.seed, self.backend = scale, eps, redraw_every, seed, backend
        self.draws = self.steps = 0
        omega = None
        if num_features is not None:
            shape = (num_features, head_dim) if num_heads is None else (num_heads, num_features, head_dim)
            omega = torch.empty(shape, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        self.register_buffer("omega", omega)
        self.redraw(generator)

    def forward(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        *,
        causal: bool = False,
    ) -> tuple[Tensor, Tensor]:  # (B, H, L, F), (B, Hk, S, F)
        """Features of queries and keys, those of exponential kinds up to a factor that normalised attention cancels.

        Args:
            q: queries, ``(B, H, L, D)``.
            k: keys, ``(B, Hk, S, D)``; H is a multiple of Hk.
            causal: the features are for causal attention, so no key's may depend on a later one's: keys then have no
                stabilizer, and large ones, in float16 the first, have features that overflow or vanish;
                `fastrpe.ops.linear_attention` has a stabilizer that is causal.

        Returns:
            ``(phi_q, phi_k)``, ``(B, H, L, F)`` and ``(B, Hk, S, F)`` of the dtype of q and k, computed as by
            `fastrpe.ops.random_features`. Gradients flow to q and k, and to what the map learns.

        Raises:
            TypeError, ValueError: a wrong type or shape; ``causal`` of a map that looks at all keys.
        """
        self._check(q, k, causal)
        q, k, a = self.prepare(q, k)
        exponential = self.kind not in ("relu", "elu")
        phi_q = self._features(q, a, "row" if exponential else None)
        return phi_q, self._features(k, a, "global" if exponential and not causal else None)

    def prepare(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
    ) -> tuple[Tensor, Tensor, Tensor | float | None]:
        """What the features are taken of, and OPRF's A: ``(q', k', a)``."""
        return q, k, None

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new projection: from the generator, the seed, or PyTorch's generator."""
        if generator is None and self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed + self.draws)
        self._draw(generator)
        self.draws += 1

    def _draw(self, generator: torch.Generator | None) -> None:
        """Draw all that is random, a subclass's own after the projection."""
        if self.omega is not None:
            batch = () if self.num_heads is None else (self.num_heads,)
            W = PROJECTIONS[self.projection](self.num_features, self.head_dim, batch=batch, generator=generator)
            self.omega.copy_(precondition(W, generator=generator) if self.preconditioned else W)

    def step(self) -> None:
        """Count a training step, and draw a new projection where ``redraw_every`` says so; nothing in eval mode.

        Features never change unless this or `redraw` is called: call it after each step of the optimiser.
        """
        if self.training:
            self.steps += 1
            if self.redraw_every and self.steps % self.redraw_every == 0:
                self.redraw()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Start again from the first draw, also after ``to_empty`` has brought the projection from "meta"."""
        self.draws = self.steps = 0
        self.redraw(generator)

    def _features(self, x: Tensor, a: Tensor | float | None, stabilizer: str | None) -> Tensor:
        assert self.kind is not None
        return random_features(
            x, self._omega_for(x), self.kind,
            scale=self.scale, eps=self.eps, a=a, stabilizer=stabilizer, backend=self.backend,
        )  # fmt: skip

    def _omega_for(self, x: Tensor) -> Tensor | None:
        """The projection; each head's once for each of its queries' heads."""
        omega = self.omega
        if omega is None or omega.dim() == 2 or omega.shape[0] == x.shape[1]:
            return omega
        return omega.repeat_interleave(x.shape[1] // omega.shape[0], 0)

    def _check(self, q: Tensor, k: Tensor, causal: bool) -> None:
        name = type(self).__name__
        check_shape(name, "q", q, ("B", "H", "L", "D"), D=self.head_dim)
        check_shape(name, "k", k, ("B", "Hk", "S", "D"), B=q.shape[0], D=self.head_dim)
        if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
            raise fail(name, "k", f"have a number of heads that divides H={q.shape[1]}", k.shape[1])
        if self.num_heads not in (None, k.shape[1]):
            raise fail(name, "k", f"have num_heads={self.num_heads} heads", k.shape[1])
        if causal and not self.causal:
            raise fail(name, "causal", "be False: its features depend on all keys", causal)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FeatureMap":
        def wide(x: Tensor) -> Tensor:
            # Exponents are never below float32: .half() and .bfloat16() move the projection and leave its dtype.
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        super()._apply(wide, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.draws, self.steps])

    def set_extra_state(self, state: Any) -> None:
        self.draws, self.steps = (int(n) for n in state)

    def extra_repr(self) -> str:
        parts = [f"{self.head_dim}, {self.num_features}"]
        if self.omega is not None:
            parts.append(f"projection={self.projection!r}")
        parts += [f"{n}={v}" for n in ("num_heads", "scale", "seed") if (v := getattr(self, n)) is not None]
        parts += [f"{n}={v}" for n in ("preconditioned", "eps", "redraw_every") if (v := getattr(self, n))]
        return ", ".join(parts)


def check_positive(name: str, argument: str, value: Any) -> None:
    if not (isinstance(value, int) and value >= 1):
        raise fail(name, argument, "be a positive integer", repr(value))


def step(model: nn.Module) -> None:
    """`FeatureMap.step` of every feature map in a model: once after each step of the optimiser."""
    for module in model.modules():
        if isinstance(module, FeatureMap):
            module.step()
