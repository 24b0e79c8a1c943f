"""The operator behind the basis of reflections; what P is, is in python_tests/positions/test_reflection.py."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastrpe.backend import problem
from fastrpe.ops.reflection import reference, reflection_basis
from fastrpe.ops.reflection.reference import LEAST_NORM
from fastrpe.testing.asserts import assert_accurate, assert_bitwise
from fastrpe.testing.bars import ORTHOGONAL

# D, s, shuffles; of D up to 32, 64 and 128 the kernel takes the rows in different ways
SHAPES = (
    (1, 1, (0, 1)),
    (6, 1, (0,)),
    (6, 2, (0, 1, 2)),
    (16, 4, (0, 1, 1, 0)),
    (24, 8, (3, 0)),
    (33, 11, (0, 1)),
    (40, 40, (0, 0)),
    (64, 4, (0,)),
    (64, 8, (0, 1, 2, 3)),
    (64, 64, (0, 5)),
    (80, 5, (0, 2)),
    (128, 2, (0, 1)),
    (128, 16, (1, 0, 7)),
    (128, 8, tuple(range(16))),
)
shapes = pytest.mark.parametrize(("size", "block", "shuffles"), SHAPES, ids=lambda x: str(x).replace(" ", ""))
dtypes = pytest.mark.parametrize("dtype", ORTHOGONAL, ids=lambda d: str(d).removeprefix("torch."))
OPTIONS = 4, (0, 1, 2)


@pytest.fixture(params=("reference", "native"))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if name == "native" and device.type == "cpu":
        pytest.skip("the native kernel is for CUDA")
    if why := problem(name, device.type):
        pytest.skip(why)
    return name


def draw(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype)


def small(device: torch.device | str, *heads: int) -> Tensor:
    return draw(*heads, 3, 8, device=device)


def gradient(v: Tensor, block: int, shuffles: tuple[int, ...], backend: str | None) -> Tensor:
    v = v.detach().requires_grad_()
    P = reflection_basis(v, block, shuffles, backend=backend)
    return torch.autograd.grad(P, v, draw(*P.shape, dtype=P.dtype, device=P.device, seed=1))[0]


def dense(v: Tensor, block: int, shuffles: tuple[int, ...]) -> Tensor:
    eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device).expand(len(v), -1, -1)
    return reference.reflect(eye, v, block, shuffles).mT


def accurate(actual: Tensor, same: Tensor, exact: Tensor) -> None:
    if actual.dtype == torch.float64:  # nothing is more exact
        torch.testing.assert_close(actual, exact)
    else:
        assert_accurate(actual, same, exact)


# Values and gradients ------------------------------------------------------------------------------------------------


@dtypes
@shapes
def test_values(
    device: torch.device, backend: str, size: int, block: int, shuffles: tuple[int, ...], dtype: torch.dtype
) -> None:
    v = draw(3, len(shuffles), size, dtype=dtype, device=device)
    P = reflection_basis(v, block, shuffles, backend=backend)
    assert P.dtype == dtype and P.is_contiguous()
    accurate(P, dense(v, block, shuffles), dense(v.double(), block, shuffles))
    eye = torch.eye(size, dtype=dtype, device=device)
    assert ((P.mT @ P - eye).abs() <= ORTHOGONAL[dtype]).all()


@dtypes
@shapes
def test_gradient_is_that_of_autograd(
    device: torch.device, backend: str, size: int, block: int, shuffles: tuple[int, ...], dtype: torch.dtype
) -> None:
    for shortest in (False, True):
        v = draw(3, len(shuffles), size, dtype=dtype, device=device)
        if shortest:  # layers that are not their own inverse, and one that does nothing
            v[1] *= LEAST_NORM / 2
            v[2, :, :block] = 0
        found = []
        for x in (v, v.double()):
            x = x.detach().requires_grad_()
            P = dense(x, block, shuffles)
            dy = draw(*P.shape, dtype=dtype, device=device, seed=1).to(P.dtype)
            found.append(torch.autograd.grad(P, x, dy)[0])
        accurate(gradient(v, block, shuffles, backend), *found)


@pytest.mark.parametrize("length", (1.0, LEAST_NORM / 3, 0.0))
def test_gradchecks(device: torch.device, length: float) -> None:
    v = (length * draw(2, 3, 4, dtype=torch.float64, device=device)).requires_grad_()
    eps = LEAST_NORM * (1e-6 if length < 1 else 1)
    assert gradcheck(lambda v: reflection_basis(v, 2, (0, 1, 0)), v, eps=eps)
    if length == 1:
        assert gradgradcheck(lambda v: reflection_basis(v, 2, (0, 1, 0)), v)


def test_higher_derivatives(device: torch.device, backend: str) -> None:
    def third(f: object) -> Tensor:
        v = draw(2, 3, 8, dtype=torch.float64, device=device).requires_grad_()
        y = f(v).pow(3).sum()  # type: ignore[operator]
        for _ in range(2):
            (dv,) = torch.autograd.grad(y, v, create_graph=True)
            y = dv.pow(2).sum()
        return torch.autograd.grad(y, v)[0]

    exact = third(lambda v: dense(v, *OPTIONS))
    actual = third(lambda v: reflection_basis(v, *OPTIONS, backend=backend))
    torch.testing.assert_close(actual, exact)


def test_a_spoilt_head_spoils_no_other(device: torch.device, backend: str) -> None:
    v = draw(3, 3, 64, device=device)
    expected = reflection_basis(v, *OPTIONS, backend=backend), gradient(v, *OPTIONS, backend)
    v[1, 1, 3] = math.nan
    found = reflection_basis(v, *OPTIONS, backend=backend), gradient(v, *OPTIONS, backend)
    for x, y in zip(found, expected):
        assert x[1].isnan().any()
        assert_bitwise(x[::2], y[::2])


def test_deterministic(device: torch.device, backend: str) -> None:
    for size in (64, 128):
        v = draw(12, 3, size, device=device)
        assert_bitwise(reflection_basis(v, *OPTIONS, backend=backend), reflection_basis(v, *OPTIONS, backend=backend))
        assert_bitwise(gradient(v, *OPTIONS, backend), gradient(v, *OPTIONS, backend))


# PyTorch's machinery -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ((), (3,), (2, 3), (0,), (2, 0)))
def test_heads_of_any_shape(device: torch.device, backend: str, heads: tuple[int, ...]) -> None:
    v = small(device, *heads)
    P = reflection_basis(v, *OPTIONS, backend=backend)
    assert P.shape == (*heads, 8, 8)
    assert gradient(v, *OPTIONS, backend).shape == v.shape
    assert_bitwise(P.reshape(-1, 8, 8), reflection_basis(v.reshape(-1, 3, 8), *OPTIONS, backend=backend))


def test_any_strides(device: torch.device, backend: str) -> None:
    v = small(device, 4)
    strided = torch.stack((v, torch.full_like(v, math.nan)), -1)[..., 0]
    for x in (strided, v.mT.contiguous().mT, v[::2], v[:1].expand(4, -1, -1)):
        expected = reflection_basis(x.contiguous(), *OPTIONS, backend=backend)
        assert_bitwise(reflection_basis(x, *OPTIONS, backend=backend), expected)
        assert_bitwise(gradient(x, *OPTIONS, backend), gradient(x.contiguous(), *OPTIONS, backend))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_narrow_v_gives_float32(device: torch.device, dtype: torch.dtype) -> None:
    v = small(device, 2).to(dtype)
    P = reflection_basis(v, *OPTIONS)
    assert P.dtype == torch.float32
    assert_bitwise(P, reflection_basis(v.float(), *OPTIONS))
    assert_bitwise(gradient(v, *OPTIONS, None), gradient(v.float(), *OPTIONS, None).to(dtype))


def test_opcheck(device: torch.device, backend: str) -> None:
    v = small(device, 2, 2).requires_grad_()
    dy = draw(2, 2, 8, 8, device=device, seed=1).requires_grad_()
    options = OPTIONS[0], list(OPTIONS[1]), backend
    torch.library.opcheck(torch.ops.fastrpe.reflection_basis.default, (v, *options))
    torch.library.opcheck(torch.ops.fastrpe.reflection_basis_bwd.default, (dy, v, *options))


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile(device: torch.device, backend: str, compiler: str) -> None:
    """One graph for any number of heads, with the bits of eager."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda v: reflection_basis(v, *OPTIONS, backend=backend), fullgraph=True, dynamic=True, backend=compiler
    )
    for i, heads in enumerate((5, 6, 7)):
        v = small(device, heads).requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            P = compiled(v)
        assert_bitwise(P, reflection_basis(v, *OPTIONS, backend=backend))
        dy = draw(*P.shape, device=device, seed=1)
        assert_bitwise(torch.autograd.grad(P, v, dy)[0], gradient(v, *OPTIONS, backend))


def test_vmap(device: torch.device, backend: str) -> None:
    v = small(device, 4, 2)
    expected = reflection_basis(v, *OPTIONS, backend=backend)
    for axis in (0, 1, -1):
        actual = torch.vmap(lambda v: reflection_basis(v, *OPTIONS, backend=backend), in_dims=axis)(v.movedim(0, axis))
        assert_bitwise(actual.contiguous(), expected)
    one = v[0].requires_grad_()
    loop, batched = (
        torch.autograd.functional.jacobian(
            lambda v: reflection_basis(v, *OPTIONS, backend=backend), one, vectorize=vectorize
        )
        for vectorize in (False, True)
    )
    assert_bitwise(batched.contiguous(), loop)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    """A graph captures forward and backward, so neither waits for the device."""
    v, other = (draw(3, 3, 64, device="cuda", seed=seed) for seed in (0, 2))
    expected = reflection_basis(other, *OPTIONS), gradient(other, *OPTIONS, None)
    v.requires_grad_()
    dy = draw(3, 64, 64, device="cuda", seed=1)

    def step() -> tuple[Tensor, Tensor]:
        P = reflection_basis(v, *OPTIONS)
        return P, torch.autograd.grad(P, v, dy)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        v.copy_(other)
    graph.replay()
    for result, value in zip(results, expected):
        assert_bitwise(result.detach(), value)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((torch.ones(8), 4, (0,)), "v must have shape (..., K, D) with K=1, got (8,)"),
        ((torch.ones(2, 3, 8), 4, (0, 1)), "v must have shape (..., K, D) with K=2, got (2, 3, 8)"),
        ((torch.ones(1, 8), 3, (0,)), "block must be positive and divide D=8, got 3"),
        ((torch.ones(1, 8), 4, (-1,)), "shuffles must not be negative, got -1"),
        (
            (torch.ones(1, 8, dtype=torch.int64), 4, (0,)),
            "v must have dtype float16, bfloat16, float32, float64, got int64",
        ),
    ),
    ids=lambda x: "" if isinstance(x, tuple) else x[:5],
)
def test_bad_arguments_raise(arguments: tuple[Tensor, int, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError) as error:
        reflection_basis(*arguments)
    assert str(error.value) == f"reflection_basis: {message}"


def test_a_wrong_type_raises() -> None:
    with pytest.raises(TypeError) as error:
        reflection_basis([1.0], 1, (0,))  # type: ignore[arg-type]
    assert str(error.value) == "reflection_basis: v must be a Tensor, got list"


def test_forward_mode_raises(device: torch.device) -> None:
    v = small(device, 2)
    message = "reflection_basis: v must have no forward-mode tangent, got one; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda v: reflection_basis(v, *OPTIONS), (v,), (v,))


def test_a_backend_that_cannot_serve_raises() -> None:
    with pytest.raises(NotImplementedError) as error:
        reflection_basis(torch.ones(1, 8), 4, (0,), backend="native")
    assert str(error.value) == (
        "reflection_basis: backend must be 'reference', or 'native' for CUDA, D up to 128 and K D up to 2048, got "
        "'native' for cpu, D=8 and K=1"
    )
