"""What a run leaves: its folder, config, checkpoint and provenance; and loading a trained run.

    from runs import load
    scores = load("runs/demo/washer/seed0").scores(images)

Files appear whole or not at all (but for the log, to which lines are added): they are written under
a temporary name, then renamed. Here too is what every script shares: the one error class, device
and precision.
"""

import argparse
import contextlib
import csv
import datetime
import errno
import functools
import importlib.metadata
import io
import json
import math
import operator
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: runs are not locked there
    fcntl = None

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vit import load_vit, not_finite
from vitad import AVERAGES, POS_EMBEDS, READINGS, Distillation

WEIGHTS = Path(__file__).resolve().parent / "weights"
# Settings in which the parts of one run may differ: they change roundings at most.
FREE_SETTINGS = ("out", "device", "compile", "eager", "cache", "deterministic", "checkpoint_every")
MOST = 10**9  # of any whole number on a command line: more would overflow, or take for ever
CHOICES = {
    "distance": list(READINGS),
    "anchor": list(AVERAGES),
    "pos_embed": list(POS_EMBEDS),
    "precision": ["fp32", "tf32", "bf16"],
}
# What of a config.json is read again, as `check_values` has it.
CONFIG = {
    "settings": dict,
    "teacher": dict,
    "commit": str | None,
    "device": str,
    "command": str,
    "date": str,
}
SETTINGS = {
    "dataset": str,
    "category": str,
    "data_root": str | None,
    "weights": str,
    "seed": int,
    "layers": list,
    "lam": int | float,
    "top_k": int,
    **{name: CHOICES[name] for name in ("distance", "anchor", "pos_embed")},
}


# ----------------------------------------------------------------------------- scripts and errors


class UserError(Exception):
    """An error that the user can fix. One sentence: what was expected, what was got, what to do."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended the training: after a step, with a checkpoint, or after a run."""

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

    They are UserErrors, and OSErrors such as a full disk. Each is one sentence on stderr. A name
    that stdout cannot encode is escaped, as on stderr.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            arguments = sys.argv[1:] if argv is None else [str(part) for part in argv]
            return main(arguments) or 0
        except (UserError, OSError) as error:
            complain(error)
            return 2
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            complain(
                UserError(
                    "expected work that fits the memory of the device, got more: "
                    "try a smaller --batch-size, or fewer runs in a command"
                )
            )
            return 2
        except Stopped as stop:
            print(f"\n{stop}", file=sys.stderr)
            return 128 + stop.number  # as a shell has it
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 128 + signal.SIGINT

    return wrapped


def is_out_of_memory(error):
    """Whether an error says so. torch has a class for it on CUDA, and on a CPU only words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return re.search("can(no|')t allocate memory", str(error), re.IGNORECASE) is not None


def complain(error):
    """One sentence on stderr of a UserError or an OSError."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'writing'}: {error.strerror}"
    text = " ".join(text.splitlines())  # a name may hold a line's end
    if sys.stderr.isatty():
        print("\033[K", end="", file=sys.stderr)  # clears the line of progress of train.py
    print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)


def flag(name):
    """A setting's name as an option of the command line: "top_k" -> "--top-k"."""
    return "--" + name.replace("_", "-")


def whole_numbers(text):
    """An argument's type, "3,6,9,11" -> (3, 6, 9, 11): blocks, or seeds."""
    digits = len(str(MOST))
    parts = text.split(",")
    # -1: not such a number, refused below.
    numbers = [int(x) if x.isdecimal() and len(x) < digits else -1 for x in parts]
    if numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise argparse.ArgumentTypeError(
            f"expected ascending numbers from 0, like 3,6,9,11, got {text!r}"
        )
    return tuple(numbers)


def check_whole(name, value, least):
    """Refuse a setting that is no number of epochs, images, ..."""
    if value < least:
        raise UserError(f"{flag(name)}: expected at least {least}, got {value}")
    if value > MOST:
        raise UserError(f"{flag(name)}: expected at most {MOST}, got {value}")


# ------------------------------------------------------------------------------ device, precision


def pick_device(name=None):
    """--device as torch names it; None: cuda where there is one, else cpu."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # an unknown name, or not on this machine
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device: expected a device that torch can use here, got {name!r} ({reason})"
        ) from None
    return name


def multiplies_bf16(device):
    """Whether the device has products of bfloat16 in hardware, as far as torch says."""
    if "cuda" in device:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def set_tf32(precision):
    """How CUDA multiplies float32, for the whole process. Only scripts call it.

    fp32: in float32. tf32: in TF32. bf16: autocast rounds the networks' products; the one it leaves
    in float32, the patch projection, is a convolution and uses TF32, eight times as fine as bf16.
    """
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision in ("tf32", "bf16")


# ------------------------------------------------------------------------------ whole or not there


@contextlib.contextmanager
def atomic(path):
    """Yields a temporary name beside `path`, renamed to `path` when the block has succeeded."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: expected a file's name, got a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes owner-only files
        yield temporary
        temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # else a crash of the machine may leave it empty
        os.replace(temporary, path)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(errno.EIO, f"expected room for the tensors, got {error}", str(path)) from None
    except OSError as error:
        error.filename = str(path)  # a write that fails does not know its file
        raise
    finally:
        with contextlib.suppress(OSError):  # its error would hide the one that matters
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text file, whole or not at all. What of a name is not UTF-8 is escaped."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_tensors(path, tensors, metadata=None):
    """A safetensors file, whole or not at all. metadata: {text: text}."""
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_text(path):
    """A file's text. An error of reading does not know its file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        error.filename = str(path)
        raise


def read_json(path, expected):
    """A JSON object from a file that this repository wrote. expected: see `check_values`."""
    try:
        values = json.loads(read_text(path), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: expected a JSON object, got a file that does not read as one ({error}): "
            f"make it again"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got another value: make it again")
    check_values(path, values, expected)
    return values


def refuse_constant(text):
    """NaN and Infinity, which are no JSON and which no number of ours is."""
    raise ValueError(f"{text} is no number")


def check_values(path, values, expected):
    """Refuse a JSON object without these values. expected: {name: type, or list of choices}."""
    for name, kind in expected.items():
        value = values.get(name)
        if isinstance(kind, list):
            words, holds = f"one of {', '.join(kind)}", value in kind
        else:
            words, holds = getattr(kind, "__name__", str(kind)), isinstance(value, kind)
            holds = holds and not isinstance(value, bool)  # True is an int to Python
        if name not in values or not holds:
            got = repr(value) if name in values else "none"
            raise UserError(f"{path}: expected {name} as {words}, got {got}: make it again")


def read_csv(path, columns):
    """The rows of a table with these columns, as dicts of texts."""
    got = "others, or a row of another length"
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
        whole = all(len(row) == len(columns) for row in rows)
        if whole and rows[:1] == [list(columns)]:
            return [dict(zip(columns, row, strict=True)) for row in rows[1:]]
    except (ValueError, csv.Error) as error:
        got = error
    raise UserError(f"{path}: expected the columns {', '.join(columns)}, got {got}: make it again")


def write_csv(path, columns, rows):
    """A table of dicts, whole or not at all."""
    with (
        atomic(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def is_number(text):
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# ----------------------------------------------------------------------------------- a run's folder


@contextlib.contextmanager
def new_folder(folder):
    """Makes a folder, and those above it. What is new and still empty in the end goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # something came of it
                path.rmdir()


@contextlib.contextmanager
def lock(run):
    """Yields whether the run folder is this process's alone until the block ends.

    The kernel frees the lock however a process ends. On NFS Linux asks the server for it, so it
    should hold between machines, but for mounts with the option `nolock`. A file system without
    locks gets a note, and the run goes on.
    """
    with new_folder(run):
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


def flock(file):
    """Lock an open file, until it is closed; -> whether no other process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process that had it before may have removed the file after this one opened it.
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print(f"note: {file.name}: this file system has no locks", file=sys.stderr)
        return True


@contextlib.contextmanager
def one_at_a_time(name):
    """Waits until no other process is in such a block of this name. For downloads."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # as without locks
                cache_folder().mkdir(parents=True, exist_ok=True)
                path = cache_folder() / f"{name}.lock"
                fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        yield


def cache_folder():
    """What may be deleted at any time."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home, as in a container
        cache = tempfile.gettempdir()
    return Path(cache) / "vitad"


def is_locked(run):
    """Whether another process has the run folder. To ask takes its lock for a moment."""
    if fcntl is None:
        return False
    try:
        with open(run / ".lock", "r+") as file:
            return not flock(file)
    except FileNotFoundError:
        return False


def is_complete(run, settings, existing, locked=False):
    """Whether the run folder holds a complete run of these settings (a dict).

    existing: what to do with a run that is there, "resume" or None. A run of other settings is
    refused. So is an unfinished one where `existing` is None, unless another process trains it.
    locked: this process holds the run's lock, so no other does.
    """
    complete = (run / "model.safetensors").is_file()
    begun = (run / "checkpoint.safetensors").is_file()
    if not (complete or begun):
        return False
    different = differences(read_config(run)["settings"], settings)
    if different:
        raise UserError(
            f"{run}: expected the settings of the run that is there, got {', '.join(different)}: "
            f"choose another --out, or --overwrite to start again"
        )
    if not complete and existing != "resume" and (locked or not is_locked(run)):
        raise UserError(
            f"{run}: expected --resume, to continue the unfinished run that is there, "
            f"or --overwrite, to start again, got neither"
        )
    return complete


def differences(before, settings):
    """What differs between the settings of a file and of this run, each as "name old -> new".

    One that an older file does not hold counts as equal.
    """
    now = json.loads(json.dumps(settings))  # tuples become lists, as in the file
    return [
        f"{name} {before[name]} -> {value}"
        for name, value in now.items()
        if name not in FREE_SETTINGS and before.get(name, value) != value
    ]


def begin_run(run, config):
    """A new run folder with its config.json, without model, log and results of an older run.

    They go once the new config.json is written, and before it takes its name: an old model never
    lies beside a new config.
    """
    remove_half_written(run)
    with atomic(run / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (
            "model.safetensors",
            "checkpoint.safetensors",
            "log.jsonl",
            "scores.csv",
            "result.json",
            "training.svg",
            "histogram.svg",
            "roc.svg",
        ):
            (run / name).unlink(missing_ok=True)
        shutil.rmtree(run / "failures", ignore_errors=True)


def config_to_resume(run, teacher_sha256):
    """The config.json of a run that can go on with this teacher."""
    config = read_config(run)
    if config["teacher"]["sha256"] != teacher_sha256:
        raise UserError(
            f"{run}: expected the teacher that the run was begun with, got another: "
            f"--overwrite starts again"
        )
    config.setdefault("resumed", [])
    check_values(run / "config.json", config, {"resumed": list})
    return config


def resume_run(run, config, made, log):
    """Go on in a run folder: `made`, the provenance of what follows, and the lines so far."""
    remove_half_written(run)
    config["resumed"].append(made)
    write_text(run / "config.json", json.dumps(config, indent=2) + "\n")
    write_text(run / "log.jsonl", "".join(log))


def remove_half_written(run):
    """Files that a killed run was writing: names of `atomic`, and safetensors' own."""
    for path in [*run.glob(".*.tmp"), *run.glob(".tmp*")]:
        path.unlink(missing_ok=True)  # evaluate.py may rename its own meanwhile


def read_config(run):
    """The config.json of a run folder: settings, teacher, provenance."""
    path = Path(run) / "config.json"
    config = read_json(path, CONFIG)
    settings = config["settings"]
    check_values(path, config["teacher"], {"sha256": str})
    check_values(path, {"name": None, **config["teacher"]}, {"name": str | None})
    check_values(path, settings, SETTINGS)
    if "precision" in settings:
        check_values(path, settings, {"precision": CHOICES["precision"]})
    layers = settings["layers"]
    whole = all(type(c) is int and c >= 0 for c in layers)
    if not layers or not whole or layers != sorted(set(layers)):
        raise UserError(f"{path}: expected layers as ascending numbers from 0, got {layers}")
    return config


def read_log(path):
    """The lines of a log.jsonl as [(step, text)], without a last one that a kill has cut short."""
    try:
        lines = [line for line in read_text(path).splitlines(keepends=True) if line.endswith("\n")]
        return [(operator.index(json.loads(line)["step"]), line) for line in lines]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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
    if "cuda" in device:
        device_name = torch.cuda.get_device_name(device)
    else:
        device_name = f"{device}, {torch.get_num_threads()} threads"
    now = datetime.datetime.now(datetime.UTC)
    return {
        "versions": versions,
        "device": device_name,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "date": now.isoformat(timespec="seconds"),
    }


# --------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(path, model, optimizers, step, *, settings):
    """All that the rest of a run depends on: what is learnt, optimisers and step.

    The CPU's random state too, for a fork that draws numbers while it trains. Here nothing does
    after the student's initialisation.

    An optimiser's state is kept as optimizer.<which>.<parameter>.<name of the state>. The order of
    the images is not in it: that depends on seed and epoch alone. The settings (a dict) say whose
    it is.
    """
    tensors = {**model.learned_state(), "random": torch.get_rng_state(), "step": torch.tensor(step)}
    for which, optimizer in enumerate(optimizers):
        for i, values in optimizer.state_dict()["state"].items():
            for name, value in values.items():
                if value is not None:
                    tensors[f"optimizer.{which}.{i}.{name}"] = value
    write_tensors(path, tensors, metadata={"settings": json.dumps(settings)})


def load_checkpoint(path, model, optimizers, *, settings):
    """The inverse of `save_checkpoint`; -> step."""
    path.open("rb").close()  # safetensors says of one that may not be read that there is none
    try:
        with safe_open(path, framework="pt") as file:
            before = json.loads((file.metadata() or {}).get("settings", "{}"))
        different = differences(dict(before), settings)
        if different:
            raise ValueError(f"it is another run's, {', '.join(different)}")
        tensors = load_file(path)
        step = int(tensors.pop("step"))
        torch.set_rng_state(tensors.pop("random"))
        states = [{} for _ in optimizers]
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            if key.count(".") != 3:
                raise ValueError(f"{key}, of another version")
            _, which, i, name = key.split(".")
            states[int(which)].setdefault(int(i), {})[name] = tensors.pop(key)
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        model.load_learned_state(tensors)
    except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise  # `train` says what to do; the checkpoint is good
        raise UserError(
            f"{path}: expected a checkpoint of this run, got a file that does not fit "
            f"({str(error).splitlines()[0]}): --overwrite starts again"
        ) from None
    return step


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


def check_teacher(settings, teacher, where=flag):
    """Refuse blocks or patches that the teacher does not have.

    where(name): how the error names a setting.
    """
    limits = (
        ("layers", settings["layers"][-1], 0, len(teacher.blocks) - 1),
        ("top_k", settings["top_k"], 1, teacher.config["grid"] ** 2),
    )
    for name, value, least, most in limits:
        if not least <= value <= most:
            expected = f"expected {least} to {most} with this teacher"
            raise UserError(f"{where(name)}: {expected}, got {value}")


def build(teacher, settings, precision="fp32", without=()):
    """The model that a run's settings (a dict) describe, with a student that has learnt nothing."""
    return Distillation(
        teacher,
        layers=settings["layers"],
        reading=settings["distance"],  # the option --distance
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
    On CUDA call `set_tf32("fp32")` first, as evaluate.py does: torch may use TF32 otherwise.
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
    check_teacher(config["settings"], teacher, lambda name: f"{run}/config.json: {name}")
    model = build(teacher, config["settings"], precision)
    path = Path(run) / "model.safetensors"
    path.open("rb").close()  # as in `load_checkpoint`
    try:
        tensors = load_file(path)
        model.load_learned_state(tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: expected the student, anchor and delta of this run, got a file that does not "
            f"fit ({str(error).splitlines()[0]}): train the run again"
        ) from None
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"{path}: expected finite weights, got {broken}: train the run again")
    return model.to(pick_device(device))
