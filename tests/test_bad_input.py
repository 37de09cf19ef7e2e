"""Bad input to every script: exit code 2, one sentence, and the disk as it was.

A row is: the script, what is done to the world beforehand, the arguments, and the words of the
sentence (parts of it in their order, " ... " between them). The world is a folder with pictures, a
teacher, a scored run and a halted one.
"""

import contextlib
import errno
import io
import json
import os
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import evaluate
import runs
import train
from ablations import run as ablations
from conftest import assert_one_sentence, call, make_category, save_vit, tiny_vit
from results import anatomy, curves, nearest
from weights import convert, train_demo_teacher

TEACHER = "teacher.safetensors"
RUN = "runs/folder/bottle/seed0"
HALTED = "halted/folder/bottle/seed0"
GOOD = "data/bottle/train/good"
STAIN = "data/bottle/test/stain"
OWN = f"--dataset folder --data-root data/bottle --weights {TEACHER} --epochs 2"
FIGURE = f"--figure 4 --categories bottle --data-root data --weights {TEACHER} --epochs 1"
MEAN_STD = "--mean .5 .5 .5 --std .5 .5 .5"
SCRIPTS = {  # what comes before a row's arguments
    "train": (train.main, f"{OWN} --out new"),
    "mvtec": (train.main, f"--dataset mvtec --data-root data --weights {TEACHER} --out new"),
    "cifar10": (train.main, f"--dataset cifar10 --data-root data --weights {TEACHER} --out new"),
    "resume": (train.main, f"{OWN} --out halted --resume"),
    "again": (train.main, f"{OWN} --out runs"),
    "evaluate": (evaluate.main, ""),
    "figure": (ablations.main, f"{FIGURE} --results new --out new"),
    "convert": (convert.main, ""),
    "demo teacher": (train_demo_teacher.main, "--steps 1 --batch-size 1 --out new.safetensors"),
    "anatomy": (anatomy.main, ""),
    "curves": (curves.main, ""),
    "nearest": (
        nearest.main,
        f"--dataset mvtec --category bottle --data-root data --weights {TEACHER} --out new",
    ),
}


# ------------------------------------------------------------------ what is done to the world


def put(path, content=""):
    """A file of these bytes or this text."""

    def change(world):
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (world / path).write_bytes(content)
        else:
            (world / path).write_text(content)

    return change


def cut(path, left=0.5):
    """A file whose end is missing."""

    def change(world):
        content = (world / path).read_bytes()
        (world / path).write_bytes(content[: int(left * len(content))])

    return change


def gone(path):
    def change(world):
        if (world / path).is_dir():
            shutil.rmtree(world / path)
        else:
            (world / path).unlink(missing_ok=True)

    return change


def folder(path):
    """An empty folder in place of what is there."""
    return both(gone(path), lambda world: (world / path).mkdir(parents=True))


def link(path, target):
    """A symbolic link in place of what is there; to its own name it is a loop."""
    return both(gone(path), lambda world: (world / path).symlink_to(target))


def move(path, target):
    return lambda world: (world / path).rename(world / target)


def copy(path, target):
    return lambda world: shutil.copy(world / path, world / target)


def both(*changes):
    def change(world):
        for one in changes:
            one(world)

    return change


def in_json(path, part=None, **values):
    """Other values in a JSON object, or in the object that it holds as `part`; None takes out."""

    def change(world):
        whole = json.loads((world / path).read_text())
        changed = whole[part] if part else whole
        changed.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del changed[name]
        (world / path).write_text(json.dumps(whole))

    return change


def tensors(path, about=None, **values):
    """Other tensors in a file, "__" for "." in their names; None takes out. about: metadata."""

    def change(world):
        with safe_open(world / path, "pt") as file:
            metadata = file.metadata()
            whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        whole |= {name.replace("__", "."): value for name, value in values.items()}
        whole = {name: value for name, value in whole.items() if value is not None}
        if about is not None:
            known = json.loads(metadata["vitad"])
            text = about if isinstance(about, str) else json.dumps({**known, **about})
            metadata = {"vitad": text}
        save_file(whole, world / path, metadata)

    return change


def saved(path, content):
    """A file of torch.save."""
    return lambda world: torch.save(content, world / path)


def picture(path, size, mode="RGB"):
    """A picture of one colour; its suffix is its format."""

    def change(world):
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(world / path)

    return change


def table_of(figure, text):
    return put(f"new/figure_{figure}.csv", text)


SMALL = {"width": 8, "hidden": 8}  # of the teacher, which every row copies
NAN = torch.tensor(float("nan"))
ANCHOR = torch.full((8,), float("inf"))
INTS = torch.ones(1, 1, 8, dtype=torch.int32)
TIMM = {name: x.clone() for name, x in tiny_vit(depth=1, **SMALL).state_dict().items()}
MANY = 10**30
NAME = "ein Teil/größe 中文 é"
LONG = "x" * 300
TORCHVISION = {"class_token": torch.zeros(1, 1, 32), "conv_proj.weight": torch.zeros(32, 3, 32, 32)}


def checkpoint(path, **changes):
    """A timm checkpoint in a .safetensors or .pth file, with other tensors; None takes out."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    content = {name: x for name, x in {**TIMM, **changes}.items() if x is not None}
    save = torch.save if path.endswith("pth") else save_file
    return lambda world: save(content, world / path)


# ------------------------------------------------------------------------------------- the table

OPTIONS = [
    # Numbers.
    ("train", None, "--epochs 0", "--epochs: expected at least 1, got 0"),
    ("train", None, f"--epochs {MANY}", "--epochs: expected at most 1000000000, got 1000000"),
    ("train", None, "--epochs 1.5", "--epochs: invalid int value: '1.5'"),
    ("train", None, "--epochs ''", "--epochs: invalid int value: ''"),
    ("train", None, "--batch-size -4", "--batch-size: expected at least 1, got -4"),
    ("train", None, f"--batch-size {MANY}", "--batch-size: expected at most 1000000000"),
    ("train", None, "--lr -0.1", "--lr: expected more than 0 and finite, got -0.1"),
    ("train", None, "--lr nan", "--lr: expected more than 0 and finite, got nan"),
    ("train", None, "--lr-rest 0", "--lr-rest: expected more than 0 and finite, got 0"),
    (
        "train",
        None,
        "--optimizer sgd --lr-rest 0.1",
        "--lr-rest: expected none with --optimizer sgd",
    ),
    ("train", None, "--lr 1e400", "--lr: expected more than 0 ... got inf"),
    ("train", None, "--lr fast", "--lr: invalid float value: 'fast'"),
    ("train", None, "--momentum -1", "--momentum: expected 0 or more and finite, got -1"),
    ("train", None, "--weight-decay inf", "--weight-decay: expected 0 or more ... got inf"),
    ("train", None, f"--warmup {10**400}", "--warmup: expected at most 1000000000"),
    ("train", None, "--clip-grad nan", "--clip-grad: expected 0 or more ... got nan"),
    ("train", None, "--lam 1e400", "--lam: expected 0 or more ... got inf"),
    ("train", None, "--holdout 1", "--holdout: expected 0 or more and below 1, got 1"),
    ("train", None, "--holdout 0.99", "expected at least 7 normal images, 6 of them held out"),
    ("train", None, "--top-k 0", "--top-k: expected at least 1, got 0"),
    ("train", None, "--top-k 50", "--top-k: expected 1 to 49 with this teacher, got 50"),
    ("train", None, f"--top-k {MANY}", "--top-k: expected at most 1000000000"),
    ("train", None, "--checkpoint-every nan", "--checkpoint-every: expected 0 or more"),
    ("train", None, f"--seed {2**70}", "--seed: expected at most 1000000000 ... got 118059"),
    ("train", None, "--seed -1", "--seed: expected at least 0, got -1"),
    ("train", None, "--seeds 0,x", "--seeds: expected ascending numbers ... got '0,x'"),
    ("train", None, "--seeds ''", "--seeds: expected ascending numbers ... got ''"),
    ("train", None, f"--seeds 0,{MANY}", "--seeds: expected ascending numbers ... got '0,10000"),
    ("train", None, "--layers 9,3", "--layers: expected ascending ... got '9,3'"),
    ("train", None, "--layers 3,3", "--layers: expected ascending ... got '3,3'"),
    ("train", None, "--layers 3,x", "--layers: expected ascending ... got '3,x'"),
    ("train", None, "--layers ''", "--layers: expected ascending ... got ''"),
    ("train", None, "--layers 3,12", "--layers: expected 0 to 11 with this teacher, got 12"),
    # Words.
    ("train", None, "--dataset mvtek", "--dataset: invalid choice: 'mvtek' ... mvtec"),
    ("train", None, "--dataset ''", "--dataset: invalid choice: ''"),
    ("train", None, "--precision fp8", "--precision: invalid choice: 'fp8' ... fp32"),
    ("train", None, "--optimizer adam", "--optimizer: invalid choice: 'adam' ... adamw"),
    ("train", None, "--without distill", "--without: invalid choice: 'distill'"),
    ("train", None, "--device gpu", "--device: expected a device ... got 'gpu'"),
    ("train", None, "--device cuda:99", "--device: expected a device ... got 'cuda:99'"),
    ("train", None, "--device ''", "--device: expected a device ... got ''"),
    ("train", None, "--device meta", "--device: expected a device ... got 'meta'"),
    ("train", None, "--device mps", "--device: expected a device ... got 'mps'"),
    ("train", None, "--seed 5 --seeds 0,1", "--seeds: not allowed with argument --seed"),
    ("train", None, "--dataset folder --category b --data-root data/bottle", "expected none with"),
    ("train", None, "--fast", "unrecognized arguments: --fast"),
    ("train", None, "--resume --overwrite", "--overwrite: not allowed with argument --resume"),
    ("mvtec", None, "", "--category: expected one of bottle ... got none"),
    ("mvtec", None, "--category ''", "--category: expected a category of mvtec ... got ''"),
    ("mvtec", None, "--category botle", "got 'botle': did you mean bottle"),
    ("mvtec", None, "--category 15", "got '15': choose from bottle ... 0 to 14"),
    ("mvtec", None, "--category bottle --dataset demo", "got 'bottle' ... one of --dataset mvtec"),
    ("cifar10", None, "--category kat", "got 'kat': did you mean cat?"),
    # The same of the other scripts.
    ("evaluate", None, "--batch-size 0", "--batch-size: expected at least 1, got 0"),
    ("evaluate", None, f"--batch-size {MANY}", "--batch-size: expected at most 1000000000"),
    ("evaluate", None, "--show-failures -1", "--show-failures: expected at least 0, got -1"),
    ("evaluate", None, "--json", "--json: expected --images with it, got none"),
    ("evaluate", None, "--exit-code", "--exit-code: expected --images with it, got none"),
    ("evaluate", None, "--standardised", "--standardised: expected --images with it, got none"),
    ("evaluate", None, "--images data --plot", "--plot: expected a test split, got --images"),
    (
        "evaluate",
        None,
        "--images data --report out",
        "--report: expected a test split, got --images",
    ),
    ("evaluate", None, "--images data --data-root data", "--data-root: expected a test split, got"),
    ("evaluate", None, "--images data --show-failures 1", "--show-failures: expected a test split"),
    (
        "evaluate",
        None,
        "--images data/bottle/train/good --standardised",
        "expected 5 or more images held out",
    ),
    ("evaluate", None, "--images", "--images: expected at least one argument"),
    ("evaluate", None, "--precision ''", "--precision: invalid choice: ''"),
    ("evaluate", None, "--device cuda:99", "--device: expected a device ... got 'cuda:99'"),
    ("evaluate", None, "--nonsense", "unrecognized arguments: --nonsense"),
    ("figure", None, "--figure 9", "--figure: invalid choice: '9'"),
    ("figure", None, "--categories ''", "--category: expected a category of mvtec ... got ''"),
    ("figure", None, "--categories bottel", "got 'bottel': did you mean bottle?"),
    ("figure", None, "--seeds 0,a", "--seeds: expected ascending numbers ... got '0,a'"),
    ("figure", None, "--epoch x", "--epochs: invalid int value: 'x'"),
    ("figure", None, "--fast", "unrecognized arguments: --fast"),
    ("figure", None, "--without gram", "--without: expected none, which is part of ViT, got gram"),
    ("figure", None, "--category pill", "--category: expected none, which is part of ViT, got"),
    (
        "figure",
        None,
        "--figure 7 --pos-embed learn",
        "--pos-embed: expected none, which is part of",
    ),
    ("figure", None, "--figure 3c --cache host", "--cache: expected none, which is part of ResNet"),
    ("figure", None, "--image-size 0", "--image-size: expected 32 to 2048, got 0"),
    ("figure", None, f"--image-size {MANY}", "--image-size: expected 32 to 2048, got 1000"),
    ("demo teacher", None, "--steps 0", "--steps: expected at least 1, got 0"),
    ("demo teacher", None, f"--batch-size {MANY}", "--batch-size: expected at most 10000"),
    ("demo teacher", None, "--lr nan", "--lr: expected more than 0 and finite, got nan"),
    ("demo teacher", None, "--lr -1", "--lr: expected more than 0 and finite, got -1"),
    ("demo teacher", None, f"--seed {2**70}", "--seed: expected at most 1000000000"),
    ("demo teacher", None, "--seed x", "--seed: invalid int value: 'x'"),
    ("curves", None, "", "expected runs or --category, got neither"),
    ("curves", None, "--category nothing", "expected runs of nothing with deit_tiny ... got none"),
    ("curves", None, f"{RUN} --category nothing", "expected runs of nothing ... got none"),
    ("nearest", None, "--memory 0", "--memory: expected at least 1, got 0"),
    ("nearest", None, "--memory x", "--memory ... 'x'"),
    ("nearest", None, "--category botle", "--category: expected a category ... got 'botle'"),
    ("nearest", None, "--category all", "--category: expected a category ... got 'all'"),
    ("nearest", None, "--dataset folder", "--dataset ... 'folder'"),
    ("nearest", None, "--weights nowhere.safetensors", "nowhere.safetensors ... no such file"),
    ("nearest", cut(TEACHER), "", "teacher.safetensors: expected a safetensors file ... truncated"),
    ("nearest", None, "--data-root nowhere", "nowhere/bottle: expected train/good/*"),
    ("nearest", put(f"{STAIN}/000.png"), "", "000.png: expected an image ... does not decode"),
    ("nearest", gone(STAIN), "", "bottle: expected normal and anomalous test images, got one kind"),
    ("nearest", None, f"--out {TEACHER}", "teacher.safetensors"),
]

PICTURES = [
    ("mvtec", None, "--category pill", "data/pill: expected train/good/* ... CC BY-NC-SA 4.0"),
    ("mvtec", None, "--category all --data-root nowhere", "nowhere/bottle: expected train/good/*"),
    ("train", None, "--data-root ''", "--data-root: expected the folder that holds train/good"),
    ("train", None, f"--data-root {TEACHER}", f"{TEACHER}: expected train/good/*"),
    ("train", None, "--data-root data", "data: expected train/good/* and test/<kind>/* in it"),
    ("train", None, f"--data-root '{NAME}'", f"{NAME}: expected train/good/*"),
    ("train", link("loop", "loop"), "--data-root loop", "loop: expected train/good/*"),
    ("train", link("data/bottle/train", "train"), "", "train/good: expected images"),
    ("train", folder(GOOD), "", f"{GOOD}: expected images (.bmp, ... got none"),
    ("train", put(f"{GOOD}/001.png"), "", f"{GOOD}/001.png: expected an image, got"),
    ("train", cut(f"{GOOD}/001.png"), "", f"{GOOD}/001.png: expected an image, got ... truncated"),
    ("train", folder(f"{GOOD}/001.png"), "", f"{GOOD}/001.png: expected an image, got"),
    ("train", link(f"{GOOD}/001.png", "no.png"), "", f"{GOOD}/001.png: expected an image, got"),
    ("train", link(f"{GOOD}/001.png", "001.png"), "", f"{GOOD}/001.png: expected an image, got"),
    (
        "train",
        link(f"{GOOD}/001.png", "/proc/self/mem"),
        "",
        f"{GOOD}/001.png: expected an image, got",
    ),
    ("train", link(f"{GOOD}/001.png", "/dev/zero"), "", f"{GOOD}/001.png: expected an image, got"),
    ("train", lambda world: os.mkfifo(world / GOOD / "9.png"), "", f"{GOOD}/9.png: expected an im"),
    (
        "train",
        copy("huge/huge.png", f"{GOOD}/9.png"),
        "",
        f"{GOOD}/9.png: expected an image ... 200000000 pixels",
    ),
    (
        "train",
        both(picture(f"{GOOD}/9.tif", (50, 50)), cut(f"{GOOD}/9.tif")),
        "",
        f"{GOOD}/9.tif: expected an image, got",
    ),
    (
        "train",
        both(picture(f"{NAME}/train/good/a b.jpg", (99, 99)), cut(f"{NAME}/train/good/a b.jpg")),
        f"--data-root '{NAME}'",
        f"{NAME}/train/good/a b.jpg: expected an image, got",
    ),
    (
        "train",
        picture("one/train/good/1.png", (9, 9)),
        "--data-root one",
        "folder/one: expected at least 3 normal images, 2 of them held out, got 1",
    ),
    (
        "cifar10",
        both(
            picture("data/cifar10/train/cat/1.png", (32, 32)),
            picture("data/cifar10/train/cat/2.png", (28, 28)),
        ),
        "--category cat",
        "cat/2.png: expected an image of the others' size (32, 32), got (28, 28)",
    ),
    (
        "cifar10",
        picture("data/cifar10/train/cat/1.png", (32, 32)),
        "--category cat",
        "data: expected 5000 train images of class cat, the official number, got 1",
    ),
    (
        "cifar10",
        picture("data/cifar10/train/dog/1.png", (32, 32)),
        "--category cat",
        "data/cifar10/train/cat: expected images ... got none",
    ),
    (
        "cifar10",
        put("data/cifar10/train/cat/1.png"),
        "--category cat",
        "cat/1.png: expected an image, got",
    ),
    ("evaluate", gone("data/bottle/test"), "", "data/bottle/test: expected folders of test images"),
    ("evaluate", folder(STAIN), "", f"{STAIN}: expected images ... got none"),
    ("evaluate", put(f"{STAIN}/001.png"), "", f"{STAIN}/001.png: expected an image ... --skip-bad"),
    ("evaluate", None, "--data-root nowhere", "nowhere: expected train/good/* and test/<kind>/*"),
    (
        "evaluate",
        folder("data/bottle/ground_truth"),
        "",
        "stain/000_mask.png: expected the mask of stain/000.png, (64, 64), got none that opens",
    ),
    (
        "evaluate",
        picture("data/bottle/ground_truth/stain/000_mask.png", (9, 9), "L"),
        "",
        "000_mask.png: expected the mask of stain/000.png, (64, 64), got (9, 9)",
    ),
    (
        "evaluate",
        both(
            copy(f"{STAIN}/000.png", "data/mask.png"),
            cut("data/mask.png"),
            folder("data/bottle/ground_truth/stain"),
            move("data/mask.png", "data/bottle/ground_truth/stain/000_mask.png"),
        ),
        "",
        "000_mask.png: expected an image, got a file that does not decode ... truncated",
    ),
    (
        "evaluate",
        both(
            folder("data/bottle/ground_truth/stain"),
            copy("huge/huge.png", "data/bottle/ground_truth/stain/000_mask.png"),
        ),
        "",
        "000_mask.png: expected the mask of stain/000.png, (64, 64), got none that opens",
    ),
    ("evaluate", None, "--images nowhere.png", "nowhere.png: expected a picture or a folder"),
    ("evaluate", None, f"--images '{NAME}.png'", f"{NAME}.png: expected a picture or a folder"),
    ("evaluate", link("loop", "loop"), "--images loop", "loop: expected a picture or a folder"),
    ("evaluate", None, "--images ''", ".: expected images (.bmp, ... got none"),
    ("evaluate", None, "--images data", "data: expected images (.bmp, ... got none"),
    ("evaluate", None, f"--images {TEACHER}", f"{TEACHER}: expected an image, got a file that"),
    ("evaluate", put("a.png"), "--images a.png --json", "a.png: expected an image ... --skip-bad"),
    ("evaluate", None, "--images /proc/self/mem", "/proc/self/mem: expected an image, got"),
    ("anatomy", put(f"{STAIN}/001.png"), RUN, f"{STAIN}/001.png: expected an image, got"),
    ("figure", put(f"{GOOD}/001.png"), "", f"{GOOD}/001.png: expected an image, got"),
]

TEACHERS = [
    ("train", None, "--weights ''", "weights: expected a .safetensors file or one of ... got ''"),
    ("train", None, "--weights vit_base_patch16_244", "did you mean vit_base_patch16_224"),
    ("train", None, "--weights no.safetensors", "no.safetensors: expected a weights file, got no"),
    ("train", None, f"--weights '{NAME}.safetensors'", f"{NAME}.safetensors: expected a weights"),
    ("train", folder(TEACHER), "", f"{TEACHER}: expected a weights file, got no such file"),
    ("train", link(TEACHER, TEACHER), "", f"{TEACHER}: expected a weights file, got no such"),
    ("train", link(TEACHER, "/proc/self/mem"), "", f"{TEACHER}: expected a safetensors file, got"),
    ("train", put(TEACHER), "", f"{TEACHER}: expected a safetensors file, got"),
    ("train", put(TEACHER, b"\xff" * 64), "", f"{TEACHER}: expected a safetensors file, got"),
    ("train", cut(TEACHER), "", f"{TEACHER}: expected a safetensors file, got a truncated one"),
    (
        "train",
        lambda world: save_file(TORCHVISION, world / TEACHER),
        "",
        f"{TEACHER}: expected vitad's key names, got another layout (class_token",
    ),
    ("train", checkpoint(TEACHER), "", f"{TEACHER}: expected mean, std and activation in the meta"),
    ("train", tensors(TEACHER, about="{"), "", f"{TEACHER}: expected metadata as a JSON object, "),
    ("train", tensors(TEACHER, about="[]"), "", f"{TEACHER}: expected metadata as a JSON object, "),
    ("train", tensors(TEACHER, about="{}"), "", f"{TEACHER}: expected mean, std and activation"),
    ("train", tensors(TEACHER, {"mean": "grey"}), "", f"{TEACHER}: expected mean ... got 'grey'"),
    ("train", tensors(TEACHER, {"mean": [0.5]}), "", f"{TEACHER}: expected mean ... got [0.5]"),
    ("train", tensors(TEACHER, {"std": [1, 1, 0]}), "", f"{TEACHER}: expected std ... [1, 1, 0]"),
    ("train", tensors(TEACHER, {"heads": 0}), "", f"{TEACHER}: expected heads ... got 0"),
    ("train", tensors(TEACHER, {"heads": "two"}), "", f"{TEACHER}: expected heads ... got 'two'"),
    ("train", tensors(TEACHER, {"heads": 5}), "", f"{TEACHER}: expected a width that 5 heads"),
    ("train", tensors(TEACHER, {"eps": "x"}), "", f"{TEACHER}: expected eps ... got 'x'"),
    ("train", tensors(TEACHER, {"activation": ["gelu"]}), "", f"{TEACHER}: expected mean, std and"),
    ("train", tensors(TEACHER, pos_embed=torch.zeros(1, 0, 8)), "", f"{TEACHER}: expected pos_em"),
    ("train", tensors(TEACHER, pos_embed=torch.zeros(5)), "", f"{TEACHER}: expected pos_embed wi"),
    ("train", tensors(TEACHER, head__weight=NAN), "", f"{TEACHER}: expected head.weight with 2"),
    ("train", tensors(TEACHER, norm__bias=None), "", f"{TEACHER}: expected a tensor norm.bias"),
    (
        "train",
        tensors(TEACHER, norm__bias=torch.full((8,), float("nan"))),
        "",
        f"{TEACHER}: expected finite weights, got nan in norm.bias: convert or download it again",
    ),
    (
        "train",
        tensors(TEACHER, blocks__3__norm1__weight=-ANCHOR),
        "",
        f"{TEACHER}: expected finite weights, got -inf in blocks.3.norm1.weight: convert or",
    ),
    (
        "train",
        tensors(TEACHER, cls_token=INTS),
        "",
        f"{TEACHER}: expected cls_token as floating-point numbers, got torch.int32",
    ),
    ("evaluate", gone(TEACHER), "", f"{TEACHER}: expected a weights file, got no such file"),
    (
        "evaluate",
        tensors(TEACHER, cls_token=INTS + 0.5),
        "",
        f"{TEACHER}: expected the teacher that {RUN} was trained with, sha256 ... --weights",
    ),
    ("evaluate", None, "--weights ''", "weights: expected a .safetensors file or one of ... ''"),
    ("anatomy", gone(TEACHER), RUN, f"{TEACHER}: expected a weights file, got no such file"),
    ("figure", cut(TEACHER), "", f"{TEACHER}: expected a safetensors file, got a truncated one"),
    ("figure", None, "--figure 3c", "resnet18.safetensors: expected weights of torchvision's"),
    ("figure", None, f"--figure 3c --resnet18 {TEACHER}", "torchvision's resnet18: expected ... c"),
    ("figure", None, "--figure 3b --vgg16 ''", "expected weights of torchvision's vgg16"),
    ("convert", None, "''", ".: expected a checkpoint file, got no such file"),
    (
        "convert",
        checkpoint("a.pth"),
        "a.pth --mean 123.7 116.3 103.5 --std .5 .5 .5",
        "a.pth: --mean: expected numbers on a scale from 0 to 1, got [123.7, 116.3, 103.5]: of",
    ),
    ("convert", None, f"'{NAME}.pth'", f"{NAME}.pth: expected a checkpoint file, got no such file"),
    ("convert", put("a.pth"), "a.pth", "a.pth: expected a checkpoint of plain tensors"),
    ("convert", put("a.npz", "PK"), "a.npz", "a.npz: expected a checkpoint of plain tensors"),
    (
        "convert",
        both(checkpoint("a.safetensors"), cut("a.safetensors")),
        "a.safetensors",
        "a.safetensors: expected a checkpoint of plain tensors, got a file that cannot be read",
    ),
    (
        "convert",
        link("a.safetensors", "/proc/self/mem"),
        "a.safetensors",
        "a.safetensors: expected a checkpoint of plain tensors, got",
    ),
    ("convert", saved("a.pth", {}), "a.pth", "a.pth: expected the keys of a ViT ... got none"),
    ("convert", saved("a.pth", {1: NAN}), "a.pth", "a.pth: expected a dictionary of tensors"),
    (
        "convert",
        checkpoint("a.pth"),
        f"a.pth {MEAN_STD} --heads 0",
        "--heads: expected at least 1, got 0",
    ),
    (
        "convert",
        checkpoint("a.pth"),
        f"a.pth {MEAN_STD} --heads 5",
        "a.pth: expected a width that 5 heads divide, got 8",
    ),
    (
        "convert",
        checkpoint("a.pth"),
        f"a.pth --out new/a.safetensors {MEAN_STD} --std .5 .5 0",
        "a.pth: expected std ... [0.5, 0.5, 0.0]",
    ),
    (
        "convert",
        checkpoint("a.pth"),
        f"a.pth --out new/a.safetensors {MEAN_STD} --mean nan 0 0",
        "a.pth: expected mean ... nan",
    ),
    (
        "convert",
        checkpoint("a.pth", norm__bias=ANCHOR),
        f"a.pth --out new/a.safetensors {MEAN_STD}",
        "a.pth: expected finite weights, got inf in norm.bias: convert or download it again",
    ),
    (
        "convert",
        checkpoint("a.pth", cls_token=INTS),
        f"a.pth {MEAN_STD}",
        "a.pth: expected cls_token as floating-point numbers, got torch.int32",
    ),
    (
        "convert",
        checkpoint("a.pth", pos_embed=NAN),
        f"a.pth {MEAN_STD}",
        "a.pth: expected tensors of a ViT's shapes, got others",
    ),
    (
        "convert",
        checkpoint("a.pth", blocks__0__ls1__gamma=ANCHOR, blocks__0__attn__proj__weight=None),
        f"a.pth {MEAN_STD}",
        "a.pth: expected tensors of a ViT's shapes, got others",
    ),
    ("convert", checkpoint("a.pth"), f"a.pth {MEAN_STD} --out ''", ".: expected a file's name"),
    ("convert", checkpoint("a.pth"), f"a.pth {MEAN_STD} --out data", "data: expected a file's nam"),
    (
        "convert",
        checkpoint("a.pth"),
        f"a.pth {MEAN_STD} --out {TEACHER}/a",
        f"{TEACHER}: File exists",
    ),
    ("demo teacher", None, "--out data", "data: expected a file's name, got a folder"),
    ("demo teacher", None, "--out ''", ".: expected a file's name, got a folder"),
    ("demo teacher", None, "--out /proc/a", "/proc/a: "),
]

RUNS = [
    ("train", None, f"--out {TEACHER}", f"{TEACHER}/folder/bottle/seed0: Not a directory"),
    ("train", None, "--out /dev/null/runs", "/dev/null/runs"),
    ("train", None, "--out /proc/runs", "/proc/runs"),  # takes no files, from root neither
    ("train", link("loop", "loop"), "--out loop", "loop/folder/bottle/seed0: Too many levels"),
    ("train", None, f"--out 'new/{NAME}/{LONG}'", f"new/{NAME}/{LONG}: File name too long"),
    ("again", None, "--lr 0.1", f"{RUN}: expected the settings of the run ... lr None -> 0.1"),
    ("again", None, "--resume --epochs 3", "expected the settings ... epochs 2 -> 3"),
    ("again", put(f"{RUN}/config.json"), "", f"{RUN}/config.json: expected a JSON object, got"),
    ("again", gone(f"{RUN}/config.json"), "", f"{RUN}/config.json: No such file or directory"),
    ("again", put(f"{RUN}/.lock/a"), "--overwrite", f"{RUN}/.lock: Is a directory"),
    ("train", None, "--out halted", f"{HALTED}: expected --resume, to continue"),
    ("resume", None, "--seed 0 --batch-size 2", "expected the settings ... batch_size 4 -> 2"),
    (
        "resume",
        lambda world: save_vit(tiny_vit(seed=1, **SMALL), world / TEACHER),
        "",
        f"{HALTED}: expected the teacher that the run was begun with, got another",
    ),
    ("resume", cut(f"{HALTED}/checkpoint.safetensors"), "", "expected a checkpoint of this run"),
    (
        "resume",
        link(f"{HALTED}/checkpoint.safetensors", "/proc/self/mem"),
        "",
        f"{HALTED}/checkpoint.safetensors: expected a checkpoint of this run, got",
    ),
    (
        "resume",
        copy(f"{RUN}/model.safetensors", f"{HALTED}/checkpoint.safetensors"),
        "",
        f"{HALTED}/checkpoint.safetensors: expected a checkpoint of this run, got",
    ),
    (
        "resume",
        tensors(f"{HALTED}/checkpoint.safetensors", random=NAN),
        "",
        f"{HALTED}/checkpoint.safetensors: expected a checkpoint of this run, got",
    ),
    (
        "resume",
        tensors(f"{HALTED}/checkpoint.safetensors", step=torch.tensor(300)),
        "",
        "expected a checkpoint of this run, got ... step 300 of 2",
    ),
    (
        "resume",
        tensors(f"{HALTED}/checkpoint.safetensors", optimizer__x=NAN),
        "",
        f"{HALTED}/checkpoint.safetensors: expected a checkpoint of this run, got",
    ),
    (
        "resume",
        both(
            lambda world: shutil.copytree(world / HALTED, world / HALTED.replace("0", "1")),
            in_json(f"{HALTED.replace('0', '1')}/config.json", "settings", seed=1),
        ),
        "--seed 1",
        "checkpoint.safetensors: expected a checkpoint of this run ... another run's, seed 0 -> 1",
    ),
    ("resume", cut(f"{HALTED}/config.json"), "", f"{HALTED}/config.json: expected a JSON object"),
    (
        "resume",
        in_json(f"{HALTED}/config.json", resumed=7),
        "",
        f"{HALTED}/config.json: expected resumed ... got 7",
    ),
    ("resume", put(f"{HALTED}/log.jsonl", "{}\n"), "", f"{HALTED}/log.jsonl: expected the log of"),
    (
        "resume",
        put(f"{HALTED}/log.jsonl", '{"step": "x"}\n'),
        "",
        f"{HALTED}/log.jsonl: expected the log of a run, got",
    ),
    (
        "resume",
        link(f"{HALTED}/log.jsonl", "/proc/self/mem"),
        "",
        f"{HALTED}/log.jsonl: Input/output error",
    ),
    ("evaluate", None, "nowhere", "nowhere/config.json: expected a complete run, got none"),
    ("evaluate", None, f"'{NAME}'", f"{NAME}/config.json: expected a complete run, got none"),
    ("evaluate", None, TEACHER, f"{TEACHER}/config.json: expected a complete run, got none"),
    ("evaluate", None, "''", "config.json: expected a complete run, got none"),
    ("evaluate", link("loop", "loop"), "loop", "loop/config.json: expected a complete run, got"),
    ("evaluate", link("loop", "loop"), "--out loop", "loop: expected complete runs ... got none"),
    ("evaluate", None, "--out data", "data: expected complete runs ... got none"),
    ("evaluate", None, HALTED, "model.safetensors: expected a complete run, got an unfinished one"),
    ("evaluate", folder(f"{RUN}/model.safetensors"), RUN, "model.safetensors: expected a complete"),
    ("evaluate", cut(f"{RUN}/model.safetensors"), "", "model.safetensors: expected the student"),
    (
        "evaluate",
        link(f"{RUN}/model.safetensors", "/proc/self/mem"),
        "",
        f"{RUN}/model.safetensors: expected the student, anchor and delta of this run, got",
    ),
    (
        "evaluate",
        copy(TEACHER, f"{RUN}/model.safetensors"),
        "",
        f"{RUN}/model.safetensors: expected the student, anchor and delta of this run, got",
    ),
    (
        "evaluate",
        tensors(f"{RUN}/model.safetensors", anchor__running=ANCHOR),
        "",
        f"{RUN}/model.safetensors: expected finite weights, got inf in anchor.running: train the",
    ),
    (
        "evaluate",
        tensors(f"{RUN}/model.safetensors", teacher__cls_token=ANCHOR),
        "",
        "model.safetensors: expected the student ... (expected no tensor of the teacher",
    ),
    (
        "evaluate",
        tensors(f"{RUN}/model.safetensors", delta=NAN),
        f"--images {GOOD}",
        f"{RUN}/model.safetensors: expected finite weights, got nan in delta: train the run again",
    ),
    ("anatomy", tensors(f"{RUN}/model.safetensors", delta=NAN), RUN, "got nan in delta: train the"),
    ("evaluate", put(f"{RUN}/config.json", "[]"), "", "config.json: expected a JSON object, got"),
    ("evaluate", put(f"{RUN}/config.json", "{}"), "", "config.json: expected settings ... got no"),
    (
        "evaluate",
        put(f"{RUN}/config.json", b"\xff\xfe"),
        "",
        f"{RUN}/config.json: expected a JSON object, got a file that does not read as one",
    ),
    (
        "evaluate",
        put(f"{RUN}/config.json", "[" * 100_000),
        "",
        f"{RUN}/config.json: expected a JSON object, got a file that does not read as one",
    ),
    (
        "evaluate",
        link(f"{RUN}/config.json", "/proc/self/mem"),
        "",
        f"{RUN}/config.json: Input/output error",
    ),
    ("evaluate", in_json(f"{RUN}/config.json", teacher=None), "", "expected teacher ... got none"),
    ("evaluate", in_json(f"{RUN}/config.json", settings=[3]), "", "expected settings ... got [3]"),
    ("evaluate", in_json(f"{RUN}/config.json", date=None), "", "expected date ... got none"),
    *(
        (
            "evaluate",
            in_json(f"{RUN}/config.json", "settings", **{name: value}),
            "",
            f"{RUN}/config.json: {name}: expected {words} with this teacher, got",
        )
        for name, value, words in (
            ("layers", [3, 99], "0 to 11"),
            ("top_k", 0, "1 to 49"),
            ("top_k", 50, "1 to 49"),
        )
    ),
    (
        "evaluate",
        in_json(f"{RUN}/config.json", "teacher", sha256=5),
        "",
        f"{RUN}/config.json: expected sha256 ... got 5",
    ),
    *(
        (
            "evaluate",
            in_json(f"{RUN}/config.json", "settings", **{name: value}),
            "",
            f"{RUN}/config.json: expected {name} ... got {value!r}",
        )
        for name, value in (
            ("layers", "3,6,9,11"),
            ("layers", [3, "6"]),
            ("layers", []),
            ("layers", [9, 3]),
            ("top_k", "20"),
            ("dataset", ["mvtec"]),
            ("category", 7),
            ("data_root", 7),
            ("weights", ["a"]),
            ("distance", "far"),
            ("pos_embed", 1),
            ("anchor", "chain"),
            ("lam", "much"),
            ("seed", "0"),
            ("precision", "fp8"),
        )
    ),
    (
        "evaluate",
        in_json(f"{RUN}/config.json", "settings", weights=None),
        f"--images {GOOD}",
        f"{RUN}/config.json: expected weights ... got none",
    ),
    (
        "evaluate",
        in_json(f"{RUN}/config.json", "settings", dataset="mvtec", category="botle"),
        "",
        "category: expected one of mvtec, got 'botle'",
    ),
    ("evaluate", in_json(f"{RUN}/config.json", "teacher", name=[1]), "", "name as str | None, got"),
    ("evaluate", in_json(f"{RUN}/config.json", "settings", top_k=True), "", "top_k as int, got T"),
    (
        "evaluate",
        in_json(f"{RUN}/config.json", "settings", layers=[False, True]),
        "",
        "expected layers as ascending numbers from 0, got [False, True]",
    ),
    (
        "anatomy",
        in_json(f"{RUN}/config.json", "settings", holdout="x"),
        RUN,
        "holdout as int | flo",
    ),
    (
        "evaluate",
        in_json(f"{RUN}/config.json", "settings", dataset="mvtek"),
        "",
        "dataset: expected one of cifar10 ... mvtec ... got 'mvtek'",
    ),
    (
        "anatomy",
        in_json(f"{RUN}/config.json", "settings", dataset="mvtek"),
        RUN,
        "dataset: expected one of cifar10 ... mvtec ... got 'mvtek'",
    ),
    ("anatomy", None, "nowhere", "nowhere/config.json: expected a complete run, got none"),
    ("anatomy", None, HALTED, "model.safetensors: expected a complete run, got an unfinished one"),
    (
        "anatomy",
        copy(f"{GOOD}/000.png", f"{GOOD}/new.png"),
        RUN,
        "data/bottle: expected the 6 training images of the run, got 7: restore them",
    ),
    ("evaluate", put(f"{RUN}/log.jsonl", "[]\n"), "", f"{RUN}/log.jsonl: expected the log of a"),
    ("curves", None, "nowhere", "nowhere/config.json: No such file or directory"),
    ("curves", None, "''", "config.json: No such file or directory"),
    ("curves", gone(f"{RUN}/log.jsonl"), RUN, f"{RUN}/log.jsonl: No such file or directory"),
    ("curves", put(f"{RUN}/log.jsonl"), RUN, f"{RUN}: expected a run with --holdout, got no dista"),
    ("curves", cut(f"{RUN}/config.json"), RUN, f"{RUN}/config.json: expected a JSON object, got"),
    ("curves", in_json(f"{RUN}/config.json", lr="x"), RUN, "config.json: expected lr ... got 'x'"),
    (
        "curves",
        in_json(f"{RUN}/config.json", "settings", precision=None),
        RUN,
        "config.json: expected precision as str, got none",
    ),
    (
        "curves",
        put(f"{RUN}/log.jsonl", '{"step": 1, "held_out_mean": 1.0, "held_out": [1]}\n'),
        RUN,
        f"{RUN}/log.jsonl: expected finite distances of four layers and",
    ),
    (
        "curves",
        put(f"{RUN}/log.jsonl", '{"step": 1, "held_out_mean": "x", "held_out": [1, 1, 1, 1]}\n'),
        RUN,
        f"{RUN}/log.jsonl: expected held_out_mean as float, got 'x'",
    ),
    (
        "curves",
        put(
            f"{RUN}/log.jsonl",
            '{"step": 1, "held_out_mean": NaN, "held_out": [1.0, 1.0, 1.0, 1.0]}\n',
        ),
        RUN,
        f"{RUN}/log.jsonl: expected finite distances of four layers and",
    ),
    (
        "curves",
        put(f"{RUN}/log.jsonl", '{"step": 1, "loss": "x", "held_out_mean": 1.0, "held_out": []}\n'),
        RUN,
        f"{RUN}/log.jsonl: expected loss as float, got 'x'",
    ),
    ("curves", in_json(f"{RUN}/config.json", "settings", layers=[3]), RUN, "got 3"),
    ("curves", in_json(f"{RUN}/config.json", "settings", warmup=None), RUN, "expected warmup as"),
    (
        "curves",
        in_json(f"{RUN}/config.json", "settings", distance="mse"),
        RUN,
        f"{RUN}: expected a run with --distance unit ... got mse",
    ),
    ("curves", put("recipe.csv", "a,b\n1,2\n"), RUN, "recipe.csv: expected the columns teacher"),
    ("curves", cut("recipe.csv", 0.9), RUN, "recipe.csv: expected the columns teacher"),
    ("curves", gone("recipe.csv"), RUN, "recipe.csv: No such file or directory"),
    ("curves", folder("recipe.csv"), RUN, "recipe.csv: Is a directory"),
]

RESULTS = [
    ("evaluate", None, f"--heatmaps {TEACHER}", f"{TEACHER}: File exists"),
    ("evaluate", None, f"--heatmaps {TEACHER}/maps", f"{TEACHER}/maps: Not a directory"),
    ("evaluate", None, "--heatmaps /proc/maps", "/proc/maps: "),
    ("evaluate", link("loop", "loop"), "--heatmaps loop", "loop: "),
    ("evaluate", folder(f"{RUN}/scores.csv"), "", f"{RUN}/scores.csv: expected a file's name"),
    ("evaluate", None, f"--report {TEACHER}", f"{TEACHER}: File exists"),
    ("evaluate", None, "--report /dev/null/report", "/dev/null/report: Not a directory"),
    ("evaluate", cut(f"{RUN}/result.json"), "--report new", "result.json: expected a JSON object"),
    (
        "evaluate",
        put(f"{RUN}/result.json", "[]"),
        "--report new",
        "result.json: expected a JSON ob",
    ),
    (
        "evaluate",
        put("new/folder/a.json", "{}"),
        "--report new",
        "a.json: expected dataset ... got",
    ),
    ("evaluate", put("new/folder/a.json"), "--report new", "a.json: expected a JSON object, got"),
    (
        "evaluate",
        in_json(f"{RUN}/result.json", auroc=float("nan")),
        "--report new",
        "result.json: expected a JSON object ... (NaN is no number)",
    ),
    (
        "evaluate",
        in_json(f"{RUN}/result.json", auroc=None),
        "--report new",
        "result.json: expected auroc",
    ),
    *(
        (
            "evaluate",
            in_json(f"{RUN}/result.json", **{name: value}),
            "--report new",
            f"{RUN}/result.json: expected {name} ... got {value!r}",
        )
        for name, value in (
            ("category", ["bottle"]),
            ("dataset", "mvtek"),
            ("seed", "zero"),
            ("auroc", "all"),
            ("trained", 5),
            ("date", 2026),
            ("teacher_sha256", [1]),
            ("versions", "new"),
        )
    ),
    ("figure", None, f"--results {TEACHER}", f"{TEACHER}: File exists"),
    ("figure", None, "--results /proc/results", "/proc/results: "),
    ("figure", None, "--out /dev/null/runs", "/dev/null/runs"),
    ("figure", table_of("3b", "a,b\n1,2\n"), "--figure 5", "figure_3b.csv: expected the columns"),
    ("figure", table_of("3b", b"\xff\0"), "--figure 5", "figure_3b.csv: expected the columns"),
]

ROWS = [*OPTIONS, *PICTURES, *TEACHERS, *RUNS, *RESULTS]


# ------------------------------------------------------------------------------------- the world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, one of 200 megapixels, a teacher, a scored run, a halted one, and their curves."""
    folder = tmp_path_factory.mktemp("world")
    make_category(folder / "data/bottle", train=6, good=2, bad=2)
    save_vit(tiny_vit(**SMALL), folder / TEACHER)
    picture("huge/huge.png", (20_000, 10_000), "1")(folder)
    own = shlex.split(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(curves, "TABLE", folder / "recipe.csv")
        curves.runs.write_csv(curves.TABLE, curves.COLUMNS, [])
        assert call(train.main, *own, cwd=folder).code == 0
        assert call(evaluate.main, cwd=folder).code == 0
        assert call(curves.main, RUN, cwd=folder).code == 0
        add = train.Progress.add

        def add_and_stop(self, *values):
            add(self, *values)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(train.Progress, "add", add_and_stop)
        assert call(train.main, *own, "--out", "halted", cwd=folder).code == 128 + signal.SIGTERM
    return folder


@pytest.fixture(scope="module")
def shared_copy(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "world"
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("cache"))
    return folder


@pytest.fixture
def copied(request, world, shared_copy, tmp_path_factory, monkeypatch):
    """The world once more, to be changed."""
    row = request.node.callspec.params["row"] if hasattr(request.node, "callspec") else (0, 1)
    folder = shared_copy
    if row[1] or len(row) == 6:
        folder = tmp_path_factory.mktemp("own") / "world"
        shutil.copytree(world, folder, ignore=shutil.ignore_patterns("cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    monkeypatch.setattr(curves, "TABLE", folder / "recipe.csv")
    return folder


def snapshot(world):
    """Everything that lies in a folder: {path: bytes, or what a link points to, or its kind}."""
    found = {}
    for parent, folders, files in os.walk(world):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink():
                found[path] = os.readlink(path)
            else:
                found[path] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return found


def assert_in_order(words, text):
    rest = text
    for part in words.split(" ... "):
        assert part in rest, text
        rest = rest[rest.index(part) + len(part) :]


def assert_as_it_was(before, world, new=()):
    """The world but for files called `new`; no half-written one, nor in the cache of pictures."""
    after = snapshot(world)
    changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
    assert {path.name for path in changed if not path.is_dir()} == set(new)
    assert new or not changed
    cache = world.parent / "cache/vitad"
    assert all(path.suffix == ".npy" and path.name[0] != "." for path in cache.glob("*"))


def name_of(row):
    script, _, arguments, words = row[:4]
    return f"{script} {arguments}: {words}"[:70]


# Pillow leaves /proc/self/mem open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("row", ROWS, ids=map(name_of, ROWS))
def test_bad_input_is_one_sentence_and_changes_nothing(copied, capfd, row):
    script, change, arguments, words = row
    if change:
        change(copied)
    before = snapshot(copied)
    main, first = SCRIPTS[script]
    command = [*shlex.split(first), *shlex.split(arguments)]
    with warnings.catch_warnings(action="error"):
        result = call(main, *command, cwd=copied)
    assert_one_sentence(result)
    assert_in_order(words, result.err)
    assert_as_it_was(before, copied)
    assert capfd.readouterr() == ("", "")  # neither from the libraries below Python


# ------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


BEGUN = ("config.json", "log.jsonl")  # what a run that failed half-way leaves
SCORED = ("result.json",)  # the scores are the same
CONVERT = f"a.pth {MEAN_STD} --out new/a.safetensors"
FULL = [  # the same columns, then the size of the largest file, and the files that are new
    ("train", None, "", "new/folder/bottle/seed0/config.json: File too large", 300, ()),
    ("train", None, "--checkpoint-every 0", "checkpoint.safetensors: ", 90_000, BEGUN),
    ("train", None, "", "seed0/model.safetensors: ", 90_000, BEGUN),
    ("train", None, "--epochs 60", "bottle/seed0/log.jsonl: File too large", 6000, BEGUN),
    ("train", None, "--cache disk", "seed0, --cache disk: File too large", 9_000, ()),
    ("again", None, "--overwrite", f"{RUN}/config.json: File too large", 300, ()),
    ("again", None, "--overwrite --cache disk", "--cache disk: File too large", 9_000, ()),
    ("resume", None, "", f"{HALTED}/config.json: File too large", 300, ()),
    ("evaluate", None, "", f"{RUN}/scores.csv: File too large", 100, ()),
    ("evaluate", None, "--report new", "bottle_seed0.json: File too large", 300, ()),
    ("evaluate", None, "--plot", "/histogram.svg: File too large", 3000, SCORED),
    ("evaluate", None, "--heatmaps new", "/00000_000.png: File too large", 3000, SCORED),
    ("evaluate", None, f"--images {GOOD} --heatmaps new", "000.png: File too large", 3000, ()),
    ("curves", None, f"{RUN} --category bottle --teacher ''", "recipe.csv: File too large", 50, ()),
    ("convert", checkpoint("a.pth"), CONVERT, "new/a.safetensors: expected room", 50_000, ()),
    ("demo teacher", None, "", "new.safetensors: expected room for the tensors", 50_000, ()),
]


@pytest.mark.parametrize("row", FULL, ids=map(name_of, FULL))
def test_a_full_disk_is_one_sentence_and_loses_nothing(copied, row):
    script, change, arguments, words, size, new = row
    if change:
        change(copied)
    before = snapshot(copied)
    main, first = SCRIPTS[script]
    with largest_file(size):
        result = call(main, *shlex.split(first), *shlex.split(arguments), cwd=copied)
    assert_one_sentence(result)
    assert_in_order(words, result.err)
    assert_as_it_was(before, copied, new)
    assert "done;" not in result.out


def test_a_file_that_may_not_be_read_is_not_called_broken(copied, monkeypatch):
    """Else the advice would be to lose it. Root may read all, so the refusal is made here."""

    def refuse(path, *options, **more):
        if path.name in ("checkpoint.safetensors", "model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return path_open(path, *options, **more)

    path_open = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    for script in ("resume", "evaluate"):
        main, first = SCRIPTS[script]
        result = call(main, *shlex.split(first), cwd=copied)
        assert_one_sentence(result, ".safetensors: Permission denied")


def test_on_a_read_only_disk_the_file_is_named_and_not_its_temporary_one(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError) as caught:
        runs.write_text(tmp_path / "a.txt", "")
    assert caught.value.filename == str(tmp_path / "a.txt")


# ---------------------------------------------------------------------- what is odd and no mistake


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = make_category(tmp_path / os.fsdecode(b"te\xe4l"))
    result = call(train.main, "--dataset", "folder", "--data-root", folder)
    assert_one_sentence(result, "te\udce4l: expected a name in UTF-8, got another: rename it")


def test_a_name_of_two_lines_is_one_sentence():
    result = call(train.main, "--dataset", "folder", "--data-root", "a\nb")
    assert_one_sentence(result, "a b: expected train/good")


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", out)
    assert runs.script(lambda argv: print("\u03a9.png"))([]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"\\u03a9.png\n"


def test_an_error_clears_the_line_of_progress(monkeypatch):
    errors = io.StringIO()
    errors.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", errors)
    runs.complain(runs.UserError("expected a disk with room"))
    assert errors.getvalue().startswith("\033[K")


def test_a_user_without_a_home(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it then answers
    assert runs.cache_folder() == Path(tempfile.gettempdir()) / "vitad"


def test_pictures_of_every_kind_train_and_score_without_a_word(copied):
    """Of one channel, with a palette, 16 bits, four inks, transparent; and of 100 megapixels."""
    kinds = {"L": "png", "P": "png", "1": "bmp", "I;16": "tif", "CMYK": "jpg", "LA": "webp"}
    for i, (mode, suffix) in enumerate(kinds.items()):
        for part in ("train/good", "test/good", f"test/{NAME.replace('/', ' ')}"):
            picture(f"odd/{part}/{i} {mode}.{suffix}", (90 + i, 60), mode)(copied)
    picture("large.png", (10_000, 10_000), "1")(copied)
    train_it, evaluate_it = f"{SCRIPTS['train'][1]} --data-root odd", "--out new --heatmaps maps"
    with warnings.catch_warnings(action="error"):
        result = call(train.main, *shlex.split(train_it), cwd=copied)
        assert result.code == 0, result.err
        assert all(line.startswith("note: ") for line in result.err.splitlines())
        for options in (evaluate_it, "new/folder/odd/seed0 --images large.png odd/train/good"):
            result = call(evaluate.main, *shlex.split(options), cwd=copied)
            assert (result.code, result.err) == (0, ""), result.err
