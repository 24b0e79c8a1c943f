"""`torch.library.register_autograd` at a fraction of its cost a call, and without its silence in forward mode."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.nn import Parameter

# The keys of a plain tensor's call when its autograd kernel runs: no mode, subclass, transform or lazy negation.
DENSE = {
    (torch._C.DispatchKeySet(dense) | torch._C.DispatchKeySet(autograd)).raw_repr()
    for dense, autograd in (
        (torch._C.DispatchKey.CPU, torch._C.DispatchKey.AutogradCPU),
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.AutogradCUDA),
    )
}
# What a thread adds to the keys of a tensor outside every mode, transform and tracer; less in inference mode.
_BASE = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
OUTSIDE = {_BASE.raw_repr(), (_BASE | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)).raw_repr()}
PLAIN = {Tensor, Parameter, type(None), str, bool, int, float}


def is_plain(args: Sequence[Any]) -> bool:
    """Whether the dispatcher would do no more than to run the kernel of a call whose last argument is its backend.

    Native operators go through the dispatcher themselves, which resolves what is lazy; Triton's kernels read memory.
    """
    return (
        not torch.compiler.is_compiling()
        and args[-1] == "native"
        and PLAIN.issuperset(map(type, args))
        and torch._C._dispatch_tls_local_include_set().raw_repr() in OUTSIDE
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._is_torch_function_mode_enabled()
        and forward_ad._current_level < 0
    )


def register_autograd(
    lib: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Register, and give a function that is the operator without its dispatcher where a call is plain."""
    op = getattr(getattr(torch.ops, lib.ns), name).default

    def below(keyset: Any, args: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            if keyset.raw_repr() in DENSE:  # the dispatcher would do no more than to call it
                return kernel(*args)
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args
        if keyset is None:
            output = kernel(*inputs)
        elif torch._C._are_functorch_transforms_active():
            with torch.enable_grad():  # of the levels around this one
                output = below(keyset, inputs)
        else:
            output = below(keyset, inputs)
        if setup is not None:
            setup(ctx, inputs, output)
        return output

    def differentiate(ctx: Any, *dy: Tensor) -> tuple[Any, ...]:
        return (*backward(ctx, *dy), None)

    Function = _function(name, forward, differentiate)
    apply = _plain_apply(Function)

    def run(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(
            isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
        ):
            raise NotImplementedError(f"{name}: inputs must have no forward-mode tangents, got one; use reverse mode")
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            if torch._C._are_functorch_transforms_active():  # a level of torch.func has come here by itself
                with enable_single_level_autograd_function():
                    return apply(*args, keyset)
            return Function.apply(*args, keyset)
        return below(keyset, args)

    def call(*args: Any) -> Any:
        if not is_plain(args):
            return op(*args)
        if _differentiates(args):
            return apply(*args, None)
        return kernel(*args)

    lib.impl(name, run, "Autograd", with_keyset=True)
    return call


def first_result(
    lib: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    backward: Callable[..., Any],
    setup: Callable[..., None],
) -> Callable[..., Tensor]:
    """A function that gives the first result of an operator, and in a plain call does not go through its dispatcher.

    Autograd then sees that result alone. The others, of which ``kernel`` may have more than the operator, are for
    ``setup``; ``backward`` takes the gradient of the first.
    """
    op = getattr(getattr(torch.ops, lib.ns), name).default

    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output = kernel(*inputs)
        setup(ctx, inputs, output)
        first: Tensor = output[0]
        return first

    apply = _plain_apply(_function(name, forward, backward))

    def call(*args: Any) -> Any:
        if not is_plain(args):
            return op(*args)[0]
        if _differentiates(args):
            return apply(*args)
        return kernel(*args)[0]

    return call


def _differentiates(args: Sequence[Any]) -> bool:
    """Whether a plain call has a derivative; most often by its first tensor, and others are slow to find."""
    return torch.is_grad_enabled() and (args[0].requires_grad or torch._C._any_requires_grad(*args))


def _function(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    rules = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    function: Any = type(f"{name}_backward", (torch.autograd.Function,), rules)
    function._backward_cls.apply = backward  # in which the one of PyTorch ends
    return function


def _plain_apply(function: Any) -> Callable[..., Any]:
    """That of C++, which Function.apply ends in without transforms."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply
    return apply
