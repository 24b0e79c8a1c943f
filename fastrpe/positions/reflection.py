"""Reflections in rotary encodings: as STRING's basis, and in place of RoPE's rotations."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_shape, fail
from ..ops.reflection import reflection_basis
from ..ops.reflection.reference import reflect
from ..ops.rotary.reflection import plane_signs
from .rope import RoPE
from .rotary import Foldable
from .string import normal


class ReflectionBasis(Foldable, RoPE):
    r"""STRING whose basis is a product of reflections in disjoint blocks of coordinates: no linear solve.

    .. math:: q'_i = \mathrm{RoPE}(r_i) \, P q_i, \quad k'_j = \mathrm{RoPE}(r_j) \, P k_j, \qquad
        P = F_1 \cdots F_K, \quad F_l = \bigoplus_b \Big( I - 2 \frac{v_{lb} v_{lb}^\top}{|v_{lb}|^2} \Big)

    Facts:

    - Scores depend on r_j - r_i alone, whatever v is, as long as v does not depend on r: a reflection whose v follows
      the position (a network's output, say) is no relative encoding.
    - P is orthogonal, det P = (-1)^(K D / s). A layer has D - D / s degrees of freedom for each head (the length of a v
      has no effect); K >= D layers of one block reach every orthogonal matrix of that determinant.
    - One layer is never the identity, so the start is not RoPE unless the layers cancel: ``init="rope"``.
    - The gradient of v shrinks as 1 / |v|: v starts at length sqrt(s) and must not decay (it has ``_no_weight_decay``).
      A v shorter than 1e-6 counts as 0, whose reflection is the identity.
    - Reflections in RoPE's own planes only change the sign of its frequencies, and are an error.

    P is computed in every call, so it is never stale; `fold_into` absorbs it into the projections for inference. One P
    serves a key head and its queries.

    Args:
        head_dim: D, the size of a head.
        num_heads: the number of key heads; each has its v and its frequencies.
        layers: K.
        block: s, the size of a block, at least 2, a divisor of ``head_dim``. At 2, ``interleaved`` must be False.
        shuffle: layer l = 0, 1, 2, ... has blocks of neighbours after l perfect shuffles of the coordinates, so that
            log(D) / log(s) layers mix all of them; otherwise all layers have the same blocks.
        init: ``"normal"`` draws v from N(0, I); ``"rope"`` draws the first half of the layers, an even number, and
            mirrors it (v, and the shuffles: 0, 1, ..., 1, 0), which makes P the identity and the start RoPE.
        learned: make the frequencies a parameter, ``(num_heads, C, R)``; v always is one.
        generator: draws v and the axes of mode ``"mixed"``.
        coords, base, mode, rotary_dim, groups, scaling, interleaved, backend: as for `RoPE`.

    Attributes:
        v: vectors of the reflections, ``(num_heads, K, D)``.
        shuffles: how often the coordinates are shuffled for each layer.
        freqs: radians per unit of position, ``(num_heads, C, R)``, or ``(C, R)`` where not learned and axial.
        folded: whether the basis is in the projections; kept in the state dict.

    Source:
        STRING (arXiv 2502.02562) theorem 3.4, with another parametrisation of its P.
    """

    basis_parameter = "v"
    num_heads: int
    v: nn.Parameter

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        layers: int = 2,
        block: int = 8,
        shuffle: bool = True,
        init: str = "normal",
        coords: int = 1,
        base: float | None = None,
        mode: str = "axial",
        learned: bool = True,
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
        name = "ReflectionBasis"
        check_choice(name, "init", init, ("normal", "rope"))
        if layers < 1 or (init == "rope" and layers % 2):
            raise fail(name, "layers", "be positive, and even for init 'rope'", layers)
        if block < 2 or head_dim % block:
            raise fail(name, "block", f"be at least 2 and divide head_dim={head_dim}", block)
        if block == 2 and (interleaved or self.rotary_dim == 2):
            planes = "where blocks of 2 are RoPE's planes, whose frequencies they would negate"
            raise fail(name, "block", f"be at least 3 {planes}", block)
        self.layers = layers
        self.block = block
        self.shuffle = shuffle
        self.init = init
        mirrored = init == "rope"
        self.shuffles = tuple(shuffle * (min(i, layers - 1 - i) if mirrored else i) for i in range(layers))
        self._register("v", self._initial_v(generator), learned=True)

    def basis(self) -> Tensor:
        return reflection_basis(self.v, self.block, self.shuffles)

    def _basis_kind(self) -> tuple[Any, ...] | None:
        v = self.v
        if type(self) is not ReflectionBasis or v.device.type == "cpu":  # which may go by tokens, see below
            return None
        return ReflectionBasis, self.block, self.shuffles, v.shape, v.dtype, v.device

    def _joint_basis(self, modules: Sequence["ReflectionBasis"]) -> Tensor:
        return reflection_basis(torch.cat([module.v for module in modules]), self.block, self.shuffles)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the frequencies and v to their initial values."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.v.copy_(self._initial_v(generator))

    def _initial_v(self, generator: torch.Generator | None) -> Tensor:
        if self.init == "normal":
            return normal((self.num_heads, self.layers, self.head_dim), 1.0, generator)
        half = normal((self.num_heads, self.layers // 2, self.head_dim), 1.0, generator)
        return torch.cat((half, half.flip(1)), 1)

    def _goes_by_tokens(self, q: Tensor) -> bool:
        # Measured on a CPU, forward and backward (D = 64 and 128, K = 1, 2, 4, s = 4, 8, 16, 64): a layer of blocks
        # takes as long as a product with 64 / 3 (1 + 8 / s) columns of a matrix. A GPU takes P into its rotation at the
        # cost of a copy, and `rotate` keeps the products of 16-bit tokens in float32 until it has rotated them.
        wide = q.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
        faster = 64 * self.layers * (1 + 8 / self.block) <= 3 * self.head_dim
        return faster and wide and q.device.type == "cpu"

    def _apply_basis(self, q: Tensor, k: Tensor | None, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._goes_by_tokens(q):
            return super()._apply_basis(q, k, prefix)
        if k is not None:  # as `rotate` checks a basis
            check_shape("ReflectionBasis", "k", k, ("B", "Hk", "L", "D"), B=q.shape[0], L=q.shape[2], D=self.head_dim)
            check_shape("ReflectionBasis", "v", self.v, ("H", "K", "D"), H=k.shape[1], D=self.head_dim)

        def apply(x: Tensor) -> Tensor:
            y = reflect(x[:, :, prefix:], self.v, self.block, self.shuffles)
            return torch.cat((x[:, :, :prefix], y), 2) if prefix else y

        return apply(q), None if k is None else apply(k), None

    def _describe(self) -> list[str]:
        parts = [*super()._describe(), f"layers={self.layers}", f"block={self.block}", f"init={self.init!r}"]
        return parts if self.shuffle else [*parts, "shuffle=False"]


class ReflectionRoPE(Foldable, RoPE):
    r"""RoPE whose rotations of planes are replaced with reflections.

    .. math:: q'_i = \mathrm{Ref}(r_i) \, q_i, \quad k'_j = \mathrm{Ref}(r_j) \, k_j, \qquad
        \mathrm{Ref}(a) = \begin{pmatrix} \cos a & \sin a \\ \sin a & -\cos a \end{pmatrix}
        = \mathrm{Rot}(a) \begin{pmatrix} 1 & \\ & -1 \end{pmatrix}

    in each plane, a as for `RoPE`. What survives and what is lost:

    - Ref(a) is orthogonal and symmetric, with determinant -1 in each plane.
    - Ref(a)^T Ref(b) = Rot(a - b): scores depend on r_j - r_i alone. They are those of RoPE with the frequencies
      negated; or those of RoPE for D q and D k, D = diag(1, -1, 1, -1, ...). So softmax attention, whose projections
      can absorb D, learns what it learns with RoPE; with features of coordinates (ReLU), the functions differ.
    - Ref(0) = D is not the identity and Ref(a) Ref(b) is not Ref(a + b): the encoding is outside STRING's theorem 3.2,
      by that constant factor D. Tokens without a position (``prefix``) stay as they are, not times D.

    With n(a) = (cos a, sin a), *two* reflections make a rotation again: H(n(b)) H(n(a)) = Rot(2 (b - a)). An encoding
    with two frequencies for each plane, one for each reflection, is RoPE with the frequencies 2 (w_2 - w_1).

    Args:
        head_dim, coords, base, mode, num_heads, learned, rotary_dim, groups, scaling, interleaved, generator, backend:
            as for `RoPE`.

    Attributes:
        freqs: radians per unit of position, ``(C, R)`` or ``(num_heads, C, R)``.
        signs: the diagonal of D, a basis for `fold_into`, which may be used for training, too.
        folded: whether D is in the projections; kept in the state dict.
    """

    signs: Tensor

    def __init__(self, head_dim: int, **options: Any) -> None:
        super().__init__(head_dim, **options)
        self._register("signs", self._signs("cpu", torch.float64), learned=False, persistent=False)

    def basis(self) -> Tensor:
        return self.signs.diag()

    def _goes_by_tokens(self, q: Tensor) -> bool:
        # Measured on an H200 (512 x 64 tokens, 3 heads of 64, compiled, forward and backward): in the fused kernel D
        # costs 7 us on RoPE's 35, as signs 25; with learned frequencies 290 on 62, because that backward is no kernel.
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else q.dtype
        sixteen_bits = dtype in (torch.float16, torch.bfloat16)
        fuses = q.is_cuda and sixteen_bits and self.head_dim == self.rotary_dim and self.head_dim in (64, 128)
        return self.freqs.requires_grad or not fuses

    def _apply_basis(self, q: Tensor, k: Tensor | None, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if not self._goes_by_tokens(q):
            return super()._apply_basis(q, k, prefix)
        signs = self.signs.to(q.dtype)
        if prefix:
            still = torch.arange(q.shape[2], device=q.device) < prefix
            signs = torch.where(still.unsqueeze(-1), 1, signs)
        return q * signs, None if k is None else k * signs, None

    def _signs(self, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        planes = self.rotary_dim // 2
        return plane_signs(self.head_dim, planes, interleaved=self.interleaved, dtype=dtype, device=device)

    def _apply(self, *args: Any, **kwargs: Any) -> "ReflectionRoPE":
        super()._apply(*args, **kwargs)
        # A constant, so it is made anew: there after .to_empty(), too.
        self.signs = self._signs(self.signs.device, self.signs.dtype)
        return self
