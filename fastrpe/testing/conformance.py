"""One conformance check of a case: values and every gradient against the reference. Tests and benchmarks call it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastrpe.ops

from ..ops.features import reference as features
from ..ops.linear import reference as linear
from ..ops.rotary import reference as rotary
from .asserts import ROUNDINGS, assert_accurate
from .cases import Arguments, Case

Op = Callable[..., Any]  # gives a tensor, or a tuple of them
ROTATED = ("q'", "k'")  # the two results of the rotations

REFERENCES: dict[str, Op] = {
    "linear_attention": linear.linear_attention,
    "random_features": features.random_features,
    "rotate": rotary.rotate,
    "rotate_cos_sin": rotary.rotate_cos_sin,
}


def public(case: Case, backend: str | None) -> Op:
    op = getattr(fastrpe.ops, case.op)
    return lambda **arguments: op(**arguments, backend=backend)


def truth(case: Case) -> Op:
    """The reference as a function of the public arguments: it has no optional k."""
    if case.op == "linear_attention":  # whose public function applies the features' constant
        return public(case, "reference")
    op = REFERENCES[case.op]

    def call(**arguments: Any) -> Any:
        if arguments.get("k", op) is None:
            arguments = arguments | dict(k=arguments["q"][:, :0])
        return op(**arguments)

    return call


def floats(arguments: Arguments) -> list[str]:
    return [n for n, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]


def convert(arguments: Arguments, change: Callable[[Tensor], Tensor]) -> Arguments:
    """Change the floating-point tensors."""
    names = floats(arguments)
    return {n: change(x) if n in names else x for n, x in arguments.items()}


def results_of(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def upstream(results: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the results, the same numbers in every dtype."""
    found = []
    for i, y in enumerate(results):
        draw = torch.Generator(y.device).manual_seed(1 + i)
        found.append(torch.randn(y.shape, device=y.device, generator=draw).bfloat16().to(y.dtype))
    return found


def run(f: Op, arguments: Arguments, needed: list[str]) -> dict[str, Tensor]:
    """Results and the gradients of ``needed``, by name."""
    leaves = {n: arguments[n].detach().requires_grad_() for n in needed}
    y = results_of(f(**arguments | leaves))
    results = {name: t.detach() for name, t in zip(ROTATED if len(y) == 2 else ("y",), y)}
    if needed:
        both = [(t, dy) for t, dy in zip(y, upstream(y)) if t.requires_grad]
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
    # What the reference makes of inputs that are a few roundings off: all that there is in float64; in narrower dtypes
    # a guard against a reference that is right by luck, as sums of a few numbers are. A rotated q or k is not a sum.
    draw = torch.Generator(device).manual_seed(2)
    size = ROUNDINGS * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    off = [run(truth(case), convert(wide, lambda x: x * (1 + size * _normal(x, draw))), needed) for _ in range(3)]
    same = None if dtype == torch.float64 else run(truth(case), arguments, needed)
    for name in exact:
        is_rotation = name in ROTATED
        assert actual[name].is_contiguous() or name.startswith("d"), f"{name} is not contiguous"
        found = [] if is_rotation and same is not None else [x[name] for x in off]
        found += [] if same is None else [same[name]]
        furthest = max(found, key=lambda x: _distance(x, exact[name]))
        assert_accurate(actual[name], furthest.to(found[-1].dtype), exact[name], name=name, dtype=dtype)


def _normal(x: Tensor, draw: torch.Generator) -> Tensor:
    return torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=draw)


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).nan_to_num().square().sum())


def check_rows(case: Case, arguments: Arguments, actual: Sequence[Tensor], rows: slice, *, back: bool = False) -> None:
    """Some tokens of results of any size; ``back``: of the gradients of q and k with ``arguments``' as upstream."""
    part = arguments | {n: arguments[n][..., rows, :] for n in ("q", "k", "positions", "cos", "sin") if n in arguments}
    if back:
        part |= dict(inverse=not arguments.get("inverse", False))
    same, exact = truth(case)(**part), truth(case)(**convert(part, Tensor.double))
    for name, a, s, e in zip("qk", actual, same, exact):
        assert_accurate(a[:, :, rows], s, e, name=f"d{name}" if back else f"{name}'")
