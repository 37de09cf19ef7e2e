"""The ablations: CNNs as sources of tokens, and the figures' tables and charts."""

import csv
import json
import re
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import save_file

import runs
import train
from ablations import backbones, run
from ablations.run import COLUMNS, FIGURES, PARTS_OF_5, VARIANTS, bars, table
from conftest import ROOT, assert_one_sentence, call, make_category, save_vit, shared, tiny_vit
from runs import UserError

pytestmark = pytest.mark.usefixtures("own_cache")

# ----------------------------------------------------------------------------------------- networks


def random_weights(name, path):
    """Random weights of a network of torchvision, in a file without its classifier; -> it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        network = getattr(torchvision.models, name)()
    last = "fc" if name == "resnet18" else "classifier"
    setattr(network, last, torch.nn.Identity())  # VGG16's has 124 million weights
    network.to_empty(device="cpu")
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):  # as torchvision has it
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
    save_file(network.state_dict(), path)
    return network.eval()


OUTPUTS = {
    "vgg16": [f"features.{i}" for i in (4, 9, 16, 23, 30)],
    "resnet18": [f"layer{i}" for i in (1, 2, 3, 4)],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_tokens_are_what_torchvisions_stages_put_out(name, tmp_path):
    network, features = random_weights(name, tmp_path / "weights.safetensors"), []
    for module in OUTPUTS[name]:
        hook = lambda module, x, y: features.append(y.clone())  # noqa: E731
        network.get_submodule(module).register_forward_hook(hook)
    teacher = backbones.load(name, tmp_path / "weights.safetensors", 64)
    images = teacher.prepare(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    with torch.no_grad():
        network(images)
        tokens = teacher(images, tuple(range(len(OUTPUTS[name]))))
    assert len(features) == len(tokens) == len(OUTPUTS[name])
    for c, x in enumerate(features):
        _, width, h, w = x.shape
        assert tokens[c].shape == (2, 1 + h * w, width)
        torch.testing.assert_close(tokens[c][:, 0], x.mean(dim=(2, 3)), rtol=1e-5, atol=1e-5)
        second_row = tokens[c][:, 1 + w]  # its first column
        torch.testing.assert_close(second_row, x[:, :, 1, 0], rtol=1e-5, atol=1e-5)
    assert teacher.config == {"image_size": 64, "width": width, "grid": h}
    student = type(teacher)(**teacher.config)
    assert student.config == teacher.config
    assert not torch.equal(next(student.parameters()), next(teacher.parameters()))


def test_batch_normalisation_follows_the_gradient():
    student = backbones.BACKBONES["resnet18"](64)
    images = torch.randn(4, 3, 64, 64)
    before = student.blocks[0][1].running_mean.clone()
    with torch.no_grad():
        student(images, (0,))
    assert torch.equal(student.blocks[0][1].running_mean, before)
    student(images, (0,))
    assert not torch.equal(student.blocks[0][1].running_mean, before)


@pytest.mark.parametrize(
    "name, file",
    [("vgg16", "vgg16_features_imagenet1k_fp16"), ("resnet18", "resnet18_imagenet1k_fp16")],
)
def test_real_weights_load(name, file):
    teacher = backbones.load(name, shared(f"weights/{file}.safetensors"), 64)
    assert teacher.metadata["name"] == name and len(teacher.sha256) == 64


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layer4.1.bn2.running_var": None}, "expected a tensor layer4.1.bn2.running_var"),
        ({"conv1.weight": torch.zeros(1)}, "conv1.weight"),
        (
            {"bn1.bias": torch.full((64,), torch.inf)},
            "expected finite weights, got inf in bn1.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, changes, words):
    tensors = {**torchvision.models.resnet18().state_dict(), **changes}
    tensors = {key: x for key, x in tensors.items() if x is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=words):
        backbones.load("resnet18", tmp_path / "other.safetensors", 64)


# ------------------------------------------------------------------------------- tables and charts


def rows(**values):
    """{variant: {category: [AUROC by seed]}} -> rows of a figure's CSV"""
    return [
        dict.fromkeys(COLUMNS, "")
        | {"variant": variant, "category": category, "seed": seed, "value": value}
        for variant, categories in values.items()
        for category, numbers in categories.items()
        for seed, value in enumerate(numbers)
    ]


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", VARIANTS)
def test_without_l_anchor_s_d_alone_is_compared(name):
    trains_anchor = "anchor" not in " ".join(VARIANTS[name].options)
    assert VARIANTS[name].score == ("auroc" if trains_anchor else "auroc_score_d")


def test_what_each_variant_leaves_out():
    settings = {name: train.parse(variant.options)[0] for name, variant in VARIANTS.items()}
    assert {name: values.without for name, values in settings.items()} == {
        "VGG": "anchor,gram",
        "VGG + L_anchor": "gram",
        "ResNet": "anchor,gram",
        "ResNet + L_anchor": "gram",
        "ViT": "anchor,gram",
        "ViT + L_Gram": "anchor",
        "ViT + L_Gram + L_anchor": None,
        "position embedding learnt": None,
    }
    for name, values in settings.items():
        learnt = VARIANTS[name].backbone != "vit" or name == "position embedding learnt"
        assert values.pos_embed == ("learn" if learnt else "copy"), name


def test_differences_are_paired_by_seed_and_judged_by_their_spread():
    found = rows(
        a={"bottle": [90.0, 80.0], "pill": [70.0, 60.0]},
        b={"bottle": [92.0, 82.0], "pill": [70.0, 61.0]},
    )
    assert run.seed_means(found, "b") == {0: 81.0, 1: 71.5}
    assert run.seed_means(found, "b", "pill") == {0: 70.0, 1: 61.0}
    assert run.differences(found, "b", "a", "bottle") == [2.0, 2.0]
    assert run.differences(found, "b", "a") == [1.0, 1.5]
    assert run.verdict([2.0, 2.0]) == "better" and run.verdict([-2.0, -2.1]) == "worse"
    assert run.verdict([1.0, -0.5]) == "no difference beyond the spread"
    assert "one seed" in run.verdict([5.0])


def test_the_table_and_the_chart_say_the_same():
    values = {"ResNet": {"bottle": [90.0, 80.0]}, "ResNet + L_anchor": {"bottle": [91.0, 81.0]}}
    text, chart = table("3c", rows(**values)), bars("3c", rows(**values))
    assert "| bottle | 85.00 ± 7.07 | 86.00 ± 7.07 |" in text
    assert "| ResNet + L_anchor against ResNet | mean | 1.00 ± 0.00 | better |" in text
    heights = re.findall(r'height="([\d.]+)" fill="#(?:9ecae1|1f77b4)"/><path', chart)
    # From 70, of bottle and of the mean.
    expected = [270 * 15 / 30, 270 * 16 / 30] * 2
    assert [float(height) for height in heights] == pytest.approx(expected, abs=0.11)


def test_figure_5_is_made_of_the_tables_of_others(tmp_path):
    names = dict.fromkeys(name for part in PARTS_OF_5 for name, _ in FIGURES[part].variants)
    numbers = {name: {"bottle": [90.0 + i, 91.0 + i]} for i, name in enumerate(names)}
    for part in PARTS_OF_5:
        with open(tmp_path / f"figure_{part}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows(**{name: numbers[name] for name, _ in FIGURES[part].variants}))

    def request(seeds):
        options = ("--categories", "bottle", "--seeds", seeds, "--results", str(tmp_path))
        return run.parse(["--figure", "5", *options])

    made = run.make(*request("0,1"))
    assert [(row["variant"], row["value"]) for row in made] == [
        (name, str(x)) for name, _ in FIGURES["5"].variants for x in numbers[name]["bottle"]
    ]
    assert (tmp_path / "figure_5.md").read_text() == table("5", made)
    assert (tmp_path / "figure_5.svg").read_text() == bars("5", made)
    assert run.read_csv(*request("0,1")) == made
    assert run.read_csv(*request("0,2")) == []  # a run is missing

    path = tmp_path / "figure_5.csv"
    whole = path.read_text()
    name, other = (name for name, _ in FIGURES["5"].variants[:2])
    for changed in (whole.replace(f"{name},", "X,"), whole.replace(f"{name},", f"{other},")):
        assert changed != whole
        path.write_text(changed)
        assert run.read_csv(*request("0,1")) == []  # as many rows, but not of each variant


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "ablations/results").rglob("*.csv")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_tables_and_charts_follow_from_the_numbers_beside_them(path):
    figure = path.stem.removeprefix("figure_")
    assert path.with_suffix(".md").read_text() == table(figure, read(path))
    assert path.with_suffix(".svg").read_text() == bars(figure, read(path))


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a category `bottle` and tiny teachers."""
    folder = tmp_path_factory.mktemp("ablations")
    make_category(folder / "data/bottle", train=4, good=8, bad=8)
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    random_weights("resnet18", folder / "resnet18.safetensors")
    return folder


@pytest.mark.parametrize(
    "figure, seeds, options",
    [
        ("4", "01", ()),
        ("3c", "01", ("--resnet18", "resnet18.safetensors", "--image-size", 64, "--top-k", 4)),
    ],
)
def test_a_figure_from_training_to_the_chart(world, figure, seeds, options):
    command = (
        *("--figure", figure, "--categories", "bottle,bottle", "--seeds", ",".join(seeds)),
        *("--data-root", "data", "--weights", "teacher.safetensors", "--epochs", 1),
        *("--results", "results", *options),
    )
    result = call(run.main, *command, cwd=world)
    assert result.code == 0, result.err
    variants = [name for name, _ in FIGURES[figure].variants]
    made = read(world / f"results/figure_{figure}.csv")
    trained = [(row["variant"], row["seed"]) for row in made]
    assert trained == [(name, seed) for name in variants for seed in seeds]
    for name in variants:
        folder = name.replace(" + ", "+") + ("_64px" if figure == "3c" else "")
        expected, _, _ = train.parse(VARIANTS[name].options)
        configs = list((world / "runs/ablations" / folder).rglob("config.json"))
        assert len(configs) == len(seeds)
        for path in configs:
            assert json.loads(path.read_text())["settings"]["without"] == expected.without
    for row in made:
        trains_anchor = row["variant"].endswith("L_anchor")
        assert row["value"] == row["auroc" if trains_anchor else "auroc_score_d"]
    text = (world / f"results/figure_{figure}.md").read_text()
    assert text == table(figure, made) and text in result.out
    assert (world / f"results/figure_{figure}.svg").read_text() == bars(figure, made)

    scored = world.glob("runs/ablations/*/*/*/*/result.json")
    before = {path: path.stat().st_mtime_ns for path in scored}
    result = call(run.main, *command, cwd=world)
    assert result.code == 0, result.err
    assert result.out.count("complete, nothing to do") == len(trained)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_option_of_the_anchor_changes_no_score_that_is_compared(world):
    """The variant says which, and not the letters of its options."""
    command = ("--categories", "bottle", "--data-root", "data", "--weights", "teacher.safetensors")
    options = ("--epochs", 1, "--results", "ema", "--anchor", "ema", "--out", "ema")
    options = (*options, "--precision", "fp32")  # in bf16 S_D and score have the same AUROC here
    result = call(run.main, "--figure", 7, *command, *options, cwd=world)
    assert result.code == 0, result.err
    rows = read(world / "ema/figure_7.csv")
    assert all(row["value"] == row["auroc"] for row in rows)
    assert any(row["value"] != row["auroc_score_d"] for row in rows)


def test_runs_that_another_process_trains_are_waited_for(world):
    command = ("--categories", "bottle", "--data-root", "data", "--weights", "teacher.safetensors")
    name = "position_embedding_learnt"
    with runs.lock(world / f"left/ablations/{name}/mvtec/bottle/seed0"):
        options = ("--out", "left", "--results", "left")
        result = call(run.main, "--figure", 7, *command, *options, cwd=world)
    assert_one_sentence(result, "no other process trains", name, "give the command again")
    for figure in (7, 5):
        options = ("--results", "new", "--overwrite")
        result = call(run.main, "--figure", figure, *command, *options, cwd=world)
        assert_one_sentence(result, "--overwrite: expected none")


def test_fewer_categories_do_not_go_over_the_table_of_more(world):
    more = world / "more/figure_7.csv"
    more.parent.mkdir()
    shutil.copy(ROOT / "ablations/results/figure_7.csv", more)
    before = more.read_bytes()
    command = ("--categories", "bottle", "--data-root", "data", "--weights", "teacher.safetensors")
    result = call(run.main, "--figure", 7, *command, "--results", "more", cwd=world)
    words = "figure_7.csv: expected its categories and seeds, got none of bottle"
    assert_one_sentence(result, words)
    assert more.read_bytes() == before


def test_batch_normalisation_needs_more_than_one_position(world):
    options = ("--data-root", "data", "--resnet18", "resnet18.safetensors", "--image-size", 32)
    result = call(run.main, "--figure", "3c", "--results", "new", *options, cwd=world)
    assert_one_sentence(result, "--image-size: expected 33 or more for resnet18, got 32")


def test_it_runs_as_a_file_from_any_folder(wrong_category):
    assert_one_sentence(wrong_category, "run.py: error: ", "did you mean bottle")
