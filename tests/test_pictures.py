"""Scores people can use: verdicts on any picture, heat maps and their page, where a defect is, plots; from the command line and from Python."""
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_sentence, make_category, run, save_vit, tiny_vit
from PIL import Image
from safetensors.torch import load_file, save_file

import vitad
from evaluate import auroc, localisation, regions
from results.pictures import COLOURS, Gallery, colour, histogram, roc

TRAIN, EVALUATE = ROOT / "train.py", ROOT / "evaluate.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Own pictures of 90 x 60 pixels with masks, a tiny teacher and one finished run."""
    folder = tmp_path_factory.mktemp("pictures")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    make_category(folder / "own", train=6)
    for path in (folder / "own").rglob("*.png"):
        Image.open(path).resize((90, 60)).save(path)
    for path in (folder / "own/test/stain").glob("*.png"):
        mask = np.asarray(Image.open(path))[..., 0] > 200
        (folder / "own/ground_truth/stain").mkdir(parents=True, exist_ok=True)
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / f"own/ground_truth/stain/{path.stem}_mask.png")
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    process = run(TRAIN, "--dataset", "folder", "--data-root", "own", "--weights", "teacher.safetensors", "--epochs", 2, cwd=folder)
    assert process.returncode == 0, process.stderr
    # One image held out tells too little for a threshold: delta is put in the middle of the test images, so that there are both verdicts.
    scores = sorted(scores_of(folder).values())
    tensors = load_file(folder / RUN / "model.safetensors")
    save_file({**tensors, "delta": torch.tensor((scores[3] + scores[4]) / 2)}, folder / RUN / "model.safetensors")
    yield folder
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


RUN = "runs/folder/own/seed0"


def scores_of(world):
    """Of the test split, by the images' names."""
    assert run(EVALUATE, RUN, cwd=world).returncode == 0
    rows = [row.split(",") for row in (world / RUN / "scores.csv").read_text().splitlines()[1:]]
    return {row[0]: float(row[2]) for row in rows}


# ----------------------------------------------------------------------------------------------------------- where a defect is

def naive_regions(mask):
    """By walking from pixel to pixel."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        todo, region = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(frozenset(region))
    return set(found)


def test_regions():
    mask = np.random.default_rng(0).random((40, 40)) < 0.3
    mask[5:35, 20] = mask[34, 3:30] = True  # a long one
    numbers = regions(torch.from_numpy(mask.astype(np.uint8))).numpy()
    assert {frozenset(map(tuple, np.argwhere(numbers == n))) for n in np.unique(numbers[mask])} == naive_regions(mask)
    assert (numbers[~mask] == 0).all() and len(naive_regions(mask)) > 5


def naive_localisation(heat, masks, limit=0.3):
    """Every heat is a threshold: its false-positive rate, and the mean share of the regions above it; no histogram."""
    flat, labels = heat.ravel(), masks.ravel()
    owned = [(heat[i][tuple(np.array(sorted(region)).T)]) for i, mask in enumerate(masks) for region in naive_regions(mask)]
    points = [(0.0, 0.0)] + [((flat[labels == 0] >= cut).mean(), np.mean([(values >= cut).mean() for values in owned])) for cut in np.unique(flat)[::-1]]
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 > limit:
            if x0 < limit:
                y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y1) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return auroc(flat, labels), 100 * area / limit


@pytest.mark.parametrize("seed", range(3))
def test_localisation_against_the_definitions(seed):
    random = np.random.default_rng(seed)
    masks = (random.random((5, 21, 21)) < 0.1).astype(np.uint8)
    masks[1] = 0
    masks[2, 3:9, 4:15] = 1
    coarse = torch.from_numpy(random.normal(size=(5, 49)) + masks.reshape(5, 7, 3, 7, 3).mean(axis=(2, 4)).reshape(5, 49) * 2).float()
    fine = torch.nn.functional.interpolate(coarse.view(5, 1, 7, 7), (21, 21), mode="bilinear")[:, 0].numpy()
    expected = naive_localisation(fine, masks)
    assert localisation(coarse, torch.from_numpy(masks)) == pytest.approx(expected, abs=0.02) and 55 < expected[0] < 95
    worse = localisation(coarse, torch.from_numpy(masks), bins=4)
    assert max(abs(a - b) for a, b in zip(worse, expected)) > 0.1  # the comparison can fail


def test_localisation_of_perfect_and_of_missing_masks():
    heat = torch.zeros(2, 49)
    heat[0, 24] = 1
    found = torch.nn.functional.interpolate(heat.view(2, 1, 7, 7), (21, 21), mode="bilinear")[:, 0] > 0.5
    assert localisation(heat, found.byte()) == pytest.approx((100, 100), abs=0.05)
    assert localisation(-heat, found.byte())[1] == pytest.approx(0, abs=0.05)
    assert all(map(math.isnan, localisation(heat, torch.zeros(2, 21, 21, dtype=torch.uint8))))


def test_a_run_with_masks_says_where_the_defects_are(world):
    process = run(EVALUATE, RUN, cwd=world)
    assert process.returncode == 0, process.stderr
    result = json.loads((world / RUN / "result.json").read_text())
    title, row = process.stdout.splitlines()[-3].split(), process.stdout.splitlines()[-2].split()
    assert title[-2:] == ["pixels", "AU-PRO"] and row[-2:] == [f"{result['pixel_auroc']:.2f}", f"{result['au_pro']:.2f}"]
    assert result["pixel_auroc"] > 60 and 0 <= result["au_pro"] <= 100
    missed = result["misses_by_kind"]
    assert missed == {"stain": [result["misses"], 5]}
    line = f"own seed 0, delta {result['delta']:.3f}: false alarms {result['false_alarms']} of 4; missed stain {result['misses']} of 5"
    assert process.stdout.splitlines()[0] == line


# ------------------------------------------------------------------------------------------------------------- any pictures

def lines_of(world, *arguments):
    process = run(EVALUATE, RUN, "--images", *arguments, "--json", cwd=world)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_images_score_as_in_the_test_split_one_line_each(world):
    lines = lines_of(world, "own/test/stain", "own/test/good/002.png", "--batch-size", 2)
    assert [line["image"] for line in lines] == [f"own/test/stain/{i:03d}.png" for i in range(5)] + ["own/test/good/002.png"]
    expected = scores_of(world)
    for line in lines:
        assert line["score"] == pytest.approx(expected[line["image"].removeprefix("own/")], rel=1e-5)
        assert line["score"] == pytest.approx(line["score_d"] + line["score_a_teacher"] + line["score_a_student"], rel=1e-5)
        assert line["anomalous"] == (line["score"] >= line["delta"])
    assert {line["anomalous"] for line in lines} == {False, True}


def test_the_table_and_the_exit_code(world):
    scores = scores_of(world)
    low, high = (f"own/{choose(scores, key=scores.get)}" for choose in (min, max))
    process = run(EVALUATE, RUN, "--images", low, high, "--exit-code", cwd=world)
    assert process.returncode == 1 and process.stderr == ""
    title, first, second = (line.split() for line in process.stdout.splitlines())
    assert title == ["score", "delta", "verdict", "image"] and first[2:] == ["normal", low] and second[2:] == ["anomalous", high]
    assert run(EVALUATE, RUN, "--images", high, cwd=world).returncode == 0
    assert run(EVALUATE, RUN, "--images", low, "--exit-code", cwd=world).returncode == 0


def test_pictures_that_do_not_decode(world, tmp_path):
    shutil.copy(world / "own/test/good/002.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    assert_one_sentence(run(EVALUATE, RUN, "--images", tmp_path, "--json", cwd=world), "b.png: expected an image", "--skip-bad")
    process = run(EVALUATE, RUN, "--images", tmp_path, "--json", "--skip-bad", cwd=world)
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 1 and process.stderr.startswith("skipped: ") and "b.png" in process.stderr


@pytest.mark.parametrize("arguments, words", [
    (("--images", "nowhere.png"), ["nowhere.png: expected an image", "No such file"]),
    (("--images", "own/train"), ["own/train: expected images", "got none"]),
    (("--json",), ["--json: expected --images"]),
    (("--exit-code",), ["--exit-code: expected --images"]),
    (("--show-failures", "-1"), ["--show-failures: expected at least 0"]),
    (("--heatmaps", "teacher.safetensors"), ["teacher.safetensors: File exists"]),
])
def test_bad_input_is_one_sentence(world, arguments, words):
    assert_one_sentence(run(EVALUATE, RUN, *arguments, cwd=world), *words)


def test_several_runs_cannot_share_pictures(world, tmp_path):
    shutil.copytree(world / "runs", tmp_path / "runs")
    shutil.copytree(tmp_path / RUN, tmp_path / "runs/folder/own/seed1")
    assert_one_sentence(run(EVALUATE, "--out", tmp_path / "runs", "--images", "own", cwd=world), "--images: expected one run, got 2")
    assert_one_sentence(run(EVALUATE, "--out", tmp_path / "runs", "--heatmaps", "maps", cwd=world), "--heatmaps: expected one run, got 2")


# ---------------------------------------------------------------------------------------------------------------- heat maps

class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text.append(data)


def test_heat_maps_of_the_test_split(world, tmp_path):
    process = run(EVALUATE, RUN, "--heatmaps", tmp_path / "maps", cwd=world)
    assert process.returncode == 0 and f"heat maps: {tmp_path / 'maps/index.html'}" in process.stdout, process.stderr
    page = Page((tmp_path / "maps/index.html").read_text())
    assert len(page.images) == 9 and all((tmp_path / "maps" / name).is_file() for name in page.images) and "script" not in page.tags
    scores = [float(score) for score in re.findall(r": score ([\d.]+), delta", " ".join(page.text))]
    assert len(scores) == 9 and scores == sorted(scores, reverse=True)  # the worst first
    picture = Image.open(tmp_path / "maps" / page.images[0])
    assert picture.height > 60 and picture.width >= 3 * 90
    original = np.asarray(Image.open(world / "own/test/stain/000.png"))
    assert any((np.asarray(Image.open(tmp_path / "maps" / name))[:60, :90] == original).all() for name in page.images)  # in its own size


def test_heat_maps_of_any_pictures(world, tmp_path):
    process = run(EVALUATE, RUN, "--images", "own/test/stain", "--json", "--heatmaps", tmp_path, cwd=world)
    assert process.returncode == 0 and len(process.stdout.splitlines()) == 5 and "index.html" in process.stderr
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_the_colour_scale_is_the_calibrations():
    """The same heat has the same colour in every image: black where normal images usually are, the middle where they end."""
    colours, strength = colour(np.array([0.0, 1.0, 3.0, 5.0, 9.0]), (1.0, 3.0))
    assert strength.tolist() == [0, 0, 0.5, 1, 1]
    np.testing.assert_allclose(colours[[0, 2, 4]], [COLOURS[0], COLOURS[2], COLOURS[4]])


def test_a_heat_map_is_hot_where_the_heat_is(tmp_path):
    gallery = Gallery(tmp_path, "<title>", 1.0, (0.0, 1.0))
    heat = np.zeros(16, dtype=np.float32)
    heat[4 * 1 + 2] = 5  # second row, third column
    image = np.full((80, 40, 3), 100, dtype=np.uint8)
    parts = dict(score=2.0, score_d=1.5, score_d_cls=0.5, score_a_teacher=0.3, score_a_student=0.2)
    pixels = np.asarray(Image.open(gallery.add("test/x/a b.png", image, heat, parts)))
    assert (pixels[:80, :40] == 100).all() and pixels[30, 40 + 25].min() > 150 and pixels[70, 40 + 5].max() < 10
    assert (pixels[30, 80 + 25] > 100).any() and (pixels[70, 80 + 5] == 100).all()  # the overlay leaves cold places as they are
    text = gallery.close().read_text()
    assert "&lt;title&gt;" in text and "<title>&lt;title&gt;</title>" in text and 'class="anomalous"' in text


def test_failures_are_listed_with_their_maps(world, tmp_path):
    """With delta moved between the images' scores, the worst misses and false alarms come first."""
    shutil.copytree(world / RUN, tmp_path / "run")
    score = scores_of(world)
    for delta, words, kind in ((1e6, "missed", "stain"), (-1e6, "false alarm", "good")):
        tensors = load_file(world / RUN / "model.safetensors")
        save_file({**tensors, "delta": torch.tensor(delta)}, tmp_path / "run/model.safetensors")
        process = run(EVALUATE, tmp_path / "run", "--show-failures", 2, cwd=world)
        listed = [line.split(": ")[1].split(",")[0] for line in process.stdout.splitlines() if line.startswith(words + ": ")]
        expected = sorted((name for name in score if kind in name), key=score.get, reverse=delta < 0)[:2]
        assert listed == expected, process.stderr
        assert len(Page((tmp_path / "run/failures/index.html").read_text()).images) == 2


# -------------------------------------------------------------------------------------------------------------------- plots

def test_plots_are_svg(world):
    process = run(EVALUATE, RUN, "--plot", cwd=world)
    assert process.returncode == 0, process.stderr
    for name, word in (("histogram.svg", "delta"), ("roc.svg", "AUROC")):
        root = ElementTree.parse(world / RUN / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and word in "".join(root.itertext())


def test_what_the_plots_draw():
    scores, labels = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 1, 1])
    bars = re.findall(r'height="([\d.]+)" fill="(#\w+)" fill-opacity', histogram("t", scores, labels, 2.5))
    assert sum(float(height) > 0 for height, _ in bars) == 4 and {fill for _, fill in bars} == {"#1f77b4", "#d62728"}
    points = re.search(r'points="([^"]+)"', roc("t", scores, labels, 100.0)).group(1).split()
    assert points == ["60.00,310.00", "60.00,175.00", "60.00,40.00", "260.00,40.00", "460.00,40.00"]  # up, then to the right
    assert "nan" not in histogram("t", np.ones(3), np.array([0, 0, 0]), 1.0)  # one kind only, no spread


# -------------------------------------------------------------------------------------------------------------- from Python

def test_load_scores_an_array(world, monkeypatch):
    monkeypatch.chdir(world)
    model = vitad.load(RUN)
    image = np.asarray(Image.open("own/test/stain/000.png").convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    scores = model.scores(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
    assert scores["score"].item() == pytest.approx(lines_of(world, "own/test/stain/000.png")[0]["score"], rel=1e-5)
    assert scores["heat"].shape == (1, 49) and model.delta.isfinite()
    with pytest.raises(ValueError, match="trained with"):
        save_vit(tiny_vit(seed=1), world / "another.safetensors")
        vitad.load(RUN, weights="another.safetensors")
