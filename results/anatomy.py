#!/usr/bin/env python3
"""What of the score carries a run's AUROC. An observation, nothing to choose by.

    python results/anatomy.py runs/mvtec/pill/seed0 ...

prints a Markdown table with a column per run, on the complete test split. It has the image AUROC in
% of variants of the score: single layers, class token and patches, other k of Eq. 9, other weights
of S_A, S_D standardised (vitad.Standardiser) by the normal images that training held out.
Where there are masks, it has how much of the k hottest patches of Eq. 9 lies on the defect.

Of runs that differ in the seed alone, a line has the AUROC of their mean score: what is left when
the noise of the single student is averaged out.

A second table is of the held-out normal images alone. It has the mean and standard deviation of
Diff over patches and images. Of runs that differ in the seed it has which share of a position's
variance, over images and students, is between students: noise of the single one.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

import torch
import torch.nn.functional as F

import runs
from data import test_split, train_split
from evaluate import auroc, find_runs
from train import hold_out
from vitad import FEW, Standardiser, mean_and_std, score_d

SCORE = "S_D + S_A (Eq. 10)"


def score_parts(model, images, batch_size=32):
    """-> {c: Diff_c of Eq. 8 (n, 1 + P)}, and S_A (n,)."""
    diffs, terms_of_s_a = model.compare_all(images.split(batch_size))
    return {c: d.cpu() for c, d in diffs.items()}, sum(terms_of_s_a).cpu()


def variants(diffs, s_a, top_k):
    """{name: scores (n,)} by what they are made of."""
    s_d = score_d(diffs, top_k)
    cls = sum(d[:, 0] for d in diffs.values())
    scores = {
        SCORE: s_d + s_a,
        "S_D": s_d,
        "S_A": s_a,
        "S_D, class tokens only": cls,
        "S_D, patches only": s_d - cls,
    }
    for c, d in diffs.items():
        scores[f"S_D, layer {c} only"] = score_d({c: d}, top_k)
    all_patches = min(d.shape[1] for d in diffs.values()) - 1
    for k in (*(k for k in (1, 5, 20, 50) if k < all_patches), all_patches):
        scores[f"S_D with k = {k}"] = score_d(diffs, k)
    for weight in (2, 5, 10, 20):
        scores[f"S_D + {weight} S_A"] = s_d + weight * s_a
    return scores


def held_out_diffs(run, model, config):
    """{c: Diff_c (n, 1 + P)} of the normal images that training held out, or None."""
    settings = config["settings"]
    kept = {"holdout": 0, **settings}  # an older run has none
    runs.check_values(Path(run) / "config.json", kept, {"holdout": int | float})
    if not kept["holdout"]:
        return None
    place = (settings["dataset"], settings["data_root"], settings["category"])
    images = train_split(*place, model.teacher.image_size).images
    before = config.get("images", len(images))
    if len(images) != before:
        raise runs.UserError(
            f"{settings['data_root']}: expected the {before} training images of the run, "
            f"got {len(images)}: restore them, or train it again"
        )
    _, index = hold_out(SimpleNamespace(**settings), len(images))
    return score_parts(model, images[index])[0]


def per_layer(diffs):
    """A Standardiser with the same mean and deviation at all patches of a layer.

    diffs: of normal images, {c: (n, 1 + P)}. The class tokens keep their own.
    """
    mean, std = mean_and_std(diffs)
    for c, d in diffs.items():
        mean[c][1:] = d[:, 1:].mean()
        std[c][1:] = d[:, 1:].std()
    return Standardiser(mean, std, torch.tensor(math.nan))


def noise(diffs):
    """Diffs of several students on the same images, {c: (n, 1 + P)} each -> {c: share of variance}.

    The variance between the students, by that over images and students; both of a position, and
    averaged over the patches first.
    """
    shares = {}
    for c in diffs[0]:
        x = torch.stack([d[c][:, 1:] for d in diffs])  # (students, n, P)
        between = x.var(dim=0).mean()
        shares[c] = (between / x.flatten(0, 1).var(dim=0, correction=0).mean()).item()
    return shares


def on_the_defect(diffs, masks, chosen, top_k):
    """Shares in % of patches that touch the mask: of all, and of each layer's k hottest.

    Means over the `chosen` images (n,). Of ViTs, whose layers have the same grid.
    """
    if not chosen.any():
        return {}
    side = math.isqrt(next(iter(diffs.values())).shape[1] - 1)
    touched = F.adaptive_max_pool2d(masks[chosen].float(), side).flatten(1)  # (images, P)
    shares = {"all patches": 100 * touched.mean().item()}
    for c, d in diffs.items():
        hottest = d[chosen, 1:].topk(top_k, dim=1).indices
        shares[f"the {top_k} hottest of layer {c}"] = 100 * touched.gather(1, hottest).mean().item()
    return shares


def column(settings, model, normal):
    """One run's column of the table, {row: number}; its scores (n,); the labels.

    normal: see `held_out_diffs`.
    """
    split = test_split(
        settings["dataset"],
        settings["data_root"],
        settings["category"],
        size=model.teacher.image_size,
    )
    diffs, s_a = score_parts(model, split.images)
    scores = variants(diffs, s_a, model.top_k)
    if normal is not None and len(normal[model.layers[0]]) >= FEW:
        both = Standardiser.of(normal, model.top_k)
        for name, one in (("layer", per_layer(normal)), ("layer and position", both)):
            scores[f"S_D, standardised per {name}"] = one.standardised_score_d(diffs, model.top_k)
    numbers = {name: auroc(values, split.labels) for name, values in scores.items()}
    if split.masks is not None:
        anomalous = torch.tensor(split.labels) == 1
        found = scores[SCORE] >= model.delta.item()
        for word, chosen in (("found", anomalous & found), ("missed", anomalous & ~found)):
            shares = on_the_defect(diffs, split.masks, chosen, model.top_k)
            numbers |= {f"on the defect, %, {word}: {name}": x for name, x in shares.items()}
    return numbers, scores[SCORE], split.labels


def but_for_the_seed(settings):
    """Settings of runs -> groups of their places, of runs that differ in the seed alone."""
    groups = defaultdict(list)
    for i, values in enumerate(settings):
        groups[json.dumps({**values, "seed": 0}, sort_keys=True)].append(i)
    return list(groups.values())


def noise_table(names, normals, settings):
    """Markdown of what Diff is on held-out normal images, a row per layer and run."""
    lines = [
        "| run | layer | mean of Diff | deviation | share that is the seed's |",
        "|---" * 5 + "|",
    ]
    shares = {}
    for group in but_for_the_seed(settings):
        students = [normals[i] for i in group]
        for i in group:
            shares[i] = noise(students) if len(group) > 1 else {}
    for i, diffs in enumerate(normals):
        for c, d in diffs.items():
            share = f"{100 * shares[i][c]:.0f} %" if shares[i] else ""
            row = [names[i], c, f"{d[:, 1:].mean():.3f}", f"{d[:, 1:].std():.3f}", share]
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


@runs.script
def main(argv):
    parser = runs.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="complete run folders")
    args = parser.parse_args(argv)
    columns, normals, settings = [], [], []
    teacher = None
    runs.set_tf32("fp32")
    for run in find_runs(args.runs, out=None):
        model = runs.load(run, teacher=teacher)
        teacher = model.teacher
        config = runs.read_config(run)
        settings.append(config["settings"])
        normals.append(held_out_diffs(run, model, config))
        columns.append(column(settings[-1], model, normals[-1]))
    names = [f"{run.parent.name} {run.name}" for run in args.runs]
    print(f"| score | {' | '.join(names)} |")
    print("|---" + "|---" * len(columns) + "|")
    for name in dict.fromkeys(name for numbers, _, _ in columns for name in numbers):
        cells = [f"{numbers[name]:.2f}" if name in numbers else "" for numbers, _, _ in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    for group in but_for_the_seed(settings):
        if len(group) > 1:
            mean = torch.stack([columns[i][1] for i in group]).mean(dim=0)
            labels = columns[group[0]][2]
            which = ", ".join(names[i] for i in group)
            print(f"\n{SCORE}, the mean of {which}: {auroc(mean, labels):.2f}")
    if None in normals:
        print("\nNo table of Diff on normal images: a run has none held out.")
    else:
        print(f"\n{noise_table(names, normals, settings)}")


if __name__ == "__main__":
    sys.exit(main())
