"""weights/download.py against a server on this machine: whole, broken, refused, wrong downloads.

No test leaves the loopback interface.
"""

import hashlib
import io
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import torch
from torchvision.models import ViT_B_16_Weights

from conftest import ROOT, assert_one_sentence, call, tiny_vit
from runs import UserError
from vit import ViT, load_vit, sha256
from weights import convert, download
from weights.download import Published, ensure_weights

REAL = dict(download.PUBLISHED)
README = (ROOT / "weights" / "README.md").read_text()
# width / 64 heads: the file does not tell them.
SIZES = {"width": 128, "depth": 2, "heads": 2, "patch": 32, "grid": 7, "hidden": 64}
CARD = convert.Card(**convert.HALF, source="a test", license="none")


class Handler(BaseHTTPRequestHandler):
    """Serves server.content, in the manner that the test asks for, and counts the requests."""

    def do_GET(self):
        server = self.server
        server.requests += 1
        if server.status:
            self.send_error(server.status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.content)))
        self.end_headers()
        self.wfile.write(server.content[: server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content = b""
        server.requests = 0
        server.status = None
        server.cut = None  # bytes of an answer; then the connection closes
        server.daemon_threads = False  # the end of the test waits for every answer
        server.url = f"http://127.0.0.1:{server.server_port}/original.pth"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """No proxy, and no checkpoint of the real table."""
    monkeypatch.setattr(download, "PUBLISHED", {})
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def nowhere():
    """A url on a port where nothing listens."""
    with socket.socket() as taken:  # bound, so that nobody else gets the port, but not listening
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/original.pth"


@pytest.fixture
def vit():
    return tiny_vit(**SIZES)


@pytest.fixture
def published(server, vit, monkeypatch):
    """`vit` in timm's layout, on the server and known as "tiny"."""
    file = io.BytesIO()
    torch.save(vit.state_dict(), file)
    server.content = file.getvalue()
    parameters = sum(p.numel() for p in vit.parameters())
    digest = hashlib.sha256(server.content).hexdigest()
    entry = Published(server.url, digest, parameters, width=128, depth=2, patch=32)
    monkeypatch.setitem(download.PUBLISHED, "tiny", entry)
    monkeypatch.setitem(convert.KNOWN, "tiny", CARD)
    return entry


def publish(published, **changes):
    download.PUBLISHED["tiny"] = replace(published, **changes)


def refused(folder):
    """The sentence of a download that fails.

    It says what to get from where, and where to put it; and nothing is left.
    """
    with pytest.raises(UserError) as error:
        ensure_weights("tiny", folder)
    sentence = str(error.value)
    entry = download.PUBLISHED["tiny"]
    original = folder / "original" / "tiny.pth"
    assert entry.url in sentence and f"save that file as {original}" in sentence
    assert entry.expected() in sentence and "\n" not in sentence
    assert not files(folder)
    return sentence


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------ downloads


def test_several_processes_download_once(server, published, tmp_path):
    """The others wait. Threads stand for processes: each opens the lock's file anew."""
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: ensure_weights("tiny", tmp_path), range(3)))
    assert set(paths) == {tmp_path / "tiny.safetensors"} and server.requests == 1
    assert load_vit(paths[0]).config["depth"] == 2


@pytest.mark.parametrize("digits", [64, 8, 0])
def test_a_name_is_downloaded_and_converted_once(
    server, published, vit, digits, tmp_path, monkeypatch, capsys
):
    """With the whole sha256, its beginning, or none."""
    digest = published.sha256
    publish(published, sha256=digest[:digits] or None)
    path = ensure_weights("tiny", tmp_path)
    original = tmp_path / "original" / "tiny.pth"
    assert path == tmp_path / "tiny.safetensors" and files(tmp_path) == [original, path]
    assert original.read_bytes() == server.content
    teacher = load_vit(path)
    assert teacher.metadata["source"] == "a test"
    assert teacher.metadata["original_sha256"] == digest
    assert teacher.config == {**vit.config, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for key, value in vit.state_dict().items():
        assert torch.equal(teacher.state_dict()[key], value)
    captured = capsys.readouterr()
    for word in (server.url, f"sha256 {digest}", f"wrote {path}"):
        assert word in captured.out
    assert "100" in captured.err  # percent

    assert ensure_weights("tiny", tmp_path) == path
    assert server.requests == 1 and not capsys.readouterr().out


def test_file_urls_work_too(published, server, tmp_path):
    """A mirror in a folder is a line in the table."""
    (tmp_path / "mirror.pth").write_bytes(server.content)
    publish(published, url=(tmp_path / "mirror.pth").as_uri())
    assert load_vit(ensure_weights("tiny", tmp_path / "weights")).config["width"] == 128


def test_wrong_content_leaves_nothing(server, published, tmp_path):
    server.content = server.content[::-1]
    digest = hashlib.sha256(server.content).hexdigest()
    sentence = refused(tmp_path)
    assert published.sha256 in sentence and digest in sentence


@pytest.mark.parametrize("hashed", [True, False])
def test_a_cut_connection_leaves_nothing(server, published, hashed, tmp_path):
    server.cut = len(server.content) // 2
    if not hashed:
        publish(published, sha256=None)
    sentence = refused(tmp_path)
    assert hashed or "a broken file" in sentence
    server.cut = None
    assert ensure_weights("tiny", tmp_path).is_file()


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error(server, published, status, tmp_path):
    server.status = status
    assert f"HTTP Error {status}" in refused(tmp_path)
    assert server.requests == 1


def test_a_server_that_is_not_there(nowhere, published, tmp_path):
    publish(published, url=nowhere)
    assert "Connection refused" in refused(tmp_path)
    assert (tmp_path / "original").is_dir()  # to put the file into


@pytest.mark.parametrize(
    "change", [{"width": 64}, {"depth": 12}, {"patch": 16}, {"parameters": 1}], ids=str
)
@pytest.mark.parametrize("hashed", [True, False])
def test_wrong_sizes_leave_nothing(published, change, hashed, tmp_path):
    if not hashed:
        publish(published, sha256=None)
    publish(download.PUBLISHED["tiny"], **change)
    sentence = refused(tmp_path)
    assert download.sizes_in_words(download.PUBLISHED["tiny"]) in sentence
    assert f"got {download.sizes_in_words(published)}" in sentence


def test_a_full_disk_is_not_blamed_on_the_network(published, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        ensure_weights("tiny", tmp_path)


# -------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("hashed", [True, False])
def test_an_original_put_there_by_hand_is_converted(server, published, hashed, tmp_path):
    if not hashed:
        publish(published, sha256=None)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tiny.pth").write_bytes(server.content)
    assert load_vit(ensure_weights("tiny", tmp_path)).config["width"] == 128
    assert not server.requests


@pytest.mark.parametrize("kind", ["sha256", "sizes", "no checkpoint"])
def test_another_file_in_its_place_is_kept(server, published, kind, tmp_path):
    original = tmp_path / "original" / "tiny.pth"
    original.parent.mkdir()
    original.write_bytes(server.content)
    words = "expected a checkpoint of plain tensors"
    if kind == "sha256":
        original.write_bytes(b"mine")
        words = f"got sha256 {sha256(original)}: remove it"
    if kind == "sizes":
        publish(published, sha256=None, width=64)
        words = "got width 128, depth 2"
    if kind == "no checkpoint":
        original.write_bytes(b"mine")
        publish(published, sha256=None)
    before = original.read_bytes()
    with pytest.raises(UserError, match=re.escape(words)) as error:
        ensure_weights("tiny", tmp_path)
    assert str(original) in str(error.value) and "\n" not in str(error.value)
    assert files(tmp_path) == [original] and original.read_bytes() == before
    assert not server.requests


def test_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "teacher.bin").touch()
    assert ensure_weights(tmp_path / "teacher.bin", tmp_path) == tmp_path / "teacher.bin"
    # load_teacher says that this one is absent.
    assert ensure_weights("absent.safetensors", tmp_path).name == "absent.safetensors"


def test_a_name_that_is_there_is_taken_as_it_is(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    assert ensure_weights("mine", tmp_path) == tmp_path / "mine.safetensors"


@pytest.mark.parametrize(
    "name, hint",
    [
        ("tinny", "did you mean tiny?"),
        ("mine-2", "did you mean mine?"),
        ("resnet50", "weights/README.md"),
    ],
)
def test_an_unknown_name(published, tmp_path, name, hint):
    (tmp_path / "mine.safetensors").touch()
    with pytest.raises(UserError) as error:
        ensure_weights(name, tmp_path)
    sentence = str(error.value)
    assert repr(name) in sentence and hint in sentence
    assert "a .safetensors file or one of mine, tiny" in sentence


# ------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", REAL)
def test_every_entry_of_the_table(name):
    entry = REAL[name]
    url = urlsplit(entry.url)
    assert url.scheme == "https" and url.hostname and not url.query
    stem, _, suffix = url.path.rpartition("/")[2].rpartition(".")
    assert suffix in ("pth", "safetensors")

    # convert.py knows its normalisation by our name, and by that of the url or the sha256.
    assert name in convert.KNOWN
    if url.hostname == "huggingface.co":  # names one revision, so that the file cannot change
        pattern = r"/timm/([\w.]+)/resolve/[0-9a-f]{40}/model\.safetensors"
        repository = re.fullmatch(pattern, url.path)[1]
        assert convert.KNOWN_SHA256[entry.sha256] == repository
        stem = repository
    assert convert.KNOWN[stem] == convert.KNOWN[name]

    # The sha256: whole, or the beginning that the file's name gives.
    if entry.sha256 is not None:
        assert re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{8}", entry.sha256)
    if entry.sha256 is not None and len(entry.sha256) == 8:
        assert stem.endswith(f"-{entry.sha256}")


@pytest.mark.parametrize("name", REAL)
def test_the_table_has_the_sizes_of_the_networks(name):
    entry = REAL[name]
    classes = 0 if "dino" in name else 1000
    with torch.device("meta"):
        vit = ViT(
            width=entry.width,
            depth=entry.depth,
            heads=entry.width // 64,
            hidden=4 * entry.width,
            patch=entry.patch,
            grid=224 // entry.patch,
            classes=classes,
        )
    assert sum(p.numel() for p in vit.parameters()) == entry.parameters


@pytest.mark.parametrize("name", REAL)
def test_the_table_agrees_with_the_readme(name):
    entry = REAL[name]
    card = convert.KNOWN[name]
    rows = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    facts, source = (row.strip("|").split("|") for row in rows)
    assert f"{entry.parameters:,}" in facts[2]
    assert {"0.5": (0.5,) * 3, "ImageNet's": convert.IMAGENET_MEAN}[facts[3].strip()] == card.mean
    assert facts[4].strip() == card.license
    assert f"<{entry.url}>" in source[1]
    if entry.sha256 is None:
        assert "none published" in source[2]
    else:
        assert f"`{entry.sha256}" in source[2]
        assert ("begins with" in source[2]) == (len(entry.sha256) == 8)


def test_torchvision_still_has_this_url():
    weights = ViT_B_16_Weights.IMAGENET1K_V1
    assert REAL["vit_b_16"].url == weights.url
    assert REAL["vit_b_16"].parameters == weights.meta["num_params"]


# ---------------------------------------------------------------------------- the command line


def test_main(published, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ensure_weights", partial(ensure_weights, folder=tmp_path))
    result = call(download.main, "tiny")
    assert result.code == 0
    assert f"{tmp_path / 'tiny.safetensors'}: ready for --weights" in result.out


def test_wrong_arguments(published, nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ensure_weights", partial(ensure_weights, folder=tmp_path))
    publish(published, url=nowhere)
    assert_one_sentence(call(download.main), "name")
    assert_one_sentence(call(download.main, "tinny"), "did you mean tiny?")
    assert_one_sentence(
        call(download.main, tmp_path / "a.safetensors"), "got no such file", "--weights"
    )
    assert_one_sentence(call(download.main, "tiny"), nowhere, "Connection refused")


def test_it_runs_as_a_file_from_any_folder(wrong_teacher):
    assert_one_sentence(wrong_teacher, "did you mean vit_base_patch16_224")
