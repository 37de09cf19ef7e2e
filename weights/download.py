#!/usr/bin/env python3
"""Download a public ViT checkpoint by name and convert it.

    python weights/download.py vit_base_patch16_224

This is Google's ViT-B/16, 346 MB, the default teacher. weights/README.md has the other names.

The original goes to weights/original/ and may be deleted afterwards. The converted file, the one
that train.py reads, is weights/NAME.safetensors. Without network, save the original by any other
means under the path that the error names: the same command then checks and converts it.
"""

import difflib
import socket
import ssl
import sys
from dataclasses import dataclass, replace
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

from runs import WEIGHTS, Parser, UserError, one_at_a_time, script, weights_path
from vit import sha256
from weights import convert

TIMEOUT = 30  # seconds without a byte
# What a network does. A full disk is none of these.
NETWORK_ERRORS = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Published:
    """A checkpoint as its publisher offers it. The sizes are those of the converted ViT."""

    url: str
    sha256: str | None  # whole, or its beginning; None where none is known
    parameters: int
    width: int = 768
    depth: int = 12
    patch: int = 16

    def expected(self):
        """What the url should give, in words."""
        if self.sha256 is None:
            return f"a checkpoint with {sizes_in_words(self)} (no sha256 is published)"
        if len(self.sha256) < 64:
            return f"a file whose sha256 begins with {self.sha256}"
        return f"a file with sha256 {self.sha256}"


HUGGING_FACE = "https://huggingface.co/timm"
META = "https://dl.fbaipublicfiles.com"
# Hugging Face's urls name one revision. Those of DeiT and torchvision name the sha256's beginning.
# Meta published none for DINOv2: these are what many of its users recorded.
PUBLISHED = {
    "vit_base_patch16_224": Published(
        f"{HUGGING_FACE}/vit_base_patch16_224.orig_in21k_ft_in1k"
        "/resolve/e0bd370de6799e8d1f47a911174ff4c3708e2323/model.safetensors",
        "669b949ea91fd19217f200cee259780bde32210c1eb9a5af3859f0dd8346b2ec",
        parameters=86_567_656,
    ),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": Published(
        f"{HUGGING_FACE}/vit_base_patch16_224.augreg2_in21k_ft_in1k"
        "/resolve/063c6c38a5d8510b2e57df480445e94b231dad2c/model.safetensors",
        "32aa17d6e17b43500f531d5f6dc9bc93e56ed8841b8a75682e1bb295d722405b",
        parameters=86_567_656,
    ),
    "vit_b_16": Published(
        "https://download.pytorch.org/models/vit_b_16-c867db91.pth",
        "c867db91",
        parameters=86_567_656,
    ),
    "deit_tiny_patch16_224": Published(
        f"{META}/deit/deit_tiny_patch16_224-a1311bcf.pth",
        "a1311bcf",
        parameters=5_717_416,
        width=192,
    ),
    "deit_small_patch16_224": Published(
        f"{META}/deit/deit_small_patch16_224-cd65a155.pth",
        "cd65a155",
        parameters=22_050_664,
        width=384,
    ),
    "deit_base_patch16_224": Published(
        f"{META}/deit/deit_base_patch16_224-b5f2ef4d.pth", "b5f2ef4d", parameters=86_567_656
    ),
    "dino_vitb16": Published(
        f"{META}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
        None,
        parameters=85_798_656,
    ),
    "dinov2_vits14": Published(
        f"{META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        parameters=21_619_584,
        width=384,
        patch=14,
    ),
    "dinov2_vitb14": Published(
        f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        parameters=85_706_496,
        patch=14,
    ),
}


def ensure_weights(weights, folder=WEIGHTS):
    """--weights -> the file for vit.load_vit.

    A file is taken as it is. A name stands for `folder/<name>.safetensors`, which is downloaded and
    converted if it is not there.
    """
    name = str(weights)
    folder = Path(folder)
    path = weights_path(name, folder)
    if path.is_file() or name.endswith(".safetensors"):  # load_teacher says if that is absent
        return path
    if name not in PUBLISHED:
        raise UserError(f"weights: {unknown(name, folder)}")
    with one_at_a_time("weights"):
        if not path.is_file():  # else another process has done it meanwhile
            fetch(name, folder, path)
    return path


def fetch(name, folder, path):
    """Download a published checkpoint, unless it lies there, and convert it to `path`."""
    published = PUBLISHED[name]
    original = folder / "original" / f"{name}{Path(published.url).suffix}"
    was_there = original.is_file()
    if was_there:
        check_sha256(original, published)
    else:
        download(original, published)
    try:
        lines = convert.convert(original, path, check=partial(check_sizes, original, published))
    except UserError as error:
        if was_there:
            raise
        original.unlink()
        raise failure(original, published, error) from None
    print("\n".join(lines), flush=True)


def unknown(name, folder):
    """The sentence for a name that is neither there nor published."""
    known = sorted({*PUBLISHED, *(path.stem for path in folder.glob("*.safetensors"))})
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = "weights/README.md says where to get others"
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    return f"expected a .safetensors file or one of {', '.join(known)}, got {name!r}: {hint}"


def download(path, published):
    """Download an original. `path` then holds all of it, or is not there."""
    print(f"{path}: from {published.url}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f"{path.name}.*.partial"):  # by a download that was killed
        left.unlink()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none
    try:
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
    except (*NETWORK_ERRORS, RuntimeError) as error:  # RuntimeError: another sha256
        raise failure(path, published, error) from None
    finally:
        socket.setdefaulttimeout(timeout)


def failure(path, published, reason):
    """The error of a download that did not give the checkpoint."""
    return UserError(
        f"{published.url}: expected {published.expected()}, got none ({reason}): try again, "
        f"or save that file as {path} by other means and give the same command"
    )


def check_sha256(path, published):
    """Is this original, which somebody put there, the published one?"""
    digest = sha256(path)
    if not digest.startswith(published.sha256 or ""):
        raise UserError(
            f"{path}: expected {published.expected()}, as {published.url} has it, "
            f"got sha256 {digest}: remove it and try again"
        )


def check_sizes(path, published, vit):
    """Has the ViT, converted from the original `path`, the sizes of the published network?

    Where no sha256 is known, this is the only check.
    """
    sizes = {name: vit.config[name] for name in ("width", "depth", "patch")}
    got = replace(published, parameters=sum(p.numel() for p in vit.parameters()), **sizes)
    if got != published:
        raise UserError(
            f"{path}: expected {sizes_in_words(published)}, got {sizes_in_words(got)}: "
            f"remove it and try again"
        )


def sizes_in_words(published):
    return (
        f"width {published.width}, depth {published.depth}, patch {published.patch} and "
        f"{published.parameters:,} parameters"
    )


@script
def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("name", help=f"one of {', '.join(PUBLISHED)}")
    name = parser.parse_args(argv).name
    path = ensure_weights(name)
    if path == Path(name):
        got = "a file" if path.is_file() else "no such file"
        raise UserError(
            f"NAME: expected one of {', '.join(PUBLISHED)}, got {got}, {path}: "
            f"a file is for train.py's --weights"
        )
    print(f"{path}: ready for --weights")


if __name__ == "__main__":
    sys.exit(main())
