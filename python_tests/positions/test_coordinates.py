import pytest
import torch

from fastrpe.positions import RoPE, grid_positions, packed_positions
from fastrpe.testing.asserts import assert_bitwise


def test_grid_is_row_major_with_x_the_column() -> None:
    grid = grid_positions(2, 3)
    assert_bitwise(grid, torch.tensor([[0.0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]))
    index = torch.arange(35)
    expected = torch.stack((index % 7, index // 7), -1)
    assert_bitwise(grid_positions(5, 7, dtype=torch.float64), expected.double())


def test_packed_positions_start_again() -> None:
    expected = torch.tensor([0.0, 1, 2, 0, 0, 1, 0, 1])[:, None]
    for cu in (torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 4, 6], dtype=torch.int32)):
        assert_bitwise(packed_positions(8, cu_seqlens=cu), expected)  # the last two are padding
    assert_bitwise(packed_positions(8, lengths=torch.tensor([3, 1, 0, 2])), expected)
    assert packed_positions(8, lengths=torch.tensor([8]), dtype=torch.float64).dtype == torch.float64


def test_packed_positions_of_a_batch() -> None:
    rows = [[0, 2, 5, 5], [0, 1, 4, 5]]
    batch = packed_positions(5, cu_seqlens=torch.tensor(rows))
    assert_bitwise(batch, torch.stack([packed_positions(5, cu_seqlens=torch.tensor(r)) for r in rows]))
    assert_bitwise(batch, packed_positions(5, lengths=torch.tensor([[2, 3, 0], [1, 3, 1]])))


def test_packed_sequences_are_encoded_as_on_their_own() -> None:
    module, q = RoPE(8), torch.randn(1, 2, 7, 8)
    y, _ = module(q, None, packed_positions(7, lengths=torch.tensor([4, 3])))
    assert_bitwise(y, torch.cat([module(x, None)[0] for x in q.split([4, 3], 2)], 2))


def test_packed_positions_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(packed_positions, fullgraph=True, backend="eager")
    cu = torch.tensor([0, 3, 4, 6])
    assert_bitwise(compiled(8, cu_seqlens=cu), packed_positions(8, cu_seqlens=cu))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "grid_positions: height must be at least 1, got 0", lambda: grid_positions(0, 2)),
        (TypeError, "grid_positions: width must be a int or SymInt, got float", lambda: grid_positions(1, 2.0)),
        (
            ValueError,
            "packed_positions: cu_seqlens must be given or else lengths, got neither",
            lambda: packed_positions(3),
        ),
        (
            ValueError,
            "packed_positions: cu_seqlens must be given or else lengths, got both",
            lambda: packed_positions(3, cu_seqlens=torch.tensor([0, 3]), lengths=torch.tensor([3])),
        ),
        (
            ValueError,
            "packed_positions: lengths must have shape (N,) or (B, N), got (1, 1, 1)",
            lambda: packed_positions(3, lengths=torch.ones(1, 1, 1, dtype=torch.long)),
        ),
        (
            ValueError,
            "packed_positions: cu_seqlens must have shape (N + 1,) or (B, N + 1), got ()",
            lambda: packed_positions(3, cu_seqlens=torch.tensor(3)),
        ),
    ],
)
def test_bad_arguments_raise(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error) as raised:
        call()  # type: ignore[operator]
    assert str(raised.value) == message
