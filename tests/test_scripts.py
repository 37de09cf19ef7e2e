"""train.py, evaluate.py as a user runs them, in processes of their own, on a few generated images and a tiny teacher."""
import contextlib
import csv
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_sentence, make_category, run, save_vit, shared, tiny_vit
from safetensors.torch import load_file

import convert
import data
from data import PAPER_AUROC
from evaluate import auroc, of_one_kind, table
from vit import load_vit
from vitad import Distillation

TRAIN, EVALUATE = ROOT / "train.py", ROOT / "evaluate.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory, own_cache):
    """A folder with a category `bottle`, a tiny teacher and one finished run."""
    folder = tmp_path_factory.mktemp("world")
    make_category(folder / "data" / "bottle")
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    process = run(TRAIN, *arguments(folder), cwd=folder)
    assert process.returncode == 0, process.stderr
    assert process.stderr == "note: bottle is not the official one: train/good 6 (official 209) images\n"
    return folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def arguments(folder, **changes):
    values = {"dataset": "mvtec", "category": "bottle", "data-root": folder / "data", "weights": folder / "teacher.safetensors", "epochs": 2, **changes}
    return [part for name, value in values.items() for part in (f"--{name}", value)]


def OWN(folder):
    return {"dataset": "folder", "data-root": folder, "category": folder.name}


def run_folder(world):
    return world / "runs" / "mvtec" / "bottle" / "seed0"


def test_the_run_folder(world):
    folder = run_folder(world)
    assert sorted(path.name for path in folder.iterdir() if path.name not in ("scores.csv", "result.json")) == ["config.json", "log.jsonl", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["settings"]["lr"] is None and config["lr"] == 1e-3 and config["settings"]["batch_size"] == 4 and config["settings"]["epochs"] == config["epochs"] == 2
    assert len(config["teacher"]["sha256"]) == 64 and config["versions"]["torch"] == torch.__version__ and "train.py" in config["command"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-2]["step"] == 4 and {"epoch", "lr", "loss", "distill", "anchor", "gram", "images_per_s"} <= set(log[-2])
    assert log[-1]["images"] == 6 and not log[-1]["held_out"] and log[-1]["score_d"]["std"] > 0 and log[-1]["delta"] > log[-1]["score"]["mean"]
    state = load_file(folder / "model.safetensors")
    assert state["anchor.count"] == 6 and state["delta"].isfinite() and not any(key.startswith("teacher") for key in state)


def test_evaluate_prints_the_table_and_writes_scores(world):
    process = run(EVALUATE, cwd=world)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[-2].split()[:2] == ["bottle", "0"] and lines[-1].split()[0] == "mean" and lines[-1].split()[2] == "100.00"
    result = json.loads((run_folder(world) / "result.json").read_text())
    with open(run_folder(world) / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "score", "score_d", "score_a_teacher", "score_a_student"]
    assert [row["image"] for row in rows] == [f"test/good/{i:03d}.png" for i in range(4)] + [f"test/stain/{i:03d}.png" for i in range(5)]
    assert [int(row["label"]) for row in rows] == [0] * 4 + [1] * 5
    scores = np.array([float(row["score"]) for row in rows])
    parts = sum(np.array([float(row[c]) for row in rows]) for c in ("score_d", "score_a_teacher", "score_a_student"))
    np.testing.assert_allclose(scores, parts, rtol=1e-6)
    assert result["auroc"] == pytest.approx(naive_auroc(scores, [0] * 4 + [1] * 5))
    assert lines[-1].split()[1] == f"{result['auroc']:.2f}"
    assert {"dataset": "mvtec", "category": "bottle", "seed": 0, "paper_auroc": 100.0, "n_normal": 4, "n_anomalous": 5}.items() <= result.items()


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(world):
    for out, seed in (("again", 0), ("other", 1)):
        assert run(TRAIN, *arguments(world, out=out, seed=seed), cwd=world, fork=False).returncode == 0  # with hashes of its own
    model = (run_folder(world) / "model.safetensors").read_bytes()
    assert (world / "again/mvtec/bottle/seed0/model.safetensors").read_bytes() == model
    assert (world / "other/mvtec/bottle/seed1/model.safetensors").read_bytes() != model


@pytest.mark.parametrize("cache", ["off", "disk"])
def test_keeping_the_teachers_features_changes_nothing(world, tmp_path, cache):
    assert run(TRAIN, *arguments(world, out=tmp_path, cache=cache), cwd=world).returncode == 0
    kept, computed = (load_file(folder / "model.safetensors") for folder in (run_folder(world), tmp_path / "mvtec/bottle/seed0"))
    for key, value in kept.items():
        torch.testing.assert_close(computed[key], value, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "mvtec/bottle/seed0").iterdir()) == ["config.json", "log.jsonl", "model.safetensors"]


def test_runs_evaluated_together_score_as_when_alone(world, tmp_path):
    for seed in (0, 1):
        assert run(TRAIN, *arguments(world, out=tmp_path, seed=seed, epochs=1), cwd=world).returncode == 0
    folders = [tmp_path / "mvtec/bottle" / f"seed{seed}" for seed in (0, 1)]
    assert run(EVALUATE, "--out", tmp_path, cwd=world).returncode == 0
    together = [(folder / "scores.csv").read_bytes() for folder in folders]
    for folder, scores in zip(folders, together):
        assert run(EVALUATE, folder, cwd=world).returncode == 0
        assert (folder / "scores.csv").read_bytes() == scores
    assert together[0] != together[1]


def test_the_teacher_sees_the_test_images_of_a_protocol_once():
    def kind(dataset, category, **changes):
        settings = {"dataset": dataset, "category": category, "data_root": "data", "layers": [3, 6, 9, 11], **changes}
        return of_one_kind(("run", {"settings": settings, "teacher": {"sha256": "0"}}))

    assert kind("cifar10", "cat") == kind("cifar10", "dog", seed=1) != kind("cifar100", "fish")
    assert kind("mvtec", "pill") != kind("mvtec", "bottle") and kind("mvtec", "pill") == kind("mvtec", "pill", seed=1)
    assert kind("cifar10", "cat") != kind("cifar10", "cat", layers=[11])


def test_training_reads_no_test_image(world, tmp_path):
    shutil.copytree(world / "data" / "bottle" / "train", tmp_path / "data" / "bottle" / "train")
    shutil.copy(world / "teacher.safetensors", tmp_path)
    assert run(TRAIN, *arguments(tmp_path), cwd=tmp_path).returncode == 0  # there is no test split at all
    assert (run_folder(tmp_path) / "model.safetensors").read_bytes() == (run_folder(world) / "model.safetensors").read_bytes()
    assert_one_sentence(run(EVALUATE, cwd=tmp_path), "test: expected folders of test images")
    assert "test_split" not in TRAIN.read_text()


def test_a_complete_run_is_kept(world):
    before = {path: path.read_bytes() for path in run_folder(world).iterdir()}
    process = run(TRAIN, *arguments(world), cwd=world)
    assert process.returncode == 0 and "complete, nothing to do" in process.stdout
    assert_one_sentence(run(TRAIN, *arguments(world, lr=0.1), cwd=world), "lr None -> 0.1", "--overwrite")
    assert {path: path.read_bytes() for path in run_folder(world).iterdir()} == before


def test_overwrite_starts_again(world, tmp_path):
    shutil.copytree(world, tmp_path / "world")
    process = run(TRAIN, *arguments(tmp_path / "world", epochs=1), "--overwrite", cwd=tmp_path / "world")
    assert process.returncode == 0, process.stderr
    assert json.loads((run_folder(tmp_path / "world") / "config.json").read_text())["settings"]["epochs"] == 1
    assert not (run_folder(tmp_path / "world") / "result.json").exists()  # it belonged to the old run


def test_epochs_follow_from_the_steps_and_the_images(world, tmp_path):
    """Without --epochs: as many as 1,600 steps take. Stopped after the first, since only their number matters here."""
    command = [part for part in arguments(world, out=tmp_path, **OWN(world / "data/bottle")) if part not in ("--epochs", 2)]
    process = subprocess.Popen([sys.executable, TRAIN, *map(str, command)], cwd=world, stdout=subprocess.PIPE, text=True)
    first = process.stdout.readline()
    process.terminate()
    process.communicate()
    assert "5 normal images, 800 epochs of 2 steps" in first  # one of six is held out
    config = json.loads((tmp_path / "folder/bottle/seed0/config.json").read_text())
    assert config["epochs"] == 800 and config["settings"]["epochs"] is None


@pytest.mark.parametrize("options", [
    {"distance": "mse", "clip-grad": 1, "anchor": "ema", "optimizer": "sgd"}, {"distance": "l2", "clip-grad": 1, "pos-embed": "learn"},
    {"optimizer": "sgd", "layers": "2,4", "top-k": 3, "momentum": 0}, {"precision": "bf16", "cache": "disk"}, {"precision": "tf32", "cache": "off"}, {"decay": "constant", "warmup": 0, "lam": 0, "batch-size": 64},
])
def test_every_option_trains_and_evaluates(world, tmp_path, options):
    process = run(TRAIN, *arguments(world, out=tmp_path, epochs=1, **options), cwd=world)
    assert process.returncode == 0, process.stderr
    process = run(EVALUATE, "--out", tmp_path, cwd=world)
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "mvtec/bottle/seed0/config.json").read_text())
    assert config["lr"] == (0.2 if options.get("optimizer") == "sgd" else 1e-3)


@pytest.mark.parametrize("lr, expected", [(None, 0.192 / 384), (0.002, 0.002)])
def test_a_wider_student_learns_at_a_lower_rate_unless_told_otherwise(world, tmp_path, lr, expected):
    teacher = save_vit(tiny_vit(width=384, depth=2), tmp_path / "wide.safetensors")
    given = {} if lr is None else {"lr": lr}
    process = run(TRAIN, *arguments(world, weights=teacher, layers="0,1", out=tmp_path, warmup=0, decay="constant", **given), cwd=world)
    assert process.returncode == 0, process.stderr
    log = [json.loads(line) for line in (tmp_path / "mvtec/bottle/seed0/log.jsonl").read_text().splitlines()]
    assert {line["lr"] for line in log if "lr" in line} == {expected} == {json.loads((tmp_path / "mvtec/bottle/seed0/config.json").read_text())["lr"]}


def test_a_diverging_run_ends_in_one_sentence_and_keeps_the_last_checkpoint(world, tmp_path):
    shutil.copytree(world / "data" / "bottle", tmp_path / "own")  # as --dataset folder, so that no note comes before the sentence
    process = run(TRAIN, *arguments(world, out=tmp_path, epochs=40, optimizer="sgd", distance="mse", lr=1e6, warmup=1000, **OWN(tmp_path / "own")),
                  "--checkpoint-every", 0, cwd=world)
    assert_one_sentence(process, "stopped being finite", "holds the last good step", "--clip-grad 1")
    folder = tmp_path / "folder/own/seed0"
    assert not (folder / "model.safetensors").exists()
    assert all(value.isfinite().all() for key, value in load_file(folder / "checkpoint.safetensors").items()
               if key not in ("delta", "heat_scale"))  # which the end of training sets
    assert_one_sentence(run(EVALUATE, folder, cwd=world), "model.safetensors", "unfinished")


def test_evaluate_refuses_another_teacher(world, tmp_path):
    save_vit(tiny_vit(seed=1), tmp_path / "other.safetensors")
    assert_one_sentence(run(EVALUATE, "--weights", tmp_path / "other.safetensors", cwd=world), "sha256", "--weights")


def test_evaluate_says_what_is_missing_or_broken(world, tmp_path):
    assert_one_sentence(run(EVALUATE, "--out", tmp_path, cwd=world), "expected complete runs")
    assert_one_sentence(run(EVALUATE, tmp_path / "nowhere", cwd=world), "expected a complete run, got none")
    shutil.copytree(run_folder(world), tmp_path / "run")
    model = tmp_path / "run" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    assert_one_sentence(run(EVALUATE, tmp_path / "run", cwd=world), "model.safetensors", "train the run again")
    shutil.copy(run_folder(world) / "model.safetensors", model)
    (tmp_path / "run" / "config.json").write_text('{"settings": {')
    assert_one_sentence(run(EVALUATE, tmp_path / "run", cwd=world), "config.json")


@pytest.mark.parametrize("changes, words", [
    ({"dataset": "mvtek"}, ["invalid choice: 'mvtek'", "mvtec"]),
    ({"category": "botle"}, ["got 'botle'", "did you mean bottle"]),
    ({"dataset": "demo"}, ["got 'bottle'", "one of --dataset mvtec"]),
    ({"data-root": "nowhere"}, ["nowhere/bottle: expected train/good", "CC BY-NC-SA 4.0"]),
    ({"dataset": "cifar10", "category": "kat"}, ["did you mean cat"]),
    ({"dataset": "cifar100", "category": "20"}, ["got '20'", "0 to 19"]),
    ({"category": "all", "data-root": "nowhere"}, ["nowhere/bottle: expected train/good"]),
    ({"weights": "vit_base_patch16_244"}, ["got 'vit_base_patch16_244': did you mean vit_base_patch16_224"]),
    ({"weights": "nowhere.safetensors"}, ["nowhere.safetensors", "no such file", "weights/README.md"]),
    ({"epochs": 0}, ["--epochs: expected at least 1, got 0"]),
    ({"batch-size": -4}, ["--batch-size: expected at least 1"]),
    ({"lr": -0.1}, ["--lr: expected more than 0"]),
    ({"lr": "nan"}, ["--lr: expected more than 0"]),
    ({"momentum": -1}, ["--momentum: expected 0 or more"]),
    ({"layers": "9,3"}, ["--layers: expected ascending", "'9,3'"]),
    ({"layers": "3,x"}, ["--layers", "'3,x'"]),
    ({"layers": "3,12"}, ["--layers: expected at most 11", "got 12"]),
    ({"top-k": 50}, ["--top-k: expected at most 49", "got 50"]),
    ({"device": "gpu"}, ["--device", "'gpu'"]),
    ({"out": "/dev/null/runs", "dataset": "folder", "data-root": "data/bottle"}, ["/dev/null/runs"]),
    ({"out": "/proc/runs", "dataset": "folder", "data-root": "data/bottle"}, ["/proc/runs"]),  # a file system that takes no files, from root neither
])
def test_bad_input_is_one_sentence(world, changes, words):
    assert_one_sentence(run(TRAIN, *arguments(world, **{"out": "elsewhere", **changes}), cwd=world), *words)
    assert not (world / "elsewhere").exists()


@pytest.mark.parametrize("script", [TRAIN, EVALUATE])
def test_help_needs_no_torch(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')")
    process = run(script, "--help", env={"PYTHONPATH": str(tmp_path)})
    assert process.returncode == 0 and "usage" in process.stdout, process.stderr
    process = run(TRAIN, "--dataset", "mvtec", "--category", "botle", env={"PYTHONPATH": str(tmp_path)})
    assert_one_sentence(process, "did you mean bottle")


# ------------------------------------------------------------------------------------- own pictures, all categories, the demo

def test_threads_spin_briefly_unless_told_otherwise(tmp_path):
    (tmp_path / "torch.py").write_text("import os, sys\nsys.exit(os.environ['GOMP_SPINCOUNT'])")  # known before torch is imported
    assert run(TRAIN, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}).stderr == "1000\n"
    assert run(TRAIN, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path), "GOMP_SPINCOUNT": "5"}).stderr == "5\n"


def test_own_pictures_in_a_folder(world, tmp_path):
    shutil.copytree(world / "data" / "bottle", tmp_path / "all")
    process = run(TRAIN, "--dataset", "folder", "--data-root", "all", "--weights", world / "teacher.safetensors", "--epochs", 1, "--out", "other", cwd=tmp_path)
    assert process.returncode == 0 and (tmp_path / "other/folder/all/seed0/model.safetensors").exists()  # a folder's name, no category
    shutil.copytree(world / "data" / "bottle", tmp_path / "my parts")
    process = run(TRAIN, "--dataset", "folder", "--data-root", tmp_path / "my parts", "--weights", world / "teacher.safetensors", "--epochs", 1, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    process = run(EVALUATE, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[1].startswith("folder: image AUROC") and lines[-1].split()[0] == "mean" and lines[-1].split()[2] == "n/a"  # no paper has it
    result = json.loads((tmp_path / "runs/folder/my_parts/seed0/result.json").read_text())
    assert result["category"] == "my parts" and result["paper_auroc"] is None and 0 <= result["auroc"] <= 100


def test_images_held_out_measure_and_calibrate_and_teach_nothing(world, tmp_path):
    """The same run on a folder without those images gives the same student; delta is that of the images held out."""
    make_category(tmp_path / "all/own", train=10)
    make_category(tmp_path / "rest/own", train=10)
    held_out = torch.randperm(10, generator=torch.Generator().manual_seed(zlib.crc32(b"folder/own")))[:3].sort().values
    for i in held_out:
        (tmp_path / f"rest/own/train/good/{i:03d}.png").unlink()
    for name, *options in (("all", "--holdout", 0.3), ("rest", "--holdout", 0)):
        process = run(TRAIN, "--dataset", "folder", "--data-root", tmp_path / name / "own", "--weights", world / "teacher.safetensors", "--epochs", 2,
                      "--out", tmp_path / name, *options)
        assert process.returncode == 0, process.stderr
        assert process.stdout.count("held out: distance to the teacher") == (2 if name == "all" else 0)
    folders = [tmp_path / name / "folder/own/seed0" for name in ("all", "rest")]
    all_, rest = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(value, rest[key]) for key, value in all_.items() if key not in ("delta", "heat_scale"))
    assert all_["delta"] != rest["delta"] and not torch.equal(all_["heat_scale"], rest["heat_scale"])
    lines = [json.loads(line) for line in (folders[0] / "log.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "held_out_mean" in line]
    assert [line["epoch"] for line in measured] == [1, 2] and lines[-1]["images"] == 3 and lines[-1]["held_out"] is True

    model = Distillation(load_vit(world / "teacher.safetensors"))
    model.load_learned_state(all_)
    images = data.train_split("folder", tmp_path / "all/own", "own").images[held_out]
    with torch.no_grad():
        t, s = model.teach(images), model.features(model.student, images)
    expected = [(1 - (t[c] * s[c]).sum(-1) / (t[c].norm(dim=-1) * s[c].norm(dim=-1))).mean().item() for c in t]
    assert measured[-1]["held_out"] == pytest.approx(expected, rel=1e-4)
    assert measured[-1]["held_out_mean"] == pytest.approx(sum(expected) / 4, rel=1e-4)
    layout = []
    for x in t.values():  # Two images at a time, position by position.
        cosines = [np.mean([F.cosine_similarity(x[i, p], x[j, p], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]) for p in range(x.shape[1])]
        layout.append(np.mean([1 - max(cosine, 0) ** 0.5 for cosine in cosines]))
    assert measured[-1]["layout"] == pytest.approx(layout, rel=1e-4)
    assert measured[-1]["converged"] == all(a < b for a, b in zip(expected, layout))


def test_a_test_split_of_one_class_only_still_gives_scores(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data/bottle/test/good")
    shutil.copytree(world / "runs", tmp_path / "runs")
    process = run(EVALUATE, "--data-root", tmp_path / "data", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].split() == ["mean", "n/a", "100.00", "n/a", "n/a", "n/a"]
    assert len((tmp_path / "runs/mvtec/bottle/seed0/scores.csv").read_text().splitlines()) == 1 + 5
    assert json.loads((tmp_path / "runs/mvtec/bottle/seed0/result.json").read_text())["auroc"] is None


def test_bad_images_stop_training_and_can_be_skipped_in_scoring(world, tmp_path):
    shutil.copytree(world / "data" / "bottle", tmp_path / "own")
    (tmp_path / "own/test/stain/002.png").write_bytes(b"")
    command = arguments(world, **OWN(tmp_path / "own"), out=tmp_path / "runs", epochs=1)
    assert run(TRAIN, *command, cwd=tmp_path).returncode == 0
    assert_one_sentence(run(EVALUATE, cwd=tmp_path), "test/stain/002.png: expected an image", "--skip-bad")
    process = run(EVALUATE, "--skip-bad", cwd=tmp_path)
    assert process.returncode == 0 and process.stderr.startswith("skipped: ") and "002.png" in process.stderr
    assert json.loads((tmp_path / "runs/folder/own/seed0/result.json").read_text())["n_anomalous"] == 4
    (tmp_path / "own/train/good/001.png").write_bytes(b"")
    assert_one_sentence(run(TRAIN, *command, "--overwrite", cwd=tmp_path), "train/good/001.png: expected an image")
    assert (tmp_path / "runs/folder/own/seed0/model.safetensors").exists()  # the old run is not lost by that


@pytest.mark.parametrize("limit, words", [(300, "config.json"), (200_000, "checkpoint.safetensors")])
def test_a_full_disk_is_one_sentence(world, tmp_path, limit, words):
    """A limit on the size of files stands for the full disk: writing fails half-way."""
    shutil.copytree(world / "data" / "bottle", tmp_path / "own")
    data_command = [sys.executable, "-c", f"import data; data.train_split('folder', {str(tmp_path / 'own')!r}, 'own')"]
    subprocess.run(data_command, cwd=ROOT, check=True)  # the cache is there: it is the run that finds the disk full
    command = [sys.executable, TRAIN, *arguments(world, **OWN(tmp_path / "own"), out=tmp_path / "runs", epochs=1), "--checkpoint-every", 0, "--cache", "off"]
    process = subprocess.run([str(part) for part in command], cwd=tmp_path, capture_output=True, text=True,
                             preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_sentence(process, words)
    assert not list((tmp_path / "runs").rglob("*safetensors*"))


def test_every_category_in_turn_skips_what_is_complete(world, tmp_path):
    for category in PAPER_AUROC["mvtec"]:
        make_category(tmp_path / "data" / category, train=2, good=1, bad=1)
    command = arguments(world, category="all", epochs=1, **{"data-root": tmp_path / "data"})
    process = run(TRAIN, *command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    models = sorted(tmp_path.glob("runs/mvtec/*/seed0/model.safetensors"))
    assert len(models) == 15 and process.stdout.count("done;") == 15
    alone = tmp_path / "runs/mvtec/pill/seed0/model.safetensors"
    before = alone.read_bytes()
    alone.unlink()
    process = run(TRAIN, *command, cwd=tmp_path)
    assert process.stdout.count("complete, nothing to do") == 14 and process.stdout.count("done;") == 1
    assert alone.read_bytes() == before  # whatever ran before it
    lines = run(EVALUATE, cwd=tmp_path).stdout.splitlines()
    assert [line.split()[0] for line in lines[-16:]] == [*PAPER_AUROC["mvtec"], "mean"]  # the paper's order
    assert lines[-1].split()[2] == "90.40"  # the mean of the paper's row


def test_several_seeds_and_a_failure_among_the_categories(world, tmp_path):
    """One category has a picture that does not decode, one is not there: the others are trained, for both seeds, the failures listed at the end."""
    for category in PAPER_AUROC["mvtec"]:
        make_category(tmp_path / "data" / category, train=4 if category == "pill" else 2, good=1, bad=1)
    (tmp_path / "data/pill/train/good/000.png").write_bytes(b"")
    shutil.rmtree(tmp_path / "data/zipper")
    command = [*arguments(world, category="all", epochs=1, seeds="0,2", **{"data-root": tmp_path / "data"}), "--resume"]
    process = run(TRAIN, *command, cwd=tmp_path)
    assert process.returncode == 2 and process.stdout.count("done;") == 26
    last = process.stderr.splitlines()[-1]
    assert last.startswith("4 of 30 runs failed") and all(f"runs/mvtec/{name}/seed{seed}" in last for name in ("pill", "zipper") for seed in (0, 2))
    assert "pill/train/good/000.png: expected an image" in process.stderr and "this run and 29 more like it: about 0:" in process.stdout
    make_category(tmp_path / "data/zipper", train=2, good=1, bad=1)
    (tmp_path / "data/pill/train/good/000.png").unlink()
    process = run(TRAIN, *command, cwd=tmp_path)
    assert process.returncode == 0 and process.stdout.count("complete, nothing to do") == 26 and process.stdout.count("done;") == 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the demo was trained."""
    folder = tmp_path_factory.mktemp("demo")
    process = run(TRAIN, cwd=folder)
    assert process.returncode == 0 and "teacher demo_teacher (DEMO" in process.stdout, process.stderr
    return folder


def test_the_readmes_python_runs(demo, monkeypatch):
    """Each block in turn, in the folder of the demo."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(demo)
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["scores"]["score"].shape == (2,)


def test_the_demo_works_without_any_argument(demo):
    """The README's first command, with its bound: data, teacher and settings all come along."""
    process = run(EVALUATE, cwd=demo)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith("washer seed 0, delta ") and "of 8, scratch " in lines[0]
    assert lines[1].startswith("demo: ") and "teacher demo_teacher (DEMO" in lines[1]
    auroc, paper = lines[-1].split()[1:3]
    assert float(auroc) >= 95 and paper == "n/a"
    assert len((demo / "runs/demo/washer/seed0/scores.csv").read_text().splitlines()) == 1 + 16 + 24


def test_anyone_can_train_the_demos_teacher_again(tmp_path):
    shipped = ROOT / "weights" / "demo_teacher.safetensors"
    assert shipped.stat().st_size <= 3e6
    process = run(ROOT / "weights" / "train_demo_teacher.py", "--steps", 2, "--batch-size", 2, "--out", tmp_path / "teacher.safetensors")
    assert process.returncode == 0, process.stderr
    again, shipped = load_vit(tmp_path / "teacher.safetensors"), load_vit(shipped)
    assert again.config == shipped.config and again.metadata == shipped.metadata
    assert not torch.equal(again.blocks[0].mlp.fc1.weight, shipped.blocks[0].mlp.fc1.weight)  # trained on, in the one that ships
    assert_one_sentence(run(ROOT / "weights" / "train_demo_teacher.py", "--steps", 0), "--steps", "at least 1")


def test_real_scores_do_not_depend_on_the_batch(tmp_path):
    weights, root = shared("weights/deit_tiny_patch16_224.safetensors"), shared("data/mvtec")
    options = SimpleNamespace(mean=None, std=None, activation=None, heads=None, source=None, license=None)
    convert.convert(weights, tmp_path / "teacher.safetensors", options)
    images = data.test_split("mvtec", root, "bottle").images[:64]
    torch.manual_seed(0)
    model = Distillation(load_vit(tmp_path / "teacher.safetensors"))
    model.update_anchor(model.teach(images[:8]))
    scores = {size: torch.cat([model.scores(batch)["score"] for batch in images.split(size)]) for size in (1, 7, 64)}
    for size in (1, 7):
        torch.testing.assert_close(scores[size], scores[64], rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------------------- AUROC

def naive_auroc(scores, labels):
    """Every pair of an anomalous and a normal image: 1 if the anomalous one scores higher, a half if they tie."""
    won = [1.0 if a > n else 0.5 if a == n else 0.0
           for a, la in zip(scores, labels) if la == 1 for n, ln in zip(scores, labels) if ln == 0]
    return 100 * sum(won) / len(won)


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auroc_equals_its_definition_over_pairs(levels):
    random = np.random.default_rng(levels)
    for _ in range(20):
        scores, labels = random.integers(0, levels, 60) / 7, random.integers(0, 2, 60)
        assert auroc(scores, labels) == pytest.approx(naive_auroc(scores, labels), rel=1e-12)


def test_auroc_at_its_ends():
    assert auroc([1, 2, 3, 4], [0, 0, 1, 1]) == 100 and auroc([4, 3, 2, 1], [0, 0, 1, 1]) == 0
    assert auroc([5, 5, 5], [0, 1, 1]) == 50
    assert np.isnan(auroc([1, 2], [1, 1])) and np.isnan(auroc([1, 2], [0, 0]))


def test_table_means_over_categories_each_the_mean_of_its_seeds():
    def row(category, seed, value, paper):
        keys = ("auroc", "auroc_score_d", "auroc_score_a", "auroc_score_a_teacher")
        return {"category": category, "seed": seed, "paper_auroc": paper, **{key: value for key in keys}}

    lines = table([row("bottle", 0, 90.0, 100.0), row("bottle", 1, 100.0, 100.0), row("pill", 0, 65.0, 88.0)]).splitlines()
    assert len(lines) == 5 and lines[-1].split() == ["mean", "80.00", "94.00", "80.00", "80.00", "80.00"]
    assert table([row("own", 0, None, None)]).splitlines()[-1].split() == ["mean"] + ["n/a"] * 5


def test_progress_is_one_updating_line_in_a_terminal(world, tmp_path):
    terminal, end = pty.openpty()
    command = [sys.executable, str(TRAIN), *map(str, arguments(world, out=tmp_path, epochs=1))]
    process = subprocess.Popen(command, cwd=world, stdout=end, stderr=subprocess.PIPE)
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(terminal, 4096):
            shown += part
    assert process.wait() == 0, process.stderr.read()
    assert b"\r\x1b[Kepoch 1 step 2/2 loss" in shown and b"distill" in shown and b"images/s 0:00 left" in shown
