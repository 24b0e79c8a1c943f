"""STRING with a sparse S: a fraction of its entries, drawn once, is learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_shape, fail
from ..ops import sparse_cayley
from ..ops.sparse.api import SOLVERS, differentiated, fastest
from ..ops.sparse.solvers import basis
from .rope import RoPE
from .rotary import Foldable
from .string import normal


class SparseCayleySTRING(Foldable, RoPE):
    r"""Cayley-STRING whose S has K = round(f D (D - 1) / 2) learned entries above its diagonal, at places drawn once.

    .. math:: q'_i = \mathrm{RoPE}(r_i) \, P q_i, \quad k'_j = \mathrm{RoPE}(r_j) \, P k_j, \qquad
        P = 2 (I + S)^{-1} - I, \quad S_{ab} = \theta_k = -S_{ba}

    f D entries in a row make a graph of the coordinates. Below f = 1 / D it falls into small components, which alone P
    mixes; at a few times 1 / D most coordinates hang together, and P is dense.

    P takes one of two forms. As a matrix, computed once in each call, it goes into the rotation. Token by token, a
    solver gives (I + S)^{-1} x for every query and key, and P is never formed; this pays where the factors of I + S
    are sparse and no GPU is at hand.

    Args:
        head_dim: D, the size of a head.
        num_heads: the number of key heads; each has its theta and its frequencies.
        f: the fraction of the entries of S that is learned, from 0 (RoPE) to 1 (`CayleySTRING`).
        per_head_pattern: draw the places of each head by themselves; by default all heads share them.
        solver: ``"matrix"`` for the first form; a solver of `fastrpe.ops.sparse_cayley` for the second; ``"auto"`` for
            the fastest, by a rule measured on random patterns.
        seed: draws the places.
        learned: make the frequencies a parameter, ``(num_heads, C, R)``; theta always is one.
        init_std: theta starts from N(0, 2 init_std^2), as S does in `CayleySTRING`; 0 starts from RoPE.
        generator: draws theta and the axes of mode ``"mixed"``.
        coords, base, mode, rotary_dim, groups, scaling, interleaved, backend: as for `RoPE`.

    Attributes:
        theta: the learned entries, ``(num_heads, K)``.
        pairs: their places (a, b), a < b, ``(K, 2)``, or ``(num_heads, K, 2)``; in the state dict.
        freqs: radians per unit of position, ``(num_heads, C, R)``, or ``(C, R)`` where not learned and axial.
        folded: whether the basis is in the projections; kept in the state dict.

    Source:
        STRING (arXiv 2502.02562) theorems 3.2 to 3.4, with an S that is sparse.
    """

    basis_parameter = "theta"
    num_heads: int
    theta: nn.Parameter
    pairs: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        f: float,
        per_head_pattern: bool = False,
        solver: str = "auto",
        seed: int = 0,
        coords: int = 1,
        base: float | None = None,
        mode: str = "axial",
        learned: bool = True,
        init_std: float = 0.0,
        rotary_dim: int | None = None,
        groups: Sequence[int] | None = None,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            head_dim,
            coords=coords,
            base=base,
            mode=mode,
            num_heads=num_heads,
            learned=learned,
            rotary_dim=rotary_dim,
            groups=groups,
            scaling=scaling,
            interleaved=interleaved,
            generator=generator,
            backend=backend,
        )
        name = "SparseCayleySTRING"
        if not 0 <= f <= 1:
            raise fail(name, "f", "lie between 0 and 1", f)
        check_choice(name, "solver", solver, ("auto", *SOLVERS))
        if init_std < 0:
            raise fail(name, "init_std", "be at least 0", init_std)
        self.f = f
        self.per_head_pattern = per_head_pattern
        self.solver = solver
        self.seed = seed
        self.init_std = init_std
        pairs = self._drawn_pairs()
        self.register_buffer("pairs", torch.empty(pairs.shape, dtype=pairs.dtype).copy_(pairs))
        self._register("theta", self._initial_theta(generator), learned=True)

    def basis(self) -> Tensor:
        if self.solver in ("auto", "matrix"):
            return basis(self.theta, self.pairs, self.head_dim)
        eye = torch.eye(self.head_dim, dtype=self.theta.dtype, device=self.theta.device)
        return sparse_cayley(eye.expand(self.num_heads, -1, -1), self.theta, self.pairs, solver=self.solver).mT

    def _basis_kind(self) -> tuple[Any, ...] | None:
        theta = self.theta
        takes_matrix = self.solver == "matrix" or (self.solver == "auto" and theta.device.type != "cpu")
        if type(self) is not SparseCayleySTRING or not takes_matrix:
            return None
        return SparseCayleySTRING, self.head_dim, theta.shape, theta.dtype, theta.device

    def _joint_basis(self, modules: Sequence["SparseCayleySTRING"]) -> Tensor:
        theta = torch.cat([module.theta for module in modules])
        pairs = torch.cat([module.pairs.expand(module.num_heads, -1, -1) for module in modules])
        return basis(theta, pairs, self.head_dim)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the frequencies and theta to their initial values, and the places to those of the seed."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.pairs.copy_(self._drawn_pairs())
            self.theta.copy_(self._initial_theta(generator))

    def _drawn_pairs(self) -> Tensor:
        D = self.head_dim
        every = torch.triu_indices(D, D, 1, device="cpu").mT
        count = round(self.f * len(every))
        draw = torch.Generator("cpu").manual_seed(self.seed)

        def one() -> Tensor:
            return every[torch.randperm(len(every), generator=draw, device="cpu")[:count].sort().values]

        return torch.stack([one() for _ in range(self.num_heads)]) if self.per_head_pattern else one()

    def _initial_theta(self, generator: torch.Generator | None) -> Tensor:
        # As an entry of M - M^T
        return normal((self.num_heads, self.pairs.shape[-2]), self.init_std * 2**0.5, generator)

    def _solver_for(self, q: Tensor) -> str:
        if self.solver != "auto":
            return self.solver
        # A matrix goes into the rotation, where 16-bit tokens are rounded once; token by token they are twice.
        wide = q.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        if not wide:
            return "matrix"
        tokens, grad = q.shape[0] * q.shape[1] * q.shape[2] // self.num_heads, differentiated(q, self.theta)
        return fastest(q.device.type, self.head_dim, self.theta.shape[1], self.num_heads, tokens, grad)

    def _apply_basis(self, q: Tensor, k: Tensor | None, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        name, solver = "SparseCayleySTRING", self._solver_for(q)
        if solver == "matrix":
            return super()._apply_basis(q, k, prefix)
        if k is not None:  # as `rotate` checks a basis
            check_shape(name, "k", k, ("B", "Hk", "L", "D"), B=q.shape[0], L=q.shape[2], D=self.head_dim)
            check_shape(name, "theta", self.theta, ("H", "K"), H=k.shape[1])

        def apply(x: Tensor) -> Tensor:
            y = sparse_cayley(x[:, :, prefix:], self.theta, self.pairs, solver=solver)
            return torch.cat((x[:, :, :prefix], y), 2) if prefix else y

        return apply(q), None if k is None else apply(k), None

    def _describe(self) -> list[str]:
        parts = [*super()._describe(), f"f={self.f:g}", f"solver={self.solver!r}", f"init_std={self.init_std:g}"]
        return [*parts, "per_head_pattern=True"] if self.per_head_pattern else parts
