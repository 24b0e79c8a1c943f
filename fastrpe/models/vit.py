"""A Vision Transformer whose attention takes any position encoding and kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import feature_maps
from .. import positions as encodings
from ..attention import Attention, Performer
from ..checks import check_choice, check_shape, fail

# What encodes queries and keys, with options besides its sizes. Frequencies start as rope-vit's: base 100 on the axes,
# and 10 for mixed directions.
ENCODINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rope": (encodings.RoPE, {"base": 100.0}),
    "rope-mixed": (encodings.RoPE, {"base": 10.0, "mode": "mixed", "learned": True}),
    "cayley": (encodings.CayleySTRING, {"base": 100.0}),
    "circulant": (encodings.CirculantSTRING, {"base": 100.0, "init": "rope"}),
    "reflection": (encodings.ReflectionBasis, {"base": 100.0, "layers": 2, "block": 8}),
    "reflection-rope": (encodings.ReflectionRoPE, {"base": 10.0, "mode": "mixed", "learned": True}),
    "sparse-cayley": (encodings.SparseCayleySTRING, {"base": 100.0, "f": 0.25}),
}
POSITIONS = ("none", "learned", *ENCODINGS)
# Feature maps of Performers, with options besides the head's size.
FEATURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "performer-relu": (feature_maps.ReLUFeatures, {}),
    "performer-exp": (feature_maps.ExpFeatures, {}),
    "performer-favor": (feature_maps.PositiveFeatures, {"projection": "orthogonal"}),
    "performer-ftheta": (feature_maps.LearnableFeatures, {"form": "projection", "base": "exp"}),
}
KERNELS = ("softmax", *FEATURES)


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`.

    Args:
        image_size: pixels of a side in training, a multiple of ``patch_size``.
        patch_size: pixels of a patch's side.
        channels: of an image.
        classes: how many logits there are.
        dim: size of a token, a multiple of ``heads``.
        depth: number of blocks.
        heads: H.
        mlp_ratio: size of a perceptron's hidden layer over ``dim``.
        position: ``"none"``, ``"learned"`` (an embedding added to the patches, interpolated at other image sizes) or an
            encoding of queries and keys by the patch's coordinates, in patches: ``"rope"`` (axial, fixed, shared by all
            layers) or another of `ENCODINGS` (learned for each layer and head).
        position_options: go to the encoding's constructor.
        kernel: ``"softmax"`` or a Performer, which has no weights to drop, with features of `FEATURES`.
        kernel_options: go to the features' constructor, of every layer alike: a seed among them gives all layers one
            projection.
        pool: what the head sees: the ``"mean"`` of the patches, or ``"cls"``, a class token.
        registers: tokens without a position beside the patches.
        dropout: probability to drop a number of a branch, and an attention weight.
        drop_path: probability to drop a branch of the last block; grows linearly from 0 at the first.

    Raises:
        ValueError: an unknown choice, options of what takes none, a size that is no multiple.
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
    position_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    kernel: str = "softmax"
    kernel_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    pool: str = "mean"
    registers: int = 0
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        check_choice("ViTConfig", "position", self.position, POSITIONS)
        check_choice("ViTConfig", "kernel", self.kernel, KERNELS)
        check_choice("ViTConfig", "pool", self.pool, ("mean", "cls"))
        for name, choice, known in (("position", self.position, ENCODINGS), ("kernel", self.kernel, FEATURES)):
            options = getattr(self, f"{name}_options")
            if options and choice not in known:
                raise fail("ViTConfig", f"{name}_options", f"be empty for {name} {choice!r}", options)
        for name in ("image_size", "patch_size", "channels", "classes", "dim", "depth", "heads", "registers"):
            least, size = int(name != "registers"), getattr(self, name)
            if size < least:
                raise fail("ViTConfig", name, f"be at least {least}", size)
        if not 0 <= self.drop_path < 1:  # what is kept is divided by the rest
            raise fail("ViTConfig", "drop_path", "be at least 0 and less than 1", self.drop_path)
        if self.dim % self.heads:
            raise fail("ViTConfig", "dim", f"be a multiple of heads={self.heads}", self.dim)
        if self.image_size % self.patch_size:
            raise fail("ViTConfig", "image_size", f"be a multiple of patch_size={self.patch_size}", self.image_size)


class ViT(nn.Module):
    r"""Pre-norm Vision Transformer: images to class logits.

    .. math:: x \leftarrow x + \mathrm{Attention}(\mathrm{norm}(x), p), \qquad
        x \leftarrow x + \mathrm{MLP}(\mathrm{norm}(x))

    in each block, for tokens x of the patches at p; with a Performer's kernel in time linear in their number. Class
    token and registers stand before the patches and have no position. Images of another size than
    ``config.image_size`` are accepted: coordinates continue beyond the trained grid. One random seed gives one set of
    weights, whatever the position encoding and the kernel: their draws come from streams of their own.

    Args:
        config: its sizes.

    Source:
        ViT (arXiv 2010.11929) eq. 1-4; its positions RoPE-ViT (arXiv 2403.13298), its kernels Performers (arXiv
        2009.14794).
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
        self.register_buffer("grid", encodings.grid_positions(side, side), persistent=False)
        seeds = torch.randint(2**31, (config.depth,), device="cpu").tolist()
        shared = _position(config, seeds[0]) if config.position == "rope" else None
        self.blocks = nn.ModuleList(
            Block(config, shared or _position(config, seed), _kernel(config, seed), i / max(1, config.depth - 1))
            for i, seed in enumerate(seeds)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.classes)
        if config.position == "learned":
            self.position_embedding = nn.Parameter(0.02 * torch.randn(1, config.dim, side, side))

    def forward(
        self,
        images: Tensor,  # (B, channels, height, width)
        positions: Tensor | None = None,  # (L, 2)
    ) -> Tensor:  # (B, classes)
        """Class logits.

        Args:
            images: ``(B, channels, height, width)``, sides multiples of the patch's.
            positions: coordinates of the L patches; by default their column and row.

        Raises:
            TypeError, ValueError: a wrong type or shape.
        """
        patch = self.config.patch_size
        check_shape("ViT", "images", images, ("B", "channels", "height", "width"), channels=self.config.channels)
        height, width = images.shape[-2] // patch, images.shape[-1] // patch
        if images.shape[-2] % patch or images.shape[-1] % patch:
            raise fail("ViT", "images", f"have sides that are multiples of {patch}", tuple(images.shape[-2:]))
        # Windows that do not overlap: the convolution is a product, which gives tokens their layout at once.
        x = images.unflatten(3, (width, patch)).unflatten(2, (height, patch)).permute(0, 2, 4, 1, 3, 5)
        x = F.linear(x.flatten(3), self.patch.weight.flatten(1), self.patch.bias)  # (B, height, width, dim)
        if self.config.position == "learned":
            x = x + self._embedding(height, width).permute(0, 2, 3, 1)
        x = x.flatten(1, 2)
        if self.prefix:
            x = torch.cat((self.prefix_tokens.expand(len(x), -1, -1), x), 1)
        if positions is None:
            known = height == width == self.config.image_size // patch
            positions = self.grid if known else encodings.grid_positions(height, width, device=x.device).to(self.grid)
        bases = encodings.bases([block.attention.position for block in self.blocks])  # type: ignore[union-attr]
        for block, basis in zip(self.blocks, bases):
            x = block(x, positions, self.prefix, basis)
        x = x[:, 0] if self.config.pool == "cls" else x[:, self.prefix :].mean(1)
        return self.head(self.norm(x))

    @property
    def attentions(self) -> list[Attention]:
        """The attention of each block."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def fold(self) -> "ViT":
        """Absorb every position's basis into the projection weights, for inference; `unfold` undoes it."""
        for attention in self.attentions:
            attention.fold()
        return self

    def unfold(self) -> "ViT":
        """Undo `fold`, up to rounding."""
        for attention in self.attentions:
            attention.unfold()
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

    def _embedding(self, height: int, width: int) -> Tensor:  # (1, dim, height, width)
        table = self.position_embedding
        if table.shape[-2:] == (height, width):
            return table
        return F.interpolate(table.float(), (height, width), mode="bicubic", antialias=True).to(table.dtype)


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and with a residual."""

    drop_path: Tensor

    def __init__(self, config: ViTConfig, position: nn.Module | None, kernel: nn.Module | None, height: float) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio)
        self.norm1 = nn.LayerNorm(config.dim)
        dropout = config.dropout if kernel is None else 0.0
        self.attention = Attention(config.dim, config.heads, dropout=dropout, position=position, kernel=kernel)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, hidden), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(hidden, config.dim)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.drops_path = config.drop_path > 0
        # A tensor, so that blocks compiled one by one, of different rates, share their code.
        self.register_buffer("drop_path", torch.tensor(config.drop_path * height), persistent=False)

    def forward(
        self,
        x: Tensor,  # (B, prefix + L, dim)
        positions: Tensor,  # (L, 2)
        prefix: int,
        basis: Tensor | None = None,  # (heads, D, D), of the encoding, where it has been computed
    ) -> Tensor:  # (B, prefix + L, dim)
        x = x + self._branch(self.attention(self.norm1(x), positions=positions, prefix=prefix, basis=basis))
        return x + self._branch(self.mlp(self.norm2(x)))

    def _branch(self, y: Tensor) -> Tensor:
        """Dropout, then stochastic depth: the whole branch is dropped for some images."""
        y = self.dropout(y)
        if self.training and self.drops_path:
            keep = torch.rand(len(y), 1, 1, device=y.device) >= self.drop_path
            y = y * (keep / (1 - self.drop_path)).to(y.dtype)
        return y


def _position(config: ViTConfig, seed: int) -> nn.Module | None:
    """The encoding of one layer."""
    if config.position not in ENCODINGS:
        return None
    kind, defaults = ENCODINGS[config.position]
    options = {**defaults, "generator": torch.Generator().manual_seed(seed), **config.position_options}
    if config.position != "rope":
        options["num_heads"] = config.heads
    if config.position == "sparse-cayley":
        options.setdefault("seed", seed)
    return kind(config.dim // config.heads, coords=2, **options)


def _kernel(config: ViTConfig, seed: int) -> nn.Module | None:
    """The attention kernel of one layer; None for softmax."""
    if config.kernel not in FEATURES:
        return None
    kind, defaults = FEATURES[config.kernel]
    options = {**defaults, "seed": seed, **config.kernel_options}
    with torch.random.fork_rng(devices=[]):  # layers of a learned map draw from PyTorch's generator
        torch.manual_seed(seed)
        return Performer(kind(config.dim // config.heads, **options))
