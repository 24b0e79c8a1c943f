"""Folding a basis into projections: SPEC bar 2.8.10, prefix tokens, grouped queries, and what must raise."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fastrpe.positions import CayleySTRING, CirculantSTRING, RoPE
from fastrpe.testing.asserts import assert_bitwise, assert_within
from fastrpe.testing.bars import FOLDED, ORTHOGONAL
from python_tests.positions.shared import HEADS, LENGTH, SIZE, points, scores

DIM = 24


def _projections(groups: int = 2, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return tuple(nn.Linear(DIM, heads * SIZE, bias, dtype=dtype) for heads in (groups * HEADS, HEADS))


def _logits(module: nn.Module, q_proj: nn.Linear, k_proj: nn.Linear, prefix: int) -> Tensor:
    x = torch.randn(2, LENGTH, DIM, dtype=q_proj.weight.dtype, generator=torch.Generator().manual_seed(3))
    q, k = (proj(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for proj in (q_proj, k_proj))
    return scores(module(q, k, points(module.coords)[: LENGTH - prefix], prefix=prefix)).detach()


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("prefix", (0, 2))
def test_10_absorbed_inference_gives_the_same_logits(string: nn.Module, groups: int, bias: bool, prefix: int) -> None:
    projections = _projections(groups, bias)
    original = copy.deepcopy(projections)
    string.eval()
    before = _logits(string, *projections, prefix)
    string.fold_into(*projections)
    assert string.folded and not torch.allclose(projections[0].weight, original[0].weight)
    assert_within(_logits(string, *projections, prefix), before, FOLDED)
    string.unfold_from(*projections)
    assert not string.folded
    assert_within(_logits(string, *projections, prefix), before, FOLDED)
    for a, b in zip(projections, original):
        for x, y in zip(a.parameters(), b.parameters()):
            assert_within(x, y, FOLDED)


def test_10_in_float64() -> None:
    module = CayleySTRING(SIZE, HEADS, init_std=0.3).double().eval()
    projections = _projections(dtype=torch.float64)
    before = _logits(module, *projections, 1)
    module.fold_into(*projections)
    assert_within(_logits(module, *projections, 1), before, ORTHOGONAL[torch.float64])


def test_prefix_keys_and_queries_alone_stay_as_they_were(string: nn.Module) -> None:
    q_proj, k_proj = _projections()
    string.eval()
    x = torch.randn(1, LENGTH, DIM)

    def keys() -> Tensor:
        k = k_proj(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        y: Tensor = string(k, None, points(string.coords)[: LENGTH - 3], prefix=3)[0].detach()
        return y

    before = keys()
    string.fold_into(q_proj, k_proj)
    assert_within(keys(), before, FOLDED)


def test_folded_prefix_under_autocast() -> None:
    module = CayleySTRING(SIZE, HEADS, init_std=0.3, backend="reference").eval()
    q, k = torch.randn(2, 1, HEADS, LENGTH, SIZE)
    module.folded = True
    with torch.autocast("cpu", torch.bfloat16):
        yq, yk = module(q, k, prefix=2)
    assert yq.dtype == yk.dtype == torch.bfloat16
    rounded = module(q.bfloat16(), k.bfloat16(), prefix=2)
    assert_bitwise(yq, rounded[0])
    assert_bitwise(yk, rounded[1])


def test_one_projection_for_queries_and_keys_is_folded_once() -> None:
    module = CayleySTRING(SIZE, HEADS, init_std=0.3).eval()
    _, shared = _projections()
    before = _logits(module, shared, shared, 1)
    module.fold_into(shared, shared)
    assert_within(_logits(module, shared, shared, 1), before, FOLDED)


def test_views_and_bfloat16_weights_are_folded_in_place() -> None:
    module = CayleySTRING(SIZE, HEADS, init_std=0.3).eval()
    packed = torch.randn(3 * HEADS * SIZE, DIM).bfloat16()
    wide = packed.double()
    q, k, v = packed.chunk(3)
    module.fold_into(SimpleNamespace(weight=q), SimpleNamespace(weight=k, bias=None))
    P = module.basis().detach().double()
    for i in range(2):
        part = wide.chunk(3)[i].unflatten(0, (HEADS, SIZE))
        assert_bitwise(packed.chunk(3)[i], (P @ part).flatten(0, 1).bfloat16())
    assert_bitwise(v, wide.chunk(3)[2].bfloat16())


def test_without_a_basis_nothing_happens() -> None:
    module, projections = RoPE(SIZE), _projections()
    original = copy.deepcopy(projections)
    module.fold_into(*projections)
    module.fold_into(*projections)
    module.unfold_from(*projections)
    assert module.basis() is None and not module.folded
    for a, b in zip(projections, original):
        assert_bitwise(a.weight, b.weight)


def test_folded_survives_the_state_dict(string: nn.Module) -> None:
    fresh = copy.deepcopy(string)
    projections = _projections()
    string.fold_into(*projections)
    fresh.load_state_dict(string.state_dict())
    assert fresh.folded and copy.deepcopy(string).folded
    fresh.eval()
    string.eval()
    assert_bitwise(_logits(fresh, *projections, 2), _logits(string, *projections, 2))
    string.unfold_from(*projections)
    fresh.load_state_dict(string.state_dict())
    assert not fresh.folded


def test_folding_needs_the_other_state_first(string: nn.Module) -> None:
    projections, name = _projections(), type(string).__name__
    with pytest.raises(RuntimeError, match=f"^{name}.unfold_from: folded must be True, got False"):
        string.unfold_from(*projections)
    string.fold_into(*projections)
    weight = projections[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"^{name}.fold_into: folded must be False, got True"):
        string.fold_into(*projections)
    assert_bitwise(projections[0].weight, weight)


def test_projections_of_other_sizes_raise() -> None:
    module, (q_proj, k_proj) = CayleySTRING(SIZE, HEADS, init_std=0.3), _projections()
    weight = q_proj.weight.detach().clone()
    op = "CayleySTRING.fold_into"
    for argument, pair, wanted in (
        ("q_proj", (nn.Linear(DIM, SIZE), k_proj), f"a multiple of num_heads * head_dim = {HEADS * SIZE}, got {SIZE}"),
        ("k_proj", (q_proj, q_proj), f"num_heads * head_dim = {HEADS * SIZE}, got {2 * HEADS * SIZE}"),
    ):
        with pytest.raises(ValueError) as error:
            module.fold_into(*pair)
        assert str(error.value) == f"{op}: {argument} must have out_features {wanted}"
    with pytest.raises(TypeError, match=f"^{op}: k_proj.weight must be a Tensor, got NoneType"):
        module.fold_into(q_proj, nn.Identity())
    assert not module.folded
    assert_bitwise(q_proj.weight, weight)


def test_a_folded_cayley_basis_does_not_train() -> None:
    module, projections = CayleySTRING(SIZE, HEADS, init_std=0.3), _projections()
    q = torch.randn(1, HEADS, LENGTH, SIZE)
    module.fold_into(*projections)
    with pytest.raises(RuntimeError, match="^CayleySTRING: the basis must not be folded while it trains"):
        module(q, q)
    with torch.no_grad():
        module(q, q)
    module.eval()(q, q)
    module.train().skew.requires_grad_(False)
    module(q, q)  # nothing that would silently not train


def test_a_folded_circulant_trains() -> None:
    module, projections = CirculantSTRING(SIZE, HEADS, init_std=0.1), _projections()
    module.fold_into(*projections)
    q = torch.randn(1, HEADS, LENGTH, SIZE)
    module(q, q)[0].square().sum().add(module(q, q.flip(2))[1].sum()).backward()
    assert module.c.grad.abs().sum() > 0
