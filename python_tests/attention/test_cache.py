import pytest
import torch
from torch import Tensor

from fastrpe.attention import KVCache


def test_update_and_reset() -> None:
    cache = KVCache(2, 3, 5, 4)
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    memory = cache.k.data_ptr()
    for i in range(4):
        k, v = cache.update(x[:, :, i : i + 1], y[:, :, i : i + 1])
        assert torch.equal(k, x[:, :, : i + 1]) and torch.equal(v, y[:, :, : i + 1])
        assert cache.length == cache.offset == i + 1 and k.data_ptr() == memory
    cache.prefix = 3
    assert cache.offset == 1 and cache.max_len == 5
    cache.reset()
    assert cache.length == cache.prefix == cache.offset == 0
    assert torch.equal(cache.update(y, x)[0], y)


def test_overflow_changes_nothing() -> None:
    cache = KVCache(2, 3, 5, 4)
    x = torch.ones(2, 3, 4, 4)
    cache.update(x, x)
    with pytest.raises(ValueError, match=r"^KVCache.update: k must fit in the 1 free tokens of 5, got 2$"):
        cache.update(2 * x[:, :, :2], 2 * x[:, :, :2])
    assert cache.length == 4 and (cache.k <= 1).all()


X = torch.zeros(2, 3, 1, 4)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    (
        (X[:, :2], X, r"k must have shape \(B, Hk, L, D\) with B=2, Hk=3, L=1, D=4, got \(2, 2, 1, 4\)"),
        (X, X.expand(-1, -1, 2, -1), r"v must have shape \(B, Hk, L, D\) with B=2, Hk=3, L=1, D=4, got \(2, 3, 2, 4\)"),
        (X.bfloat16(), X, "k must have dtype float32, got bfloat16"),
        (
            X.clone().requires_grad_(),
            X,
            "k must not require grad, got a tensor that does; decode under torch.no_grad()",
        ),
    ),
)
def test_errors(k: Tensor, v: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^KVCache.update: {message}"):
        KVCache(2, 3, 5, 4).update(k, v)


def test_empty_memory() -> None:
    with pytest.raises(ValueError, match=r"^KVCache: max_len must be at least 1, got 0$"):
        KVCache(2, 3, 0, 4)
