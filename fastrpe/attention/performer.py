"""Performer attention: any feature map, by `fastrpe.ops.linear_attention`."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_choice, check_shape, check_type, fail
from ..ops.linear import State, linear_attention
from .cache import LinearCache
from .softmax import check_mask

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Performer(nn.Module):
    r"""Attention in time linear in the length, of any feature map: a kernel of `Attention`.

    .. math:: y_i = \frac{\phi(q_i)^\top \sum_j \phi(k_j) v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

    Features of the kinds of `random_features` are computed inside the kernel and never written to memory; other maps
    are called. A query that may attend to no key gives zeros.

    With ``order="pre"`` positions are encoded in q and k, before their features: weights stay positive, and for
    estimators of exp(q.k) they depend on positions through differences alone, in the mean. Every encoding goes with it.
    ``order="post"`` is RoFormer's: R turns features, in the numerator alone,

    .. math:: y_i = \frac{(R_i \phi(q_i))^\top \sum_j R_j \phi(k_j) \, v_j^\top}{\phi(q_i)^\top \sum_j \phi(k_j)}

    which is relative for every feature map; weights may be negative and need not sum to 1. It goes with rotations
    (RoPE, STRING, reflections) of heads of as many coordinates as there are features, and writes features to memory,
    in float32.

    The projection of a feature map with ``redraw_every`` is drawn anew by `fastrpe.feature_maps.step`, called after
    each step of the optimiser, in place: a compiled or captured step goes on with the new one.

    Args:
        feature_map: of `fastrpe.feature_maps`, or another module that maps ``(q, k, causal=)`` to features (B, H, L, F)
            and (B, Hk, S, F). `OPRFFeatures` and `SADERF` fit themselves to all tokens, padding included.
        order: ``"pre"`` or ``"post"``; they differ where there is a position encoding.
        normalize: divide by the sum of the weights.
        backend: of `fastrpe.ops.linear_attention`.

    Raises:
        ValueError: an unknown order; ``normalize=False`` with ``"post"``, or of a map without a kind.

    Source:
        Performers (arXiv 2009.14794); RoFormer (arXiv 2104.09864) eq. 19 for ``"post"``.
    """

    cache_type = LinearCache  # what `Attention` decodes with
    feature_map: Any

    def __init__(
        self, feature_map: nn.Module, *, order: str = "pre", normalize: bool = True, backend: str | None = None
    ) -> None:
        super().__init__()
        check_type("Performer", "feature_map", feature_map, nn.Module)
        check_choice("Performer", "order", order, ("pre", "post"))
        if not normalize and order == "post":
            raise fail("Performer", "order", "be 'pre' with normalize=False", repr(order))
        if not normalize and getattr(feature_map, "kind", None) is None:
            came = type(feature_map).__name__
            raise fail("Performer", "feature_map", "have a kind with normalize=False: else its scale is free", came)
        self.feature_map = feature_map
        self.order, self.normalize, self.backend = order, normalize, backend

    @property
    def head_dim(self) -> int | None:
        """D, the size of the heads that the feature map takes; None where it does not say."""
        return getattr(self.feature_map, "head_dim", None)

    @property
    def num_heads(self) -> int | None:
        """The number of key heads, where each has a projection of its own."""
        return getattr(self.feature_map, "num_heads", None)

    def forward(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        v: Tensor,  # (B, Hk, S, V)
        mask: Tensor | None = None,  # broadcasts to (B, 1, 1, S)
        causal: bool = False,
        dropout: float = 0.0,
        encode: Encode | None = None,
        cache: LinearCache | None = None,
    ) -> Tensor:  # (B, H, L, V)
        """Attend.

        Args:
            q: queries.
            k: keys; H is a multiple of Hk, and each key head serves H / Hk query heads in turn.
            v: values.
            mask: boolean, False for keys that nobody attends to (padding). With a cache, S counts all tokens seen, and
                what it says of earlier ones is not looked at again.
            causal: a query attends to no later key. With L != S the last query meets the last key.
            dropout: 0, since weights are never formed.
            encode: turns features by their positions, for ``order="post"``.
            cache: the tokens before these, to which these are added; causal alone.

        Returns:
            ``(B, H, L, V)``, of the dtype of v, accumulated and rounded as by `fastrpe.ops.linear_attention`.

        Raises:
            TypeError, ValueError: a wrong type or shape; a cache without ``causal``; ``causal`` of a map that looks at
                all keys.
            NotImplementedError: dropout, or a mask that is not one of keys.
        """
        op = "Performer"
        check_shape(op, "q", q, ("B", "H", "L", "D"), **({} if self.head_dim is None else {"D": self.head_dim}))
        B, H, L, D = q.shape
        check_shape(op, "k", k, ("B", "Hk", "S", "D"), B=B, D=D)
        S, kind = k.shape[2], getattr(self.feature_map, "kind", None)
        if cache is not None:
            check_type(op, "cache", cache, LinearCache)
        keys = _key_mask(mask, (B, H, L, S + (0 if cache is None else cache.length)), S)
        if dropout:
            raise NotImplementedError(f"{op}: dropout must be 0, got {dropout}; Softmax drops weights")
        if cache is not None and not causal:
            raise fail(op, "causal", "be True with a cache", causal)
        local = getattr(self.feature_map, "causal", True)
        if causal and not local:
            raise fail(op, "causal", f"be False with {type(self.feature_map).__name__}, which looks at all keys", True)
        if keys is not None and not (local and kind is not None and encode is None):
            k = k.masked_fill(~keys[:, None, :, None], 0)  # what padding holds does not come into a common factor
        states = (None, None) if cache is None else cache.states
        if encode is not None:
            y, states = self._post(q, k, v, keys, causal, encode, states)
        else:
            options: dict[str, Any] = dict(kind="features")
            if kind is None:
                q, k = self.feature_map(q, k, causal=causal)
            else:
                q, k, a = self.feature_map.prepare(q, k)
                options = dict(kind=kind, omega=self.feature_map.omega, a=a)
                options |= dict(scale=self.feature_map.scale, eps=self.feature_map.eps)
            options |= dict(normalize=self.normalize, backend=self.backend)
            y, state = _attend(q, k, v, keys, causal, states[0], options)
            states = state, None
        if cache is not None:
            cache.update(states, S)
        return y

    def feature_dim(self, head_dim: int, heads: int) -> int:
        """F, the number of features that the map makes of heads of this size."""
        tensors = chain(self.parameters(), self.buffers())
        device = next((x.device for x in tensors), torch.device("cpu"))
        features = self.feature_map
        if device.type == "meta":  # where autocast has no meaning
            features, device = copy.deepcopy(features).to_empty(device="cpu"), torch.device("cpu")
        x = torch.zeros(1, heads, 1, head_dim, device=device)
        with torch.no_grad():
            return int(features(x, x)[0].shape[-1])

    def _post(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        v: Tensor,  # (B, Hk, S, V)
        keys: Tensor | None,  # (B, S)
        causal: bool,
        encode: Encode,
        states: tuple[State | None, State | None],
    ) -> tuple[Tensor, tuple[State | None, State | None]]:
        """Numerator and denominator apart, so in float32 at least."""
        dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
        options: dict[str, Any] = dict(kind="features", normalize=False, backend=self.backend)
        with torch.autocast(q.device.type, enabled=False):
            v = v.to(wide)
            phi_q, phi_k = self.feature_map(q.to(wide), k.to(wide), causal=causal)
            turned_q, turned_k = encode(phi_q, phi_k)
            num, first = _attend(turned_q, turned_k, v, keys, causal, states[0], options)
            den, second = _attend(phi_q, phi_k, v.new_ones(*v.shape[:3], 1), keys, causal, states[1], options)
            return (num / den.masked_fill(den == 0, torch.inf)).to(dtype), (first, second)

    def extra_repr(self) -> str:
        return f"order={self.order!r}" + ("" if self.normalize else ", normalize=False")


def _attend(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    v: Tensor,  # (B, Hk, S, V)
    keys: Tensor | None,  # (B, S)
    causal: bool,
    state: State | None,
    options: dict[str, Any],
) -> tuple[Tensor, State | None]:
    """`linear_attention` and, when causal, the state; the last query meets the last key."""
    L, S = q.shape[2], k.shape[2]
    aligned = True if not causal or L == S else False  # a traced comparison is no bool
    if not aligned:
        q = F.pad(q, (0, 0, S - L, 0))  # a negative number cuts off the queries that meet no key
    result: Any = linear_attention(q, k, v, causal=causal, mask=keys, state=state, return_state=causal, **options)
    y, state = result if causal else (result, None)
    return y if aligned else F.pad(y, (0, 0, L - S, 0)), state


def _key_mask(
    mask: Tensor | None,  # broadcasts to (B, 1, 1, S)
    shape: tuple[int, int, int, int],
    last: int,
) -> Tensor | None:
    """Which of the last keys take part, (B, last)."""
    if mask is None:
        return None
    check_mask("Performer", mask, shape)
    four = mask[(None,) * (4 - mask.dim())]
    if mask.dtype != torch.bool or four.shape[1] != 1 or four.shape[2] != 1:
        came = f"{str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        raise NotImplementedError(
            f"Performer: mask must be boolean, of the shape (B, 1, 1, S) of a key padding mask, got {came}; "
            "Softmax takes any"
        )
    return four[:, 0, 0].expand(shape[0], shape[3])[:, shape[3] - last :]
