"""Small models built from fastrpe's parts: a config dataclass and a module each."""

from .vit import ViT, ViTConfig

__all__ = ["ViT", "ViTConfig"]
