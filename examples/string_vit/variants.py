"""What the study compares, and the one model and recipe of each data set."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import set_seed

from examples.common.train import Recipe
from fastrpe.models import ViT, ViTConfig
from fastrpe.ops.rotary.string import circulant_params

FRACTIONS = (1 / 64, 0.05, 0.1, 0.25, 0.5, 1.0)
# Learned frequencies start as rope-vit's: in mixed directions, each head's drawn at random, or along the axes.
STARTS: dict[str, dict[str, Any]] = {
    "mixed": {"mode": "mixed", "base": 10.0},
    "axial": {"mode": "axial", "base": 100.0},
}

# name: position and position_options of ViTConfig
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "learned": ("learned", {}),
    "rope": ("rope", {}),
    "rope-mixed": ("rope-mixed", {}),
    "cayley": ("cayley", {}),
    "circulant": ("circulant", {}),
    "circulant-16": ("circulant", {"block": 16}),
    **{f"reflection-s{s}-k{k}": ("reflection", {"block": s, "layers": k}) for s in (4, 8) for k in (1, 2, 4)},
    "reflection-rope": ("reflection-rope", {}),
    **{f"sparse-{f:.3g}": ("sparse-cayley", {"f": f}) for f in FRACTIONS},
}

MODEL = ViTConfig(patch_size=4, dim=192, depth=6, heads=3)
RECIPE = Recipe(batch_size=512, lr=2e-3, weight_decay=0.1)
STUDIES = {
    "mnist": (replace(MODEL, image_size=28, channels=1), replace(RECIPE, epochs=10, eval_every=5)),
    "cifar10": (replace(MODEL, image_size=32, channels=3), replace(RECIPE, epochs=60, eval_every=10)),
    "mnist-small": (ViTConfig(patch_size=7, dim=32, depth=2, heads=2), Recipe(epochs=4, batch_size=50, lr=4e-3)),
}


def configure(config: ViTConfig, variant: str, start: str = "mixed") -> ViTConfig:
    """The model of a data set with the encoding of a variant."""
    position, options = VARIANTS[variant]
    if position not in ("none", "learned", "rope", "circulant"):
        options = {**STARTS[start], **options}
    return replace(config, position=position, position_options=options)


def build(config: ViTConfig, seed: int, start: str = "mixed") -> ViT:
    """The model as it starts: under one seed all variants have the same weights and, where learned, frequencies."""
    set_seed(seed)
    model = ViT(config)
    if config.position == "circulant" and start == "mixed":
        set_seed(seed)
        mixed = ViT(replace(config, position="rope-mixed", position_options={}))
        with torch.no_grad():
            for ours, theirs in zip(model.attentions, mixed.attentions):
                position = ours.position
                position.c.copy_(circulant_params(theirs.position.freqs, position.head_dim, position.block))
    return model
