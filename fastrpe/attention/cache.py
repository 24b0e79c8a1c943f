"""What attention keeps of the tokens seen so far: keys and values, or a `Performer`'s sums."""

import torch
from torch import Tensor

from ..checks import check_dtype, check_shape, fail
from ..ops.linear import State


class KVCache:
    """A static cache: memory for ``max_len`` tokens is taken once, and nothing is moved when tokens arrive.

    Keys are stored after the position encoding. The lengths live on the host, so that decoding never waits for the
    device. For inference: what is stored must not require grad.

    Args:
        batch: B.
        heads: Hk, the number of key heads.
        max_len: the most tokens that fit.
        head_dim: D, of values, and of keys without a ``key_dim``.
        key_dim: Dk, of encoded keys, where that is another (`fastrpe.positions.TensorSTRING.out_dim`).
        device: where the memory is.
        dtype: of keys and values; the autocast dtype under autocast.

    Attributes:
        length: number of tokens stored.
        prefix: how many of them have no position (`Attention.forward`).
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        max_len: int,
        head_dim: int,
        *,
        key_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_len < 1:
            raise fail("KVCache", "max_len", "be at least 1", max_len)
        sizes = batch, heads, max_len
        self.k = torch.zeros(*sizes, key_dim or head_dim, device=device, dtype=dtype)  # (B, Hk, max_len, Dk)
        self.v = torch.zeros(*sizes, head_dim, device=device, dtype=dtype)  # (B, Hk, max_len, D)
        self.length = 0
        self.prefix = 0

    @property
    def max_len(self) -> int:
        return self.k.shape[2]

    @property
    def offset(self) -> int:
        """The position of the next token: prefix tokens do not count."""
        return self.length - self.prefix

    def update(
        self,
        k: Tensor,  # (B, Hk, L, Dk)
        v: Tensor,  # (B, Hk, L, D)
    ) -> tuple[Tensor, Tensor]:
        """Append L tokens; return views of all keys and values stored, (B, Hk, length, Dk) and (B, Hk, length, D)."""
        op = "KVCache.update"
        B, Hk = self.k.shape[:2]
        for name, x, D in (("k", k, self.k.shape[-1]), ("v", v, self.v.shape[-1])):
            check_shape(op, name, x, ("B", "Hk", "L", "D"), B=B, Hk=Hk, L=k.shape[-2], D=D)
            check_dtype(op, name, x, (self.k.dtype,))
            if x.requires_grad:
                raise fail(op, name, "not require grad", "a tensor that does; decode under torch.no_grad()")
        end = self.length + k.shape[2]
        if end > self.max_len:
            raise fail(op, "k", f"fit in the {self.max_len - self.length} free tokens of {self.max_len}", k.shape[2])
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.length = self.prefix = 0


class LinearCache:
    """The state of a `Performer` that decodes: of one size, and in one time a token, however many came before.

    Its tensors come with the first tokens. Gradients flow through it; `detach` cuts them off (truncated
    back-propagation), as decoding under torch.no_grad() does.

    Attributes:
        states: sums over the keys, those of the denominator apart where positions turn features.
        length: number of tokens seen.
        prefix: how many of them have no position (`Attention.forward`).
    """

    states: tuple[State | None, State | None]

    def __init__(self) -> None:
        self.reset()

    @property
    def offset(self) -> int:
        """The position of the next token: prefix tokens do not count."""
        return self.length - self.prefix

    def update(self, states: tuple[State | None, State | None], count: int) -> None:
        """Take the states behind the next ``count`` tokens."""
        self.states = states
        self.length += count

    def detach(self) -> None:
        """Forget how the states came about."""
        first, second = (None if state is None else State(*(x.detach() for x in state)) for state in self.states)
        self.states = first, second

    def reset(self) -> None:
        """Forget all tokens."""
        self.states = None, None
        self.length = self.prefix = 0
