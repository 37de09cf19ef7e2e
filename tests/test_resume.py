"""Runs that survive: stopped, killed, out of memory, resumed; the weights are in the end those of a run that nothing happened to."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, assert_one_sentence, make_category, run, save_vit, tiny_vit
from safetensors.torch import load_file

import train

TRAIN = ROOT / "train.py"
KILLED = ("--epochs", 80, "--checkpoint-every", 0)  # 240 steps: a checkpoint at every epoch's end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with own pictures and a tiny teacher; a cache of its own."""
    folder = tmp_path_factory.mktemp("resume")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    make_category(folder / "own", train=11)
    save_vit(tiny_vit(), folder / "teacher.safetensors")
    yield folder
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def arguments(world, out, *options):
    return ["--dataset", "folder", "--data-root", world / "own", "--weights", world / "teacher.safetensors", "--out", out, "--epochs", 4, *options]


def in_process(world, out, *options):
    train.main(*train.parse([str(part) for part in arguments(world, out, *options)]))
    return out / "folder/own/seed0"


def steps_logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def stop_after(monkeypatch, steps, action):
    """Do `action` once, in the middle of the given step of a run in this process."""
    add, count = train.Progress.add, iter(range(1, 10**6))

    def wrapped(self, *args):
        add(self, *args)
        if next(count) == steps:
            action()

    monkeypatch.setattr(train.Progress, "add", wrapped)


@pytest.fixture(autouse=True)
def signals():
    """train.py catches them; the tests' own process gets them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("options", [
    (), ("--anchor", "ema", "--optimizer", "sgd", "--momentum", 0), ("--optimizer", "sgd", "--holdout", 0.3), ("--cache", "disk", "--precision", "bf16"), ("--cache", "off"),
], ids=lambda options: " ".join(map(str, options)) or "default")
@pytest.mark.parametrize("steps, number", [(2, signal.SIGTERM), (3, signal.SIGINT), (8, signal.SIGTERM)])
def test_a_stopped_run_resumes_bit_for_bit(world, tmp_path, monkeypatch, options, steps, number):
    whole = in_process(world, tmp_path / "whole", *options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, steps, lambda: os.kill(os.getpid(), number))
        in_process(world, tmp_path / "stopped", *options)
    assert stop.value.code == 128 + number
    torch.rand(3)  # another state of the generator than the run's
    resumed = in_process(world, tmp_path / "stopped", "--resume", *options)
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert sorted(path.name for path in resumed.iterdir()) == ["config.json", "log.jsonl", "model.safetensors"]
    assert steps_logged(resumed) == sorted({*steps_logged(whole), steps})
    assert len(json.loads((resumed / "config.json").read_text())["resumed"]) == 1


def test_the_checkpoint_decides_and_not_what_ran_before(world, tmp_path, monkeypatch):
    """A mutation of every kind of state must show in the end, or the comparison above would prove nothing."""
    whole = in_process(world, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        in_process(world, tmp_path / "stopped")
    path = tmp_path / "stopped/folder/own/seed0/checkpoint.safetensors"
    tensors = load_file(path)
    for key in ("optimizer.3.exp_avg", "optimizer.3.step", "anchor.running", "student.cls_token"):
        train.save_tensors({**tensors, key: tensors[key] + 0.01}, path)
        in_process(world, tmp_path / "stopped", "--resume")
        assert (path.parent / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes(), key
        (path.parent / "model.safetensors").unlink()


def test_an_unfinished_run_is_not_begun_again_unasked(world, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        in_process(world, tmp_path)
    checkpoint = tmp_path / "folder/own/seed0/checkpoint.safetensors"
    before = checkpoint.read_bytes()
    assert_one_sentence(run(TRAIN, *arguments(world, tmp_path)), "--resume", "--overwrite", "unfinished")
    assert_one_sentence(run(TRAIN, *arguments(world, tmp_path, "--resume", "--lr", 0.1)), "lr None -> 0.1")
    save_vit(tiny_vit(seed=1), tmp_path / "other.safetensors")
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:-50])
    assert_one_sentence(run(TRAIN, *arguments(world, tmp_path, "--resume")), "checkpoint.safetensors", "--overwrite")
    checkpoint.write_bytes(before)
    process = run(TRAIN, *arguments(world, tmp_path, "--overwrite"))
    assert process.returncode == 0 and "continues" not in process.stdout


def test_resume_refuses_another_teacher(world, tmp_path, monkeypatch):
    teacher = world / "changing.safetensors"
    teacher.write_bytes((world / "teacher.safetensors").read_bytes())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_after(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        in_process(world, tmp_path, "--weights", teacher)
    save_vit(tiny_vit(seed=1), teacher)
    assert_one_sentence(run(TRAIN, *arguments(world, tmp_path, "--weights", teacher, "--resume")), "another", "--overwrite")


def test_out_of_memory_is_one_sentence_and_loses_nothing(world, tmp_path, monkeypatch, capsys):
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        stop_after(patch, 5, no_memory)
        in_process(world, tmp_path, "--checkpoint-every", 0)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--batch-size 4" in error and "fp32" in error and len(error.splitlines()) == 1
    whole = in_process(world, tmp_path / "whole")
    resumed = in_process(world, tmp_path, "--resume")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_killed_twenty_times_and_still_the_same(world, tmp_path, monkeypatch):
    """Two runs side by side, ten kills each, since most of the time goes into starting Python."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = run(TRAIN, *arguments(world, tmp_path / "whole", *KILLED), fork=False)
    assert whole.returncode == 0, whole.stderr
    whole = tmp_path / "whole/folder/own/seed0"
    with ThreadPoolExecutor() as pool:
        inside = sum(pool.map(lambda seed: kill_ten_times(world, tmp_path / str(seed), random.Random(seed)), (0, 1)))
    assert inside >= 3  # a half-written checkpoint lay there, and was not taken for one
    for folder in (tmp_path / "0/folder/own/seed0", tmp_path / "1/folder/own/seed0"):
        assert not list(folder.glob(".*"))
        assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
        logs = [[{key: value for key, value in json.loads(line).items() if key != "images_per_s"}
                 for line in (path / "log.jsonl").read_text().splitlines()] for path in (whole, folder)]
        assert logs[0] == logs[1]


def kill_ten_times(world, out, moments):
    """SIGKILL at random moments after the first checkpoint, every third one inside the writing of a checkpoint, and then to the end;
    -> how many of these hit."""
    folder, inside = out / "folder/own/seed0", 0
    command = [sys.executable, TRAIN, *arguments(world, out, *KILLED), "--resume"]
    for kill in range(10):
        process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        before = read(folder / "checkpoint.safetensors")
        while process.poll() is None and read(folder / "checkpoint.safetensors") in (None, before):
            time.sleep(0.002)
        assert process.poll() is None, process.stderr.read()
        if kill % 3 == 0:
            while process.poll() is None and not list(folder.glob(f".checkpoint*.{process.pid}.tmp")):
                time.sleep(0.0002)
        else:
            time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        inside += bool(list(folder.glob(".checkpoint*.tmp")))
        assert process.returncode == -signal.SIGKILL  # it was still at work
    (folder / ".tmpfECqhT").touch()  # safetensors writes to such a name, and a killed process leaves it
    process = run(*command[1:], fork=False)
    assert process.returncode == 0 and "continues after step" in process.stdout, process.stderr
    return inside


def read(path):
    """When a file was last written; None if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None
