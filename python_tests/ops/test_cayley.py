"""The basis of Cayley-STRING: SPEC 2.8, items 1 and 7, and PyTorch's machinery around the operator."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastrpe.backend import problem
from fastrpe.ops.cayley import cayley_basis
from fastrpe.ops.cayley.reference import cayley, skew
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_bitwise, assert_within
from fastrpe.testing.bars import ORTHOGONAL, SKEW_RANGE

SIZES = (1, 2, 3, 5, 8, 16, 31, 33, 64, 65, 80, 128)
NORMS = (0.0, 1e-3, 1.0, 30.0, SKEW_RANGE)
DTYPES = pytest.mark.parametrize("dtype", ORTHOGONAL, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(params=("reference", "native"))
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    if name == "native" and device.type == "cpu":
        pytest.skip("the native kernel is for CUDA")
    if why := problem(name, device.type):
        pytest.skip(why)
    return name


def params_of(
    size: int,
    *heads: int,
    norm: float = 1.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    halves: bool = False,  # S couples the first half of its rows with the second alone: the worst case for pivots
) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    params = torch.randn(*heads, size * (size - 1) // 2, dtype=torch.float64, generator=draw)
    if halves:
        row, column = torch.triu_indices(size, size, 1)
        params *= (row < size // 2) & (column >= size // 2)
    scale = torch.linalg.matrix_norm(skew(params), 2) if size > 1 else torch.ones(heads)
    return (params * (norm / scale).unsqueeze(-1)).to(device, dtype)


def weights(P: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(P.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(P)


def gradient(params: Tensor, backend: str | None) -> Tensor:
    params = params.detach().requires_grad_()
    P = cayley_basis(params, backend=backend)
    (dparams,) = torch.autograd.grad(P, params, weights(P))
    return dparams


def serves(backend: str, dtype: torch.dtype) -> None:
    if backend == "native" and dtype != torch.float32:
        pytest.skip("the native kernel is for float32")


# Values --------------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("halves", (False, True), ids=("dense", "halves"))
@pytest.mark.parametrize("size", SIZES)
def test_1_orthogonal(device: torch.device, backend: str, size: int, halves: bool, dtype: torch.dtype) -> None:
    serves(backend, dtype)
    eye = torch.eye(size, dtype=torch.float64, device=device)
    for norm in NORMS:
        params = params_of(size, 3, norm=norm, dtype=dtype, device=device, halves=halves and size > 1)
        P = cayley_basis(params, backend=backend)
        assert P.dtype == dtype and P.shape == (3, size, size) and P.is_contiguous()
        assert ((P.mT @ P - eye.to(dtype)).abs() <= ORTHOGONAL[dtype]).all()
        S = skew(params.double())
        assert_within(P, torch.linalg.solve(eye + S, eye - S), ORTHOGONAL[dtype])


@pytest.mark.parametrize("size", SIZES)
def test_float32_is_rounded_once(device: torch.device, backend: str, size: int) -> None:
    for norm in NORMS:
        params = params_of(size, 2, norm=norm, dtype=torch.float32, device=device)
        same, exact = cayley(skew(params)), cayley(skew(params.double()))
        assert_accurate(cayley_basis(params, backend=backend), same, exact)


@DTYPES
def test_zero_gives_the_identity(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    serves(backend, dtype)
    for size in SIZES:
        P = cayley_basis(params_of(size, 2, norm=0.0, dtype=dtype, device=device), backend=backend)
        assert torch.equal(P, torch.eye(size, dtype=dtype, device=device).expand(2, -1, -1))


def test_rotations_alone(device: torch.device, backend: str) -> None:
    """S = tan(a / 2) turns a plane by -a."""
    angle = torch.tensor([0.0, 0.5, -3.0], device=device)
    c, s = angle.cos(), angle.sin()
    P = cayley_basis((angle / 2).tan().unsqueeze(-1), backend=backend)
    assert_within(P, torch.stack((c, -s, s, c), -1).unflatten(-1, (2, 2)), ORTHOGONAL[torch.float32])


@pytest.mark.parametrize("shape", ((), (3,), (2, 3), (0,), (2, 0)))
def test_heads_of_any_shape(device: torch.device, backend: str, shape: tuple[int, ...]) -> None:
    params = params_of(7, *shape, dtype=torch.float32, device=device)
    P = cayley_basis(params, backend=backend)
    assert P.shape == (*shape, 7, 7)
    assert gradient(params, backend).shape == params.shape
    assert_within(P.reshape(-1, 7, 7), cayley_basis(params.reshape(-1, 21), backend=backend), 0.0)


def test_any_strides(device: torch.device, backend: str) -> None:
    params = params_of(9, 4, dtype=torch.float32, device=device)
    strided = torch.stack((params, torch.full_like(params, math.nan)), -1)[..., 0]
    for x in (strided, params.T.contiguous().T, params[::2], params[:1].expand(4, -1)):
        assert_bitwise(cayley_basis(x, backend=backend), cayley_basis(x.contiguous(), backend=backend))
        assert_bitwise(gradient(x, backend), gradient(x.contiguous(), backend))


def test_upstream_of_any_strides(device: torch.device, backend: str) -> None:
    params = params_of(9, 4, dtype=torch.float32, device=device).requires_grad_()
    P = cayley_basis(params, backend=backend)
    dy = weights(P)
    found = [torch.autograd.grad(P, params, x, retain_graph=True)[0] for x in (dy.mT, dy.mT.contiguous())]
    assert_bitwise(*found)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_narrow_params_give_float32(device: torch.device, dtype: torch.dtype) -> None:
    params = params_of(8, 2, dtype=dtype, device=device)
    P = cayley_basis(params)
    assert P.dtype == torch.float32
    assert_bitwise(P, cayley_basis(params.float()))
    assert_bitwise(gradient(params, None), gradient(params.float(), None).to(dtype))


@pytest.mark.parametrize("spoilt", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("size", (5, 64, 100))
def test_a_spoilt_head_spoils_no_other(device: torch.device, backend: str, size: int, spoilt: float) -> None:
    params = params_of(size, 3, dtype=torch.float32, device=device)
    expected, dexpected = cayley_basis(params, backend=backend), gradient(params, backend)
    params[1, 3] = spoilt
    P, dparams = cayley_basis(params, backend=backend), gradient(params, backend)
    if math.isnan(spoilt):  # LAPACK divides by infinities
        assert P[1].isnan().any()
    assert_bitwise(P[::2], expected[::2])
    assert_bitwise(dparams[::2], dexpected[::2])


def test_deterministic(device: torch.device, backend: str) -> None:
    for size in (33, 64, 128):
        params = params_of(size, 12, dtype=torch.float32, device=device)
        assert_bitwise(cayley_basis(params, backend=backend), cayley_basis(params, backend=backend))
        assert_bitwise(gradient(params, backend), gradient(params, backend))


def test_default_backend(device: torch.device) -> None:
    for size, dtype in ((64, torch.float32), (64, torch.float64), (129, torch.float32)):
        params = params_of(size, 2, dtype=dtype, device=device)
        assert_accurate(cayley_basis(params), cayley(skew(params)), cayley(skew(params.double())))


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES[1:])
def test_7_gradient_is_that_of_dense_autograd(device: torch.device, backend: str, size: int) -> None:
    for norm in NORMS:
        for halves in (False, True):
            params = params_of(size, 2, norm=norm, dtype=torch.float32, device=device, halves=halves)
            wide = params.double().requires_grad_()
            P, eye = cayley(skew(wide)), torch.eye(size, dtype=torch.float64, device=device)
            (exact,) = torch.autograd.grad(P, wide, weights(P.float()).double(), retain_graph=True)
            S = skew(wide)
            solved = torch.linalg.solve(eye + S, eye - S)
            (dense,) = torch.autograd.grad(solved, wide, weights(P.float()).double())
            if norm <= 1:  # beyond, the solve's own derivative cancels
                assert_within(exact, dense, LAW_FLOAT64)
            assert_accurate(gradient(params, backend), exact.float(), exact)


def test_7_gradcheck(device: torch.device) -> None:
    for size in (1, 2, 5):
        params = params_of(size, 2, device=device).requires_grad_()
        assert gradcheck(cayley_basis, params)
        assert gradgradcheck(cayley_basis, params)


def test_third_derivative(device: torch.device) -> None:
    params = params_of(4, device=device).requires_grad_()

    def second(f: object) -> Tensor:
        y = f(params).pow(3).sum()  # type: ignore[operator]
        for _ in range(2):
            (dy,) = torch.autograd.grad(y, params, create_graph=True)
            y = dy.pow(2).sum()
        return torch.autograd.grad(y, params)[0]

    assert_within(second(cayley_basis), second(lambda p: cayley(skew(p))), LAW_FLOAT64)


def test_second_derivative_of_either_backend(device: torch.device, backend: str) -> None:
    def second(params: Tensor) -> Tensor:
        P = cayley_basis(params, backend=backend) if params.dtype == torch.float32 else cayley(skew(params))
        (first,) = torch.autograd.grad((P * weights(P)).sum(), params, create_graph=True)
        return torch.autograd.grad(first.square().sum(), params)[0]

    params = params_of(20, 2, dtype=torch.float32, device=device)
    actual, exact = second(params.requires_grad_()), second(params.detach().double().requires_grad_())
    assert_within(actual, exact, ORTHOGONAL[torch.float32])


def test_no_gradient_where_none_is_asked_for(device: torch.device, backend: str) -> None:
    assert not cayley_basis(params_of(4, 2, dtype=torch.float32, device=device), backend=backend).requires_grad


# PyTorch's machinery -------------------------------------------------------------------------------------------------


def test_opcheck(device: torch.device, backend: str) -> None:
    params = params_of(6, 2, 3, dtype=torch.float32, device=device).requires_grad_()
    P, inverse = torch.ops.fastrpe.cayley_basis.default(params, backend)
    assert inverse.dtype == torch.float64
    torch.library.opcheck(torch.ops.fastrpe.cayley_basis.default, (params, backend))
    args = weights(P).requires_grad_(), inverse.detach().requires_grad_(), backend
    torch.library.opcheck(torch.ops.fastrpe.cayley_basis_bwd.default, args)


@pytest.mark.parametrize("compiler", ("aot_eager", "inductor"))
def test_compile(device: torch.device, backend: str, compiler: str) -> None:
    """One graph for any number of heads, with the bits of eager."""
    torch.compiler.reset()
    compiled = torch.compile(lambda p: cayley_basis(p, backend=backend), fullgraph=True, dynamic=True, backend=compiler)
    for i, heads in enumerate((3, 5, 7)):
        params = params_of(6, heads, dtype=torch.float32, device=device).requires_grad_()
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            P = compiled(params)
        assert_bitwise(P, cayley_basis(params, backend=backend))
        assert_bitwise(torch.autograd.grad(P, params, weights(P))[0], gradient(params, backend))


def test_export(device: torch.device, backend: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, params: Tensor) -> Tensor:
            return cayley_basis(params, backend=backend)

    params = params_of(6, 2, dtype=torch.float32, device=device)
    heads = torch.export.Dim("heads")
    program = torch.export.export(Model(), (params,), dynamic_shapes=({0: heads},))
    assert repr(backend) in program.graph_module.code
    more = params_of(6, 5, dtype=torch.float32, device=device)
    assert_bitwise(program.module()(more), cayley_basis(more, backend=backend))


def test_vmap(device: torch.device, backend: str) -> None:
    params = params_of(6, 4, 2, dtype=torch.float32, device=device)
    expected = cayley_basis(params, backend=backend)
    for axis in (0, 1, -1):
        actual = torch.vmap(lambda p: cayley_basis(p, backend=backend), in_dims=axis)(params.movedim(0, axis))
        assert_bitwise(actual.contiguous(), expected)
    one = params[0].requires_grad_()
    loop, batched = (
        torch.autograd.functional.jacobian(lambda p: cayley_basis(p, backend=backend), one, vectorize=vectorize)
        for vectorize in (False, True)
    )
    assert_bitwise(batched.contiguous(), loop)


def test_autocast_changes_nothing(device: torch.device, backend: str) -> None:
    params = params_of(6, 2, dtype=torch.float32, device=device)
    expected, dexpected = cayley_basis(params, backend=backend), gradient(params, backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_bitwise(cayley_basis(params, backend=backend), expected)
        assert_bitwise(gradient(params, backend), dexpected)


def test_forward_mode_raises(device: torch.device) -> None:
    params = params_of(6, 2, device=device)
    message = "cayley_basis: params must have no forward-mode tangents, got one; use reverse mode"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(cayley_basis, (params,), (params,))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("reference", "native"))
def test_cuda_graph(backend: str) -> None:
    """A graph captures forward and backward, so neither waits for the device."""
    params, other = (params_of(64, 3, dtype=torch.float32, device="cuda", seed=seed) for seed in (0, 1))
    expected = cayley_basis(other, backend=backend), gradient(other, backend)
    params.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        P = cayley_basis(params, backend=backend)
        return P, torch.autograd.grad(P, params, dy)[0]

    dy = weights(expected[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        params.copy_(other)
    graph.replay()
    for result, value in zip(results, expected):
        assert_bitwise(result.detach(), value)


@pytest.mark.gpu
def test_other_stream() -> None:
    """Kernels run on the caller's stream."""
    params = params_of(64, 3, dtype=torch.float32, device="cuda")
    expected = gradient(params, "native")
    side, late = torch.cuda.Stream(), torch.empty_like(params)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(params)
        actual = gradient(late, "native")
    side.synchronize()
    assert_bitwise(actual, expected)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "backend", "error", "message"),
    [
        ([1.0], None, TypeError, "cayley_basis: params must be a Tensor, got list"),
        (torch.tensor(1.0), None, ValueError, "cayley_basis: params must have shape (..., d (d - 1) / 2), got ()"),
        (
            torch.zeros(2, 4),
            None,
            ValueError,
            "cayley_basis: params must have d (d - 1) / 2 entries for some d, got 4",
        ),
        (
            torch.zeros(6, dtype=torch.int64),
            None,
            ValueError,
            "cayley_basis: params must have dtype float16, bfloat16, float32, float64, got int64",
        ),
        (
            torch.zeros(6),
            "fast",
            ValueError,
            "cayley_basis: backend must be one of 'reference', 'native', 'triton', got 'fast'",
        ),
    ],
)
def test_bad_arguments_raise(params: object, backend: str | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        cayley_basis(params, backend=backend)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_a_backend_that_cannot_serve_raises(device: torch.device) -> None:
    if problem("native", device.type):
        pytest.skip(problem("native", device.type))
    for size, dtype, name in ((4, torch.float64, "float64"), (129, torch.float32, "float32")):
        params = torch.zeros(2, size * (size - 1) // 2, dtype=dtype, device=device)
        with pytest.raises(NotImplementedError) as raised:
            cayley_basis(params, backend="native")
        assert str(raised.value) == (
            "cayley_basis: backend must be 'reference', or 'native' for CUDA, float32 and d up to 128, "
            f"got 'native' for {device.type}, {name} and d={size}"
        )
