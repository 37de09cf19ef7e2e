"""Feature-constrained distillation for visual anomaly detection: Eqs. 1 to 10, in order.

A frozen ImageNet teacher T and a student S of the same architecture see the same normal images. The
student learns the teacher's features, stays near the teacher's mean class token (the anchor), and
keeps the relations between the teacher's layers (the Gram constraint). On an image unlike the
training images the two disagree, and the teacher's class token lies farther from the anchor. The
paper expects the same of the student's (Fig. 2c); here that one hardly moves, see `distill_loss`.
These distances make the anomaly score.

Shapes: B images, 1 + P tokens (class token first), D width. `images` are uint8 (B, 3, h, w), of any
size: `ViT.prepare` resizes them. `t` and `s` are the features of teacher and student,
{c: (B, 1 + P, D)} for the tapped layers c, ascending. Losses are means over the batch. Scores are
(B,), higher = more anomalous.

First come the equations, then `Distillation`, which applies them to a teacher and a student, and
last what is not in the paper.

Deviation: the last batch of an epoch may be smaller, and a mean over it weighs its images more.
"""

import math
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn

LAYERS = (3, 6, 9, 11)  # group_c of section 4.1, counted from 0: Eq. 4 counts c from 0 to M - 1
TOP_K = 20  # k of Eq. 9, section 4.1
LAM = 1.0  # lambda of Eq. 6, section 4.1
READINGS = ("unit", "l2", "mse")  # of the norm, see `distance`; the option is --distance
AVERAGES = ("mean", "ema")  # see `Anchor`
POS_EMBEDS = ("copy", "learn")  # see `Distillation`
# With fewer normal images delta is a guess, and there is no `Standardiser`. The standard deviation
# of five is uncertain by about a third.
FEW = 5
LEAST_STD = 1e-6  # least standard deviation of Diff, in `Standardiser`

# ---------------------------------------------------------------------------- the paper's equations


def distance(x, y, reading="unit"):
    """||x - y||_2, the norm in Eqs. 2, 3, 7 and 8; its reading also sets the scale of 4 and 5.

    (..., D), (..., D) -> (...). The paper writes it for raw features and says nothing of their
    scale. There are three readings:
      unit: of features normalised to length 1, so between 0 and 2 at every layer (default);
      l2:   of the features as they are, the letter of the paper; grows with their length;
      mse:  the mean square over the D channels.
    The gradient at x = y is 0 under all three.

    Deviation: `l2` is what the paper writes. Under `unit` ||x - y|| = sqrt(2 (1 - cos(x, y))), so
    both parts of Eqs. 3 and 8 are functions of a token's cosine, and its length is free. Why `unit`
    is the default: under `mse` S_A hardly changes the score, and under `l2` scores are far above
    those of Fig. 6 (results/recipe.md).
    """
    if reading == "unit":
        x = F.normalize(x, dim=-1)
        y = F.normalize(y, dim=-1)
    if reading == "mse":
        return (x - y).square().mean(dim=-1)
    return torch.linalg.vector_norm(x - y, dim=-1)


class Anchor(nn.Module):
    """Eq. 1: anchor = 1/n_d sum_j T_phi_c^cls(d_j), c the last tapped layer.

    The mean class token (D,) of the teacher over the n_d training images. The paper computes it
    during training, "by a moving average", and says no more of it. Here it is one of:
      mean: every image with the same weight (default). train.py updates it in the first epoch
            only, after which it is exactly Eq. 1; until then Eq. 2 uses the mean so far;
      ema:  exponential moving average over batches, divided by 1 - decay^count, since it starts
            at 0.
    State, saved with the model: `running`, the average, and `count`, the images (mean) or batches
    (ema) seen.

    Deviation: `mean` is no moving average. It stops after the first epoch, since a second one would
    add nothing: the teacher is frozen and nothing is augmented. Under `unit` the anchor is
    normalised where it is compared. So it is the direction of the mean, and not the mean of the
    directions.
    """

    def __init__(self, width, kind="mean", decay=0.99):
        super().__init__()
        self.kind = kind
        self.decay = decay
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
        """The anchor (D,). No gradient flows into it."""
        if self.kind == "mean":
            return self.running
        return self.running / (1 - self.decay ** self.count.double())


def anchor_loss(s_cls, anchor, reading="unit"):
    """Eq. 2: L_anchor = ||S_phi_c^cls - anchor||_2, c the last tapped layer.

    (B, D), (D,) -> scalar, the mean over the batch.
    """
    return distance(s_cls, anchor, reading).mean()


def distill_loss(t, s, reading="unit"):
    """Eq. 3: L_distill = sum_c [ ||T_phi_c - S_phi_c||_2
                                  + sum_p (1 - <T_phi_cp, S_phi_cp> / (|T_phi_cp| |S_phi_cp|)) ].

    t, s -> scalar: the bracket per token is Diff of Eq. 8; the layers are summed.

    Deviation: a mean over tokens (class token included) and batch, where Eq. 3 sums over p; a sum
    over 197 tokens would leave lambda = 1 of Eq. 6 no weight. The first norm has no index p in the
    paper; here it is taken per token, like the cosine.

    A consequence, unlike Fig. 2c of the paper: the class token's share of this mean is 1/197, so
    L_anchor (Eq. 2) outweighs it, and the student's class token becomes the anchor. Diff_11,cls of
    Eq. 9 is then nearly a function of the teacher's distance from the anchor: S_D and S_A are not
    independent.
    """
    return sum(diff(t[c], s[c], reading).mean() for c in t)


def gram(phi1, phi2, reading="unit"):
    """Eq. 4: G = phi_c1 (phi_c2)^T, c1, c2 in [0, M - 1].

    (B, 1 + P, D) twice -> (B, 1 + P, 1 + P): every token of layer c1 against every one of c2.

    Deviation: under `unit` of normalised tokens, so cosines between -1 and 1; with raw tokens
    training diverges at the paper's learning rate. Otherwise divided by D, the width.
    """
    if reading == "unit":
        return F.normalize(phi1, dim=-1) @ F.normalize(phi2, dim=-1).mT
    return phi1 @ phi2.mT / phi1.shape[-1]


def gram_loss(t, s, reading="unit"):
    """Eq. 5: L_Gram = ||G_T - G_S||_2.

    t, s -> scalar: the mean over the pairs c1 < c2 of layers (six pairs of four), then the batch;
    0 with one layer, which has no pair.

    Deviation: Eq. 4 allows every pair of the M layers; here only the tapped layers are paired. The
    paper does not say which norm of a matrix it means; we read it as the Frobenius norm. Here it is
    divided by 1 + P, which is the root mean square of the entries (mean square under `mse`), so
    that it does not grow with the number of tokens.
    """
    pairs = list(combinations(t, 2))
    total = next(iter(t.values())).new_zeros(())
    for c1, c2 in pairs:
        gram_t = gram(t[c1], t[c2], reading)
        gram_s = gram(s[c1], s[c2], reading)
        difference = (gram_t - gram_s).flatten(1)  # (B, (1 + P)^2)
        # Not square().mean().sqrt(), whose gradient at 0 is not finite.
        norm = torch.linalg.vector_norm(difference, dim=1) / difference.shape[1] ** 0.5  # (B,)
        if reading == "mse":
            norm = norm.square()
        total = total + norm.mean()
    return total / max(len(pairs), 1)


def total_loss(l_distill, l_anchor=0, l_gram=0, lam=LAM):
    """Eq. 6: L = L_distill + lambda (L_anchor + L_Gram).

    Scalars -> scalar; 0 stands for a term that is left out.
    """
    return l_distill + lam * (l_anchor + l_gram)


def score_a(t_cls, s_cls, anchor, reading="unit"):
    """Eq. 7: S_A = ||T_phi_c^cls - anchor||_2 + ||S_phi_c^cls - anchor||_2.

    c is the last tapped layer. (B, D), (B, D), (D,) -> its two terms, (B,) each. They are kept
    apart because the teacher's needs no training: it is the baseline that a student has to beat.
    """
    return distance(t_cls, anchor, reading), distance(s_cls, anchor, reading)


def diff(t, s, reading="unit"):
    """Eq. 8: Diff_cp = ||T_phi_cp - S_phi_cp||_2 + 1 - cos(T_phi_cp, S_phi_cp).

    Of one layer: (B, 1 + P, D) twice -> (B, 1 + P).
    """
    return distance(t, s, reading) + 1 - F.cosine_similarity(t, s, dim=-1)


def score_d(diffs, top_k=TOP_K):
    """Eq. 9: S_D = sum_c ( Diff_c,cls + AvgTopk_p(Diff_c) ).

    diffs: {c: Diff_c (B, 1 + P)} -> (B,). AvgTopk is the mean of a layer's k largest patches.
    """
    total = 0
    for d in diffs.values():
        cls = d[:, 0]
        patches = d[:, 1:].topk(top_k, dim=1).values.mean(dim=1)
        total = total + cls + patches
    return total


def score(s_d, s_a):
    """Eq. 10: Score = S_D + S_A; an image is anomalous iff Score >= delta.

    (B,), (B,) -> (B,).
    """
    return s_d + s_a


def threshold(normal_scores):
    """Eq. 10's delta: about one new normal image in 100 scores more. The paper gives no rule.

    (n,), n > 1 -> scalar. The images should be normal ones that did not train the student.
      n >= 100: the score of rank 0.99 (n + 1), interpolated between its neighbours.
      fewer: their 0.99 quantile would be about their maximum, which one new image in n + 1 exceeds.
        That is too many. So the scores are assumed to be normally distributed, and delta is their
        upper 99 % prediction limit, mean + q sqrt(1 + 1/n) std, with q the 0.99 quantile of
        Student's t distribution with n - 1 degrees of freedom.
    """
    n = len(normal_scores)
    if n >= 100:
        return torch.quantile(normal_scores, (0.99 * (n + 1) - 1) / (n - 1))
    return normal_scores.mean() + quantile_t(n - 1) * math.sqrt(1 + 1 / n) * normal_scores.std()


def quantile_t(df):
    """The 0.99 quantile of Student's t distribution, from the normal distribution's (Wallace 1959).

    Within 1 % from df = 5 on; 2 % too large at 3, 8 % at 2, 79 % at 1.
    """
    z = 2.3263 * (8 * df + 3) / (8 * df + 1)
    return math.sqrt(df * math.expm1(z**2 / df))


# --------------------------------------------------------------------- teacher and student together


class Distillation(nn.Module):
    """Teacher, student and anchor: the loss terms of a batch, and the scores of a batch.

    teacher: a ViT, frozen here. The student has its architecture (without head) and random weights.
    layers: the tapped blocks, ascending; the last one is c of the anchor.
    reading: of the norm, see `distance`. lam, top_k: lambda of Eq. 6, k of Eq. 9.
    pos_embed: "copy" is strategy 2 of Fig. 7, the method's: the teacher's position embedding,
        frozen. "learn" is strategy 1: the student trains it like its other weights.
    anchor: see `Anchor`. without: terms of Eq. 6 to leave out, "anchor" or "gram", for ablations.
    precision: "bf16" runs both networks under autocast, but for the patch projection (see
        `vit.PatchEmbed`). Weights are float32; losses and scores are computed in float32 from the
        features. "tf32" is a setting of CUDA, see `runs.set_tf32`.

    `calibrate` sets the rest, by normal images. delta: the threshold of Eq. 10. heat_scale: two
    values, the median heat of all patches, and the `threshold` of the images' largest heats.
    normal: a `Standardiser`; None with fewer than `FEW` images. Until then normal is None, and
    delta and heat_scale are NaN.
    """

    def __init__(
        self,
        teacher,
        layers=LAYERS,
        reading="unit",
        pos_embed="copy",
        anchor="mean",
        lam=LAM,
        top_k=TOP_K,
        precision="fp32",
        without=(),
    ):
        super().__init__()
        assert reading in READINGS and anchor in AVERAGES and pos_embed in POS_EMBEDS
        assert set(without) <= {"anchor", "gram"}
        self.layers = tuple(layers)
        self.reading = reading
        self.lam = lam
        self.top_k = top_k
        self.precision = precision
        self.without = without
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = type(teacher)(**teacher.config)
        if pos_embed == "copy":
            self.student.pos_embed.data.copy_(teacher.pos_embed)
            self.student.pos_embed.requires_grad_(False)
        self.anchor = Anchor(teacher.config["width"], anchor)
        self.register_buffer("delta", torch.tensor(math.nan))
        self.register_buffer("heat_scale", torch.full((2,), math.nan))
        self.normal = None

    def learned_state(self):
        """What scoring needs besides the teacher: student, anchor, delta, heat_scale, normal."""
        state = self.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("teacher.")}

    def load_learned_state(self, state):
        """The inverse of `learned_state`, strict: every key has to be there and no other."""
        self.normal = None
        if "normal.delta" in state:
            # Shapes as in the file. One that is missing may have any: loading it fails below.
            like = {c: state.get(f"normal.mean_{c}", self.delta) for c in self.layers}
            mean = {c: torch.empty_like(x) for c, x in like.items()}
            std = {c: torch.empty_like(x) for c, x in like.items()}
            self.normal = Standardiser(mean, std, torch.empty_like(self.delta))
        # The teacher is not in the file. Its tensors are added here, so that `strict` complains of
        # missing or unknown others alone.
        teacher = {f"teacher.{key}": value for key, value in self.teacher.state_dict().items()}
        foreign = sorted(teacher.keys() & state.keys())
        if foreign:
            raise RuntimeError(f"expected no tensor of the teacher, got {foreign[0]}")
        self.load_state_dict({**teacher, **state}, strict=True)

    def features(self, vit, images):
        """images -> features of `vit`, teacher or student, in float32.

        The images may be on any device; they are moved to the model's.
        """
        images = images.to(self.delta.device)
        bf16 = self.precision == "bf16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            features = vit(self.teacher.prepare(images), self.layers)
        return {c: x.float() for c, x in features.items()}

    @torch.no_grad()
    def teacher_features(self, images):
        """images -> t, the teacher's features, without gradient."""
        return self.features(self.teacher, images)

    def update_anchor(self, t):
        """Eq. 1: take in the teacher's class tokens of one batch."""
        self.anchor.update(t[self.layers[-1]][:, 0])

    def loss_terms(self, images, t):
        """L of Eq. 6, "loss", and its terms before lambda, "distill", "anchor", "gram".

        -> {name: scalar}, less the terms in `without`. t = teacher_features(images).
        """
        s = self.features(self.student, images)
        terms = {"distill": distill_loss(t, s, self.reading)}
        if "anchor" not in self.without:
            s_cls = s[self.layers[-1]][:, 0]
            terms["anchor"] = anchor_loss(s_cls, self.anchor.value, self.reading)
        if "gram" not in self.without:
            terms["gram"] = gram_loss(t, s, self.reading)
        l_anchor = terms.get("anchor", 0)
        l_gram = terms.get("gram", 0)
        return {"loss": total_loss(terms["distill"], l_anchor, l_gram, self.lam), **terms}

    @torch.no_grad()
    def compare(self, images, t=None):
        """images -> what the score is made of.

        {c: Diff_c (B, 1 + P)} of Eq. 8, and the two terms of Eq. 7, (B,) each.
        t = teacher_features(images), if known.
        """
        if t is None:
            t = self.teacher_features(images)
        s = self.features(self.student, images)
        diffs = {c: diff(t[c], s[c], self.reading) for c in t}
        last = self.layers[-1]
        return diffs, score_a(t[last][:, 0], s[last][:, 0], self.anchor.value, self.reading)

    def compare_all(self, batches):
        """What `compare` returns of batches of images, put together."""
        parts = [self.compare(images) for images in batches]
        diffs = {c: torch.cat([d[c] for d, _ in parts]) for c in self.layers}
        teacher, student = zip(*(terms for _, terms in parts), strict=True)
        return diffs, (torch.cat(teacher), torch.cat(student))

    def scores(self, images, t=None):
        """images -> the score of Eq. 10 and its parts, (B,) each.

        "score" = "score_d" + ("score_a_teacher" + "score_a_student"). "score_d_cls" is the class
        tokens' share of score_d. "heat" (B, P) has a number per patch. "score_d_standardised" is
        beside them where there is a `Standardiser`. t = teacher_features(images), if known.
        """
        return self.scores_of(*self.compare(images, t))

    def scores_of(self, diffs, terms_of_s_a):
        """What `compare` returns -> the scores, see `scores`."""
        s_d = score_d(diffs, self.top_k)
        a_teacher, a_student = terms_of_s_a
        scores = {
            "score": score(s_d, a_teacher + a_student),
            "score_d": s_d,
            "score_a_teacher": a_teacher,
            "score_a_student": a_student,
            "score_d_cls": sum(d[:, 0] for d in diffs.values()),
            "heat": heat(diffs),
        }
        if self.normal is not None:
            scores["score_d_standardised"] = self.normal.standardised_score_d(diffs, self.top_k)
        return scores

    def calibrate(self, diffs, terms_of_s_a):
        """Set delta, heat_scale and normal by what `compare_all` returns of normal images.

        -> their scores, see `scores`.
        """
        scores = self.scores_of(diffs, terms_of_s_a)
        self.delta.copy_(threshold(scores["score"]))
        usual = scores["heat"].median()
        hottest = threshold(scores["heat"].amax(dim=1))
        self.heat_scale.copy_(torch.stack([usual, hottest]))
        enough = len(scores["score"]) >= FEW
        self.normal = Standardiser.of(diffs, self.top_k) if enough else None
        return scores


# --------------------------------------------------------------------------------- not in the paper


def heat(diffs):
    """Where the score comes from: Diff of Eq. 8 of each patch, summed over the layers.

    {c: Diff_c (B, 1 + P)} -> (B, P). A ViT's layers have one grid; of a CNN (ablations/) the
    smaller ones are enlarged to the finest.
    """
    maps = []
    for d in diffs.values():
        side = math.isqrt(d.shape[1] - 1)
        maps.append(d[:, None, 1:].unflatten(2, (side, side)))  # (B, 1, side, side)
    finest = max(x.shape[-1] for x in maps)
    for i, x in enumerate(maps):
        if x.shape[-1] != finest:
            maps[i] = F.interpolate(x, (finest, finest), mode="bilinear")
    return sum(maps).flatten(1)


class Standardiser(nn.Module):
    """Standardises Diff (Eq. 8) by its mean and standard deviation over normal images.

    mean, std: {c: (1 + P,)}, of each position of each layer. delta: the `threshold` of
    `standardised_score_d`, as the model's delta is of Eq. 10.
    """

    def __init__(self, mean, std, delta):
        super().__init__()
        for c in mean:
            self.register_buffer(f"mean_{c}", mean[c])
            self.register_buffer(f"std_{c}", std[c])
        self.register_buffer("delta", delta)

    @classmethod
    def of(cls, diffs, top_k=TOP_K):
        """{c: Diff_c (n, 1 + P)} of normal images, n > 2 -> a Standardiser.

        delta is the `threshold` of their scores, each by the mean and std of the n - 1 others.
        These follow from those of all: mean_i = mean - own / (n - 1), and var_i = ((n - 1) var -
        n / (n - 1) own^2) / (n - 2), with own = Diff_i - mean.
        """
        mean, std = mean_and_std(diffs)
        deviations = {}
        for c, d in diffs.items():
            n = len(d)
            # In float64, since var is a difference of nearly equal numbers.
            own = d.double() - d.double().mean(dim=0)
            squares = own.square()
            var = (squares.sum(dim=0) - n / (n - 1) * squares) / (n - 2)
            deviations[c] = n / (n - 1) * own / var.clamp(min=LEAST_STD**2).sqrt()
        scores = score_d(deviations, top_k)
        return cls(mean, std, threshold(scores).float())

    def standardised_score_d(self, diffs, top_k=TOP_K):
        """Eq. 9 of (Diff - mean) / std: {c: Diff_c (B, 1 + P)} -> (B,).

        On every normal image some positions are farther from the teacher than others. Here each is
        compared with itself. A std of 0 counts as `LEAST_STD`.
        """
        deviations = {}
        for c, d in diffs.items():
            mean, std = getattr(self, f"mean_{c}"), getattr(self, f"std_{c}")
            deviations[c] = (d - mean) / std.clamp(min=LEAST_STD)
        return score_d(deviations, top_k)


def mean_and_std(diffs):
    """{c: (n, 1 + P)} -> both over the n images, {c: (1 + P,)} each."""
    mean = {c: d.mean(dim=0) for c, d in diffs.items()}
    std = {c: d.std(dim=0) for c, d in diffs.items()}
    return mean, std
