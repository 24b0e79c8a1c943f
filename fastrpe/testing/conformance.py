"""One conformance check of a case: values and every gradient against the reference. Tests and benchmarks call it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrpe.ops

from ..ops.rotary import reference
from .asserts import FLOAT64_ROUNDINGS, assert_accurate
from .cases import Arguments, Case

Op = Callable[..., tuple[Tensor, Tensor]]

REFERENCES: dict[str, Op] = {"rotate": reference.rotate, "rotate_cos_sin": reference.rotate_cos_sin}


def public(case: Case, backend: str | None) -> Op:
    op = getattr(fastrpe.ops, case.op)
    return lambda **arguments: op(**arguments, backend=backend)


def truth(case: Case) -> Op:
    """The reference as a function of the public arguments: it has no optional k."""
    op = REFERENCES[case.op]

    def call(**arguments: Any) -> tuple[Tensor, Tensor]:
        if arguments["k"] is None:
            arguments = arguments | dict(k=arguments["q"][:, :0])
        return op(**arguments)

    return call


def floats(arguments: Arguments) -> list[str]:
    return [n for n, x in arguments.items() if isinstance(x, Tensor)]


def convert(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    return {n: change(x) if isinstance(x, Tensor) else x for n, x in arguments.items()}


def upstream(arguments: Arguments) -> list[Tensor]:
    """Random gradients of the two results."""
    q, k = arguments["q"], arguments["k"]
    draw = torch.Generator(q.device).manual_seed(1)
    shapes = [q.shape, (q if k is None else k).shape]
    return [torch.randn(s, device=q.device, dtype=q.dtype, generator=draw) for s in shapes]


def run(f: Op, arguments: Arguments, needed: list[str]) -> dict[str, Tensor]:
    """Results and the gradients of ``needed``, by name."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in needed}
    y = f(**arguments | leaves)
    results = {"q'": y[0].detach(), "k'": y[1].detach()}
    if needed:
        both = [(t, dy.to(t.dtype)[:, : t.shape[1]]) for t, dy in zip(y, upstream(arguments)) if t.requires_grad]
        outputs, dy = zip(*both)
        found = torch.autograd.grad(outputs, list(leaves.values()), dy, allow_unused=True)
        for n, g in zip(needed, found):
            assert g is not None, f"the gradient of {n} is None"
            results[f"d{n}"] = g
    return results


def check(case: Case, device: torch.device, dtype: torch.dtype, backend: str | None, seed: int = 0) -> None:
    """Values and every gradient of a case, against the float64 reference and the reference in the case's dtype."""
    arguments = case.make(device, dtype, seed)
    needed = floats(arguments)
    actual = run(public(case, backend), arguments, needed)
    wide = convert(arguments, Tensor.double)
    exact = run(truth(case), wide, needed)
    if dtype == torch.float64:  # no wider dtype: what the reference makes of inputs that are a few roundings off
        draw = torch.Generator(device).manual_seed(2)
        size = FLOAT64_ROUNDINGS * torch.finfo(dtype).eps
        off = convert(wide, lambda x: x * (1 + size * torch.randn(x.shape, device=device, dtype=dtype, generator=draw)))
        same = run(truth(case), off, needed)
    else:
        same = run(truth(case), arguments, needed)
    for name in exact:
        assert actual[name].is_contiguous() or name.startswith("d"), f"{name} is not contiguous"
        assert_accurate(actual[name], same[name], exact[name], name=name, dtype=dtype)


def check_rows(case: Case, arguments: Arguments, actual: Sequence[Tensor], rows: slice, *, back: bool = False) -> None:
    """Some tokens of results of any size; ``back``: of the gradients of q and k with ``arguments``' as upstream."""
    part = arguments | {n: arguments[n][..., rows, :] for n in ("q", "k", "positions", "cos", "sin") if n in arguments}
    if back:
        part |= dict(inverse=not arguments.get("inverse", False))
    same, exact = truth(case)(**part), truth(case)(**convert(part, Tensor.double))
    for name, a, s, e in zip("qk", actual, same, exact):
        assert_accurate(a[:, :, rows], s, e, name=f"d{name}" if back else f"{name}'")
