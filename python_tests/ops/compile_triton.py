"""Compiles the Triton kernels of linear attention and random features for Hopper, on a machine without a GPU.

Prints each kernel that needs more shared memory than a block has, or overwrites rows that a product is reading; the
interpreter, which runs them in the suite, has no such limit and no such product. A process of its own: Triton decides
when it is imported whether it interprets.
"""

import re
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastrpe.ops.features import triton_impl as features
from fastrpe.ops.linear.triton_impl import backward, forward

LARGEST = 227 * 1024
found: dict[str, int] = {}
raced: set[str] = set()


class Hopper:
    """A driver that knows its target and nothing else."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def compile_only(self: Any, grid: Any) -> Any:
    def launch(*args: Any, **options: Any) -> None:
        kernel = self.warmup(*args, grid=(1,), **options)
        name = self.fn.__name__
        found[name] = max(found.get(name, 0), kernel.metadata.shared)
        if overwrites(kernel.asm["ttgir"], kernel.metadata.num_stages):
            raced.add(name)

    return launch


def overwrites(code: str, stages: int) -> bool:
    """Whether a copy may take a slot that a product, not waited for yet, reads: there is one for every stage or not."""
    buffers: dict[str, tuple[str, int]] = {}
    pending: list[tuple[str, ...]] = []
    for line in code.splitlines():
        if index := re.search(r"(%\S+) = ttg.memdesc_index (%\w+)\[.*?memdesc<(\d+)x", line):
            buffers[index[1]] = index[2], int(index[3])
        elif trans := re.search(r"(%\S+) = ttg.memdesc_trans (%\S+) ", line):
            buffers[trans[1]] = buffers.get(trans[2], ("", stages))
        elif dot := re.search(r"ttng.warp_group_dot (%\S+), (%\S+),", line):
            pending.append((dot[1], dot[2]))
        elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
            pending = pending[len(pending) - int(wait[1]) :] if int(wait[1]) else []
        elif copy := re.search(r"async_copy_global_to_local %\S+, (%\S+)", line):
            name, slots = buffers.get(copy[1], ("", stages))
            if slots < stages and any(buffers.get(x, ("",))[0] == name for dot in pending for x in dot):
                return True
    return False


def attention(dtype: torch.dtype, kind: str, causal: bool, M: int, L: int = 128) -> None:
    q, k, v, dout = (torch.zeros(1, 2, L, 64, dtype=dtype) for _ in range(4))
    omega = torch.zeros(M, 64, dtype=dtype) if M else None
    arguments = q, k, v, omega, kind, causal, 0.3, None, 0.0, True, None, None, None, None, None
    _, *last = forward.linear_attention(*arguments, short=L <= 64)
    backward.linear_attention_bwd(dout, None, None, *arguments, *last, M > 0, short=L <= 64)


def main() -> None:
    driver.set_active(Hopper())
    JITFunction.__getitem__ = compile_only
    for dtype, M in ((torch.bfloat16, 128), (torch.float16, 128), (torch.float32, 64)):
        attention(dtype, "positive", False, M)
        attention(dtype, "positive", True, M)
    attention(torch.bfloat16, "relu", True, 0)
    for kind, M in (("positive", 128), ("relu", 128), ("relu", 0)):
        attention(torch.bfloat16, kind, False, M, 64)
    for dtype in (torch.bfloat16, torch.float32):
        x, omega = torch.zeros(1, 2, 64, 64, dtype=dtype), torch.zeros(256, 64)
        y = features.random_features(x, omega, "positive", 0.3, 0.0, None, "row").float()
        features.random_features_bwd(y, y, x, omega, "positive", 0.3, 0.0, None, True)
    for name, shared in found.items():
        if shared > LARGEST:
            print(f"{name} needs {shared} bytes of shared memory, a block has {LARGEST}")
    for name in sorted(raced):
        print(f"{name} overwrites rows that a product reads")
    print(f"{len(found)} kernels compiled")


if __name__ == "__main__":
    main()
