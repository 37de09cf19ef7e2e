"""data.py: which images are read, in which order, with which labels; decoding, and its cache."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import runs
from conftest import make_category, make_classes, shared
from results.report import paper_auroc
from runs import UserError
from weights.demo_washers import KINDS

CIFAR100_CLASSES = sorted(sum(data.CIFAR100.values(), ()))


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def cached_files():
    return sorted(Path(os.environ["XDG_CACHE_HOME"], "vitad").glob("*"))


def both_splits(dataset, root, category):
    return [split(dataset, root, category) for split in (data.train_split, data.test_split)]


# --------------------------------------------------------------------------- MVTec AD, own pictures


def test_train_split_is_train_good_sorted_by_name(tmp_path):
    make_category(tmp_path / "bottle", train=12)
    (tmp_path / "bottle/train/good/notes.txt").write_text("not an image")
    split = data.train_split("mvtec", tmp_path, "bottle")
    assert split.images.shape == (12, 3, 224, 224) and split.images.dtype == torch.uint8
    assert split.names == [f"train/good/{i:03d}.png" for i in range(12)]
    assert split.labels == [0] * 12


def test_test_split_labels_by_folder_name(tmp_path):
    make_category(tmp_path / "bottle", good=2, bad=3)
    split = data.test_split("mvtec", tmp_path, "bottle", 64)
    assert split.names == [
        "test/good/000.png",
        "test/good/001.png",
        "test/stain/000.png",
        "test/stain/001.png",
        "test/stain/002.png",
    ]
    assert split.labels == [0, 0, 1, 1, 1]
    assert split.files == [tmp_path / "bottle" / name for name in split.names]
    assert split.masks is None and split.skipped == []
    pixels = np.asarray(Image.open(tmp_path / "bottle/test/stain/001.png"))
    # They are 64 x 64 already, so nothing is resampled.
    assert np.array_equal(split.images[3].permute(1, 2, 0).numpy(), pixels)


def test_folder_is_the_same_without_a_category(tmp_path):
    make_category(tmp_path / "parts")
    train, test = both_splits("folder", tmp_path / "parts", "parts")
    assert test.names[0] == "test/good/000.png" and test.labels == [0] * 4 + [1] * 5
    assert len(train.images) == 6


def test_counts_other_than_the_official_ones_are_said_in_one_line(tmp_path, capsys):
    make_category(tmp_path / "bottle", train=3)
    data.train_split("mvtec", tmp_path, "bottle")
    note = "note: bottle is not the official one: train/good 3 (official 209) images\n"
    assert capsys.readouterr().err == note
    # All of them together, as the data set's own paper counts.
    assert np.sum(list(data.MVTEC.values()), axis=0).tolist() == [3629, 467, 1258]


@pytest.mark.parametrize("category", ["bottle", "pill"])
def test_real_counts(category, capsys):
    root = shared("data/mvtec")
    train, good, bad = {"bottle": (209, 20, 63), "pill": (267, 26, 141)}[category]
    assert len(data.train_split("mvtec", root, category, 32).images) == train
    labels = data.test_split("mvtec", root, category, 32).labels
    assert (labels.count(0), labels.count(1)) == (good, bad)
    assert not capsys.readouterr().err


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="bottle: expected train/good.*CC BY-NC-SA 4.0"):
        data.train_split("mvtec", tmp_path, "bottle")
    (tmp_path / "bottle/train/good").mkdir(parents=True)
    with pytest.raises(UserError, match="good: expected images"):
        data.train_split("mvtec", tmp_path, "bottle")
    with pytest.raises(UserError, match="test: expected folders of test images"):
        data.test_split("mvtec", tmp_path, "bottle")


def test_masks_are_found_by_name_and_checked(tmp_path):
    folder = make_category(tmp_path / "bottle", good=1, bad=3, size=64)
    (folder / "ground_truth/stain").mkdir(parents=True)
    for i in (2, 0, 1):  # the defect of image i: i + 1 rows at the top
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[: i + 1] = 255
        Image.fromarray(mask).save(folder / f"ground_truth/stain/{i:03d}_mask.png")
    masks = data.test_split("mvtec", tmp_path, "bottle", 64).masks
    assert masks.shape == (4, 64, 64) and masks.dtype == torch.uint8 and masks.max() == 1
    assert masks.sum(dim=(1, 2)).tolist() == [0, 64, 128, 192]

    mask = folder / "ground_truth/stain/001_mask.png"
    Image.new("L", (32, 64)).save(mask)
    words = r"001_mask.png: expected the mask of stain/001.png, \(64, 64\), got \(32, 64\)"
    with pytest.raises(UserError, match=words):
        data.test_split("mvtec", tmp_path, "bottle")
    mask.unlink()
    words = "001_mask.png: expected the mask of stain/001.png.*got none that opens"
    with pytest.raises(UserError, match=words):
        data.test_split("mvtec", tmp_path, "bottle")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_masks_of_pictures_that_the_camera_turned(tmp_path, suffix):
    """A mask is of the picture as it is seen, whether its own file is turned or not."""
    folder = make_category(tmp_path / "bottle", good=1, bad=2, size=64)
    (folder / "ground_truth/stain").mkdir(parents=True)
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise: the left edge comes to the top
    upright = np.zeros((80, 40), dtype=np.uint8)
    upright[:10] = 255
    for i, mask, how in ((0, upright, {}), (1, np.rot90(upright), {"exif": exif})):
        (folder / f"test/stain/{i:03d}.png").unlink()
        Image.new("RGB", (80, 40)).save(folder / f"test/stain/{i:03d}{suffix}", exif=exif)
        Image.fromarray(mask).save(folder / f"ground_truth/stain/{i:03d}_mask.png", **how)
    masks = data.test_split("mvtec", tmp_path, "bottle", 40).masks
    for mask in masks[1:]:
        assert mask[:5].all() and not mask[5:].any()


@pytest.mark.parametrize("line", [0, 37, 199])
def test_no_thin_defect_is_lost_where_masks_are_shrunk(tmp_path, line):
    """A line of one pixel, a third of a pixel of the small mask."""
    folder = make_category(tmp_path / "bottle", good=1, bad=1, size=200)
    (folder / "ground_truth/stain").mkdir(parents=True)
    mask = np.zeros((200, 200), dtype=np.uint8)
    mask[:, line] = 255
    Image.fromarray(mask).save(folder / "ground_truth/stain/000_mask.png")
    small = data.test_split("mvtec", tmp_path, "bottle", 64).masks[1]
    assert small[:, line * 64 // 200].all() and small.sum() <= 2 * 64


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named_and_can_be_skipped_in_scoring(tmp_path, content):
    make_category(tmp_path / "bottle")
    for kind in ("train/good", "test/good"):
        path = tmp_path / "bottle" / kind / "003.png"
        path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(UserError, match="train/good/003.png: expected an image"):
        data.train_split("mvtec", tmp_path, "bottle")
    with pytest.raises(UserError, match="test/good/003.png: expected an image"):
        data.test_split("mvtec", tmp_path, "bottle")
    assert not cached_files()  # nothing half-made
    split = data.test_split("mvtec", tmp_path, "bottle", skip_bad=True)
    assert len(split.images) == len(split.labels) == len(split.names) == 8
    assert "test/good/003.png" not in split.names
    assert len(split.skipped) == 1 and "test/good/003.png" in split.skipped[0]


# ----------------------------------------------------------------------------------------- decoding

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8)


def test_resize_is_direct_bicubic_and_antialiased(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours = data.read_image(tmp_path / "image.png", 100)
    theirs = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    theirs = F.interpolate(theirs, (100, 100), mode="bicubic", antialias=True)
    theirs = theirs[0].permute(1, 2, 0).numpy().clip(0, 255)
    assert np.abs(ours - theirs).max() < 1.5  # uint8 steps


def test_grey_images_get_three_equal_channels(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8)
    assert image.shape == (8, 8, 3) and (image == RAMP[..., None]).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_keeps_its_upper_8_bits(tmp_path, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(RAMP.astype(np.uint16) * 1000).save(path)
    assert (data.read_image(path, 8) == (RAMP.astype(int) * 1000 >> 8)[..., None]).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_32_bits_have_no_known_range(tmp_path, kind):
    path = tmp_path / "image.tif"
    Image.fromarray(RAMP.astype(kind)).save(path)
    with pytest.raises(UserError, match="whose range nothing tells"):
        data.read_image(path, 8)


def test_names_of_test_images_are_utf_8(tmp_path):
    """Training writes no names."""
    odd = os.fsdecode(b"\xff")
    make_category(tmp_path / "own")
    (tmp_path / "own/train/good/000.png").rename(tmp_path / f"own/train/good/{odd}.png")
    assert len(data.train_split("folder", tmp_path / "own", "own").images) == 6
    (tmp_path / "own/test/stain").rename(tmp_path / f"own/test/{odd}")
    with pytest.raises(UserError, match="expected a name in UTF-8, got another: rename it"):
        data.test_split("folder", tmp_path / "own", "own")


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, 4:, 3] = 255  # the left half is transparent black, the right half opaque black
    Image.fromarray(pixels).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8)
    assert (image[:, :4] == 255).all() and (image[:, 4:] == 0).all()


def test_palette(tmp_path):
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[:4] = (200, 10, 30)
    palette = Image.fromarray(colours).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(tmp_path / "image.png")
    assert (data.read_image(tmp_path / "image.png", 8) == colours).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_rotation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees to show
    path = tmp_path / f"image.{suffix}"
    grey = Image.fromarray(np.repeat(RAMP[..., None], 3, axis=2))
    grey.save(path, exif=exif)
    assert (data.read_image(path, 8)[..., 0] == np.rot90(RAMP, -1)).all()
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert data.image_size(path) == (30, 40)


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = make_category(tmp_path / "own")
    before = len(data.train_files("folder", folder, "own")[1])
    names = data.test_split("folder", folder, "own", 32).names
    (folder / "train/good/._000.png").write_bytes(b"left by macOS")
    hidden = folder / "test/.ipynb_checkpoints"
    hidden.mkdir()
    Image.new("RGB", (40, 30)).save(hidden / "000-checkpoint.png")
    assert len(data.train_files("folder", folder, "own")[1]) == before
    assert data.test_split("folder", folder, "own", 32).names == names


@pytest.mark.parametrize(
    "suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG"]
)
def test_every_format_is_found_and_read(tmp_path, suffix):
    (tmp_path / "train/good").mkdir(parents=True)
    Image.new("RGB", (40, 30), (10, 200, 90)).save(tmp_path / f"train/good/a{suffix}")
    split = data.train_split("folder", tmp_path, "own", 32)
    assert split.images.shape == (1, 3, 32, 32)
    means = split.images[0].float().mean(dim=(1, 2))
    assert (means - torch.tensor([10.0, 200.0, 90.0])).abs().max() < 4


# -------------------------------------------------------------------------------------------- cache


def test_a_changed_picture_of_the_same_size_is_decoded_again(tmp_path):
    path = tmp_path / "train/good/0.bmp"
    path.parent.mkdir(parents=True)
    for i, colour in enumerate(((1, 2, 3), (4, 5, 6))):
        Image.new("RGB", (40, 30), colour).save(path)
        os.utime(path, ns=(10**18 + i, 10**18 + i))
        images = data.train_split("folder", tmp_path, "own", 32).images
        assert tuple(images[0, :, 5, 5].tolist()) == colour


def test_the_second_start_reads_the_cache(tmp_path, monkeypatch):
    make_category(tmp_path / "bottle")
    first = data.train_split("mvtec", tmp_path, "bottle")
    monkeypatch.setattr(data, "read_image", None)  # decoding again would fail
    second = data.train_split("mvtec", tmp_path, "bottle")
    assert torch.equal(first.images, second.images) and first.names == second.names
    assert len(cached_files()) == 1


def test_another_reading_of_images_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    make_category(tmp_path / "bottle")
    data.train_split("mvtec", tmp_path, "bottle")
    read_image = data.read_image
    monkeypatch.setattr(data, "read_image", lambda *args: 255 - read_image(*args))
    before = data.train_split("mvtec", tmp_path, "bottle").images
    monkeypatch.setattr(data, "DECODER_VERSION", data.DECODER_VERSION + 1)
    assert torch.equal(data.train_split("mvtec", tmp_path, "bottle").images, 255 - before)


def test_another_size_is_not_taken_from_the_cache(tmp_path):
    make_category(tmp_path / "bottle")
    for size in (64, 32):
        images = data.train_split("mvtec", tmp_path, "bottle", size).images
        assert images.shape == (6, 3, size, size)


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
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "bottle/train/good/002.png")
    images = data.train_split("mvtec", tmp_path, "bottle").images
    assert images[2, :, 5, 5].tolist() == [1, 2, 3]


def test_without_room_for_a_cache_the_images_stay_in_memory(tmp_path, monkeypatch, capsys):
    make_category(tmp_path / "folder")
    expected = data.train_split("folder", tmp_path / "folder", "own").images
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder goes below a file
    images = data.train_split("folder", tmp_path / "folder", "own").images
    assert torch.equal(images, expected)
    assert "note: no cache at" in capsys.readouterr().err


def test_writing_into_a_batch_does_not_change_the_cache(tmp_path):
    make_category(tmp_path / "bottle")
    images = data.train_split("mvtec", tmp_path, "bottle").images
    before = images.clone()
    images.zero_()
    assert torch.equal(data.train_split("mvtec", tmp_path, "bottle").images, before)


# --------------------------------------------------------------- CIFAR-10, CIFAR-100, Fashion-MNIST


def test_cifar10_from_folders(tmp_path, small_counts):
    make_classes(tmp_path, "cifar10", data.CIFAR10)
    train, test = both_splits("cifar10", tmp_path, "cat")
    assert train.images.shape == (3, 3, 32, 32)  # small images stay small
    assert train.images[:, 0, 0, 0].tolist() == [6, 7, 8]  # cat is class 3
    assert test.images.shape == (20, 3, 32, 32)
    assert test.labels == [int(name.split("/")[1] != "cat") for name in test.names]
    assert test.labels.count(0) == 2 and test.names[6] == "test/cat/00000.png"


def test_cifar100_from_folders_takes_a_superclass(tmp_path, small_counts):
    make_classes(tmp_path, "cifar100", CIFAR100_CLASSES)
    train, test = both_splits("cifar100", tmp_path, "trees")
    trees = {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert len(train.images) == 15 and {name.split("/")[1] for name in train.names} == trees
    assert len(test.images) == 200 and test.labels.count(0) == 10


def test_other_counts_are_refused(tmp_path, small_counts):
    make_classes(tmp_path, "fashion_mnist", data.FASHION_MNIST)
    assert len(data.train_split("fashion_mnist", tmp_path, "T-shirt/top").images) == 3
    (tmp_path / "fashion_mnist/train/T-shirt_top/00001.png").unlink()
    words = "expected 3 train images of class T-shirt/top, the official number, got 2"
    with pytest.raises(UserError, match=words):
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
        grey = np.broadcast_to(i[:, None, None, None], (len(i), 32, 32, 3))
        return grey + np.array([0, 50, 100], dtype=np.uint8)


class OfficialFashion(Official):
    def values(self, i):
        return torch.from_numpy(i)[:, None, None].expand(-1, 28, 28)


def test_official_files_of_cifar10(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", OfficialCifar)
    train, test = both_splits("cifar10", tmp_path, "airplane")  # class 0, third in the file
    assert train.images[:, :, 9, 9].tolist() == [[6, 56, 106], [7, 57, 107], [8, 58, 108]]
    assert train.names == [f"train/airplane/{i:05d}" for i in (6, 7, 8)]
    assert len(test.images) == 20
    assert [i for i, label in enumerate(test.labels) if label == 0] == [4, 5]


class Upright(OfficialCifar):
    def values(self, i):
        pixels = super().values(i)
        pixels[:, 0] = 255  # the first row
        return pixels


def test_official_pictures_stand_upright(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Upright)
    for split in both_splits("cifar10", tmp_path, "airplane"):
        assert (split.images[:, :, 0] == 255).all() and (split.images[:, :, 1:] < 255).all()


def test_official_files_of_fashion_mnist_become_three_channels(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", OfficialFashion)
    train = data.train_split("fashion_mnist", tmp_path, "Dress")  # class 3, first in the file
    assert train.images.shape == (3, 3, 28, 28)
    assert [image.unique().tolist() for image in train.images] == [[0], [1], [2]]


class OfficialCifar100(OfficialCifar):
    def __init__(self, root, train, download):
        n = 3 if train else 2
        self.targets = [c for c in range(100) for _ in range(n)]
        self.data = self.values(np.arange(len(self.targets), dtype=np.uint16) % 100)


def test_official_files_of_cifar100_number_the_sorted_classes(tmp_path, small_counts, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR100", OfficialCifar100)
    train, test = both_splits("cifar100", tmp_path, "fish")
    fish = {"aquarium_fish": 1, "flatfish": 32, "ray": 67, "shark": 73, "trout": 91}
    expected = [f"train/{name}/{3 * c + i:05d}" for name, c in fish.items() for i in range(3)]
    assert train.names == expected
    assert [i for i, label in enumerate(test.labels) if label == 0] == [
        2 * c + i for c in fish.values() for i in range(2)
    ]


def test_a_pickle_whose_md5_is_wrong_is_not_opened(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for name in (*batches, "test_batch", "batches.meta"):
        # A pickle that would make a folder.
        (folder / name).write_bytes(b"cos\nmkdir\n(S'executed'\ntR.")

    def no_network(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.chdir(tmp_path)
    words = "expected the official files of CIFAR10 or folders cifar10/train/<class>.*no network"
    with pytest.raises(UserError, match=words):
        data.train_split("cifar10", tmp_path, "cat")
    assert not (tmp_path / "executed").exists()


# --------------------------------------------------------------------------------------- categories


def test_cifar100_superclasses():
    superclasses = list(data.CIFAR100.values())
    coarse = [
        next(i for i, five in enumerate(superclasses) if name in five) for name in CIFAR100_CLASSES
    ]
    assert coarse[:10] == [4, 1, 14, 8, 0, 6, 7, 7, 18, 3]  # the start of the official list
    assert len(set(CIFAR100_CLASSES)) == 100 and Counter(coarse) == dict.fromkeys(range(20), 5)


@pytest.mark.parametrize(
    "dataset, mean",
    [("cifar10", 96.3), ("cifar100", 88.9), ("fashion_mnist", 94.8), ("mvtec", 90.4)],
)
def test_the_papers_numbers_are_of_our_categories_and_have_its_means(dataset, mean):
    assert tuple(paper_auroc(dataset)) == data.CATEGORIES[dataset]  # in the same order too
    assert abs(np.mean(list(paper_auroc(dataset).values())) - mean) < 0.06


@pytest.mark.parametrize(
    "dataset, text, name",
    [
        ("cifar10", "cat", "cat"),
        ("cifar10", "3", "cat"),
        ("fashion_mnist", "ankle boot", "Ankle boot"),
        ("fashion_mnist", "T-shirt_top", "T-shirt/top"),
        ("cifar100", "17", "trees"),
        ("cifar100", "Vehicles_2", "vehicles 2"),
        ("mvtec", "metal_nut", "metal_nut"),
    ],
)
def test_category_names(dataset, text, name):
    assert data.find_category(dataset, text) == name


def test_a_place_that_no_command_line_gives():
    with pytest.raises(UserError, match="data_root: expected a folder, got none"):
        data.test_split("mvtec", None, "bottle")
    with pytest.raises(UserError, match="category: expected one of cifar100, got 'pill'"):
        data.train_split("cifar100", "data", "pill")


@pytest.mark.parametrize(
    "dataset, text, words",
    [
        ("mvtec", "metalnut", "did you mean metal_nut"),
        ("cifar100", "20", "or 0 to 19"),
        ("cifar10", "kat", "did you mean cat"),
        ("cifar10", "zipper", "that is one of --dataset mvtec"),
        ("cifar10", "qqqq", "choose from airplane"),
        ("mvtec", "-1", "choose from bottle"),
    ],
)
def test_unknown_categories(dataset, text, words):
    with pytest.raises(UserError, match=words):
        data.find_category(dataset, text)


# ---------------------------------------------------------------------------------- the demo, files


def test_the_demo_is_the_same_every_time_and_looks_as_labelled():
    train, test = both_splits("demo", None, "washer")
    again = data.test_split("demo", None, "washer")
    assert train.images.shape == (80, 3, 224, 224) and train.images.dtype == torch.uint8
    assert not any(train.labels)
    assert torch.equal(test.images, again.images)
    assert test.labels == [int("/good/" not in name) for name in test.names]
    assert Counter(name.split("/")[1] for name in test.names) == KINDS["test"]
    assert set(KINDS["test"]) == {"good", "scratch", "stain", "missing"}
    area = test.masks.float().mean(dim=(1, 2))
    assert [int(a > 0) for a in area] == test.labels
    assert area.max() < 0.1  # a defect is a small part of the image
    assert not any((a == b).all() for a in test.images for b in train.images)


def test_atomic_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    with runs.atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(KeyError), runs.atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_atomic_gives_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").touch()
    with runs.atomic(tmp_path / "file") as temporary:
        temporary.chmod(0o600)  # as safetensors does
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
