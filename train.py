#!/usr/bin/env python3
"""Train one student on the normal images of one category, or of every category of a protocol in turn.

    python train.py                                                 # the demo: generated images, a small teacher that comes along
    python train.py --dataset mvtec --category bottle               # data/mvtec/bottle, the paper's teacher
    python train.py --dataset cifar10 --category all                # downloads CIFAR-10 into data/
    python train.py --dataset folder --data-root DIR                # your own pictures

A run writes runs/<dataset>/<category>/seed<seed>/: model.safetensors (student, anchor, delta; the teacher is named by sha256 in
config.json), config.json (settings, versions, device, command) and log.jsonl (one line every ten steps). `python evaluate.py` scores it.
The demo takes 45 seconds on 2 CPU cores, bottle with DeiT-Tiny 9 minutes. Only normal training images are ever read. The last epoch is the result.
"""
import argparse
import dataclasses
import datetime
import json
import math
import platform
import shlex
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
    seed: int = option(0, "of the student's initialisation and the order of the images")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default cuda where there is one")
    precision: str = option("fp32", "of the networks; losses and scores are float32 always", choices=["fp32", "tf32", "bf16"])
    compile: bool = option(False, "compile the student and the losses with torch.compile: minutes at the start, faster steps")
    cache: str = option(None, "where the teacher's features are kept; default the first with room", choices=["device", "host", "disk", "off"])


def block_numbers(text):
    """"3,6,9,11" -> (3, 6, 9, 11)"""
    try:
        return tuple(int(c) for c in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected block numbers like 3,6,9,11, got {text!r}") from None


def parse(argv):
    """Command line -> (Settings, whether an existing run may be replaced); a wrong value ends with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    for f in dataclasses.fields(Settings):
        kind = block_numbers if f.type is tuple else f.type
        shown = ",".join(map(str, f.default)) if f.name == "layers" else f"{f.default:g}" if isinstance(f.default, float) else f.default
        help = f.metadata["help"] + (f" (default {shown})" if f.default not in (None, False) else "")
        kind = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata.get("choices")}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=help, **kind)
    parser.add_argument("--overwrite", action="store_true", help="start again where a run exists already")
    arguments = vars(parser.parse_args(argv))
    overwrite = arguments.pop("overwrite")
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
                                ("momentum weight_decay warmup clip_grad lam seed", "0 or more", lambda value: 0 <= value < math.inf)):
        for name in names.split():
            if not holds(arguments[name]):
                fail(f"--{name.replace('_', '-')}: expected {words}, got {arguments[name]}")
    if list(settings.layers) != sorted(set(settings.layers)) or settings.layers[0] < 0:
        fail(f"--layers: expected ascending block numbers from 0, got {','.join(map(str, settings.layers))}")
    return settings, overwrite


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


def is_complete(run, settings):
    """Whether the run exists already, with these settings; refuses, naming the difference, if it exists with others."""
    if not (run / "model.safetensors").is_file():
        return False
    then, now = read_config(run)["settings"], json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples become lists, as in the file
    different = [f"{name} {then[name]} -> {now[name]}" for name in now if name not in ("out", "device", "compile", "cache") and then.get(name, now[name]) != now[name]]
    if different:
        raise ValueError(f"{run}: expected the settings of the run that is there, got {', '.join(different)}: "
                         f"choose another --out, or --overwrite to start again")
    return True


def learning_rate(step, steps, settings):
    """Linear warm-up to lr, then a cosine down to 0 over the remaining steps, or constant."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    if settings.decay == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (steps - settings.warmup)))


def provenance(device):
    """What a run was made with: versions, device, command line, commit, date. Saved beside every result."""
    import numpy
    import safetensors
    import torch
    import torchvision

    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # a copy without git
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, numpy, safetensors)}
    return {"versions": {"python": platform.python_version(), **versions},
            "device": torch.cuda.get_device_name(device) if "cuda" in device else f"{device}, {torch.get_num_threads()} threads",
            "command": shlex.join(["python", *sys.argv]), "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}


class Progress:
    """Means over the last LOG_EVERY steps: a line of log.jsonl, one line that updates in a terminal, a line an epoch elsewhere."""

    def __init__(self, file, steps):
        self.file, self.steps = file, steps
        self.sums, self.images, self.count = {}, 0, 0
        self.start = self.last = time.perf_counter()

    def add(self, terms, images, epoch, step, lr, epoch_ends):
        """Take in one step; every LOG_EVERY steps, and at an epoch's end, log. False if a loss has stopped being finite."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.images, self.count = self.images + images, self.count + 1
        if step % LOG_EVERY and not epoch_ends:
            return True
        now = time.perf_counter()
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        rate, left = self.images / (now - self.last), (now - self.start) / step * (self.steps - step)
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
         f"{f'{kept} holds the last good epoch' if kept.exists() else 'no epoch was complete'}; try --clip-grad 1 or a lower --lr")


def main(settings, overwrite):
    every = settings.category == "all" and settings.dataset != "folder"  # whose folder may well be called that
    categories = list(PAPER_AUROC[settings.dataset]) if every else [settings.category]
    todo = []
    with one_sentence():
        for one in (dataclasses.replace(settings, category=category) for category in categories):
            if not overwrite and is_complete(run_folder(one), one):
                print(f"{run_folder(one)}: complete, nothing to do; --overwrite starts it again")
            else:
                todo.append(one)
                if settings.dataset in ("mvtec", "folder"):  # found missing before anything long begins
                    train_files(one.dataset, one.data_root, one.category)
    if not todo:
        return

    from vit import load_vit
    from vitad import pick_device
    from weights.download import weights_file

    with one_sentence():
        device = pick_device(settings.device, settings.precision)
        teacher = load_vit(weights_file(settings.weights))
        depth, patches = len(teacher.blocks), teacher.config["grid"] ** 2
        if settings.layers[-1] >= depth:
            raise ValueError(f"--layers: expected block numbers below {depth}, the teacher's depth, got {settings.layers[-1]}")
        if settings.top_k > patches:
            raise ValueError(f"--top-k: expected at most {patches}, the teacher's number of patches, got {settings.top_k}")
    for one in todo:
        train(one, teacher, device)


def train(settings, teacher, device):
    """One run, from the training images to the run folder."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from vitad import Distillation, TeacherCache, calibrate, free_bytes

    run = run_folder(settings)
    with one_sentence():
        images = train_split(settings.dataset, settings.data_root, settings.category, teacher.image_size).images
        run.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "checkpoint.safetensors", "log.jsonl", "scores.csv", "result.json"):
            (run / name).unlink(missing_ok=True)
        config = {"settings": dataclasses.asdict(settings), "teacher": {"sha256": teacher.sha256, **teacher.metadata},
                  "images": len(images), **provenance(device)}
        with atomic(run / "config.json") as temporary:
            temporary.write_text(json.dumps(config, indent=2) + "\n")

    # The seed of a run depends on which run it is, not on what ran before.
    seed = zlib.crc32(f"{settings.dataset}/{settings.category}/{settings.seed}".encode())
    torch.manual_seed(seed)
    model = Distillation(teacher, settings.layers, settings.distance, settings.pos_embed, settings.anchor, settings.lam,
                         settings.top_k, settings.precision).to(device)
    with one_sentence():
        cache = TeacherCache(model, len(images), device, run, settings.cache)
    if images.nbytes <= free_bytes("device", device) / 4:
        images = images.to(device)
    # "reduce-overhead" is CUDA graphs: the launches of a step of 4 images take longer than its work. One graph for the last, smaller batch.
    loss_terms = torch.compile(model.loss_terms, mode="reduce-overhead", dynamic=False) if settings.compile else model.loss_terms
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"sgd": partial(torch.optim.SGD, momentum=settings.momentum), "adamw": torch.optim.AdamW}[settings.optimizer](
        parameters, settings.lr, weight_decay=settings.weight_decay, fused="cuda" in device)  # on a CPU it is no faster

    def save(name):
        with one_sentence(), atomic(run / name) as temporary:
            try:
                save_file(model.learned_state(), temporary)
            except SafetensorError as error:  # its word for a full disk
                raise ValueError(f"{run / name}: expected room for the model, got {error}") from None

    steps_per_epoch = math.ceil(len(images) / settings.batch_size)
    steps, step = settings.epochs * steps_per_epoch, 0
    print(f"{run}: {len(images)} normal images, {settings.epochs} epochs of {steps_per_epoch} steps, on {config['device']}, "
          f"teacher {teacher.metadata.get('name', settings.weights)}, its features ({cache.bytes / 1e6:,.0f} MB) kept: {cache.where}")
    with one_sentence(OSError), open(run / "log.jsonl", "w", buffering=1) as file:
        progress = Progress(file, steps)
        for epoch in range(1, settings.epochs + 1):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + epoch))
            for batch in order.split(settings.batch_size):
                lr = learning_rate(step, steps, settings)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                x = images[batch.to(images.device)].to(device)
                t = cache(batch, x)
                if epoch == 1 or settings.anchor == "ema":  # Eq. 1 is complete after one pass; only an EMA goes on
                    model.update_anchor(t)
                terms = loss_terms(x, t)
                optimizer.zero_grad()
                terms["loss"].backward()
                if settings.clip_grad:
                    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_grad)
                optimizer.step()
                step += 1
                if not progress.add(terms, len(batch), epoch, step, lr, epoch_ends=step % steps_per_epoch == 0):
                    diverged(run, epoch, step)
            if not all(p.isfinite().all() for p in parameters):  # the last step of the epoch can break them unseen by its loss
                diverged(run, epoch, step)
            save("checkpoint.safetensors")

    # delta of Eq. 10, from the training images themselves: optimistic, since the student has seen them.
    batches = ((index, images[index.to(images.device)].to(device)) for index in torch.arange(len(images)).split(EVAL_BATCH))
    scores = torch.cat([model.scores(x, cache(index, x))["score"] for index, x in batches])
    model.delta.copy_(calibrate(scores))
    save("model.safetensors")
    (run / "checkpoint.safetensors").unlink()
    print(f"{run}: done; the training images score {scores.mean():.2f} on average, delta is {model.delta:.2f}; "
          f"next: python evaluate.py {shlex.quote(str(run))}")


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
