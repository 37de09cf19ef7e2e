"""Feature-constrained distillation for visual anomaly detection: the method, Eqs. 1 to 10 in the paper's order.

A frozen ImageNet teacher T and a student S of the same architecture see the same normal images. S learns to give T's features, to
stay near the mean class token of T (the anchor), and to keep the relations between T's layers (the Gram constraint). On an image
unlike the training images the two disagree, and both move away from the anchor: that is the anomaly score.

Shapes: B images, T = 1 + P tokens (class token first), D width. `t` and `s` are the features of teacher and student,
{c: (B, T, D)} for the tapped layers c. Every loss is a mean over the batch; every score is (B,), higher = more anomalous.
"""
import math
import os
import shutil
import tempfile
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vit import load_vit, pick_device
from weights.download import weights_file
from weights.files import read_config

LAYERS = (3, 6, 9, 11)  # group_c of section 4.1, counted from 0: Eq. 4 counts c from 0 to M - 1
TOP_K = 20  # k of Eq. 9, section 4.1
LAM = 1.0  # lambda of Eq. 6, section 4.1


def distance(x, y, reading="unit"):
    """||x - y||_2 of Eqs. 2, 3, 7 and 8: (..., D), (..., D) -> (...).

    The paper takes the norm of raw features and leaves their scale open; the three readings:
    unit: L2 of the difference of normalised features, so between 0 and 2, and the same for every layer and teacher (default);
    l2:   L2 of the difference, the letter; grows with the features' norm;
    mse:  mean square over the D channels.
    The gradient at x = y is 0 under all three.
    """
    if reading == "unit":
        x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
    if reading == "mse":
        return (x - y).square().mean(dim=-1)
    return torch.linalg.vector_norm(x - y, dim=-1)


class Anchor(nn.Module):
    """Eq. 1: anchor = 1/n_d sum_j T_phi_c^cls(d_j), the mean class token (D,) of the teacher over the training images, on the fly.

    mean: cumulative, every image with the same weight; after one pass over the training set it is Eq. 1 exactly (default).
    ema:  exponential moving average over batches, value = m / (1 - decay^n) so that the zero start leaves no bias.
    State (saved with the model): the running value and how many images (mean) or batches (ema) it has seen.
    """

    def __init__(self, width, kind="mean", decay=0.99):
        super().__init__()
        self.kind, self.decay = kind, decay
        self.register_buffer("running", torch.zeros(width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, cls):
        """Take in the teacher's class tokens of one batch, (B, D)."""
        if self.kind == "mean":
            self.count += len(cls)
            self.running += (cls - self.running).sum(dim=0) / self.count
        else:
            self.count += 1
            self.running += (1 - self.decay) * (cls.mean(dim=0) - self.running)

    @property
    def value(self):
        """The anchor (D,); no gradient flows into it."""
        return self.running if self.kind == "mean" else self.running / (1 - self.decay ** self.count.double())


def anchor_loss(s_cls, anchor, reading="unit"):
    """Eq. 2: L_anchor = ||S_phi_c^cls - anchor||_2, c the last tapped layer; (B, D), (D,) -> scalar, mean over the batch."""
    return distance(s_cls, anchor, reading).mean()


def distill_loss(t, s, reading="unit"):
    """Eq. 3: L_distill = sum_c [ ||T_phi_c - S_phi_c||_2 + sum_p (1 - <T_phi_cp, S_phi_cp> / (|T_phi_cp| |S_phi_cp|)) ] -> scalar.

    Both terms are taken per token, which makes the bracket the Diff of Eq. 8; the layers are summed.
    Deviation: a mean over tokens (class token included) and batch, where Eq. 3 sums over p; a sum over 197 tokens would be 197 times
    larger and leave lambda = 1 of Eq. 6 no weight.
    """
    return sum(diff(t[c], s[c], reading).mean() for c in t)


def gram(phi1, phi2, reading="unit"):
    """Eq. 4: G = phi_c1 (phi_c2)^T, the relation of every token of layer c1 to every token of layer c2; (B, T, D) twice -> (B, T, T).

    Deviation: of normalised tokens under `unit` (so cosines, between -1 and 1; with raw tokens the paper's learning rate diverges),
    divided by D otherwise, so that the width does not set the scale.
    """
    if reading == "unit":
        return F.normalize(phi1, dim=-1) @ F.normalize(phi2, dim=-1).mT
    return phi1 @ phi2.mT / phi1.shape[-1]


def gram_loss(t, s, reading="unit"):
    """Eq. 5: L_Gram = ||G_T - G_S||_2, averaged over the pairs c1 < c2 of the tapped layers (six pairs of four) -> scalar.

    Deviation: the norm of a T x T matrix is the root mean square of its entries (mean square under `mse`), 1/T of the Frobenius norm,
    so that it does not grow with the number of tokens; the mean over the batch is taken last.
    """
    total, pairs = 0, list(combinations(t, 2))
    for c1, c2 in pairs:
        difference = (gram(t[c1], t[c2], reading) - gram(s[c1], s[c2], reading)).flatten(1)  # (B, T * T)
        root_mean_square = torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5
        total = total + (root_mean_square.square() if reading == "mse" else root_mean_square).mean()
    return total / len(pairs)


def total_loss(distill, anchor=0, gram=0, lam=LAM):
    """Eq. 6: L = L_distill + lambda (L_anchor + L_Gram); scalars, 0 for a term left out."""
    return distill + lam * (anchor + gram)


def score_a(t_cls, s_cls, anchor, reading="unit"):
    """Eq. 7: S_A = ||T_phi_c^cls - anchor||_2 + ||S_phi_c^cls - anchor||_2 -> its two terms apart, (B,) each.

    Apart, because the teacher's term needs no training: it is the baseline that a student has to beat.
    """
    return distance(t_cls, anchor, reading), distance(s_cls, anchor, reading)


def diff(t, s, reading="unit"):
    """Eq. 8: Diff_cp = ||T_phi_cp - S_phi_cp||_2 + 1 - cos(T_phi_cp, S_phi_cp), of one layer; (B, T, D) twice -> (B, T)."""
    return distance(t, s, reading) + 1 - F.cosine_similarity(t, s, dim=-1)


def score_d(d, top_k=TOP_K):
    """Eq. 9: S_D = sum_c ( Diff_c,cls + AvgTopk_p(Diff_c) ), the k hottest patches p -> two terms apart, (B,); d = {c: Diff_c (B, 1 + P)}."""
    return sum(x[:, 0] for x in d.values()), sum(x[:, 1:].topk(top_k, dim=1).values.mean(dim=1) for x in d.values())


def score(score_d, score_a_teacher, score_a_student):
    """Eq. 10: Score = S_D + S_A, (B,); an image is anomalous iff Score >= delta."""
    return score_d + score_a_teacher + score_a_student


def heat(d):
    """Where the score comes from: Diff of Eq. 8 of each patch, summed over the layers (a CNN's coarser ones enlarged to the finest) -> (B, P)."""
    maps = [x[:, None, 1:].unflatten(2, (math.isqrt(x.shape[1] - 1), -1)) for x in d.values()]  # (B, 1, side, side)
    finest = max(x.shape[-1] for x in maps)
    return sum(x if x.shape[-1] == finest else F.interpolate(x, (finest, finest), mode="bilinear") for x in maps).flatten(1)


def calibrate(normal_scores, quantile=0.99):
    """delta of Eq. 10: the quantile of the scores (n,) of normal images that this share of them stays below -> scalar."""
    return torch.quantile(normal_scores, quantile)


class Distillation(nn.Module):
    """Teacher, student and anchor: the loss terms of a batch, and the scores of a batch.

    teacher: a ViT, frozen here. The student has its architecture (without head) and random weights, drawn from torch's generator.
    layers: the tapped blocks, ascending; the last one is c of the anchor. reading: of the norm, see `distance`.
    pos_embed: "copy" takes the teacher's position embedding and freezes it, strategy 2 of Fig. 7, the method's; "learn" is strategy 1.
    without: terms of Eq. 6 to leave out, "anchor" and "gram", for ablations.
    precision: "bf16" runs both networks under autocast, master weights in float32; losses and scores are float32 always.
    delta, heat_scale: the threshold of Eq. 10; a patch's usual heat, and what the hottest patch of 99 % of images stays below. NaN before `calibrate`.
    """

    def __init__(self, teacher, layers=LAYERS, reading="unit", pos_embed="copy", anchor="mean", lam=LAM, top_k=TOP_K, precision="fp32",
                 without=()):
        super().__init__()
        self.layers, self.reading, self.lam, self.top_k, self.precision, self.without = tuple(layers), reading, lam, top_k, precision, without
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = type(teacher)(**teacher.config)
        if pos_embed == "copy":
            self.student.pos_embed.data.copy_(teacher.pos_embed)
            self.student.pos_embed.requires_grad_(False)
        self.anchor = Anchor(teacher.config["width"], anchor)
        self.register_buffer("delta", torch.tensor(math.nan))
        self.register_buffer("heat_scale", torch.full((2,), math.nan))

    def learned_state(self):
        """What training made, and scoring needs besides the teacher: the tensors of student, anchor, delta and heat_scale."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("teacher.")}

    def load_learned_state(self, state):
        """The inverse of `learned_state`, strict: every key has to be there and no other."""
        teacher = {f"teacher.{key}": value for key, value in self.teacher.state_dict().items()}
        self.load_state_dict({**teacher, **state}, strict=True)

    def features(self, vit, images):
        """uint8 images (B, 3, s, s) -> features of `vit`, the teacher or the student, float32."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = vit(self.teacher.prepare(images), self.layers)
        return {c: x.float() for c, x in features.items()}

    @torch.no_grad()
    def teach(self, images):
        """uint8 images (B, 3, s, s) -> t, the teacher's features, without gradient; an image's never change, so they may be kept."""
        return self.features(self.teacher, images)

    def update_anchor(self, t):
        """Eq. 1: take in the teacher's class tokens of one batch."""
        self.anchor.update(t[self.layers[-1]][:, 0])

    def loss_terms(self, images, t):
        """The unweighted terms of Eq. 6 and their sum: {"loss", "distill", "anchor", "gram"}, scalars; t = teach(images)."""
        s, last = self.features(self.student, images), self.layers[-1]
        terms = {"distill": distill_loss(t, s, self.reading)}
        if "anchor" not in self.without:
            terms["anchor"] = anchor_loss(s[last][:, 0], self.anchor.value, self.reading)
        if "gram" not in self.without:
            terms["gram"] = gram_loss(t, s, self.reading)
        return {"loss": total_loss(**terms, lam=self.lam), **terms}

    @torch.no_grad()
    def scores(self, images, t=None):
        """uint8 images (B, 3, s, s) -> "score" of Eq. 10 and what it is made of, "score_d", "score_a_teacher", "score_a_student", and "score_d_cls", of
        score_d the class tokens' share, (B,) each; and "heat" of each patch, (B, P). t = teach(images), if known.
        """
        t = self.teach(images) if t is None else t
        s, last = self.features(self.student, images), self.layers[-1]
        d = {c: diff(t[c], s[c], self.reading) for c in t}
        cls, patches = score_d(d, self.top_k)
        of_teacher, of_student = score_a(t[last][:, 0], s[last][:, 0], self.anchor.value, self.reading)
        parts = {"score_d": cls + patches, "score_a_teacher": of_teacher, "score_a_student": of_student}
        return {"score": score(**parts), **parts, "score_d_cls": cls, "heat": heat(d)}

    def calibrate(self, scores):
        """Set delta and heat_scale from `scores` of normal images."""
        self.delta.copy_(calibrate(scores["score"]))
        self.heat_scale.copy_(torch.stack([scores["heat"].median(), calibrate(scores["heat"].amax(dim=1))]))

    @torch.no_grad()
    def yardstick(self, batches):
        """How far training has come, from normal images held out, [(images, t), ...]: two distances to the teacher, (layers,) each.

        Mean cosine distances over the tokens of each tapped layer, 0 to 2, in the same unit for every reading, optimiser and length. First of the
        student; then of the layout, the mean token of each position, which knows what is where and does not look at the image: 1 - R, where R^2 is
        the mean cosine of the tokens at one position in two different images. A student has converged when it is nearer than that at every layer.
        """
        student, tokens, n = 0, dict.fromkeys(self.layers, 0), 0
        for images, t in batches:
            s, n = self.features(self.student, images), n + len(images)
            student = student + torch.stack([(1 - F.cosine_similarity(t[c], s[c], dim=-1)).mean(dim=1).sum() for c in t])
            tokens = {c: tokens[c] + F.normalize(t[c], dim=-1).sum(dim=0) for c in t}  # (T, D)
        cosines = [(x.square().sum(dim=-1) - n) / max(n * (n - 1), 1) for x in tokens.values()]  # (T,) per layer, of two images
        return student / n, torch.stack([(1 - x.clamp(min=0).sqrt()).mean() for x in cosines])


def load(run, weights=None, device=None, precision=None, teachers=None):
    """The trained model of a run folder, ready to score: load(run).scores(images).

    weights: the teacher's file, if not where training found it. device, precision: None takes cuda where there is one, and the run's. teachers: a
    dict that keeps those loaded, by path, from call to call. ValueError or OSError if something is missing or does not fit.
    """
    config = read_config(run)
    settings, expected = config["settings"], config["teacher"]["sha256"]
    path, teachers = weights_file(weights or settings["weights"]), {} if teachers is None else teachers
    if path not in teachers:
        teachers[path] = load_vit(path)
    if teachers[path].sha256 != expected:
        raise ValueError(f"{path}: expected the teacher that {run} was trained with, sha256 {expected[:12]}..., "
                         f"got {teachers[path].sha256[:12]}...: name the right file with --weights")
    model = Distillation(teachers[path], settings["layers"], settings["distance"], settings["pos_embed"], settings["anchor"],
                         settings["lam"], settings["top_k"], precision or settings.get("precision", "fp32"))  # `without` concerns training only
    try:
        model.load_learned_state(load_file(Path(run) / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{Path(run) / 'model.safetensors'}: expected the student, anchor and delta of this run, got a file that does not fit "
                         f"({str(error).splitlines()[0]}): train the run again") from None
    return model.to(pick_device(device, model.precision))


class TeacherCache:
    """The teacher's features of the training images. They never change, since nothing is augmented and the teacher is frozen: the first
    epoch computes them, the others look them up, and a training step costs three forwards (one and the backward) in place of four.

    N x layers x (1 + P) x D values of 4 bytes, or 2 under bf16, are kept in the device's memory, else the host's, else a memory-mapped file in
    `folder` that goes with the run, else not at all: the first that leaves half of what is free. `where` forces one of PLACES.
    """

    PLACES = ("device", "host", "disk", "off")

    def __init__(self, model, images, device, folder, where=None):
        config = model.teacher.config
        self.model, self.dtype = model, torch.bfloat16 if model.precision == "bf16" else torch.float32
        shape = (images, len(model.layers), 1 + config["grid"] ** 2, config["width"])
        self.bytes = math.prod(shape) * self.dtype.itemsize
        self.where = where or next(place for place in self.PLACES if self.bytes <= free_bytes(place, device, folder) / 2)
        self.known = torch.zeros(images, dtype=torch.bool)
        if self.where == "disk":
            with tempfile.NamedTemporaryFile(dir=folder) as file:  # the mapping outlives the name, which is gone even if the run is killed
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.bytes)  # a full disk is an error here, and not a crash later
                self.store = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=self.dtype).view(shape)
        elif self.where != "off":
            self.store = torch.empty(shape, dtype=self.dtype, device=device if self.where == "device" else "cpu")

    def __call__(self, index, images):
        """t of `images`, uint8 (B, 3, s, s), whose places in the training set are `index` (B,), on the CPU."""
        if self.where == "off":
            return {c: x.to(self.dtype).float() for c, x in self.model.teach(images).items()}
        where = index.to(self.store.device)
        if self.known[index].all():
            t = self.store[where].to(images.device, non_blocking=True)  # (B, layers, 1 + P, D)
        else:
            t = torch.stack(list(self.model.teach(images).values()), dim=1).to(self.dtype)
            self.store[where], self.known[index] = t.to(self.store.device), True
        return dict(zip(self.model.layers, t.float().unbind(1)))


def free_bytes(place, device, folder=None):
    """Free memory of the device, the host, or the disk under `folder`; "off" needs none."""
    if place == "device":
        return torch.cuda.mem_get_info(device)[0] if "cuda" in device else 0  # the CPU's memory is the host's
    if place == "host":
        known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ())
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 8 << 30
    return shutil.disk_usage(folder).free if place == "disk" else math.inf
