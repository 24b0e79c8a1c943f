"""torch.nn.MultiheadAttention with a plug for the position encoding."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FLOATS, check_dtype, check_shape, fail
from .attention import check_dropout, check_pair, place
from .softmax import Softmax, restrict


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with a position encoding: same arguments, results, initialisation and state dict.

    Two things differ. A query that may attend to no key gives zeros, also where torch.nn gives NaN. ``is_causal`` is
    a hint, as torch.nn documents it: where the mask says more than the hint, the mask is applied.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.
        position: a module of `fastrpe.positions` for ``head_dim = embed_dim // num_heads``, or None. The extra tokens
            of ``add_bias_kv`` and ``add_zero_attn`` have no position.
    """

    position: Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        position: nn.Module | None = None,
    ) -> None:
        op = "MultiheadAttention"
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise fail(op, "num_heads", f"divide embed_dim={embed_dim}", num_heads)
        check_dropout(op, dropout)
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.kernel = Softmax()
        check_pair(op, position, self.kernel, self.head_dim, num_heads)
        self.position = position

    def _reset_parameters(self) -> None:
        self._qkv_same_embed_dim = self.in_proj_weight is not None
        super()._reset_parameters()
        # Keeps torch.nn.TransformerEncoderLayer off its fused inference path, which reads our weights and no positions.
        self._qkv_same_embed_dim = False

    def forward(
        self,
        query: Tensor,  # (L, B, E), (B, L, E) when batch_first, or (L, E)
        key: Tensor,  # (S, B, kdim), (B, S, kdim) or (S, kdim)
        value: Tensor,  # (S, B, vdim), (B, S, vdim) or (S, vdim)
        key_padding_mask: Tensor | None = None,  # (B, S) or (S,)
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # (L, S) or (B * H, L, S)
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        positions: Tensor | None = None,  # (L - prefix, C) or (B, L - prefix, C)
        key_positions: Tensor | None = None,  # (S - key_prefix, C) or (B, S - key_prefix, C)
        prefix: int = 0,
        key_prefix: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as torch.nn.MultiheadAttention does: True in a boolean mask means not allowed.

        Args:
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal: as in
                torch.nn.
            positions: coordinates of the queries, floating; by default 0, 1, 2, ... Ignored without an encoding.
            key_positions: coordinates of the keys; by default ``positions``.
            prefix: the first tokens (CLS, registers) of the queries that have no position.
            key_prefix: the same for the keys; by default ``prefix``.
        """
        op = "MultiheadAttention"
        batched = self._check_tokens(query, key, value)
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_first = self.batch_first or not batched
        q, k, v = (
            y.unflatten(-1, (-1, self.head_dim)).permute((0, 2, 1, 3) if batch_first else (1, 2, 0, 3))
            for y in self._project(query, key, value)
        )  # (B, H, L or S, D)
        L, S = q.shape[2], k.shape[2]
        if is_causal and attn_mask is None:
            raise fail(op, "attn_mask", "be given with is_causal=True, which is a hint about it", None)
        hint = is_causal and key_padding_mask is None and not need_weights and not self._extra_keys
        causal = True if hint and L == S else False  # a traced comparison is no bool
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        key_prefix = prefix if key_prefix is None else key_prefix
        if key_positions is None and key_prefix == prefix and L == S:
            q, k = place(self.position, q, k, positions, prefix)
        else:
            q, _ = place(self.position, q, None, positions, prefix)
            k, _ = place(self.position, k, None, positions if key_positions is None else key_positions, key_prefix)
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = F.dropout(self.kernel.weights(q, k, mask=mask), dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = self.kernel(q, k, v, mask=None if causal else mask, causal=causal, dropout=dropout)
        y = self.out_proj(y.permute((0, 2, 1, 3) if batch_first else (2, 0, 1, 3)).flatten(2))
        if not batched:
            y, weights = y[0], None if weights is None else weights[0]
        return y, weights

    def fold(self) -> None:
        """Let the projections absorb the position's basis, for inference at RoPE's cost; `unfold` undoes it."""
        if self.position is not None:
            self.position.fold_into(*self._projections())

    def unfold(self) -> None:
        """Undo `fold`, up to rounding."""
        if self.position is not None:
            self.position.unfold_from(*self._projections())

    @property
    def _extra_keys(self) -> int:
        return (self.bias_k is not None) + self.add_zero_attn

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Check the shapes of the tokens; return whether they are batched."""
        op = "MultiheadAttention"
        lead = ("B", "{}") if self.batch_first else ("{}", "B")
        sizes: dict[str, int] = {"E": self.embed_dim, "kdim": self.kdim, "vdim": self.vdim}
        for name, x, length, size in (
            ("query", query, "L", "E"),
            ("key", key, "S", "kdim"),
            ("value", value, "S", "vdim"),
        ):
            shapes = [(*(s.format(length) for s in lead), size), (length, size)]
            if name != "query":
                shapes = [s for s in shapes if len(s) == query.dim()]
            check_shape(op, name, x, *shapes, **sizes)
            sizes |= dict(zip(next(s for s in shapes if len(s) == x.dim()), x.shape))
        return query.dim() == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases))

    def _extend(
        self,
        x: Tensor,  # (B, H, S, D)
        bias: Tensor | None,  # (1, 1, E)
    ) -> Tensor:  # (B, H, S + extra, D)
        """Append the tokens of ``add_bias_kv`` and ``add_zero_attn``."""
        B, H, _, D = x.shape
        parts = [x]
        if bias is not None:
            parts.append(bias.to(x.dtype).view(1, H, 1, D).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(B, H, 1, D))
        return torch.cat(parts, 2) if len(parts) > 1 else x

    def _mask(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, H, S, D)
        attn_mask: Tensor | None,  # (L, S) or (B * H, L, S)
        key_padding_mask: Tensor | None,  # (B, S)
    ) -> Tensor | None:
        """Both masks in one that broadcasts to (B, H, L, S + extra); True in a boolean one means allowed."""
        op = "MultiheadAttention"
        B, H, L, S = *q.shape[:3], k.shape[2]
        mask = None
        if attn_mask is not None:
            sizes = {"L": L, "S": S, "B * H": B * H}
            check_shape(op, "attn_mask", attn_mask, ("L", "S"), ("B * H", "L", "S"), **sizes)
            mask = _allowed_or_additive("attn_mask", attn_mask)
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (B, H))
        if key_padding_mask is not None:
            check_shape(op, "key_padding_mask", key_padding_mask, ("B", "S"), B=B, S=S)
            padding = _allowed_or_additive("key_padding_mask", key_padding_mask)[:, None, None]
            if mask is None:
                mask = padding
            elif padding.dtype == torch.bool:
                mask = restrict(mask, padding)
            else:
                mask = restrict(padding, mask) if mask.dtype == torch.bool else mask + padding
        if mask is None or not self._extra_keys:
            return mask
        return F.pad(mask, (0, self._extra_keys), value=mask.dtype == torch.bool)

    def _projections(self) -> tuple[SimpleNamespace, SimpleNamespace]:
        """What makes queries and keys, as views of the packed parameters."""
        weights = (
            (self.q_proj_weight, self.k_proj_weight) if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        )
        biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k = (
            SimpleNamespace(weight=w.detach(), bias=None if b is None else b.detach())
            for w, b in zip(weights[:2], biases)
        )
        return q, k


def _allowed_or_additive(name: str, mask: Tensor) -> Tensor:
    """torch.nn's mask, in which True means not allowed, as ours."""
    check_dtype("MultiheadAttention", name, mask, (torch.bool, *FLOATS))
    return ~mask if mask.dtype == torch.bool else mask
