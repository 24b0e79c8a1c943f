"""Multi-head attention with a plug for the position encoding and one for the attention kernel."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_dtype, check_shape, check_type, fail
from .cache import KVCache, LinearCache
from .softmax import Softmax, check_mask, restrict


class Attention(nn.Module):
    r"""Multi-head attention whose position encoding and kernel are plugged in.

    .. math:: y = W_o \, \mathrm{kernel}(q', k', W_v z), \qquad (q', k') = \mathrm{position}(W_q x, W_k z, p)

    with z the context, x itself in self attention. Values are never rotated.

    Args:
        dim: size of a token.
        num_heads: H.
        num_kv_heads: Hk, a divisor of H: grouped queries; by default H.
        head_dim: D, by default ``dim // num_heads``.
        context_dim: size of a token of the context, by default ``dim``.
        bias: give the four projections a bias.
        dropout: probability to drop an attention weight in training.
        causal: a query attends to no later key. With fewer queries than keys the last query meets the last key.
        position: a module of `fastrpe.positions`, or another that maps ``(q, k, positions, offset=, prefix=)`` to
            ``(q', k')`` and has the attribute ``head_dim``; None for no encoding.
        kernel: by default `Softmax`; `Performer`; or another module that maps ``(q, k, v, mask=, causal=, dropout=)``
            to the output (B, H, L, D).
    """

    position: Any
    kernel: Any

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        causal: bool = False,
        position: nn.Module | None = None,
        kernel: nn.Module | None = None,
    ) -> None:
        super().__init__()
        op = "Attention"
        heads = num_heads if num_kv_heads is None else num_kv_heads
        if dim < 1 or num_heads < 1 or (head_dim is None and dim % num_heads):
            raise fail(op, "num_heads", f"divide dim={dim} where head_dim is not given", num_heads)
        if heads < 1 or num_heads % heads:
            raise fail(op, "num_kv_heads", f"divide num_heads={num_heads}", heads)
        check_dropout(op, dropout)
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.context_dim = dim if context_dim is None else context_dim
        self.dropout, self.causal = dropout, causal
        self.q_proj = nn.Linear(dim, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(self.context_dim, heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.context_dim, heads * self.head_dim, bias=bias)
        self.out_proj = nn.Linear(num_heads * self.head_dim, dim, bias=bias)
        self.kernel = Softmax() if kernel is None else kernel
        check_pair(op, position, self.kernel, self.head_dim, heads)
        self.position = position

    def forward(
        self,
        x: Tensor,  # (B, L, dim)
        context: Tensor | None = None,  # (B, S, context_dim)
        *,
        positions: Tensor | None = None,  # (L - prefix, C) or (B, L - prefix, C)
        context_positions: Tensor | None = None,  # (S - context_prefix, C) or (B, S - context_prefix, C)
        mask: Tensor | None = None,  # broadcasts to (B, H, L, S)
        key_mask: Tensor | None = None,  # (B, S)
        prefix: int = 0,
        context_prefix: int = 0,
        cache: KVCache | LinearCache | None = None,
        basis: Tensor | None = None,  # (Hk, D, D)
    ) -> Tensor:  # (B, L, dim)
        """Attend to x itself, or to the context.

        Args:
            x: tokens that ask.
            context: tokens that are attended to; None for self attention.
            positions: coordinates of x's tokens, floating, taken as they are; by default 0, 1, 2, ..., counted on from
                the cache. Ignored without a position encoding.
            context_positions: the same for the context.
            mask: boolean, True where the query may attend to the key; or floating, added to the logits. With a cache, S
                counts all tokens stored.
            key_mask: boolean, False for keys that nobody attends to (padding).
            prefix: the first tokens of x (CLS, registers) that have no position.
            context_prefix: the same for the context.
            cache: of the tokens before x, to which those of x are appended: a `KVCache`, or a `LinearCache` where the
                kernel is a `Performer`.
            basis: the position's, where `fastrpe.positions.bases` has computed it for several layers.
        """
        op = "Attention"
        check_shape(op, "x", x, ("B", "L", "dim"), dim=self.dim)
        if context is None:
            if self.context_dim != self.dim:
                raise fail(op, "context", f"have shape (B, S, {self.context_dim})", None)
            if context_positions is not None or context_prefix:
                raise fail(op, "context", "be given with context_positions or context_prefix", None)
        else:
            check_shape(op, "context", context, ("B", "S", "context_dim"), B=x.shape[0], context_dim=self.context_dim)
            if cache is not None:
                raise fail(op, "cache", "be None with a context", type(cache).__name__)
        if cache is not None:
            check_type(op, "cache", cache, getattr(self.kernel, "cache_type", KVCache))
        source = x if context is None else context
        B, L, S = *x.shape[:2], source.shape[1] + (0 if cache is None else cache.length)
        if mask is not None:
            check_mask(op, mask, (B, self.num_heads, L, S))
        if key_mask is not None:
            check_shape(op, "key_mask", key_mask, ("B", "S"), B=B, S=S)
            check_dtype(op, "key_mask", key_mask, (torch.bool,))
            mask = restrict(mask, key_mask[:, None, None])
        q, k, v = (
            projection(z).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, z in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        offset = 0 if cache is None or positions is not None else cache.offset

        def encode(q: Tensor, k: Tensor) -> tuple[Tensor, Any]:
            if context is None:
                return place(self.position, q, k, positions, prefix, offset, basis)
            q, _ = place(self.position, q, None, positions, prefix, basis=basis)
            k, _ = place(self.position, k, None, context_positions, context_prefix, basis=basis)
            return q, k

        options: dict[str, Any] = dict(causal=self.causal, dropout=self.dropout if self.training else 0.0)
        if self.position is not None and turns_features(self.kernel):
            options["encode"] = encode
        else:
            q, k = encode(q, k)
        if isinstance(cache, KVCache):
            k, v = cache.update(k, v)
        elif cache is not None:
            options["cache"] = cache
        y: Tensor = self.kernel(q, k, v, mask=mask, **options)
        if cache is not None:
            cache.prefix += prefix
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def fold(self) -> None:
        """Let the projections absorb the position's basis, for inference at RoPE's cost; `unfold` undoes it."""
        if self.position is not None:
            if turns_features(self.kernel):
                raise fail("Attention.fold", "kernel", "have order='pre': projections do not make features", "'post'")
            self.position.fold_into(self.q_proj, self.k_proj)

    def unfold(self) -> None:
        """Undo `fold`, up to rounding."""
        if self.position is not None:
            self.position.unfold_from(self.q_proj, self.k_proj)

    def extra_repr(self) -> str:
        kv = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        return f"{self.dim}, {self.num_heads}{kv}, head_dim={self.head_dim}, causal={self.causal}"


def place(
    position: Any,
    q: Tensor,  # (B, H, L, D)
    k: Tensor | None,  # (B, Hk, L, D)
    positions: Tensor | None,  # (L - prefix, C) or (B, L - prefix, C)
    prefix: int,
    offset: int = 0,
    basis: Tensor | None = None,  # (Hk, D, D)
) -> tuple[Tensor, Tensor | None]:
    """Encode the positions of q, and of k when both have the same."""
    options: dict[str, Any] = {} if basis is None else {"basis": basis}
    return (q, k) if position is None else position(q, k, positions, offset=offset, prefix=prefix, **options)


def check_pair(op: str, position: Any, kernel: Any, head_dim: int, heads: int) -> None:
    """Check that the two plugs fit each other and the attention with ``heads`` key heads they are plugged into."""
    encodes = position is None or (_takes(position, "offset", "prefix") and hasattr(position, "head_dim"))
    if not (encodes and _takes(kernel, "mask", "causal", "dropout")):
        pairs = (
            "None, RoPE, CayleySTRING, CirculantSTRING or another with head_dim whose forward takes (q, k, positions, "
            "offset=, prefix=), with Softmax or Performer or another whose forward takes (q, k, v, mask=, causal=, "
            "dropout=)"
        )
        raise fail(op, "position and kernel", f"be a pair of {pairs}", f"{_name(position)} with {_name(kernel)}")
    post = position is not None and turns_features(kernel)
    if post and (hasattr(position, "out_dim") or getattr(position, "factor", 1.0) != 1):
        came = _name(position)
        raise fail(op, "position", "be a rotation without a factor of its own where it turns features", came)
    _check_heads(op, "kernel", kernel, getattr(position, "out_dim", head_dim), heads)
    _check_heads(op, "position", position, kernel.feature_dim(head_dim, heads) if post else head_dim, heads)


def _check_heads(op: str, name: str, plug: Any, head_dim: int, heads: int) -> None:
    if getattr(plug, "head_dim", None) not in (None, head_dim):
        raise fail(op, name, f"have head_dim={head_dim}", plug.head_dim)
    if getattr(plug, "num_heads", None) not in (None, heads):
        raise fail(op, name, f"have num_heads={heads}, the number of key heads", plug.num_heads)


def turns_features(kernel: Any) -> bool:
    """Whether positions turn the kernel's features, in place of queries and keys."""
    return getattr(kernel, "order", "pre") == "post"


def check_dropout(op: str, dropout: float) -> None:
    if not 0 <= dropout <= 1:
        raise fail(op, "dropout", "lie between 0 and 1", dropout)


def _takes(module: Any, *arguments: str) -> bool:
    return isinstance(module, nn.Module) and inspect.signature(module.forward).parameters.keys() >= set(arguments)


def _name(module: object) -> str:
    return "None" if module is None else type(module).__name__
