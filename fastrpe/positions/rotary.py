"""What the rotary encodings share: positions, prefix, the call of `rotate`, and folding a basis into projections."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_shape, check_type, fail
from ..ops import rotate


class Rotary(nn.Module):
    """Base of the rotary encodings: a subclass gives `frequencies` and perhaps a `basis`."""

    def __init__(
        self, head_dim: int, num_heads: int | None, coords: int, interleaved: bool, backend: str | None
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("head_dim", head_dim), ("num_heads", num_heads), ("coords", coords)):
            if value is not None and not (isinstance(value, int) and value >= 1):
                raise fail(name, argument, "be a positive integer", value)
        if coords > 4:
            raise fail(name, "coords", "be 1 to 4", coords)
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.coords = coords
        self.interleaved = interleaved
        self.backend = backend
        self.factor = 1.0
        self.folded = False

    def frequencies(self, length: int) -> Tensor:
        """Radians per unit of position, (C, R) or (H, C, R), for a sequence that ends at ``length``."""
        raise NotImplementedError

    def basis(self) -> Tensor | None:
        """The orthogonal P, (H, D, D) or (D, D), from the parameters as they are now; None where there is none."""
        return None

    def forward(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor | None,  # (B, Hk, L, D)
        positions: Tensor | None = None,  # (L - prefix, C) or (B, L - prefix, C)
        *,
        offset: int = 0,
        prefix: int = 0,
        basis: Tensor | None = None,  # (H, D, D)
    ) -> tuple[Tensor, Tensor]:
        """Encode queries and keys, so that their scores depend on positions through differences alone.

        Args:
            q: queries, ``(B, H, L, D)``.
            k: keys, ``(B, Hk, L, D)``, ``H`` a multiple of ``Hk``; or None (the second result is then empty).
            positions: coordinates in units of one token or patch, ``(L - prefix, C)`` or ``(B, L - prefix, C)``,
                floating or integer; None means 0, 1, 2, ..., where there is one coordinate.
            offset: added to every position: the number of tokens before these when decoding.
            prefix: the first ``prefix`` tokens (CLS, registers) have no position and stay as they are.
            basis: what `basis` gives, where `bases` has computed it for several modules; ignored where it is folded.

        Returns:
            ``(q', k')`` of the shapes of ``q`` and ``k``, as `fastrpe.ops.rotate` gives them.
        """
        length = self._length(q, offset, prefix)
        if self.folded:
            self._check_folded()
        positions = self._positions(q, positions, offset, length)
        freqs = self.frequencies(length + offset)
        if self.folded:
            basis = None
        elif basis is None:
            q, k, basis = self._apply_basis(q, k, prefix)
        options: dict[str, Any] = dict(interleaved=self.interleaved, backend=self.backend)
        yq, yk = rotate(q, k, positions, freqs, basis, factor=self.factor, prefix=prefix, **options)
        if self.folded and prefix:
            # The projections applied P to every token; give it back to those that have no position.
            zero = positions.new_zeros(prefix, self.coords)
            k = None if k is None else k[:, :, :prefix]
            head_q, head_k = rotate(q[:, :, :prefix], k, zero, freqs, self.basis(), inverse=True, **options)
            yq = torch.cat((head_q, yq[:, :, prefix:]), 2)
            yk = yk if k is None else torch.cat((head_k, yk[:, :, prefix:]), 2)
        return yq, yk

    def fold_into(self, q_proj: Any, k_proj: Any) -> None:
        """Multiply the basis into the projections that make q and k, for inference at RoPE's cost; in place.

        Each head's rows of ``weight`` and ``bias`` are multiplied by that head's P (in float64, rounded once), and
        `forward` leaves P out from then on; the state survives `state_dict`. Nothing may stand between the projections
        and this module that does not commute with P (a norm with a gain per channel, for one). Without a basis
        (`RoPE`) this does nothing.

        Args:
            q_proj: `torch.nn.Linear`, or another object with ``weight`` and perhaps ``bias``, whose ``out_features`` is
                a multiple of ``num_heads * head_dim`` (grouped queries).
            k_proj: the same with ``out_features = num_heads * head_dim``.

        Raises:
            RuntimeError: the basis is folded already.
            ValueError: a projection of another size.
        """
        self._fold("fold_into", q_proj, k_proj, folded=True)

    def unfold_from(self, q_proj: Any, k_proj: Any) -> None:
        """Undo `fold_into`, up to the rounding of the weights; takes the same projections."""
        self._fold("unfold_from", q_proj, k_proj, folded=False)

    def _apply_basis(self, q: Tensor, k: Tensor | None, prefix: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``(q, k, P)`` for a rotation that applies P; or ``(P q, P k, None)`` where that costs less."""
        return q, k, self.basis()

    def _basis_kind(self) -> tuple[Any, ...] | None:
        """What modules have in common whose bases `_joint_basis` computes together; None where each does on its own."""
        return None

    def _joint_basis(self, modules: Sequence[Any]) -> Tensor:
        """The bases of modules of this one's kind, one after the other, (modules * H, D, D)."""
        raise NotImplementedError

    def _length(self, q: Tensor, offset: int, prefix: int) -> int:
        """Check what `forward` is called with, apart from positions; return the number of tokens that have one."""
        name = type(self).__name__
        check_shape(name, "q", q, ("B", "H", "L", "D"), D=self.head_dim)
        check_type(name, "offset", offset, int, torch.SymInt)
        check_type(name, "prefix", prefix, int, torch.SymInt)
        if not 0 <= prefix <= q.shape[2]:
            raise fail(name, "prefix", f"lie between 0 and L={q.shape[2]}", prefix)
        return q.shape[2] - prefix

    def _positions(self, q: Tensor, positions: Tensor | None, offset: int, length: int) -> Tensor:
        name = type(self).__name__
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if positions is None:
            if self.coords != 1:
                raise fail(name, "positions", f"be given for C={self.coords} coordinates", None)
            return torch.arange(offset, offset + length, dtype=dtype, device=q.device).unsqueeze(-1)
        shapes = ("L", "C"), ("B", "L", "C")
        check_shape(name, "positions", positions, *shapes, B=q.shape[0], L=length, C=self.coords)
        if not positions.is_floating_point():
            positions = positions.to(dtype)
        return positions if isinstance(offset, int) and offset == 0 else positions + offset

    def _check_folded(self) -> None:
        """Raise where a folded basis would silently not train."""

    @torch.no_grad()
    def _fold(self, method: str, q_proj: Any, k_proj: Any, folded: bool) -> None:
        basis = self.basis()
        if basis is None:
            return
        op = f"{type(self).__name__}.{method}"
        if folded == self.folded:
            raise RuntimeError(f"{op}: folded must be {not folded}, got {folded}; see fold_into and unfold_from")
        heads = self.num_heads or 1
        rows = heads * self.head_dim
        projections = {"q_proj": q_proj, "k_proj": k_proj}
        for argument, linear in projections.items():
            check_type(op, f"{argument}.weight", getattr(linear, "weight", None), Tensor)
            size = linear.weight.shape[0]
            if size != rows and (argument == "k_proj" or size == 0 or size % rows):
                wanted = "" if argument == "k_proj" else "a multiple of "
                raise fail(op, argument, f"have out_features {wanted}num_heads * head_dim = {rows}", size)
        weights = [getattr(linear, part, None) for linear in projections.values() for part in ("weight", "bias")]
        for weight in {id(w): w for w in weights if w is not None}.values():  # once where q and k share a projection
            P = basis.to(weight.device, torch.float64).expand(heads, -1, -1).unsqueeze(1)
            # (Hk, H / Hk, D, inputs): the query heads of a group follow one another
            per_head = weight.double().reshape(heads, -1, self.head_dim, weight[0].numel())
            weight.copy_(((P if folded else P.mT) @ per_head).reshape(weight.shape))
        self.folded = folded

    def _register(self, name: str, values: Tensor, learned: bool, persistent: bool = True) -> None:
        """A float32 parameter or buffer (float64 where that is torch's default) of the shape of ``values``."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        x = torch.empty(values.shape, dtype=dtype)
        if learned:
            self.register_parameter(name, nn.Parameter(x))
        else:
            self.register_buffer(name, x, persistent=persistent)
        with torch.no_grad():
            getattr(self, name).copy_(values)
        self._mark()

    def _mark(self) -> None:
        for p in self.parameters(recurse=False):
            p._no_weight_decay = True  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        def wide(x: Tensor) -> Tensor:
            # Angles and bases are never below float32: .half() and .bfloat16() move them, and leave their dtype.
            y = fn(x)
            return x.to(y.device) if y.dtype in (torch.float16, torch.bfloat16) else y

        super()._apply(wide, recurse)
        self._mark()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # deepcopy drops the attributes of a parameter

    def extra_repr(self) -> str:
        parts = [f"head_dim={self.head_dim}"]
        if self.num_heads is not None:
            parts.append(f"num_heads={self.num_heads}")
        parts.append(f"coords={self.coords}")
        parts += self._describe()
        if self.interleaved:
            parts.append("interleaved=True")
        if self.backend is not None:
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts + ["folded"] * self.folded)

    def _describe(self) -> list[str]:
        return []


def bases(modules: Sequence[Any]) -> list[Tensor | None]:
    """What ``module.basis()`` gives, for the position modules of all layers by one call, which `Rotary.forward` takes.

    A basis is small, so on a GPU those of several layers take as long as one. The results are None, and each module
    computes its own, unless all are of one kind, with the same sizes, not folded, and have a basis that is learned.
    """
    kinds = [module._basis_kind() if isinstance(module, Rotary) and not module.folded else None for module in modules]
    if len(modules) < 2 or kinds[0] is None or any(kind != kinds[0] for kind in kinds):
        return [None] * len(modules)
    return list(modules[0]._joint_basis(modules).chunk(len(modules)))


class Foldable:
    """Keeps ``folded`` in the state dict, as a tensor, so that a checkpoint of folded weights loads as one."""

    folded: bool
    training: bool
    basis_parameter: str | None = None  # what the basis is learned by

    def _check_folded(self) -> None:
        trains = self.basis_parameter is not None and getattr(self, self.basis_parameter).requires_grad
        if self.training and torch.is_grad_enabled() and trains:
            raise RuntimeError(
                f"{type(self).__name__}: the basis must not be folded while it trains, got forward in training mode "
                "with gradients after fold_into; call unfold_from or eval"
            )

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.folded)

    def set_extra_state(self, state: Tensor) -> None:
        self.folded = bool(state)
