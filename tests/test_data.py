"""data.py: what is read, in which order, with which labels; the cache; and files that are whole or not there."""
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_category, shared
from PIL import Image

import data

FINE = [facts["classes"] for facts in data.PROTOCOLS["cifar100"].values()]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def cached_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"], "vitad").glob("*"))


# ---------------------------------------------------------------------------------------------------- MVTec layout, folder

def test_train_split_is_train_good_sorted_by_name(tmp_path):
    make_category(tmp_path / "bottle", train=12)
    (tmp_path / "bottle" / "train" / "good" / "notes.txt").write_text("not an image")
    split = data.train_split("mvtec", tmp_path, "bottle")
    assert split.images.shape == (12, 3, 224, 224) and split.images.dtype == torch.uint8
    assert split.names == [f"train/good/{i:03d}.png" for i in range(12)] and split.labels == [0] * 12


def test_test_split_labels_by_folder_name(tmp_path):
    make_category(tmp_path / "bottle", good=2, bad=3)
    split = data.test_split("mvtec", tmp_path, "bottle", 64)
    assert split.names == ["test/good/000.png", "test/good/001.png", "test/stain/000.png", "test/stain/001.png", "test/stain/002.png"]
    assert split.labels == [0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "bottle" / "test" / "stain" / "001.png"))
    assert np.array_equal(split.images[3].permute(1, 2, 0).numpy(), pixels)  # already 64 x 64: nothing is resampled


def test_folder_is_the_same_without_a_category(tmp_path):
    make_category(tmp_path / "parts")
    test = data.test_split("folder", tmp_path / "parts", "parts")
    assert test.names[0] == "test/good/000.png" and test.labels == [0] * 4 + [1] * 5
    assert len(data.train_split("folder", tmp_path / "parts", "parts").images) == 6


def test_counts_other_than_the_official_ones_are_said_in_one_line(tmp_path, capsys):
    make_category(tmp_path / "bottle", train=3)
    data.train_split("mvtec", tmp_path, "bottle")
    assert capsys.readouterr().err == "note: bottle is not the official one: train/good 3 (official 209) images\n"
    counts = [facts["images"] for facts in data.PROTOCOLS["mvtec"].values()]
    assert np.sum(counts, axis=0).tolist() == [3629, 467, 1258]  # as the data set's paper counts them


@pytest.mark.parametrize("category, train, good, bad", [("bottle", 209, 20, 63), ("pill", 267, 26, 141)])
def test_real_counts(category, train, good, bad, capsys):
    root = shared("data/mvtec")
    assert len(data.train_split("mvtec", root, category, 32).images) == train
    labels = data.test_split("mvtec", root, category, 32).labels
    assert (labels.count(0), labels.count(1)) == (good, bad)
    assert not capsys.readouterr().err


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="bottle: expected train/good.*CC BY-NC-SA 4.0"):
        data.train_split("mvtec", tmp_path, "bottle")
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="good: expected images"):
        data.train_split("mvtec", tmp_path, "bottle")
    with pytest.raises(ValueError, match="test: expected folders of test images"):
        data.test_split("mvtec", tmp_path, "bottle")


def test_masks_are_found_by_name_and_checked(tmp_path):
    folder = make_category(tmp_path / "bottle", good=1, bad=3, size=64)
    (folder / "ground_truth" / "stain").mkdir(parents=True)
    for i in (2, 0, 1):
        Image.new("L", (64, 64)).save(folder / "ground_truth" / "stain" / f"{i:03d}_mask.png")
    data.test_split("mvtec", tmp_path, "bottle")
    mask = folder / "ground_truth" / "stain" / "001_mask.png"
    Image.new("L", (32, 64)).save(mask)
    with pytest.raises(ValueError, match=r"001_mask.png: expected the mask of stain/001.png, \(64, 64\), got \(32, 64\)"):
        data.test_split("mvtec", tmp_path, "bottle")
    mask.unlink()
    with pytest.raises(ValueError, match="001_mask.png: expected the mask of stain/001.png.*got none that opens"):
        data.test_split("mvtec", tmp_path, "bottle")


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named_and_can_be_skipped_in_scoring(tmp_path, content):
    make_category(tmp_path / "bottle")
    for kind in ("train/good", "test/good"):
        path = tmp_path / "bottle" / kind / "003.png"
        path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(ValueError, match="train/good/003.png: expected an image"):
        data.train_split("mvtec", tmp_path, "bottle")
    with pytest.raises(ValueError, match="test/good/003.png: expected an image"):
        data.test_split("mvtec", tmp_path, "bottle")
    assert not cached_files()  # nothing half-made
    split = data.test_split("mvtec", tmp_path, "bottle", skip_bad=True)
    assert len(split.images) == len(split.labels) == len(split.names) == 8 and "test/good/003.png" not in split.names
    assert len(split.skipped) == 1 and "test/good/003.png" in split.skipped[0]


# ------------------------------------------------------------------------------------------------------------- decoding

def test_resize_is_direct_bicubic_and_antialiased(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours = data.read_image(tmp_path / "image.png", 100)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (100, 100), mode="bicubic", antialias=True)
    assert np.abs(ours - theirs[0].permute(1, 2, 0).numpy().clip(0, 255)).max() < 1.5  # uint8 steps


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)


def test_grey_images_get_three_equal_channels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8)
    assert image.shape == (8, 8, 3) and (image == RAMP[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, suffix):
    Image.fromarray(RAMP.astype(np.uint16) * 1000).save(tmp_path / f"image.{suffix}")
    assert (data.read_image(tmp_path / f"image.{suffix}", 8) == (RAMP.astype(int) * 1000 >> 8)[..., None]).all()


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255  # the left half is transparent black, the right half opaque black
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8)
    assert (image[:, :4] == 255).all() and (image[:, 4:] == 0).all()


def test_palette(tmp_path):
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[:4] = (200, 10, 30)
    Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "image.png")
    assert (data.read_image(tmp_path / "image.png", 8) == colours).all()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees to show
    Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2)).save(tmp_path / "image.png", exif=exif)
    assert (data.read_image(tmp_path / "image.png", 8)[..., 0] == np.rot90(RAMP, -1)).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG"])
def test_every_format_is_found_and_read(tmp_path, suffix):
    (tmp_path / "train" / "good").mkdir(parents=True)
    Image.new("RGB", (40, 30), (10, 200, 90)).save(tmp_path / "train" / "good" / f"a{suffix}")
    split = data.train_split("folder", tmp_path, "own", 32)
    assert split.images.shape == (1, 3, 32, 32)
    assert (split.images[0].float().mean(dim=(1, 2)) - torch.tensor([10.0, 200.0, 90.0])).abs().max() < 4


# ---------------------------------------------------------------------------------------------------------------- cache

def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    make_category(tmp_path / "bottle")
    first = data.train_split("mvtec", tmp_path, "bottle")
    monkeypatch.setattr(data, "read_image", None)  # decoding again would fail
    second = data.train_split("mvtec", tmp_path, "bottle")
    assert torch.equal(first.images, second.images) and first.names == second.names and len(cached_files()) == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    make_category(tmp_path / "bottle")
    images = data.train_split("mvtec", tmp_path, "bottle").images.clone()
    [cache] = cached_files()
    content = cache.read_bytes()
    cache.unlink()
    if damage != "gone":
        cache.write_bytes({"cut": content[:-1], "empty": b"", "garbage": b"x" * 1000}[damage])
    assert torch.equal(data.train_split("mvtec", tmp_path, "bottle").images, images)
    assert cache.read_bytes() == content


def test_a_changed_image_is_decoded_again(tmp_path):
    make_category(tmp_path / "bottle")
    data.train_split("mvtec", tmp_path, "bottle")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "bottle" / "train" / "good" / "002.png")
    assert (data.train_split("mvtec", tmp_path, "bottle").images[2, :, 5, 5] == torch.tensor([1, 2, 3])).all()


def test_without_room_for_a_cache_the_images_stay_in_memory(tmp_path, monkeypatch, capsys):
    make_category(tmp_path / "folder")
    expected = data.train_split("folder", tmp_path / "folder", "own").images
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made below a file
    assert torch.equal(data.train_split("folder", tmp_path / "folder", "own").images, expected)
    assert "note: no cache at" in capsys.readouterr().err


def test_writing_into_a_batch_does_not_change_the_cache(tmp_path):
    make_category(tmp_path / "bottle")
    images = data.train_split("mvtec", tmp_path, "bottle").images
    before = images.clone()
    images.zero_()
    assert torch.equal(data.train_split("mvtec", tmp_path, "bottle").images, before)


# ------------------------------------------------------------------------------------- CIFAR-10, CIFAR-100, Fashion-MNIST

@pytest.fixture
def small_counts(monkeypatch):
    monkeypatch.setattr(data, "SMALL", {"cifar10": (3, 2, "CIFAR10"), "cifar100": (3, 2, "CIFAR100"), "fashion_mnist": (3, 2, "FashionMNIST")})


def make_classes(root, dataset, classes):
    """<root>/<dataset>/{train,test}/<class>/*.png, 3 and 2 images each, every image of one value: 10 x its class + its number."""
    for part, count in (("train", 3), ("test", 2)):
        for c, name in enumerate(classes):
            folder = root / dataset / part / data.slug(name)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (2 * c + i,) * 3).save(folder / f"{i:05d}.png")


def test_cifar10_from_folders(tmp_path, small_counts):
    classes = list(data.PAPER_AUROC["cifar10"])
    make_classes(tmp_path, "cifar10", classes)
    train, test = (split("cifar10", tmp_path, "cat") for split in (data.train_split, data.test_split))
    assert train.images.shape == (3, 3, 32, 32) and train.images[:, 0, 0, 0].tolist() == [6, 7, 8]  # cat is class 3; small stays small
    assert test.images.shape == (20, 3, 32, 32) and test.labels == [int(name.split("/")[1] != "cat") for name in test.names]
    assert test.labels.count(0) == 2 and test.names[6] == "test/cat/00000.png"


def test_cifar100_from_folders_takes_a_superclass(tmp_path, small_counts):
    make_classes(tmp_path, "cifar100", sorted(sum(FINE, [])))
    train, test = (split("cifar100", tmp_path, "trees") for split in (data.train_split, data.test_split))
    assert len(train.images) == 15 and {name.split("/")[1] for name in train.names} == set("maple_tree oak_tree palm_tree pine_tree willow_tree".split())
    assert len(test.images) == 200 and test.labels.count(0) == 10


def test_other_counts_are_refused(tmp_path, small_counts):
    make_classes(tmp_path, "fashion_mnist", list(data.PAPER_AUROC["fashion_mnist"]))
    assert len(data.train_split("fashion_mnist", tmp_path, "T-shirt/top").images) == 3
    (tmp_path / "fashion_mnist" / "train" / "T-shirt_top" / "00001.png").unlink()
    with pytest.raises(ValueError, match="expected 3 train images of class T-shirt/top, the official number, got 2"):
        data.train_split("fashion_mnist", tmp_path, "T-shirt/top")


class Official:
    """Stands for a data set class of torchvision."""

    def __init__(self, root, train, download):
        assert download
        n = 3 if train else 2
        self.targets = [c for c in (3, 1, 0, 2, 4, 5, 6, 7, 8, 9) for _ in range(n)]
        self.data = self.values(np.arange(len(self.targets), dtype=np.uint8))


class OfficialCifar(Official):
    def values(self, i):
        return np.broadcast_to(i[:, None, None, None], (len(i), 32, 32, 3)) + np.array([0, 50, 100], dtype=np.uint8)


class OfficialFashion(Official):
    def values(self, i):
        return torch.from_numpy(i)[:, None, None].expand(-1, 28, 28)


def test_official_files_of_cifar10(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", OfficialCifar)
    train, test = (split("cifar10", tmp_path, "airplane") for split in (data.train_split, data.test_split))  # class 0, third in the file
    assert train.images[:, :, 9, 9].tolist() == [[6, 56, 106], [7, 57, 107], [8, 58, 108]]
    assert train.names == [f"train/airplane/{i:05d}" for i in (6, 7, 8)]
    assert len(test.images) == 20 and [i for i, label in enumerate(test.labels) if label == 0] == [4, 5]


def test_official_files_of_fashion_mnist_become_three_channels(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", OfficialFashion)
    train = data.train_split("fashion_mnist", tmp_path, "Dress")
    assert train.images.shape == (3, 3, 28, 28) and train.images[0].unique().tolist() == [0]


def test_a_pickle_whose_md5_is_wrong_is_not_opened(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"):
        (folder / name).write_bytes(b"cos\nmkdir\n(S'executed'\ntR.")  # a pickle that would make a folder

    def no_network(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="expected the official files of CIFAR10 or folders cifar10/train/<class>.*no network"):
        data.train_split("cifar10", tmp_path, "cat")
    assert not (tmp_path / "executed").exists()


def test_cifar100_superclasses():
    fine = sorted(sum(FINE, []))
    coarse = [next(i for i, five in enumerate(FINE) if name in five) for name in fine]
    assert coarse[:10] == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]  # the start of the official list
    assert len(set(fine)) == 100 and Counter(coarse) == {i: 5 for i in range(20)}
    assert len(data.PAPER_AUROC["cifar100"]) == 20


@pytest.mark.parametrize("dataset, mean", [("cifar10", 96.3), ("cifar100", 88.9), ("fashion_mnist", 94.8), ("mvtec", 90.4)])
def test_the_papers_means(dataset, mean):
    assert abs(np.mean(list(data.PAPER_AUROC[dataset].values())) - mean) < 0.06


@pytest.mark.parametrize("dataset, text, name", [
    ("cifar10", "cat", "cat"), ("cifar10", "3", "cat"), ("fashion_mnist", "ankle boot", "Ankle boot"), ("fashion_mnist", "T-shirt_top", "T-shirt/top"),
    ("cifar100", "17", "trees"), ("cifar100", "Vehicles_2", "vehicles 2"), ("mvtec", "metal_nut", "metal_nut"),
])
def test_category_names(dataset, text, name):
    assert data.find_category(dataset, text) == name


@pytest.mark.parametrize("dataset, text, words", [("mvtec", "metalnut", "did you mean metal_nut"), ("cifar100", "20", "or 0 to 19"),
                                                  ("cifar10", "kat", "did you mean cat"), ("cifar10", "qqqq", "choose from airplane")])
def test_unknown_categories(dataset, text, words):
    with pytest.raises(ValueError, match=words):
        data.find_category(dataset, text)


# ----------------------------------------------------------------------------------------------------------- demo, files

def test_the_demo_is_the_same_every_time_and_looks_as_labelled():
    train, test = data.train_split("demo", None, "washer"), data.test_split("demo", None, "washer")
    again = data.test_split("demo", None, "washer")
    assert train.images.shape[1:] == (3, 224, 224) and train.images.dtype == torch.uint8 and not any(train.labels)
    assert torch.equal(test.images, again.images) and test.labels == [int("/good/" not in name) for name in test.names]
    assert {name.split("/")[1] for name in test.names} == {"good", "scratch", "stain", "missing"}
    area = test.masks.float().mean(dim=(1, 2))
    assert [int(a > 0) for a in area] == test.labels and area.max() < 0.1  # a defect is a small part of the image
    assert not any((image == other).all() for image in test.images for other in train.images)


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    with data.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), data.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_gives_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()
    with data.atomic(tmp_path / "file") as temporary:
        temporary.chmod(0o600)  # as safetensors does
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
