"""The CUDA path without a GPU: torch's fake tensors know their device, and refuse to mix devices.

They have shapes and no values. So what asks for a value (a loss as a number, `backward`) is not
covered. Mutations at the end show that the kind of mistake that these tests are for does fail.
"""

import inspect
import re
import textwrap

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import evaluate
import runs
import train
import vitad
from conftest import ROOT
from data import Split
from vit import ViT
from vitad import Distillation

LAYERS = (0, 2)
SMALL = {"width": 64, "depth": 3, "heads": 2, "patch": 16, "grid": 3, "hidden": 96}
PATCHES = 9


def move(module, device):
    """Module.to, which cannot exchange the parameters of a module for fake ones."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                part._parameters[name] = nn.Parameter(p.detach().to(device), p.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer.to(device)
    return module


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    """Every tensor of a test is fake, and autocast is told that there is a GPU."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(ViT, "initialise", lambda self: None)  # it asks for values
    monkeypatch.setattr(nn.Module, "to", move)
    with FakeTensorMode():
        yield


def on_cuda(**options):
    return Distillation(ViT(**SMALL), layers=LAYERS, top_k=4, **options).to("cuda")


def pictures(n=4, device="cpu", size=48):
    return torch.zeros((n, 3, size, size), dtype=torch.uint8, device=device)


def devices(*tensors):
    return {tensor.device.type for tensor in tensors}


def loss_of(model, images):
    """What a step of training does before `backward`; -> the loss."""
    t = model.teacher_features(images)
    model.update_anchor(t)
    return model.loss_terms(images, t)["loss"]


# --------------------------------------------------------------------------- training and scoring


@pytest.mark.parametrize(
    "precision, reading, images",
    [
        ("fp32", "unit", "cpu"),
        ("fp32", "unit", "cuda"),
        ("bf16", "unit", "cpu"),
        ("bf16", "unit", "cuda"),
        ("fp32", "l2", "cuda"),
        ("fp32", "mse", "cuda"),
    ],
)
def test_a_step_of_training_and_scoring(precision, reading, images):
    model = on_cuda(precision=precision, reading=reading)
    images = pictures(device=images)
    assert devices(loss_of(model, images)) == {"cuda"}
    t = model.teacher_features(images)
    assert devices(*t.values()) == {"cuda"}
    assert {x.dtype for x in t.values()} == {torch.float32}
    scores = model.scores(images)
    assert devices(*scores.values(), *model.scores(images, t).values()) == {"cuda"}
    model.calibrate(*model.compare_all([images] * 2))
    assert devices(model.delta, model.heat_scale, *model.normal.buffers()) == {"cuda"}
    assert devices(*model.scores(images).values()) == {"cuda"}
    assert devices(train.measure_held_out(model, [(images, t)])) == {"cuda"}


def test_autocast_is_at_work():
    """Else bf16 above would test fp32 a second time."""
    model = on_cuda(precision="bf16")
    seen = []
    model.student.blocks[0].mlp.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    model.scores(pictures())
    assert seen == [torch.bfloat16]


def test_a_gpu_attends_in_bfloat16(monkeypatch):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v):
        seen.append(q.dtype)
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    on_cuda(precision="bf16").teacher_features(pictures())
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize(
    "options", [{"anchor": "ema"}, {"pos_embed": "learn"}, {"without": ("anchor", "gram")}]
)
def test_the_models_options(options):
    model = on_cuda(**options)
    assert devices(loss_of(model, pictures())) == {"cuda"}
    assert devices(model.scores(pictures())["score"]) == {"cuda"}


def test_small_pictures_are_enlarged_on_the_device():
    assert devices(loss_of(on_cuda(), pictures(size=32))) == {"cuda"}


class Known:
    """In place of the cache's flags: all or none of the images are there."""

    def __init__(self, known):
        self.known = known

    def __getitem__(self, index):
        assert devices(index) == {"cpu"}
        return self

    def __setitem__(self, index, value):
        assert devices(index) == {"cpu"} and not self.known

    def all(self):
        return self.known


class Store:
    """In place of the cache's tensor: its index has to be on the same device.

    torch refuses one of the two directions, and copies in the other; fake tensors allow both.
    """

    def __init__(self, tensor):
        self.tensor = tensor
        self.device = tensor.device

    def __getitem__(self, index):
        assert index.device == self.device, "index on another device"
        return self.tensor[index]

    def __setitem__(self, index, value):
        assert index.device == value.device == self.device, "index on another device"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", train.PLACES)
@pytest.mark.parametrize("known", [False, True])
def test_the_teachers_cache_in_each_of_its_places(tmp_path, monkeypatch, precision, place, known):
    monkeypatch.setattr(
        train, "mapped_tensor", lambda _, shape, dtype: torch.empty(shape).to(dtype)
    )
    model = on_cuda(precision=precision)
    cache = train.TeacherCache(model, 10, "cuda", tmp_path, place)
    cache.known = Known(known)
    if place != "off":
        assert devices(cache.store) == {"cuda" if place == "device" else "cpu"}
        cache.store = Store(cache.store)
    t = cache(torch.arange(4), pictures(device="cuda"))
    assert devices(*t.values()) == {"cuda"}
    assert {tuple(x.shape) for x in t.values()} == {(4, 1 + PATCHES, SMALL["width"])}


@pytest.mark.parametrize("images", ["cpu", "cuda"])
def test_batches_of_a_run(images):
    run = train.Training.__new__(train.Training)
    run.images, run.device = pictures(n=10, device=images), "cuda"
    run.cache = lambda index, images: devices(index)
    for batch, index_on in run.batches(torch.arange(10), 4):
        assert devices(batch) == {"cuda"} and index_on == {"cpu"}


@pytest.mark.parametrize(  # fused SGD needs a driver
    "optimizer, precision", [("adamw", "fp32"), ("muon", "fp32"), ("muon", "bf16")]
)
def test_a_step_of_the_optimisers(optimizer, precision):
    model = on_cuda()
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = train.Settings(optimizer=optimizer, precision=precision, weight_decay=0.1)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    for each in train.make_optimizers(settings, parameters, 1e-3, "cuda", peak_rest=1e-3):
        each.step()
        state = [x for values in each.state.values() for x in values.values() if x is not None]
        assert devices(*state) == {"cuda"}


def test_evaluates_batches():
    split = Split(pictures(n=5), labels=[0, 0, 0, 1, 1], names=list("abcde"))
    jobs = [evaluate.Scored("run", {}, on_cuda(), split) for _ in range(2)]
    evaluate.score_together(jobs, "cuda", batch_size=2)
    for job in jobs:
        assert devices(*job.scores.values()) == {"cpu"}
        assert {len(values) for values in job.scores.values()} == {5}


def readme_lines():
    """The README's lines of Python."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return code


def run_readme_lines(monkeypatch, capsys):
    vit = ViT(**{**SMALL, "patch": 112, "grid": 2})  # of 224 pixels
    monkeypatch.setattr(runs, "load", lambda run: Distillation(vit, LAYERS, top_k=2).to("cuda"))
    exec(readme_lines(), {})
    assert "device='cuda:0'" in capsys.readouterr().out


def test_the_lines_of_the_readme(monkeypatch, capsys):
    run_readme_lines(monkeypatch, capsys)


# -------------------------------------------------------------------------------------- mutations


def mutate(monkeypatch, owner, name, old, new):
    """Exchange a piece of a function's source, as a mistake would."""
    source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
    assert source.count(old) == 1, source
    function = getattr(owner, name)
    names = dict(inspect.unwrap(function).__globals__)
    exec(source.replace(old, new), names)
    monkeypatch.setattr(owner, name, names[name])


@pytest.mark.parametrize("known", [False, True])
def test_mutation_an_index_left_on_the_cpu(tmp_path, monkeypatch, known):
    mutate(
        monkeypatch,
        train.TeacherCache,
        "__call__",
        "index.to(self.store.device, non_blocking=True)",
        "index",
    )
    with pytest.raises(AssertionError, match="index on another device"):
        test_the_teachers_cache_in_each_of_its_places(
            tmp_path, monkeypatch, precision="fp32", place="device", known=known
        )


def test_mutation_a_buffer_made_without_device(monkeypatch):
    new = 'torch.tensor(self.config["std"]).view(3, 1, 1)'
    mutate(monkeypatch, ViT, "prepare", "self.std", new)
    with pytest.raises(RuntimeError, match="device"):
        test_a_step_of_training_and_scoring("fp32", "unit", "cuda")


def test_mutation_pictures_that_stay_where_they_are(monkeypatch, capsys):
    """So it was once: the README's lines failed on a machine with a GPU."""
    mutate(monkeypatch, vitad.Distillation, "features", ".to(self.delta.device)", "")
    with pytest.raises(RuntimeError, match="device"):
        run_readme_lines(monkeypatch, capsys)
