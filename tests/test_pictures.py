"""Scores people can use: verdicts on any picture, heat maps, where a defect is, plots, Python."""

import json
import math
import re
import shutil
import sys
import urllib.parse
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import runs
import train
from conftest import assert_one_sentence, call, make_category, save_vit, tiny_vit
from evaluate import auroc, localisation, regions
from results import curves
from results.pictures import COLOURS, Gallery, colour, histogram, roc, training_curves

RUN = "runs/folder/own/seed0"
EPOCHS = 8  # of one step: enough for heat maps that beat chance with any version of torch


@pytest.fixture(scope="module")
def world(tmp_path_factory, own_cache):
    """Own pictures of 90 x 60 pixels with masks, a tiny teacher and one finished run."""
    folder = tmp_path_factory.mktemp("pictures")
    own = folder / "own"
    make_category(own, train=6)
    for path in own.rglob("*.png"):
        Image.open(path).resize((90, 60)).save(path)
    masks = own / "ground_truth/stain"
    masks.mkdir(parents=True)
    for path in (own / "test/stain").glob("*.png"):
        mask = np.asarray(Image.open(path))[..., 0] > 200
        Image.fromarray((mask * 255).astype(np.uint8)).save(masks / f"{path.stem}_mask.png")
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    command = ("--dataset", "folder", "--data-root", "own", "--weights", "teacher.safetensors")
    result = call(train.main, *command, "--epochs", EPOCHS, cwd=folder)
    assert result.code == 0, result.err
    # Two images held out tell too little for a threshold. delta is put in the middle of the test
    # images, so that there are both verdicts.
    assert run_evaluate(folder).code == 0
    scores = sorted(read_scores(folder / RUN).values())
    tensors = load_file(folder / RUN / "model.safetensors")
    tensors["delta"] = torch.tensor((scores[3] + scores[4]) / 2)
    save_file(tensors, folder / RUN / "model.safetensors")
    return folder


def run_evaluate(world, *options, run=RUN):
    """evaluate.py in this process."""
    return call(evaluate.main, run, *options, cwd=world)


def read_scores(run):
    """Of the test split, by the images' names."""
    lines = (run / "scores.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    return {row[0]: float(row[2]) for row in rows}


# ------------------------------------------------------------------------------ where a defect is


def naive_regions(mask):
    """By walking from pixel to pixel."""
    left = {tuple(pixel) for pixel in np.argwhere(mask)}
    found = set()
    while left:
        todo = [left.pop()]
        region = set()
        while todo:
            y, x = todo.pop()
            region.add((y, x))
            near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.add(frozenset(region))
    return found


def test_regions():
    mask = np.random.default_rng(0).random((40, 40)) < 0.3
    mask[5:35, 20] = mask[34, 3:30] = True  # a long one
    numbers = regions(torch.from_numpy(mask.astype(np.uint8))).numpy()
    found = {frozenset(map(tuple, np.argwhere(numbers == n))) for n in np.unique(numbers[mask])}
    assert found == naive_regions(mask) and len(found) > 5
    assert (numbers[~mask] == 0).all()


def naive_localisation(heat, masks, limit=0.3):
    """Pixel AUROC and AU-PRO without a histogram: every heat is a threshold."""
    flat, labels = heat.ravel(), masks.ravel()
    inside = [
        heat[i][tuple(np.array(sorted(region)).T)]
        for i, mask in enumerate(masks)
        for region in naive_regions(mask)
    ]
    thresholds = np.unique(flat)[::-1]
    false_positives = (flat[labels == 0, None] >= thresholds).mean(axis=0)
    shares = np.mean([(values[:, None] >= thresholds).mean(axis=0) for values in inside], axis=0)
    points = [(0.0, 0.0), *zip(false_positives, shares, strict=True)]
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points[:-1], points[1:], strict=True):
        if x1 > limit:
            if x0 < limit:
                y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
                area += (limit - x0) * (y0 + y1) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return auroc(flat, labels), 100 * area / limit


def enlarged(heat, size):
    """(n, 49) -> (n, size, size)"""
    return F.interpolate(heat.view(len(heat), 1, 7, 7), (size, size), mode="bilinear")[:, 0]


@pytest.mark.parametrize("seed", range(3))
def test_localisation_against_the_definitions(seed):
    random = np.random.default_rng(seed)
    masks = (random.random((5, 21, 21)) < 0.1).astype(np.uint8)
    masks[1] = 0
    masks[2, 3:9, 4:15] = 1
    defective = masks.reshape(5, 7, 3, 7, 3).mean(axis=(2, 4)).reshape(5, 49)
    heat = torch.from_numpy(random.normal(size=(5, 49)) + 2 * defective).float()
    expected = naive_localisation(enlarged(heat, 21).numpy(), masks)
    assert 55 < expected[0] < 95
    assert localisation(heat, torch.from_numpy(masks)) == pytest.approx(expected, abs=0.02)
    # The comparison can fail.
    worse = localisation(heat, torch.from_numpy(masks), bins=4)
    assert max(abs(a - b) for a, b in zip(worse, expected, strict=True)) > 0.1


def test_localisation_of_perfect_and_of_missing_masks():
    heat = torch.zeros(2, 49)
    heat[0, 24] = 1
    found = (enlarged(heat, 21) > 0.5).byte()
    assert localisation(heat, found) == pytest.approx((100, 100), abs=0.05)
    assert localisation(-heat, found)[1] == pytest.approx(0, abs=0.05)
    without = localisation(heat, torch.zeros(2, 21, 21, dtype=torch.uint8))
    assert all(map(math.isnan, without))


def test_a_run_with_masks_says_where_the_defects_are(world):
    process = run_evaluate(world)
    assert process.code == 0, process.err
    result = json.loads((world / RUN / "result.json").read_text())
    lines = process.out.splitlines()
    assert lines[-3].split()[-2:] == ["pixels", "AU-PRO"]
    assert lines[-2].split()[-2:] == [f"{result['pixel_auroc']:.2f}", f"{result['au_pro']:.2f}"]
    assert result["pixel_auroc"] > 60 and 0 <= result["au_pro"] <= 100
    assert result["misses_by_kind"] == {"stain": [result["misses"], 5]}
    assert lines[0] == (
        f"own seed 0, delta {result['delta']:.3f}: false alarms {result['false_alarms']} of 4; "
        f"missed: stain {result['misses']} of 5"
    )


# ------------------------------------------------------------------------------------ any pictures


def json_lines(world, *options):
    result = run_evaluate(world, "--images", *options, "--json")
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_images_score_as_in_the_test_split_one_line_each(world):
    lines = json_lines(world, "own/test/stain", "own/test/good/002.png", "--batch-size", 2)
    names = [f"own/test/stain/{i:03d}.png" for i in range(5)] + ["own/test/good/002.png"]
    assert [line["image"] for line in lines] == names
    expected = read_scores(world / RUN)
    for line in lines:
        score = expected[line["image"].removeprefix("own/")]
        assert line["score"] == pytest.approx(score, rel=1e-5)
        parts = line["score_d"] + line["score_a_teacher"] + line["score_a_student"]
        assert line["score"] == pytest.approx(parts, rel=1e-5)
        assert line["anomalous"] == (line["score"] >= line["delta"])
    assert {line["anomalous"] for line in lines} == {False, True}


def test_the_table_and_the_exit_code(world):
    scores = read_scores(world / RUN)
    low = f"own/{min(scores, key=scores.get)}"
    high = f"own/{max(scores, key=scores.get)}"
    result = run_evaluate(world, "--images", low, high, "--exit-code")
    assert result.code == 1 and result.err == ""
    title, first, second = (line.split() for line in result.out.splitlines())
    assert title == ["score", "delta", "verdict", "image"]
    assert first[2:] == ["normal", low] and second[2:] == ["anomalous", high]
    assert run_evaluate(world, "--images", high).code == 0
    assert run_evaluate(world, "--images", low, "--exit-code").code == 0
    one_by_one = ("--images", high, low, "--exit-code", "--batch-size", 1)
    assert run_evaluate(world, *one_by_one).code == 1  # whichever comes first


def test_pictures_that_do_not_decode(world, tmp_path):
    shutil.copy(world / "own/test/good/002.png", tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    result = run_evaluate(world, "--images", tmp_path, "--json")
    assert_one_sentence(result, "b.png: expected an image", "--skip-bad")
    result = run_evaluate(world, "--images", tmp_path, "--json", "--skip-bad")
    assert result.code == 0 and len(result.out.splitlines()) == 1
    assert result.err.startswith("skipped: ") and "b.png" in result.err
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    one_by_one = ("--images", tmp_path, "--json", "--skip-bad", "--batch-size", 1)
    assert len(run_evaluate(world, *one_by_one).out.splitlines()) == 1
    (tmp_path / "c.png").unlink()  # no picture is no verdict
    result = run_evaluate(world, "--images", tmp_path, "--skip-bad", "--exit-code")
    assert result.code == 2 and "expected pictures that decode, got none" in result.err


def test_folders_that_are_not_read_are_said(world, tmp_path):
    shutil.copytree(world / "own/test/good", tmp_path / "a")
    shutil.copytree(world / "own/test/stain", tmp_path / "a/day 2")
    result = run_evaluate(world, "--images", tmp_path / "a")
    assert result.code == 0 and len(result.out.splitlines()) == 1 + 4
    assert result.err == f"note: {tmp_path / 'a'}: folders in it are not read: day 2\n"


def test_pictures_are_scored_in_the_precision_that_was_asked_for(world):
    images = ("--images", "own/test/good", "--json")
    fp32, bf16 = (run_evaluate(world, *images, "--precision", p).out for p in ("fp32", "bf16"))
    assert fp32 != bf16 and fp32 == run_evaluate(world, *images).out


def test_a_large_picture_with_a_long_name_becomes_a_small_heat_map(tmp_path):
    gallery = Gallery(tmp_path, "a title", 1.0, (0, 1))
    parts = dict.fromkeys(("score_d", "score_d_cls", "score_a_teacher", "score_a_student"), 0.5)
    image = np.zeros((600, 1200, 3), np.uint8)
    file = gallery.add(f"{'x' * 230}.png", image, torch.rand(4), {"score": 1.0, **parts})
    assert Image.open(file).size == (3 * 448, 224 + 44)
    assert "anomalous" in gallery.close().read_text()  # a score of delta is, Eq. 10


def test_several_runs_cannot_share_pictures(world, tmp_path):
    shutil.copytree(world / "runs", tmp_path / "runs")
    shutil.copytree(tmp_path / RUN, tmp_path / "runs/folder/own/seed1")
    for option, value in (("--images", "own"), ("--heatmaps", "maps")):
        result = call(evaluate.main, "--out", tmp_path / "runs", option, value, cwd=world)
        assert_one_sentence(result, f"{option}: expected one run, got 2")


# --------------------------------------------------------------------------------------- heat maps


class Page(HTMLParser):
    """The tags, the images' files and the text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.images = []
        self.tags_of = {}
        self.choices = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "figure":
            values = dict(attributes)
            self.tags_of[values["data-name"]] = values["data-tags"].split("/")
        if tag == "option":
            self.choices.append(dict(attributes)["value"])
        if tag == "img":
            self.images.append(dict(attributes)["src"])

    def handle_data(self, data):
        self.text += data


def test_heat_maps_of_the_test_split(world, tmp_path):
    maps = tmp_path / "maps"
    result = run_evaluate(world, "--heatmaps", maps)
    assert result.code == 0, result.err
    assert f"heat maps: {maps / 'index.html'}" in result.out
    page = Page(maps / "index.html")
    assert len(page.images) == 9 and page.tags.count("script") == 1
    assert "//" not in (maps / "index.html").read_text()  # nothing comes from elsewhere
    delta = float(load_file(world / RUN / "model.safetensors")["delta"])
    for name, score in read_scores(world / RUN).items():  # what each picture can be found by
        kind = name.split("/")[-2]
        tags = ["anomalous" if score >= delta else "normal"]
        if (kind == "good") == (score >= delta):
            tags.append("false alarm" if kind == "good" else "missed")
        assert page.tags_of[name] == [*tags, f"kind: {kind}"]
    assert {"kind: stain", "kind: good"} <= set(page.choices)
    scores = [float(score) for score in re.findall(r": score ([\d.]+), delta", page.text)]
    assert len(scores) == 9 and scores == sorted(scores, reverse=True)  # the worst first
    picture = Image.open(maps / page.images[0])
    assert picture.height > 60 and picture.width >= 3 * 90
    original = np.asarray(Image.open(world / "own/test/stain/000.png"))
    pictures = [np.asarray(Image.open(maps / name)) for name in page.images]
    assert any((picture[:60, :90] == original).all() for picture in pictures)  # in its own size


def test_the_page_finds_pictures_whatever_their_names(world, tmp_path):
    for name in ("part#3.png", "50%25 'a' & \"b\" <c>?.png"):
        shutil.copy(world / "own/test/stain/000.png", tmp_path / name)
    result = run_evaluate(world, "--images", tmp_path, "--heatmaps", tmp_path / "maps")
    assert result.code == 0, result.err
    images = Page(tmp_path / "maps/index.html").images
    assert len(images) == 2
    assert all((tmp_path / "maps" / urllib.parse.unquote(src)).is_file() for src in images)


@pytest.mark.parametrize("options", [(), ("--images", "own/test/good", "own/test/stain")])
def test_each_picture_has_its_own_heat(world, tmp_path, monkeypatch, options):
    added, add = {}, Gallery.add

    def noted(self, name, image, heat, scores, **label):
        added[name.removeprefix("own/")] = heat
        return add(self, name, image, heat, scores, **label)

    monkeypatch.setattr(Gallery, "add", noted)
    assert run_evaluate(world, *options, "--heatmaps", tmp_path).code == 0
    split = data.test_split("folder", world / "own", "own")
    monkeypatch.chdir(world)
    heat = runs.load(RUN).scores(split.images)["heat"]
    assert list(added) == split.names
    for name, expected in zip(split.names, heat, strict=True):
        torch.testing.assert_close(added[name], expected, rtol=1e-3, atol=1e-4)


def test_a_caption_names_the_parts(tmp_path):
    scores = {"score": 2.5, "score_d": 2.0, "score_d_cls": 0.5}
    scores |= {"score_a_teacher": 0.4, "score_a_student": 0.1}
    lines = Gallery(tmp_path, "t", 3.0, (0, 1)).caption(scores, "normal")
    assert lines == (
        "score 2.500, delta 3.000: normal",
        "patches 1.500 + class tokens 0.500 + anchor: teacher 0.400, student 0.100",
    )


def test_heat_maps_of_any_pictures(world, tmp_path):
    result = run_evaluate(world, "--images", "own/test/stain", "--json", "--heatmaps", tmp_path)
    assert result.code == 0 and len(result.out.splitlines()) == 5 and "index.html" in result.err
    assert len(list(tmp_path.glob("*.png"))) == 5


def test_the_colour_scale_is_the_calibrations():
    """The same heat has the same colour in every image.

    Black is where normal images usually are, the middle is where they end.
    """
    colours, strength = colour(np.array([0.0, 1.0, 3.0, 5.0, 9.0]), (1.0, 3.0))
    assert strength.tolist() == [0, 0, 0.5, 1, 1]
    np.testing.assert_allclose(colours[[0, 2, 4]], [COLOURS[0], COLOURS[2], COLOURS[4]])


def test_a_heat_map_is_hot_where_the_heat_is(tmp_path):
    gallery = Gallery(tmp_path, "<title>", 1.0, (0.0, 1.0))
    heat = np.zeros(16, dtype=np.float32)
    heat[4 * 1 + 2] = 5  # second row, third column
    image = np.full((80, 40, 3), 100, dtype=np.uint8)
    scores = {
        "score": 2.0,
        "score_d": 1.5,
        "score_d_cls": 0.5,
        "score_a_teacher": 0.3,
        "score_a_student": 0.2,
    }
    file = gallery.add("test/x/a b.png", image, heat, scores)
    pixels = np.asarray(Image.open(file))[:80]
    original, colours, overlay = pixels[:, :40], pixels[:, 40:80], pixels[:, 80:120]
    assert (original == 100).all()
    assert colours[30, 25].min() > 150 and colours[70, 5].max() < 10
    assert (overlay[30, 25] > 100).any() and (overlay[70, 5] == 100).all()  # as it was where cold
    text = gallery.close().read_text()
    assert "<title>&lt;title&gt;</title>" in text and 'class="anomalous"' in text


@pytest.mark.parametrize(
    "delta, words, kind", [(1e6, "missed", "stain"), (-1e6, "false alarm", "good")]
)
def test_failures_are_listed_with_their_maps(world, tmp_path, delta, words, kind):
    """With a delta far off, the worst misses or false alarms come first."""
    run = tmp_path / "run"
    shutil.copytree(world / RUN, run)
    tensors = load_file(run / "model.safetensors")
    save_file({**tensors, "delta": torch.tensor(delta)}, run / "model.safetensors")
    result = run_evaluate(world, "--show-failures", 2, run=run)
    assert result.code == 0, result.err
    listed = [line for line in result.out.splitlines() if line.startswith(f"{words}: ")]
    names = [line.split(": ")[1].split(",")[0] for line in listed]
    scores = read_scores(run)
    of_kind = [name for name in scores if kind in name]
    assert names == sorted(of_kind, key=scores.get, reverse=words == "false alarm")[:2]
    assert len(Page(run / "failures/index.html").images) == 2


# ------------------------------------------------------------------------------------------- plots


def test_plots_are_svg(world):
    result = run_evaluate(world, "--plot")
    assert result.code == 0, result.err
    words = {"histogram.svg": "delta", "roc.svg": "AUROC", "training.svg": "held_out"}
    for name, word in words.items():
        root = ElementTree.parse(world / RUN / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and word in "".join(root.itertext())


def test_the_training_curves():
    """Each term where it is above 0, on a logarithmic scale."""
    lines = [
        {"step": 10, "loss": 10.0, "gram": 0.0},
        {"step": 20, "loss": 1.0, "gram": 0.1},
        {"step": 20, "held_out_mean": 0.1},
        {"step": 20, "delta": 3.0},
    ]
    svg = training_curves("t", lines)
    drawn = dict(re.findall(r'stroke="(#\w+)" stroke-width="1" points="([^"]+)"', svg))
    assert drawn["#222"] == "260.00,40.00 460.00,175.00"  # 10, 1; the axis ends at 0.1
    assert drawn["#2ca02c"] == drawn["#d62728"] == "460.00,310.00"


def test_what_the_plots_draw():
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    labels = np.array([0, 0, 1, 1])
    text = histogram("t", scores, labels, 2.5)
    bars = re.findall(r'height="([\d.]+)" fill="(#\w+)" fill-opacity', text)
    assert sum(float(height) > 0 for height, _ in bars) == 4
    assert {fill for _, fill in bars} == {"#1f77b4", "#d62728"}
    points = re.search(r'points="([^"]+)"', roc("t", scores, labels, 100.0)).group(1)
    # Up, then to the right.
    assert points == "60.00,310.00 60.00,175.00 60.00,40.00 260.00,40.00 460.00,40.00"
    one_kind = histogram("t", np.ones(3), np.array([0, 0, 0]), 1.0)  # and no spread
    assert "nan" not in one_kind


def test_a_histogram_has_shares_of_each_kind():
    text = histogram("t", np.array([1.0, 2.0, 3.0, 4.0]), np.array([0, 0, 0, 1]), 2.5)
    heights = [float(x) for x in re.findall(r'height="([\d.]+)" fill="#\w+" fill-opacity', text)]
    assert sorted(x for x in heights if x) == pytest.approx([90, 90, 90, 270], abs=0.1)


# ------------------------------------------------------------------------------------- from Python


def test_held_out_distances_go_from_the_log_into_the_table_and_the_chart(world, monkeypatch):
    monkeypatch.setattr(curves, "TABLE", world / "recipe.csv")
    monkeypatch.setattr(sys, "argv", ["curves.py"])
    old = {**dict.fromkeys(curves.COLUMNS, "0"), "category": "own", "optimizer": "sgd"}
    old |= {"teacher": "", "held_out_mean": "0.9", "step": "4"}
    runs.write_csv(curves.TABLE, curves.COLUMNS, [old])
    for _ in range(2):  # the second time its rows are replaced
        result = call(curves.main, RUN, "--category", "own", "--teacher", "", cwd=world)
        assert result.code == 0, result.err
    first, *rows = curves.read_table()
    assert first == old and [int(row["step"]) for row in rows] == [*range(1, EPOCHS + 1)]
    lines = [json.loads(line) for line in (world / RUN / "log.jsonl").read_text().splitlines()]
    for row, line in zip(rows, (line for line in lines if "held_out" in line), strict=True):
        assert float(row["held_out_mean"]) == pytest.approx(line["held_out_mean"], abs=1e-5)
        assert float(row["block9"]) == pytest.approx(line["held_out"][2], abs=1e-5)
        assert row["lr"] == row["lr_rest"] == "0.008"
    chart = ElementTree.parse(world / "recipe_own.svg").getroot()
    curve = [e.get("points").count(",") for e in chart.iter() if e.tag.endswith("polyline")]
    assert curve == [1, EPOCHS]
    result = call(curves.main, "--category", "bottle", cwd=world)
    assert_one_sentence(result, "expected runs of bottle")


def test_both_rates_go_into_the_table(world, tmp_path):
    shutil.copytree(world / RUN, tmp_path / "run")
    path = tmp_path / "run/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr_rest": 0.004}))
    row = curves.rows_of(tmp_path / "run")[0]
    assert (row["lr"], row["lr_rest"]) == ("0.008", "0.004")


def test_load_scores_an_array(world, monkeypatch):
    monkeypatch.chdir(world)
    model = runs.load(RUN)
    image = Image.open("own/test/stain/000.png").convert("RGB")
    pixels = np.array(image.resize((224, 224), Image.Resampling.BICUBIC))
    scores = model.scores(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    expected = json_lines(world, "own/test/stain/000.png")[0]["score"]
    assert scores["score"].item() == pytest.approx(expected, rel=1e-5)
    assert scores["heat"].shape == (1, 49) and model.delta.isfinite()


def test_load_refuses_another_teacher(world, monkeypatch, tmp_path):
    monkeypatch.chdir(world)
    save_vit(tiny_vit(seed=1), tmp_path / "another.safetensors")
    with pytest.raises(runs.UserError, match="trained with"):
        runs.load(RUN, weights=tmp_path / "another.safetensors")
