"""The bases of several modules by one call."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrpe.models import ViT, ViTConfig
from fastrpe.positions import CayleySTRING, ReflectionBasis, RoPE, SparseCayleySTRING, TensorSTRING, bases
from fastrpe.testing.asserts import LAW_FLOAT64, assert_bitwise, assert_within
from fastrpe.testing.bars import ORTHOGONAL
from python_tests.positions.shared import HEADS, SIZE, tokens

LAYERS = 3


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LEARNED: dict[str, Callable[[int], nn.Module]] = {
    "cayley": lambda i: CayleySTRING(SIZE, HEADS, init_std=0.3, generator=_draw(i)),
    "reflection": lambda i: ReflectionBasis(SIZE, HEADS, layers=3, block=4, generator=_draw(i)),
    "sparse": lambda i: SparseCayleySTRING(
        SIZE, HEADS, f=0.2, init_std=0.3, seed=i, solver="matrix", generator=_draw(i)
    ),
    "sparse-per-head": lambda i: SparseCayleySTRING(
        SIZE, HEADS, f=0.2, init_std=0.3, seed=i, solver="matrix", per_head_pattern=True, generator=_draw(i)
    ),
}


def _modules(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return [LEARNED[name](i).to(device, dtype) for i in range(LAYERS)]


def _gradients(modules: list[nn.Module], found: list[Tensor]) -> list[Tensor]:
    loss = sum((P * torch.arange(P.numel(), device=P.device).view_as(P).cos()).sum() for P in found)
    return torch.autograd.grad(loss, [getattr(module, module.basis_parameter) for module in modules])


@pytest.mark.parametrize("name", LEARNED)
def test_they_are_what_each_module_computes(name: str) -> None:
    modules = _modules(name)
    # On a CPU reflections may go by tokens, so that none are computed for them
    joint = list(modules[0]._joint_basis(modules).chunk(LAYERS)) if name == "reflection" else bases(modules)
    each = [module.basis() for module in modules]
    for P, expected in zip(joint, each):
        assert_within(P, expected, LAW_FLOAT64)
    for d, expected in zip(_gradients(modules, joint), _gradients(modules, each)):
        assert_within(d, expected, LAW_FLOAT64)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LEARNED)
def test_they_are_what_each_module_computes_on_a_gpu(name: str) -> None:
    modules = _modules(name, "cuda", torch.float32)
    joint, each = bases(modules), [module.basis() for module in modules]
    for P, expected in zip(joint, each):
        assert_within(P, expected, ORTHOGONAL[torch.float32])
    assert_bitwise(bases(modules)[1], joint[1])


def test_a_module_takes_what_is_computed() -> None:
    modules, q, k = _modules("cayley", dtype=torch.float32), tokens(2 * HEADS), tokens(seed=1)
    for module, P in zip(modules, bases(modules)):
        for y, expected in zip(module(q, k, prefix=1, basis=P), module(q, k, prefix=1)):
            assert_within(y, expected, ORTHOGONAL[torch.float32])
    y = modules[0](q, k, basis=modules[1].basis())
    assert_bitwise(y[0], _with_skew(modules[0], modules[1])(q, k)[0])
    modules[0].folded = True
    with torch.no_grad():
        assert_bitwise(modules[0](q, k, basis=modules[1].basis())[0], modules[0](q, k)[0])


def _with_skew(module: nn.Module, other: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    module.skew.data = other.skew.data
    return module


class Calls(TorchDispatchMode):
    """Counts those of one operator."""

    def __init__(self, op: object) -> None:
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += func is self.op
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


def test_a_model_computes_them_by_one_call_and_none_once_they_are_folded() -> None:
    model, x = ViT(ViTConfig(image_size=8, dim=32, depth=3, heads=2, position="cayley")).eval(), torch.randn(2, 1, 8, 8)
    for count in (1, 0):
        with Calls(torch.ops.fastrpe.cayley_basis.default) as calls, torch.no_grad():
            model(x)
        assert calls.count == count
        if count:
            model.fold()


class Mirrored(CayleySTRING):
    def basis(self) -> Tensor:
        return super().basis().mT


@pytest.mark.parametrize(
    "make",
    (
        list,
        lambda: _modules("cayley")[:1],
        lambda: [*_modules("cayley"), None],
        lambda: [*_modules("cayley"), RoPE(SIZE)],
        lambda: [*_modules("cayley"), CayleySTRING(SIZE, HEADS)],  # of another dtype
        lambda: [*_modules("cayley"), CayleySTRING(SIZE, 2 * HEADS).double()],
        lambda: [CayleySTRING(SIZE, HEADS), Mirrored(SIZE, HEADS)],
        lambda: [Mirrored(SIZE, HEADS), Mirrored(SIZE, HEADS)],
        lambda: [RoPE(SIZE), RoPE(SIZE)],
        lambda: [TensorSTRING(SIZE, HEADS), TensorSTRING(SIZE, HEADS)],
        lambda: [SparseCayleySTRING(SIZE, HEADS, f=0.2, solver="components") for _ in range(2)],
        lambda: [nn.Identity(), nn.Identity()],
        lambda: _folded(_modules("cayley")),
    ),
)
def test_modules_that_have_not_all_one_kind_of_basis_compute_their_own(make: Callable[[], list[nn.Module]]) -> None:
    modules = make()
    assert bases(modules) == [None] * len(modules)


def _folded(modules: list[nn.Module]) -> list[nn.Module]:
    modules[1].folded = True
    return modules


@pytest.mark.parametrize("grid", (False, True), ids=("blocks", "model"))
def test_a_compiled_model_follows_its_parameters(grid: bool) -> None:
    """Whole or block by block, trained or copied, no basis is stale."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = ViT(ViTConfig(image_size=8, dim=32, depth=3, heads=2, position="cayley")).double()
    plain, x = copy.deepcopy(model), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for part in (model,) if grid else model.blocks:
        part.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        for module in (model, plain):
            module.zero_grad()
            module(x).square().sum().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad
        for p, expected in zip(model.parameters(), plain.parameters()):
            assert_within(p, expected, LAW_FLOAT64)
