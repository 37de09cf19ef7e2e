#!/usr/bin/env python3
"""Train one student on the normal images of one category, or of every category of a protocol in turn.

    python train.py                                                 # the demo: generated images, a small teacher that comes along
    python train.py --dataset mvtec --category bottle               # data/mvtec/bottle, the paper's teacher
    python train.py --dataset cifar10 --category all                # downloads CIFAR-10 into data/
    python train.py --dataset folder --data-root DIR                # your own pictures

A run writes runs/<dataset>/<category>/seed<seed>/: model.safetensors (student, anchor, delta; config.json names the teacher by sha256),
config.json (settings, versions, device, command), log.jsonl (a line every ten steps). `python evaluate.py` scores it. Only normal training
images are ever read; the last epoch is the result. 2 CPU cores take half a minute for the demo, 8 minutes for bottle with DeiT-Tiny.
"""
import argparse
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from data import PAPER_AUROC, find_category, slug, train_files, train_split
from weights.files import atomic, fail, is_complete, load_checkpoint, one_sentence, open_run, provenance, save_checkpoint, save_tensors
# torch is imported where it is first needed: --help and wrong arguments are answered at once.

TEACHER = "vit_base_patch16_224"  # the paper's
# Batch size and SGD's lr are section 4.1's; for the demo and own pictures MVTec's.
PER_DATASET = {
    "cifar10": dict(lr=0.1, batch_size=32, data_root="data", holdout=0.0, weights=TEACHER),
    "cifar100": dict(lr=0.1, batch_size=32, data_root="data", holdout=0.0, weights=TEACHER),
    "fashion_mnist": dict(lr=0.1, batch_size=32, data_root="data", holdout=0.0, weights=TEACHER),
    "mvtec": dict(lr=0.2, batch_size=4, data_root="data/mvtec", holdout=0.0, weights=TEACHER),
    "folder": dict(lr=0.2, batch_size=4, data_root=None, holdout=0.1, weights=TEACHER),
    "demo": dict(lr=0.2, batch_size=4, data_root=None, holdout=0.1, weights="demo_teacher", epochs=24),
}
STEPS, LOG_EVERY, EVAL_BATCH = 1600, 10, 32  # of a run (README, "Training recipe"), between lines of the log; images without gradient


def per_dataset(name):
    """The defaults of a setting as --help shows them: "mvtec 4, cifar10 32"."""
    return "default " + ", ".join(f"{dataset} {values[name]}" for dataset, values in PER_DATASET.items() if values.get(name))


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
    epochs: int = option(None, f"passes over the training images (default as many as {STEPS} steps take; demo 24)")
    batch_size: int = option(None, f"images a step, the paper's ({per_dataset('batch_size')})")
    lr: float = option(None, f"peak learning rate (default min(0.001, 0.192 / width of the teacher); with sgd the paper's: {per_dataset('lr')[8:]})")
    optimizer: str = option("adamw", "sgd is the paper's; it takes many times as many steps", choices=["sgd", "adamw"])
    momentum: float = option(0.9, "of SGD")
    weight_decay: float = option(0.0, "of every trained parameter")
    warmup: int = option(20, "steps of linear warm-up")
    decay: str = option("cosine", "learning rate after the warm-up", choices=["cosine", "constant"])
    clip_grad: float = option(0.0, "clip the global gradient norm to this, 0 = off; sgd with --distance l2 or mse needs 1")
    lam: float = option(1.0, "lambda of Eq. 6")
    top_k: int = option(20, "k of Eq. 9, in patches")
    layers: tuple = option((3, 6, 9, 11), "tapped blocks, counted from 0, comma-separated; the last one is the anchor's")
    distance: str = option("unit", "reading of the norm in Eqs. 2, 3, 5, 7 and 8", choices=["unit", "l2", "mse"])
    anchor: str = option("mean", "average of Eq. 1: cumulative mean of the first epoch, or bias-corrected EMA", choices=["mean", "ema"])
    pos_embed: str = option("copy", "student's position embedding: the teacher's, frozen (Fig. 7, strategy 2), or learnt", choices=["copy", "learn"])
    without: str = option(None, "terms to leave out of Eq. 6, for ablations (Fig. 4)", choices=["anchor", "gram", "anchor,gram"])
    holdout: float = option(None, "share of the training images to hold out: they measure how far training has come, and calibrate delta (default "
                            "0 in the paper's protocols, else 0.1)")
    seed: int = option(0, "of the student's initialisation and the order of the images")
    device: str = option(None, "cpu, cuda, cuda:1, ...; default cuda where there is one")
    precision: str = option("fp32", "of the networks; losses and scores are float32 always", choices=["fp32", "tf32", "bf16"])
    compile: bool = option(False, "compile the student and the losses with torch.compile: minutes at the start, faster steps")
    checkpoint_every: float = option(60.0, "seconds from one checkpoint to the next; --resume continues from the last")
    deterministic: bool = option(False, "on CUDA, algorithms that give the same bits every time; a CPU always does")
    cache: str = option(None, "where the teacher's features are kept; default the first with room", choices=["device", "host", "disk", "off"])


def whole_numbers(text):
    """"3,6,9,11" -> (3, 6, 9, 11): blocks, or seeds"""
    numbers = [int(c) if c.isdecimal() else -1 for c in text.split(",")]
    if numbers != sorted(set(numbers)) or numbers[0] < 0:
        raise argparse.ArgumentTypeError(f"expected ascending numbers from 0, like 3,6,9,11, got {text!r}")
    return tuple(numbers)


def parse(argv):
    """Command line -> (Settings, seeds, what to do with a run that exists); a wrong value ends with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    for f in dataclasses.fields(Settings):
        kind = whole_numbers if f.type is tuple else f.type
        shown = ",".join(map(str, f.default)) if f.name == "layers" else f"{f.default:g}" if isinstance(f.default, float) else f.default
        help = f.metadata["help"] + (f" (default {shown})" if f.default not in (None, False) else "")
        kind = {"action": "store_true"} if kind is bool else {"type": kind, "choices": f.metadata.get("choices")}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=help, **kind)
    parser.add_argument("--seeds", type=whole_numbers, help="several runs in place of --seed, each of another one: 0,1,2")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", dest="existing", action="store_const", const="resume", help="continue an unfinished run from its last checkpoint")
    existing.add_argument("--overwrite", dest="existing", action="store_const", const="overwrite", help="start again where a run exists already")
    arguments = vars(parser.parse_args(argv))
    existing, seeds = arguments.pop("existing"), arguments.pop("seeds") or [arguments["seed"]]
    arguments |= {name: value for name, value in PER_DATASET[arguments["dataset"]].items()
                  if arguments[name] is None and (name != "lr" or arguments["optimizer"] == "sgd")}  # AdamW's lr follows from the teacher
    if arguments["dataset"] == "folder" and not arguments["data_root"]:
        fail("--data-root: expected the folder that holds train/good, got none")
    dataset, category = arguments["dataset"], arguments["category"]
    with one_sentence():
        if dataset == "folder":
            arguments["category"] = Path(arguments["data_root"]).resolve().name
        elif category is None and len(PAPER_AUROC[dataset]) > 1:
            raise ValueError(f"--category: expected one of {', '.join(PAPER_AUROC[dataset])}, or all, got none")
        elif category != "all":
            arguments["category"] = find_category(dataset, category or "0")
    for names, words, holds in (("epochs batch_size top_k", "at least 1", lambda value: value >= 1),
                                ("lr", "more than 0", lambda value: 0 < value < math.inf),
                                ("holdout", "0 or more and below 1", lambda value: 0 <= value < 1),
                                ("momentum weight_decay warmup clip_grad lam seed checkpoint_every", "0 or more",
                                 lambda value: 0 <= value < math.inf)):
        for name in names.split():
            if arguments[name] is not None and not holds(arguments[name]):
                fail(f"--{name.replace('_', '-')}: expected {words}, got {arguments[name]}")
    return Settings(**arguments), seeds, existing


def run_folder(settings):
    return Path(settings.out) / settings.dataset / slug(settings.category) / f"seed{settings.seed}"


def learning_rate(step, steps, peak, settings):
    """Linear warm-up to the peak, then a cosine down to 0 over the remaining steps, or constant."""
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = 0 if settings.decay == "constant" else (step - settings.warmup) / (steps - settings.warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


class Progress:
    """Means over the steps since the last line: to log.jsonl, and shown, on one line that updates in a terminal, a line an epoch elsewhere."""

    def __init__(self, file, steps, step, more):
        self.file, self.steps, self.first, self.more = file, steps, step, more
        self.sums, self.images, self.count = {}, 0, 0
        self.start = self.last = time.perf_counter()

    def add(self, terms, images):
        """Take in one step; nothing waits for the device."""
        self.sums = {name: self.sums.get(name, 0) + value.detach() for name, value in terms.items()}
        self.images, self.count = self.images + images, self.count + 1

    def log(self, epoch, step, lr, epoch_ends):
        """Write a line; -> whether every loss is finite."""
        means, now = {name: float(value) / self.count for name, value in self.sums.items()}, time.perf_counter()
        rate, pace = self.images / (now - self.last), (now - self.start) / (step - self.first)
        left = pace * (self.steps - step)
        self.file.write(json.dumps({"epoch": epoch, "step": step, "lr": lr, **means, "images_per_s": round(rate, 1)}) + "\n")
        line = (f"epoch {epoch} step {step}/{self.steps} " + " ".join(f"{name} {value:.3f}" for name, value in means.items())
                + f" {rate:.1f} images/s {int(left) // 60}:{int(left) % 60:02d} left")
        if self.more and step - self.first <= LOG_EVERY:
            minutes = round((left + pace * self.steps * self.more) / 60)
            print(f"this run and {self.more} more like it: about {minutes // 60}:{minutes % 60:02d} h", flush=True)
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if step == self.steps else "", flush=True)
        elif epoch_ends:
            print(line, flush=True)
        self.sums, self.images, self.count, self.last = {}, 0, 0, now
        return math.isfinite(sum(means.values()))


def main(settings, seeds, existing, teacher=None):
    categories = [settings.category] if settings.category != "all" or settings.dataset == "folder" else list(PAPER_AUROC[settings.dataset])
    todo = []
    with one_sentence():
        for one in (dataclasses.replace(settings, category=category, seed=seed) for seed in seeds for category in categories):
            if is_complete(run_folder(one), dataclasses.asdict(one), existing):
                print(f"{run_folder(one)}: complete, nothing to do; --overwrite starts it again")
            else:
                todo.append(one)
        if not todo:
            return
        if settings.dataset in ("mvtec", "folder") and not any((Path(settings.data_root) / one / "train").is_dir() for one in categories):
            train_files(settings.dataset, settings.data_root, categories[0])  # says what is missing before anything long begins
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    import torch

    from vit import load_vit, pick_device
    from weights.download import weights_file

    with one_sentence():
        device = pick_device(settings.device, settings.precision)
        torch.use_deterministic_algorithms(settings.deterministic)
        teacher = teacher or load_vit(weights_file(settings.weights))
        for name, value, most in (("layers", settings.layers[-1], len(teacher.blocks) - 1), ("top-k", settings.top_k, teacher.config["grid"] ** 2)):
            if value > most:
                raise ValueError(f"--{name}: expected at most {most} with this teacher, got {value}")
    failed = []
    for more, one in zip(reversed(range(len(todo))), todo):
        try:
            try:
                train(one, teacher, device, existing == "resume", more)
            except torch.OutOfMemoryError:
                fail(f"{run_folder(one)}: expected a batch that fits the memory of {device}, got --batch-size {one.batch_size} with --precision "
                     f"{one.precision}: try a smaller one, or bf16; the last checkpoint is kept")
        except SystemExit as end:
            if end.code != 2:  # stopped, which means all of them
                raise
            failed.append(str(run_folder(one)))
    if failed:
        if len(todo) > 1:
            print(f"{len(failed)} of {len(todo)} runs failed, for the reasons above: {', '.join(failed)}", file=sys.stderr)
        sys.exit(2)


def train(settings, teacher, device, resume, more):
    """One run, from the training images to the run folder; `more` are to come after it."""
    import torch

    from vitad import Distillation, TeacherCache, free_bytes

    run = run_folder(settings)
    checkpoint, log = run / "checkpoint.safetensors", run / "log.jsonl"
    resume = resume and checkpoint.is_file()
    with one_sentence():
        images = train_split(settings.dataset, settings.data_root, settings.category, teacher.image_size).images
        # The same images are held out whatever the seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.dataset}/{settings.category}".encode()))
        shuffled = torch.randperm(len(images), generator=generator)
        held_out, kept = (part.sort().values for part in shuffled.tensor_split([round(settings.holdout * len(images))]))
        steps_per_epoch = math.ceil(len(kept) / settings.batch_size)
        epochs = settings.epochs or math.ceil(STEPS / steps_per_epoch)
        steps, step = epochs * steps_per_epoch, 0
        # AdamW moves every weight by about the learning rate, and so a sum over D inputs by up to D times that: README, "Width".
        peak = settings.lr or min(1e-3, 0.192 / teacher.config["width"])
        made_with = provenance(device)
        open_run(run, {"settings": dataclasses.asdict(settings), "teacher": {"sha256": teacher.sha256, **teacher.metadata},
                       "images": len(images), "epochs": epochs, "lr": peak}, made_with, resume)

    # The seed of a run depends on which run it is, not on what ran before.
    seed = zlib.crc32(f"{settings.dataset}/{settings.category}/{settings.seed}".encode())
    torch.manual_seed(seed)
    model = Distillation(teacher, settings.layers, settings.distance, settings.pos_embed, settings.anchor, settings.lam,
                         settings.top_k, settings.precision, settings.without or ()).to(device)
    with one_sentence():
        cache = TeacherCache(model, len(images), device, run, settings.cache)
    if images.nbytes <= free_bytes("device", device) / 4:
        images = images.to(device)
    # "reduce-overhead" is CUDA graphs: the launches of a step of 4 images take longer than its work. One graph for the last, smaller batch.
    loss_terms = torch.compile(model.loss_terms, mode="reduce-overhead", dynamic=False) if settings.compile else model.loss_terms
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"sgd": partial(torch.optim.SGD, momentum=settings.momentum), "adamw": torch.optim.AdamW}[settings.optimizer](
        parameters, peak, weight_decay=settings.weight_decay, fused="cuda" in device)  # on a CPU it is no faster

    def batches(index, size):
        for batch in index.split(size):
            x = images[batch.to(images.device)].to(device)
            yield x, cache(batch, x)

    def order(epoch):
        return kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed + epoch))]

    print(f"{run}: {len(kept)} normal images, {epochs} epochs of {steps_per_epoch} steps, on {made_with['device']}, "
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
    stopped = []  # the number of Ctrl-C or SIGTERM, for the loop to end after its step; a second one ends at once
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: (stopped.append(number), signal.signal(number, signal.SIG_DFL)))
    with one_sentence(OSError), open(log, "a", buffering=1) as file:
        progress, saved = Progress(file, steps, step, more), time.monotonic()
        for epoch in range(step // steps_per_epoch + 1, epochs + 1):
            for x, t in batches(order(epoch)[step % steps_per_epoch * settings.batch_size:], settings.batch_size):
                lr = learning_rate(step, steps, peak, settings)
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
                    saved = f"{checkpoint} holds the last good step that was saved" if checkpoint.exists() else "nothing was saved before"
                    fail(f"{run}: the loss stopped being finite by step {step} in epoch {epoch}; {saved}; try --clip-grad 1 or a lower --lr")
                if epoch_ends and len(held_out):
                    student, layout = model.yardstick(batches(held_out, EVAL_BATCH))
                    file.write(json.dumps({"epoch": epoch, "step": step, "held_out_mean": student.mean().item(), "held_out": student.tolist(),
                                           "layout": layout.tolist(), "converged": bool((student < layout).all())}) + "\n")
                    print(f"held out: distance to the teacher {student.mean():.4f}, of the layout {layout.mean():.4f}: "
                          f"{'converged' if (student < layout).all() else 'not converged'}", flush=True)
                if due:
                    save_checkpoint(checkpoint, model, optimizer, step)
                    saved = time.monotonic()
                if stopped:
                    print(f"\n{run}: stopped after step {step} of {steps}; --resume continues from there", file=sys.stderr)
                    sys.exit(128 + stopped[0])

        # delta of Eq. 10, from images held out, or else from the training images themselves: optimistic, since the student has seen them.
        parts = [model.scores(x, t) for x, t in batches(held_out if len(held_out) else kept, EVAL_BATCH)]
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        model.calibrate(scores)
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
