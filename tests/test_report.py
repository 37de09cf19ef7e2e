"""The tables in results/: nothing in them is typed by hand."""

import csv
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

import data
import evaluate
import train
import vitad
from conftest import (
    ROOT,
    assert_one_sentence,
    call,
    make_category,
    make_classes,
    save_vit,
    tiny_vit,
)
from data import CATEGORIES, slug
from results import anatomy, curves, nearest
from results.report import cell, chart, paper_auroc, report, table
from runs import UserError
from vit import load_vit

FOLDERS = sorted(path for path in (ROOT / "results").glob("*/*/") if list(path.glob("*.json")))


def result_of(category, seed, auroc, **changes):
    """A result.json."""
    trained = {
        "command": f"python train.py --seed {seed}",
        "commit": "abc",
        "device": "cpu",
        "date": "2026-11-23T00:00:00",
    }
    return {
        "dataset": "mvtec",
        "category": category,
        "seed": seed,
        "auroc": auroc,
        "auroc_score_d": auroc - 1,
        "auroc_score_a": 70.0,
        "auroc_score_a_teacher": 60.0,
        "pixel_auroc": None,
        "au_pro": None,
        "steps": 1643,
        "teacher": "t",
        "teacher_sha256": "0",
        "trained": trained,
        "command": "python evaluate.py",
        "commit": "def",
        "device": "cpu",
        "date": "2026-11-24T00:00:00",
        "versions": {"torch": "2.15.0"},
        **changes,
    }


def rows_of(text):
    """A Markdown table -> {first cell: the others}."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("| "):
            name, *cells = [part.strip() for part in line.strip("| ").split(" | ")]
            rows[name] = cells
    return rows


def test_the_table_means_over_seeds_then_over_categories():
    results = [
        result_of("bottle", 0, 90.0),
        result_of("bottle", 1, 100.0),
        result_of("pill", 0, 65.0),
    ]
    text = table(results)
    rows = rows_of(text)
    order = (
        "bottle hazelnut capsule metal_nut leather pill wood carpet tile grid cable transistor "
        "toothbrush screw zipper"
    )
    assert list(rows)[1:16] == order.split()
    shown = ["100.0", "95.00 ± 7.07", "94.00 ± 7.07", "70.00 ± 0.00", "60.00 ± 0.00"]
    assert rows["bottle"] == [*shown, "0, 1", "1643"]
    assert rows["pill"][:2] == ["88.1", "65.00"]
    assert rows["hazelnut"][:2] == ["96.4", "not yet run"]
    # Of bottle and pill, the paper's and ours.
    assert rows["mean of 2"][:3] == ["94.05", "80.00", "79.00"]
    trained = "| `python train.py --seed 1` | abc | cpu | 2.15.0 | 2026-11-23 |\n"
    scored = "| `python evaluate.py` | def | cpu | 2.15.0 | 2026-11-24 |\n"
    assert trained + scored in text and text.count(scored) == 1
    assert "pixels" not in text
    assert "pixels" in table([result_of("bottle", 0, 90.0, pixel_auroc=95.0, au_pro=80.0)])


def test_the_table_has_the_nearest_patch_beside_the_student():
    results = [result_of("bottle", 0, 90.0), result_of("pill", 0, 65.0)]
    assert "| nearest patch |" not in table(results)
    rows = rows_of(table(results, [{"category": "pill", "auroc": 93.21}]))
    at = rows["category"].index("nearest patch")
    assert rows["pill"][at] == "93.21" and rows["bottle"][at] == ""
    assert "93.21" not in rows["mean of 2"]  # a mean of both is not known


def test_each_command_has_its_own_version_of_torch():
    before = result_of("bottle", 0, 90.0)
    assert table([before]).count("| 2.15.0 |") == 2
    trained = {**before["trained"], "versions": {"torch": "2.14.1"}}
    text = table([{**before, "trained": trained}])
    assert text.count("| 2.15.0 |") == 1 and text.count("| 2.14.1 |") == 1
    trained = {**before["trained"], "precision": "bf16"}
    assert table([{**before, "trained": trained}]).count("| cpu, bf16 |") == 1


def test_a_curve_between_two_powers_of_two_has_ticks():
    row = dict.fromkeys(curves.COLUMNS, "0") | {"optimizer": "muon", "held_out_mean": "0.5"}
    chart = curves.draw([{**row, "step": "110"}, {**row, "step": "120"}], "a title")
    assert ">110</text>" in chart and ">120</text>" in chart


def test_nearest_patches_against_a_naive_loop():
    vit = tiny_vit()
    generator = torch.Generator().manual_seed(0)
    shape = (5, 3, vit.image_size, vit.image_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    normal, test = images[:3], images[3:]
    layers = (1, 3)
    memory = nearest.fill_memory(vit, normal, layers, most=10**6)
    first = {c: x[:49] for c, x in memory.items()}
    scores, by_one_image = nearest.score_images(vit, test, [memory, first])
    with torch.no_grad():
        kept, seen = (vit(vit.prepare(x), layers) for x in (normal, test))
    for c in layers:
        tokens = [patch.double() for image in kept[c] for patch in image[1:]]
        assert len(memory[c]) == len(tokens) == 3 * 49
        for i, image in enumerate(seen[c]):
            distances = []
            for patch in image[1:].double():
                cosines = [torch.dot(patch, x) / (patch.norm() * x.norm()) for x in tokens]
                distances.append(1 - max(cosines).item())
            assert scores[c][i].item() == pytest.approx(max(distances), rel=1e-4)  # 1 % of 49
        assert torch.equal(by_one_image[c], nearest.score_images(vit, test, [first])[0][c])
        assert (by_one_image[c] > scores[c]).any()

    some = nearest.fill_memory(vit, normal, layers, most=20)
    again = nearest.fill_memory(vit, normal, layers, most=20)
    for c in layers:
        assert some[c].shape == (20, 32) and torch.equal(some[c], again[c])
        assert (some[c] @ memory[c].T).amax(dim=1).min() > 0.9999  # each is one of them
    patches = torch.nn.functional.normalize(torch.randn(196, 8, generator=generator), dim=1)
    distances = 1 - (patches @ patches[:9].T).amax(dim=1)
    top = distances.sort(descending=True).values[:2].mean().item()  # 1 % of 196
    assert nearest.score(patches, patches[:9]) == pytest.approx(top)


def test_nearest_patches_of_several_categories_at_once(tmp_path, small_counts):
    make_classes(tmp_path / "data", "cifar10", CATEGORIES["cifar10"])
    save_vit(tiny_vit(), tmp_path / "teacher.safetensors")
    command = ("--dataset", "cifar10", "--weights", "teacher.safetensors", "--memory", 30, "--out")
    results = {}
    for category in ("all", "cat", "2,cat"):
        done = call(nearest.main, *command, category, "--category", category, cwd=tmp_path)
        assert done.code == 0, done.err
        paths = (tmp_path / category).glob("cifar10/nearest/*.json")
        results[category] = {path.stem: json.loads(path.read_text()) for path in paths}
    assert set(results["all"]) == set(CATEGORIES["cifar10"])
    assert set(results["cat"]) == {"cat"} and set(results["2,cat"]) == {"bird", "cat"}
    for key in ("dataset", "category", "auroc", "memory"):
        values = {found["cat"][key] for found in results.values()}
        assert len(values) == 1
    assert len({result["auroc"] for result in results["all"].values()}) > 1
    save_vit(tiny_vit(seed=1), tmp_path / "teacher.safetensors")
    refused = call(nearest.main, *command, "all", "--category", "cat", cwd=tmp_path)
    assert_one_sentence(refused, "all/cifar10: expected the results of one teacher")


def test_the_auroc_of_nearest_patches(tmp_path, small_counts):
    make_classes(tmp_path / "data", "cifar10", CATEGORIES["cifar10"])
    path = save_vit(tiny_vit(), tmp_path / "teacher.safetensors")
    command = ("--dataset", "cifar10", "--weights", path, "--memory", 30, "--out", "out")
    assert call(nearest.main, *command, "--category", "cat", cwd=tmp_path).code == 0
    place = ("cifar10", tmp_path / "data", "cat")
    teacher, test = load_vit(path), data.test_split(*place)
    memory = nearest.fill_memory(teacher, data.train_split(*place).images, vitad.LAYERS, 30)
    [scores] = nearest.score_images(teacher, test.images, [memory])
    result = json.loads((tmp_path / "out/cifar10/nearest/cat.json").read_text())
    assert result["auroc"] == evaluate.auroc(sum(scores.values()), test.labels) > 60


def test_the_memory_of_nearest_holds_20000_patches(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(nearest, "results_of", lambda _, args, teacher: seen.append(args) or [])
    assert call(nearest.main, "--dataset", "demo", "--out", tmp_path).code == 0
    assert seen[0].memory == 20000


def heights(svg):
    """{colour: heights of the bars in pixels}"""
    bars = {}
    for height, fill in re.findall(r'height="([\d.]+)" fill="(#\w{6})"/><path', svg):
        bars.setdefault(fill, []).append(float(height))
    return bars


def test_the_chart_has_the_paper_and_ours_per_category_and_in_the_mean():
    results = [
        result_of("pill", 0, 78.1),
        result_of("bottle", 0, 90.0),
        result_of("bottle", 1, 100.0),
    ]
    low, pixels = 60, 270 / 40  # the axis begins ten below the smallest, at a full ten
    papers, ours = heights(chart(results)).values()
    expected = [100.0, 88.1, 94.05], [95.0, 78.1, 86.55]
    for shown, values in zip((papers, ours), expected, strict=True):
        assert shown == pytest.approx([(x - low) * pixels for x in values], abs=0.1)
    one = heights(chart(results, [{"category": "pill", "auroc": 93.21}]))
    assert len(one) == 2  # nearest patch only where all categories have it
    both = [{"category": "pill", "auroc": 93.21}, {"category": "bottle", "auroc": 99.0}]
    assert len(heights(chart(results, both))) == 3


def test_a_table_sorts_seeds_as_numbers_and_keeps_a_bar_in_a_command():
    results = [result_of("pill", seed, 90.0) for seed in (0, 10, 2)]
    results[0]["trained"]["command"] = "python train.py --data-root a|b"
    text = table(results)
    assert rows_of(text)["pill"][-2] == "0, 2, 10"
    assert r"--data-root a\|b`" in text


def test_cell():
    assert cell([]) == "" and cell([None]) == "" and cell([99.756]) == "99.76"
    assert cell([1.0, 2.0, 3.0]) == "2.00 ± 1.00"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_tables_follow_from_the_results_beside_them(folder):
    results, others = (
        [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]
        for pattern in ("*.json", "nearest/*.json")
    )
    assert folder.with_suffix(".md").read_text() == table(results, others)
    assert folder.with_suffix(".svg").read_text() == chart(results, others)
    assert {r["teacher_sha256"] for r in others} <= {r["teacher_sha256"] for r in results}


def test_results_lie_here():
    assert FOLDERS


def test_the_papers_numbers_are_there_for_every_category():
    for dataset in ("cifar10", "cifar100", "fashion_mnist", "mvtec"):
        percent = paper_auroc(dataset)
        assert set(percent) == set(CATEGORIES[dataset])
        assert all(50 < value <= 100 for value in percent.values())


def test_the_recipes_charts_follow_from_the_table():
    rows = curves.read_table()
    names = {slug(row["category"]): row["category"] for row in rows}
    charts = sorted((ROOT / "results").glob("recipe_*.svg"))
    assert len(charts) == 2
    for path in charts:
        category = names[path.stem.removeprefix("recipe_")]
        wanted = ("deit_tiny_patch16_224", category)
        drawn = [row for row in rows if (row["teacher"], row["category"]) == wanted]
        title = f"{category}: distance to the teacher on images held out"
        assert path.read_text() == curves.draw(drawn, title)


def keep(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


@pytest.mark.parametrize("name", ["folder/own_seed1_old.json", "cifar10/own_seed1.json"])
def test_a_result_lies_where_it_belongs(tmp_path, name):
    """Else a copy would count twice."""
    own = result_of("own", 1, 90.0, dataset="folder")
    keep(tmp_path / "folder/own_seed1.json", own)
    path = keep(tmp_path / name, own)
    with pytest.raises(UserError, match=f"^{path}: expected the result of this name, got that of "):
        report(tmp_path, [])
    path.unlink()
    assert report(tmp_path, []) == [tmp_path / "folder.md"]


def test_no_result_replaces_that_of_another_category(tmp_path):
    first, second = (result_of(name, 0, 90.0, dataset="folder") for name in ("part_1", "part 1"))
    path = keep(tmp_path / "out/folder/part_1_seed0.json", first)
    keep(tmp_path / "run/result.json", second)
    with pytest.raises(UserError, match=f"^{path}: expected the result of part 1, got that of ano"):
        report(tmp_path / "out", [tmp_path / "run"])
    assert json.loads(path.read_text()) == first


def test_a_command_that_is_not_utf8_is_escaped(tmp_path):
    command = "python evaluate.py --heatmaps " + os.fsdecode(b"maps\xe9")
    result = result_of("own", 0, 90.0, dataset="folder", command=command)
    keep(tmp_path / "folder/own_seed0.json", result)
    report(tmp_path, [])
    assert "--heatmaps maps\\udce9" in (tmp_path / "folder.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory, own_cache):
    """A folder with two runs."""
    folder = tmp_path_factory.mktemp("report")
    make_category(folder / "own", train=7)
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    command = ("--dataset", "folder", "--data-root", "own", "--weights", "teacher.safetensors")
    options = ("--epochs", 1, "--seeds", "0,1", "--holdout", 0.7)
    result = call(train.main, *command, *options, cwd=folder)
    assert result.code == 0, result.err
    return folder


def test_a_report_scores_what_has_no_result_and_one_broken_run_stops_no_other(world):
    runs = world / "runs/folder/own"
    model = runs / "seed1/model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:-50])
    result = call(evaluate.main, "--report", "out", cwd=world)
    assert result.code == 2 and "mean" in result.out and (runs / "seed0/result.json").exists()
    assert "seed1/model.safetensors" in result.err
    last = "1 of 2 runs could not be scored, for the reasons above\n"
    assert result.err.endswith(last)
    model.write_bytes(whole)

    result = call(evaluate.main, "--report", "out", cwd=world)
    assert result.code == 0, result.err
    assert "table: out/folder.md" in result.out
    assert result.out.count("own seed") == 1  # seed 0 was not scored again
    text = (world / "out/folder.md").read_text()
    assert rows_of(text)["own"][-2:] == ["0, 1", "1"]
    kept = sorted(path.name for path in (world / "out/folder").iterdir())
    assert kept == ["own_seed0.json", "own_seed1.json"]
    again = call(evaluate.main, "--report", "out", cwd=world)
    assert again.code == 0 and (world / "out/folder.md").read_text() == text

    path = runs / "seed0/result.json"  # of a model that was trained anew meanwhile
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "trained": {**old["trained"], "date": "2026-01-01"}}))
    again = call(evaluate.main, "--report", "out", cwd=world)
    assert again.code == 0 and again.out.count("own seed") == 1
    assert json.loads(path.read_text())["trained"] == old["trained"]
    twice = call(evaluate.main, *[runs / "seed0"] * 2, "--report", "out", cwd=world)
    assert twice.code == 0, twice.err

    shutil.copytree(world / "runs", world / "others/runs")
    path = world / "others/runs/folder/own/seed0/result.json"
    path.write_text(path.read_text().replace('"teacher_sha256": "', '"teacher_sha256": "0'))
    result = call(evaluate.main, "--out", "others/runs", "--report", "out", cwd=world)
    assert_one_sentence(result, "expected the results of one teacher")
    both = ("runs/folder/own/seed0", "others/runs/folder/own/seed0")
    result = call(evaluate.main, *both, "--report", "fresh", cwd=world)
    assert_one_sentence(
        result, f"{both[1]}: expected one run of a category and seed, got {both[0]}"
    )
    assert not (world / "fresh").exists()


def test_a_report_scores_again_what_was_scored_otherwise(world, tmp_path):
    run = "runs/folder/own/seed0"

    def scored(*options):
        result = call(evaluate.main, run, "--report", tmp_path, *options, cwd=world)
        assert result.code == 0, result.err
        return "own seed" in result.out

    assert call(evaluate.main, run, cwd=world).code == 0 and not scored()
    assert scored("--precision", "bf16") and not scored("--precision", "bf16") and scored()
    elsewhere = call(evaluate.main, run, "--report", "new", "--data-root", "nowhere", cwd=world)
    assert_one_sentence(elsewhere, "nowhere")

    picture = world / "own/test/stain/000.png"
    whole = picture.read_bytes()
    picture.write_bytes(b"")
    assert call(evaluate.main, run, "--skip-bad", cwd=world).code == 0
    picture.write_bytes(whole)
    assert scored()
    result = json.loads((tmp_path / "folder/own_seed0.json").read_text())
    assert (result["n_anomalous"], result["scored_in"]) == (5, "fp32")


def test_the_anatomy_of_a_run(world):
    """Its rows that evaluate.py has too are the same."""
    run = "runs/folder/own/seed1"
    assert call(evaluate.main, run, cwd=world).code == 0
    result = json.loads((world / run / "result.json").read_text())
    process = call(anatomy.main, run, cwd=world)
    assert process.code == 0, process.err
    rows = rows_of(process.out)
    for name, key in (
        (anatomy.SCORE, "auroc"),
        ("S_D", "auroc_score_d"),
        ("S_D with k = 20", "auroc_score_d"),
        ("S_A", "auroc_score_a"),
    ):
        assert rows[name] == [f"{result[key]:.2f}"], name
    assert "S_D, standardised per layer and position" in rows
    assert_one_sentence(call(anatomy.main, cwd=world), "required: RUN")


def test_the_noise_of_two_students(world):
    """The second table: the seeds of one category against one another, on held-out images."""
    seeds = [f"runs/folder/own/seed{seed}" for seed in (0, 1)]
    result = call(anatomy.main, *seeds, cwd=world)
    assert result.code == 0, result.err
    [_, mean, table] = result.out.split("\n\n")
    both, labels = [], []
    for seed in seeds:
        assert call(evaluate.main, seed, cwd=world).code == 0
        with open(world / seed / "scores.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        both.append([float(row["score"]) for row in rows])
        labels = [int(row["label"]) for row in rows]
    expected = evaluate.auroc([sum(pair) / 2 for pair in zip(*both, strict=True)], labels)
    assert mean == f"{anatomy.SCORE}, the mean of own seed0, own seed1: {expected:.2f}"
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert len(rows) == 2 * 4
    assert rows[0][-1] == rows[4][-1] and rows[0][-1].endswith("% |")

    generator = torch.Generator().manual_seed(0)
    common = torch.randn(50, 10, generator=generator)
    own = torch.randn(2, 50, 10, generator=generator)
    assert anatomy.noise([{3: common}, {3: common}]) == {3: 0}
    assert anatomy.noise([{3: own[0]}, {3: own[1]}])[3] == pytest.approx(1, abs=0.1)
    mixed = anatomy.noise([{3: common + own[0]}, {3: common + own[1]}])
    assert mixed[3] == pytest.approx(0.5, abs=0.05)


def test_standardised_per_layer():
    """One mean and one deviation of all patches; the class token keeps its own."""
    normal = {3: torch.tensor([[1.0, 2.0, 10.0], [3.0, 4.0, 14.0], [5.0, 6.0, 18.0]])}
    normal[6] = normal[3] + 1
    test = {3: torch.tensor([[5.0, 8.0, 8.0]]), 6: torch.tensor([[6.0, 9.0, 9.0]])}
    patches = normal[3][:, 1:]
    expected = 2 * (1 + (8 - patches.mean()) / patches.std())
    score = anatomy.per_layer(normal).standardised_score_d(test, 2)
    torch.testing.assert_close(score, expected[None])


def test_variants_of_the_score():
    generator = torch.Generator().manual_seed(0)
    diffs = {c: torch.rand(4, 31, generator=generator) for c in (3, 6)}
    s_a = torch.rand(4, generator=generator)

    def hottest(k, *layers):
        return sum(diffs[c][:, 1:].sort(descending=True).values[:, :k].mean(dim=1) for c in layers)

    cls = diffs[3][:, 0] + diffs[6][:, 0]
    expected = {
        anatomy.SCORE: cls + hottest(20, 3, 6) + s_a,
        "S_D": cls + hottest(20, 3, 6),
        "S_A": s_a,
        "S_D, class tokens only": cls,
        "S_D, patches only": hottest(20, 3, 6),
        "S_D, layer 3 only": diffs[3][:, 0] + hottest(20, 3),
        "S_D, layer 6 only": diffs[6][:, 0] + hottest(20, 6),
        **{f"S_D with k = {k}": cls + hottest(k, 3, 6) for k in (1, 5, 20, 30)},
        **{f"S_D + {w} S_A": cls + hottest(20, 3, 6) + w * s_a for w in (2, 5, 10, 20)},
    }
    torch.testing.assert_close(anatomy.variants(diffs, s_a, 20), expected)


def test_on_the_defect():
    """Of 4 x 4 patches the mask touches four; of the three hottest, two."""
    masks = torch.zeros(2, 8, 8, dtype=torch.uint8)
    masks[0, 1:4, 1:4] = 1
    d = torch.zeros(2, 17)
    d[:, 0] = 9  # a class token is no patch
    d[:, [1 + 0, 1 + 5]] = 2
    d[:, 1 + 15] = 1
    shares = anatomy.on_the_defect({3: d}, masks, torch.tensor([True, False]), 3)
    assert shares == {"all patches": 25, "the 3 hottest of layer 3": pytest.approx(200 / 3)}
    assert anatomy.on_the_defect({3: d}, masks, torch.tensor([False, False]), 3) == {}


def test_found_and_missed(monkeypatch):
    """One image is above delta and hot on its defect, one is below and hot elsewhere."""
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[1:, :4, :4] = 1
    d = torch.zeros(3, 17)
    d[1, 1 + 0], d[2, 1 + 15] = 5, 1
    split = data.Split(torch.zeros(3, 3, 8, 8), [0, 1, 1], [], masks=masks)
    monkeypatch.setattr(anatomy, "test_split", lambda *_, **options: split)
    monkeypatch.setattr(anatomy, "score_parts", lambda *_: ({3: d}, torch.zeros(3)))
    teacher, delta = SimpleNamespace(image_size=8), torch.tensor(4.0)
    model = SimpleNamespace(teacher=teacher, top_k=1, layers=(3,), delta=delta)
    place = {"dataset": "folder", "data_root": "own", "category": "own"}
    numbers, _, _ = anatomy.column(place, model, None)
    shares = [
        numbers[f"on the defect, %, {word}: the 1 hottest of layer 3"]
        for word in ("found", "missed")
    ]
    assert shares == [100, 0]


def test_the_noise_table_has_mean_and_deviation_of_the_patches():
    normal = {3: torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 6.0]])}
    text = anatomy.noise_table(["own seed0"], [normal], [{"seed": 0}])
    assert text.splitlines()[-1] == "| own seed0 | 3 | 3.000 | 2.160 |  |"
