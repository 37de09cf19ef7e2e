"""Runs that survive: stopped, killed, out of memory, resumed.

In the end their weights are those of a run that nothing happened to.
"""

import contextlib
import errno
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import runs
import train
from conftest import assert_one_sentence, call, make_category, save_vit, tiny_vit

RUN = "folder/own/seed0"
KILLED = ("--epochs", 60, "--checkpoint-every", 0)  # 180 steps: a checkpoint at every epoch's end
KILLS = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory, own_cache):
    """A folder with own pictures and a tiny teacher."""
    folder = tmp_path_factory.mktemp("resume")
    make_category(folder / "own", train=11)
    save_vit(tiny_vit(depth=4), folder / "teacher.safetensors")
    return folder


@pytest.fixture(scope="module", autouse=True)
def forkserver(own_cache):
    """A process that imports train.py while the first tests run: `start` forks it."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["train"])
    multiprocessing.forkserver.ensure_running()


def uncaught(number, frame):
    raise AssertionError("train.py did not catch a signal")


@pytest.fixture(autouse=True)
def handlers():
    """A signal that train.py does not catch fails the test, and does not end all of them."""
    before = {n: signal.signal(n, uncaught) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def arguments(world, out, *options):
    own = ("--dataset", "folder", "--data-root", world / "own")
    teacher = ("--weights", world / "teacher.safetensors", "--layers", "0,1,2,3")
    return [*own, *teacher, "--out", out, "--epochs", 4, *options]


def run_train(world, out, *options):
    """train.py in this process."""
    return call(train.main, *arguments(world, out, *options))


def complete_run(world, out, *options):
    """The same, to the end; -> its folder."""
    result = run_train(world, out, *options)
    assert result.code == 0, result.err
    return out / RUN


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """A function: options -> the folder of a run that nothing happens to, trained once."""

    @functools.cache
    def folder(*options):
        return complete_run(world, tmp_path_factory.mktemp("undisturbed"), *options)

    return folder


def model_bytes(folder):
    return (folder / "model.safetensors").read_bytes()


def steps_logged(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def act_in_step(monkeypatch, step, action):
    """Do `action` once, in the middle of the given step of a run in this process."""
    add = train.Progress.add
    steps = 0

    def add_and_act(self, *args):
        nonlocal steps
        add(self, *args)
        steps += 1
        if steps == step:
            action()

    monkeypatch.setattr(train.Progress, "add", add_and_act)


def stop_run(world, out, *options, step=2, number=signal.SIGTERM):
    """A run in this process that gets a signal in the given step; -> its result."""
    with pytest.MonkeyPatch.context() as patch:
        act_in_step(patch, step, functools.partial(signal.raise_signal, number))
        result = run_train(world, out, *options)
    assert result.code == 128 + number, result.err
    assert f"stopped after step {step} of " in result.err
    assert not (out / RUN / "model.safetensors").exists()
    return result


@pytest.mark.parametrize(
    "step, number, options",
    [
        (3, signal.SIGINT, ()),  # an epoch's end
        (8, signal.SIGTERM, ()),  # its middle
        (3, signal.SIGINT, ("--anchor", "ema", "--optimizer", "sgd", "--momentum", 0)),
        (8, signal.SIGTERM, ("--optimizer", "sgd", "--holdout", 0.3)),
        (8, signal.SIGTERM, ("--layers", "1")),  # blocks that learn nothing, too
        (8, signal.SIGTERM, ("--optimizer", "adamw")),
        (3, signal.SIGINT, ("--cache", "disk", "--precision", "bf16")),
        (2, signal.SIGTERM, ("--cache", "disk")),  # while the cache is being filled
        (8, signal.SIGTERM, ("--cache", "off")),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(world, undisturbed, tmp_path, options, step, number):
    whole = undisturbed(*options)
    stop_run(world, tmp_path, *options, step=step, number=number)
    torch.rand(3)  # another state of the generator than the run's
    resumed = complete_run(world, tmp_path, "--resume", *options)
    assert model_bytes(resumed) == model_bytes(whole)
    names = sorted(path.name for path in resumed.iterdir())
    assert names == ["config.json", "log.jsonl", "model.safetensors"]
    assert steps_logged(resumed) == sorted({*steps_logged(whole), step})
    assert len(json.loads((resumed / "config.json").read_text())["resumed"]) == 1


def test_the_handlers_of_signals_are_put_back(world, tmp_path):
    """After a run that is complete, stopped, or failed. A second signal finds the system's."""
    found = []

    def current():
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def go_on():
        found.append(current())

    def stop():
        signal.raise_signal(signal.SIGINT)
        found.append(current())

    def fail():
        found.append(current())
        raise torch.OutOfMemoryError("no memory")

    codes = []
    for action in (go_on, stop, fail):
        with pytest.MonkeyPatch.context() as patch:
            act_in_step(patch, 2, action)
            codes.append(run_train(world, tmp_path / action.__name__).code)
        assert current() == [uncaught, uncaught], action
    assert codes == [0, 128 + signal.SIGINT, 2]
    complete, stopped, failed = found
    assert uncaught not in complete + stopped + failed
    assert stopped[0] is signal.SIG_DFL and stopped[1] is not signal.SIG_DFL


@pytest.mark.parametrize("moment", ["conclude", "build_model"])
def test_ctrl_c_outside_the_steps_stops_all(world, tmp_path, monkeypatch, moment):
    def interrupt(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Training, moment, interrupt)
    result = run_train(world, tmp_path, "--seeds", "0,1")
    assert result.code == 128 + signal.SIGINT and result.err.endswith("\nstopped\n")
    assert not (tmp_path / "folder/own/seed1").exists()
    assert signal.getsignal(signal.SIGINT) is uncaught


def test_a_signal_while_held_out_images_are_measured_waits_for_the_next_step(
    world, undisturbed, tmp_path, monkeypatch
):
    """It comes after it was decided that this step needs no checkpoint."""
    measure = train.measure_held_out

    def measure_and_stop(*values):
        if not (tmp_path / RUN / "checkpoint.safetensors").exists():
            signal.raise_signal(signal.SIGTERM)
        return measure(*values)

    monkeypatch.setattr(train, "measure_held_out", measure_and_stop)
    options = ("--holdout", 0.3, "--checkpoint-every", 3600)
    result = run_train(world, tmp_path, *options)
    assert result.code == 128 + signal.SIGTERM
    assert "stopped after step 3 of " in result.err  # epochs have two steps
    monkeypatch.undo()
    resumed = complete_run(world, tmp_path, "--resume", *options)
    assert model_bytes(resumed) == model_bytes(undisturbed(*options))


def test_a_signal_that_comes_too_late_for_a_run_stops_the_next(world, tmp_path, monkeypatch):
    write_tensors = runs.write_tensors

    def stop_and_write(path, tensors):
        if path.name == "model.safetensors":
            signal.raise_signal(signal.SIGTERM)
        write_tensors(path, tensors)

    monkeypatch.setattr(runs, "write_tensors", stop_and_write)
    result = run_train(world, tmp_path, "--seeds", "0,1")
    assert result.code == 128 + signal.SIGTERM
    names = sorted(path.name for path in (tmp_path / RUN).iterdir())
    assert names == ["config.json", "log.jsonl", "model.safetensors"]
    assert not (tmp_path / "folder/own/seed1").exists()


def test_the_checkpoint_decides_and_not_what_ran_before(world, undisturbed, tmp_path):
    """A mutation of any kind of state shows in the end; else the comparison would prove nothing."""
    whole = undisturbed()
    stop_run(world, tmp_path)
    path = tmp_path / RUN / "checkpoint.safetensors"
    tensors = load_file(path)
    of_muon = "optimizer.0.3.momentum_buffer"
    of_adamw = ("optimizer.1.4.exp_avg", "optimizer.1.4.step")
    for key in (of_muon, *of_adamw, "anchor.running", "student.cls_token"):
        runs.write_tensors(path, {**tensors, key: tensors[key] + 0.01})
        resumed = complete_run(world, tmp_path, "--resume")
        assert model_bytes(resumed) != model_bytes(whole), key
        (resumed / "model.safetensors").unlink()
    runs.write_tensors(path, tensors)
    assert model_bytes(complete_run(world, tmp_path, "--resume")) == model_bytes(whole)


def test_an_unfinished_run_is_not_begun_again_unasked(world, tmp_path):
    stop_run(world, tmp_path)
    checkpoint = tmp_path / RUN / "checkpoint.safetensors"
    before = checkpoint.read_bytes()
    result = run_train(world, tmp_path)
    assert_one_sentence(result, "--resume", "--overwrite", "unfinished")
    result = run_train(world, tmp_path, "--resume", "--lr", 0.1)
    assert_one_sentence(result, "lr None -> 0.1")
    assert checkpoint.read_bytes() == before
    checkpoint.write_bytes(before[:-50])
    result = run_train(world, tmp_path, "--resume")
    assert_one_sentence(result, "checkpoint.safetensors", "--overwrite")
    checkpoint.write_bytes(before)
    result = run_train(world, tmp_path, "--overwrite")
    assert result.code == 0 and "continues" not in result.out


@pytest.mark.parametrize("name", ["images", "epochs", "lr", "lr_rest"])
def test_resume_refuses_what_would_change_the_rest(world, tmp_path, name):
    """What the settings leave open, and the run has found out."""
    stop_run(world, tmp_path)
    path = tmp_path / RUN / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, name: config[name] + 1}))
    result = run_train(world, tmp_path, "--resume")
    assert_one_sentence(result, f"expected to go on with {name} {config[name] + 1}")


def test_resume_refuses_other_pictures(world, tmp_path):
    shutil.copytree(world / "own", tmp_path / "own")
    data_root = ("--data-root", tmp_path / "own")
    stop_run(world, tmp_path / "out", *data_root)
    picture = tmp_path / "own/train/good/000.png"
    picture.rename(picture.with_name("new.png"))
    result = run_train(world, tmp_path / "out", *data_root, "--resume")
    assert_one_sentence(result, "expected to go on with the same images, got others by name")


def test_a_line_of_the_log_that_a_kill_has_cut_short(world, tmp_path):
    stop_run(world, tmp_path)
    before = steps_logged(tmp_path / RUN)
    log = tmp_path / RUN / "log.jsonl"
    log.write_text(log.read_text() + '{"epoch": 1, "st')
    folder = complete_run(world, tmp_path, "--resume")
    assert steps_logged(folder)[: len(before)] == before == [2]


def test_a_lock_whose_file_is_gone_is_no_lock(tmp_path):
    path = tmp_path / ".lock"
    with open(path, "a") as file:
        path.unlink()
        assert not runs.flock(file)
        path.touch()
        assert not runs.flock(file)
    with open(path, "a") as file:
        assert runs.flock(file)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=["cuda", "python", "file"],
)
def test_too_little_memory_to_resume_does_not_blame_the_checkpoint(world, tmp_path, error):
    stop_run(world, tmp_path)

    def no_room(*_):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Optimizer, "load_state_dict", no_room)
        result = run_train(world, tmp_path, "--resume")
    assert_one_sentence(result, "emory")
    assert "--overwrite" not in result.err
    assert run_train(world, tmp_path, "--resume").code == 0


def test_resume_refuses_another_teacher(world, tmp_path):
    teacher = tmp_path / "changing.safetensors"
    teacher.write_bytes((world / "teacher.safetensors").read_bytes())
    stop_run(world, tmp_path, "--weights", teacher)
    save_vit(tiny_vit(seed=1, depth=4), teacher)
    result = run_train(world, tmp_path, "--weights", teacher, "--resume")
    assert_one_sentence(result, "another", "--overwrite")


def test_epochs_follow_from_the_steps_and_the_images(world, tmp_path):
    """Without --epochs: 28, or what 400 steps take. Stopped, since only their number matters."""
    command = arguments(world, tmp_path)
    at = command.index("--epochs")
    with pytest.MonkeyPatch.context() as patch:
        act_in_step(patch, 1, functools.partial(signal.raise_signal, signal.SIGTERM))
        result = call(train.main, *command[:at], *command[at + 2 :])
    assert result.code == 128 + signal.SIGTERM
    # Two images of eleven are held out.
    assert "9 normal images, 134 epochs of 3 steps" in result.out
    config = json.loads((tmp_path / RUN / "config.json").read_text())
    assert config["epochs"] == 134 and config["settings"]["epochs"] is None


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "cpu"],
)
def test_out_of_memory_is_one_sentence_and_loses_nothing(world, undisturbed, tmp_path, error):
    def no_memory():
        raise error

    with pytest.MonkeyPatch.context() as patch:
        act_in_step(patch, 5, no_memory)
        result = run_train(world, tmp_path, "--checkpoint-every", 0)
    assert_one_sentence(result, "--batch-size 4 with --precision")
    resumed = complete_run(world, tmp_path, "--resume")
    assert model_bytes(resumed) == model_bytes(undisturbed())


def start(world, out, *options):
    """train.py in a new process, which is forked from one that has imported it already."""
    context = multiprocessing.get_context("forkserver")
    command = [str(part) for part in arguments(world, out, *KILLED, *options)]
    process = context.Process(target=train.main, args=(command,))
    process.start()
    return process


def test_killed_six_times_and_still_the_same(world, tmp_path, monkeypatch):
    """SIGKILL at random moments after a checkpoint, every other one inside the writing of one."""
    whole = start(world, tmp_path / "whole")
    folder = tmp_path / "killed" / RUN
    checkpoint = folder / "checkpoint.safetensors"
    moments = random.Random(0)
    inside = 0
    for kill in range(KILLS):
        before = time_written(checkpoint)
        process = start(world, tmp_path / "killed", "--resume")
        while process.is_alive() and time_written(checkpoint) in (None, before):
            time.sleep(0.002)
        if kill % 2 == 0:
            half_written = f".checkpoint*.{process.pid}.tmp"
            while process.is_alive() and not list(folder.glob(half_written)):
                time.sleep(0.0002)
        else:
            time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL  # it was still at work
        inside += bool(list(folder.glob(".checkpoint*.tmp")))
    assert inside >= 2  # a half-written checkpoint lay there, and was not taken for one
    (folder / ".tmpfECqhT").touch()  # a killed process leaves such a file of safetensors
    start(world, tmp_path / "killed", "--resume").join()
    assert len(runs.read_config(folder)["resumed"]) == KILLS
    assert not list(folder.glob(".*"))
    whole.join()
    whole = tmp_path / "whole" / RUN
    assert model_bytes(folder) == model_bytes(whole)
    assert timeless_log(folder) == timeless_log(whole)


def time_written(path):
    """When a file was last written; None if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else None


def timeless_log(folder):
    """The lines of a log without their speed."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in lines]


# -------------------------------------------------------------------------------- several processes


def test_a_run_that_another_process_trains_is_left_to_it(world, tmp_path):
    """Before its first checkpoint and after it."""
    for _ in range(2):
        with runs.lock(tmp_path / RUN) as ours:
            assert ours
            for options in ((), ("--resume",), ("--overwrite",)):
                result = run_train(world, tmp_path, *options)
                assert_one_sentence(result, "expected a run that no other process trains", RUN)
        if not (tmp_path / RUN / "checkpoint.safetensors").exists():
            stop_run(world, tmp_path)
    with runs.lock(tmp_path / RUN):
        result = run_train(world, tmp_path, "--seeds", "0,1")
    assert result.code == 0, result.err
    assert result.out.count("done;") == 1
    assert result.out.endswith(f"left to other processes, which train them: {tmp_path / RUN}\n")
    assert not (tmp_path / RUN / ".lock").exists()
    assert run_train(world, tmp_path, "--resume").code == 0


def test_overwrite_takes_what_another_process_of_the_command_has_done(world, tmp_path, monkeypatch):
    """A run that becomes complete after the command has begun is not begun again."""
    assert run_train(world, tmp_path, "--seeds", "0,1").code == 0
    result = run_train(world, tmp_path, "--seeds", "0,1", "--overwrite")
    assert result.code == 0 and result.out.count("done;") == 2
    first = tmp_path / RUN / "model.safetensors"
    monkeypatch.setattr(train.time, "time", lambda: first.stat().st_mtime)
    result = run_train(world, tmp_path, "--seeds", "0,1", "--overwrite")
    assert result.code == 0 and "done;" not in result.out
    assert result.out.count("complete, nothing to do") == 2


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(world, tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    result = run_train(world, tmp_path)
    assert result.code == 0 and "this file system has no locks" in result.err


def test_a_run_that_fails_leaves_no_folder(world, tmp_path):
    result = run_train(world, tmp_path / "runs", "--data-root", tmp_path)
    assert_one_sentence(result, "expected train/good")
    assert list(tmp_path.iterdir()) == []


def train_into(file, command):
    with open(file, "w", buffering=1) as out, contextlib.redirect_stdout(out):
        train.main(command)


def test_three_processes_share_six_runs(world, undisturbed, tmp_path):
    """One of them is killed in the middle of a run, which another finishes."""
    short = ("--epochs", 8)
    options = (*short, "--seeds", "0,1,2,3,4,5", "--resume", "--checkpoint-every", 0)
    command = [str(part) for part in arguments(world, tmp_path, *options)]
    outputs = [tmp_path / f"{name}.txt" for name in "abc"]
    context = multiprocessing.get_context("forkserver")
    processes = []
    for output in outputs:
        output.touch()
        processes.append(context.Process(target=train_into, args=(output, command)))
        processes[-1].start()
    first = processes[0]
    while first.is_alive() and "epoch 2 " not in outputs[0].read_text():
        time.sleep(0.002)
    first.kill()
    for process in processes:
        process.join()
    assert first.exitcode == -signal.SIGKILL
    done = "".join(output.read_text() for output in outputs[1:])
    folders = [tmp_path / "folder/own" / f"seed{seed}" for seed in range(6)]
    for folder in folders:
        assert done.count(f"{folder}: done;") == 1
        names = {path.name for path in folder.iterdir()}
        assert names == {"config.json", "log.jsonl", "model.safetensors"}
        assert steps_logged(folder) == steps_logged(folders[0])
    assert sum("continues after step" in output.read_text() for output in outputs) == 1
    assert model_bytes(folders[0]) == model_bytes(undisturbed(*short))
