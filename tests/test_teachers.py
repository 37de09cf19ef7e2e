"""Every public teacher of weights/README.md: its size, its patches, and that k of Eq. 9 and the heat map follow its grid."""
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import save_file

from results.pictures import Gallery
from vit import ViT, load_vit
from vitad import Distillation

SIZES = {"tiny": dict(width=192, heads=3, hidden=768), "small": dict(width=384, heads=6, hidden=1536), "base": {},
         "large": dict(width=1024, depth=24, heads=16, hidden=4096)}


@pytest.mark.parametrize("size, parameters", [("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656), ("large", 304_326_632)])
def test_sizes(size, parameters):
    """As published, with the head of 1,000 classes."""
    with torch.device("meta"):
        vit = ViT(**SIZES[size], classes=1000)
    assert sum(p.numel() for p in vit.parameters()) == parameters
    with torch.no_grad():  # only the shapes count
        features = vit.to_empty(device="cpu")(torch.zeros(1, 3, 224, 224), (7, 13, 19, 23) if size == "large" else (3, 6, 9, 11))
    assert [x.shape for x in features.values()] == [(1, 197, vit.config["width"])] * 4


@pytest.mark.parametrize("name, size, patch, grid, head", [
    ("vit_tiny_patch16_224", "tiny", 16, 14, True), ("vit_small_patch16_224", "small", 16, 14, True),
    ("vit_small_patch16_224.dino", "small", 16, 14, False), ("vit_small_patch14_dinov2", "small", 14, 37, False),
])
def test_a_checkpoint_becomes_a_teacher(tmp_path, name, size, patch, grid, head):
    """From a file in the public layout, with random values, to scores and a heat map. DINOv2 comes with a grid of 37 and LayerScale."""
    original = ViT(**SIZES[size], patch=patch, grid=grid, classes=1000 if head else 0).state_dict()
    if "dinov2" in name:
        original |= {f"blocks.{i}.ls{j}.gamma": torch.full((384,), 0.5) for i in range(12) for j in (1, 2)}
    save_file(original, tmp_path / f"{name}.safetensors")
    out = tmp_path / "teacher.safetensors"
    process = run(ROOT / "weights/convert.py", tmp_path / f"{name}.safetensors", "--out", out, "--mean", .5, .5, .5, "--std", .5, .5, .5)
    assert process.returncode == 0, process.stderr
    teacher = load_vit(out)
    side = 224 // patch
    assert teacher.image_size == 224 and teacher.config["grid"] == side
    model = Distillation(teacher)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model.update_anchor(model.teach(images))
    scores = model.scores(images)
    assert scores["score"].isfinite().all() and scores["heat"].shape == (2, side * side)
    model.top_k = side * side  # every patch: the mean of the heat is then the patches' part of the score
    scores = model.scores(images)
    torch.testing.assert_close(scores["heat"].mean(dim=1), scores["score_d"] - scores["score_d_cls"])
    gallery = Gallery(tmp_path / "maps", "t", 0.0, (0.0, 1.0))
    picture = gallery.add("a.png", np.zeros((50, 70, 3), dtype=np.uint8), scores["heat"][0],
                          {name: float(value[0]) for name, value in scores.items() if name != "heat"})
    assert Image.open(picture).height > 50
