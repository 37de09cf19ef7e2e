"""Every public teacher of weights/README.md: its size and its patches.

k of Eq. 9 and the heat map follow its grid.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import call
from results.pictures import Gallery
from vit import ViT, load_vit
from vitad import Distillation
from weights import convert

SIZES = {
    "tiny": {"width": 192, "heads": 3, "hidden": 768},
    "small": {"width": 384, "heads": 6, "hidden": 1536},
    "base": {},
    "large": {"width": 1024, "depth": 24, "heads": 16, "hidden": 4096},
}
# As published, with the head of 1,000 classes.
PARAMETERS = {"tiny": 5_717_416, "small": 22_050_664, "base": 86_567_656, "large": 304_326_632}


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, monkeypatch):
    with torch.device("meta"):
        vit = ViT(**SIZES[size], classes=1000)
    assert sum(p.numel() for p in vit.parameters()) == PARAMETERS[size]
    layers = (7, 13, 19, 23) if size == "large" else (3, 6, 9, 11)
    monkeypatch.setattr(ViT, "initialise", lambda self: None)
    with FakeTensorMode():  # only the shapes count
        vit = ViT(**SIZES[size])
        features = vit(torch.zeros(1, 3, 224, 224), layers)
    assert [x.shape for x in features.values()] == [(1, 197, vit.config["width"])] * 4


def public_file(folder, name, size, **changes):
    """A file in the public layout, with random values; -> its path."""
    tensors = ViT(**SIZES[size], **changes).state_dict()
    if "dinov2" in name:
        for i in range(12):
            for j in (1, 2):
                tensors[f"blocks.{i}.ls{j}.gamma"] = torch.full((384,), 0.5)
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "name, size, changes",
    [
        ("vit_tiny_patch16_224", "tiny", {"classes": 1000}),
        ("vit_small_patch16_224", "small", {"classes": 1000}),
        ("vit_small_patch16_224.dino", "small", {}),
        ("vit_small_patch14_dinov2", "small", {"patch": 14, "grid": 37}),
    ],
)
def test_a_checkpoint_becomes_a_teacher(tmp_path, name, size, changes):
    """From the public file to scores and a heat map. DINOv2 comes with LayerScale."""
    original = public_file(tmp_path, name, size, **changes)
    out = tmp_path / "teacher.safetensors"
    half = (0.5, 0.5, 0.5)
    arguments = [original, "--out", out, "--mean", *half, "--std", *half]
    result = call(convert.main, *arguments)
    assert result.code == 0, result.err
    teacher = load_vit(out)
    side = 224 // changes.get("patch", 16)
    assert teacher.image_size == 224 and teacher.config["grid"] == side

    model = Distillation(teacher)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    t = model.teacher_features(images)
    model.update_anchor(t)
    scores = model.scores(images, t)
    assert scores["score"].isfinite().all() and scores["heat"].shape == (2, side * side)
    model.top_k = side * side  # all patches: the mean of the heat is the patches' part of the score
    scores = model.scores(images)
    torch.testing.assert_close(
        scores["heat"].mean(dim=1), scores["score_d"] - scores["score_d_cls"]
    )

    gallery = Gallery(tmp_path / "maps", "t", 0.0, (0.0, 1.0))
    of_first = {key: float(value[0]) for key, value in scores.items() if key != "heat"}
    black = np.zeros((50, 70, 3), dtype=np.uint8)
    picture = gallery.add("a.png", black, scores["heat"][0], of_first)
    assert Image.open(picture).height > 50
