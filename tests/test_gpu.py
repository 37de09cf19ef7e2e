"""On a real CUDA device alone: what fake tensors (test_cuda.py) cannot say."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import call

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
RUN = "demo/washer/seed0"


def demo(out, *options):
    """Train the demo for three epochs; -> how it ended."""
    return call(train.main, "--out", out, "--epochs", 3, "--device", DEVICE, *options)


def log_and_tensors(out):
    lines = [json.loads(line) for line in (out / RUN / "log.jsonl").read_text().splitlines()]
    return lines, load_file(out / RUN / "model.safetensors")


@pytest.fixture
def recorded(monkeypatch):
    """The graphs that a test records."""
    graphs = []
    record = train.GraphedStep.record

    def record_and_note(self):
        graphs.append(self)
        record(self)

    monkeypatch.setattr(train.GraphedStep, "record", record_and_note)
    return graphs


@pytest.mark.parametrize("batch_size", [4, 7])  # 60 images: without and with a smaller batch
@pytest.mark.parametrize(
    "precision, options",
    [
        ("fp32", ("--optimizer", "muon")),
        ("fp32", ("--optimizer", "adamw")),
        ("fp32", ("--optimizer", "sgd")),
        ("fp32", ("--lr-rest", 0.001)),
        ("fp32", ("--anchor", "ema", "--clip-grad", 1, "--weight-decay", 0.1)),
        ("bf16", ()),
    ],
)
def test_a_graph_is_the_steps_one_by_one(tmp_path, recorded, precision, options, batch_size):
    options = (*options, "--batch-size", batch_size, "--precision", precision)
    assert demo(tmp_path / "graph", *options).code == 0
    assert len(recorded) == 1
    assert demo(tmp_path / "eager", *options, "--eager").code == 0
    assert len(recorded) == 1
    graph, by_graph = log_and_tensors(tmp_path / "graph")
    eager, one_by_one = log_and_tensors(tmp_path / "eager")
    assert [line["step"] for line in graph] == [line["step"] for line in eager]
    near = 0.02 if precision == "fp32" else 0.05
    for ours, theirs in zip(graph, eager, strict=True):
        if "loss" in theirs:
            assert ours["lr"] == theirs["lr"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=near)
    anchors = by_graph["anchor.running"], one_by_one["anchor.running"]
    torch.testing.assert_close(*anchors, rtol=1e-4, atol=1e-4)
    assert by_graph["delta"] == pytest.approx(float(one_by_one["delta"]), rel=0.1)


def test_the_learning_rate_reaches_a_graph(tmp_path, recorded):
    """Else a graph repeats the rate that it was recorded with."""
    losses = []
    for decay in ("linear", "constant"):
        assert demo(tmp_path / decay, "--precision", "fp32", "--decay", decay).code == 0
        log, _ = log_and_tensors(tmp_path / decay)
        losses.append([line["loss"] for line in log if "loss" in line])
    assert len(recorded) == 2
    assert losses[0][-1] != pytest.approx(losses[1][-1], rel=1e-3)


@pytest.mark.parametrize("options", [("--deterministic",), ()])
def test_a_resumed_run(tmp_path, monkeypatch, options):
    """The same bits with --deterministic; with graphs the same but for rounding."""
    options = (*options, "--checkpoint-every", 0)
    assert demo(tmp_path / "whole", *options).code == 0
    whole_log, whole = log_and_tensors(tmp_path / "whole")
    measure = train.Training.measure

    def stop_in_the_second_epoch(self, progress, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        measure(self, progress, epoch)

    monkeypatch.setattr(train.Training, "measure", stop_in_the_second_epoch)
    assert demo(tmp_path / "part", *options).code == 130
    assert (tmp_path / "part" / RUN / "checkpoint.safetensors").is_file()
    monkeypatch.setattr(train.Training, "measure", measure)
    resumed = demo(tmp_path / "part", *options, "--resume")
    assert resumed.code == 0 and "continues after step" in resumed.out
    log, tensors = log_and_tensors(tmp_path / "part")
    if "--deterministic" in options:
        assert set(whole) == set(tensors)
        assert all(torch.equal(value, tensors[name]) for name, value in whole.items())
    losses = [[line["loss"] for line in x if "loss" in line] for x in (whole_log, log)]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.05)
