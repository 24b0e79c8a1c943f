import hashlib
import sys

import pytest
import torch

from examples.common import folders
from examples.common.folders import Folders, load

Image = pytest.importorskip("PIL.Image")


def write(path, size, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


COLOURS = {"cat": (200, 0, 0), "dog": (0, 0, 200)}


@pytest.fixture
def root(tmp_path):
    """Three images of each class to train on, one to test on, of different sizes."""
    for label, colour in COLOURS.items():
        for i, size in enumerate([(40, 30), (30, 50), (24, 24)]):
            write(tmp_path / "train" / label / f"{i}.png", size, colour)
        write(tmp_path / "val" / label / "0.png", (60, 40), colour)
    return tmp_path


@pytest.mark.parametrize("name", folders.FOLDERS)
def test_a_folder_for_each_class(name, root):
    pytest.importorskip("torchvision")
    images = load(name, root, size=16)
    assert [label for _, label in images.train_images] == [0, 0, 0, 1, 1, 1] and len(images.test_images) == 2
    plan = images.plan(0, 0)
    x, y = images.train_batch(plan[:, :4])
    assert x.shape == (4, 3, 16, 16) and x.dtype == torch.float32
    assert y.tolist() == [images.train_images[i][1] for i in plan[0, :4].tolist()]
    red, blue = (images.normalise(torch.tensor(c, dtype=torch.uint8).view(1, 3, 1, 1)) for c in COLOURS.values())
    for image, label in zip(x, y):  # each crop is of the image's one colour
        assert torch.equal(image[None], (blue if label else red).expand(1, 3, 16, 16))
    ((x, y),) = images.test_batches(10)
    assert y.tolist() == [0, 1] and torch.equal(x[:1], red.expand(1, 3, 16, 16))


def test_places365_as_torchvision_unpacks_it(tmp_path, monkeypatch):
    places = pytest.importorskip("torchvision").datasets.Places365

    def text(name, lines):
        (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        return name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()

    monkeypatch.setattr(places, "_CATEGORIES_META", text("categories_places365.txt", ["/a/abbey 0", "/b/bar 1"]))
    lists = {
        "train-standard": text("places365_train_standard.txt", ["/a/abbey/0.jpg 0", "/b/bar/0.jpg 1"]),
        "val": text("places365_val.txt", ["0.jpg 1"]),
    }
    monkeypatch.setattr(places, "_FILE_LIST_META", lists)
    for path in ("data_256_standard/a/abbey/0.jpg", "data_256_standard/b/bar/0.jpg", "val_256/0.jpg"):
        write(tmp_path / path, (32, 32), COLOURS["cat"])
    images = load("places365", tmp_path, size=8)
    assert [label for _, label in images.train_images] == [0, 1] and [y for _, y in images.test_images] == [1]
    assert images.train_batch(images.plan(0, 0))[0].shape == (2, 3, 8, 8)
    ((x, y),) = images.test_batches(4)
    assert x.shape == (1, 3, 8, 8) and y.tolist() == [1]


def ramps(folder, count=12, size=(48, 32)):
    """Images whose pixels tell where they are."""
    folder.mkdir()
    files = []
    for i in range(count):
        image = Image.new("RGB", size)
        image.putdata([(4 * x, 4 * y, 20 * i) for y in range(size[1]) for x in range(size[0])])
        image.save(folder / f"{i}.png")
        files.append((str(folder / f"{i}.png"), i))
    return files


def test_crops_are_a_function_of_seed_epoch_and_image(tmp_path):
    files = ramps(tmp_path / "ramps")
    first, again = (Folders("ramps", files, files, 16) for _ in range(2))
    plan = first.plan(1, 5)
    assert torch.equal(again.plan(1, 5), plan) and sorted(plan[0].tolist()) == [*range(12)]
    assert not torch.equal(first.plan(2, 5), plan) and not torch.equal(first.plan(1, 6), plan)
    first.plan(1, 5)
    whole = torch.cat([first.train_batch(part)[0] for part in plan.split(4, 1)])  # ahead, from the second on
    alone = torch.cat([again.train_batch(plan[:, i::3])[0] for i in range(3)])  # as three processes would
    assert torch.equal(torch.cat([whole[i::3] for i in range(3)]), alone)
    assert not first.ahead
    x, y = first.train_batch(plan)
    blue = x[:, 2].mean((1, 2)) * folders.STD[2] + folders.MEAN[2]
    torch.testing.assert_close(255 * blue.flatten(), 20.0 * y)
    across, down = x[:, 0].diff(dim=-1).mean((1, 2)), x[:, 1].diff(dim=-2).mean((1, 2))
    assert torch.equal(across < 0, plan[2] == 1) and (down > 0).all()  # mirrored or not, never upside down
    assert len({round(float(z), 4) for z in down}) > 6  # crops of many sizes


def test_test_images_are_their_middle(tmp_path):
    files = ramps(tmp_path / "ramps", count=5)
    images = Folders("ramps", files, files, 28)  # 7/8 of 32: pixels as they are
    parts = list(images.test_batches(2))
    assert [y.tolist() for _, y in parts] == [[0, 1], [2, 3], [4]]
    x = (parts[1][0] * folders.STD + folders.MEAN) * 255
    torch.testing.assert_close(x[0, 0, 0], 4.0 * torch.arange(10, 38))
    torch.testing.assert_close(x[1, 1, :, 3], 4.0 * torch.arange(2, 30))
    shared = [y for rank in range(2) for _, part in images.test_batches(2, rank, 2) for y in part.tolist()]
    assert sorted(shared) == [*range(5)]


def test_a_narrow_image_and_one_without_colours(tmp_path):
    Image.new("L", (400, 3), 7).save(tmp_path / "narrow.png")
    for crop in (
        folders.random_crop(str(tmp_path / "narrow.png"), 8, 0, True),
        folders.central(str(tmp_path / "narrow.png"), 8),
    ):
        assert crop.shape == (3, 8, 8) and (crop == 7).all()


def test_to_and_head():
    files = [("a", 0), ("b", 1), ("c", 0)]
    images = Folders("x", files, files, 8).head(2, 1).to("cpu")
    assert images.train_images == files[:2] and images.test_images == files[:1] and images.device == "cpu"


@pytest.mark.parametrize("name", folders.FOLDERS)
def test_an_empty_root_is_said(name, tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=f"folders: root must hold {name} in torchvision's layout, got "):
        load(name, tmp_path)


def test_missing_torchvision_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="folders: torchvision must be installed to read imagenet.*pip install"):
        load("imagenet", tmp_path)


def test_an_unknown_data_set_is_said(tmp_path):
    with pytest.raises(ValueError, match="folders: name must be one of 'imagenet', 'places365', got 'svhn'"):
        load("svhn", tmp_path)
