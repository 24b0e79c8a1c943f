import gzip
import pickle
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples.common import data
from examples.common.data import SHIPPED, Augment, Images, load
from examples.vit import make_subset


def numbers(*shape):
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


def write_mnist(root, train=30, test=20, labels=None):
    """The four files of torchvision's layout."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        digits = np.arange(count) % 10 if labels is None else labels
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + numbers(count, 28, 28).tobytes())
        header = struct.pack(">II", 2049, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + digits.astype(np.uint8).tobytes())


def test_the_shipped_subset_is_balanced():
    images = load("mnist-small")
    assert images.train_images.shape == (4000, 1, 28, 28) and images.test_images.shape == (1000, 1, 28, 28)
    assert images.train_images.dtype == images.test_images.dtype == torch.uint8
    assert images.train_labels.bincount().tolist() == [400] * 10
    assert images.test_labels.bincount().tolist() == [100] * 10
    pixels = images.train_images.float() / 255
    assert abs(pixels.mean() - images.mean) < 0.01 * images.mean and abs(pixels.std() - images.std) < 0.01 * images.std


def test_the_shipped_subset_is_small_and_has_no_image_twice():
    assert SHIPPED.stat().st_size < 1_500_000
    images = load("mnist-small")
    both = torch.cat((images.train_images, images.test_images)).flatten(1)
    assert len(both.unique(dim=0)) == 5000


def test_make_subset_draws_balanced_and_repeats_itself(tmp_path, capsys):
    write_mnist(tmp_path, train=4100, test=1050)
    first, second = (tmp_path / name for name in ("a.npz", "b.npz"))
    for out in (first, second):
        make_subset.main(["--data-root", str(tmp_path), "--out", str(out)])
    assert first.read_bytes() == second.read_bytes() and "bytes" in capsys.readouterr().out
    with np.load(first) as file:
        assert np.bincount(file["train_labels"]).tolist() == [400] * 10
        assert file["test_images"].shape == (1000, 1, 28, 28)


def test_mnist_in_torchvision_layout(tmp_path):
    pytest.importorskip("torchvision")
    write_mnist(tmp_path)
    images = load("mnist", tmp_path)
    assert torch.equal(images.train_images, torch.from_numpy(numbers(30, 1, 28, 28)))
    assert images.test_labels.tolist() == [*range(10), *range(10)]


def test_cifar10_binary_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    pixels, labels = numbers(60, 3072), np.arange(60, dtype=np.uint8) % 10
    records = np.concatenate((labels[:, None], pixels), 1).reshape(6, 10, 3073)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, records):
        part.tofile(folder / name)
    images = load("cifar10", tmp_path)
    assert torch.equal(images.train_images.flatten(1), torch.from_numpy(pixels[:50]))
    assert torch.equal(images.test_images.flatten(1), torch.from_numpy(pixels[50:]))
    assert images.train_images.shape == (50, 3, 32, 32) and images.test_labels.tolist() == [*range(10)]
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin"):
        load("cifar10", tmp_path)


def test_cifar10_in_torchvision_layout(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = numbers(60, 3072).reshape(6, 10, 3072)
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], pixels):
        (folder / name).write_bytes(pickle.dumps({"data": part, "labels": [*range(10)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [*"abcdefghij"]}))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *_: True)  # these are not the real files
    images = load("cifar10", tmp_path)
    assert torch.equal(images.train_images.flatten(1), torch.from_numpy(pixels[:5].reshape(50, 3072)))
    assert torch.equal(images.test_images.flatten(1), torch.from_numpy(pixels[5]))


@pytest.mark.parametrize("name, kind", [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_without_a_root_torchvision_downloads(name, kind, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets
    calls = []

    class Downloaded:
        def __init__(self, root, train, download):
            calls.append((root, train, download))
            self.data = torch.zeros(4, 28, 28, dtype=torch.uint8) if name == "mnist" else numbers(4, 32, 32, 3)
            self.targets = [0, 1, 2, 3]

    monkeypatch.setattr(datasets, kind, Downloaded)
    images = load(name)
    assert calls == [("data", True, True), ("data", False, True)]
    assert images.train_images.shape[1:] == ((1, 28, 28) if name == "mnist" else (3, 32, 32))


def test_gzip_files_are_unpacked_by_torchvision_only_on_download(tmp_path):
    pytest.importorskip("torchvision")
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    raw.with_suffix(".gz").write_bytes(gzip.compress(raw.read_bytes()))
    raw.unlink()
    with pytest.raises(FileNotFoundError, match="data: root must hold mnist in torchvision's layout, got "):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_an_empty_root_is_said(name, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=f"data: root must hold {name}"):
        load(name, tmp_path)


def test_missing_torchvision_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="data: torchvision must be installed to read mnist.*pip install torchvision"):
        load("mnist", tmp_path)
    load("mnist-small")


def test_an_unknown_data_set_is_said():
    with pytest.raises(ValueError, match="data: name must be one of 'mnist', 'cifar10', 'mnist-small', got 'svhn'"):
        load("svhn")


def test_augmentation_shifts_and_mirrors_whole_images(device):
    image = torch.arange(1, 26, dtype=torch.uint8, device=device).view(1, 1, 5, 5).repeat(2, 2, 1, 1)
    image[0] += 100
    augment = Augment(1, flip=True)
    moves = augment.draw(400, torch.Generator().manual_seed(0)).to(device)
    moved = augment(image, torch.ones(400, dtype=torch.int64, device=device), moves)
    padded = torch.nn.functional.pad(image[1:, :1], (1,) * 4)
    crops = [padded[0, 0, y : y + 5, x : x + 5] for y in range(3) for x in range(3)]
    wanted = {tuple(c.flatten().tolist()) for crop in crops for c in (crop, crop.flip(-1))}
    assert {tuple(x.flatten().tolist()) for x in moved[:, 0]} == wanted
    assert torch.equal(moved[:, 0], moved[:, 1])


def test_no_augmentation_changes_nothing():
    images, index = torch.from_numpy(numbers(3, 3, 8, 8)), torch.tensor([2, 0, 2, 1])
    assert torch.equal(Augment()(images, index, Augment().draw(4, torch.Generator())), images[index])


def tiny(count=50):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    one = torch.ones(1, 1, 1)
    return Images("tiny", images, torch.arange(count), images, torch.arange(count), 0 * one, one / 255, Augment())


def test_a_plan_depends_on_seed_and_epoch_alone():
    images = replace(tiny(), augment=Augment(2, flip=True))
    plan = images.plan(epoch=3, seed=1)
    torch.manual_seed(5)
    assert torch.equal(images.plan(epoch=3, seed=1), plan)
    assert not torch.equal(images.plan(epoch=4, seed=1), plan) and not torch.equal(images.plan(epoch=3, seed=2), plan)
    assert sorted(plan[0].tolist()) == [*range(50)]
    assert [sorted(set(row.tolist())) for row in plan[1:]] == [[*range(5)], [*range(5)], [0, 1]]


def test_a_batch_is_a_part_of_the_plan():
    images = tiny()
    plan = images.plan(0, 0)
    x, y = images.train_batch(plan[:, 8:16])
    assert torch.equal(y, plan[0, 8:16]) and torch.equal(x[:, 0, 0, 0].round().long(), y)


def test_processes_share_out_the_test_images():
    seen = [y for rank in range(3) for _, part in tiny().test_batches(7, rank, 3) for y in part.tolist()]
    assert sorted(seen) == [*range(50)]


def test_normalise_and_head():
    x, y = next(tiny().head(10, 5).test_batches(100))
    assert x.dtype == torch.float32 and torch.equal(x[:, 0, 0, 0].round().long(), y) and len(y) == 5


def test_generators_differ_by_every_part_of_their_key():
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 1)]
    assert len({data._generator(*key).initial_seed() for key in keys}) == len(keys)
