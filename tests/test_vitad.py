"""The equations of vitad.py against naive NumPy loops in float64, written from the paper; and who learns from what."""
import shutil
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import perturb, tiny_vit

import vitad

LAYERS, B, T, D, K = (3, 6, 9, 11), 3, 9, 5, 4
READINGS = ("unit", "l2", "mse")


def features(seed):
    generator = torch.Generator().manual_seed(seed)
    return {c: torch.randn(B, T, D, dtype=torch.float64, generator=generator) for c in LAYERS}


@pytest.fixture
def t():
    return features(0)


@pytest.fixture
def s():
    return features(1)


@pytest.fixture
def anchor():
    return torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def naive_norm(x, y, reading):
    """||x - y||_2 of two vectors, in its three readings, one channel at a time."""
    x, y = [float(v) for v in x], [float(v) for v in y]
    if reading == "unit":
        length_x, length_y = sum(v * v for v in x) ** 0.5, sum(v * v for v in y) ** 0.5
        x, y = [v / length_x for v in x], [v / length_y for v in y]
    square = sum((a - b) ** 2 for a, b in zip(x, y))
    return square / len(x) if reading == "mse" else square ** 0.5


def naive_cosine(x, y):
    return float(np.dot(x, y)) / (float(np.dot(x, x)) ** 0.5 * float(np.dot(y, y)) ** 0.5)


def naive_diff(t, s, reading):
    return naive_norm(t, s, reading) + 1 - naive_cosine(t, s)


@pytest.mark.parametrize("reading", READINGS)
def test_eq2_anchor_loss(s, anchor, reading):
    expected = np.mean([naive_norm(s[11][b, 0].numpy(), anchor.numpy(), reading) for b in range(B)])
    assert vitad.anchor_loss(s[11][:, 0], anchor, reading).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_eq3_distill_loss(t, s, reading):
    expected = 0
    for c in LAYERS:
        norms = [naive_norm(t[c][b, p].numpy(), s[c][b, p].numpy(), reading) for b in range(B) for p in range(T)]
        cosines = [1 - naive_cosine(t[c][b, p].numpy(), s[c][b, p].numpy()) for b in range(B) for p in range(T)]
        expected += np.mean(norms) + np.mean(cosines)
    assert vitad.distill_loss(t, s, reading).item() == pytest.approx(expected, rel=1e-12)


def naive_gram(x, y, reading):
    g = np.zeros((T, T))
    for i in range(T):
        for j in range(T):
            g[i, j] = naive_cosine(x[i], y[j]) if reading == "unit" else float(np.dot(x[i], y[j])) / D
    return g


@pytest.mark.parametrize("reading", READINGS)
def test_eq4_gram(t, reading):
    g = vitad.gram(t[3], t[6], reading)
    assert g.shape == (B, T, T)
    for b in range(B):
        np.testing.assert_allclose(g[b].numpy(), naive_gram(t[3][b].numpy(), t[6][b].numpy(), reading), rtol=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_eq5_gram_loss(t, s, reading):
    norms = []
    for c1, c2 in [(3, 6), (3, 9), (3, 11), (6, 9), (6, 11), (9, 11)]:
        for b in range(B):
            difference = (naive_gram(t[c1][b].numpy(), t[c2][b].numpy(), reading)
                          - naive_gram(s[c1][b].numpy(), s[c2][b].numpy(), reading))
            square = sum(v * v for v in difference.flat) / (T * T)
            norms.append(square if reading == "mse" else square ** 0.5)
    assert vitad.gram_loss(t, s, reading).item() == pytest.approx(np.mean(norms), rel=1e-12)


def test_eq6_total_loss():
    assert vitad.total_loss(2.0, 0.25, 0.5, lam=3.0) == 2.0 + 3.0 * (0.25 + 0.5)
    assert vitad.total_loss(2.0, 0.25, 0.5) == 2.75  # the paper's lambda is 1


@pytest.mark.parametrize("reading", READINGS)
def test_eq7_score_a(t, s, anchor, reading):
    of_teacher, of_student = vitad.score_a(t[11][:, 0], s[11][:, 0], anchor, reading)
    for b in range(B):
        assert of_teacher[b].item() == pytest.approx(naive_norm(t[11][b, 0].numpy(), anchor.numpy(), reading), rel=1e-12)
        assert of_student[b].item() == pytest.approx(naive_norm(s[11][b, 0].numpy(), anchor.numpy(), reading), rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_eq8_diff(t, s, reading):
    d = vitad.diff(t[9], s[9], reading)
    assert d.shape == (B, T)
    for b in range(B):
        for p in range(T):
            assert d[b, p].item() == pytest.approx(naive_diff(t[9][b, p].numpy(), s[9][b, p].numpy(), reading), rel=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_eq9_score_d(t, s, reading):
    of_class_token, of_patches = vitad.score_d({c: vitad.diff(t[c], s[c], reading) for c in LAYERS}, K)
    for b in range(B):
        d = {c: [naive_diff(t[c][b, p].numpy(), s[c][b, p].numpy(), reading) for p in range(T)] for c in LAYERS}
        assert of_class_token[b].item() == pytest.approx(sum(d[c][0] for c in LAYERS), rel=1e-12)  # it stands first and apart
        assert of_patches[b].item() == pytest.approx(sum(sum(sorted(d[c][1:], reverse=True)[:K]) / K for c in LAYERS), rel=1e-12)


def test_eq10_score_and_delta():
    assert vitad.score(torch.tensor([5.0]), torch.tensor([2.0]), torch.tensor([0.5])).item() == 7.5
    scores = torch.arange(101.0)
    assert vitad.calibrate(scores, 0.99).item() == 99 and vitad.calibrate(scores, 0.5).item() == 50


@pytest.mark.parametrize("reading", READINGS)
def test_heat_is_diff_of_the_patches_summed_over_the_layers(t, s, reading):
    result = vitad.heat({c: vitad.diff(t[c], s[c], reading) for c in LAYERS})
    assert result.shape == (B, T - 1)
    for b in range(B):
        for p in range(1, T):
            expected = sum(naive_diff(t[c][b, p].numpy(), s[c][b, p].numpy(), reading) for c in LAYERS)
            assert result[b, p - 1].item() == pytest.approx(expected, rel=1e-12)


def test_calibration_of_the_heat():
    """Usual: the median patch. Hot: where 99 % of the images' hottest patches end."""
    model, heat = distillation(), torch.zeros(101, 5)
    heat[:, 3] = torch.arange(101.0)  # of 101 images one patch each is warm
    model.calibrate({"score": torch.arange(101.0) / 2, "heat": heat})
    assert model.delta.item() == 49.5 and model.heat_scale.tolist() == [0, 99]
    assert {"delta", "heat_scale"} <= set(model.learned_state())


def test_unit_reading_does_not_see_scale(t, s):
    bigger = {c: 17 * s[c] for c in LAYERS}
    for function in (vitad.distill_loss, vitad.gram_loss):
        assert function(t, bigger).item() == pytest.approx(function(t, s).item(), rel=1e-12)
        assert function(t, bigger, "l2").item() != pytest.approx(function(t, s, "l2").item(), rel=1e-2)


@pytest.mark.parametrize("reading", READINGS)
def test_gradients(reading):
    generator = torch.Generator().manual_seed(3)
    t = {c: torch.randn(2, 3, 4, dtype=torch.float64, generator=generator) for c in LAYERS}
    s = [torch.randn(2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in LAYERS]
    anchor = torch.randn(4, dtype=torch.float64, generator=generator)

    def loss(*s):
        s = dict(zip(LAYERS, s))
        return vitad.total_loss(vitad.distill_loss(t, s, reading), vitad.anchor_loss(s[11][:, 0], anchor, reading),
                                vitad.gram_loss(t, s, reading))

    assert torch.autograd.gradcheck(loss, s)


@pytest.mark.parametrize("reading", READINGS)
def test_gradient_is_finite_where_student_equals_teacher(t, reading):
    s = {c: t[c].clone().requires_grad_() for c in LAYERS}
    loss = vitad.distill_loss(t, s, reading) + vitad.gram_loss(t, s, reading) + vitad.anchor_loss(s[11][:, 0], t[11][0, 0], reading)
    loss.backward()
    assert all(x.grad.isfinite().all() for x in s.values())


# ------------------------------------------------------------------------------------------------------------------ anchor

def test_eq1_cumulative_mean_weighs_every_image_the_same():
    cls = torch.randn(10, D)
    anchor = vitad.Anchor(D)
    for batch in cls.split(4):  # 4, 4 and 2 images
        anchor.update(batch)
    torch.testing.assert_close(anchor.value, cls.mean(dim=0))


def test_eq1_moving_average_is_not_biased_towards_its_zero_start():
    batches, decay = torch.randn(5, 4, D, dtype=torch.float64), 0.9
    anchor = vitad.Anchor(D, "ema", decay).double()
    weights = []
    for n, batch in enumerate(batches):
        anchor.update(batch)
        weights = [w * decay for w in weights] + [1 - decay]
        expected = sum(w * b.mean(dim=0) for w, b in zip(weights, batches)) / sum(weights)
        torch.testing.assert_close(anchor.value, expected)


# ------------------------------------------------------------------------------------------------------------ Distillation

IMAGES = torch.randint(0, 256, (5, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))


def distillation(**options):
    torch.manual_seed(0)
    return vitad.Distillation(tiny_vit(), **options)


def learn(model):
    """The first step of training up to the loss: the teacher's features, and the anchor from them."""
    t = model.teach(IMAGES)
    model.update_anchor(t)
    return t


def test_only_the_student_learns():
    model = distillation()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    terms = model.loss_terms(IMAGES, learn(model))
    terms["loss"].backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert all(p.grad is None for p in model.teacher.parameters()) and not model.anchor.value.requires_grad
    assert not any(key.startswith("teacher.") for key in changed)
    assert "student.pos_embed" not in changed and "student.patch_embed.proj.weight" in changed and "student.cls_token" in changed
    assert all(f"student.blocks.{i}.attn.qkv.weight" in changed for i in range(12))


def test_loss_terms_are_eq6_of_the_features():
    model = distillation(lam=0.5, layers=(2, 5), reading="mse")
    t = learn(model)
    terms, s = model.loss_terms(IMAGES, t), model.features(model.student, IMAGES)
    torch.testing.assert_close(model.anchor.value, t[5][:, 0].mean(dim=0))
    torch.testing.assert_close(terms["distill"], vitad.distill_loss(t, s, "mse"))
    torch.testing.assert_close(terms["anchor"], vitad.anchor_loss(s[5][:, 0], t[5][:, 0].mean(dim=0), "mse"))
    torch.testing.assert_close(terms["gram"], vitad.gram_loss(t, s, "mse"))
    torch.testing.assert_close(terms["loss"], terms["distill"] + 0.5 * (terms["anchor"] + terms["gram"]))
    assert not any(x.requires_grad for x in t.values()) and all(x.requires_grad for x in s.values())


def test_position_embedding_strategies():
    copied, learnt = distillation(pos_embed="copy"), distillation(pos_embed="learn")
    assert torch.equal(copied.student.pos_embed, copied.teacher.pos_embed) and not copied.student.pos_embed.requires_grad
    assert not torch.equal(learnt.student.pos_embed, learnt.teacher.pos_embed) and learnt.student.pos_embed.requires_grad


def test_student_is_random_and_has_the_teachers_architecture():
    model = distillation()
    assert model.student.config == model.teacher.config and model.student.head is None
    for key, value in model.student.named_parameters():
        if key.endswith("weight") and value.ndim > 1:
            assert not torch.equal(value, model.teacher.state_dict()[key])
            assert 0.015 < value.std() < 0.025


def test_scores_are_eq10_of_the_features():
    model = distillation(top_k=7)
    t = learn(model)
    parts = model.scores(IMAGES)
    with torch.no_grad():
        s = model.features(model.student, IMAGES)
    anchor = model.anchor.value
    d = {c: vitad.diff(t[c], s[c]) for c in t}
    torch.testing.assert_close(parts["score_d"], sum(vitad.score_d(d, 7)))
    torch.testing.assert_close(parts["score_d_cls"], sum(x[:, 0] for x in d.values()))
    torch.testing.assert_close(parts["score_a_teacher"], vitad.distance(t[11][:, 0], anchor))
    torch.testing.assert_close(parts["score_a_student"], vitad.distance(s[11][:, 0], anchor))
    torch.testing.assert_close(parts["score"], parts["score_d"] + parts["score_a_teacher"] + parts["score_a_student"])
    torch.testing.assert_close(parts["heat"], vitad.heat(d))


def test_scores_do_not_depend_on_the_batch():
    model = distillation()
    learn(model)
    together = model.scores(IMAGES)["score"]
    alone = torch.cat([model.scores(image[None])["score"] for image in IMAGES])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_learned_state_carries_all_that_scoring_needs():
    model, other = distillation(), distillation()
    perturb(model.student, seed=9)
    learn(model)
    model.delta.fill_(3.5)
    state = model.learned_state()
    assert not any(key.startswith("teacher.") for key in state)
    other.load_learned_state(state)
    assert other.delta == 3.5
    assert torch.equal(other.scores(IMAGES)["score"], model.scores(IMAGES)["score"])
    del state["anchor.running"]
    with pytest.raises(RuntimeError, match="anchor.running"):
        other.load_learned_state(state)


def test_training_lowers_the_loss():
    model = distillation()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    t, losses = learn(model), []
    for _ in range(30):
        terms = model.loss_terms(IMAGES, t)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.6 * losses[0]


def test_pairs_of_the_default_layers():
    assert vitad.LAYERS == LAYERS and len(list(combinations(vitad.LAYERS, 2))) == 6 and vitad.TOP_K == 20 and vitad.LAM == 1


# ------------------------------------------------------------------------------------------------------------------ speed

@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("where", ["host", "disk", "off"])
def test_kept_features_are_those_of_the_teacher(where, precision, tmp_path):
    model = distillation(precision=precision)
    cache = vitad.TeacherCache(model, 7, "cpu", tmp_path, where)
    assert cache.bytes == 7 * 4 * 50 * 32 * (4 if precision == "fp32" else 2)
    order = torch.tensor([6, 1, 4, 0, 3])
    first = cache(order, IMAGES)
    expected = model.teach(IMAGES)
    for c in LAYERS:
        assert torch.equal(first[c], expected[c] if precision == "fp32" else expected[c].bfloat16().float())
    calls = []
    model.teacher.register_forward_hook(lambda *_: calls.append(1))
    again = cache(order.flip(0), IMAGES.flip(0))
    assert all(torch.equal(again[c], first[c].flip(0)) for c in LAYERS) and len(calls) == (where == "off")
    unseen = cache(torch.tensor([0, 2]), IMAGES[[3, 0]])  # one of them known: the batch is computed
    torch.testing.assert_close(unseen[11], first[11][[3, 0]], rtol=1e-2 if precision == "bf16" else 1e-5, atol=1e-2 if precision == "bf16" else 1e-5)
    assert len(calls) == 1 + (where == "off")


def test_the_cache_leaves_half_of_what_is_free(monkeypatch, tmp_path):
    model, need = distillation(), 7 * 4 * 50 * 32 * 4
    for free, expected in (({"device": 2 * need, "host": 0, "disk": 0}, "device"), ({"device": 2 * need - 1, "host": 2 * need, "disk": 0}, "host"),
                           ({"device": 0, "host": need, "disk": 2 * need}, "disk"), ({"device": 0, "host": 0, "disk": need}, "off")):
        monkeypatch.setattr(vitad, "free_bytes", lambda place, *_, free=free: {**free, "off": float("inf")}[place])
        assert vitad.TeacherCache(model, 7, "cpu", tmp_path).where == expected
    assert not list(tmp_path.iterdir())  # the file went with the cache


def test_bf16_keeps_weights_losses_and_scores_in_float32():
    exact, model = distillation(), distillation(precision="bf16")
    terms, expected = model.loss_terms(IMAGES, learn(model)), exact.loss_terms(IMAGES, learn(exact))
    assert all(value.dtype == torch.float32 for value in terms.values()) and all(p.dtype == torch.float32 for p in model.parameters())
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01)
        assert name == "anchor" or not torch.equal(value, expected[name])  # it did run in bfloat16
    terms["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.student.blocks.parameters())
    assert model.scores(IMAGES)["score"].dtype == torch.float32


def test_terms_left_out_of_the_loss():
    for without in (("anchor",), ("gram",), ("anchor", "gram")):
        model, whole = distillation(without=without), distillation()
        t = learn(model)
        learn(whole)
        terms, all_terms = model.loss_terms(IMAGES, t), whole.loss_terms(IMAGES, t)
        assert set(all_terms) - set(terms) == set(without)
        kept = {name: all_terms[name] for name in ("distill", "anchor", "gram") if name not in without}
        assert {name: value.item() for name, value in terms.items() if name != "loss"} == {name: value.item() for name, value in kept.items()}
        torch.testing.assert_close(terms["loss"], sum(kept.values()))


def test_heat_of_coarser_layers_is_enlarged():
    fine, coarse = torch.rand(2, 1 + 16), torch.rand(2, 1 + 4)
    heat = vitad.heat({0: fine, 1: coarse})
    enlarged = torch.nn.functional.interpolate(coarse[:, 1:].view(2, 1, 2, 2), (4, 4), mode="bilinear")
    torch.testing.assert_close(heat, fine[:, 1:] + enlarged.view(2, 16))
    assert torch.equal(vitad.heat({0: fine, 1: fine}), 2 * fine[:, 1:])


def test_compiled_losses_are_the_eager_ones():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    model = vitad.Distillation(tiny_vit(depth=2), layers=(0, 1))  # fewer blocks compile sooner
    t = learn(model)
    eager, compiled = model.loss_terms(IMAGES, t), torch.compile(model.loss_terms)(IMAGES, t)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)
