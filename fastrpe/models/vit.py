"""A Vision Transformer whose attention takes any position encoding."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from ..checks import check_choice, check_shape, fail
from ..positions import CayleySTRING, CirculantSTRING, RoPE, grid_positions

POSITIONS = ("none", "learned", "rope", "rope-mixed", "cayley", "circulant")


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`.

    ``position`` is ``"none"``, ``"learned"`` (an embedding added to the patches, interpolated at other image sizes) or
    an encoding of queries and keys by the patch's coordinates, in patches: ``"rope"`` (axial, fixed, shared by all
    layers), ``"rope-mixed"``, ``"cayley"`` and ``"circulant"`` (learned for each layer and head).
    """

    image_size: int = 28
    patch_size: int = 4
    channels: int = 1
    classes: int = 10
    dim: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    position: str = "rope"
    pool: str = "mean"  # or "cls", a class token
    registers: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0  # of the last block; grows linearly from 0

    def __post_init__(self) -> None:
        check_choice("ViTConfig", "position", self.position, POSITIONS)
        check_choice("ViTConfig", "pool", self.pool, ("mean", "cls"))
        if self.dim % self.heads:
            raise fail("ViTConfig", "dim", f"be a multiple of heads={self.heads}", self.dim)
        if self.image_size % self.patch_size:
            raise fail("ViTConfig", "image_size", f"be a multiple of patch_size={self.patch_size}", self.image_size)


class ViT(nn.Module):
    """Pre-norm Vision Transformer: images to class logits.

    Class token and registers stand before the patches and have no position. Images of another size than
    ``config.image_size`` are accepted: coordinates continue beyond the trained grid.
    """

    grid: Tensor

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        side = config.image_size // config.patch_size
        self.prefix = config.registers + (config.pool == "cls")
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)
        if self.prefix:
            self.prefix_tokens = nn.Parameter(0.02 * torch.randn(1, self.prefix, config.dim))
        if config.position == "learned":
            self.position_embedding = nn.Parameter(0.02 * torch.randn(1, config.dim, side, side))
        self.register_buffer("grid", grid_positions(side, side), persistent=False)
        shared = _position(config) if config.position == "rope" else None
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(Block(config, shared or _position(config), rate) for rate in rates)
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)

    def forward(
        self,
        images: Tensor,  # (B, channels, height, width)
    ) -> Tensor:  # (B, classes)
        patch = self.config.patch_size
        check_shape("ViT", "images", images, ("B", "channels", "height", "width"), channels=self.config.channels)
        height, width = images.shape[-2] // patch, images.shape[-1] // patch
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise fail("ViT", "images", f"have sides that are multiples of {patch}", tuple(images.shape[-2:]))
        x = self.patch(images)
        if self.config.position == "learned":
            x = x + self._embedding(height, width)
        x = x.flatten(2).mT
        if self.prefix:
            x = torch.cat((self.prefix_tokens.expand(len(x), -1, -1), x), 1)
        positions = self._positions(height, width)
        for block in self.blocks:
            x = block(x, positions, self.prefix)
        x = x[:, 0] if self.config.pool == "cls" else x[:, self.prefix :].mean(1)
        return self.head(self.norm(x))

    def fold(self) -> "ViT":
        """Absorb every position's basis into the projection weights, for inference; `unfold` undoes it."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.fold()
        return self

    def unfold(self) -> "ViT":
        for module in self.modules():
            if isinstance(module, Attention):
                module.unfold()
        return self

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Optimiser groups: matrices and convolutions decay; norms, biases, embeddings and positions do not."""
        decay: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                matrix = isinstance(module, nn.Linear | nn.Conv2d) and name == "weight"
                (decay if matrix and not hasattr(parameter, "_no_weight_decay") else rest).append(parameter)
        return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]

    def _positions(self, height: int, width: int) -> Tensor:
        side = self.config.image_size // self.config.patch_size
        if (height, width) == (side, side):
            return self.grid
        return grid_positions(height, width, device=self.grid.device, dtype=self.grid.dtype)

    def _embedding(self, height: int, width: int) -> Tensor:  # (1, dim, height, width)
        table = self.position_embedding
        if table.shape[-2:] == (height, width):
            return table
        return F.interpolate(table.float(), (height, width), mode="bicubic", antialias=True).to(table.dtype)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and with a residual."""

    def __init__(self, config: ViTConfig, position: nn.Module | None, drop_path: float) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.heads, dropout=config.dropout, position=position)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,  # (B, prefix + L, dim)
        positions: Tensor,  # (L, 2)
        prefix: int,
    ) -> Tensor:  # (B, prefix + L, dim)
        x = x + self._branch(self.attention(self.norm1(x), positions=positions, prefix=prefix))
        return x + self._branch(self.mlp(self.norm2(x)))

    def _branch(self, y: Tensor) -> Tensor:
        """Dropout, then stochastic depth: the whole branch is dropped for some images."""
        y = self.dropout(y)
        if self.training and self.drop_path:
            keep = y.new_empty(len(y), 1, 1).bernoulli_(1 - self.drop_path)
            y = y * keep / (1 - self.drop_path)
        return y


def _position(config: ViTConfig) -> nn.Module | None:
    """The encoding of one layer; frequencies start as rope-vit's, base 100 on the axes and 10 for mixed directions."""
    size, heads = config.dim // config.heads, config.heads
    if config.position == "rope":
        return RoPE(size, coords=2, base=100.0)
    if config.position == "rope-mixed":
        return RoPE(size, coords=2, base=10.0, mode="mixed", num_heads=heads, learned=True)
    if config.position == "cayley":
        return CayleySTRING(size, heads, coords=2, base=100.0)
    if config.position == "circulant":
        return CirculantSTRING(size, heads, coords=2, init="rope", base=100.0)
    return None
