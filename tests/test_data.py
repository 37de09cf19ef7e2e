"""data.py: what is read, in which order, with which labels; and files that are whole or not there."""
import numpy as np
import pytest
import torch
from conftest import make_category, shared
from PIL import Image

import data


def test_train_split_is_train_good_sorted_by_name(tmp_path):
    make_category(tmp_path / "bottle", train=12)
    (tmp_path / "bottle" / "train" / "good" / "notes.txt").write_text("not an image")
    split = data.train_split(tmp_path, "bottle", 224)
    assert split.images.shape == (12, 3, 224, 224) and split.images.dtype == torch.uint8
    assert split.names == [f"train/good/{i:03d}.png" for i in range(12)] and split.labels == [0] * 12


def test_test_split_labels_by_folder_name(tmp_path):
    make_category(tmp_path / "bottle", good=2, bad=3)
    split = data.test_split(tmp_path, "bottle", 64)
    assert split.names == ["test/good/000.png", "test/good/001.png", "test/stain/000.png", "test/stain/001.png", "test/stain/002.png"]
    assert split.labels == [0, 0, 1, 1, 1]
    pixels = np.asarray(Image.open(tmp_path / "bottle" / "test" / "stain" / "001.png"))
    assert np.array_equal(split.images[3].permute(1, 2, 0).numpy(), pixels)  # already 64 x 64: nothing is resampled


def test_resize_is_direct_bicubic_and_antialiased(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    ours = data.read_image(tmp_path / "image.png", 100)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), (100, 100), mode="bicubic", antialias=True)
    assert np.abs(ours - theirs[0].permute(1, 2, 0).numpy().clip(0, 255)).max() < 1.5  # uint8 steps


def test_grey_images_get_three_equal_channels(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "image.png")
    image = data.read_image(tmp_path / "image.png", 8)
    assert image.shape == (8, 8, 3) and np.array_equal(image[..., 0], np.arange(64).reshape(8, 8)) and (image == image[..., :1]).all()


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_a_broken_image_is_named(tmp_path, content):
    make_category(tmp_path / "bottle")
    path = tmp_path / "bottle" / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes()[:100] if content is None else content)
    with pytest.raises(ValueError, match="003.png: expected an image"):
        data.train_split(tmp_path, "bottle")


def test_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="bottle: expected the folder of category bottle"):
        data.train_split(tmp_path, "bottle")
    (tmp_path / "bottle" / "train" / "good").mkdir(parents=True)
    with pytest.raises(ValueError, match="good: expected images"):
        data.train_split(tmp_path, "bottle")
    with pytest.raises(ValueError, match="test: expected a folder of test images"):
        data.test_split(tmp_path, "bottle")


def test_category_names():
    data.check_category("mvtec", "metal_nut")
    with pytest.raises(ValueError, match="got 'metalnut': did you mean metal_nut"):
        data.check_category("mvtec", "metalnut")
    assert len(data.PAPER_AUROC["mvtec"]) == 15 and round(sum(data.PAPER_AUROC["mvtec"].values()) / 15, 1) == 90.4


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


@pytest.mark.parametrize("category, train, good, bad", [("bottle", 209, 20, 63), ("pill", 267, 26, 141)])
def test_real_counts(category, train, good, bad):
    root = shared("data/mvtec")
    assert len(data.train_split(root, category, 32).images) == train
    labels = data.test_split(root, category, 32).labels
    assert (labels.count(0), labels.count(1)) == (good, bad)
