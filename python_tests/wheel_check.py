"""Run in an environment that holds an installed fastrpe: ``python wheel_check.py TORCH_VERSION``."""

import sys
from pathlib import Path

import torch

import fastrpe
from fastrpe import info
from fastrpe.backend import problem
from fastrpe.ops import rotate
from fastrpe.positions import RoPE
from fastrpe.testing.asserts import assert_accurate

assert torch.__version__.partition("+")[0] == sys.argv[1], torch.__version__
assert Path(fastrpe.__file__).is_relative_to(sys.prefix), fastrpe.__file__
print(info.report())
assert not problem("native", "cpu")

draw = torch.Generator().manual_seed(0)
q, k = (torch.randn(2, heads, 33, 64, generator=draw) for heads in (4, 2))
positions, freqs = torch.arange(33.0)[:, None], torch.rand(1, 32, generator=draw)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = (q.to(dtype), k.to(dtype), positions, freqs)
    native, same = rotate(*x, backend="native"), rotate(*x, backend="reference")
    exact = rotate(*(t.double() for t in x), backend="reference")
    for actual, s, e in zip(native, same, exact):
        assert_accurate(actual, s, e)

# A gradient for every floating input, through the module that picks the backend itself.
rope = RoPE(64, num_heads=2, learned=True)
y, _ = rope(q.requires_grad_(), k.requires_grad_())
y.square().sum().backward()
assert q.grad is not None
assert all(p.grad is not None for p in rope.parameters())
print("ok")
