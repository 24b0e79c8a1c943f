"""Argument checks: the only place where errors are worded.

Every message is one sentence, ``{op}: {argument} must {requirement}, got {what came}``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fail(op: str, argument: str, requirement: str, came: object) -> ValueError:
    return ValueError(f"{op}: {argument} must {requirement}, got {came}")


def wrong_type(op: str, argument: str, value: object, *types: type) -> TypeError:
    names = " or ".join(t.__name__ for t in types)
    return TypeError(f"{op}: {argument} must be a {names}, got {type(value).__name__}")


def check_type(op: str, argument: str, value: object, *types: type) -> None:
    if not isinstance(value, types):
        raise wrong_type(op, argument, value, *types)


def check_shape(op: str, argument: str, x: Tensor, *shapes: tuple[str, ...], **sizes: int) -> None:
    """Check that ``x`` has one of ``shapes``, tuples of symbols; ``sizes`` gives those that are known."""
    check_type(op, argument, x, Tensor)
    came = x.shape
    for shape in shapes:
        if len(shape) == len(came):
            for symbol, size in zip(shape, came):
                if sizes.get(symbol, size) != size:
                    break
            else:
                return
    raise wrong_shape(op, argument, x, *shapes, **sizes)


def wrong_shape(op: str, argument: str, x: object, *shapes: tuple[str, ...], **sizes: int) -> Exception:
    """The error of `check_shape`, for hot code that compares the shape itself."""
    if not isinstance(x, Tensor):
        return wrong_type(op, argument, x, Tensor)
    wanted = " or ".join("(" + ", ".join(s) + ("," if len(s) == 1 else "") + ")" for s in shapes)
    used = {symbol for shape in shapes for symbol in shape}
    known = ", ".join(f"{symbol}={size}" for symbol, size in sizes.items() if symbol in used)
    return fail(op, argument, f"have shape {wanted}" + (f" with {known}" if known else ""), tuple(x.shape))


def check_dtype(op: str, argument: str, x: Tensor, dtypes: Iterable[torch.dtype] = FLOATS) -> None:
    if x.dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise fail(op, argument, f"have dtype {names}", str(x.dtype).removeprefix("torch."))


def check_device(op: str, argument: str, x: Tensor, device: torch.device, like: str = "q") -> None:
    if x.device != device:
        raise fail(op, argument, f"be on the device of {like}, {device}", x.device)


def check_choice(op: str, argument: str, value: Any, choices: Iterable[Any]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise fail(op, argument, "be one of " + ", ".join(map(repr, choices)), repr(value))


def check_no_tangents(op: str, *inputs: tuple[str, Tensor | None]) -> None:
    if forward_ad._current_level < 0:
        return
    for argument, x in inputs:
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{op}: {argument} must have no forward-mode tangent, got one; use reverse mode")
