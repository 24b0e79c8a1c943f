"""How results are compared. Tolerances are derived from the reference's own error, never typed into a test."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Far positions: an error relative to the norm of the rotated pair, for |position| up to FAR_POSITION.
FAR_POSITION = 1_000_000
FAR_FLOAT32 = 2e-6
FAR_HALF_ULPS = 1.0

# Results are held to what the reference makes of inputs that are this many roundings off: in float64, which has no
# wider reference, and where the reference in the tested dtype comes closer.
ROUNDINGS = 4

# Laws that hold exactly in real numbers, relative to the norms of what goes in, in float64.
LAW_FLOAT64 = 1e-9


# A peer is timed when it computes the same function; with bfloat16 tables it is no more accurate than this.
PEER_ERROR = 0.03


def assert_accurate(
    actual: Tensor,
    same: Tensor,
    exact: Tensor,
    *,
    name: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """Check ``actual`` against the float64 reference ``exact``, with ``same`` the reference run in the tested dtype.

    ``|err| <= 2 max|same - exact| + eps |exact|`` for every element, which finds a few wrong ones, and
    ``rms(err) <= 2 rms(same - exact) + eps/4 rms(exact)``, which finds a small error common to all. ``eps`` is that of
    ``dtype``, the dtype of the computation where it is narrower than the result's. Non-finite entries must be equal.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == same.dtype, f"{name}: dtype {actual.dtype}, expected {same.dtype}"
    if not exact.numel():
        return
    eps = torch.finfo(dtype or actual.dtype).eps
    actual, same, exact = (x.detach().double() for x in (actual, same, exact))
    finite = exact.isfinite() & same.isfinite()
    torch.testing.assert_close(
        actual[~finite], same[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: non-finite: {m}"
    )
    zero = torch.zeros((), dtype=torch.float64, device=exact.device)
    error, own, size = (torch.where(finite, x, zero) for x in (actual - exact, same - exact, exact))
    assert error.isfinite().all(), f"{name}: {int((~error.isfinite()).sum())} of {error.numel()} are not finite"
    error, own, size = error.abs(), own.abs(), size.abs()
    bound = 2 * own.max() + eps * size
    worst = int((error - bound).argmax())
    assert (error <= bound).all(), (
        f"{name}: {int((error > bound).sum())} of {error.numel()} wrong; at {_index(worst, exact)} got "
        f"{actual.flatten()[worst]:.9g}, expected {exact.flatten()[worst]:.9g} within {bound.flatten()[worst]:.3g}"
    )
    got, allowed = rms(error), 2 * rms(own) + eps / 4 * rms(size)
    assert got <= allowed, f"{name}: root mean square error {got:.3g}, allowed {allowed:.3g}"


def assert_within(actual: Tensor, expected: Tensor, bar: float, *, name: str = "result") -> None:
    """Check ``|actual - expected| <= bar * max|expected|`` for every element; where all expected are 0, ``bar``."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.abs().max()) or 1.0
    error = (actual - expected).abs()
    worst = int(error.nan_to_num(nan=torch.inf).argmax())
    assert float(error.flatten()[worst]) <= bar * scale, (
        f"{name}: at {_index(worst, expected)} got {actual.flatten()[worst]:.9g}, expected "
        f"{expected.flatten()[worst]:.9g} within {bar:.3g} x {scale:.3g}"
    )


def assert_bitwise(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Check that two tensors hold the same bits: NaN payloads, signs of zeros and all."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype}, expected {expected.dtype}"
    a, b = (x.detach().contiguous().view(-1).view(torch.uint8) if x.numel() else x for x in (actual, expected))
    assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ"


def assert_same(actual: Tensor, expected: Tensor, backend: str, *, name: str = "result") -> None:
    """The same bits, or nearly: PyTorch's products on a GPU round in an order that depends on sizes and strides."""
    if backend == "reference" and actual.is_cuda:
        assert_within(actual, expected, ROUNDINGS * torch.finfo(actual.dtype).eps, name=name)
    else:
        assert_bitwise(actual, expected, name=name)


def assert_far(actual: Sequence[Tensor], exact: Sequence[Tensor], *, name: str = "result") -> None:
    """Check a rotation far out: each pair's error against the pair's norm; both arguments are a pair's coordinates."""
    norm = torch.hypot(*(x.double() for x in exact))
    error = torch.hypot(*(a.double() - x.double() for a, x in zip(actual, exact)))
    if actual[0].dtype == torch.float32:
        bound = FAR_FLOAT32 * norm
    else:  # one unit in the last place of the norm
        bound = FAR_HALF_ULPS * torch.finfo(actual[0].dtype).eps * 2.0 ** norm.log2().floor()
    worst = float((error / bound).nan_to_num(nan=torch.inf).max())
    assert worst <= 1, f"{name}: {worst:.3g} times the error allowed to a pair of this norm"


def rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _index(flat: int, like: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), like.shape))
