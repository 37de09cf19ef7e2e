"""train.py and evaluate.py on a few generated images and a tiny teacher."""

import contextlib
import csv
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import evaluate
import runs
import train
import vitad
from conftest import (
    ROOT,
    assert_one_sentence,
    call,
    make_category,
    run_script,
    save_vit,
    shared,
    tiny_vit,
)
from data import CATEGORIES
from evaluate import auroc, table, what_the_teacher_sees
from vit import load_vit
from vitad import Distillation
from weights import convert, train_demo_teacher

pytestmark = pytest.mark.usefixtures("own_cache")
RUN = "mvtec/bottle/seed0"


@pytest.fixture(scope="module")
def world(tmp_path_factory, own_cache):
    """A folder with a category `bottle`, a tiny teacher and one finished run."""
    folder = tmp_path_factory.mktemp("world")
    make_category(folder / "data" / "bottle", train=8)
    save_vit(tiny_vit(depth=4), folder / "teacher.safetensors")
    result = run_train(folder)
    assert result.code == 0, result.err
    assert result.err.splitlines() == [
        "note: bottle is not the official one: train/good 8 (official 209) images",
        "note: the run's 4 steps end within --warmup 20: the learning rate does not reach its peak",
        "note: 2 images held out: delta is a guess, which more normal images would make better",
    ]
    return folder


def arguments(world, **changes):
    """The command line of the run in `world`, or of another one."""
    values = {
        "dataset": "mvtec",
        "category": "bottle",
        "data_root": world / "data",
        "weights": world / "teacher.safetensors",
        "epochs": 2,
        "layers": "0,1,2,3",
        **changes,
    }
    return [
        part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)
    ]


def own_pictures(folder):
    return {"dataset": "folder", "data_root": folder, "category": folder.name}


def run_train(world, *options, cwd=None, **changes):
    """train.py in this process."""
    return call(train.main, *arguments(world, **changes), *options, cwd=cwd or world)


def run_evaluate(cwd, *options):
    """evaluate.py in this process."""
    return call(evaluate.main, *options, cwd=cwd)


def run_folder(world):
    return world / "runs" / RUN


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def model_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------- one run


def test_the_run_folder(world):
    folder = run_folder(world)
    names = {path.name for path in folder.iterdir()} - {"scores.csv", "result.json"}
    assert names == {"config.json", "log.jsonl", "model.safetensors"}
    config = read_json(folder / "config.json")
    assert config["settings"]["lr"] is None and config["lr"] == 8e-3
    assert config["settings"]["batch_size"] == 4
    assert config["settings"]["epochs"] == config["epochs"] == 2
    assert len(config["teacher"]["sha256"]) == 64
    assert config["versions"]["torch"] == torch.__version__
    log = read_log(folder)
    assert [line["step"] for line in log] == [2, 2, 4, 4, 4]
    assert {"epoch", "lr", "loss", "distill", "anchor", "gram", "images_per_s"} <= set(log[-3])
    assert {"epoch", "held_out_mean", "held_out"} <= set(log[-2])
    assert log[-1]["images"] == 2 and log[-1]["on_held_out"]
    assert log[-1]["score_d"]["std"] > 0 and log[-1]["delta"] > log[-1]["score"]["mean"]
    state = load_file(folder / "model.safetensors")
    assert state["anchor.count"] == 6 and state["delta"].isfinite()
    assert not any(key.startswith("teacher") for key in state)


@pytest.fixture(scope="module")
def in_a_terminal(world):
    """(process, its command, the terminal's other end, errors): the run of `world` again, begun."""
    terminal, end = pty.openpty()
    errors = world / "errors.txt"
    command = [str(part) for part in (ROOT / "train.py", *arguments(world, out="again"))]
    with open(errors, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=world,
            env={**os.environ, "PYTHONHASHSEED": "1"},
            stdout=end,
            stderr=file,
        )
    os.close(end)
    yield process, command, terminal, errors
    process.kill()
    process.wait()
    os.close(terminal)


def test_evaluate_prints_the_table_and_writes_scores(world, in_a_terminal):
    """From the command line, while the training of a test below runs."""
    process = run_script(ROOT / "evaluate.py", cwd=world)
    assert process.code == 0, process.err
    lines = process.out.splitlines()
    assert lines[-2].split()[:2] == ["bottle", "0"]
    assert lines[-1].split()[0] == "mean" and lines[-1].split()[2] == "100.00"
    result = read_json(run_folder(world) / "result.json")
    assert result["command"] == shlex.join(["python", str(ROOT / "evaluate.py")])
    with open(run_folder(world) / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = ["score_d", "score_a_teacher", "score_a_student"]
    assert list(rows[0]) == ["image", "label", "score", *parts]
    good = [f"test/good/{i:03d}.png" for i in range(4)]
    bad = [f"test/stain/{i:03d}.png" for i in range(5)]
    assert [row["image"] for row in rows] == good + bad
    labels = [0] * 4 + [1] * 5
    assert [int(row["label"]) for row in rows] == labels
    scores = np.array([float(row["score"]) for row in rows])
    total = sum(np.array([float(row[part]) for row in rows]) for part in parts)
    np.testing.assert_allclose(scores, total, rtol=1e-6)
    assert result["auroc"] == pytest.approx(naive_auroc(scores, labels))
    teachers = np.array([float(row["score_a_teacher"]) for row in rows])
    assert result["auroc_score_a_teacher"] == pytest.approx(naive_auroc(teachers, labels))
    anchors = teachers + np.array([float(row["score_a_student"]) for row in rows])
    assert result["auroc_score_a"] == pytest.approx(naive_auroc(anchors, labels))
    assert lines[-1].split()[1] == f"{result['auroc']:.2f}"
    expected = {
        "dataset": "mvtec",
        "category": "bottle",
        "seed": 0,
        "paper_auroc": 100.0,
        "n_normal": 4,
        "n_anomalous": 5,
    }
    assert expected.items() <= result.items()


def test_another_seed_gives_other_bytes(world):
    assert run_train(world, out="other", seed=1).code == 0
    other = model_bytes(world / "other/mvtec/bottle/seed1")
    assert other != model_bytes(run_folder(world))


def test_the_command_line_in_a_terminal_gives_the_same_bytes(world, in_a_terminal):
    """With other hashes; progress is one line that is written over."""
    process, command, terminal, errors = in_a_terminal
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 4096):
            shown += part
    assert process.wait() == 0, errors.read_text()
    assert b"\r\x1b[Kepoch 2 step 4/4 loss" in shown and b"distill" in shown
    assert b"images/s 0:00 left" in shown
    assert model_bytes(world / "again" / RUN) == model_bytes(run_folder(world))
    config = read_json(world / "again" / RUN / "config.json")
    assert config["command"] == shlex.join(["python", *command])


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_keeping_the_teachers_features_changes_nothing(world, tmp_path, cache):
    assert run_train(world, out=tmp_path, cache=cache).code == 0
    kept = load_file(run_folder(world) / "model.safetensors")
    computed = load_file(tmp_path / RUN / "model.safetensors")
    for key, value in kept.items():
        torch.testing.assert_close(computed[key], value, rtol=1e-4, atol=1e-6)
    names = sorted(path.name for path in (tmp_path / RUN).iterdir())
    assert names == ["config.json", "log.jsonl", "model.safetensors"]


def test_compile_compiles_the_losses_and_changes_nothing(world, tmp_path, monkeypatch):
    compiled = []

    def without_compiler(function, **options):
        compiled.append(function.__name__)
        return torch_compile(function, backend="eager", **options)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", without_compiler)
    assert run_train(world, "--compile", out=tmp_path).code == 0
    assert compiled == ["loss_terms"]
    eager = load_file(run_folder(world) / "model.safetensors")
    ours = load_file(tmp_path / RUN / "model.safetensors")
    for key, value in eager.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-6)


def test_weights_that_the_last_step_breaks(world, tmp_path, monkeypatch):
    take_step = train.Training.take_step

    def break_last(self, images, t):
        terms = take_step(self, images, t)
        if self.step + 1 == self.steps:
            with torch.no_grad():
                self.parameters[0].fill_(torch.inf)
        return terms

    monkeypatch.setattr(train.Training, "take_step", break_last)
    result = run_train(world, out=tmp_path)
    assert result.code == 2 and "stopped being finite" in result.err
    assert not (tmp_path / RUN / "model.safetensors").exists()


def test_scores_that_are_not_finite(world, tmp_path, monkeypatch):
    scores = Distillation.scores

    def broken(*args):
        return {name: x * torch.nan for name, x in scores(*args).items()}

    shutil.copytree(run_folder(world), tmp_path / "run", ignore=shutil.ignore_patterns("*.csv"))
    (tmp_path / "run/result.json").unlink(missing_ok=True)
    monkeypatch.setattr(Distillation, "scores", broken)
    assert_one_sentence(run_evaluate(world, tmp_path / "run"), "expected finite scores")
    assert not (tmp_path / "run/result.json").exists()


def test_overwrite_leaves_nothing_of_the_old_run(world, tmp_path, monkeypatch):
    def stop(self, progress, stop):
        raise KeyboardInterrupt

    folder = tmp_path / RUN
    shutil.copytree(run_folder(world), folder)
    for name in ("checkpoint.safetensors", "scores.csv", "training.svg", "roc.svg"):
        (folder / name).write_text("old")
    monkeypatch.setattr(train.Training, "loop", stop)
    assert run_train(world, "--overwrite", out=tmp_path).code == 130
    assert {path.name for path in folder.iterdir()} == {"config.json", "log.jsonl"}
    assert (folder / "log.jsonl").read_text() == ""


def test_a_seed_is_another_one_in_another_category(world, tmp_path):
    states = []
    for name in ("a", "b"):
        shutil.copytree(world / "data/bottle", tmp_path / name)
        own = own_pictures(tmp_path / name)
        result = run_train(world, out=tmp_path / "runs", epochs=1, holdout=0, **own)
        assert result.code == 0, result.err
        states.append(load_file(tmp_path / f"runs/folder/{name}/seed0/model.safetensors"))
    first, second = (state["student.cls_token"] for state in states)
    assert not torch.equal(first, second)


def test_runs_evaluated_together_score_as_when_alone(world, tmp_path):
    for seed in (0, 1):
        assert run_train(world, out=tmp_path, seed=seed, epochs=1).code == 0
    folders = [tmp_path / "mvtec/bottle" / f"seed{seed}" for seed in (0, 1)]
    assert run_evaluate(world, "--out", tmp_path).code == 0
    together = [(folder / "scores.csv").read_bytes() for folder in folders]
    for folder, scores in zip(folders, together, strict=True):
        assert run_evaluate(world, folder).code == 0
        assert (folder / "scores.csv").read_bytes() == scores
    assert together[0] != together[1]


def test_the_teacher_sees_the_test_images_of_a_protocol_once():
    def sees(dataset, category, teacher="0", **changes):
        settings = {
            "dataset": dataset,
            "category": category,
            "data_root": "data",
            "layers": [3, 6, 9, 11],
            **changes,
        }
        teacher = {"sha256": teacher}
        return what_the_teacher_sees(("run", {"settings": settings, "teacher": teacher}))

    assert sees("cifar10", "cat") == sees("cifar10", "dog", seed=1)
    assert sees("cifar10", "cat") != sees("cifar100", "fish")
    assert sees("mvtec", "pill") != sees("mvtec", "bottle")
    assert sees("mvtec", "pill") == sees("mvtec", "pill", seed=1)
    assert sees("cifar10", "cat") != sees("cifar10", "cat", layers=[11])
    assert sees("cifar10", "cat") != sees("cifar10", "cat", data_root="elsewhere")
    assert sees("cifar10", "cat") != sees("cifar10", "cat", teacher="1")


def test_eq10_counts_a_score_of_delta_as_anomalous():
    scores, labels = torch.tensor([1.0, 2.0, 2.0, 3.0]), np.array([0, 0, 1, 1])
    assert evaluate.at_delta(scores, labels, 2.0) == {"delta": 2.0, "false_alarms": 1, "misses": 0}


def test_misses_are_counted_by_kind_of_defect(tmp_path):
    names = [f"test/{name}.png" for name in ("good/0", "a/0", "a/1", "b/0")]
    split = data.Split(None, [0, 1, 1, 1], names)
    scores = dict.fromkeys(evaluate.SCORES[:4], torch.tensor([0.0, 0.0, 2.0, 0.5]))
    model = SimpleNamespace(delta=1.0, normal=None, precision="fp32")
    settings = {"dataset": "folder", "category": "own", "seed": 0}
    config = {"settings": settings, "teacher": {"sha256": "0"}}
    result = evaluate.summarise(evaluate.Scored(tmp_path, config, model, split, scores))
    assert result["misses_by_kind"] == {"a": [1, 2], "b": [1, 1]} and result["misses"] == 2


def test_mistakes_in_words():
    result = {"category": "own", "seed": 0, "delta": 1.0, "false_alarms": 1, "n_normal": 4}
    result |= {"misses_by_kind": {"a": [2, 3], "b": [0, 2]}, "n_anomalous": 5}
    result |= {"delta_standardised": 3.0}
    result |= {"false_alarms_standardised": 2, "misses_standardised": 3}
    assert evaluate.mistakes(result) == (
        "own seed 0, delta 1.000: false alarms 1 of 4; missed: a 2 of 3, b 0 of 2\n"
        "  by S_D standardised, delta 3.000: false alarms 2 of 4; missed 3 of 5"
    )


def test_a_teacher_that_has_moved_is_named(world, tmp_path):
    shutil.copytree(world / "runs", tmp_path / "runs")
    path = run_folder(tmp_path) / "config.json"
    path.write_text(path.read_text().replace(str(world / "teacher"), "gone"))
    options = (run_folder(tmp_path), "--weights", world / "teacher.safetensors")
    picture = world / "data/bottle/test/good/000.png"
    for more in ((), ("--images", picture)):
        assert_one_sentence(run_evaluate(world, options[0], *more), "gone.safetensors")
        assert run_evaluate(world, *options, *more).code == 0


def test_training_reads_no_test_image(world, tmp_path):
    """There is no test split at all."""
    shutil.copytree(world / "data/bottle/train", tmp_path / "data/bottle/train")
    shutil.copy(world / "teacher.safetensors", tmp_path)
    assert run_train(tmp_path).code == 0
    assert model_bytes(run_folder(tmp_path)) == model_bytes(run_folder(world))
    assert_one_sentence(run_evaluate(tmp_path), "test: expected folders of test images")
    assert "test_split" not in (ROOT / "train.py").read_text()


def test_a_complete_run_is_kept(world):
    before = {path: path.read_bytes() for path in run_folder(world).iterdir()}
    result = run_train(world)
    assert result.code == 0 and "complete, nothing to do" in result.out
    assert_one_sentence(run_train(world, lr=0.1), "lr None -> 0.1", "--overwrite")
    assert {path: path.read_bytes() for path in run_folder(world).iterdir()} == before


def test_overwrite_starts_again(world, tmp_path):
    shutil.copytree(world / "runs", tmp_path / "runs")
    (run_folder(tmp_path) / "result.json").touch()
    (run_folder(tmp_path) / "failures").mkdir()
    (run_folder(tmp_path) / "failures/index.html").touch()
    result = run_train(world, "--overwrite", cwd=tmp_path, epochs=1)
    assert result.code == 0, result.err
    assert read_json(run_folder(tmp_path) / "config.json")["settings"]["epochs"] == 1
    assert not (run_folder(tmp_path) / "result.json").exists()  # it belonged to the old run
    assert not (run_folder(tmp_path) / "failures").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "mse", "clip_grad": 1, "anchor": "ema", "optimizer": "sgd"},
        {"distance": "l2", "clip_grad": 1, "pos_embed": "learn"},
        {"optimizer": "sgd", "layers": "1,3", "top_k": 3, "momentum": 0},
        {"precision": "bf16", "cache": "disk"},
        {"precision": "tf32", "cache": "off"},
        {"weight_decay": 0.1},
        {"optimizer": "adamw"},
        {"layers": "3"},
        {"decay": "constant", "warmup": 0, "lam": 0, "batch_size": 64},
    ],
)
def test_every_option_trains_and_evaluates(world, tmp_path, options):
    result = run_train(world, out=tmp_path, epochs=1, **options)
    assert result.code == 0, result.err
    result = run_evaluate(world, "--out", tmp_path)
    assert result.code == 0, result.err
    expected = {"sgd": 0.2, "adamw": 1e-3}.get(options.get("optimizer"), 8e-3)
    assert read_json(tmp_path / RUN / "config.json")["lr"] == expected


@pytest.mark.parametrize("without", ["gram", "anchor"])
def test_every_setting_reaches_the_training(world, tmp_path, monkeypatch, without):
    steps = []
    take_step = train.Training.take_step

    def take_and_note(self, images, t):
        precision = self.model.precision
        terms = take_step(self, images, t)
        gradients = [p.grad.norm() for p in self.parameters if p.grad is not None]
        (group,) = self.optimizers[0].param_groups
        steps.append(
            {
                "precision": precision,
                "gradient": torch.stack(gradients).norm().item(),
                "loss": terms["loss"].item(),
                **{name: group[name] for name in ("lr", "momentum", "weight_decay")},
            }
        )
        return terms

    monkeypatch.setattr(train.Training, "take_step", take_and_note)
    model = {"distance": "mse", "lam": 0.5, "top_k": 7, "anchor": "ema", "pos_embed": "learn"}
    recipe = {"optimizer": "sgd", "lr": 0.2, "momentum": 0.3, "weight_decay": 0.25, "warmup": 2}
    recipe |= {"clip_grad": 1e-3, "decay": "linear", "precision": "bf16", "without": without}
    result = run_train(world, out=tmp_path, **model, **recipe)
    assert result.code == 0, result.err
    assert [step["lr"] for step in steps] == pytest.approx([0.1, 0.2, 0.2, 0.1])
    for step in steps:
        assert (step["precision"], step["momentum"], step["weight_decay"]) == ("bf16", 0.3, 0.25)
        assert step["gradient"] == pytest.approx(1e-3, rel=1e-2)
    lines = [line for line in read_log(tmp_path / RUN) if "loss" in line]
    for line, pair in zip(lines, (steps[:2], steps[2:]), strict=True):
        assert without not in line
        other = line["anchor" if without == "gram" else "gram"]
        assert line["loss"] == pytest.approx(line["distill"] + 0.5 * other)
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in pair) / 2)
    loaded = runs.load(tmp_path / RUN)
    assert (loaded.reading, loaded.lam, loaded.top_k) == ("mse", 0.5, 7)
    assert loaded.anchor.kind == "ema" and loaded.anchor.decay == 0.99
    assert loaded.anchor.count == 4  # an EMA goes on after the first epoch
    assert loaded.student.pos_embed.requires_grad


def test_the_papers_settings_are_those_of_each_data_set():
    """Section 4.1: batch size, and SGD's learning rate."""
    for dataset, lr, batch_size in (
        ("cifar10", 0.1, 32),
        ("cifar100", 0.1, 32),
        ("fashion_mnist", 0.1, 32),
        ("mvtec", 0.2, 4),
    ):
        command = ["--dataset", dataset, "--category", "0", "--optimizer", "sgd"]
        settings, _, _ = train.parse(command)
        assert (settings.lr, settings.batch_size) == (lr, batch_size)
        assert (settings.layers, settings.lam, settings.top_k) == ((3, 6, 9, 11), 1, 20)


@pytest.mark.parametrize(
    "capabilities, precision",
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32")],
)
def test_precision_is_bf16_where_the_hardware_has_it_and_for_training_alone(
    world, tmp_path, monkeypatch, capabilities, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    scored_in = []
    real = Distillation.compare
    monkeypatch.setattr(
        Distillation, "compare", lambda self, x: scored_in.append(self.precision) or real(self, x)
    )
    result = run_train(world, "--device", "cpu", out=tmp_path, epochs=1)
    assert result.code == 0, result.err
    assert f" in {precision}, teacher" in result.out
    assert read_json(tmp_path / RUN / "config.json")["settings"]["precision"] == precision
    assert set(scored_in) == {"fp32"}
    # Where the same command means something else, that is said.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": precision == "fp32"})
    result = run_train(world, "--device", "cpu", "--resume", out=tmp_path, epochs=1)
    assert_one_sentence(result, f"precision {precision}")


@pytest.mark.parametrize("capability, precision", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_multiplies_bf16_from_capability_8_on(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert runs.multiplies_bf16("cuda:1") == precision


@pytest.mark.parametrize(
    "options, lr, lr_rest",
    [({}, 8e-3 * 0.5**0.5, 5e-4), ({"lr": 0.002, "lr_rest": 0.001}, 0.002, 0.001)],
)
def test_a_wider_student_learns_at_a_lower_rate_unless_told_otherwise(
    world, tmp_path, options, lr, lr_rest
):
    teacher = save_vit(tiny_vit(width=384, depth=2), tmp_path / "wide.safetensors")
    changes = {"weights": teacher, "layers": "0,1", "warmup": 0, "decay": "constant", **options}
    result = run_train(world, out=tmp_path, **changes)
    assert result.code == 0, result.err
    config = read_json(tmp_path / RUN / "config.json")
    assert config["lr"] == pytest.approx(lr) and config["lr_rest"] == pytest.approx(lr_rest)
    assert {line["lr"] for line in read_log(tmp_path / RUN) if "lr" in line} == {config["lr"]}


def test_both_optimisers_follow_the_schedule_each_from_its_own_peak(world, tmp_path, monkeypatch):
    rates, take_step = [], train.Training.take_step

    def noted(self, images, t):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in self.optimizers])
        return take_step(self, images, t)

    monkeypatch.setattr(train.Training, "take_step", noted)
    assert run_train(world, out=tmp_path, lr=0.002, lr_rest=0.001, warmup=2).code == 0
    shares = [0.5, 1, 1, 0.5]
    assert rates == [pytest.approx([0.002 * share, 0.001 * share]) for share in shares]
    lines = [line["lr"] for line in read_log(tmp_path / "mvtec/bottle/seed0") if "lr" in line]
    assert lines == pytest.approx([0.002, 0.001])  # of the steps 2 and 4


def test_pictures_are_read_in_the_teachers_size(world, tmp_path, monkeypatch):
    teacher = save_vit(tiny_vit(depth=1, grid=8), tmp_path / "larger.safetensors")
    sizes, decode = [], data.decode
    monkeypatch.setattr(
        data,
        "decode",
        lambda folder, paths, size: sizes.append(size) or decode(folder, paths, size),
    )
    result = run_train(world, out=tmp_path, weights=teacher, layers="0", epochs=1)
    assert result.code == 0, result.err
    assert run_evaluate(world, "--out", tmp_path).code == 0
    assert sizes == [256, 256]


# ------------------------------------------------------------------------------ what can go wrong


def test_a_diverging_run_ends_in_one_sentence_and_keeps_the_last_checkpoint(world, tmp_path):
    shutil.copytree(world / "data" / "bottle", tmp_path / "own")
    broken = {"epochs": 40, "optimizer": "sgd", "distance": "mse", "lr": 1e6, "warmup": 1000}
    pictures = own_pictures(tmp_path / "own")  # of which no note comes before the sentence
    result = run_train(world, out=tmp_path, checkpoint_every=0, **broken, **pictures)
    assert_one_sentence(result, "stopped being finite", "holds the last good step", "--clip-grad 1")
    folder = tmp_path / "folder/own/seed0"
    assert not (folder / "model.safetensors").exists()
    for key, value in load_file(folder / "checkpoint.safetensors").items():
        if key not in ("delta", "heat_scale"):  # which the end of training sets
            assert value.isfinite().all(), key
    assert_one_sentence(run_evaluate(world, folder), "model.safetensors", "unfinished")


@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["train.py", "evaluate.py"])
def test_help(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: " in shown and "python evaluate.py" in shown and "--device" in shown


def test_threads_spin_briefly_unless_told_otherwise(tmp_path, monkeypatch):
    """In scripts, known before torch is imported; not where their modules are imported."""
    stub = "import os, sys\nsys.exit(os.environ.get('GOMP_SPINCOUNT', 'default'))\n"
    (tmp_path / "torch.py").write_text(stub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    for name in ("train", "evaluate"):
        assert run_script(f"{name}.py").err == "1000\n"
        assert run_script(f"{name}.py", env={"GOMP_SPINCOUNT": "5"}).err == "5\n"
        assert run_script("-c", f"import {name}").err == "default\n"


# --------------------------------------------------------------- own pictures, all categories


def test_own_pictures_in_a_folder(world, tmp_path):
    teacher = ("--weights", world / "teacher.safetensors", "--epochs", 1, "--layers", "0,1,2,3")
    for name in ("all", "my parts"):
        shutil.copytree(world / "data" / "bottle", tmp_path / name)
    options = ("--dataset", "folder", "--data-root", "all", *teacher, "--out", "other")
    result = call(train.main, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    # "all" is a folder's name here, and no category.
    assert (tmp_path / "other/folder/all/seed0/model.safetensors").exists()
    options = ("--dataset", "folder", "--data-root", tmp_path / "my parts", *teacher)
    result = call(train.main, *options, cwd=tmp_path)
    assert result.code == 0, result.err
    result = run_evaluate(tmp_path)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[1].startswith("folder: image AUROC")
    assert lines[-1].split()[0] == "mean" and lines[-1].split()[2] == "n/a"  # no paper has it
    result = read_json(tmp_path / "runs/folder/my_parts/seed0/result.json")
    assert result["category"] == "my parts" and result["paper_auroc"] is None
    assert 0 <= result["auroc"] <= 100


def test_standardised_scores(world, tmp_path):
    """Of a run that enough images calibrate; the paper's score beside it stays as it is."""
    own = make_category(tmp_path / "own", train=10)
    assert run_train(world, holdout=0.5, cwd=tmp_path, **own_pictures(own)).code == 0
    run = tmp_path / "runs/folder/own/seed0"
    result = run_evaluate(tmp_path)
    assert result.code == 0, result.err

    model = runs.load(run)
    images = data.train_split("folder", own, "own").images
    index = train.hold_out(train.Settings(dataset="folder", category="own", holdout=0.5), 10)[1]
    expected = vitad.Standardiser.of(model.compare(images[index])[0])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.normal.state_dict()[name], value, rtol=1e-3, atol=1e-5)

    numbers = read_json(run / "result.json")
    delta = numbers["delta_standardised"]
    assert delta == pytest.approx(expected.delta.item(), rel=1e-3)
    split = data.test_split("folder", own, "own")
    both = model.scores(split.images)
    scores, labels = both["score_d_standardised"].numpy(), np.array(split.labels)
    with open(run / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score_d_standardised"]) for row in rows] == pytest.approx(scores, rel=1e-3)
    assert [float(row["score"]) for row in rows] == pytest.approx(both["score"], rel=1e-3)
    assert numbers["auroc_standardised"] == auroc(scores, labels)
    assert numbers["auroc"] == auroc(both["score"], labels)
    assert numbers["false_alarms_standardised"] == (scores >= delta)[labels == 0].sum()
    assert numbers["misses_standardised"] == (scores < delta)[labels == 1].sum()
    assert f"  by S_D standardised, delta {delta:.3f}: false alarms" in result.out
    assert f"{numbers['auroc_standardised']:.2f}" in result.out.splitlines()[-1]

    pictures = ("--images", own / "test/good", own / "test/stain")
    by_name = dict(zip(split.names, scores, strict=True))
    for options, column, threshold in (
        ((), "score", numbers["delta"]),
        (("--standardised",), "score_d_standardised", delta),
    ):
        lines = run_evaluate(tmp_path, *pictures, "--json", *options).out.splitlines()
        lines = [json.loads(line) for line in lines]
        assert [line["anomalous"] for line in lines] == [x[column] >= threshold for x in lines]
        for x in lines:
            name = x["image"].removeprefix(f"{own}/")
            assert x["score_d_standardised"] == pytest.approx(by_name[name], rel=1e-3)
            parts = x["score_d"] + x["score_a_teacher"] + x["score_a_student"]
            assert x["score"] == pytest.approx(parts)
            assert (x["delta"], x["delta_standardised"]) == (numbers["delta"], delta)
        text = run_evaluate(tmp_path, *pictures, *options).out.splitlines()[1:]
        assert [float(line.split()[0]) for line in text] == [
            pytest.approx(x[column], abs=1e-3) for x in lines
        ]


def test_images_held_out_measure_and_calibrate_and_teach_nothing(world, tmp_path):
    """A run on a folder without those images gives the same student. delta is theirs."""
    make_category(tmp_path / "all/own", train=10)
    make_category(tmp_path / "rest/own", train=10)
    generator = torch.Generator().manual_seed(zlib.crc32(b"folder/own"))
    held_out = torch.randperm(10, generator=generator)[:3].sort().values
    for i in held_out:
        (tmp_path / f"rest/own/train/good/{i:03d}.png").unlink()
    results = {}
    for name, holdout, measured in (("all", 0.3, 2), ("rest", 0, 0)):
        pictures = own_pictures(tmp_path / name / "own")
        result = run_train(
            world, out=tmp_path / name, holdout=holdout, precision="fp32", **pictures
        )
        results[name] = result
        assert result.code == 0, result.err
        assert result.out.count(" held out 0.") == measured
    folder = tmp_path / "all/folder/own/seed0"
    whole = load_file(folder / "model.safetensors")
    rest = load_file(tmp_path / "rest/folder/own/seed0/model.safetensors")
    for key, value in whole.items():
        assert torch.equal(value, rest[key]) == (key not in ("delta", "heat_scale")), key
    log = read_log(folder)
    measured = [line for line in log if "held_out_mean" in line]
    assert [line["epoch"] for line in measured] == [1, 2]
    assert log[-1]["images"] == 3 and log[-1]["on_held_out"] is True

    model = Distillation(load_vit(world / "teacher.safetensors"), layers=(0, 1, 2, 3))
    model.load_learned_state(whole)
    images = data.train_split("folder", tmp_path / "all/own", "own").images[held_out]
    with torch.no_grad():
        t = model.teacher_features(images)
        s = model.features(model.student, images)
    student = []
    for c in t:
        cosines = (t[c] * s[c]).sum(-1) / (t[c].norm(dim=-1) * s[c].norm(dim=-1))
        student.append((1 - cosines).mean().item())
    last = measured[-1]
    assert last["held_out"] == pytest.approx(student, rel=1e-4)
    assert last["held_out_mean"] == pytest.approx(sum(student) / 4, rel=1e-4)
    first = measured[0]["held_out_mean"]
    assert log[-1]["fell"] == pytest.approx(1 - last["held_out_mean"] / first)
    assert log[-1]["lowest_at"] == last["step"]
    assert f"fell by {100 * log[-1]['fell']:.0f} % over the second half" in results["all"].out
    assert "fell" not in results["rest"].out and "too low for new images" in results["rest"].out


def test_a_test_split_of_one_class_only_still_gives_scores(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/bottle/test/good")
    shutil.copytree(world / "runs", tmp_path / "runs")
    result = run_evaluate(tmp_path, "--data-root", tmp_path / "data")
    assert result.code == 0, result.err
    last = result.out.splitlines()[-1].split()
    assert last == ["mean", "n/a", "100.00", "n/a", "n/a", "n/a"]
    scores = (run_folder(tmp_path) / "scores.csv").read_text()
    assert len(scores.splitlines()) == 1 + 5
    assert read_json(run_folder(tmp_path) / "result.json")["auroc"] is None


def test_bad_images_stop_training_and_can_be_skipped_in_scoring(world, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(world / "data" / "bottle", own)
    (own / "test/stain/002.png").write_bytes(b"")
    options = {"out": tmp_path / "runs", "epochs": 1, **own_pictures(own)}
    assert run_train(world, **options).code == 0
    result = run_evaluate(tmp_path)
    assert_one_sentence(result, "test/stain/002.png: expected an image", "--skip-bad")
    result = run_evaluate(tmp_path, "--skip-bad")
    assert result.code == 0
    assert result.err.startswith("skipped: ") and "002.png" in result.err
    folder = tmp_path / "runs/folder/own/seed0"
    assert read_json(folder / "result.json")["n_anomalous"] == 4
    (own / "train/good/001.png").write_bytes(b"")
    result = run_train(world, "--overwrite", **options)
    assert_one_sentence(result, "train/good/001.png: expected an image")
    assert (folder / "model.safetensors").exists()  # the old run is not lost by that


def test_every_category_in_turn_skips_what_is_complete(world, tmp_path):
    for category in CATEGORIES["mvtec"]:
        make_category(tmp_path / "data" / category, train=3, good=1, bad=1)
    changes = {"category": "all", "epochs": 1, "data_root": tmp_path / "data"}
    result = run_train(world, cwd=tmp_path, **changes)
    assert result.code == 0, result.err
    models = list(tmp_path.glob("runs/mvtec/*/seed0/model.safetensors"))
    assert len(models) == 15 and result.out.count("done;") == 15
    alone = tmp_path / "runs/mvtec/pill/seed0/model.safetensors"
    before = alone.read_bytes()
    alone.unlink()
    result = run_train(world, cwd=tmp_path, **changes)
    assert result.out.count("complete, nothing to do") == 14 and result.out.count("done;") == 1
    assert alone.read_bytes() == before  # whatever ran before it
    lines = run_evaluate(tmp_path).out.splitlines()
    names = [line.split()[0] for line in lines[-16:]]
    assert names == [*CATEGORIES["mvtec"], "mean"]  # the paper's order
    assert lines[-1].split()[2] == "90.40"  # the mean of the paper's row


def test_several_seeds_and_a_failure_among_the_categories(world, tmp_path, monkeypatch):
    """A picture does not decode, a category is not there: both seeds of the others are trained."""
    monkeypatch.setitem(CATEGORIES, "mvtec", ["bottle", "carpet", "pill", "zipper"])
    for category in CATEGORIES["mvtec"]:
        count = 5 if category == "pill" else 3
        make_category(tmp_path / "data" / category, train=count, good=1, bad=1)
    (tmp_path / "data/pill/train/good/000.png").write_bytes(b"")
    shutil.rmtree(tmp_path / "data/zipper")
    changes = {"category": "all", "epochs": 1, "seeds": "0,2", "data_root": tmp_path / "data"}
    result = run_train(world, "--resume", cwd=tmp_path, **changes)
    assert result.code == 2 and result.out.count("done;") == 4
    last = result.err.splitlines()[-1]
    assert "error: 4 of 8 runs failed, for the reasons above: " in last
    for name in ("pill", "zipper"):
        for seed in (0, 2):
            assert f"runs/mvtec/{name}/seed{seed}" in last
    assert "pill/train/good/000.png: expected an image" in result.err
    assert "this run and 7 more like it: about 0:" in result.out
    make_category(tmp_path / "data/zipper", train=3, good=1, bad=1)
    (tmp_path / "data/pill/train/good/000.png").unlink()
    result = run_train(world, "--resume", cwd=tmp_path, **changes)
    assert result.code == 0 and result.out.count("done;") == 4
    assert result.out.count("complete, nothing to do") == 4


def test_too_little_memory_for_the_scores_is_one_sentence(world, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Distillation, "scores", no_memory)
    assert_one_sentence(run_evaluate(world), "fits the memory", "--batch-size")


# ---------------------------------------------------------------------------------------- the demo


def test_the_demo_works_without_any_argument(demo):
    """With the README's bound: data, teacher and settings all come along."""
    output = (demo / "out").read_text()
    training, end, scoring = output.partition("next: python evaluate.py runs/demo/washer/seed0\n")
    assert end and "teacher demo_teacher (DEMO" in training
    lines = scoring.splitlines()
    assert lines[0].startswith("washer seed 0, delta ") and "of 8, scratch " in lines[0]
    assert lines[1].startswith("  by S_D standardised, delta ")
    assert lines[2].startswith("demo: ") and "teacher demo_teacher (DEMO" in lines[2]
    percent, paper = lines[-1].split()[1:3]
    assert float(percent) >= 95 and paper == "n/a"
    scores = (demo / "runs/demo/washer/seed0/scores.csv").read_text()
    assert len(scores.splitlines()) == 1 + 16 + 24


def test_the_readmes_python_runs(demo, monkeypatch, capsys):
    """Each block in turn, in the folder of the demo."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(demo)
    names = {}
    for block in blocks:
        exec(block, names)
    assert capsys.readouterr().out == "tensor([True, True])\n"  # its images are noise


def test_anyone_can_train_the_demos_teacher_again(tmp_path):
    path = ROOT / "weights" / "demo_teacher.safetensors"
    assert path.stat().st_size <= 3e6
    out = tmp_path / "teacher.safetensors"
    result = call(train_demo_teacher.main, "--steps", 2, "--batch-size", 2, "--out", out)
    assert result.code == 0, result.err
    again, shipped = load_vit(out), load_vit(path)
    assert again.config == shipped.config and again.metadata == shipped.metadata
    # The one that ships was trained on.
    assert not torch.equal(again.blocks[0].mlp.fc1.weight, shipped.blocks[0].mlp.fc1.weight)


def test_real_scores_do_not_depend_on_the_batch(tmp_path):
    weights = shared("weights/deit_tiny_patch16_224.safetensors")
    root = shared("data/mvtec")
    convert.convert(weights, tmp_path / "teacher.safetensors")
    images = data.test_split("mvtec", root, "bottle").images[::8]  # 11, of every kind
    torch.manual_seed(0)
    model = Distillation(load_vit(tmp_path / "teacher.safetensors"))
    model.update_anchor(model.teacher_features(images[:8]))

    def scores(size):
        return torch.cat([model.scores(batch)["score"] for batch in images.split(size)])

    expected = scores(len(images))
    for size in (1, 4):
        torch.testing.assert_close(scores(size), expected, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------- AUROC, the table


def naive_auroc(scores, labels):
    """Every pair of an anomalous and a normal image: 1 if the former is higher, 1/2 for a tie."""
    scores, labels = np.asarray(scores), np.asarray(labels)
    won = [
        1.0 if anomalous > normal else 0.5 if anomalous == normal else 0.0
        for anomalous in scores[labels == 1]
        for normal in scores[labels == 0]
    ]
    return 100 * sum(won) / len(won)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_equals_its_definition_over_pairs(levels):
    random = np.random.default_rng(levels)
    for _ in range(20):
        scores = random.integers(0, levels, 60) / 7
        labels = random.integers(0, 2, 60)
        assert auroc(scores, labels) == pytest.approx(naive_auroc(scores, labels), rel=1e-12)


def test_auroc_at_its_ends():
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 100 and auroc([4, 3, 2, 1], [0, 0, 1, 1]) == 0
    assert auroc([5, 5, 5], [0, 1, 1]) == 50
    assert np.isnan(auroc([1, 2], [1, 1])) and np.isnan(auroc([1, 2], [0, 0]))


def test_table_means_over_categories_each_the_mean_of_its_seeds():
    def row(category, seed, value, paper):
        keys = ("auroc", "auroc_score_d", "auroc_score_a", "auroc_score_a_teacher")
        values = {key: None if value is None else value - i for i, key in enumerate(keys)}
        return {"category": category, "seed": seed, "paper_auroc": paper, **values}

    rows = [
        row("bottle", 0, 90.0, 100.0),
        row("bottle", 1, 100.0, 100.0),
        row("pill", 0, 65.0, 88.0),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[-1].split() == ["mean", "80.00", "94.00", "79.00", "78.00", "77.00"]
    unknown = table([row("own", 0, None, None)]).splitlines()[-1]
    assert unknown.split() == ["mean"] + ["n/a"] * 5


def printed_result(dataset, category, seed, teacher="0", auroc=0.0):
    """What `evaluate.print_results` needs of a result."""
    numbers = ("delta", "false_alarms", "misses", "n_normal", "n_anomalous")
    return {
        **dict.fromkeys(numbers, 0.0),
        **{"dataset": dataset, "category": category, "seed": seed, "auroc": auroc},
        **{"teacher": "tiny", "teacher_sha256": teacher, "misses_by_kind": {}, "skipped": []},
    }


def test_runs_of_two_teachers_have_no_common_mean(capsys):
    evaluate.print_results(
        [
            printed_result("mvtec", "pill", 0, teacher="a", auroc=80.0),
            printed_result("mvtec", "bottle", 0, teacher="b", auroc=100.0),
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    means = [line.split()[1] for line in lines if line.startswith("mean")]
    assert means == ["80.00", "100.00"]


def test_runs_of_a_category_stand_together(capsys):
    """In the protocol's order; own folders in the order of their first runs."""

    def printed(dataset, *runs_in_order):
        rows = [printed_result(dataset, category, seed) for category, seed in runs_in_order]
        evaluate.print_results(rows)
        lines = capsys.readouterr().out.splitlines()
        return [tuple(line.split()[:2]) for line in lines[-1 - len(rows) : -1]]

    own = printed("folder", ("z", 1), ("a", 0), ("z", 0), ("a", 1))
    assert own == [("z", "0"), ("z", "1"), ("a", "0"), ("a", "1")]
    official = printed("mvtec", ("pill", 0), ("bottle", 1), ("bottle", 0))
    assert official == [("bottle", "0"), ("bottle", "1"), ("pill", "0")]
