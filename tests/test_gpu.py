"""On a real CUDA device alone: what fake tensors (test_cuda.py) cannot say."""

import json

import pytest
import torch
from safetensors.torch import load_file

import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def demo(out, *options):
    """Train the demo for three epochs; -> its log's lines, and its tensors."""
    train.main(["--out", str(out), "--epochs", "3", "--device", "cuda", *options])
    run = out / "demo" / "washer" / "seed0"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return lines, load_file(run / "model.safetensors")


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "sgd"])
@pytest.mark.parametrize("batch_size", ["4", "7"])  # 60 images: with and without a smaller batch
def test_a_graph_is_the_steps_one_by_one(tmp_path, optimizer, batch_size):
    options = ("--optimizer", optimizer, "--batch-size", batch_size, "--precision", "fp32")
    graph, by_graph = demo(tmp_path / "graph", *options)
    eager, one_by_one = demo(tmp_path / "eager", *options, "--eager")
    assert [line["step"] for line in graph] == [line["step"] for line in eager]
    for ours, theirs in zip(graph, eager, strict=True):
        if "loss" in theirs:
            assert ours["lr"] == theirs["lr"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    anchors = by_graph["anchor.running"], one_by_one["anchor.running"]
    torch.testing.assert_close(*anchors, rtol=1e-4, atol=1e-4)
    assert by_graph["delta"] == pytest.approx(float(one_by_one["delta"]), rel=0.1)


def test_the_learning_rate_reaches_a_graph(tmp_path):
    """Else a graph repeats the rate that it was recorded with."""
    lines, _ = demo(tmp_path / "a", "--precision", "fp32")
    slow, _ = demo(tmp_path / "b", "--precision", "fp32", "--decay", "constant")
    losses = [[line["loss"] for line in log if "loss" in line] for log in (lines, slow)]
    assert losses[0][-1] != pytest.approx(losses[1][-1], rel=1e-3)


def test_a_resumed_run_has_the_same_bits_with_deterministic(tmp_path, monkeypatch):
    options = ("--deterministic", "--checkpoint-every", "0")
    _, whole = demo(tmp_path / "whole", *options)
    interrupted = train.Training.measure

    def stop_in_the_second_epoch(self, progress, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        interrupted(self, progress, epoch)

    monkeypatch.setattr(train.Training, "measure", stop_in_the_second_epoch)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        demo(tmp_path / "part", *options)
    monkeypatch.setattr(train.Training, "measure", interrupted)
    _, resumed = demo(tmp_path / "part", *options, "--resume")
    assert set(whole) == set(resumed)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
