"""Images in, files out: reading the data sets, writing safely, saying what is wrong in one sentence, and on which device to run.

Nothing here imports torch at import time, so that the scripts answer `--help` and wrong arguments at once.

MVTec AD layout, below `<root>/<category>/`:

    train/good/*.png              normal images, the only ones training reads
    test/good/*.png               normal test images, label 0
    test/<kind of defect>/*.png   anomalous test images, label 1
    ground_truth/<kind>/*_mask.png   masks (not needed for image AUROC)

An image is decoded once, as RGB, and resized directly to S x S (bicubic, antialiased; the paper's "all images are enlarged or
reduced to 224 x 224"); a split is one uint8 tensor. Normalisation happens on the device (`ViT.normalize`).
"""
import contextlib
import datetime
import difflib
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# The categories of each protocol in the order of the paper's table, with the paper's image AUROC (row "ours" of Table 4).
PAPER_AUROC = {
    "mvtec": {"bottle": 100.0, "hazelnut": 96.4, "capsule": 77.7, "metal_nut": 95.1, "leather": 97.9, "pill": 88.1, "wood": 96.0,
              "carpet": 81.3, "tile": 99.1, "grid": 71.7, "cable": 92.5, "transistor": 88.4, "toothbrush": 95.8, "screw": 95.0,
              "zipper": 81.0},
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Split:
    """One split of one category: images uint8 (N, 3, S, S), labels (N,) with 1 = anomalous, names relative to the category."""

    images: "torch.Tensor"
    labels: list
    names: list


def check_category(dataset, category):
    """ValueError, with the nearest names, if the protocol has no such category."""
    known = list(PAPER_AUROC[dataset])
    if category not in known:
        near = difflib.get_close_matches(category, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(known)}"
        raise ValueError(f"--category: expected a category of {dataset}, got {category!r}: {hint}")


def train_split(root, category, size=224):
    """The normal training images, sorted by name: `<root>/<category>/train/good`."""
    folder = category_folder(root, category)
    return load(folder, images_in(folder / "train" / "good"), size)


def test_split(root, category, size=224):
    """The test images, sorted by kind and name: `<root>/<category>/test/<kind>`; kind "good" is normal, every other anomalous."""
    folder = category_folder(root, category)
    if not (folder / "test").is_dir():
        raise ValueError(f"{folder / 'test'}: expected a folder of test images (test/good, test/<kind of defect>), got none")
    kinds = sorted(path for path in (folder / "test").iterdir() if path.is_dir())
    return load(folder, [path for kind in kinds for path in images_in(kind)], size)


def category_folder(root, category):
    folder = Path(root) / category
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected the folder of category {category} with train/good and test in it, got no such folder: "
                         f"--data-root is the folder that holds the categories")
    return folder


def images_in(folder):
    """The image files of a folder, sorted by name, so that their order does not depend on the file system."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none")
    return paths


def load(folder, paths, size):
    """Decode `paths`, several threads at a time (Pillow releases the interpreter lock), into one Split."""
    import torch

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def decode(i):
        images[i] = torch.from_numpy(read_image(paths[i], size)).permute(2, 0, 1)  # (S, S, 3) -> (3, S, S)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(paths))))
    return Split(images, [int(path.parent.name != "good") for path in paths], [path.relative_to(folder).as_posix() for path in paths])


def read_image(path, size):
    """One image file as RGB, uint8 (size, size, 3)."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say that a file is broken
        raise ValueError(f"{path}: expected an image, got a file that does not decode ({error}): replace or remove it") from None
    return np.array(image)


def read_config(run):
    """The config.json of a run folder: settings, teacher, and what the run was made with."""
    path = Path(run) / "config.json"
    try:
        config = json.loads(path.read_text())
        config["settings"], config["teacher"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: expected the settings that train.py wrote, got a file that does not hold them: train the run again") from None
    return config


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
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def one_sentence():
    """What a user can mend (a ValueError or OSError from reading input) ends as one sentence and exit code 2, without traceback."""
    try:
        yield
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except ValueError as error:
        fail(error)


def fail(message):
    """One sentence on stderr, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """--device as torch names it; None: cuda where there is one, else cpu."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch: an unknown name, or a device that this machine or build lacks
        raise ValueError(f"--device: expected a device that torch can use here, got {name!r} ({str(error).splitlines()[0]})") from None
    return name


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
    cuda = str(device).startswith("cuda")
    return {"versions": {"python": platform.python_version(), **versions},
            "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
            "command": shlex.join(["python", *sys.argv]), "commit": commit,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
