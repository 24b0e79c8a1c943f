"""RoPE in all its forms: text, axial and mixed coordinates, learned, partial, and the length extensions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, fail
from .frequencies import axial, mixed, original_length, rope_type, scale, scale_beyond, stretch
from .rotary import Rotary


class RoPE(Rotary):
    r"""Rotary position embedding.

    .. math:: q'_i = \mathrm{RoPE}(r_i) \, q_i, \quad k'_j = \mathrm{RoPE}(r_j) \, k_j, \qquad
        \langle q'_i, k'_j \rangle = q_i^\top \mathrm{RoPE}(r_j - r_i) \, k_j

    where plane t of a head turns by :math:`\sum_c r_c \, \omega_{ct}`.

    Args:
        head_dim: D, the size of a head.
        coords: C, the number of coordinates of a position: 1 for text, 2 for images, 3 for space; at most 4.
        base: the frequencies are ``base^(-t / g)``, t = 0 ... g - 1; by default 10000 for one coordinate, 100 for axial
            and 10 for mixed frequencies (rope-vit's).
        mode: ``"axial"`` gives each coordinate a group of g planes of its own, freqs ``(C, R)``; ``"mixed"`` lets every
            plane turn with every coordinate, along axes drawn at random for each head, freqs ``(num_heads, C, R)``.
        num_heads: heads that have frequencies of their own: the number of key heads. Needed for ``"mixed"``.
        learned: make the frequencies a parameter (one set for each head when ``num_heads`` is given). Axial structure
            is then the start, not a constraint.
        rotary_dim: rotate only the first so many coordinates of a head; even; all by default.
        groups: planes of each coordinate, for axial frequencies; by default an equal share.
        scaling: a Hugging Face ``rope_scaling`` dict, for one coordinate: ``"rope_type"`` (or ``"type"``) is
            ``"default"``, ``"linear"``, ``"ntk"``, ``"dynamic"``, ``"yarn"``, ``"llama3"`` or ``"longrope"``, with the
            keys that transformers reads for it. ``"rope_theta"`` and ``"partial_rotary_factor"`` stand in for ``base``
            and ``rotary_dim`` where those are None. ``"dynamic"`` and ``"longrope"`` go by the length L - prefix +
            offset of the call: decode with ``offset``.
        interleaved: plane t is ``(2 t, 2 t + 1)``; by default it is ``(t, t + R)``.
        generator: draws the axes of ``"mixed"``.
        backend: of `fastrpe.ops.rotate`.

    Attributes:
        freqs: radians per unit of position, float32 at least, ``(C, R)`` or ``(num_heads, C, R)``; `half` and
            `bfloat16` leave it in float32.
        factor: multiplies cos and sin (the attention factor of YaRN and LongRoPE).

    Source:
        RoFormer (arXiv 2104.09864) eq. 15-16; rope-vit (arXiv 2403.13298) for axial and mixed frequencies; YaRN (arXiv
        2309.00071); LongRoPE (arXiv 2402.13753).
    """

    freqs: Tensor
    freqs_beyond: Tensor

    def __init__(
        self,
        head_dim: int,
        *,
        coords: int = 1,
        base: float | None = None,
        mode: str = "axial",
        num_heads: int | None = None,
        learned: bool = False,
        rotary_dim: int | None = None,
        groups: Sequence[int] | None = None,
        scaling: Mapping[str, Any] | None = None,
        interleaved: bool = False,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, coords, interleaved, backend)
        name = type(self).__name__
        check_choice(name, "mode", mode, ("axial", "mixed"))
        self.mode = mode
        self.scaling = dict(scaling or {})
        self.kind = rope_type(self.scaling)
        if self.kind != "default" and (coords > 1 or mode == "mixed"):
            raise fail(name, "scaling", "be None or 'default' unless coords = 1 and mode = 'axial'", repr(self.kind))
        by_length = self.kind in ("dynamic", "longrope")
        if by_length and learned:
            raise fail(name, "learned", f"be False for scaling {self.kind!r}, which sets freqs by length", learned)
        self.original_length = original_length(self.scaling) if by_length else None
        if rotary_dim is None:
            rotary_dim = int(head_dim * self.scaling.get("partial_rotary_factor", 1))
        least = 4 if self.kind in ("ntk", "dynamic") else 2
        if rotary_dim % 2 or not least <= rotary_dim <= head_dim:
            raise fail(name, "rotary_dim", f"be even, at least {least} and at most head_dim={head_dim}", rotary_dim)
        self.rotary_dim = rotary_dim
        if base is None:
            base = self.scaling.get("rope_theta") or default_base(coords, mode)
        if base <= 0:
            raise fail(name, "base", "be positive", base)
        self.base = float(base)
        self.groups = self._groups(groups)
        if mode == "mixed" and num_heads is None:
            raise fail(name, "num_heads", "be given for mode 'mixed'", None)
        values, self.factor = self._initial(learned, generator)
        # What the arguments determine is no part of a checkpoint; axes drawn at random are.
        self._register("freqs", values, learned, persistent=mode == "mixed")
        if self.kind == "longrope":
            self._register("freqs_beyond", self._beyond(), learned=False, persistent=False)

    def frequencies(self, length: int) -> Tensor:
        if self.original_length is None or length <= self.original_length:
            return self.freqs
        if self.kind == "longrope":
            return self.freqs_beyond
        factor = self.scaling["factor"]
        return stretch(self.freqs, factor * length / self.original_length - (factor - 1))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the frequencies to their initial values, also after ``to_empty`` has brought them from "meta"."""
        with torch.no_grad():
            self.freqs.copy_(self._initial(isinstance(self.freqs, nn.Parameter), generator)[0])
            if self.kind == "longrope":
                self.freqs_beyond.copy_(self._beyond())

    def _initial(self, learned: bool, generator: torch.Generator | None) -> tuple[Tensor, float]:
        if self.mode == "mixed":
            assert self.num_heads is not None
            return mixed(self.num_heads, self.coords, self.rotary_dim // 2, self.base, generator), 1.0
        if self.kind == "default":
            freqs, factor = axial(self.groups, self.base), 1.0
        else:
            row, factor = scale(self.scaling, self.rotary_dim // 2, self.base)
            freqs = row.unsqueeze(0)
        if learned and self.num_heads is not None:
            freqs = freqs.expand(self.num_heads, -1, -1)
        return freqs, factor

    def _beyond(self) -> Tensor:
        return scale_beyond(self.scaling, self.rotary_dim // 2, self.base).unsqueeze(0)

    def _groups(self, groups: Sequence[int] | None) -> tuple[int, ...]:
        name, planes = type(self).__name__, self.rotary_dim // 2
        if groups is None:
            if planes % self.coords:
                raise fail(name, "rotary_dim", f"be a multiple of 2 C = {2 * self.coords}", self.rotary_dim)
            return (planes // self.coords,) * self.coords
        if self.mode == "mixed":
            raise fail(name, "groups", "be None for mode 'mixed'", groups)
        if len(groups) != self.coords or min(groups) < 1 or sum(groups) != planes:
            raise fail(name, "groups", f"be C={self.coords} positive numbers whose sum is R={planes}", tuple(groups))
        return tuple(groups)

    def _describe(self) -> list[str]:
        parts = [f"rotary_dim={self.rotary_dim}", f"base={self.base:g}", f"mode={self.mode!r}"]
        if self.kind != "default":
            parts.append(f"scaling={self.kind!r}")
        return parts + ["learned=True"] * isinstance(self.freqs, nn.Parameter)


def default_base(coords: int, mode: str) -> float:
    """10000 as in RoFormer; for images, whose positions are small, rope-vit's 100 (axial) and 10 (mixed)."""
    return 10000.0 if coords == 1 else 100.0 if mode == "axial" else 10.0
