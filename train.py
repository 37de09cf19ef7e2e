#!/usr/bin/env python3
"""Train one student on the normal images of one category, or of every category of a protocol.

    python train.py                                         # the demo: generated images
    python train.py --dataset mvtec --category bottle       # data/mvtec/bottle, ViT-B/16
    python train.py --dataset cifar10 --category all        # downloads CIFAR-10 into data/
    python train.py --dataset folder --data-root DIR        # your own pictures

A run is a folder, runs/<dataset>/<category>/seed<seed>, with model.safetensors (student, anchor,
delta), config.json (settings, teacher, versions, command) and log.jsonl (losses every ten steps,
the distance on held-out images every epoch, and at the end delta). `python evaluate.py` scores it.
Only normal training images are read. The last epoch is the result.

The settings come first, then one run: `train`, and `Training`, whose `loop` is the training itself.
What a run uses follows: optimisers, a step as a CUDA graph, the cache of the teacher's
features, the held-out distance, signals and log. Last come several runs, and `main`.
"""

import os

if __name__ == "__main__":
    # Idle threads of GNU OpenMP spin. With the default, 300 times this count, the demo takes over 9
    # minutes where another process uses one of two cores, and with this one 72 seconds.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import dataclasses
import json
import math
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import runs
from data import CATEGORIES, check_name, find_category, slug, train_files, train_split
from runs import CHOICES, UserError
from vitad import FEW, LAM, LAYERS, TOP_K
from weights.download import ensure_weights

# How these were chosen: results/recipe.md.
EPOCHS = 28
LEAST_STEPS = 400  # a run of few images gets more epochs, until it has this many
NARROW = 192  # DeiT-Tiny's width
MUON_LR = 0.008  # for teachers up to NARROW
ADAMW_LR = 0.001  # the same
LOG_EVERY = 10  # steps between lines of the log
EVAL_BATCH = 32  # images at a time without gradient
PLACES = ["device", "host", "disk", "off"]  # for the teacher's features, fastest first

# ----------------------------------------------------------------------------------------- settings

TEACHER = "vit_base_patch16_224"  # the paper's
HOLDOUT = 0.1
# Batch size and SGD's learning rate are the paper's, section 4.1. The demo and own pictures take
# MVTec AD's.
PER_DATASET = {
    "cifar10": {"lr": 0.1, "batch_size": 32, "data_root": "data"},
    "cifar100": {"lr": 0.1, "batch_size": 32, "data_root": "data"},
    "fashion_mnist": {"lr": 0.1, "batch_size": 32, "data_root": "data"},
    "mvtec": {"lr": 0.2, "batch_size": 4, "data_root": "data/mvtec"},
    "folder": {"lr": 0.2, "batch_size": 4},
    "demo": {"lr": 0.2, "batch_size": 4, "weights": "demo_teacher", "holdout": 0.25, "epochs": 14},
}


def per_dataset(name):
    """The defaults of a setting as --help shows them: "cifar10 32, mvtec 4"."""
    shown = [
        f"{dataset} {values[name]}" for dataset, values in PER_DATASET.items() if values.get(name)
    ]
    return ", ".join(shown)


def option(default, text, choices=None):
    """A field of Settings: its default, its help, the values that it may have."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. Each is an option of the command line.

    None means: `parse` fills it in by data set and optimiser, or the run finds it out later; of
    `without`, that nothing is left out. What the precision "auto" is, `set_up` decides.
    """

    dataset: str = option("demo", "a protocol, your own pictures, or the demo", list(PER_DATASET))
    category: str = option(None, "normal class: name, place in the paper's table from 0, or all")
    data_root: str = option(None, f"folder of the data set (default {per_dataset('data_root')})")
    weights: str = option(
        None, f"teacher: a converted file or a name (default {TEACHER}; demo demo_teacher)"
    )
    out: str = option("runs", "run folders are <out>/<dataset>/<category>/seed<seed>")
    epochs: int = option(None, f"default {EPOCHS}, or more to reach {LEAST_STEPS} steps; demo 14")
    batch_size: int = option(None, f"images per step (default {per_dataset('batch_size')})")
    lr: float = option(
        None,
        f"peak learning rate (default muon {MUON_LR}, adamw {ADAMW_LR}, both less for a teacher "
        f"wider than {NARROW}; sgd {per_dataset('lr')}); with muon see --lr-rest too",
    )
    lr_rest: float = option(
        None,
        "with muon, peak learning rate of what AdamW trains, all but the blocks' matrices (default "
        f"--lr, but no more than {ADAMW_LR * NARROW:g} / D for a teacher of a width D beyond "
        f"{NARROW})",
    )
    optimizer: str = option("muon", "sgd is the paper's and the slowest", ["sgd", "adamw", "muon"])
    momentum: float = option(0.9, "of sgd")
    weight_decay: float = option(0.0, "of every trained parameter")
    warmup: int = option(20, "steps of linear warm-up")
    decay: str = option(
        "linear", "learning rate after the warm-up", ["linear", "cosine", "constant"]
    )
    clip_grad: float = option(0.0, "largest gradient norm, 0 = off; sgd with l2 or mse needs 1")
    lam: float = option(LAM, "lambda of Eq. 6")
    top_k: int = option(TOP_K, "k of Eq. 9, in patches")
    layers: tuple = option(LAYERS, "tapped blocks, counted from 0; the last is the anchor's")
    distance: str = option(
        "unit", "the norm of Eqs. 2, 3, 7, 8; scales 4, 5 too", CHOICES["distance"]
    )
    anchor: str = option("mean", "average of Eq. 1: of the first epoch, or EMA", CHOICES["anchor"])
    pos_embed: str = option(
        "copy", "the teacher's, frozen (Fig. 7, strategy 2), or learnt", CHOICES["pos_embed"]
    )
    without: str = option(
        None, "leave terms out of Eq. 6, for ablations", ["anchor", "gram", "anchor,gram"]
    )
    holdout: float = option(
        None,
        "share of the normal images held out, to set delta and to measure how far the student has "
        f"come; with 0 all of them train it, and delta is too low (default {HOLDOUT}; demo 0.25)",
    )
    seed: int = option(0, "of the student's initialisation and the order of the images")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default cuda where there is one")
    precision: str = option(
        "auto",
        "of both networks in training: auto is bf16 where the device multiplies it in hardware, "
        "else fp32; scores are float32",
        ["auto", *CHOICES["precision"]],
    )
    compile: bool = option(False, "torch.compile the student and the losses")
    eager: bool = option(False, "on CUDA start each operation by itself, not a step as one graph")
    checkpoint_every: float = option(60.0, "least seconds from one to the next, for --resume")
    deterministic: bool = option(
        False, "the same bits every time on CUDA too, at a fraction of the speed"
    )
    cache: str = option(
        None, "where the teacher's features are kept (default the first with room)", PLACES
    )


def make_parser():
    """One option per field of Settings, and three more: seeds, and what to do with old runs."""
    parser = runs.Parser(__doc__)
    seeds = parser.add_mutually_exclusive_group()
    for f in dataclasses.fields(Settings):
        name = runs.flag(f.name)
        text = f.metadata["help"]
        if f.type is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        if f.default is not None:
            shown = ",".join(map(str, f.default)) if f.type is tuple else str(f.default)
            text = f"{text} (default {shown})"
        group = seeds if f.name == "seed" else parser
        group.add_argument(
            name,
            type=runs.whole_numbers if f.type is tuple else f.type,
            choices=f.metadata["choices"],
            default=f.default,
            help=text,
        )
    seeds.add_argument(
        "--seeds", type=runs.whole_numbers, help="several runs instead of --seed, one each: 0,1,2"
    )
    existing = parser.add_mutually_exclusive_group()
    for name, text in (
        ("resume", "continue an unfinished run from its last checkpoint"),
        ("overwrite", "start again where a run exists already"),
    ):
        existing.add_argument(
            f"--{name}", dest="existing", action="store_const", const=name, help=text
        )
    return parser


def parse(argv):
    """Command line -> (Settings, seeds, existing); existing: "resume", "overwrite" or None."""
    arguments = vars(make_parser().parse_args(argv))
    existing = arguments.pop("existing")
    seeds = arguments.pop("seeds") or (arguments["seed"],)
    defaults = {"weights": TEACHER, "holdout": HOLDOUT, **PER_DATASET[arguments["dataset"]]}
    if arguments["optimizer"] != "sgd":
        del defaults["lr"]  # the others' follow from the teacher
    for name, value in defaults.items():
        if arguments[name] is None:
            arguments[name] = value
    settings = Settings(**arguments)
    check(settings)
    settings = dataclasses.replace(settings, category=resolve_category(settings))
    return settings, seeds, existing


def check(settings):
    """Refuse numbers out of their ranges."""
    whole = {"epochs": 1, "batch_size": 1, "top_k": 1, "warmup": 0, "seed": 0}
    for name, least in whole.items():
        if getattr(settings, name) is not None:
            runs.check_whole(name, getattr(settings, name), least)
    ranges = (
        ("more than 0 and finite", lambda x: 0 < x < math.inf, ("lr", "lr_rest")),
        ("0 or more and below 1", lambda x: 0 <= x < 1, ("holdout",)),
        (
            "0 or more and finite",
            lambda x: 0 <= x < math.inf,
            ("momentum", "weight_decay", "clip_grad", "lam", "checkpoint_every"),
        ),
    )
    for expected, holds, names in ranges:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                raise UserError(f"{runs.flag(name)}: expected {expected}, got {value}")
    if settings.lr_rest is not None and settings.optimizer != "muon":
        raise UserError(
            f"--lr-rest: expected none with --optimizer {settings.optimizer}, "
            f"which trains all weights at --lr, got {settings.lr_rest}"
        )


def resolve_category(settings):
    """--category -> the category's name, or "all"."""
    dataset, category = settings.dataset, settings.category
    if dataset == "folder":
        if not settings.data_root:
            raise UserError("--data-root: expected the folder that holds train/good, got none")
        name = Path(os.path.realpath(settings.data_root)).name
        check_name(name)
        if category not in (None, name):
            raise UserError(
                f"--category: expected none with --dataset folder, whose category is the folder's "
                f"name, {name}, got {category!r}"
            )
        return name
    known = CATEGORIES[dataset]
    if category is None and len(known) > 1:
        raise UserError(f"--category: expected one of {', '.join(known)}, or all, got none")
    if category == "all":
        return category
    return find_category(dataset, "0" if category is None else category)


# ------------------------------------------------------------------------------------------ one run


def train(settings, teacher, device, resume, runs_after):
    """One run, from the training images to model.safetensors in its folder.

    runs_after: how many more the command has, for the estimate of the time.
    """
    runs.set_tf32(settings.precision)  # for each run: the one before ended in float32
    try:
        training = Training(settings, teacher, device, resume)
        training.build_model()
        training.open_folder()
        training.announce()
        if training.resume:
            training.refill_cache()
        with StopSignals() as stop, open_log(training.log_file) as file:
            progress = Progress(file, training.steps, training.step, runs_after)
            training.loop(progress, stop)
            outcome = training.conclude(progress)
            state = training.model.learned_state()
            runs.write_tensors(training.folder / "model.safetensors", state)
            training.checkpoint.unlink(missing_ok=True)
    except (RuntimeError, MemoryError) as error:
        if not runs.is_out_of_memory(error):
            raise
        raise UserError(
            f"{run_folder(settings)}: expected a batch that fits the memory of {device}, got "
            f"--batch-size {settings.batch_size} with --precision {settings.precision}: "
            f"try a smaller one, bf16 or --eager; what was saved is kept"
        ) from None
    next_command = f"python evaluate.py {shlex.quote(str(training.folder))}"
    print(f"{training.folder}: done; {outcome}; next: {next_command}")
    if stop.number:  # too late to stop this run; the next one does not begin
        raise runs.Stopped(stop.number, f"{training.folder}: complete; no other run is begun")


class Training:
    """One run. Its parts in their order: the images, the model, the folder, the loop, delta."""

    def __init__(self, settings, teacher, device, resume):
        self.settings = settings
        self.values = dataclasses.asdict(settings)
        self.teacher = teacher
        self.device = device
        self.step = 0
        self.folder = run_folder(settings)
        self.checkpoint = self.folder / "checkpoint.safetensors"
        self.log_file = self.folder / "log.jsonl"
        self.resume = resume and self.checkpoint.is_file()

        # Images: which to train on, and how often.
        split = train_split(
            settings.dataset, settings.data_root, settings.category, teacher.image_size
        )
        self.images = split.images
        self.kept, self.held_out = hold_out(settings, len(self.images))
        self.steps_per_epoch = math.ceil(len(self.kept) / settings.batch_size)
        self.epochs = settings.epochs or max(EPOCHS, math.ceil(LEAST_STEPS / self.steps_per_epoch))
        self.steps = self.epochs * self.steps_per_epoch
        self.peak, self.peak_rest = peak_learning_rates(settings, teacher.config["width"])
        names = "\n".join(split.names).encode(errors="surrogateescape")
        self.resolved = {
            "images": len(self.images),
            "names_crc32": zlib.crc32(names),  # of the images, in their order
            "epochs": self.epochs,
            "lr": self.peak,
            "lr_rest": self.peak_rest,
        }

        # The seed depends on which run this is, not on what ran before.
        name = f"{settings.dataset}/{settings.category}/{settings.seed}"
        self.seed = zlib.crc32(name.encode())

    def build_model(self):
        """Teacher, student, anchor; the teacher's cache; the optimisers."""
        settings, teacher, device = self.settings, self.teacher, self.device
        torch.manual_seed(self.seed)
        without = settings.without.split(",") if settings.without else ()
        model = runs.build(teacher, self.values, settings.precision, without)
        self.model = model.to(device)
        self.cache = TeacherCache(
            self.model, len(self.images), device, folder=self.folder, place=settings.cache
        )
        if self.images.nbytes <= free_bytes("device", device) / 4:  # the step needs the rest
            self.images = self.images.to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(
            settings, self.parameters, self.peak, device, peak_rest=self.peak_rest
        )
        self.loss_terms = self.model.loss_terms
        if settings.compile:
            self.loss_terms = torch.compile(self.loss_terms, dynamic=False)

    def open_folder(self):
        """Begin the run's folder, or go on in it: step, model, optimisers and log as they were.

        Whatever can be wrong is found out before the folder changes.
        """
        self.provenance = runs.provenance(self.device)
        if self.resume:
            config = runs.config_to_resume(self.folder, self.teacher.sha256)
            self.step = runs.load_checkpoint(
                self.checkpoint, self.model, self.optimizers, settings=self.values
            )
            if not 0 < self.step <= self.steps:
                raise UserError(
                    f"{self.checkpoint}: expected a checkpoint of this run, "
                    f"got step {self.step} of {self.steps}: --overwrite starts again"
                )
            for name, now in self.resolved.items():
                before = config.get(name, now)
                if before != now:
                    words = f"{name} {before}, got {now}"
                    if name == "names_crc32":
                        words = "the same images, got others by name"
                    raise UserError(
                        f"{self.folder}: expected to go on with {words}: --overwrite starts again"
                    )
            log = [line for step, line in runs.read_log(self.log_file) if step <= self.step]
            runs.resume_run(self.folder, config, self.provenance, log)
            return
        facts = {
            "settings": self.values,
            "teacher": {"sha256": self.teacher.sha256, **self.teacher.metadata},
        }
        runs.begin_run(self.folder, {**facts, **self.resolved, **self.provenance})

    def announce(self):
        teacher = self.teacher.metadata.get("name", self.settings.weights)
        megabytes = f"{self.cache.bytes / 1e6:,.0f} MB"
        device = self.provenance["device"]
        print(
            f"{self.folder}: {len(self.kept)} normal images, {self.epochs} epochs of "
            f"{self.steps_per_epoch} steps, on {device} in {self.settings.precision}, "
            f"teacher {teacher}, its features ({megabytes}) kept: {self.cache.place}"
        )
        for note in self.notes():
            print(f"note: {note}", file=sys.stderr)
        if self.resume:
            print(f"{self.folder}: continues after step {self.step} of {self.steps}")

    def notes(self):
        """What about this run may not be meant, in sentences."""
        settings, count = self.settings, len(self.held_out)
        if len(settings.layers) == 1 and "gram" not in (settings.without or ""):
            yield "one layer has no pair, so L_Gram is 0"
        if settings.warmup > self.steps:
            yield (
                f"the run's {self.steps} steps end within --warmup {settings.warmup}: "
                f"the learning rate does not reach its peak"
            )
        if 0 < count < FEW:
            yield (
                f"{count} images held out: delta is a guess, "
                f"which more normal images would make better"
            )

    def refill_cache(self):
        """The cache as the first epoch had filled it, for a run that goes on."""
        if self.cache.place != "off":
            # The same features to the last bit: computed in the batches of the first epoch.
            size = self.settings.batch_size
            for _ in self.batches(self.order(1)[: self.step * size], size):
                pass

    def loop(self, progress, stop):
        """Eqs. 1 to 6, step by step, from `self.step` on; after a signal it raises Stopped.

        progress, stop: see `Progress` and `StopSignals`, below.
        """
        settings = self.settings
        size = settings.batch_size
        take_step = self.choose_step()
        saved = time.monotonic()
        for epoch in range(self.step // self.steps_per_epoch + 1, self.epochs + 1):
            done = self.step % self.steps_per_epoch  # steps of this epoch, if it was interrupted

            # Batch: images, and the teacher's features of them.
            for images, t in self.batches(self.order(epoch)[done * size :], size):
                # Learning rate.
                share = schedule(self.step, self.steps, settings)
                set_learning_rate(self.optimizers, share)

                # Anchor, Eq. 1. After one epoch the mean is complete; only an EMA goes on.
                if epoch == 1 or settings.anchor == "ema":
                    self.model.update_anchor(t)

                # Losses, Eqs. 2 to 6, and the step.
                terms = take_step(images, t)
                self.step += 1

                # Log: every ten steps, at an epoch's end, and before stopping.
                progress.add(terms, len(images))
                stopping = stop.number  # read once: a later signal waits for the next step
                epoch_ends = self.step % self.steps_per_epoch == 0
                if not (self.step % LOG_EVERY == 0 or epoch_ends or stopping):
                    continue
                finite = progress.log(epoch, self.step, self.peak * share)
                due = stopping or time.monotonic() - saved >= settings.checkpoint_every
                ended = self.step == self.steps
                if due or ended:  # the weights too: a step can break them after a finite loss
                    finite = finite and all(p.isfinite().all() for p in self.parameters)
                if not finite:
                    raise self.not_finite_error(epoch)
                if epoch_ends and len(self.held_out):
                    self.measure(progress, epoch)
                progress.show(epoch_ends, ended)

                # Checkpoint: when the last one is old enough, and before stopping.
                if due:
                    runs.save_checkpoint(
                        self.checkpoint,
                        self.model,
                        self.optimizers,
                        self.step,
                        settings=self.values,
                    )
                    saved = time.monotonic()
                if stopping:
                    at = f"stopped after step {self.step} of {self.steps}"
                    text = f"{self.folder}: {at}; --resume continues from there"
                    raise runs.Stopped(stopping, text)

    def order(self, epoch):
        """The training images in the order of an epoch, which seed and epoch alone decide."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return self.kept[torch.randperm(len(self.kept), generator=generator)]

    def batches(self, index, size):
        """Images by their indices -> batches (uint8 images, the teacher's features)."""
        for part in index.split(size):
            images = self.pictures(part)
            yield images, self.cache(part, images)

    def pictures(self, index):
        """Images by their indices, on the device."""
        at = index.to(self.images.device, non_blocking=True)  # else a GPU's step waits for it
        return self.images[at].to(self.device)

    def choose_step(self):
        """`take_step`; on CUDA a GraphedStep of it, unless --eager or --deterministic.

        With --deterministic there is no graph: whether one keeps the bits has not been tested. The
        result refers to `self`. Kept there, it would make a cycle, and a run's memory would not be
        free once it has ended.
        """
        settings = self.settings
        if "cuda" not in self.device or settings.eager or settings.deterministic:
            return self.take_step
        # A graph reads the rate from the device's memory; a number would stay as recorded.
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=self.device)
        return GraphedStep(self.take_step, self.optimizers, settings.batch_size)

    def take_step(self, images, t):
        """Losses, their gradient, and the optimisers' step; -> the terms of the loss."""
        # Losses, Eqs. 2 to 6.
        terms = self.loss_terms(images, t)

        # Step.
        self.model.zero_grad()
        terms["loss"].backward()
        if self.settings.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_grad)
        for optimizer in self.optimizers:
            optimizer.step()
        return {name: x.detach() for name, x in terms.items()}

    def not_finite_error(self, epoch):
        """The error for a run whose loss or weights are infinite or not numbers."""
        saved = "nothing was saved before"
        if self.checkpoint.exists():
            saved = f"{self.checkpoint} holds the last good step that was saved"
        return UserError(
            f"{self.folder}: the loss stopped being finite by step {self.step} in epoch {epoch}; "
            f"{saved}; try --clip-grad 1 or a lower --lr"
        )

    def measure(self, progress, epoch):
        """The held-out distance, at an epoch's end."""
        distances = measure_held_out(self.model, self.batches(self.held_out, EVAL_BATCH))
        progress.held_out = distances.mean().item()
        progress.write(
            {
                "epoch": epoch,
                "step": self.step,
                "held_out_mean": progress.held_out,
                "held_out": distances.tolist(),
            }
        )

    def conclude(self, progress):
        """delta of Eq. 10, and whether the run was long enough. -> a line that says both."""
        on_held_out = len(self.held_out) > 0
        index = self.held_out if on_held_out else self.kept
        runs.set_tf32("fp32")  # whatever becomes a score is float32; the cache may hold bfloat16
        self.model.precision = "fp32"
        batches = (self.pictures(part) for part in index.split(EVAL_BATCH))
        scores = self.model.calibrate(*self.model.compare_all(batches))
        facts = {"step": self.step, "delta": self.model.delta.item(), "images": len(index)}
        spread = {
            name: {"mean": x.mean().item(), "std": x.std(correction=0).item()}
            for name, x in scores.items()
        }
        # From the log, since a run that was resumed has seen only its own part.
        lines = [json.loads(line) for _, line in runs.read_log(self.log_file)]
        curve = {line["step"]: line["held_out_mean"] for line in lines if "held_out_mean" in line}
        length = second_half(curve)
        progress.write({**facts, "on_held_out": on_held_out, **length, **spread})

        verdict = f"score {scores['score'].mean():.2f} on average, delta is {self.model.delta:.2f}"
        if not on_held_out:
            return f"the training images {verdict}: too low for new images"
        if not length:
            return f"images held out {verdict}"
        word = "fell" if length["fell"] >= 0 else "rose"
        fell = f"{word} by {100 * abs(length['fell']):.0f} % over the second half of training"
        if length["lowest_at"] < self.step:
            fell += f" and was lowest at step {length['lowest_at']}"
        return f"images held out {verdict}; their distance to the teacher {fell}"


def run_folder(settings):
    category = slug(settings.category)
    return Path(settings.out) / settings.dataset / category / f"seed{settings.seed}"


def hold_out(settings, n):
    """n training images -> indices (sorted) of those to train on, and of those held out.

    The same images are held out whatever the seed; at least two, which have a spread.
    """
    name = f"{settings.dataset}/{settings.category}"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    shuffled = torch.randperm(n, generator=generator)
    count = max(2, round(settings.holdout * n)) if settings.holdout else 0
    needed = max(count + 1, 2)  # delta needs two
    if n < needed:
        raise UserError(
            f"{name}: expected at least {needed} normal images, {count} of them held out, got {n}: "
            f"add some, or hold out less"
        )
    held_out, kept = shuffled.tensor_split([count])
    return kept.sort().values, held_out.sort().values


# --------------------------------------------------------------------- learning rate and optimisers


def peak_learning_rates(settings, width):
    """-> the optimiser's, and with Muon that of the rest, which AdamW trains (else None).

    Beyond NARROW they fall with the width, since a wider layer sums over more inputs: AdamW's with
    the width, Muon's with its root. The rest has Muon's rate up to NARROW and AdamW's beyond. So it
    drops to an eighth just past NARROW (results/recipe.md, "Width of the teacher").
    """
    adamw = ADAMW_LR * min(1, NARROW / width)  # AdamW moves each weight by about the learning rate
    if settings.optimizer != "muon":
        return settings.lr or adamw, None  # `parse` has set SGD's
    # The largest singular value of Muon's step grows with the root of D.
    muon = settings.lr or MUON_LR * min(1, math.sqrt(NARROW / width))
    # One rate for all weights ended nearer to DeiT-Tiny (width 192), farther from DINOv2's ViT-S/14
    # (384). Whether that is the width or the teacher is not known.
    rest = settings.lr_rest or (muon if width <= NARROW else min(muon, adamw))
    return muon, rest


def schedule(step, steps, settings):
    """The share of the peak: linear warm-up to 1; then linear or cosine to 0, or constant."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.decay == "constant":
        return 1.0
    left = (steps - step) / (steps - settings.warmup)
    if settings.decay == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return left


def set_learning_rate(optimizers, share):
    """Set each optimiser's rate to a share of the peak that it was made with."""
    for optimizer in optimizers:
        lr = share * optimizer.defaults["lr"]
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):  # which a graph reads
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def make_optimizers(settings, parameters, peak, device, peak_rest):
    """The optimisers of a run, each with its share of the parameters.

    peak, peak_rest: see `peak_learning_rates`.
    """
    options = {"lr": peak, "weight_decay": settings.weight_decay}
    fused = "cuda" in device  # on a CPU it is no faster
    if settings.optimizer == "sgd":
        sgd = torch.optim.SGD(parameters, momentum=settings.momentum, fused=fused, **options)
        return [sgd]
    if settings.optimizer == "adamw":
        return [torch.optim.AdamW(parameters, fused=fused, **options)]
    matrices = [p for p in parameters if p.ndim == 2]  # of a ViT: the weights of its blocks
    others = [p for p in parameters if p.ndim != 2]
    if not matrices:
        raise UserError("--optimizer: expected adamw or sgd with this network, got muon")
    bf16 = settings.precision == "bf16" and runs.multiplies_bf16(device)
    muon = Muon(matrices, bf16=bf16, **options)
    return [muon, torch.optim.AdamW(others, fused=fused, **{**options, "lr": peak_rest})]


class Muon(torch.optim.Muon):
    """torch's Muon, its updates as large as AdamW's, all matrices of one shape at once.

    torch takes one matrix after the other, in bfloat16 always. A GPU spends its time starting the
    many small products, and a CPU without bfloat16 products takes 70 times as long for them. So
    here they are batched, and in float32 unless `bf16`. Averages and weights are float32 always.
    Momentum (Nesterov, 0.95) and the five steps of Newton-Schulz are torch's defaults; --momentum
    is SGD's.
    """

    def __init__(self, matrices, *, lr, weight_decay, bf16):
        super().__init__(matrices, lr, weight_decay)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:  # it is None in a block behind the last tapped one
                    by_shape[p.shape].append(p)
            for shape, matrices in by_shape.items():
                averages = [self.average(p, group).to(self.dtype) for p in matrices]
                updates = orthogonalise(torch.stack(averages), group).float()
                for p, update in zip(matrices, updates, strict=True):
                    if group["weight_decay"]:
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                    as_large_as_adamws = 0.2 * math.sqrt(max(shape))  # torch's match_rms_adamw
                    p.sub_(group["lr"] * as_large_as_adamws * update)

    def average(self, p, group):
        """Nesterov's average of a matrix's gradients."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        average = state["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
        return p.grad.lerp(average, group["momentum"])


def orthogonalise(x, group):
    """Matrices (n, rows, columns) -> about U V^T for each matrix U S V^T, by Newton-Schulz.

    In the precision of x, on which its form depends.
    """
    tall = x.shape[1] > x.shape[2]
    wide = x.mT if tall else x
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=group["eps"])
    steps = newton_schulz_bf16 if x.dtype == torch.bfloat16 else newton_schulz
    wide = steps(wide, group)
    return wide.mT if tall else wide


def newton_schulz(wide, group):
    """Steps X <- P X with P = a + b A + c A^2 and A = X X^T, a small matrix.

    So the P of all steps are multiplied with one another first, and with X once. The next A is
    P X X^T P^T = P A P.
    """
    a, b, c = group["ns_coefficients"]
    square = wide @ wide.mT
    product = None
    for left in reversed(range(group["ns_steps"])):
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b A + c A^2
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        product = polynomial if product is None else polynomial @ product
        if left:
            square = polynomial @ square @ polynomial
    return product @ wide


def newton_schulz_bf16(wide, group):
    """The same, one step after the other, as torch does it.

    bfloat16 is too coarse for a product of polynomials.
    """
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        square = wide @ wide.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b A + c A^2
        wide = torch.baddbmm(wide, polynomial, wide, beta=a)
    return wide


# --------------------------------------------------------------------------- a step as a CUDA graph


class GraphedStep:
    """A step of training, recorded once as a CUDA graph, then replayed.

    To start its 2,000 operations from Python takes several times as long as to run them. A graph
    reads fixed memory, so a batch is copied there, and all have one size: a smaller one is a step
    as usual. So are the first `WARM_UP`, in which torch sets itself up.
    """

    WARM_UP = 3

    def __init__(self, take_step, optimizers, batch_size):
        self.take_step = take_step
        self.optimizers = optimizers
        self.batch_size = batch_size
        self.done = 0
        self.images = None
        self.graph = None

    def __call__(self, images, t):
        """As `Training.take_step`. The terms are overwritten by the next call."""
        if len(images) != self.batch_size:
            return self.take_step(images, t)
        self.put_in_place(images, t)
        self.done += 1
        if self.done <= self.WARM_UP:
            return self.on_another_stream()
        if self.graph is None:
            self.record()
        self.graph.replay()
        return self.terms

    def put_in_place(self, images, t):
        """Copy a batch to where the graph reads it."""
        if self.images is None:
            self.images = images.clone()
            self.t = {c: x.clone() for c, x in t.items()}
            return
        self.images.copy_(images)
        for c, x in t.items():
            self.t[c].copy_(x)

    def on_another_stream(self):
        """A step as usual, on a stream of its own, as torch asks before a recording."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            terms = self.take_step(self.images, self.t)
        torch.cuda.current_stream().wait_stream(stream)
        return terms

    def record(self):
        """Record a step, without doing it."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # the graph's gradients get memory of their own
        for group in groups:
            group["capturable"] = True  # AdamW asks for it; its state is on the GPU anyway
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.terms = self.take_step(self.images, self.t)
        for group in groups:
            group["capturable"] = False


# ------------------------------------------------------------------------------ the teacher's cache


class TeacherCache:
    """The teacher's features of the training images.

    They never change: the teacher is frozen and nothing is augmented. The first epoch computes
    them, later ones look them up. A step then costs as much as three forward passes instead of
    four, if a backward pass counts as two.

    n x layers x (1 + P) x D values of 4 bytes, or 2 under bf16, are kept in the first of `PLACES`
    that leaves half of what is free: the device's memory, the host's, a memory-mapped file in
    `folder`, or nowhere. `place` forces one. What other processes are about to take is not known.
    """

    def __init__(self, model, images, device, folder, place=None):
        config = model.teacher.config
        self.model = model
        self.dtype = torch.bfloat16 if model.precision == "bf16" else torch.float32
        shape = (images, len(model.layers), 1 + config["grid"] ** 2, config["width"])
        self.bytes = math.prod(shape) * self.dtype.itemsize
        if place is None:  # "off" has room for all
            place = next(p for p in PLACES if self.bytes <= free_bytes(p, device, folder) / 2)
        self.place = place
        self.known = torch.zeros(images, dtype=torch.bool)
        if place == "disk":
            self.store = mapped_tensor(folder, shape, self.dtype)
        elif place != "off":
            self.store = torch.empty(
                shape, dtype=self.dtype, device=device if place == "device" else "cpu"
            )

    def __call__(self, index, images):
        """images, and `index` (B,), on the CPU: their places in the training set. -> their t"""
        if self.place == "off":
            features = self.model.teacher_features(images)
            return {c: x.to(self.dtype).float() for c, x in features.items()}  # as if kept
        at = index.to(self.store.device, non_blocking=True)
        if self.known[index].all():
            t = self.store[at].to(images.device, non_blocking=True)  # (B, layers, 1 + P, D)
        else:
            features = self.model.teacher_features(images)
            t = torch.stack(list(features.values()), dim=1).to(self.dtype)
            self.store[at] = t.to(self.store.device)
            self.known[index] = True
        return dict(zip(self.model.layers, t.float().unbind(1), strict=True))


def mapped_tensor(folder, shape, dtype):
    """A tensor in a memory-mapped file. The file has no name, and goes with the process."""
    size = math.prod(shape)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a crash later
            try:
                os.posix_fallocate(file.fileno(), 0, size * dtype.itemsize)
            except OSError as error:
                error.filename = f"{folder}, --cache disk"
                raise
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)


def free_bytes(place, device, folder=None):
    """Free memory of the device, the host, or the disk below `folder`; "off" needs none."""
    if place == "device":
        if "cuda" not in device:
            return 0  # a CPU's memory is the host's
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept  # kept: by torch, from an earlier run
    if place == "host":
        return available_memory()
    if place == "disk":
        return shutil.disk_usage(folder).free
    return math.inf


def available_memory():
    """Main memory that is free or would be at once, as Linux has it; elsewhere 8 GiB."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) << 10, left_in_control_groups())
    return 8 << 30


def left_in_control_groups(own="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """What the limits of a container or of a Slurm job leave of main memory (cgroup v2)."""
    left = math.inf
    path = Path(own)
    names = path.read_text().splitlines() if path.is_file() else []
    for name in names:
        group = Path(root, name.removeprefix("0::/"))  # of v1 there is no such folder
        for folder in (group, *group.parents):  # each of them may have a limit
            limit = folder / "memory.max"
            if limit.is_file() and limit.read_text().strip() != "max":
                used = int((folder / "memory.current").read_text())
                facts = dict(line.split() for line in (folder / "memory.stat").open())
                # What is kept of files while there is room is given back when there is none.
                given_back = int(facts["inactive_file"])
                left = min(left, int(limit.read_text()) - used + given_back)
    return max(left, 0)


# ---------------------------------------------------------------------------- the held-out distance


@torch.no_grad()
def measure_held_out(model, batches):
    """How far the student still is from the teacher on images held out: (layers,).

    batches: [(images, t), ...]. Per layer the mean of 1 - cosine over the tokens of all images, 0
    to 2. It is not `vitad.distance`: it means the same for every reading of the norm, optimiser
    and length.
    """
    total = 0
    n = 0
    for images, t in batches:
        s = model.features(model.student, images)
        distances = [(1 - F.cosine_similarity(t[c], s[c], dim=-1)).mean(dim=1).sum() for c in t]
        total = total + torch.stack(distances)
        n += len(images)
    return total / n


def second_half(curve):
    """{step: held-out distance} -> what it says of the run's length, or {} with fewer than two.

    "fell": by what share the distance fell over the second half of the steps, on straight lines
    between the epochs' ends. "lowest_at": the step where it was lowest. If that was long before the
    end, the student has overfitted since.
    """
    if len(curve) < 2:
        return {}
    steps = sorted(curve)
    last = steps[-1]
    half = np.interp(last / 2, steps, [curve[step] for step in steps])
    return {"fell": 1 - curve[last] / float(half), "lowest_at": min(curve, key=curve.get)}


# ---------------------------------------------------------------------------------- signals and log


class StopSignals:
    """Ctrl-C or SIGTERM ends training after the current step; the same a second time, at once."""

    def __enter__(self):
        self.number = None
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.number = number
        signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """Means over the steps since the last line, to log.jsonl and to the terminal."""

    def __init__(self, file, steps, step, runs_after):
        self.file = file
        self.steps = steps
        self.first = step
        self.runs_after = runs_after  # 0 once the time of all runs has been said
        self.begun = time.perf_counter()
        self.held_out = None  # the last held-out distance, set by `Training.measure`
        self.start_line()

    def start_line(self):
        self.sums = {}
        self.images = 0
        self.count = 0
        self.line_begun = time.perf_counter()

    def add(self, terms, images):
        """Take in one step. Nothing waits for the device."""
        # Always a new tensor, since a graph overwrites its terms.
        self.sums = {name: self.sums.get(name, 0) + x for name, x in terms.items()}
        self.images += images
        self.count += 1

    def log(self, epoch, step, lr):
        """Write a line of the log; -> whether every loss is finite."""
        means = {name: float(value) / self.count for name, value in self.sums.items()}
        now = time.perf_counter()
        rate = self.images / (now - self.line_begun)
        seconds_a_step = (now - self.begun) / (step - self.first)
        left = seconds_a_step * (self.steps - step)
        self.write(
            {"epoch": epoch, "step": step, "lr": lr, **means, "images_per_s": round(rate, 1)}
        )
        if self.runs_after:
            all_left = left + seconds_a_step * self.steps * self.runs_after
            hours, minutes = divmod(round(all_left / 60), 60)
            time_left = f"about {hours}:{minutes:02d} h"
            print(f"this run and {self.runs_after} more like it: {time_left}", flush=True)
            self.runs_after = 0
        shown = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        minutes, seconds = divmod(int(left), 60)
        self.line = f"epoch {epoch} step {step}/{self.steps} {shown}"
        self.speed = f"{rate:.1f} images/s {minutes}:{seconds:02d} left"
        self.start_line()
        return math.isfinite(sum(means.values()))

    def show(self, epoch_ends, ended):
        """What `log` took in: in a terminal one line, written over, elsewhere a line per epoch."""
        held_out = f" held out {self.held_out:.4f}" if self.held_out is not None else ""
        line = f"{self.line}{held_out} {self.speed}"
        if sys.stdout.isatty():
            print(f"\033[K{line}", end="\n" if ended else "\r", flush=True)
        elif epoch_ends:
            print(line, flush=True)

    def write(self, values):
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            error.filename = self.file.name  # a full disk names no file
            raise


@contextlib.contextmanager
def open_log(path):
    """Yields the log, to add lines. Each is flushed, so a close fails only after a write has."""
    file = open(path, "a", 1, "utf-8")  # noqa: SIM115, closed below
    try:
        yield file
    finally:
        with contextlib.suppress(OSError):
            file.close()


# ------------------------------------------------------------------------------------- several runs


def set_up(settings):
    """What holds for the whole process: determinism, the device, and what auto means on it.

    -> (settings, device)
    """
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(settings.deterministic)
    device = runs.pick_device(settings.device)
    if "cuda" in device:
        torch.cuda.set_device(torch.device(device).index or 0)  # where a graph is recorded
    if settings.precision == "auto":
        precision = "bf16" if runs.multiplies_bf16(device) else "fp32"
        settings = dataclasses.replace(settings, precision=precision)
    return settings, device


def runs_to_do(settings, seeds, existing):
    """The Settings of each run of a command, without runs that are complete."""
    categories = [settings.category]
    if settings.category == "all" and settings.dataset != "folder":
        categories = CATEGORIES[settings.dataset]
    every = [
        dataclasses.replace(settings, category=category, seed=seed)
        for seed in seeds
        for category in categories
    ]
    todo = [run for run in every if not nothing_to_do(run, existing)]
    if todo and settings.dataset in ("mvtec", "folder"):
        # Refuse a folder that is not there before anything long begins.
        root = Path(settings.data_root)
        there = [(root / category / "train").is_dir() for category in categories]
        if settings.dataset == "folder" or not any(there):
            train_files(settings.dataset, settings.data_root, categories[0])
    return todo


def nothing_to_do(settings, existing, begun=None):
    """Whether a run is complete, and says so.

    begun: when `train_all` began, if this process holds the run's lock, else None. With --overwrite
    a model that is newer than that was trained by another process of the same command.
    """
    folder = run_folder(settings)
    model = folder / "model.safetensors"
    if existing == "overwrite":
        complete = begun is not None and model.is_file() and model.stat().st_mtime >= begun
    else:
        values = dataclasses.asdict(settings)
        complete = runs.is_complete(folder, values, existing, locked=begun is not None)
    if complete:
        print(f"{folder}: complete, nothing to do; --overwrite starts it again")
    return complete


def train_all(todo, teacher, device, existing):
    """Each run in turn. One that fails says why, and does not stop the others.

    A run that another process trains is left to it. At the end it is looked at again: that process
    may have been killed. -> the folders of those that are still left.
    """
    begun = time.time()
    count = len(todo)
    failed = []
    while True:
        left = []
        for i, settings in enumerate(todo):
            folder = run_folder(settings)
            try:
                with runs.lock(folder) as ours:
                    if not ours:
                        left.append(settings)
                    elif not nothing_to_do(settings, existing, begun):
                        resume = existing == "resume"
                        train(settings, teacher, device, resume, runs_after=len(todo) - 1 - i)
            except (UserError, OSError) as error:
                if count == 1:
                    raise
                runs.complain(error)
                failed.append(str(folder))
        if not left or len(left) == len(todo):
            break
        todo = left
    left = [str(run_folder(settings)) for settings in left]
    if failed:
        raise UserError(
            f"{len(failed)} of {count} runs failed, for the reasons above: {', '.join(failed)}"
        )
    return left


@runs.script
def main(argv):
    settings, seeds, existing = parse(argv)
    settings, device = set_up(settings)
    todo = runs_to_do(settings, seeds, existing)
    if not todo:
        return
    teacher = runs.load_teacher(ensure_weights(settings.weights))
    runs.check_teacher(dataclasses.asdict(settings), teacher)
    left = train_all(todo, teacher, device, existing)
    if left and len(todo) == 1:
        raise UserError(
            f"{left[0]}: expected a run that no other process trains, got one that is in use: "
            f"wait for it, or choose another --out"
        )
    if left:
        print(f"left to other processes, which train them: {', '.join(left)}")


if __name__ == "__main__":
    sys.exit(main())
