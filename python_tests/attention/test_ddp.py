"""Two processes that average gradients equal one with the whole batch."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastrpe.attention import Attention, MultiheadAttention
from fastrpe.positions import CayleySTRING, RoPE
from fastrpe.testing.asserts import LAW_FLOAT64, assert_within

PROCESSES = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        rope = RoPE(4, num_heads=1, learned=True)
        self.first = Attention(8, 2, num_kv_heads=1, causal=True, position=rope)
        self.second = MultiheadAttention(8, 2, batch_first=True, position=CayleySTRING(4, 2, init_std=0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x, x, x, need_weights=False)[0]


def batch() -> Tensor:
    return torch.randn(4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model = DistributedDataParallel(Model().double())
    model(batch().chunk(PROCESSES)[rank]).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in model.parameters()], f"{folder}/gradients.pt")
    dist.destroy_process_group()


def test_ddp(tmp_path: Path) -> None:
    mp.spawn(train, (str(tmp_path),), PROCESSES)
    model = Model().double()
    model(batch()).square().mean().backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        assert_within(g, p.grad, LAW_FLOAT64, name=name)
