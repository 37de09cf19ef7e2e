"""The ablations: convolutional networks as sources of tokens, and the figures' tables."""
import csv
import re
from types import SimpleNamespace

import pytest
import torch
import torchvision
from conftest import ROOT, assert_one_sentence, make_category, run, save_vit, shared, tiny_vit
from safetensors.torch import save_file

from ablations.backbones import BACKBONES, load
from ablations.run import COLUMNS, FIGURES, PARTS_OF_5, bars, differences, make, read, table, verdict

RUN = ROOT / "ablations" / "run.py"


def random_weights(name, path):
    torch.manual_seed(0)
    network = getattr(torchvision.models, name)()
    save_file({key: x for key, x in network.state_dict().items() if not key.startswith(("classifier", "fc"))}, path)
    return network.eval()


@pytest.mark.parametrize("name, outputs", [("vgg16", [f"features.{i}" for i in (4, 9, 16, 23, 30)]), ("resnet18", [f"layer{i}" for i in (1, 2, 3, 4)])])
def test_tokens_are_what_torchvisions_stages_put_out(name, outputs, tmp_path):
    network, features = random_weights(name, tmp_path / "weights.safetensors"), []
    for module in outputs:
        network.get_submodule(module).register_forward_hook(lambda module, x, y: features.append(y.clone()))
    teacher = load(name, tmp_path / "weights.safetensors", 64)
    images = teacher.prepare(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        network(images)
        tokens = teacher(images, tuple(range(len(outputs))))
    for c, x in enumerate(features):
        assert tokens[c].shape == (2, 1 + x.shape[2] * x.shape[3], x.shape[1])
        torch.testing.assert_close(tokens[c][:, 0], x.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens[c][:, 1 + x.shape[3]], x[:, :, 1, 0], rtol=1e-5, atol=1e-5)  # row 1, column 0
    assert teacher.config == {"image_size": 64, "width": x.shape[1], "grid": x.shape[2]}
    student = type(teacher)(**teacher.config)
    assert student.config == teacher.config and not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_batch_normalisation_follows_the_gradient():
    student = BACKBONES["resnet18"](64)
    images, before = torch.randn(4, 3, 64, 64), student.blocks[0][1].running_mean.clone()
    with torch.no_grad():
        student(images, (0,))
    assert torch.equal(student.blocks[0][1].running_mean, before)
    student(images, (0,))
    assert not torch.equal(student.blocks[0][1].running_mean, before)


@pytest.mark.parametrize("name, file", [("vgg16", "vgg16_features_imagenet1k_fp16"), ("resnet18", "resnet18_imagenet1k_fp16")])
def test_real_weights_load(name, file):
    teacher = load(name, shared(f"weights/{file}.safetensors"), 64)
    assert teacher.metadata["name"] == name and len(teacher.sha256) == 64


def test_weights_that_do_not_fit(tmp_path):
    random_weights("resnet18", tmp_path / "weights.safetensors")
    tensors = {key: x.clone() for key, x in torchvision.models.resnet18().state_dict().items()}
    for changes, words in (({"layer4.1.bn2.running_var": None}, "expected a tensor layer4.1.bn2.running_var"), ({"conv1.weight": torch.zeros(1)}, "conv1.weight")):
        save_file({key: x for key, x in {**tensors, **changes}.items() if x is not None}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=words):
            load("resnet18", tmp_path / "other.safetensors", 64)


def rows(**values):
    """values: variant -> category -> AUROC by seed"""
    return [{**dict.fromkeys(COLUMNS, ""), "variant": variant, "category": category, "seed": seed, "value": value}
            for variant, of in values.items() for category, numbers in of.items() for seed, value in enumerate(numbers)]


def test_differences_are_paired_by_seed_and_judged_by_their_spread():
    found = rows(a={"bottle": [90.0, 80.0], "pill": [70.0, 60.0]}, b={"bottle": [92.0, 82.0], "pill": [70.0, 61.0]})
    assert differences(found, "b", "a", "bottle") == [2.0, 2.0] and differences(found, "b", "a") == [1.0, 1.5]
    assert verdict([2.0, 2.0]) == "better" and verdict([-2.0, -2.1]) == "worse"
    assert verdict([1.0, -0.5]) == "no difference beyond the spread" and "one seed" in verdict([5.0])


def test_the_table_and_the_chart_say_the_same():
    found = rows(**{"ResNet": {"bottle": [90.0, 80.0]}, "ResNet + L_anchor": {"bottle": [91.0, 81.0]}})
    text, chart = table("3c", found), bars("3c", found)
    assert "| bottle | 85.00 ± 7.07 | 86.00 ± 7.07 |" in text and "| ResNet + L_anchor against ResNet | mean | 1.00 ± 0.00 | better |" in text
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill="#(?:9ecae1|1f77b4)"', chart)]
    assert heights == pytest.approx([270 * 15 / 30, 270 * 16 / 30] * 2, abs=0.11)  # from 70, of bottle and of the mean


def test_figure_5_is_made_of_the_tables_of_others(tmp_path):
    numbers = {variant: {"bottle": [90.0 + i, 91.0 + i]} for i, variant in enumerate(dict.fromkeys(name for part in PARTS_OF_5 for name, _ in FIGURES[part][1]))}
    for part in PARTS_OF_5:
        with open(tmp_path / f"figure_{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows(**{variant: numbers[variant] for variant, _ in FIGURES[part][1]}))
    args = SimpleNamespace(results=tmp_path, categories=["bottle"], seeds=(0, 1))
    made = make("5", args, [])
    assert [(row["variant"], row["value"]) for row in made] == [(variant, str(x)) for variant, _ in FIGURES["5"][1] for x in numbers[variant]["bottle"]]
    assert (tmp_path / "figure_5.md").read_text() == table("5", made) and (tmp_path / "figure_5.svg").read_text() == bars("5", made)
    assert read("5", SimpleNamespace(results=tmp_path, categories=["bottle"], seeds=(0, 2))) == []  # a run is missing


def test_the_core_does_not_know_the_ablations():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("weights/*.py"), *ROOT.glob("results/*.py")]:
        assert not re.search(r"import.*\bablations\b|from ablations", file.read_text()), file


@pytest.mark.parametrize("path", sorted((ROOT / "ablations/results").glob("*.csv")), ids=lambda path: path.stem)
def test_tables_and_charts_follow_from_the_numbers_beside_them(path):
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    figure = path.stem.removeprefix("figure_")
    assert path.with_suffix(".md").read_text() == table(figure, found) and path.with_suffix(".svg").read_text() == bars(figure, found)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablations")
    make_category(folder / "data/bottle", train=4, good=3, bad=3)
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    random_weights("resnet18", folder / "resnet18.safetensors")
    return folder


@pytest.mark.parametrize("figure, options", [
    ("4", ()), ("3c", ("--resnet18", "resnet18.safetensors", "--image-size", 160)),
])
def test_a_figure_from_training_to_the_chart(world, figure, options):
    command = (RUN, "--figure", figure, "--categories", "bottle,bottle", "--seeds", "0,1", "--data-root", "data", "--weights", "teacher.safetensors", "--epochs", 1,
               "--results", "results", *options)
    process = run(*command, cwd=world)
    assert process.returncode == 0, process.stderr
    variants = [variant for variant, _ in FIGURES[figure][1]]
    with open(world / f"results/figure_{figure}.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"]) for row in found] == [(variant, seed) for variant in variants for seed in "01"]
    for row in found:
        assert row["value"] == row["auroc" if row["variant"].endswith("L_anchor") else "auroc_score_d"]
    assert table(figure, found) == (world / f"results/figure_{figure}.md").read_text()
    made = {path: path.stat().st_mtime_ns for path in world.glob("runs/ablations/*/*/*/*/result.json")}
    process = run(*command, cwd=world)
    assert process.returncode == 0 and process.stdout.count("complete, nothing to do") == 2 * len(variants)
    assert made == {path: path.stat().st_mtime_ns for path in made}


def test_bad_input_is_one_sentence(world):
    assert_one_sentence(run(RUN, "--figure", "3c", "--categories", "bottel", cwd=world), "bottel")
    assert_one_sentence(run(RUN, "--figure", "3c", "--categories", "bottle", cwd=world), "resnet18.safetensors", "ablations/README.md")
    assert_one_sentence(run(RUN, "--figure", "3c", "--seeds", "0,a", cwd=world), "--seeds", "ascending numbers")
    assert_one_sentence(run(RUN, "--figure", "3c", "--categories", "bottle", "--resnet18", "teacher.safetensors", cwd=world), "torchvision's resnet18", "conv1.weight")
    assert_one_sentence(run(RUN, "--figure", "4", "--categories", "bottle", "--weights", "teacher.safetensors", "--epoch", "x", cwd=world), "--epoch")
