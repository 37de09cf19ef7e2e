#!/usr/bin/env python3
"""Download a public ViT-B/16 checkpoint by name and convert it.

    python weights/download.py vit_base_patch16_224                             # Google's, the default teacher
    python weights/download.py vit_base_patch16_224.augreg2_in21k_ft_in1k       # Google's AugReg, as timm fine-tuned it

The original (346 MB) goes to weights/original/NAME.safetensors and may be deleted afterwards; the converted file, the one that train.py
reads, is weights/NAME.safetensors. A download that is interrupted goes on where it stopped when the command is run again. Without
network, put the original into weights/original under that name by any other means: it is checked and converted all the same.
"""
import argparse
import difflib
import hashlib
import os
import ssl
import sys
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from weights.files import fail, one_sentence  # noqa: E402
# convert.py, and torch with it, is imported where a file is converted: a file that is there already is found at once.

# name -> (url, bytes, sha256). A url names one revision, so that what lies there cannot change.
CHECKPOINTS = {
    "vit_base_patch16_224": (
        "https://huggingface.co/timm/vit_base_patch16_224.orig_in21k_ft_in1k"
        "/resolve/e0bd370de6799e8d1f47a911174ff4c3708e2323/model.safetensors",
        346284714, "669b949ea91fd19217f200cee259780bde32210c1eb9a5af3859f0dd8346b2ec"),
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": (
        "https://huggingface.co/timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
        "/resolve/063c6c38a5d8510b2e57df480445e94b231dad2c/model.safetensors",
        346284714, "32aa17d6e17b43500f531d5f6dc9bc93e56ed8841b8a75682e1bb295d722405b"),
}
ATTEMPTS = 5  # requests for one file whose connection breaks
PAUSE = 1  # second between them
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18  # bytes
BROKEN = (URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)  # what a network does; a full disk is none of these


def length(path):
    return path.stat().st_size if path.exists() else 0


def file_sha256(path):
    """As vit.sha256, without importing torch."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress(done, size, speed=None):
    """On stderr: in a terminal one line that is written over, else one line where a request begins (no speed yet) and one at the end."""
    line = f"{done / size:4.0%} {done / 1e6:.1f} of {size / 1e6:.1f} MB" + (f" {speed / 1e6:.1f} MB/s" if speed is not None else "")
    if sys.stderr.isatty():
        print(f"\033[K{line}", end="\n" if done == size else "\r", file=sys.stderr, flush=True)
    elif speed is None or done == size:
        print(line, file=sys.stderr, flush=True)


def receive(url, part, size, report):
    """One request for what `part` still lacks. ValueError if the file there has another size; one of BROKEN if the connection breaks."""
    start = length(part)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urlopen(request, timeout=TIMEOUT) as response:
        done = start if response.status == 206 else 0  # a server that ignores ranges answers 200 and sends the whole file
        announced = response.headers.get("Content-Length")
        if announced and done + int(announced) != size:
            raise ValueError(f"a file of {done + int(announced):,} bytes")
        began, first = time.perf_counter(), done
        report(done, size)
        with open(part, "ab" if done else "wb") as file:
            while done <= size and (chunk := response.read(CHUNK)):
                file.write(chunk)
                done += len(chunk)
                report(done, size, (done - first) / (time.perf_counter() - began))
    if done < size:
        raise ConnectionError("the connection was cut")


def fetch(url, path, size, sha256, report=progress):
    """Download `url` to `path`; nothing is left at `path` that has not this size and sha256, and a file that has is not requested again.

    What has come lies in `<path>.part`, from which a broken download goes on, in this call or the next. `report(bytes, size, speed)` is
    called as it grows. ValueError, one sentence that says how to do the same by hand, if the file cannot be had.
    """
    def failure(got):
        return ValueError(f"{url}: expected {size:,} bytes with sha256 {sha256}, got {got}: try again, or save that file as {path} by hand")

    if path.exists():
        if file_sha256(path) != sha256:
            raise ValueError(f"{path}: expected the file of {url} with sha256 {sha256}, got another: remove it and try again")
        return
    part = path.with_name(f"{path.name}.part")
    if length(part) > size:
        part.unlink()
    attempts = 0
    while (before := length(part)) < size:
        try:
            receive(url, part, size, report)
        except HTTPError as error:
            error.close()
            if error.code != 416 or not before:
                raise failure(f"HTTP {error.code} {error.reason}") from None
            part.unlink()  # the server has nothing beyond the part: it is no beginning of this file
        except BROKEN as error:
            attempts += 1
            nothing = attempts == 1 and length(part) == before  # no network: further requests would only keep the user waiting
            if nothing or attempts == ATTEMPTS:
                raise failure(f"{length(part):,} bytes ({getattr(error, 'reason', None) or error})") from None
            time.sleep(PAUSE)
        except ValueError as error:
            raise failure(error) from None
    got = f"more than {size:,}" if length(part) > size else f"sha256 {file_sha256(part)}"
    if got != f"sha256 {sha256}":
        part.unlink()
        raise failure(f"{got} (deleted)")
    os.replace(part, path)


def weights_file(name_or_path, folder=HERE):
    """--weights -> the file for vit.load_vit: a file as it is; a name: `folder/<name>.safetensors`, downloaded and converted if need be."""
    name, folder = str(name_or_path), Path(folder)
    if Path(name).is_file() or name.endswith(".safetensors"):  # load_vit says so if that is absent
        return Path(name)
    out = folder / f"{name}.safetensors"
    if out.is_file():
        return out
    if name not in CHECKPOINTS:
        known = sorted({*CHECKPOINTS, *(path.stem for path in folder.glob("*.safetensors"))})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "weights/README.md says where to get others"
        raise ValueError(f"weights: expected a .safetensors file or one of {', '.join(known)}, got {name!r}: {hint}")
    url, size, sha256 = CHECKPOINTS[name]
    original = folder / "original" / out.name
    original.parent.mkdir(parents=True, exist_ok=True)
    print(f"{original}: {size / 1e6:.1f} MB from {url}", flush=True)
    fetch(url, original, size, sha256)
    import convert

    options = argparse.Namespace(mean=None, std=None, activation=None, heads=None, source=None, license=None)  # all known
    print("\n".join(convert.convert(original, out, options)), flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    parser.add_argument("name", help=f"one of {', '.join(CHECKPOINTS)}")
    args = parser.parse_args()
    with one_sentence():
        path = weights_file(args.name)
        if path == Path(args.name):
            raise ValueError(f"NAME: expected one of {', '.join(CHECKPOINTS)}, got a file, {path}: give that to train.py as --weights")
        print(f"{path}: ready for --weights")


if __name__ == "__main__":
    main()
