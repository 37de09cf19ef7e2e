#!/usr/bin/env python3
"""Train one student on the normal images of one category, or of every category of a protocol in turn.

    python train.py                                                 # the demo: generated images, a small teacher that comes along
    python train.py --dataset mvtec --category bottle               # data/mvtec/bottle, the paper's teacher
    python train.py --dataset cifar10 --category all                # downloads CIFAR-10 into data/
    python train.py --dataset folder --data-root DIR                # your own pictures

A run writes runs/<dataset>/<category>/seed<seed>/: model.safetensors (student, anchor, delta; the teacher is named by sha256 in
config.json), config.json (settings, versions, device, command) and log.jsonl (one line every ten steps). `python evaluate.py` scores it.
The demo takes half a minute on 2 CPU cores, bottle with DeiT-Tiny 7 minutes. Only normal training images are ever read. The last epoch is the result.
"""
import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import PAPER_AUROC, atomic, fail, find_category, one_sentence, slug, train_files, train_split
# torch is imported where it is first needed: --help and wrong arguments are answered at once.

TEACHER = "vit_base_patch16_224"  # the paper's
# lr and batch size are section 4.1's; for the demo and own pictures MVTec's. Epochs are ours (README, "What the paper leaves open"): about
# 1,600 steps on bottle, CIFAR-10, CIFAR-100 and Fashion-MNIST, which have 53, 157, 79 and 188 steps an epoch.
PER_DATASET = {
    "cifar10": dict(lr=0.1, batch_size=32, epochs=10, data_root="data", weights=TEACHER),
    "cifar100": dict(lr=0.1, batch_size=32, epochs=20, data_root="data", weights=TEACHER),
    "fashion_mnist": dict(lr=0.1, batch_size=32, epochs=8, data_root="data", weights=TEACHER),
    "mvtec": dict(lr=0.2, batch_size=4, epochs=30, data_root="data/mvtec", weights=TEACHER),
    "folder": dict(lr=0.2, batch_size=4, epochs=30, data_root=None, weights=TEACHER),
    "demo": dict(lr=0.2, batch_size=4, epochs=24, data_root=None, weights="demo_teacher"),
}
ADAMW_LR = 5e-4  # trains under every reading of the norm; the paper's lr is for SGD
LOG_EVERY, EVAL_BATCH = 10, 32  # steps; images, without gradient


def per_dataset(name):
    """The defaults of a setting as --help shows them: "mvtec 4, cifar10 32"."""
    return "default " + ", ".join(f"{dataset} {values[name]}" for dataset, values in PER_DATASET.items() if values[name])


def option(default, help, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run: one command-line option each. None means: taken from PER_DATASET, or found on this machine."""

    dataset: str = option("demo", "protocol of the paper, folder for your own pictures, or generated ones", choices=list(PER_DATASET))
    category: str = option(None, "normal class: a name, its place in the paper's table from 0, or all; demo and folder have one only")
    data_root: str = option(None, f"folder of the data set ({per_dataset('data_root')})")
    weights: str = option(None, f"the teacher: a file made by weights/convert.py, or a name (default {TEACHER}, demo demo_teacher)")
    out: str = option("runs", "folder for run folders <out>/<dataset>/<category>/seed<seed>")
    epochs: int = option(None, f"passes over the training images ({per_dataset('epochs')})")
    batch_size: int = option(None, f"images a step, the paper's ({per_dataset('batch_size')})")
    lr: float = option(None, f"peak learning rate, the paper's ({per_dataset('lr')}; with adamw {ADAMW_LR})")
    optimizer: str = option("sgd", "sgd is the paper's", choices=["sgd", "adamw"])
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(0.0, "of every trained parameter")
    warmup: int = option(20, "steps of linear warm-up")
    decay: str = option("cosine", "learning rate after the warm-up", choices=["cosine", "constant"])
    clip_grad: float = option(0.0, "clip the global gradient norm to this, 0 = off; --distance l2 and mse need 1")
    lam: float = option(1.0, "lambda of Eq. 6")
    top_k: int = option(20, "k of Eq. 9, in patches")
    layers: tuple = option((3, 6, 9, 11), "tapped blocks, counted from 0, comma-separated; the last one is the anchor's")
    distance: str = option("unit", "reading of the norm in Eqs. 2, 3, 5, 7 and 8; l2 and mse diverge at the paper's lr without "
                           "--clip-grad 1", choices=["unit", "l2", "mse"])
    anchor: str = option("mean", "average of Eq. 1: cumulative mean of the first epoch, or bias-corrected EMA", choices=["mean", "ema"])
    pos_embed: str = option("copy", "student's position embedding: the teacher's, frozen (Fig. 7, strategy 2), or learnt",
                            choices=["copy", "learn"])
    init: str = option("normal", "student's linear layers at the start: truncated normal 0.02, or Xavier's uniform", choices=["normal", "xavier"])
    patch_embed: str = option("learn", "student's patch projection: learnt, or the teacher's, frozen", choices=["copy", "learn"])
    holdout: float = option(0.0, "share of the training images to hold out: they measure how far training has come, and calibrate delta")
    seed: int = option(0, "of the student's initialisation and the order of the images")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default cuda where there is one")
    precision: str = option("fp32", "of the networks; losses and scores are float32 always", choices=["fp32", "tf32", "bf16"])
    compile: bool = option(False, "compile the student and the losses with torch.compile: minutes at the start, faster steps")
    checkpoint_every: float = option(60.0, "seconds from one checkpoint to the next; --resume continues from the last")
    deterministic: bool = option(False, "on CUDA, algorithms that give the same bits every time; a CPU always does")
    cache: str = option(None, "where the teacher's features are kept; default the first with room", choices=["device", "host", "disk", "off"])


def block_numbers(text):
    """"3,6,9,11" -> (3, 6, 9, 11)"""
    try:
        return tuple(int(c) for c in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected block numbers like 3,6,9,11, got {text!r}") from None


def parse(argv):
    """Command line -> (Settings, what to do with a run that exists); a wrong value ends with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    for f in dataclasses.fields(Settings):
        kind = block_numbers if f.type is tuple else f.type
        shown = ",".join(map(str, f.default)) if f.name == "layers" else f"{f.default:g}" if isinstance(f.default, float) else f.default
        help = f.metadata["help"] + (f" (default {shown})" if f.default not in (None, False) else "")
        kind = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata.get("choices")}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=help, **kind)
    existing = parser.add_mutually_exclusive_group()
    for name, help in (("resume", "continue an unfinished run from its last checkpoint"), ("overwrite", "start again where a run exists already")):
        existing.add_argument(f"--{name}", dest="existing", action="store_const", const=name, help=help)
    arguments = vars(parser.parse_args(argv))
    existing = arguments.pop("existing")
    for name, value in PER_DATASET[arguments["dataset"]].items():
        if arguments[name] is None:
            arguments[name] = ADAMW_LR if name == "lr" and arguments["optimizer"] == "adamw" else value
    if arguments["dataset"] == "folder" and not arguments["data_root"]:
        fail("--data-root: expected the folder that holds train/good, got none")
    with one_sentence():
        arguments["category"] = pick_category(**{name: arguments[name] for name in ("dataset", "category", "data_root")})
    settings = Settings(**arguments)
    for names, words, holds in (("epochs batch_size top_k", "at least 1", lambda value: value >= 1),
                                ("lr", "more than 0", lambda value: 0 < value < math.inf),
                                ("holdout", "0 or more and below 1", lambda value: 0 <= value < 1),
                                ("momentum weight_decay warmup clip_grad lam seed checkpoint_every", "0 or more",
                                 lambda value: 0 <= value < math.inf)):
        for name in names.split():
            if not holds(arguments[name]):
                fail(f"--{name.replace('_', '-')}: expected {words}, got {arguments[name]}")
    if list(settings.layers) != sorted(set(settings.layers)) or settings.layers[0] < 0:
        fail(f"--layers: expected ascending block numbers from 0, got {','.join(map(str, settings.layers))}")
    return settings, existing


def pick_category(dataset, category, data_root):
    """--category -> a category's full name, or "all"; the only one where there is one only; ValueError if it is none."""
    if dataset == "folder":
        return Path(data_root).resolve().name
    if category is None and len(PAPER_AUROC[dataset]) > 1:
        raise ValueError(f"--category: expected one of {', '.join(PAPER_AUROC[dataset])}, or all, got none")
    return "all" if category == "all" else find_category(dataset, category or "0")


def run_folder(settings):
    return Path(settings.out) / settings.dataset / slug(settings.category) / f"seed{settings.seed}"


def read_config(run):
    """The config.json of a run folder: settings, teacher, and what the run was made with."""
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        config["settings"], config["teacher"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the settings that train.py wrote, got a file that does not hold them: train the run again") from None
    return config


def is_complete(run, settings, existing):
    """Whether the run is there, whole. Refuses one of other settings, naming the difference, and to begin again what --resume can continue."""
    complete, begun = ((run / name).is_file() for name in ("model.safetensors", "checkpoint.safetensors"))
    if existing == "overwrite" or not complete and not begun:
        return False
    then, now = read_config(run)["settings"], json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples become lists, as in the file
    free = ("out", "device", "compile", "cache", "deterministic", "checkpoint_every")  # may differ: they change roundings at most
    different = [f"{name} {then[name]} -> {now[name]}" for name in now if name not in free and then.get(name, now[name]) != now[name]]
    if different:
        raise ValueError(f"{run}: expected the settings of the run that is there, got {', '.join(different)}: "
                         f"choose another --out, or --overwrite to start again")
    if not complete and existing != "resume":
        raise ValueError(f"{run}: expected --resume, to continue the unfinished run that is there, or --overwrite, to start again, got neither")
    return complete


def learning_rate(step, steps, settings):
    """Linear warm-up to lr, then a cosine down to 0 over the remaining steps, or constant."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.decay == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (steps - settings.warmup)))


def provenance(device):
    """What a run was made with: versions, device, command line, commit, date. Saved beside every result."""
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


class Progress:
    """Means over the steps since the last line: into log.jsonl, on one line that updates in a terminal, a line an epoch elsewhere."""

    def __init__(self, file, steps, step):
        self.file, self.steps, self.first = file, steps, step
        self.sums, self.images, self.count = {}, 0, 0
        self.start = self.last = time.perf_counter()

    def add(self, terms, images):
        """Take in one step; nothing waits for the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.images, self.count = self.images + images, self.count + 1

    def log(self, epoch, step, lr, epoch_ends):
        """Write a line; False if a loss has stopped being finite."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        now = time.perf_counter()
        rate, left = self.images / (now - self.last), (now - self.start) / (step - self.first) * (self.steps - step)
        self.file.write(json.dumps({"epoch": epoch, "step": step, "lr": lr, **means, "images_per_s": round(rate, 1)}) + "\n")
        shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        line = f"epoch {epoch} step {step}/{self.steps} {shown} {rate:.1f} images/s {int(left) // 60}:{int(left) % 60:02d} left"
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if step == self.steps else "", flush=True)
        elif epoch_ends:
            print(line, flush=True)
        self.sums, self.images, self.count, self.last = {}, 0, 0, now
        return math.isfinite(sum(means.values()))


def diverged(run, epoch, step):
    """One sentence and the end: the weights are lost, the last checkpoint is not."""
    kept = run / "checkpoint.safetensors"
    fail(f"{run}: the loss stopped being finite by step {step} in epoch {epoch}; "
         f"{f'{kept} holds the last good step that was saved' if kept.exists() else 'nothing was saved before'}; try --clip-grad 1 or a lower --lr")


def catch_signals():
    """-> a list that the number of Ctrl-C or SIGTERM will be put in, for the loop to end after its step; a second one ends at once."""
    stopped = []

    def note(number, frame):
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return stopped


def save_checkpoint(path, model, optimizer, step):
    """All that the rest of the run depends on: student, anchor, the optimiser's state, step and random state.

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


def save_tensors(tensors, path):
    """A safetensors file that appears whole or not at all; a full disk is one sentence."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with one_sentence(), atomic(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # its word for a full disk
            raise ValueError(f"{path}: expected room for the model, got {error}") from None


def main(settings, existing):
    every = settings.category == "all" and settings.dataset != "folder"  # whose folder may well be called that
    categories = list(PAPER_AUROC[settings.dataset]) if every else [settings.category]
    todo = []
    with one_sentence():
        for one in (dataclasses.replace(settings, category=category) for category in categories):
            if is_complete(run_folder(one), one, existing):
                print(f"{run_folder(one)}: complete, nothing to do; --overwrite starts it again")
            else:
                todo.append(one)
                if settings.dataset in ("mvtec", "folder"):  # found missing before anything long begins
                    train_files(one.dataset, one.data_root, one.category)
    if not todo:
        return

    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    import torch

    from vit import load_vit
    from vitad import pick_device
    from weights.download import weights_file

    with one_sentence():
        device = pick_device(settings.device, settings.precision)
        torch.use_deterministic_algorithms(settings.deterministic)
        teacher = load_vit(weights_file(settings.weights))
        depth, patches = len(teacher.blocks), teacher.config["grid"] ** 2
        if settings.layers[-1] >= depth:
            raise ValueError(f"--layers: expected block numbers below {depth}, the teacher's depth, got {settings.layers[-1]}")
        if settings.top_k > patches:
            raise ValueError(f"--top-k: expected at most {patches}, the teacher's number of patches, got {settings.top_k}")
    for one in todo:
        try:
            train(one, teacher, device, existing == "resume")
        except torch.OutOfMemoryError:
            fail(f"{run_folder(one)}: expected a batch that fits the memory of {device}, got --batch-size {one.batch_size} with --precision "
                 f"{one.precision}: try a smaller one, or bf16; the last checkpoint is kept")


def train(settings, teacher, device, resume):
    """One run, from the training images to the run folder."""
    import torch

    from vitad import Distillation, TeacherCache, calibrate, free_bytes

    run = run_folder(settings)
    checkpoint, log = run / "checkpoint.safetensors", run / "log.jsonl"
    resume = resume and checkpoint.is_file()
    with one_sentence():
        images = train_split(settings.dataset, settings.data_root, settings.category, teacher.image_size).images
        run.mkdir(parents=True, exist_ok=True)
        for half_written in run.glob(".*.tmp"):  # what a killed run was at
            half_written.unlink()
        made_with = provenance(device)
        if resume:
            config = read_config(run)
            if config["teacher"]["sha256"] != teacher.sha256:
                raise ValueError(f"{settings.weights}: expected the teacher that {run} was begun with, got another: --overwrite starts again")
            config["resumed"] = [*config.get("resumed", []), made_with]
        else:
            for name in ("model.safetensors", "checkpoint.safetensors", "log.jsonl", "scores.csv", "result.json"):
                (run / name).unlink(missing_ok=True)
            config = {"settings": dataclasses.asdict(settings), "teacher": {"sha256": teacher.sha256, **teacher.metadata},
                      "images": len(images), **made_with}
        with atomic(run / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

    # The seed of a run depends on which run it is, not on what ran before.
    seed = zlib.crc32(f"{settings.dataset}/{settings.category}/{settings.seed}".encode())
    torch.manual_seed(seed)
    model = Distillation(teacher, settings.layers, settings.distance, settings.pos_embed, settings.anchor, settings.lam,
                         settings.top_k, settings.precision, settings.patch_embed, settings.init).to(device)
    with one_sentence():
        cache = TeacherCache(model, len(images), device, run, settings.cache)
    if images.nbytes <= free_bytes("device", device) / 4:
        images = images.to(device)
    # "reduce-overhead" is CUDA graphs: the launches of a step of 4 images take longer than its work. One graph for the last, smaller batch.
    loss_terms = torch.compile(model.loss_terms, mode="reduce-overhead", dynamic=False) if settings.compile else model.loss_terms
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"sgd": partial(torch.optim.SGD, momentum=settings.momentum), "adamw": torch.optim.AdamW}[settings.optimizer](
        parameters, settings.lr, weight_decay=settings.weight_decay, fused="cuda" in device)  # on a CPU it is no faster

    # The same images are held out whatever the seed.
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(zlib.crc32(f"{settings.dataset}/{settings.category}".encode())))
    held_out, kept = (part.sort().values for part in shuffled.tensor_split([round(settings.holdout * len(images))]))

    def batches(index, size):
        for batch in index.split(size):
            x = images[batch.to(images.device)].to(device)
            yield x, cache(batch, x)

    def order(epoch):
        return kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed + epoch))]

    steps_per_epoch = math.ceil(len(kept) / settings.batch_size)
    steps, step = settings.epochs * steps_per_epoch, 0
    print(f"{run}: {len(kept)} normal images, {settings.epochs} epochs of {steps_per_epoch} steps, on {made_with['device']}, "
          f"teacher {teacher.metadata.get('name', settings.weights)}, its features ({cache.bytes / 1e6:,.0f} MB) kept: {cache.where}")
    if resume:
        with one_sentence():
            step = load_checkpoint(checkpoint, model, optimizer)
            lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= step]
            with atomic(log) as temporary:
                temporary.write_text("".join(lines))
        print(f"{run}: continues after step {step} of {steps}")
        if cache.where != "off":
            for _ in batches(order(1)[:step * settings.batch_size], settings.batch_size):
                pass  # the features are kept as the first epoch computed them, in its batches, to the last bit
    stopped = catch_signals()
    with one_sentence(OSError), open(log, "a", buffering=1) as file:
        progress, saved = Progress(file, steps, step), time.monotonic()
        for epoch in range(step // steps_per_epoch + 1, settings.epochs + 1):
            for x, t in batches(order(epoch)[step % steps_per_epoch * settings.batch_size:], settings.batch_size):
                lr = learning_rate(step, steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if epoch == 1 or settings.anchor == "ema":  # Eq. 1 is complete after one pass; only an EMA goes on
                    model.update_anchor(t)
                terms = loss_terms(x, t)
                optimizer.zero_grad()
                terms["loss"].backward()
                if settings.clip_grad:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
                optimizer.step()
                step += 1
                progress.add(terms, len(x))
                epoch_ends = step % steps_per_epoch == 0
                if not (step % LOG_EVERY == 0 or epoch_ends or stopped):
                    continue
                due = stopped or time.monotonic() - saved >= settings.checkpoint_every
                # The last step can break the weights unseen by its loss; a checkpoint must not hold them.
                if not progress.log(epoch, step, lr, epoch_ends) or (due or step == steps) and not all(p.isfinite().all() for p in parameters):
                    diverged(run, epoch, step)
                if epoch_ends and len(held_out):
                    distances = torch.cat([model.disagreement(x, t) for x, t in batches(held_out, EVAL_BATCH)]).mean(dim=0)
                    file.write(json.dumps({"epoch": epoch, "step": step, "held_out": distances.tolist(),
                                           "held_out_mean": distances.mean().item()}) + "\n")
                if due:
                    save_checkpoint(checkpoint, model, optimizer, step)
                    saved = time.monotonic()
                if stopped:
                    print(f"\n{run}: stopped after step {step} of {steps}; --resume continues from there", file=sys.stderr)
                    sys.exit(128 + stopped[0])

        # delta of Eq. 10, from images held out, or else from the training images themselves: optimistic, since the student has seen them.
        parts = [model.scores(x, t) for x, t in batches(held_out if len(held_out) else kept, EVAL_BATCH)]
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        model.delta.copy_(calibrate(scores["score"]))
        file.write(json.dumps({"step": step, "delta": model.delta.item(), "images": len(scores["score"]), "held_out": len(held_out) > 0,
                               **{name: {"mean": x.mean().item(), "std": x.std(correction=0).item()} for name, x in scores.items()}}) + "\n")
    save_tensors(model.learned_state(), run / "model.safetensors")
    checkpoint.unlink(missing_ok=True)
    print(f"{run}: done; {'images held out' if len(held_out) else 'the training images'} score {scores['score'].mean():.2f} on average, "
          f"delta is {model.delta:.2f}; next: python evaluate.py {shlex.quote(str(run))}")
    if stopped:  # too late to stop this run; the next one of --category all does not begin
        sys.exit(128 + stopped[0])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
