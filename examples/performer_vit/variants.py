"""What the study compares, and the one model and recipe of each of its parts."""

from dataclasses import replace
from typing import Any

from accelerate.utils import set_seed

from examples.common.folders import FOLDERS
from examples.common.train import Recipe
from fastrpe.models import ViT, ViTConfig

# name: kernel and kernel_options of ViTConfig; f_theta has a projection for each head, which it learns
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "relu": ("performer-relu", {}),
    "exp": ("performer-exp", {}),
    "favor": ("performer-favor", {"num_features": 128}),
    "ftheta": ("performer-ftheta", {"num_features": 128}),
    "ftheta-relu": ("performer-ftheta", {"num_features": 128, "base": "relu"}),
    "ftheta-square": ("performer-ftheta", {}),
    "ftheta-polynomial": ("performer-ftheta", {"form": "polynomial", "base": "relu"}),
    "ftheta-mlp": ("performer-ftheta", {"form": "mlp", "base": "relu"}),
}
FTHETA = [name for name in VARIANTS if name.startswith("ftheta")]
MAIN = list(VARIANTS)
FEW = ["softmax", "relu", "exp", "favor", "ftheta"]

MODEL = ViTConfig(patch_size=4, dim=192, depth=6, heads=3, position="rope-mixed")
RECIPE = Recipe(batch_size=512, lr=2e-3, weight_decay=0.1)
SHORT = replace(RECIPE, epochs=5, eval_every=5, batch_size=256, lr=1e-3)
LARGE = ViTConfig(224, 16, 3, 1000, dim=384, depth=12, heads=6, position="rope-mixed", drop_path=0.1)

# name: data set, model, recipe
STUDIES: dict[str, tuple[str, ViTConfig, Recipe]] = {
    "mnist": ("mnist", replace(MODEL, image_size=28), replace(RECIPE, epochs=10, eval_every=5)),
    "cifar10": ("cifar10", replace(MODEL, image_size=32, channels=3), replace(RECIPE, epochs=60, eval_every=10)),
    **{
        f"length-{(32 // patch) ** 2}": (
            "cifar10", replace(MODEL, image_size=32, channels=3, patch_size=patch), SHORT,
        )
        for patch in (8, 4, 2, 1)
    },
    "mnist-small": (
        "mnist-small",
        ViTConfig(patch_size=7, dim=32, depth=2, heads=2, position="rope-mixed"),
        Recipe(epochs=4, batch_size=50, lr=4e-3),
    ),
    "imagenet": ("imagenet", LARGE, Recipe(epochs=90, batch_size=1024, lr=1e-3, weight_decay=0.1, eval_every=10)),
    "places365": (
        "places365",
        replace(LARGE, classes=365),
        Recipe(epochs=30, batch_size=1024, lr=1e-3, weight_decay=0.1, eval_every=10),
    ),
}  # fmt: skip
OF_LENGTH = [name for name in STUDIES if name.startswith("length-")]
SETS = dict.fromkeys((*OF_LENGTH, "mnist-small"), FEW)  # what is compared, where not all
OF_FOLDERS = [name for name in STUDIES if name in FOLDERS]


def seeds_of(study: str) -> list[int]:
    """Three, or one where an epoch has over 16 times the work of 64 tokens'."""
    return [0] if study == "length-1024" else [0, 1, 2]


def tokens(study: str) -> int:
    config = STUDIES[study][1]
    return (config.image_size // config.patch_size) ** 2


def configure(config: ViTConfig, variant: str) -> ViTConfig:
    """The model of a part with the kernel of a variant."""
    kernel, options = VARIANTS[variant]
    if kernel == "performer-ftheta":
        options = {"num_heads": config.heads, **options}
    if variant == "ftheta":  # rows of W are as long as those of FAVOR+ at first: of its scale, too
        options["scale"] = (config.dim // config.heads) ** -0.25
    return replace(config, kernel=kernel, kernel_options=options)


def build(config: ViTConfig, seed: int) -> ViT:
    """The model as it starts: under one seed all variants have the same weights, beside those of their features."""
    set_seed(seed)
    return ViT(config)
