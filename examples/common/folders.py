"""ImageNet and Places365 in folders of image files, read by threads ahead of training; what `fit` takes as images."""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrpe.checks import check_choice

from .data import _generator

FOLDERS = ("imagenet", "places365")
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
File = tuple[str, int]  # path, label


@dataclass(frozen=True)
class Folders:
    """A data set of files. Training images are random crops, mirrored half the time; test images are central crops.

    The interface is that of `Images`. A crop has 8 to 100 % of the image's area and is 3/4 to 4/3 as wide as high; it
    is a function of seed, epoch and image alone.
    """

    name: str
    train_images: Sequence[File]
    test_images: Sequence[File]
    size: int  # of the crops' sides
    device: torch.device | str = "cpu"
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(os.cpu_count()))
    ahead: dict[int, Future[Tensor]] = field(default_factory=dict)  # crops by their place in the epoch
    order: list[Tensor] = field(default_factory=list)  # the plan of this epoch

    def to(self, device: torch.device | str) -> "Folders":
        return replace(self, device=device)

    def head(self, train: int, test: int) -> "Folders":
        """The first images of each part."""
        return replace(self, train_images=self.train_images[:train], test_images=self.test_images[:test])

    def normalise(
        self,
        images: Tensor,  # (B, 3, size, size) uint8
    ) -> Tensor:  # (B, 3, size, size) float32
        return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)

    def plan(self, epoch: int, seed: int) -> Tensor:  # (4, N)
        """One epoch: images in order, a seed of each one's crop, whether it is mirrored, and its place in the order."""
        generator, count = _generator(seed, epoch), len(self.train_images)
        order, crops = torch.randperm(count, generator=generator), torch.randint(2**31, (count,), generator=generator)
        plan = torch.stack((order, crops, torch.randint(2, (count,), generator=generator), torch.arange(count)))
        self.order[:] = [plan]
        self.ahead.clear()
        return plan

    @torch.compiler.disable
    def train_batch(
        self,
        plan: Tensor,  # (4, B), columns of `plan`
    ) -> tuple[Tensor, Tensor]:  # (B, 3, size, size), (B,)
        columns = plan.T.tolist()
        crops = [self.ahead.pop(column[3], None) or self._submit(column) for column in columns]
        # Another process of a training has the columns between, and the batch after this one begins where it ended.
        stride = columns[1][3] - columns[0][3] if len(columns) > 1 else 1
        following = range(columns[-1][3] + stride, columns[-1][3] + stride * (len(columns) + 1), stride)
        for column in self.order[0].T[following.start : following.stop : stride].tolist() if self.order else ():
            self.ahead[column[3]] = self._submit(column)
        labels = torch.tensor([self.train_images[column[0]][1] for column in columns])
        images = torch.stack([crop.result() for crop in crops])
        return self.normalise(images.to(self.device, non_blocking=True)), labels.to(self.device)

    def test_batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        files = self.test_images[rank::world]
        starts = range(0, len(files), batch_size)
        parts = [files[start : start + batch_size] for start in starts]
        crops: list[Future[Tensor]] = []
        for part, then in zip(parts, [*parts[1:], []]):
            now = crops or [self.pool.submit(central, path, self.size) for path, _ in part]
            crops = [self.pool.submit(central, path, self.size) for path, _ in then]
            images, labels = torch.stack([crop.result() for crop in now]), torch.tensor([label for _, label in part])
            yield self.normalise(images.to(self.device)), labels.to(self.device)

    def _submit(self, column: list[int]) -> Future[Tensor]:
        path, _ = self.train_images[column[0]]
        return self.pool.submit(random_crop, path, self.size, column[1], bool(column[2]))


def load(name: str, root: str | Path, size: int = 224) -> Folders:
    """``"imagenet"`` or ``"places365"`` from ``root``, which is only read.

    Either has a folder for each class in ``root/train`` and ``root/val``, as torchvision's `ImageFolder` reads them (of
    ImageNet, and of Places365's "easy directory structure"); or Places365 lies as torchvision's `Places365` unpacks it,
    in its small version of 256 x 256 pixels.
    """
    check_choice("folders", "name", name, FOLDERS)
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"folders: torchvision must be installed to read {name}, got none; run 'pip install torchvision'"
        ) from error
    unpacked = name == "places365" and not (Path(root) / "train").is_dir()

    def files(part: str, split: str) -> Sequence[File]:
        try:
            if unpacked:
                found: Sequence[File] = datasets.Places365(root, split=split, small=True).imgs
            else:
                found = datasets.ImageFolder(Path(root) / part).imgs
        except (FileNotFoundError, RuntimeError) as error:
            raise FileNotFoundError(
                f"folders: root must hold {name} in torchvision's layout, got {str(root)!r}"
            ) from error
        return found

    return Folders(name, files("train", "train-standard"), files("val", "val"), size)


def random_crop(path: str, size: int, seed: int, mirrored: bool) -> Tensor:  # (3, size, size)
    """A random part of an image, at ``size``."""
    image, draw = _open(path), np.random.default_rng(seed)
    width, height = image.size
    for _ in range(10):
        area, ratio = width * height * draw.uniform(0.08, 1), math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            break
    else:
        w = h = min(width, height)
    x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
    return _resized(image, size, (x, y, x + w, y + h), mirrored)


def central(path: str, size: int) -> Tensor:  # (3, size, size)
    """The square in the middle of an image, 7/8 as wide as its shorter side, at ``size``."""
    image = _open(path)
    half, (x, y) = 7 / 16 * min(image.size), (n / 2 for n in image.size)
    return _resized(image, size, (x - half, y - half, x + half, y + half), False)


def _open(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def _resized(image: Any, size: int, box: tuple[float, float, float, float], mirrored: bool) -> Tensor:
    from PIL import Image

    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box))
    return torch.from_numpy(np.ascontiguousarray((pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)))
