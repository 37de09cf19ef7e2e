"""The parts of train.py: teacher's cache, held-out distance, learning rate, images held out."""

import dataclasses
import gc
import json
import math
import os
import weakref
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import runs
import train
from conftest import make_category, tiny_vit
from runs import UserError
from vitad import LAYERS, Distillation

IMAGES = torch.randint(
    0, 256, (5, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)
)


def distillation(**options):
    torch.manual_seed(0)
    return Distillation(tiny_vit(), **options)


# ------------------------------------------------------------------------------ the teacher's cache


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("place", ["device", "host", "disk", "off"])
def test_kept_features_are_those_of_the_teacher(place, precision, tmp_path):
    model, fp32 = distillation(precision=precision), precision == "fp32"
    cache = train.TeacherCache(model, 7, "cpu", tmp_path, place)
    assert cache.place == place and cache.bytes == 7 * 4 * 50 * 32 * (4 if fp32 else 2)
    expected = model.teacher_features(IMAGES)
    if not fp32:
        expected = {c: x.bfloat16().float() for c, x in expected.items()}
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(1))
    every_time = place == "off"

    order = torch.tensor([6, 1, 4, 0, 3])
    first = cache(order, IMAGES)
    assert list(first) == list(LAYERS) and all(torch.equal(first[c], expected[c]) for c in LAYERS)
    assert len(calls) == 1

    again = cache(order.flip(0), IMAGES.flip(0))
    assert all(torch.equal(again[c], first[c].flip(0)) for c in LAYERS)
    assert len(calls) == 1 + every_time

    unseen = cache(torch.tensor([0, 2]), IMAGES[[3, 0]])  # one of them known: both are computed
    rounding = 1e-5 if fp32 else 1e-2
    torch.testing.assert_close(unseen[11], first[11][[3, 0]], rtol=rounding, atol=rounding)
    assert len(calls) == 2 + every_time
    assert not list(tmp_path.iterdir())  # the file has no name


def test_the_cache_leaves_half_of_what_is_free(monkeypatch, tmp_path):
    model, need = distillation(), 7 * 4 * 50 * 32 * 4
    free = {"off": math.inf}
    monkeypatch.setattr(train, "free_bytes", lambda place, device, folder: free[place])
    for device, host, disk, expected in (
        (2 * need, 0, 0, "device"),
        (2 * need - 1, 2 * need, 0, "host"),
        (0, need, 2 * need, "disk"),
        (0, 0, need, "off"),
    ):
        free |= {"device": device, "host": host, "disk": disk}
        assert train.TeacherCache(model, 7, "cpu", tmp_path).place == expected
    assert not list(tmp_path.iterdir())  # the file went with the cache


def test_free_bytes(tmp_path):
    assert train.free_bytes("device", "cpu") == 0  # a CPU's memory is the host's
    assert train.free_bytes("host", "cpu") > 1 << 20
    if "SC_PHYS_PAGES" in os.sysconf_names:
        assert train.available_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert train.free_bytes("disk", "cpu", tmp_path) > 0
    assert train.left_in_control_groups(tmp_path / "none", tmp_path) == math.inf
    for name, limit in (("job", "9000"), ("job/step", "max"), ("job/step/task", "max")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(f"{limit}\n")
        (tmp_path / name / "memory.current").write_text("2000\n")
        (tmp_path / name / "memory.stat").write_text("anon 1500\ninactive_file 500\n")
    (tmp_path / "own").write_text("1:memory:/other\n0::/job/step/task\n")
    assert train.left_in_control_groups(tmp_path / "own", tmp_path) == 7500
    assert train.free_bytes("off", "cpu") == math.inf


# --------------------------------------------------------------------------- the held-out distance


def cosine(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    return float(np.dot(x, y) / np.sqrt(np.dot(x, x) * np.dot(y, y)))


def test_the_held_out_distance_against_naive_loops():
    model = distillation(layers=(2, 5))
    t = model.teacher_features(IMAGES)
    parts = [(IMAGES[i], {c: x[i] for c, x in t.items()}) for i in (slice(3), slice(3, 5))]
    measured = train.measure_held_out(model, parts)

    with torch.no_grad():
        s = model.features(model.student, IMAGES)
    for i, c in enumerate(t):
        tokens = [(b, p) for b in range(5) for p in range(50)]
        distances = [1 - cosine(t[c][b, p], s[c][b, p]) for b, p in tokens]
        assert measured[i].item() == pytest.approx(np.mean(distances), rel=1e-4)


def test_the_held_out_distance_of_a_student_that_has_arrived():
    model = distillation()
    model.student.load_state_dict(model.teacher.state_dict())
    assert (
        train.measure_held_out(model, [(IMAGES, model.teacher_features(IMAGES))]).abs().max() < 1e-6
    )


def test_what_the_held_out_distances_say_of_the_length():
    falling = {10: 0.4, 20: 0.2, 30: 0.15, 40: 0.1}
    assert train.second_half(falling) == {"fell": pytest.approx(0.5), "lowest_at": 40}
    by_heart = {10: 0.4, 20: 0.2, 30: 0.1, 40: 0.25}
    assert train.second_half(by_heart) == {"fell": pytest.approx(-0.25), "lowest_at": 30}
    three = {10: 0.4, 20: 0.2, 30: 0.1}  # half of it is no epoch's end
    assert train.second_half(three)["fell"] == pytest.approx(1 - 0.1 / 0.3)
    assert train.second_half({10: 0.4}) == train.second_half({}) == {}


# --------------------------------------------------------------- learning rate, images held out


def test_schedule_of_the_learning_rate():
    for decay, down in (
        ("linear", [1 - done / 8 for done in range(9)]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * done / 8) for done in range(9)]),
    ):
        settings = train.Settings(warmup=4, decay=decay)
        shares = [train.schedule(step, 12, settings) for step in range(13)]
        assert shares[:4] == [0.25, 0.5, 0.75, 1.0]  # linear up to the peak
        assert shares[4:] == pytest.approx(down)  # and down to 0 over the other 8 steps
    assert train.Settings().decay == "linear"
    constant = train.Settings(warmup=2, decay="constant")
    assert [train.schedule(step, 6, constant) for step in range(6)] == [0.5, 1, 1, 1, 1, 1]
    assert train.schedule(0, 6, train.Settings(warmup=0)) == 1


def test_every_epoch_has_an_order_of_its_own():
    run = SimpleNamespace(seed=7, kept=torch.arange(10, 30))
    first, again, second = (train.Training.order(run, epoch).tolist() for epoch in (1, 1, 2))
    run.seed = 9
    other = train.Training.order(run, 2).tolist()
    assert first == again and first != second != other
    assert sorted(first) == sorted(second) == list(range(10, 30))


def test_images_held_out_depend_on_the_category_and_not_on_the_seed():
    settings = train.Settings(dataset="folder", category="own", holdout=0.3)
    kept, held_out = train.hold_out(settings, 10)
    shuffled = torch.randperm(
        10, generator=torch.Generator().manual_seed(zlib.crc32(b"folder/own"))
    )
    assert held_out.tolist() == sorted(shuffled[:3].tolist())
    assert kept.tolist() == sorted(set(range(10)) - set(held_out.tolist()))

    def held(n=100, **changes):
        changes = {"dataset": "folder", "category": "own", "holdout": 0.3, **changes}
        return train.hold_out(train.Settings(**changes), n)[1].tolist()

    assert held() == held(seed=1) != held(category="other") and held() != held(dataset="mvtec")
    assert len(held(holdout=0.1)) == 10 and held(holdout=0.0) == []
    assert len(held(n=5, holdout=0.1)) == 2  # one has no spread
    for n, holdout, least in ((2, 0.1, 3), (1, 0.0, 2), (20, 0.99, 21)):
        with pytest.raises(UserError, match=f"at least {least} normal images.* got {n}:"):
            held(n=n, holdout=holdout)


# ----------------------------------------------------------------------------------- the optimisers


def matrices():
    """A wide one and two tall ones, with five gradients each."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 40), (40, 12), (40, 12))
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    return values, gradients


def five_steps(make):
    values, gradients = matrices()
    parameters = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = make(parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [p.detach() - value for p, value in zip(parameters, values, strict=True)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_muon_is_torchs_and_in_float32_differs_by_rounding_alone(decay):
    def torchs(parameters):
        return torch.optim.Muon(parameters, 0.01, decay, adjust_lr_fn="match_rms_adamw")

    expected = five_steps(torchs)
    for bf16 in (True, False):
        ours = five_steps(
            lambda p, bf16=bf16: train.Muon(p, lr=0.01, weight_decay=decay, bf16=bf16)
        )
        for x, y in zip(ours, expected, strict=True):
            assert (x - y).norm() / y.norm() < (1e-5 if bf16 else 0.02)
    for change in ({"lr": 0.012}, {"weight_decay": decay + 0.5}):  # the comparison can fail
        options = {"lr": 0.01, "weight_decay": decay, **change}
        [x, *_] = five_steps(lambda p, options=options: train.Muon(p, bf16=False, **options))
        assert (x - expected[0]).norm() / expected[0].norm() > 0.02


def test_orthogonalise_keeps_the_directions_and_levels_the_sizes():
    _, gradients = matrices()
    group = torch.optim.Muon([torch.nn.Parameter(torch.zeros(2, 2))]).param_groups[0]
    for x in gradients[0]:
        U, S, Vh = torch.linalg.svd(x, full_matrices=False)
        [result] = train.orthogonalise(x[None], group)
        sizes = U.T @ result @ Vh.T
        assert S.max() / S.min() > 2 and (sizes - torch.diag(sizes.diag())).abs().max() < 1e-4
        assert sizes.diag().min() > 0.6 and sizes.diag().max() < 1.3


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = distillation()
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings = train.Settings(optimizer="muon", weight_decay=0.1)
    muon, adamw = train.make_optimizers(settings, parameters, 0.01, "cpu", peak_rest=0.002)
    names = {id(p): name for name, p in model.student.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    ends = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert taken == {f"blocks.{i}.{end}.weight" for i in range(12) for end in ends}
    rest = [p for group in adamw.param_groups for p in group["params"]]
    assert len(taken) + len(rest) == len(parameters)
    train.set_learning_rate([muon, adamw], 0.5)
    assert [each.param_groups[0]["lr"] for each in (muon, adamw)] == [0.005, 0.001]
    with pytest.raises(UserError, match="adamw or sgd"):
        vector = torch.nn.Parameter(torch.zeros(3))
        train.make_optimizers(settings, [vector], 1, "cpu", peak_rest=1)


def test_weight_decay_is_that_of_every_parameter():
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 3), (3,))]
    for optimizer in ("muon", "adamw", "sgd"):
        for decay in (0.0, 0.1):
            settings = train.Settings(optimizer=optimizer, weight_decay=decay)
            made = train.make_optimizers(settings, parameters, 0.01, "cpu", peak_rest=0.002)
            groups = [group for each in made for group in each.param_groups]
            assert {group["weight_decay"] for group in groups} == {decay}


class RecordsBatches(train.GraphedStep):
    """With a list of sums in place of a graph, which only a GPU has."""

    def on_another_stream(self):
        return self.take_step(self.images, self.t)

    def record(self):
        self.graph = SimpleNamespace(replay=self.replay)
        self.replayed = []

    def replay(self):
        self.terms = {"loss": self.images.sum() + self.t[0].sum()}
        self.replayed.append(int(self.terms["loss"]))


def test_a_graph_is_for_full_batches_after_the_first():
    one_by_one = []

    def step(images, t):
        one_by_one.append(int(images.sum() + t[0].sum()))
        return {"loss": images.sum() + t[0].sum()}

    graphed = RecordsBatches(step, [], batch_size=2)
    sizes = (2, 2, 1, 2, 2, 1, 2)
    for i, size in enumerate(sizes):
        images = torch.full((size,), 10 * i)
        assert graphed(images, {0: torch.ones(1)})["loss"] == size * 10 * i + 1
    assert one_by_one == [1, 21, 21, 61, 51]
    assert graphed.replayed == [81, 121]


@pytest.mark.parametrize(
    "device, options, graphed",
    [
        ("cuda", {}, True),
        ("cuda:1", {}, True),
        ("cpu", {}, False),
        ("cuda", {"eager": True}, False),
        ("cuda", {"deterministic": True}, False),
    ],
)
def test_where_steps_are_graphs(device, options, graphed):
    run = train.Training.__new__(train.Training)
    run.device, run.settings, run.optimizers = device, train.Settings(**options), []
    assert isinstance(run.choose_step(), train.GraphedStep) == graphed


def test_a_graph_is_recorded_on_the_device_that_was_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(train.runs, "pick_device", lambda device: device)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    for device in ("cpu", "cuda", "cuda:1"):
        train.set_up(train.Settings(device=device, precision="fp32"))
    assert asked == [0, 1]


def test_a_run_that_has_ended_takes_no_memory(tmp_path):
    make_category(tmp_path / "own", train=3)
    data = ["--dataset", "folder", "--data-root", str(tmp_path / "own")]
    options = ["--weights", "demo_teacher", "--epochs", "1", "--out", str(tmp_path)]
    settings, _, _ = train.parse([*data, *options])
    settings, device = train.set_up(settings)
    teacher = train.runs.load_teacher(train.ensure_weights(settings.weights))
    gc.collect()
    gc.disable()
    try:
        run = train.Training(settings, teacher, device, resume=False)
        run.folder.mkdir(parents=True)
        run.build_model()
        take_step = run.choose_step()
        features = weakref.ref(run.cache.store)
        del run, take_step
        assert features() is None
    finally:
        gc.enable()


def test_the_learning_rate_is_set_where_a_graph_reads_it():
    parameters = [torch.nn.Parameter(torch.zeros(3))]
    plain, graphed = (torch.optim.SGD(parameters, lr=0.5) for _ in range(2))
    tensor = torch.tensor(0.5)
    graphed.param_groups[0]["lr"] = tensor
    train.set_learning_rate([plain, graphed], 0.5)
    assert plain.param_groups[0]["lr"] == 0.25
    assert graphed.param_groups[0]["lr"] is tensor and tensor == 0.25


@pytest.mark.parametrize(
    "width, changes, peaks",
    [
        (192, {"optimizer": "adamw"}, (1e-3, None)),
        (768, {"optimizer": "adamw"}, (2.5e-4, None)),
        (768, {"optimizer": "sgd", "lr": 0.5}, (0.5, None)),
        (192, {}, (8e-3, 8e-3)),
        (768, {}, (4e-3, 2.5e-4)),
        (768, {"lr": 0.5}, (0.5, 2.5e-4)),
        (768, {"lr": 1e-4}, (1e-4, 1e-4)),
        (768, {"lr": 0.5, "lr_rest": 0.25}, (0.5, 0.25)),
    ],
)
def test_peak_learning_rates(width, changes, peaks):
    assert train.peak_learning_rates(train.Settings(**changes), width) == peaks


def test_a_step_follows_the_gradient_of_the_whole_loss():
    model = distillation(lam=3.0)
    t = model.teacher_features(IMAGES)
    model.update_anchor(t)
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    loss = model.loss_terms(IMAGES, t)["loss"]
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
    run = train.Training.__new__(train.Training)
    run.settings, run.model, run.parameters = train.Settings(), model, parameters
    run.loss_terms, run.optimizers = model.loss_terms, [torch.optim.SGD(parameters, lr=0.5)]
    run.take_step(IMAGES, t)
    for p, old, gradient in zip(parameters, before, gradients, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * gradient)


def test_the_defaults_are_the_recipes():
    settings, _, _ = train.parse(["--dataset", "mvtec", "--category", "bottle"])
    expected = {
        "weights": "vit_base_patch16_224",
        "optimizer": "muon",
        "momentum": 0.9,
        "weight_decay": 0,
        "warmup": 20,
        "decay": "linear",
        "clip_grad": 0,
        "distance": "unit",
        "anchor": "mean",
        "pos_embed": "copy",
        "without": None,
        "holdout": 0.1,
    }
    assert {name: getattr(settings, name) for name in expected} == expected
    assert (train.EPOCHS, train.LEAST_STEPS) == (28, 400)


def test_what_may_differ_between_the_parts_of_a_run():
    values = json.loads(json.dumps(dataclasses.asdict(train.Settings())))  # as in a file
    free = {name for name in values if not runs.differences({**values, name: "other"}, values)}
    assert free == {
        "out",
        "device",
        "compile",
        "eager",
        "cache",
        "deterministic",
        "checkpoint_every",
    }
