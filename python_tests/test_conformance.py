"""Every op, on every device, by every backend, against its reference and against PyTorch's own machinery."""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastrpe.ops
from fastrpe.backend import problem
from fastrpe.testing.asserts import LAW_FLOAT64, assert_accurate, assert_bitwise, assert_same, assert_within
from fastrpe.testing.cases import CASES, Arguments, Case, case, cases
from fastrpe.testing.conformance import (
    REFERENCES,
    check,
    check_rows,
    convert,
    floats,
    public,
    results_of,
    run,
    truth,
    upstream,
)

# The solvers of sparse_cayley are its backends, so its conformance is in its own tests; a step is a call of one token.
APART = {"sparse_cayley", "linear_attention_step"}
PUBLIC = sorted({n for n, f in vars(fastrpe.ops).items() if inspect.isfunction(f)} - APART)
TINY = cases(None, "tiny")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

every_case = pytest.mark.parametrize("case", cases(), ids=str)
tiny_case = pytest.mark.parametrize("case", TINY, ids=str)
PAIRS = (
    case("rotate", "tiny-image-gqa-prefix"),
    case("rotate", "tiny-packed-partial"),
    case("rotate", "tiny-basis"),
    case("rotate", "tiny-basis-inverse"),
    case("rotate_cos_sin", "tiny"),
)
FEATURES = (
    case("random_features", "tiny"),
    case("random_features", "tiny-oprf-heads"),
    case("random_features", "tiny-relu-alone"),
)
ATTENTION = (case("linear_attention", "tiny"), case("linear_attention", "tiny-elu-causal"))
one_pair = pytest.mark.parametrize("case", PAIRS, ids=str)
one_of_each = pytest.mark.parametrize("case", (*PAIRS, *FEATURES, *ATTENTION), ids=str)


# Helpers -------------------------------------------------------------------------------------------------------------


def slow(case: Case, backend: str, device: torch.device, *names: str) -> None:
    """Interpreted Triton kernels run the tiny cases alone, or ``names``."""
    if backend == "triton" and device.type == "cpu" and not (case.name in names if names else "tiny" in case.tags):
        pytest.skip("too slow for interpreted Triton kernels")
    if backend == "triton" and "not-triton" in case.tags:
        pytest.skip("beyond the limits of the Triton kernels")


def needs_float64(case: Case, backend: str) -> None:
    if backend == "triton" and case.op == "linear_attention":
        pytest.skip("the Triton kernels of linear attention compute in float32")


def tensors_first(case: Case, arguments: Arguments, backend: str) -> tuple[Callable[..., Any], list[Tensor]]:
    """The op as a function of its floating inputs alone, as gradcheck and vmap want it."""
    names = floats(arguments)
    rest = {n: x for n, x in arguments.items() if n not in names}
    alone = arguments.get("k", names) is None

    def f(*xs: Tensor) -> Any:
        y = public(case, backend)(**dict(zip(names, xs)), **rest)
        return y[0] if alone else y

    return f, [arguments[n] for n in names]


def op_arguments(case: Case, arguments: Arguments, backend: str) -> tuple[Any, tuple[Any, ...]]:
    """The dispatcher's op and its positional arguments."""
    op = getattr(torch.ops.fastrpe, case.op).default
    if arguments.get("k", op) is None:
        arguments = arguments | dict(k=arguments["q"][:, :0])
    parameters = inspect.signature(getattr(fastrpe.ops, case.op)).parameters
    values = {n: p.default for n, p in parameters.items()} | arguments | dict(backend=backend, need_state=True)
    if "scale" in values and values["scale"] is None:  # which the public functions resolve
        values["scale"] = 0.7
    return op, tuple(values.get(a.name) for a in op._schema.arguments)  # a state, which is several, is None


# The suite knows everything ------------------------------------------------------------------------------------------


def test_built(device: torch.device) -> None:
    """A backend that is missing skips its tests; this one fails, so that nobody takes the skips for a pass."""
    for name in ("native",) if device.type == "cpu" else ("native", "triton"):
        assert not problem(name, device.type), problem(name, device.type)


def test_every_public_op_has_cases() -> None:
    assert {c.op for c in CASES} == set(PUBLIC) == set(REFERENCES)
    assert len({(c.op, c.name) for c in CASES}) == len(CASES)
    for op in PUBLIC:
        assert cases(op, "bench") and cases(op, "tiny")


@pytest.mark.parametrize("op", PUBLIC)
def test_names_and_order_agree(op: str) -> None:
    """Reference, operator and kernels take the public function's arguments, in its order."""
    parts = {"backend": [], "state": ["kv", "z", "log_scale"], "return_state": []}
    public = inspect.signature(getattr(fastrpe.ops, op)).parameters
    names = [part for n in public for part in parts.get(n, [n])]
    assert list(inspect.signature(REFERENCES[op]).parameters) == names
    schema = [a.name for a in getattr(torch.ops.fastrpe, op).default._schema.arguments]
    inner = ["need_state"] if op == "linear_attention" else []  # which follows from the public arguments
    assert schema == [*names, *inner, "backend"]
    kernels = {}
    if not problem("native", "cpu"):
        native = getattr(torch.ops.fastrpe_native, op).default
        kernels["native"] = [a.name for a in native._schema.arguments]
    if not problem("triton", "cuda") or INTERPRETED:
        triton_impl = importlib.import_module(REFERENCES[op].__module__.replace("reference", "triton_impl"))
        kernels["triton"] = list(inspect.signature(getattr(triton_impl, op)).parameters)
    for backend, found in kernels.items():  # the product with a basis may be left to PyTorch
        # OPRF's a comes as a bias of the exponents, what needs no state as `short`
        found = ["a" if n == "bias" else n for n in found if n not in (*inner, "short")]
        assert found == [n for n in names if n in found], backend
        assert set(names) - set(found) <= {"basis"}, backend


# Values and derivatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@every_case
def test_values_and_gradients(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    slow(case, backend, device)
    if dtype == torch.float64:
        needs_float64(case, backend)
    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("interpreted Triton kernels truncate to bfloat16")
    check(case, device, dtype, backend)


@every_case
def test_default_backend(case: Case, device: torch.device) -> None:
    """The choice made for the caller is right too, and is one of those tested above."""
    check(case, device, torch.float32, None, seed=3)


@pytest.mark.parametrize("case", [c for c in TINY if "stop-gradient" not in c.tags], ids=str)
def test_gradcheck(case: Case, device: torch.device, backend: str) -> None:
    """Numerical derivatives with every floating input requiring grad: a missing gradient is a zero one, and fails."""
    slow(
        case,
        backend,
        device,
        "tiny-image-gqa-prefix",
        "tiny-basis-inverse",
        "tiny-inverse-interleaved",
        "tiny-oprf-heads",
    )
    needs_float64(case, backend)
    f, inputs = tensors_first(case, case.make(device, torch.float64, 0), backend)
    fast = backend == "triton" and device.type == "cpu"
    assert gradcheck(f, [x.requires_grad_() for x in inputs], fast_mode=fast, nondet_tol=0.0)


@pytest.mark.parametrize("case", [c for c in TINY if "inverse" in c.name or c.name == "tiny"], ids=str)
def test_each_gradient_alone(case: Case, device: torch.device, backend: str) -> None:
    """Asking for one gradient gives the same bits as asking for all of them, and for None of the others."""
    arguments = case.make(device, torch.float32, 0)
    f = public(case, backend)
    together = run(f, arguments, floats(arguments))
    for name in floats(arguments):
        alone = run(f, arguments, [name])
        dtype = torch.float32
        assert_accurate(alone[f"d{name}"], together[f"d{name}"], together[f"d{name}"].double(), dtype=dtype, name=name)


@pytest.mark.parametrize("case", [c for c in TINY if c.op.startswith("rotate")], ids=str)
def test_double_backward(case: Case, device: torch.device, backend: str) -> None:
    """Through q and k the backward is the op again; gradients that need another kernel say that they stop there."""
    slow(case, backend, device, "tiny-inverse-interleaved", "tiny-basis-inverse")
    arguments = case.make(device, torch.float64, 0)
    f, inputs = tensors_first(case, arguments, backend)
    x = [x.requires_grad_() if n in ("q", "k") else x for n, x in zip(floats(arguments), inputs)]
    assert gradgradcheck(f, x, fast_mode="16" in case.name or "triton" in backend)
    if case.op == "rotate_cos_sin":
        assert gradgradcheck(f, [x.requires_grad_() for x in inputs], fast_mode=True)
        return
    y = f(*(x.requires_grad_() for x in inputs))
    y = y if isinstance(y, tuple) else (y,)
    first = torch.autograd.grad([t.sum() for t in y], inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=r"rotate: .* must not require grad for a second derivative, got"):
        torch.autograd.grad([g.square().sum() for g in first], inputs)


@pytest.mark.parametrize("wanted", (True, False), ids=("k-alone", "q-alone"))
@one_pair
def test_one_result_unused(case: Case, device: torch.device, backend: str, wanted: bool) -> None:
    """Autograd passes zeros, or nothing, for a result that the loss does not see."""
    arguments = case.make(device, torch.float64, 0)
    names = floats(arguments)
    found = []
    for f in (public(case, backend), truth(case)):
        leaves = {n: arguments[n].detach().requires_grad_() for n in names}
        y = f(**arguments | leaves)[wanted]
        weight = torch.linspace(-1, 1, y.numel(), device=device, dtype=y.dtype).reshape(y.shape)
        found.append(torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True))
    for name, g, expected in zip(names, *found):
        if expected is None:
            assert g is None or not g.any(), name
        else:
            assert_within(g, expected, LAW_FLOAT64, name=name)


# PyTorch's machinery -------------------------------------------------------------------------------------------------


@tiny_case
def test_opcheck(case: Case, device: torch.device, backend: str) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch, with dynamic shapes."""
    slow(case, backend, device, "tiny-queries-alone", "tiny-basis")
    arguments = convert(case.make(device, torch.float32, 0), lambda x: x.requires_grad_())
    public(case, backend)(**arguments)  # where the backend does not serve this case, it is skipped here
    op, args = op_arguments(case, arguments, backend)
    torch.library.opcheck(op, args)


@pytest.mark.parametrize("case", [c for c in TINY if c.op == "rotate"], ids=str)
def test_opcheck_backward(case: Case, device: torch.device, backend: str) -> None:
    slow(case, backend, device, "tiny-queries-alone", "tiny-basis")
    arguments = case.make(device, torch.float32, 0)
    _, (q, k, positions, freqs, basis, *options, backend) = op_arguments(case, arguments, backend)
    dy = torch.randn_like(q), torch.randn_like(k)
    needs = (True, True, basis is not None)
    args = (*dy, q, k, positions, freqs, basis, *options, *needs, backend)
    torch.library.opcheck(torch.ops.fastrpe.rotate_bwd.default, args)


@one_of_each
def test_compile(case: Case, device: torch.device, backend: str) -> None:
    """One graph for all sizes, with the bits of eager, forward and backward."""
    slow(case, backend, device, "none")
    f = public(case, backend)
    f(**case.make(device, torch.float32, 0))  # where the backend does not serve this case, it is skipped here
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.compiler.reset()
    for i, repeats in enumerate((7, 11, 13)):  # batches unlike any other size, which PyTorch would take for the same
        arguments = case.make(device, torch.float32, i)
        arguments = {n: _longer(n, x, repeats) for n, x in arguments.items()}
        needed = floats(arguments)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual = run(compiled, arguments, needed)
        for name, expected in run(f, arguments, needed).items():
            assert_bitwise(actual[name], expected, name=name)


def _longer(name: str, x: Any, repeats: int) -> Any:
    """A longer batch: what has a batch axis is repeated along it."""
    return (
        torch.cat((x,) * repeats)
        if name in ("q", "k", "v", "x", "mask") or (name == "positions" and x.dim() == 3)
        else x
    )


@pytest.mark.parametrize("op", PUBLIC)
def test_compile_inductor(op: str, device: torch.device) -> None:
    """The default compiler, which lays out what surrounds the op as it likes."""
    one = case(op, "transposed")

    def around(op: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        first = next(iter(arguments))
        y = results_of(op(**arguments | {first: arguments[first] / 2}))
        return tuple(t.relu() if i else t + 1 for i, t in enumerate(y))

    arguments = one.make(device, torch.float32, 0)
    needed = floats(arguments)
    torch.compiler.reset()
    compiled = torch.compile(lambda **a: around(public(one, None), a), fullgraph=True, dynamic=True)
    actual = run(compiled, arguments, needed)
    same = run(lambda **a: around(truth(one), a), arguments, needed)
    exact = run(lambda **a: around(truth(one), a), convert(arguments, Tensor.double), needed)
    for name in exact:
        assert_accurate(actual[name], same[name], exact[name], name=name)


@one_of_each
def test_export(case: Case, device: torch.device, backend: str) -> None:
    """An exported program calls the op with the backend chosen, for any batch."""
    f, inputs = tensors_first(case, case.make(device, torch.float32, 0), backend)
    names = floats(case.make(device, torch.float32, 0))

    class Model(torch.nn.Module):
        def forward(self, *xs: Tensor) -> Any:
            return f(*xs)

    longer = [_longer(n, x, 2) for n, x in zip(names, inputs)]
    batch = torch.export.Dim("batch")
    dynamic = tuple({0: batch} if x is not y else None for x, y in zip(inputs, longer))
    program = torch.export.export(Model(), tuple(inputs), dynamic_shapes={"xs": dynamic})
    assert repr(backend) in program.graph_module.code
    for actual, expected in zip(results_of(program.module()(*longer)), results_of(f(*longer))):
        assert_bitwise(actual, expected)


@one_of_each
def test_vmap(case: Case, device: torch.device, backend: str) -> None:
    """Each argument mapped in turn, along its first and its last axis, and all together, equals a loop."""
    slow(case, backend, device, "tiny-packed-partial")
    draws = [tensors_first(case, case.make(device, torch.float32, seed), backend) for seed in (0, 1)]
    f, inputs = draws[0]
    stacked = [torch.stack(pair) for pair in zip(*(x for _, x in draws))]
    n = len(inputs)
    maps = [*([i] for i in range(n)), *([i, i + 1] for i in range(0, n - 1, 2)), list(range(n))]
    for axis in (0, -1):
        for mapped in maps:
            args = [stacked[i].movedim(0, axis) if i in mapped else inputs[i] for i in range(n)]
            actual = torch.vmap(f, tuple(axis if i in mapped else None for i in range(n)))(*args)
            loop = [results_of(f(*(stacked[i][j] if i in mapped else inputs[i] for i in range(n)))) for j in range(2)]
            for result, expected in zip(results_of(actual), zip(*loop)):
                assert_same(result.contiguous(), torch.stack(expected), backend, name=f"{mapped} mapped")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
@one_of_each
def test_autocast(case: Case, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """q, k, v or x go to the autocast dtype (float64 stays), what else there is does not; gradients come back wide."""
    if dtype == torch.float64:
        needs_float64(case, backend)
    arguments = case.make(device, dtype, 0)
    needed = floats(arguments)
    f = public(case, backend)

    def under_autocast(**arguments: Any) -> Any:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return f(**arguments)

    def by_hand(**arguments: Any) -> Any:
        low = {n: x.bfloat16() for n, x in arguments.items() if n in ("q", "k", "v", "x") and dtype == torch.float32}
        return f(**arguments | low)

    actual, expected = run(under_autocast, arguments, needed), run(by_hand, arguments, needed)
    for name in expected:
        assert_bitwise(actual[name], expected[name], name=name)


@one_pair
def test_autocast_mixes(case: Case, device: torch.device, backend: str) -> None:
    """A wide key beside a narrow query is no error under autocast, as in scaled_dot_product_attention."""
    arguments = case.make(device, torch.float32, 0)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        q, k = public(case, backend)(**arguments | dict(q=arguments["q"].bfloat16()))
    assert q.dtype == k.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("name", ("vit-197-cayley", "basis-prefix-gqa", "packed-prefix-mixed", "tiny-basis"))
def test_deterministic(name: str, device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """The same inputs give the same bits, twice, forward and backward."""
    one = case("rotate", name)
    slow(one, backend, device)
    arguments = one.make(device, dtype, 0)
    first, second = (run(public(one, backend), arguments, floats(arguments)) for _ in range(2))
    for result in first:
        assert_bitwise(second[result], first[result], name=result)


@one_of_each
def test_inputs_are_left_alone(case: Case, device: torch.device, backend: str) -> None:
    """Results are fresh, contiguous memory; nothing is written to what came in."""
    arguments = case.make(device, torch.float32, 0)
    before = convert(arguments, Tensor.clone)
    for y in results_of(public(case, backend)(**arguments)):
        assert y.is_contiguous()
        y.fill_(0)
    for name in floats(arguments):
        assert_bitwise(arguments[name], before[name], name=name)


# GPU -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("backend", ("reference", "native", "triton", None))
@pytest.mark.parametrize(
    "name", ("vit-256-twin", "basis-prefix-gqa", "llm-4096-learned-twin", "basis-inverse", "packed")
)
def test_cuda_graph(name: str, backend: str | None, dtype: torch.dtype) -> None:
    """A graph captures forward and backward, so neither waits for the device; its replay on new inputs is eager's."""
    device = torch.device("cuda")
    one = case("rotate", name)
    arguments, other = (one.make(device, dtype, seed) for seed in (0, 1))
    needed = floats(arguments)
    f = public(one, backend)
    expected = run(f, other, needed)
    dy = upstream(f(**arguments))
    leaves = {n: arguments[n].detach().requires_grad_() for n in needed}

    def step() -> list[Tensor]:
        y = f(**arguments | leaves)
        return [*y, *torch.autograd.grad(y, list(leaves.values()), dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for n in needed:
            leaves[n].copy_(other[n])
    graph.replay()
    for result, (n, value) in zip(results, expected.items()):
        assert_bitwise(result.detach(), value, name=n)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_other_stream(backend: str) -> None:
    """Kernels run on the caller's stream."""
    one = case("rotate", "vit-197")
    arguments = one.make(torch.device("cuda"), torch.float32, 0)
    expected = public(one, backend)(**arguments)
    side = torch.cuda.Stream()
    q = torch.empty_like(arguments["q"])
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read q before it is written
        q.copy_(arguments["q"])
        actual = public(one, backend)(**arguments | dict(q=q))
    side.synchronize()
    assert_bitwise(actual[0], expected[0])


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("layout", ("contiguous", "transposed"))
@pytest.mark.parametrize("backend", ("native", "triton"))
def test_more_than_2_31_elements(backend: str, layout: str) -> None:
    """Addresses are 64 bits wide: rows at the start, around element 2^31 and at the end, forward and backward."""
    device = torch.device("cuda")
    H, L, D = 5, 2**21, 256
    q = torch.randn(1, H, L, D, device=device, dtype=torch.bfloat16)
    if layout == "transposed":
        q = q.view(1, L, H, D).transpose(1, 2)
    k = q[:, :1]
    assert q.numel() > 2**31
    positions = torch.arange(L, device=device, dtype=torch.float32)[:, None] / 8
    freqs = torch.rand(1, D // 2, device=device)
    arguments: Arguments = dict(q=q, k=k, positions=positions, freqs=freqs)
    leaves = dict(q=q.detach().requires_grad_(), k=k.detach().requires_grad_())
    y = fastrpe.ops.rotate(**arguments | leaves, backend=backend)
    back = arguments | {n: t.detach() for n, t in zip("qk", y)}
    dy = torch.autograd.grad(y, list(leaves.values()), (back["q"], back["k"]))
    for at in (0, L // 5, L // 5 * 4 - 64, L // 5 * 4, L - 64):
        check_rows(case("rotate", "tiny"), arguments, y, slice(at, at + 64))
        check_rows(case("rotate", "tiny"), back, dy, slice(at, at + 64), back=True)
