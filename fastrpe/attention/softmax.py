"""Softmax attention, by PyTorch's scaled_dot_product_attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import FLOATS, check_dtype, check_shape, check_type, fail


class Softmax(nn.Module):
    r"""Softmax attention: the default kernel of `Attention`.

    .. math:: y_i = \sum_j \mathrm{softmax}_j(s \, q_i \cdot k_j + b_{j-i} + m_{ij}) \, v_j

    A query that may attend to no key gives zeros, and gradients of zero.
    """

    def forward(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        v: Tensor,  # (B, Hk, S, V)
        bias: Tensor | None = None,  # (H, 2S - 1)
        mask: Tensor | None = None,  # broadcasts to (B, H, L, S)
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:  # (B, H, L, V)
        """Attend.

        Args:
            q: queries.
            k: keys; H is a multiple of Hk, and each key head serves H / Hk query heads in turn.
            v: values.
            bias: relative bias of the logits, ``b[j - i]`` stored at ``j - i + S - 1``. With L < S the queries are the
                last L of the S tokens.
            mask: boolean, True where the query may attend to the key; or floating, added to the logits.
            causal: a query attends to no later key. With L != S the last query meets the last key, as in decoding.
            dropout: probability to drop a weight.
            scale: s, by default 1 / sqrt(D).
        """
        _check(q, k, v, bias, mask)
        # SDPA aligns its own causal mask to the first key, which is the same only for L = S. A branch, since a traced
        # comparison is no bool.
        own_causal = True if causal and bias is None and mask is None and q.shape[2] == k.shape[2] else False
        mask = _additive_or_allowed(q, k, bias, mask, causal and not own_causal)
        groups = q.shape[1] // k.shape[1]
        if groups == 1:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, own_causal, scale=scale)
        if not own_causal and (mask is None or mask.shape[1] == mask.shape[2] == 1):
            # A group's queries attend alike, so they may stand in one row: no copy of keys, any SDPA kernel.
            rows = q.unflatten(1, (-1, groups)).flatten(2, 3)  # (B, Hk, groups * L, D)
            y = F.scaled_dot_product_attention(rows, k, v, mask, dropout, scale=scale)
            y = y.unflatten(2, (groups, -1)).permute(0, 3, 1, 2, 4)  # (B, L, Hk, groups, V)
            return y.contiguous().flatten(2, 3).transpose(1, 2)
        # Only SDPA's 16-bit kernels without a mask know groups; elsewhere it would fall back to plain products.
        grouped = own_causal and q.dtype in (torch.float16, torch.bfloat16)
        if not grouped:
            k, v = _repeat(k, groups), _repeat(v, groups)
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, own_causal, scale=scale, enable_gqa=grouped)

    def weights(
        self,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, Hk, S, D)
        bias: Tensor | None = None,  # (H, 2S - 1)
        mask: Tensor | None = None,  # broadcasts to (B, H, L, S)
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:  # (B, H, L, S)
        """The weights that `forward` gives to the values, written out: for looking at, not for speed."""
        _check(q, k, k, bias, mask)
        mask = _additive_or_allowed(q, k, bias, mask, causal)
        k = _repeat(k, q.shape[1] // k.shape[1])
        logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        if mask is None:
            return logits.softmax(-1)
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        # Twice, so that the softmax of an empty row, a NaN, reaches neither the result nor the gradient.
        empty = logits.isneginf().all(-1, keepdim=True)
        return logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def check_mask(op: str, mask: Tensor, sizes: tuple[int, int, int, int]) -> None:
    """Check that a mask is boolean or floating and broadcasts to ``sizes``, (B, H, L, S)."""
    check_type(op, "mask", mask, Tensor)
    check_dtype(op, "mask", mask, (torch.bool, *FLOATS))
    if mask.dim() > 4 or any(n not in (1, size) for n, size in zip(mask.shape[::-1], sizes[::-1])):
        raise fail(op, "mask", f"broadcast to (B, H, L, S) = {tuple(sizes)}", tuple(mask.shape))


def restrict(
    mask: Tensor | None,  # boolean or floating
    allowed: Tensor,  # boolean
) -> Tensor:
    """``mask`` without the pairs where ``allowed`` is False."""
    if mask is None:
        return allowed
    return mask & allowed if mask.dtype == torch.bool else mask.masked_fill(~allowed, -torch.inf)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    op = "Softmax"
    check_shape(op, "q", q, ("B", "H", "L", "D"))
    B, H, L, D = q.shape
    check_shape(op, "k", k, ("B", "Hk", "S", "D"), B=B, D=D)
    Hk, S = k.shape[1:3]
    if Hk == 0 or H % Hk:
        raise fail(op, "k", f"have a number of heads that divides H={H}", Hk)
    check_shape(op, "v", v, ("B", "Hk", "S", "V"), B=B, Hk=Hk, S=S)
    if bias is not None:
        check_shape(op, "bias", bias, ("H", "2S - 1"), **{"H": H, "2S - 1": 2 * S - 1})
        if L > S:
            raise fail(op, "q", f"have at most S={S} tokens with a bias", L)
    if mask is not None:
        check_mask(op, mask, (B, H, L, S))


def _repeat(
    x: Tensor,  # (B, Hk, S, D)
    groups: int,
) -> Tensor:  # (B, Hk * groups, S, D)
    """Each key head, once for each of its queries' heads."""
    # Heads are next to D in memory: torch.export proves that they merge only where their strides are plain numbers.
    x = x.transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, groups, -1)
    return x.flatten(2, 3).transpose(1, 2)


def _additive_or_allowed(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, Hk, S, D)
    bias: Tensor | None,  # (H, 2S - 1)
    mask: Tensor | None,  # broadcasts to (B, H, L, S)
    causal: bool,
) -> Tensor | None:
    """Bias, mask and causality in one 4-D mask that SDPA takes: boolean without a bias or an additive mask."""
    L, S = q.shape[2], k.shape[2]
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    if bias is not None:
        # Row i of the last L is the window of S entries that starts at S - 1 - i.
        table = bias[:, : L + S - 1].unfold(-1, S, 1).flip(-2)[None]  # (1, H, L, S)
        if mask is None or mask.dtype == torch.bool:
            mask = table if mask is None else restrict(table, mask)
        else:
            mask = table + mask
    if causal and L > 1:  # the one query of a decoding step sees all keys
        mask = restrict(mask, q.new_ones((1, 1, L, S), dtype=torch.bool).tril(S - L))
    return mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
