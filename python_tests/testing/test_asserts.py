"""The assertions themselves: they find the errors that they are made for."""

import pytest
import torch
from torch import Tensor

from fastrpe.testing.asserts import assert_accurate, assert_bitwise, assert_far, assert_within

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sample(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The float64 values of some computation and its rounding to ``dtype``."""
    exact = torch.randn(64, 65, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return exact, exact.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_another_rounding(dtype: torch.dtype) -> None:
    exact, same = sample(dtype)
    assert_accurate(same, same, exact)
    up = torch.nextafter(same, torch.full_like(same, torch.inf))
    down = torch.nextafter(same, torch.full_like(same, -torch.inf))
    other = torch.where((up.double() - exact).abs() < (down.double() - exact).abs(), up, down)
    half = torch.rand(exact.shape, generator=torch.Generator().manual_seed(1)) < 1 / 4
    assert_accurate(torch.where(half, other, same), same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_one_percent(dtype: torch.dtype) -> None:
    """A wrong scale that a fixed tolerance of 1e-2 would let pass, in 16 bits too, where it is about one rounding."""
    exact, same = sample(dtype)
    with pytest.raises(AssertionError, match="values"):
        assert_accurate((exact * 1.01).to(dtype), same, exact, name="values")


@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_one_wrong_element(dtype: torch.dtype) -> None:
    exact, same = sample(dtype)
    wrong = same.clone()
    wrong[63, 64] += 1
    with pytest.raises(AssertionError, match=r"1 of 4160 wrong; at \(63, 64\) got"):
        assert_accurate(wrong, same, exact)


def test_finds_what_is_not_finite() -> None:
    exact, same = sample(torch.float32)
    wrong = same.clone()
    wrong[0, 0] = torch.nan
    with pytest.raises(AssertionError, match="1 of 4160 are not finite"):
        assert_accurate(wrong, same, exact)
    expected = wrong.double()
    assert_accurate(wrong, wrong, expected)
    with pytest.raises(AssertionError, match="non-finite"):
        assert_accurate(same, wrong, expected)
    wrong[0, 0], expected[0, 0] = torch.inf, -torch.inf
    with pytest.raises(AssertionError, match="non-finite"):
        assert_accurate(wrong, expected.float(), expected)


def test_finds_shape_and_dtype() -> None:
    exact, same = sample(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(same[:1], same, exact)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(same.double(), same, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_within(same[:1], same, 1)
    with pytest.raises(AssertionError, match="shape"):
        assert_bitwise(same[:1], same)
    with pytest.raises(AssertionError, match="dtype"):
        assert_bitwise(same.double(), same)


def test_dtype_of_the_computation() -> None:
    """A float32 gradient of a bfloat16 computation is held to bfloat16."""
    exact, same = sample(torch.float32)
    rough = (exact * (1 + torch.finfo(torch.bfloat16).eps / 8)).float()
    assert_accurate(rough, same, exact, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_accurate(rough, same, exact)


def test_within() -> None:
    expected = torch.tensor([0.0, 2.0])
    assert_within(torch.tensor([0.5, 2.0]), expected, 0.25)
    with pytest.raises(AssertionError, match=r"at \(0,\) got 0.75"):
        assert_within(torch.tensor([0.75, 2.0]), expected, 0.25)
    with pytest.raises(AssertionError, match="got nan"):
        assert_within(torch.tensor([0.0, torch.nan]), expected, 0.25)


def test_bitwise() -> None:
    x = torch.tensor([0.0, torch.nan, torch.inf])
    assert_bitwise(x, x.clone())
    with pytest.raises(AssertionError, match="bytes differ"):
        assert_bitwise(x, torch.tensor([-0.0, torch.nan, torch.inf]))


def test_far() -> None:
    exact = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    assert_far((exact[0].float(), exact[1].float()), exact)
    assert_far((exact[0].bfloat16(), exact[1].bfloat16()), exact)
    with pytest.raises(AssertionError, match="times the error allowed"):
        assert_far((exact[0].float() + 2**-16, exact[1].float()), exact)
    with pytest.raises(AssertionError, match="times the error allowed"):
        assert_far((exact[0].bfloat16() + 2**-4, exact[1].bfloat16()), exact)
    with pytest.raises(AssertionError, match="inf times the error allowed"):
        assert_far((exact[0].float() * torch.nan, exact[1].float()), exact)
