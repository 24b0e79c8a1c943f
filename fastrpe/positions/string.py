"""STRING: the most general continuous relative encoding, RoPE in a learned orthogonal basis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_choice, fail
from ..ops.rotary.string import cayley_basis, circulant_params, circulant_sines, fourier_basis
from .frequencies import axial
from .rope import RoPE, default_base
from .rotary import Foldable, Rotary


class CayleySTRING(Foldable, RoPE):
    r"""Cayley-STRING: a dense orthogonal basis for each head, learned through a skew-symmetric S, then RoPE.

    .. math:: q'_i = \mathrm{RoPE}(r_i) \, P q_i, \quad k'_j = \mathrm{RoPE}(r_j) \, P k_j, \qquad
        P = (I - S)(I + S)^{-1}, \quad S = -S^\top

    P acts before RoPE: after it, a score would not see it. It is computed from S in every call, so it is never stale
    while S trains; `fold_into` absorbs it into the projections for inference. One P serves a key head and its queries.

    Args:
        head_dim: D, the size of a head.
        num_heads: the number of key heads; each has its S (D (D - 1) / 2 numbers) and its frequencies.
        learned: make the frequencies a parameter, ``(num_heads, C, R)``; S always is one.
        init_std: S starts as M - M^T, M ~ N(0, init_std^2); 0 starts from RoPE.
        generator: draws M and the axes of mode ``"mixed"``.
        coords, base, mode, rotary_dim, groups, scaling, interleaved, backend: as for `RoPE`.

    Attributes:
        skew: S above its diagonal, by rows, ``(num_heads, D (D - 1) / 2)``.
        freqs: radians per unit of position, ``(num_heads, C, R)``, or ``(C, R)`` where not learned and axial.
        folded: whether the basis is in the projections; kept in the state dict.

    Source:
        STRING (arXiv 2502.02562) theorems 3.2 to 3.4.
    """

    basis_parameter = "skew"
    num_heads: int
    skew: nn.Parameter

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
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
        if init_std < 0:
            raise fail("CayleySTRING", "init_std", "be at least 0", init_std)
        self.init_std = init_std
        self._register("skew", self._initial_skew(generator), learned=True)

    def basis(self) -> Tensor:
        return cayley_basis(self.skew)

    def _basis_kind(self) -> tuple[Any, ...] | None:
        if type(self) is not CayleySTRING:  # which may have another basis
            return None
        return CayleySTRING, self.skew.shape, self.skew.dtype, self.skew.device

    def _joint_basis(self, modules: Sequence["CayleySTRING"]) -> Tensor:
        return cayley_basis(torch.cat([module.skew for module in modules]))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set the frequencies and S to their initial values."""
        super().reset_parameters(generator)
        with torch.no_grad():
            self.skew.copy_(self._initial_skew(generator))

    def _initial_skew(self, generator: torch.Generator | None) -> Tensor:
        shape = self.num_heads, self.head_dim * (self.head_dim - 1) // 2
        # An entry of M - M^T is the difference of two draws.
        return normal(shape, self.init_std * 2**0.5, generator)

    def _describe(self) -> list[str]:
        return [*super()._describe(), f"init_std={self.init_std:g}"]


class CirculantSTRING(Foldable, Rotary):
    r"""Circulant-STRING: commuting generators that are circulant matrices, d learned numbers for each head.

    .. math:: R(r) = \exp\Big(\sum_c r_c (C_c - C_c^\top)\Big)
        = \mathrm{irfft} \; e^{2 i \sum_c r_c \, \mathrm{Im} \, \mathrm{rfft}(c_c)} \; \mathrm{rfft}

    In the real Fourier basis this is RoPE with the frequencies -2 Im FFT(c)_k, which is how it is computed;
    `fastrpe.ops.rotary.string.circulant_rotate` is the paper's form. The outer basis, which no score can see, is left
    out. Only the (D - 1) // 2 differences c_j - c_{D-j} matter.

    Args:
        head_dim: D, the size of a head, at least 3; may be odd.
        num_heads: the number of key heads; each has its c.
        coords: C, the number of coordinates of a position, at most 4.
        init: ``"normal"`` draws c from N(0, init_std^2), which gives frequencies of standard deviation
            init_std sqrt(2 D) radians per unit; ``"rope"`` takes the c that gives RoPE's axial frequencies.
        init_std: for ``"normal"``.
        base: for ``"rope"``, as for `RoPE`.
        block: size of the diagonal blocks of a block-circulant matrix; D by default.
        interleaved: plane t is ``(2 t, 2 t + 1)``; by default it is ``(t, t + R)``.
        generator: draws c.
        backend: of `fastrpe.ops.rotate`.

    Attributes:
        c: first columns of the circulants, ``(num_heads, C, D)``.
        fourier: the basis, ``(D, D)``, the same for all heads; `fold_into` may be used for training, too.
        sines: the matrix that gives the frequencies of a c, ``(R, D)``.
        folded: whether the basis is in the projections; kept in the state dict.

    Source:
        STRING (arXiv 2502.02562) eq. 11 and theorem 3.5.
    """

    num_heads: int
    c: nn.Parameter
    fourier: Tensor
    sines: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        coords: int = 1,
        init: str = "normal",
        init_std: float = 0.02,
        base: float | None = None,
        block: int | None = None,
        interleaved: bool = False,
        generator: torch.Generator | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(head_dim, num_heads, coords, interleaved, backend)
        name = "CirculantSTRING"
        check_choice(name, "init", init, ("normal", "rope"))
        block = head_dim if block is None else block
        if block < 3 or head_dim % block:
            raise fail(name, "block", f"be at least 3 and divide head_dim={head_dim}", block)
        if init_std < 0:
            raise fail(name, "init_std", "be at least 0", init_std)
        if base is not None and base <= 0:
            raise fail(name, "base", "be positive", base)
        self.block = block
        self.init = init
        self.init_std = init_std
        self.base = default_base(coords, "axial") if base is None else float(base)
        self._register("c", self._initial(generator), learned=True)
        for name, values in self._constants("cpu", torch.float64).items():
            self._register(name, values, learned=False, persistent=False)

    def frequencies(self, length: int) -> Tensor:
        # An FFT takes ten kernels forward and backward; autocast or TF32 would round a matrix product.
        return (self.c.unsqueeze(-2) * self.sines).sum(-1)

    def basis(self) -> Tensor:
        return self.fourier

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Set c to its initial values, also after ``to_empty`` has brought it from "meta"."""
        with torch.no_grad():
            self.c.copy_(self._initial(generator))

    def _initial(self, generator: torch.Generator | None) -> Tensor:
        D, C, block = self.head_dim, self.coords, self.block
        if self.init == "normal":
            return normal((self.num_heads, C, D), self.init_std, generator)
        planes = torch.arange(D // block * (block // 2), device="cpu")
        # The first plane of an even block does not turn: the others share the frequencies as equally as can be.
        turning = planes[planes % (block // 2) >= 1 - block % 2]
        if len(turning) < C:
            raise fail("CirculantSTRING", "head_dim", f"give C={C} planes or more that turn", f"{len(turning)}")
        freqs = torch.zeros(C, len(planes), dtype=torch.float64, device="cpu")
        freqs[:, turning] = axial([len(share) for share in turning.tensor_split(C)], self.base)
        return circulant_params(freqs, D, block).expand(self.num_heads, -1, -1)

    def _constants(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        D, block = self.head_dim, self.block
        return {
            "fourier": fourier_basis(D, block, interleaved=self.interleaved, dtype=dtype, device=device),
            "sines": circulant_sines(D, block, dtype=dtype, device=device),
        }

    def _apply(self, *args: Any, **kwargs: Any) -> "CirculantSTRING":
        super()._apply(*args, **kwargs)
        # Constants, so they are made anew: exact after .double(), and there after .to_empty().
        for name, values in self._constants(self.c.device, self.c.dtype).items():
            setattr(self, name, values)
        return self

    def _describe(self) -> list[str]:
        return [f"block={self.block}", f"init={self.init!r}"]


def normal(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> Tensor:
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, dtype=torch.float64, device=device, generator=generator) * std
