"""vitad.py: each equation against naive NumPy loops in float64, written from the paper.

And the model around them: who learns from what, what is kept, and what bf16 leaves in float32.
"""

from itertools import combinations

import numpy as np
import pytest
import torch

import vitad
from conftest import perturb, tiny_vit

LAYERS, B, T, D, K = (3, 6, 9, 11), 3, 10, 5, 4
READINGS = ("unit", "l2", "mse")

# ---------------------------------------------------------------------------------- Eqs. 2 to 10


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


def close(expected):
    return pytest.approx(expected, rel=1e-12)


def naive_norm(x, y, reading):
    """||x - y||_2 of two vectors, in its three readings, one channel at a time."""
    x, y = [float(v) for v in x], [float(v) for v in y]
    if reading == "unit":
        length_x, length_y = sum(v * v for v in x) ** 0.5, sum(v * v for v in y) ** 0.5
        x, y = [v / length_x for v in x], [v / length_y for v in y]
    square = sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    return square / len(x) if reading == "mse" else square**0.5


def naive_cosine(x, y):
    return float(np.dot(x, y)) / (float(np.dot(x, x)) ** 0.5 * float(np.dot(y, y)) ** 0.5)


def naive_diff(t, s, reading):
    return naive_norm(t, s, reading) + 1 - naive_cosine(t, s)


def naive_gram(x, y, reading):
    g = np.zeros((T, T))
    for i in range(T):
        for j in range(T):
            if reading == "unit":
                g[i, j] = naive_cosine(x[i], y[j])
            else:
                g[i, j] = float(np.dot(x[i], y[j])) / D
    return g


@pytest.mark.parametrize("reading", READINGS)
def test_eq2_anchor_loss(s, anchor, reading):
    norms = [naive_norm(s[11][b, 0].numpy(), anchor.numpy(), reading) for b in range(B)]
    loss = vitad.anchor_loss(s[11][:, 0], anchor, reading)
    assert loss.item() == close(np.mean(norms))


@pytest.mark.parametrize("reading", READINGS)
def test_eq3_distill_loss(t, s, reading):
    expected = 0
    for c in LAYERS:
        norms, cosines = [], []
        for b in range(B):
            for p in range(T):
                norms.append(naive_norm(t[c][b, p].numpy(), s[c][b, p].numpy(), reading))
                cosines.append(1 - naive_cosine(t[c][b, p].numpy(), s[c][b, p].numpy()))
        expected += np.mean(norms) + np.mean(cosines)
    assert vitad.distill_loss(t, s, reading).item() == close(expected)


@pytest.mark.parametrize("reading", READINGS)
def test_eq4_gram(t, reading):
    g = vitad.gram(t[3], t[6], reading)
    assert g.shape == (B, T, T)
    for b in range(B):
        expected = naive_gram(t[3][b].numpy(), t[6][b].numpy(), reading)
        np.testing.assert_allclose(g[b].numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("reading", READINGS)
def test_eq5_gram_loss(t, s, reading):
    norms = []
    for c1, c2 in [(3, 6), (3, 9), (3, 11), (6, 9), (6, 11), (9, 11)]:
        for b in range(B):
            gram_t = naive_gram(t[c1][b].numpy(), t[c2][b].numpy(), reading)
            gram_s = naive_gram(s[c1][b].numpy(), s[c2][b].numpy(), reading)
            square = sum(v * v for v in (gram_t - gram_s).flat) / (T * T)
            norms.append(square if reading == "mse" else square**0.5)
    assert vitad.gram_loss(t, s, reading).item() == close(np.mean(norms))


def test_eq5_of_one_layer_is_zero(t, s):
    """There is no pair of layers; and a loss with it has a gradient."""
    assert vitad.gram_loss({3: t[3]}, {3: s[3]}).item() == 0


def test_eq6_total_loss():
    assert vitad.total_loss(2.0, 0.25, 0.5, lam=3.0) == 2.0 + 3.0 * (0.25 + 0.5)
    assert vitad.total_loss(2.0, 0.25, 0.5) == 2.75  # the paper's lambda is 1


@pytest.mark.parametrize("reading", READINGS)
def test_eq7_score_a(t, s, anchor, reading):
    of_teacher, of_student = vitad.score_a(t[11][:, 0], s[11][:, 0], anchor, reading)
    for b in range(B):
        teachers = naive_norm(t[11][b, 0].numpy(), anchor.numpy(), reading)
        students = naive_norm(s[11][b, 0].numpy(), anchor.numpy(), reading)
        assert of_teacher[b].item() == close(teachers)
        assert of_student[b].item() == close(students)


@pytest.mark.parametrize("reading", READINGS)
def test_eq8_diff(t, s, reading):
    d = vitad.diff(t[9], s[9], reading)
    assert d.shape == (B, T)
    for b in range(B):
        for p in range(T):
            expected = naive_diff(t[9][b, p].numpy(), s[9][b, p].numpy(), reading)
            assert d[b, p].item() == close(expected)


def naive_diffs(t, s, b, reading):
    """Diff of every token of image b, {c: [...]}."""
    return {
        c: [naive_diff(t[c][b, p].numpy(), s[c][b, p].numpy(), reading) for p in range(T)]
        for c in LAYERS
    }


@pytest.mark.parametrize("reading", READINGS)
def test_eq9_score_d(t, s, reading):
    diffs = {c: vitad.diff(t[c], s[c], reading) for c in LAYERS}
    s_d = vitad.score_d(diffs, K)
    for b in range(B):
        d = naive_diffs(t, s, b, reading)
        expected = 0
        for c in LAYERS:
            cls, *patches = d[c]  # the class token stands first, and apart
            expected += cls + sum(sorted(patches, reverse=True)[:K]) / K
        assert s_d[b].item() == close(expected)


def test_eq10_score_and_delta():
    assert vitad.score(torch.tensor([5.0]), torch.tensor([2.5])).item() == 7.5
    assert vitad.threshold(torch.arange(1.0, 200.0)).item() == pytest.approx(198)  # 0.99 of 200
    assert vitad.threshold(torch.arange(1.0, 101.0)).item() == pytest.approx(99.99)


# From a printed table of Student's t, one-sided 0.01.
T_TABLE = {2: 6.965, 3: 4.541, 4: 3.747, 5: 3.365, 9: 2.821, 25: 2.485, 60: 2.390}


def test_delta_of_fewer_than_100_images_is_a_bound_for_one_more():
    for df, t in T_TABLE.items():
        assert vitad.quantile_t(df) == pytest.approx(t, rel=0.09 if df == 2 else 0.025)
        assert df < 5 or vitad.quantile_t(df) == pytest.approx(t, rel=0.01)
    scores = [3.0, 5.0, 4.0, 4.5, 3.5, 6.0]
    mean = sum(scores) / 6
    std = (sum((x - mean) ** 2 for x in scores) / 5) ** 0.5
    expected = mean + 3.365 * (1 + 1 / 6) ** 0.5 * std
    assert vitad.threshold(torch.tensor(scores)).item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("n", [6, 27, 99, 100, 250])
def test_one_new_normal_score_in_100_exceeds_delta(n):
    generator = torch.Generator().manual_seed(0)
    scores = 5 + torch.randn(1000, n, generator=generator)
    new = 5 + torch.randn(1000, 200, generator=generator)  # images of each of 1,000 calibrations
    delta = torch.stack([vitad.threshold(x) for x in scores])
    exceeded = (new > delta[:, None]).float().mean().item()
    assert exceeded == pytest.approx(0.01, abs=0.0012)
    plain = (new > scores.quantile(0.99, dim=1)[:, None]).float().mean().item()
    assert plain > 1.2 * exceeded  # what the quantile would do


@pytest.mark.parametrize("reading", READINGS)
def test_heat_is_diff_of_the_patches_summed_over_the_layers(t, s, reading):
    result = vitad.heat({c: vitad.diff(t[c], s[c], reading) for c in LAYERS})
    assert result.shape == (B, T - 1)
    for b in range(B):
        d = naive_diffs(t, s, b, reading)
        for p in range(1, T):
            assert result[b, p - 1].item() == close(sum(d[c][p] for c in LAYERS))


def test_heat_of_coarser_layers_is_enlarged():
    fine, coarse = torch.rand(2, 1 + 16), torch.rand(2, 1 + 4)
    heat = vitad.heat({0: fine, 1: coarse})
    square = coarse[:, 1:].view(2, 1, 2, 2)
    enlarged = torch.nn.functional.interpolate(square, (4, 4), mode="bilinear")
    torch.testing.assert_close(heat, fine[:, 1:] + enlarged.view(2, 16))
    assert torch.equal(vitad.heat({0: fine, 1: fine}), 2 * fine[:, 1:])


def test_unit_reading_does_not_see_scale(t, s):
    bigger = {c: 17 * s[c] for c in LAYERS}
    for function in (vitad.distill_loss, vitad.gram_loss):
        assert function(t, bigger).item() == close(function(t, s).item())
        raw = function(t, s, "l2").item()
        assert function(t, bigger, "l2").item() != pytest.approx(raw, rel=1e-2)


@pytest.mark.parametrize("reading", READINGS)
def test_gradients(reading):
    generator = torch.Generator().manual_seed(3)

    def random(*shape, **options):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, **options)

    t = {c: random(2, 3, 4) for c in LAYERS}
    s = [random(2, 3, 4, requires_grad=True) for _ in LAYERS]
    anchor = random(4)

    def loss(*s):
        s = dict(zip(LAYERS, s, strict=True))
        return vitad.total_loss(
            vitad.distill_loss(t, s, reading),
            vitad.anchor_loss(s[11][:, 0], anchor, reading),
            vitad.gram_loss(t, s, reading),
        )

    assert torch.autograd.gradcheck(loss, s)


@pytest.mark.parametrize("reading", READINGS)
def test_gradient_is_finite_where_student_equals_teacher(t, reading):
    s = {c: t[c].clone().requires_grad_() for c in LAYERS}
    loss = vitad.distill_loss(t, s, reading) + vitad.gram_loss(t, s, reading)
    loss = loss + vitad.anchor_loss(s[11][:, 0], t[11][0, 0], reading)
    loss.backward()
    assert all(x.grad.isfinite().all() for x in s.values())


def test_the_papers_constants():
    assert vitad.LAYERS == LAYERS and len(list(combinations(vitad.LAYERS, 2))) == 6
    assert vitad.TOP_K == 20 and vitad.LAM == 1


# ------------------------------------------------------------------------------------ Eq. 1, anchor


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
    for n, batch in enumerate(batches, start=1):
        anchor.update(batch)
        weights = [w * decay for w in weights] + [1 - decay]
        means = [w * b.mean(dim=0) for w, b in zip(weights, batches[:n], strict=True)]
        torch.testing.assert_close(anchor.value, sum(means) / sum(weights))


# ------------------------------------------------------------------------------------- Distillation

IMAGES = torch.randint(
    0, 256, (5, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)
)


def distillation(**options):
    torch.manual_seed(0)
    return vitad.Distillation(tiny_vit(), **options)


def learn(model):
    """The first step of training up to the loss: the teacher's features, and their anchor."""
    t = model.teacher_features(IMAGES)
    model.update_anchor(t)
    return t


def test_only_the_student_learns():
    model = distillation()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    terms = model.loss_terms(IMAGES, learn(model))
    terms["loss"].backward()
    optimizer.step()
    after = model.state_dict()
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    assert all(p.grad is None for p in model.teacher.parameters())
    assert not model.anchor.value.requires_grad
    assert not any(key.startswith("teacher.") for key in changed)
    assert "student.pos_embed" not in changed
    assert {"student.patch_embed.proj.weight", "student.cls_token"} <= changed
    assert {f"student.blocks.{i}.attn.qkv.weight" for i in range(12)} <= changed


def test_loss_terms_are_eq6_of_the_features():
    model = distillation(lam=0.5, layers=(2, 5), reading="mse")
    t = learn(model)
    terms, s = model.loss_terms(IMAGES, t), model.features(model.student, IMAGES)
    anchor = t[5][:, 0].mean(dim=0)
    expected = {
        "distill": vitad.distill_loss(t, s, "mse"),
        "anchor": vitad.anchor_loss(s[5][:, 0], anchor, "mse"),
        "gram": vitad.gram_loss(t, s, "mse"),
    }
    expected["loss"] = expected["distill"] + 0.5 * (expected["anchor"] + expected["gram"])
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(model.anchor.value, anchor)
    assert not any(x.requires_grad for x in t.values())
    assert all(x.requires_grad for x in s.values())


@pytest.mark.parametrize("without", [("anchor",), ("gram",), ("anchor", "gram")])
def test_terms_left_out_of_the_loss(without):
    model, whole = distillation(without=without), distillation()
    t = learn(model)
    learn(whole)
    terms, all_terms = model.loss_terms(IMAGES, t), whole.loss_terms(IMAGES, t)
    assert set(all_terms) - set(terms) == set(without)
    loss = terms.pop("loss")
    assert {key: x.item() for key, x in terms.items()} == {k: all_terms[k].item() for k in terms}
    torch.testing.assert_close(loss, sum(terms.values()))


def test_position_embedding_strategies():
    copied, learnt = distillation(pos_embed="copy"), distillation(pos_embed="learn")
    assert torch.equal(copied.student.pos_embed, copied.teacher.pos_embed)
    assert not copied.student.pos_embed.requires_grad
    assert not torch.equal(learnt.student.pos_embed, learnt.teacher.pos_embed)
    assert learnt.student.pos_embed.requires_grad


def test_student_is_random_and_has_the_teachers_architecture():
    model = distillation()
    assert model.student.config == model.teacher.config and model.student.head is None
    for key, value in model.student.named_parameters():
        if key.endswith("weight") and value.ndim > 1:
            assert not torch.equal(value, model.teacher.state_dict()[key])
            assert 0.015 < value.std() < 0.025
        if key.endswith("bias"):
            assert (value == 0).all()


@pytest.mark.parametrize("reading", READINGS)
def test_scores_are_eq10_of_the_features(reading):
    model = distillation(top_k=7, reading=reading)
    t = learn(model)
    parts = model.scores(IMAGES)
    with torch.no_grad():
        s = model.features(model.student, IMAGES)
    anchor = model.anchor.value
    d = {c: vitad.diff(t[c], s[c], reading) for c in t}
    expected = {
        "score_d": vitad.score_d(d, 7),
        "score_a_teacher": vitad.distance(t[11][:, 0], anchor, reading),
        "score_a_student": vitad.distance(s[11][:, 0], anchor, reading),
    }
    expected["score"] = sum(expected.values())
    expected["score_d_cls"] = sum(x[:, 0] for x in d.values())
    expected["heat"] = vitad.heat(d)
    torch.testing.assert_close(parts, expected)
    torch.testing.assert_close(model.scores(IMAGES, t), expected)


def test_scores_do_not_depend_on_the_batch():
    model = distillation()
    learn(model)
    together = model.scores(IMAGES)
    alone = torch.cat([model.scores(image[None])["score"] for image in IMAGES])
    torch.testing.assert_close(together["score"], alone, rtol=1e-5, atol=0)
    all_parts = model.compare_all(IMAGES.split(2))
    torch.testing.assert_close(model.scores_of(*all_parts), together, rtol=1e-4, atol=1e-5)


def test_calibration_of_the_heat():
    """Usual: the median patch. Hot: where 99 % of the images' hottest patches end."""
    model, d = distillation(top_k=1), torch.zeros(199, 5)
    assert model.delta.isnan() and model.heat_scale.isnan().all()
    d[:, 3] = torch.arange(1.0, 200.0)  # of each of 199 images one patch is warm
    scores = model.calibrate({11: d}, (torch.zeros(199), torch.ones(199)))
    assert scores["score"].tolist() == list(range(2, 201))
    assert model.delta.item() == pytest.approx(199)
    assert model.heat_scale.tolist() == pytest.approx([0, 198])
    assert {"delta", "heat_scale"} <= set(model.learned_state())


def naive_standardised(image, normals, top_k):
    """[layer][token] of an image and of normal images -> S_D of the standardised Diff."""
    total = 0
    for layer, tokens in enumerate(image):
        deviations = []
        for token, value in enumerate(tokens):
            usual = [normal[layer][token] for normal in normals]
            mean = sum(usual) / len(usual)
            variance = sum((x - mean) ** 2 for x in usual) / (len(usual) - 1)
            deviations.append((value - mean) / variance**0.5)
        hottest = sorted(deviations[1:], reverse=True)[:top_k]
        total += deviations[0] + sum(hottest) / top_k
    return total


def test_standardised_score():
    """Its delta: each normal image by the others. Layers may have different numbers of patches."""
    generator = torch.Generator().manual_seed(0)
    diffs = {c: torch.rand(11, 1 + p, generator=generator).double() for c, p in ((3, 9), (11, 4))}
    images = [[d[i].tolist() for d in diffs.values()] for i in range(11)]
    normals, test = images[:6], images[6:]
    model = distillation(top_k=3).double()
    zeros = (torch.zeros(6), torch.zeros(6))
    model.calibrate({c: d[:6] for c, d in diffs.items()}, zeros)
    score = model.normal.standardised_score_d({c: d[6:] for c, d in diffs.items()}, 3)
    expected = [naive_standardised(image, normals, 3) for image in test]
    assert score.tolist() == pytest.approx(expected)
    of_normals = [
        naive_standardised(image, normals[:i] + normals[i + 1 :], 3)
        for i, image in enumerate(normals)
    ]
    expected = vitad.threshold(torch.tensor(of_normals))
    assert model.normal.delta.item() == pytest.approx(expected.item())
    few = vitad.FEW - 1
    model.calibrate({c: d[:few] for c, d in diffs.items()}, [zero[:few] for zero in zeros])
    assert model.normal is None  # too few to know a deviation

    same = {3: torch.ones(5, 10), 11: torch.ones(5, 5)}  # no deviation at all
    normal = vitad.Standardiser.of(same, 3)
    assert normal.standardised_score_d(same, 3).tolist() == [0] * 5 and normal.delta == 0


def test_delta_standardised_does_not_see_the_scale():
    d = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)).double()
    delta = vitad.Standardiser.of({3: d}).delta.item()
    assert vitad.Standardiser.of({3: 1e-4 * d}).delta.item() == pytest.approx(delta, rel=1e-5)


def test_delta_standardised_is_computed_in_float64():
    """Beside an image far off, the variance of the others is a small difference."""
    d = 0.01 * torch.rand(6, 30, generator=torch.Generator().manual_seed(0))
    d[0] += 30
    delta = vitad.Standardiser.of({3: d.double()}).delta.item()
    assert vitad.Standardiser.of({3: d}).delta.item() == pytest.approx(delta, rel=1e-5)


def test_learned_state_carries_all_that_scoring_needs():
    model, other = distillation(), distillation()
    perturb(model.student, seed=9)
    learn(model)
    model.delta.fill_(3.5)
    assert model.normal is None and "score_d_standardised" not in model.scores(IMAGES)
    other.load_learned_state(model.learned_state())  # a run that too few images calibrated
    assert other.normal is None
    diffs, _ = model.compare_all([IMAGES] * vitad.FEW)
    model.normal = vitad.Standardiser.of(diffs)
    state = model.learned_state()
    assert not any(key.startswith("teacher.") for key in state)
    other.load_learned_state(state)
    assert other.delta == 3.5
    scores, expected = other.scores(IMAGES), model.scores(IMAGES)
    assert scores.keys() == expected.keys() and "score_d_standardised" in scores
    for name, value in expected.items():
        assert torch.equal(scores[name], value), name
    with pytest.raises(RuntimeError, match="no tensor of the teacher, got teacher.cls_token"):
        other.load_learned_state({**state, "teacher.cls_token": torch.zeros(1, 1, 4)})
    del state["anchor.running"]
    with pytest.raises(RuntimeError, match="anchor.running"):
        other.load_learned_state(state)


def test_training_lowers_the_loss():
    model = distillation()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    t, losses = learn(model), []
    for _ in range(30):
        terms = model.loss_terms(IMAGES, t)
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(terms["loss"].item())
    assert losses[-1] < 0.6 * losses[0]


# ------------------------------------------------------------------------------- bf16 and compiling


def test_bf16_keeps_weights_losses_and_scores_in_float32():
    exact, model = distillation(), distillation(precision="bf16")
    terms = model.loss_terms(IMAGES, learn(model))
    expected = exact.loss_terms(IMAGES, learn(exact))
    assert all(value.dtype == torch.float32 for value in terms.values())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, value in terms.items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01)
        assert name == "anchor" or not torch.equal(value, expected[name])  # bfloat16 it was
    terms["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.student.blocks.parameters())
    assert model.scores(IMAGES)["score"].dtype == torch.float32


def test_compiled_losses_are_the_eager_ones(compiled):
    assert compiled.code == 0, compiled.err


def compare_compiled_with_eager():
    """Compiled to code, and captured as one graph. It takes long, and is a process of its own."""
    model = vitad.Distillation(tiny_vit(depth=2), layers=(0, 1))  # fewer blocks compile sooner
    t = learn(model)
    eager = model.loss_terms(IMAGES, t)
    compiled = torch.compile(model.loss_terms, fullgraph=True)(IMAGES, t)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-6)
