"""weights/download.py against a server on this machine: whole, broken, refused and wrong downloads. No test leaves the loopback interface."""
import contextlib
import hashlib
import os
import pty
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import ROOT, assert_one_sentence, run, tiny_vit
from safetensors.torch import save_file

import convert
import download
from download import fetch, weights_file
from vit import load_vit

REAL = dict(download.CHECKPOINTS)
CONTENT = bytes(range(256)) * 4000  # 1 MB
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
SCRIPT = ROOT / "weights" / "download.py"


class Handler(BaseHTTPRequestHandler):
    """Serves server.content, in the manner that the test asks for, and writes down each request's Range header."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append(asked)
        time.sleep(server.delay)
        if server.status:
            return self.send_error(server.status)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        if start and start >= len(server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if server.announce:
            self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else None  # bytes of this answer; then the connection closes
        self.wfile.write(server.content[start:][:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.requests, server.cuts = CONTENT, [], []
        server.ranges, server.announce, server.status, server.delay = True, True, None, 0
        server.daemon_threads = False  # the end of the test waits for every answer
        server.url = f"http://127.0.0.1:{server.server_port}/model.safetensors"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def local(monkeypatch):
    """No waiting, no proxy, no checkpoint of the real table."""
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr(download, "CHECKPOINTS", {})
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "original.safetensors"


@pytest.fixture
def nowhere():
    """A url on a port where nothing listens."""
    with socket.socket() as taken:  # bound, so that nobody else gets the port, but not listening
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/model.safetensors"


def part(path, content=None):
    """The file that a broken download leaves; with `content`, left as by an earlier one."""
    part = path.with_name(f"{path.name}.part")
    if content is not None:
        part.write_bytes(content)
    return part


def assert_fetched(path, content=CONTENT):
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def refused(url, path, size=SIZE, sha256=SHA256):
    """The sentence of a download that fails: it always says what to get from where, and where to put it."""
    with pytest.raises(ValueError) as error:
        fetch(url, path, size, sha256)
    sentence = str(error.value)
    assert url in sentence and sha256 in sentence and str(path) in sentence and "\n" not in sentence
    assert not path.exists()
    return sentence


def test_a_plain_download(server, path, capsys):
    fetch(server.url, path, SIZE, SHA256)
    assert_fetched(path)
    first, last = capsys.readouterr().err.splitlines()
    assert first == "  0% 0.0 of 1.0 MB" and last.startswith("100% 1.0 of 1.0 MB ") and last.endswith(" MB/s")
    fetch(server.url, path, SIZE, SHA256)
    assert server.requests == [None]  # what is there is not fetched again


def test_report_is_called_as_the_file_grows(server, path):
    calls = []
    fetch(server.url, path, SIZE, SHA256, report=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert calls[0] == (0, SIZE) and done == sorted(done) and len(done) > 3 and calls[-1][:2] == (SIZE, SIZE) and calls[-1][2] > 0


@pytest.mark.parametrize("announce", [True, False])
def test_a_cut_connection_is_resumed(server, path, announce):
    server.cuts, server.announce = [300_001, 50_000], announce
    fetch(server.url, path, SIZE, SHA256)
    assert server.requests == [None, "bytes=300001-", "bytes=350001-"]
    assert_fetched(path)


def test_a_download_that_is_cut_every_time_goes_on_at_the_next_call(server, path):
    server.cuts = [1000] * download.ATTEMPTS
    sentence = refused(server.url, path)
    kept = 1000 * download.ATTEMPTS
    assert f"got {kept:,} bytes" in sentence and "cut" in sentence and part(path).read_bytes() == CONTENT[:kept]
    assert len(server.requests) == download.ATTEMPTS
    fetch(server.url, path, SIZE, SHA256)
    assert server.requests[-1] == f"bytes={kept}-"
    assert_fetched(path)


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error_ends_at_once_and_keeps_what_there_is(server, path, status):
    part(path, CONTENT[:10])
    server.status = status
    assert f"HTTP {status}" in refused(server.url, path)
    assert len(server.requests) == 1 and part(path).read_bytes() == CONTENT[:10]


def test_wrong_content_is_deleted(server, path):
    server.content = CONTENT[::-1]
    assert f"got sha256 {hashlib.sha256(server.content).hexdigest()} (deleted)" in refused(server.url, path)
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("content", [b"please log in", CONTENT + b"more"])
def test_a_file_that_announces_another_size_is_not_begun(server, path, content):
    server.content = content
    assert f"got a file of {len(content):,} bytes" in refused(server.url, path)
    assert len(server.requests) == 1 and not list(path.parent.iterdir())


def test_a_file_that_turns_out_too_long_is_deleted(server, path):
    server.content, server.announce, calls = CONTENT * 3, False, []
    with pytest.raises(ValueError, match=re.escape(f"got more than {SIZE:,} (deleted)")):
        fetch(server.url, path, SIZE, SHA256, report=lambda *call: calls.append(call))
    assert calls[-1][0] <= SIZE + download.CHUNK  # and the rest is not waited for
    assert len(server.requests) == 1 and not list(path.parent.iterdir())


def test_a_file_that_turns_out_too_short_is_not_waited_for(server, path):
    server.content, server.announce = CONTENT[:1000], False
    assert "cut" in refused(server.url, path)
    assert len(server.requests) < 3 * download.ATTEMPTS


def test_a_server_that_ignores_ranges_sends_the_file_from_its_beginning(server, path):
    server.ranges, server.cuts = False, [400_000]
    fetch(server.url, path, SIZE, SHA256)
    assert server.requests == [None, "bytes=400000-"]
    assert_fetched(path)


def test_a_server_that_is_not_there(nowhere, path):
    assert "Connection refused" in refused(nowhere, path)
    assert not list(path.parent.iterdir())


def test_a_server_that_does_not_answer(server, path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.05)
    server.delay = 0.2
    assert "timed out" in refused(server.url, path)
    assert len(server.requests) == 1


def test_a_complete_part_needs_no_request(server, path):
    part(path, CONTENT)
    fetch(server.url, path, SIZE, SHA256)
    assert not server.requests
    assert_fetched(path)


def test_a_complete_but_wrong_part_is_deleted(server, path):
    part(path, CONTENT[::-1])
    assert "(deleted)" in refused(server.url, path)
    assert not server.requests and not part(path).exists()


def test_an_oversized_part_is_thrown_away(server, path):
    part(path, CONTENT + b"more")
    fetch(server.url, path, SIZE, SHA256)
    assert server.requests == [None]
    assert_fetched(path)


def test_416_begins_anew(server, path):
    """A server with no byte beyond the part, though the part is not complete, is asked for the whole file; then its answer counts."""
    part(path, CONTENT[:1000])
    server.content = b"please log in"
    assert "got a file of 13 bytes" in refused(server.url, path)
    assert server.requests == ["bytes=1000-", None] and not list(path.parent.iterdir())


def test_another_file_in_its_place_is_not_overwritten(server, path):
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="got another: remove it"):
        fetch(server.url, path, SIZE, SHA256)
    assert path.read_bytes() == b"mine" and not server.requests


def test_progress_in_a_terminal_is_one_line(server, path, monkeypatch):
    terminal, end = pty.openpty()
    with open(end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        fetch(server.url, path, SIZE, SHA256)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    assert shown.startswith(b"\x1b[K  0% 0.0 of 1.0 MB\r\x1b[K") and shown.count(b"\n") == 1 and shown.endswith(b"MB/s\r\n")


@pytest.fixture
def checkpoint(server, tmp_path, monkeypatch):
    """A small ViT in timm's layout, known to download.py and convert.py as "tiny"; -> the ViT."""
    vit = tiny_vit(width=128, depth=2, heads=2, patch=32, grid=7, hidden=64)  # width / 64 heads: the file does not tell them
    save_file(vit.state_dict(), tmp_path / "served")
    server.content = (tmp_path / "served").read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setattr(download, "CHECKPOINTS", {"tiny": (server.url, len(server.content), digest)})
    monkeypatch.setitem(convert.KNOWN, "tiny", (convert.HALF, "gelu", "a test", "none"))
    return vit


def test_a_name_is_downloaded_and_converted_once(server, checkpoint, tmp_path, capsys):
    folder = tmp_path / "weights"
    path = weights_file("tiny", folder)
    assert path == folder / "tiny.safetensors" and (folder / "original" / "tiny.safetensors").read_bytes() == server.content
    vit = load_vit(path)
    assert vit.metadata["source"] == "a test" and vit.metadata["original_sha256"] == download.CHECKPOINTS["tiny"][2]
    assert vit.config == {**checkpoint.config, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert all(torch.equal(vit.state_dict()[key], value) for key, value in checkpoint.state_dict().items())
    said = capsys.readouterr().out
    assert server.url in said and f"wrote {path}" in said
    assert weights_file("tiny", folder) == path and server.requests == [None] and not capsys.readouterr().out


def test_an_original_put_there_by_hand_is_converted(server, checkpoint, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tiny.safetensors").write_bytes(server.content)
    assert load_vit(weights_file("tiny", tmp_path)).config["width"] == 128 and not server.requests


def test_without_network_a_name_leaves_the_folder_to_put_the_file_into(nowhere, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHECKPOINTS", {"tiny": (nowhere, SIZE, SHA256)})
    with pytest.raises(ValueError) as error:
        weights_file("tiny", tmp_path)
    assert all(text in str(error.value) for text in (str(tmp_path / "original" / "tiny.safetensors"), nowhere, SHA256))
    assert not list((tmp_path / "original").iterdir())


def test_a_file_is_taken_as_it_is(tmp_path):
    (tmp_path / "teacher.bin").touch()
    assert weights_file(str(tmp_path / "teacher.bin"), tmp_path) == tmp_path / "teacher.bin"
    assert weights_file("absent.safetensors", tmp_path).name == "absent.safetensors"  # load_vit says that it is


@pytest.mark.parametrize("name, hint", [("tinny", "did you mean tiny?"), ("mine-2", "did you mean mine?"), ("resnet50", "weights/README.md")])
def test_an_unknown_name(checkpoint, tmp_path, name, hint):
    (tmp_path / "mine.safetensors").touch()
    with pytest.raises(ValueError) as error:
        weights_file(name, tmp_path)
    sentence = str(error.value)
    assert repr(name) in sentence and hint in sentence and "a .safetensors file or one of mine, tiny" in sentence


def test_the_table_agrees_with_the_readme_and_convert():
    readme = (ROOT / "weights" / "README.md").read_text()
    for name, (url, size, sha256) in REAL.items():
        repository, revision = re.fullmatch(r"https://huggingface\.co/(timm/[\w.]+)/resolve/([0-9a-f]{40})/model\.safetensors", url).groups()
        assert all(f"`{text}`" in readme for text in (repository, revision, sha256)) and f"{size:,} bytes" in readme
        assert name in convert.KNOWN and convert.KNOWN_SHA256[sha256] == repository.removeprefix("timm/")


def test_a_file_that_is_there_is_found_without_torch(tmp_path):
    (tmp_path / "mine.safetensors").touch()
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); from weights.download import weights_file\n"
            f"print(weights_file('mine', {str(tmp_path)!r})); sys.exit('torch' in sys.modules)")
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0 and process.stdout.strip() == str(tmp_path / "mine.safetensors"), process.stderr


def test_the_command_line(tmp_path):
    assert "vit_base_patch16_224" in run(SCRIPT, "--help").stdout
    assert_one_sentence(run(SCRIPT), "name")
    assert_one_sentence(run(SCRIPT, "vit_bose_patch16_224"), "did you mean vit_base_patch16_224")
    assert_one_sentence(run(SCRIPT, tmp_path / "a.safetensors"), "got a file", "--weights")
