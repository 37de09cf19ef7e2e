"""What the tests share: real data where it is at hand, tiny networks and images where it is not.

Scripts run in this process: `call(train.main, "--epochs", 1)`. `run_script` starts a new Python.
"""

import os

# Tiny networks are no faster with two threads. On the other core `BACKGROUND` runs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
from vit import IMAGENET_MEAN, IMAGENET_STD, ViT

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real weights, photos and data: beside the checkout
# 49 patches, so that k = 20 has something to choose from.
TINY = {"width": 32, "depth": 12, "heads": 2, "patch": 32, "grid": 7, "hidden": 64}


def shared(name):
    """A file or folder of ../shared, or a skip that says which one is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data: {path} is not there")
    return path


def perturb(module, seed=0, scale=0.05):
    """Random values for every parameter, so that none is 0 or 1 and hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def tiny_vit(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return perturb(ViT(**{**TINY, **changes}), seed, scale=0.1).eval()


def save_vit(vit, path, **changes):
    """Write a ViT as weights/convert.py would. None in `changes` leaves a key of metadata out."""
    metadata = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "activation": vit.config["activation"],
        "eps": vit.config["eps"],
        "heads": vit.config["heads"],
        "source": "test",
        "license": "test",
        "original_sha256": "0",
        **changes,
    }
    metadata = {key: value for key, value in metadata.items() if value is not None}
    save_file(vit.state_dict(), path, metadata={"vitad": json.dumps(metadata, sort_keys=True)})
    return path


# ----------------------------------------------------------------------------------------- scripts


@dataclass
class Result:
    """What a script left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def call(main, *arguments, cwd=None):
    """`main([...])` of a script, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or os.getcwd()),
    ):
        code = main([str(part) for part in arguments])
    return Result(code, out.getvalue(), err.getvalue())


def run_script(*command, cwd=ROOT, env=None):
    """A script as a user runs it, in a new Python."""
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Result(process.returncode, process.stdout, process.stderr)


def assert_one_sentence(result, *words):
    """Bad input: exit code 2, one line on stderr that holds the words (and notes), no traceback."""
    assert result.code == 2, result.out + result.err
    lines = [line for line in result.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, result.err
    assert "error: " in result.err and "Traceback" not in result.err
    for word in words:
        assert word in result.err, result.err


IMPORTS = f"""
import os
import sys
import torch
import torchvision

def state():
    return (
        dict(os.environ),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
    )

sys.path.insert(0, {str(ROOT)!r})
before = state()
import ablations.run, data, evaluate, results.anatomy, results.nearest, runs, train, vitad
import weights.train_demo_teacher
assert state() == before
"""
COMPILE = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import test_vitad
test_vitad.compare_compiled_with_eager()
"""
# In one process, which can be ended as one.
DEMO = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import evaluate, train
sys.exit(train.main([]) or evaluate.main([]))
"""
# Fixture: the arguments of Python.
BACKGROUND = {
    "wrong_category": [ROOT / "ablations/run.py", "--figure", "3c", "--categories", "bottel"],
    "wrong_teacher": [ROOT / "weights/download.py", "vit_bose_patch16_224"],
    "compiled": ["-c", COMPILE],
    "imports": ["-c", IMPORTS],
    "demo": ["-c", DEMO],
}


@pytest.fixture(scope="session", autouse=True)
def background(request, tmp_path_factory):
    """Processes begun before the first test, each if a test needs it: {fixture: (process, folder)}.

    Most are done by the time they are waited for.
    """
    needed = {name for item in request.session.items for name in item.fixturenames}
    begun = {}
    try:
        for name in BACKGROUND.keys() & needed:
            folder = tmp_path_factory.mktemp(name)
            with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
                command = ["nice", sys.executable, *map(str, BACKGROUND[name])]
                process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
            begun[name] = process, folder
        yield begun
    finally:
        for process, _ in begun.values():
            process.kill()
            process.wait()


def ended(process, folder):
    """What a process of `background` leaves, once it is done."""
    code = process.wait(timeout=600)
    return Result(code, (folder / "out").read_text(), (folder / "err").read_text())


@pytest.fixture(scope="session")
def demo(background):
    """A folder in which train.py and evaluate.py ran as in the README; `out` has their output."""
    result = ended(*background["demo"])
    assert result.code == 0, result.err
    return background["demo"][1]


@pytest.fixture(scope="session")
def compiled(background):
    """Of test_vitad.compare_compiled_with_eager."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    return ended(*background["compiled"])


@pytest.fixture(scope="session")
def imports(background):
    """Of a process that only imports the project."""
    return ended(*background["imports"])


@pytest.fixture(scope="session")
def wrong_category(background):
    """Of ablations/run.py with a misspelt category, in another folder."""
    return ended(*background["wrong_category"])


@pytest.fixture(scope="session")
def wrong_teacher(background):
    """Of weights/download.py with a misspelt teacher, in another folder."""
    return ended(*background["wrong_teacher"])


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """A cache of decoded images for the tests of one file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# ------------------------------------------------------------------------------------------ images


def make_category(folder, train=6, good=4, bad=5, size=64, seed=0):
    """A small category in the MVTec layout: smooth images, and some with a bright square."""
    random = np.random.default_rng(seed)

    def image(defect):
        pixels = np.clip(120 + 20 * random.standard_normal((8, 8, 3)), 0, 255).astype(np.uint8)
        smooth = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth).copy()
        if defect:
            y, x = random.integers(0, size // 2, 2)
            pixels[y : y + size // 3, x : x + size // 3] = (250, 240, 30)
        return Image.fromarray(pixels)

    kinds = (("train/good", train, False), ("test/good", good, False), ("test/stain", bad, True))
    for kind, count, defect in kinds:
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            image(defect).save(folder / kind / f"{i:03d}.png")
    return folder


@pytest.fixture
def small_counts(monkeypatch):
    """The small data sets with 3 training and 2 test images a class."""
    small = {name: data.OfficialFiles(3, 2, files.reader) for name, files in data.SMALL.items()}
    monkeypatch.setattr(data, "SMALL", small)


def make_classes(root, dataset, classes):
    """<root>/<dataset>/{train,test}/<class>/*.png, 3 and 2 images a class.

    All pixels of an image are 2 x its class + its number.
    """
    for part, count in (("train", 3), ("test", 2)):
        for c, name in enumerate(classes):
            folder = root / dataset / part / data.slug(name)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 32), (2 * c + i,) * 3).save(folder / f"{i:05d}.png")
