"""What the tests share: the real data where it is at hand, tiny networks and images where it is not, and the scripts as a user runs them."""
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real weights, photos and data: beside the checkout, not part of it
sys.path[:0] = [str(ROOT), str(ROOT / "weights")]

import weights.files  # noqa: E402, F401  (before torch: how long its threads spin)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from vit import IMAGENET_MEAN, IMAGENET_STD, ViT  # noqa: E402

TINY = dict(width=32, depth=12, heads=2, patch=32, grid=7, hidden=64)  # 49 patches, so that k = 20 has something to choose from


def shared(name):
    """A file or folder of ../shared, or a skip that says which one is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real data: {path} is not there")
    return path


def perturb(module, seed=0, scale=0.05):
    """Random values for every parameter, also for those that start at 0 or 1, so that no mistake can hide behind them."""
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
    """Write a ViT as weights/convert.py would; `changes` to the metadata, None to leave a key out."""
    metadata = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, activation=vit.config["activation"], eps=vit.config["eps"],
                    heads=vit.config["heads"], source="test", license="test", original_sha256="0")
    metadata = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    save_file(vit.state_dict(), path, metadata={"vitad": json.dumps(metadata, sort_keys=True)})
    return path


def run(*command, cwd=ROOT, env=None, fork=True):
    """A script in a process of its own; -> the finished process, its output as text.

    By default forked, see forked.py; with an `env`, or fork=False, a new Python, as a user starts it.
    """
    command = [str(part) for part in command]
    if fork and env is None:
        return forked(command, cwd)
    return subprocess.run([sys.executable, *command], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=300)


@functools.cache
def server():
    """The process that `forked` forks from; it ends with the tests, when its stdin does."""
    command = [sys.executable, "-W", "ignore:This process:DeprecationWarning", ROOT / "tests/forked.py"]  # ... is multi-threaded: idle threads of NumPy's
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def forked(command, cwd):
    """The same as `run`, by way of the server."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        print(json.dumps([command, str(cwd), dict(os.environ), *map(str, files)]), file=server().stdin, flush=True)
        code = int(server().stdout.readline())
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))


def assert_one_sentence(process, *words):
    """Bad input: exit code 2, one line on stderr that holds the words, no traceback."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "error: " in process.stderr and "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr, process.stderr


def make_category(folder, train=6, good=4, bad=5, size=64, seed=0):
    """A small category in the MVTec layout: smooth grey images, and the same with a bright square as the defect."""
    random = np.random.default_rng(seed)

    def image(defect):
        pixels = np.clip(120 + 20 * random.standard_normal((8, 8, 3)), 0, 255).astype(np.uint8)
        pixels = np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)).copy()
        if defect:
            y, x = random.integers(0, size // 2, 2)
            pixels[y:y + size // 3, x:x + size // 3] = (250, 240, 30)
        return Image.fromarray(pixels)

    for kind, count, defect in (("train/good", train, False), ("test/good", good, False), ("test/stain", bad, True)):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            image(defect).save(folder / kind / f"{i:03d}.png")
    return folder
