"""RoPE's bars, SPEC 1.7, items 1 to 9."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrpe.ops import rotate
from fastrpe.positions import RoPE, grid_positions
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import ADJOINT, NORM, SHIFT, SHIFT_RANGE
from python_tests.positions.shared import ENCODINGS, HEADS, LENGTH, SIZE, points, scores, tokens

laws = settings(max_examples=15, deadline=None)


def _norms(q: Tensor, k: Tensor) -> Tensor:
    return q.norm(dim=-1).unsqueeze(-1) * k.norm(dim=-1).unsqueeze(-2)


@pytest.mark.parametrize("name", [n for n in ENCODINGS if n != "rope-dynamic"])
@pytest.mark.parametrize("dtype", SHIFT, ids=str)
@laws
@given(st.floats(-SHIFT_RANGE, SHIFT_RANGE, width=32), st.integers(0, 99))
def test_1_shift_invariance(name: str, dtype: torch.dtype, shift: float, seed: int) -> None:
    module = ENCODINGS[name]().to(dtype)
    q, k = tokens(dtype=dtype, seed=seed), tokens(dtype=dtype, seed=seed + 1)
    # Whole numbers: float32 must hold position and shift without rounding for the law to be about the rotation.
    positions = points(module.coords, dtype=dtype).round()
    a, b = (scores(module(q, k, p)) for p in (positions, positions + round(shift)))
    assert ((a - b).abs() <= SHIFT[dtype] * _norms(q, k)).all()


def test_2_norms_are_kept(encoding: nn.Module) -> None:
    q = tokens()
    yq, _ = encoding(q, None, 37 * points(encoding.coords))
    assert_within(yq.norm(dim=-1) / q.norm(dim=-1), torch.ones(q.shape[:-1]), NORM)


@pytest.mark.parametrize("name", [n for n in ENCODINGS if n.startswith("rope")])
def test_2_position_zero_changes_nothing(name: str) -> None:
    module, q = ENCODINGS[name](), tokens()
    assert_bitwise(module(q, q, torch.zeros(LENGTH, module.coords))[0], q)


@pytest.mark.parametrize("rotary_dim", (SIZE, 12))
def test_3_layouts_agree_through_the_permutation(rotary_dim: int) -> None:
    q = tokens(dtype=torch.float64)
    pi = torch.cat((torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2), torch.arange(rotary_dim, SIZE)))
    half, interleaved = (RoPE(SIZE, rotary_dim=rotary_dim, interleaved=i).double() for i in (False, True))
    assert_bitwise(half(q[..., pi], None)[0], interleaved(q, None)[0][..., pi])


def test_4_axial_is_the_direct_sum_of_two_ropes() -> None:
    q, grid = tokens(), grid_positions(4, 3)
    whole = RoPE(SIZE, coords=2, interleaved=True)(q, None, grid)[0]
    one = RoPE(SIZE // 2, base=100.0, interleaved=True)
    parts = [one(x, None, grid[:, c : c + 1])[0] for c, x in enumerate(q.chunk(2, -1))]
    assert_bitwise(whole, torch.cat(parts, -1))


def test_4_axial_groups_of_any_size() -> None:
    freqs = RoPE(SIZE, coords=3, groups=(4, 3, 1), base=100.0).freqs
    expected = torch.zeros(3, 8)
    expected[0, :4] = 100.0 ** -(torch.arange(4) / 4)
    expected[1, 4:7] = 100.0 ** -(torch.arange(3) / 3)
    expected[2, 7] = 1
    torch.testing.assert_close(freqs, expected)


def test_4_mixed_without_y_is_rope_on_x() -> None:
    q, grid = tokens(), grid_positions(4, 3)
    module = RoPE(SIZE, coords=2, mode="mixed", num_heads=HEADS)
    module.freqs[:, 1] = 0
    assert_bitwise(module(q, None, grid)[0], rotate(q, None, grid[:, :1], module.freqs[:, :1])[0])


def test_4_mixed_starts_as_in_rope_vit() -> None:
    freqs = RoPE(SIZE, coords=2, mode="mixed", num_heads=3, generator=torch.Generator().manual_seed(0)).double().freqs
    x, y = freqs.unbind(1)
    first, second = (x + 1j * y).chunk(2, -1)
    magnitude = 10.0 ** (-4 * torch.arange(SIZE // 4) / SIZE)
    torch.testing.assert_close(first.abs().float(), magnitude.expand(3, -1))
    torch.testing.assert_close(second, 1j * first)  # the second half points a quarter turn on
    angle = first.angle()
    torch.testing.assert_close(angle, angle[:, :1].expand_as(angle))
    assert angle[:, 0].unique().numel() == 3


@pytest.mark.parametrize("coords", (1, 3, 4))
def test_4_mixed_axes_are_orthogonal(coords: int) -> None:
    freqs = RoPE(48, coords=coords, mode="mixed", num_heads=2, base=10.0).freqs.double()
    planes = freqs.unflatten(-1, (coords, -1))  # (H, C, C axes, magnitudes)
    gram = torch.einsum("hcjt,hcit->htji", planes, planes)
    size = 10.0 ** (-2 * torch.arange(24 // coords, dtype=torch.float64) / (24 // coords))
    torch.testing.assert_close(gram, (size[:, None, None] * torch.eye(coords)).expand_as(gram), check_dtype=False)


def test_6_decoding_one_token_is_its_row_of_the_full_pass(encoding: nn.Module) -> None:
    q, k, t = tokens(), tokens(seed=1), LENGTH - 1
    positions = points(encoding.coords)
    full = encoding(q, k, positions)
    last = q[:, :, t:], k[:, :, t:]
    # By positions alone, where frequencies do not go by the length; by positions and an offset; by the offset alone.
    steps = [encoding(*last, positions[t:] - t, offset=t)]
    if encoding.coords == 1:
        steps.append(encoding(*last, offset=t))
    if getattr(encoding, "kind", None) != "dynamic":
        steps.append(encoding(*last, positions[t:]))
    for step in steps:
        for a, b in zip(step, full):
            torch.testing.assert_close(a, b[:, :, t:])


@pytest.mark.parametrize("interleaved", (False, True))
@laws
@given(st.integers(0, 99), st.floats(-SHIFT_RANGE, SHIFT_RANGE))
def test_7_adjoint_is_the_inverse(interleaved: bool, seed: int, scale: float) -> None:
    x, y = tokens(dtype=torch.float64, seed=seed), tokens(dtype=torch.float64, seed=seed + 1)
    module = ENCODINGS["cayley-mixed"]().double()
    arguments = scale * points(2, dtype=torch.float64), module.freqs.detach(), module.basis().detach()
    Rx, _ = rotate(x, None, *arguments, interleaved=interleaved)
    Rty, _ = rotate(y, None, *arguments, interleaved=interleaved, inverse=True)
    assert abs(float((Rx * y).sum() - (x * Rty).sum())) <= ADJOINT * float(x.norm() * y.norm())


def test_7_gradcheck_of_learned_frequencies_and_positions() -> None:
    module = RoPE(4, coords=2, mode="mixed", num_heads=2, learned=True).double()
    q, k = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    positions = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def call(q: Tensor, k: Tensor, positions: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor]:
        y: tuple[Tensor, Tensor] = torch.func.functional_call(module, {"freqs": freqs}, (q, k, positions))
        return y

    assert torch.autograd.gradcheck(call, (q, k, positions, module.freqs))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("prefix", (1, 5, LENGTH))
def test_8_prefix_rows_are_kept_bit_for_bit(encoding: nn.Module, dtype: torch.dtype, prefix: int) -> None:
    q, k = tokens(2 * HEADS, dtype=dtype), tokens(dtype=dtype, seed=1)
    positions = points(encoding.coords, LENGTH - prefix)
    whole = encoding(q, k, positions, prefix=prefix)
    rest = encoding(q[:, :, prefix:], k[:, :, prefix:], positions)
    for x, y, z in zip((q, k), whole, rest):
        assert_bitwise(y[:, :, :prefix], x[:, :, :prefix])
        torch.testing.assert_close(y[:, :, prefix:], z)


@pytest.mark.parametrize(
    ("argument", "message", "options"),
    [
        ("head_dim", "be a positive integer, got 0", dict(head_dim=0)),
        ("coords", "be 1 to 4, got 5", dict(coords=5)),
        ("num_heads", "be a positive integer, got 0", dict(num_heads=0)),
        ("num_heads", "be given for mode 'mixed', got None", dict(mode="mixed")),
        ("mode", "be one of 'axial', 'mixed', got 'polar'", dict(mode="polar")),
        ("base", "be positive, got -1.0", dict(base=-1.0)),
        ("rotary_dim", "be even, at least 2 and at most head_dim=16, got 7", dict(rotary_dim=7)),
        ("rotary_dim", "be even, at least 2 and at most head_dim=16, got 18", dict(rotary_dim=18)),
        ("rotary_dim", "be even, at least 2 and at most head_dim=16, got 0", dict(rotary_dim=0)),
        ("rotary_dim", "be even, at least 2 and at most head_dim=15, got 15", dict(head_dim=15)),
        ("rotary_dim", "be a multiple of 2 C = 4, got 6", dict(rotary_dim=6, coords=2)),
        ("rotary_dim", "be a multiple of 2 C = 6, got 16", dict(coords=3, mode="mixed", num_heads=1)),
        ("groups", "be C=2 positive numbers whose sum is R=8, got (4, 3)", dict(coords=2, groups=(4, 3))),
        ("groups", "be C=2 positive numbers whose sum is R=8, got (8,)", dict(coords=2, groups=(8,))),
        ("groups", "be C=2 positive numbers whose sum is R=8, got (8, 0)", dict(coords=2, groups=(8, 0))),
        ("groups", "be None for mode 'mixed', got (4, 4)", dict(coords=2, mode="mixed", num_heads=1, groups=(4, 4))),
    ],
)
def test_9_bad_arguments_raise(argument: str, message: str, options: dict[str, object]) -> None:
    with pytest.raises(ValueError) as error:
        RoPE(**{"head_dim": SIZE} | options)
    assert str(error.value) == f"RoPE: {argument} must {message}"


def test_default_bases() -> None:
    assert RoPE(SIZE).base == 10000
    assert RoPE(SIZE, coords=2).base == 100
    assert RoPE(SIZE, coords=2, mode="mixed", num_heads=1).base == 10
    assert RoPE(SIZE, base=7).base == 7
    theta = [10000 ** (-2 * t / SIZE) for t in range(SIZE // 2)]
    torch.testing.assert_close(RoPE(SIZE).freqs, torch.tensor([theta]))


def test_rotation_by_hand() -> None:
    q = torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 1, 4, 4)
    y, _ = RoPE(4, base=4.0)(q, None)
    angle = [3 * f for f in (1.0, 0.5)]  # token 3
    expected = [math.cos(angle[0]), -2 * math.sin(angle[1]), math.sin(angle[0]), 2 * math.cos(angle[1])]
    torch.testing.assert_close(y[0, 0, 3], torch.tensor(expected))


def test_learned_frequencies_per_head() -> None:
    assert RoPE(SIZE, learned=True).freqs.shape == (1, SIZE // 2)
    freqs = RoPE(SIZE, coords=2, learned=True, num_heads=3).freqs
    assert isinstance(freqs, nn.Parameter)
    assert_bitwise(freqs, RoPE(SIZE, coords=2).freqs.expand(3, -1, -1))


def test_grouped_queries_share_the_frequencies_of_their_key_head() -> None:
    module, grid = ENCODINGS["rope-mixed"](), points(2)
    q = tokens(2 * HEADS)
    y, _ = module(q, tokens(), grid)
    for h in range(2 * HEADS):
        one = rotate(q[:, h : h + 1], None, grid, module.freqs[h // 2])[0]
        torch.testing.assert_close(y[:, h : h + 1], one)
