"""What a run leaves: its folder, config, checkpoint and provenance; and loading a trained run.

    from runs import load
    scores = load("runs/demo/washer/seed0").scores(images)

Files appear whole or not at all (but for the log, to which lines are added): they are written under
a temporary name, then renamed. Here too is what every script shares: the one error class, device
and precision.
"""

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vit import load_vit
from vitad import Distillation

WEIGHTS = Path(__file__).resolve().parent / "weights"
# Settings in which the parts of one run may differ: they change roundings at most.
FREE_SETTINGS = ("out", "device", "compile", "cache", "deterministic", "checkpoint_every")


# ----------------------------------------------------------------------------- scripts and errors


class UserError(Exception):
    """An error that the user can fix. One sentence: what was expected, what was got, what to do."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the training, after its step and with a checkpoint."""

    def __init__(self, number, text):
        super().__init__(text)
        self.number = number


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help; a wrong argument is a UserError."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        raise UserError(message)


def script(main):
    """Decorates `main(argv) -> exit code or None`: errors that the user can fix exit with code 2.

    They are UserErrors, and OSErrors such as a full disk. Each is one sentence on stderr.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(sys.argv[1:] if argv is None else [str(part) for part in argv]) or 0
        except (UserError, OSError) as error:
            complain(error)
            return 2
        except Stopped as stop:
            print(f"\n{stop}", file=sys.stderr)
            return 128 + stop.number  # as a shell has it
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 128 + signal.SIGINT

    return wrapped


def complain(error):
    """One sentence on stderr of a UserError or an OSError."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'writing'}: {error.strerror}"
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)


def flag(name):
    """A setting's name as an option of the command line: "top_k" -> "--top-k"."""
    return "--" + name.replace("_", "-")


def whole_numbers(text):
    """An argument's type, "3,6,9,11" -> (3, 6, 9, 11): blocks, or seeds."""
    numbers = [int(part) if part.isdecimal() else -1 for part in text.split(",")]
    if numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise argparse.ArgumentTypeError(
            f"expected ascending numbers from 0, like 3,6,9,11, got {text!r}"
        )
    return tuple(numbers)


# ------------------------------------------------------------------------------ device, precision


def pick_device(name=None):
    """--device as torch names it; None: cuda where there is one, else cpu."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or not on this machine
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: expected a device that torch can use here, got {name!r} ({reason})"
        ) from None
    return name


def set_tf32(precision):
    """How CUDA multiplies float32, for the whole process. Only scripts call it.

    fp32: exactly. tf32: in TF32. bf16: autocast rounds the networks' products; the one it leaves in
    float32, the patch projection, is a convolution and uses TF32, eight times as fine as bf16.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "bf16")


# ------------------------------------------------------------------------------ whole or not there


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary name beside `path`, renamed to `path` when the block has succeeded."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes owner-only files
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a write that fails does not know its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text file, whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text)


def write_tensors(path, tensors, metadata=None):
    """A safetensors file, whole or not at all. metadata: {text: text}."""
    with atomic(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=metadata)
        except SafetensorError as error:  # its word for a full disk
            raise UserError(f"{path}: expected room for the tensors, got {error}") from None


def read_json(path):
    """A JSON object from a file that this repository wrote."""
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(
            f"{path}: expected a JSON object, got a file that does not read as one ({error}): "
            f"make it again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got another value: make it again")
    return values


# ----------------------------------------------------------------------------------- a run's folder


@contextlib.contextmanager
def lock(run):
    """Yields whether the run folder is this process's alone until the block ends.

    The kernel frees the lock however a process ends. On NFS it holds between machines too, but for
    mounts with the option `nolock`.
    """
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    run.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    path = run / ".lock"
    with open(path, "a") as file:
        ours = flock(file)
        try:
            yield ours
        finally:
            if ours:
                path.unlink(missing_ok=True)
                for folder in new:
                    with contextlib.suppress(OSError):  # empty only if nothing came of the run
                        folder.rmdir()


def flock(file):
    """Lock an open file, until it is closed; -> whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process that had it before may have removed the file after this one opened it.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def is_complete(run, settings, existing):
    """Whether the run folder holds a complete run of these settings (a dict).

    existing: what to do with a run that is there, "resume", "overwrite" or None. Refused are a run
    of other settings, and an unfinished run where it is None.
    """
    complete = (run / "model.safetensors").is_file()
    begun = (run / "checkpoint.safetensors").is_file()
    if existing == "overwrite" or not (complete or begun):
        return False
    before = read_config(run)["settings"]
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    different = [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS and before.get(name, value) != value
    ]
    if different:
        raise UserError(
            f"{run}: expected the settings of the run that is there, got {', '.join(different)}: "
            f"choose another --out, or --overwrite to start again"
        )
    if not complete and existing != "resume":
        raise UserError(
            f"{run}: expected --resume, to continue the unfinished run that is there, "
            f"or --overwrite, to start again, got neither"
        )
    return complete


def begin_run(run, config):
    """A new run folder with its config.json, without model, log and results of an older run."""
    run.mkdir(parents=True, exist_ok=True)
    remove_half_written(run)
    for name in (
        "model.safetensors",
        "checkpoint.safetensors",
        "log.jsonl",
        "scores.csv",
        "result.json",
    ):
        (run / name).unlink(missing_ok=True)
    write_config(run, config)


def resume_run(run, teacher_sha256, made):
    """Go on in a run folder; its config.json gets `made`, the provenance of what follows."""
    remove_half_written(run)
    config = read_config(run)
    if config["teacher"]["sha256"] != teacher_sha256:
        raise UserError(
            f"{run}: expected the teacher that the run was begun with, got another: "
            f"--overwrite starts again"
        )
    config["resumed"] = [*config.get("resumed", []), made]
    write_config(run, config)


def remove_half_written(run):
    """Files that a killed run was writing: names of `atomic`, and safetensors' own."""
    for path in [*run.glob(".*.tmp"), *run.glob(".tmp*")]:
        path.unlink()


def write_config(run, config):
    write_text(run / "config.json", json.dumps(config, indent=2) + "\n")


def read_config(run):
    """The config.json of a run folder: settings, teacher, provenance."""
    path = Path(run) / "config.json"
    config = read_json(path)
    parts = (config.get("settings"), config.get("teacher"))
    if not all(isinstance(part, dict) for part in parts) or "sha256" not in config["teacher"]:
        raise UserError(
            f"{path}: expected the settings that train.py wrote, "
            f"got a file that does not hold them: train the run again"
        )
    return config


def read_log(path):
    """The lines of a log.jsonl as [(step, text)], without a last one that a kill has cut short."""
    try:
        lines = path.read_text().splitlines(keepends=True)
        return [(json.loads(line)["step"], line) for line in lines if line.endswith("\n")]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: expected the log of a run, got a line without a step ({error}): "
            f"--overwrite starts the run again"
        ) from None


def provenance(device):
    """How a run or a result was made: versions, device, command line, commit, date."""
    root = str(Path(__file__).resolve().parent)
    git = ["git", "-C", root, "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without git
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("torchvision", "numpy", "safetensors"):
        versions[name] = importlib.metadata.version(name)
    device_name = f"{device}, {torch.get_num_threads()} threads"
    if "cuda" in device:
        device_name = torch.cuda.get_device_name(device)
    now = datetime.datetime.now(datetime.UTC)
    return {
        "versions": versions,
        "device": device_name,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
    }


# --------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(path, model, optimizers, step):
    """All that the rest of a run depends on: what is learnt, optimisers, step and random state.

    The parameters are numbered through all optimisers: optimizer.<number>.<name of the state>. The
    order of the images is not in it: that depends on seed and epoch alone.
    """
    tensors = {**model.learned_state(), "random": torch.get_rng_state(), "step": torch.tensor(step)}
    first = 0
    for optimizer in optimizers:
        for i, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"optimizer.{first + i}.{name}"] = value
        first += count_parameters(optimizer)
    write_tensors(path, tensors)


def load_checkpoint(path, model, optimizers):
    """The inverse of `save_checkpoint`; -> step."""
    try:
        tensors = load_file(path)
        step = int(tensors.pop("step"))
        torch.set_rng_state(tensors.pop("random"))
        states = {}
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            _, i, name = key.split(".")
            states.setdefault(int(i), {})[name] = tensors.pop(key)
        first = 0
        for optimizer in optimizers:
            numbers = range(first, first + count_parameters(optimizer))
            state = {i - first: states[i] for i in numbers if i in states}
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
            first = numbers.stop
        model.load_learned_state(tensors)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected a checkpoint of this run, got a file that does not fit "
            f"({str(error).splitlines()[0]}): --overwrite starts again"
        ) from None
    return step


def count_parameters(optimizer):
    return sum(len(group["params"]) for group in optimizer.param_groups)


# ----------------------------------------------------------------------------------- trained models


def weights_path(weights, folder=WEIGHTS):
    """--weights -> a file: as it is, or a name, which stands for weights/<name>.safetensors."""
    weights = str(weights)
    if Path(weights).is_file() or weights.endswith(".safetensors"):
        return Path(weights)
    return Path(folder) / f"{weights}.safetensors"


def load_teacher(weights):
    """A teacher by the name or the file of its weights."""
    try:
        return load_vit(weights_path(weights))
    except ValueError as error:
        raise UserError(str(error)) from None


def build(teacher, settings, precision="fp32", without=()):
    """The model that a run's settings (a dict) describe, with a student that has learnt nothing."""
    return Distillation(
        teacher,
        layers=settings["layers"],
        reading=settings["distance"],
        pos_embed=settings["pos_embed"],
        anchor=settings["anchor"],
        lam=settings["lam"],
        top_k=settings["top_k"],
        precision=precision,
        without=without,
    )


def load(run, weights=None, device=None, precision="fp32", teacher=None):
    """The trained model of a run folder, ready to score.

    weights: the teacher's file, if it is not where training found it.
    device: None takes cuda where there is one. precision: of the scores, whatever training had.
    teacher: one that is loaded already, to be used if it is the run's.
    On CUDA call `set_tf32("fp32")` first for exact products, as evaluate.py does.
    """
    config = read_config(run)
    expected = config["teacher"]["sha256"]
    weights = weights_path(weights or config["settings"]["weights"])
    if teacher is None or teacher.sha256 != expected:
        teacher = load_teacher(weights)
    if teacher.sha256 != expected:
        raise UserError(
            f"{weights}: expected the teacher that {run} was trained with, "
            f"sha256 {expected[:12]}..., got {teacher.sha256[:12]}...: "
            f"name the right file with --weights"
        )
    model = build(teacher, config["settings"], precision)
    path = Path(run) / "model.safetensors"
    try:
        model.load_learned_state(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected the student, anchor and delta of this run, got a file that does not "
            f"fit ({str(error).splitlines()[0]}): train the run again"
        ) from None
    return model.to(pick_device(device))
