"""Files that appear whole or not at all, what a run or a result was made with, and the sentence that ends a script.

Shared by every script. Nothing here imports torch at import time: wrong arguments are answered at once.
"""
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

# Before torch is imported: how long its threads (of GNU OpenMP) spin while one waits for another. The default is 300 times as much, and lets the demo, which trains in
# half a minute on two free cores, go on for more than nine where another process has one of them; with this it takes 72 seconds there, and as long as before where both are free.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary name beside `path`; rename it to `path` when the block ends, remove it when the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors would leave a file that only its owner reads
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a write that fails does not know whose it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(tensors, path):
    """A safetensors file; a full disk is one sentence."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with one_sentence(), atomic(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # its word for a full disk
            raise ValueError(f"{path}: expected room for the model, got {error}") from None


def is_complete(run, settings, existing):
    """Whether a run of these settings (a dict) is there, whole; `existing` says what to do with one that is there: "resume", "overwrite" or None.

    Refuses a run of other settings, naming the difference, and to begin again, unasked, what --resume can continue.
    """
    complete, begun = ((run / name).is_file() for name in ("model.safetensors", "checkpoint.safetensors"))
    if existing == "overwrite" or not complete and not begun:
        return False
    then, now = read_config(run)["settings"], json.loads(json.dumps(settings))  # tuples become lists, as in the file
    free = ("out", "device", "compile", "cache", "deterministic", "checkpoint_every")  # may differ: they change roundings at most
    different = [f"{name} {then[name]} -> {now[name]}" for name in now if name not in free and then.get(name, now[name]) != now[name]]
    if different:
        raise ValueError(f"{run}: expected the settings of the run that is there, got {', '.join(different)}: "
                         f"choose another --out, or --overwrite to start again")
    if not complete and existing != "resume":
        raise ValueError(f"{run}: expected --resume, to continue the unfinished run that is there, or --overwrite, to start again, got neither")
    return complete


def open_run(run, facts, made_with, resume):
    """Make a run folder with its config.json, without what an older run left in it; or go on in the one that is there."""
    run.mkdir(parents=True, exist_ok=True)
    for half_written in [*run.glob(".*.tmp"), *run.glob(".tmp*")]:  # what a killed run was at: `atomic`, and safetensors inside of it
        half_written.unlink()
    if resume:
        config = read_config(run)
        if config["teacher"]["sha256"] != facts["teacher"]["sha256"]:
            raise ValueError(f"{run}: expected the teacher that the run was begun with, got another: --overwrite starts again")
        config["resumed"] = [*config.get("resumed", []), made_with]
    else:
        for name in ("model.safetensors", "checkpoint.safetensors", "log.jsonl", "scores.csv", "result.json"):
            (run / name).unlink(missing_ok=True)
        config = {**facts, **made_with}
    with atomic(run / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n")


def save_checkpoint(path, model, optimizer, step):
    """All that the rest of a run depends on: student, anchor, the optimiser's state, step and random state.

    The order of the images is not in it: that depends on seed and epoch alone.
    """
    import torch

    state = {f"optimizer.{i}.{name}": value for i, values in optimizer.state_dict()["state"].items()
             for name, value in values.items() if value is not None}
    save_tensors({**model.learned_state(), **state, "random": torch.get_rng_state(), "step": torch.tensor(step)}, path)


def load_checkpoint(path, model, optimizer):
    """The inverse; -> step."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        step, states = int(tensors.pop("step")), {}
        torch.set_rng_state(tensors.pop("random"))
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            _, i, name = key.split(".")
            states.setdefault(int(i), {})[name] = tensors.pop(key)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        model.load_learned_state(tensors)
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: expected a checkpoint of this run, got a file that does not fit ({str(error).splitlines()[0]}): "
                         f"--overwrite starts again") from None
    return step


def read_config(run):
    """The config.json of a run folder: settings, teacher, and what the run was made with."""
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        config["settings"], config["teacher"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the settings that train.py wrote, got a file that does not hold them: train the run again") from None
    return config


def provenance(device):
    """What a run or a result was made with: versions, device, command line, commit, date."""
    import torch

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without git
    versions = {name: importlib.metadata.version(name) for name in ("torchvision", "numpy", "safetensors")}
    return {"versions": {"python": platform.python_version(), "torch": torch.__version__, **versions},
            "device": torch.cuda.get_device_name(device) if "cuda" in device else f"{device}, {torch.get_num_threads()} threads",
            "command": shlex.join(["python", *sys.argv]), "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


@contextlib.contextmanager
def one_sentence(*kinds):
    """What a user can mend (ValueError and OSError, or the `kinds` named) ends as one sentence and exit code 2, without traceback."""
    try:
        yield
    except kinds or (ValueError, OSError) as error:
        fail(f"{error.filename or 'writing'}: {error.strerror}" if isinstance(error, OSError) and error.strerror else error)


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
