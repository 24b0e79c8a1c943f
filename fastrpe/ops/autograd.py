"""`torch.library.register_autograd` at a third of its cost a call, and without its silence in forward mode."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# The keys of a plain tensor's call when its autograd kernel runs: no mode, subclass, transform or lazy negation.
DENSE = {
    (torch._C.DispatchKeySet(dense) | torch._C.DispatchKeySet(autograd)).raw_repr()
    for dense, autograd in (
        (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU),
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.AutogradCUDA),
    )
}


def register_autograd(
    lib: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    op = getattr(getattr(torch.ops, lib.ns), name).default

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() in DENSE:  # the dispatcher would do no more than to call it
                return kernel(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        output = below(keyset, inputs)
        setup(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        return (*backward(ctx, *dy), None)

    Function: Any = type(
        f"{name}_backward",
        (torch.autograd.Function,),
        dict(forward=staticmethod(forward), backward=staticmethod(differentiate)),
    )

    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        ):
            raise NotImplementedError(f"{name}: inputs must have no forward-mode tangents, got one; use reverse mode")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Function.apply(*args, keyset)
        return below(keyset, args)

    lib.impl(name, run, "Autograd", with_keyset=True)
