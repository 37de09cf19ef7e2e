#!/usr/bin/env python3
"""What of the score carries a run's AUROC. An observation, nothing to choose by.

    python results/anatomy.py runs/mvtec/pill/seed0 ...

prints a Markdown table with a column per run, on the complete test split. It has the image AUROC in
% of variants of the score: single layers, class token and patches, other k of Eq. 9, other weights
of S_A, Diff less its mean over the normal images that training held out, over its deviation there.
Where there are masks, it has how much of the k hottest patches of Eq. 9 lies on the defect.

Of runs that differ in the seed alone, a line has the AUROC of their mean score: what is left when
the noise of the single student is averaged out.

A second table is of the held-out normal images alone. It has the mean of Diff over the patches, its
deviation, and of runs that differ in the seed which share of its variance is the seed's: noise of
the student.
"""

import json
import math
import sys
from collections import defaultdict
from pathlib import Path

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

import torch
import torch.nn.functional as F

import runs
from data import test_split
from evaluate import Normal, auroc, find_runs, held_out_diffs, standardised
from vitad import score_d

SCORE = "S_D + S_A (Eq. 10)"


def score_parts(model, images, batch_size=32):
    """-> {c: Diff_c of Eq. 8 (n, 1 + P)}, and S_A (n,)."""
    diffs = {c: [] for c in model.layers}
    anchors = []
    for batch in images.split(batch_size):
        of_batch, terms = model.compare(batch)
        for c, d in of_batch.items():
            diffs[c].append(d.cpu())
        anchors.append(sum(terms).cpu())
    return {c: torch.cat(batches) for c, batches in diffs.items()}, torch.cat(anchors)


def variants(diffs, s_a, top_k):
    """{name: scores (n,)} by what they are made of."""
    cls, patches = score_d(diffs, top_k)
    scores = {
        SCORE: cls + patches + s_a,
        "S_D": cls + patches,
        "S_A": s_a,
        "S_D, class tokens only": cls,
        "S_D, patches only": patches,
    }
    for c, d in diffs.items():
        scores[f"S_D, layer {c} only"] = sum(score_d({c: d}, top_k))
    all_patches = min(d.shape[1] for d in diffs.values()) - 1
    for k in (*(k for k in (1, 5, 20, 50) if k < all_patches), all_patches):
        scores[f"S_D with k = {k}"] = sum(score_d(diffs, k))
    for weight in (2, 5, 10, 20):
        scores[f"S_D + {weight} S_A"] = cls + patches + weight * s_a
    return scores


def normal_of_layer(diffs):
    """Normal images' {c: Diff_c (n, 1 + P)} -> a Normal with one value for all patches of a layer.

    The class token keeps its own.
    """
    normal = Normal.of(diffs)
    for c, d in diffs.items():
        normal.mean[c][1:] = d[:, 1:].mean()
        normal.std[c][1:] = d[:, 1:].std()
    return normal


def noise(diffs):
    """Diffs of several students on the same images, {c: (n, 1 + P)} each -> {c: share of variance}.

    The share of a patch's variance, over images and students, that is between the students: the
    mean over the patches of the one over that of the other.
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
    touched = [F.adaptive_max_pool2d(mask[None].float(), side).flatten(1) for mask in masks]
    touched = torch.cat(touched)[chosen]  # (images, P)
    shares = {"all patches": 100 * touched.mean().item()}
    for c, d in diffs.items():
        hottest = d[chosen, 1:].topk(top_k, dim=1).indices
        shares[f"the {top_k} hottest of layer {c}"] = 100 * touched.gather(1, hottest).mean().item()
    return shares


def column(settings, model, normal):
    """One run's column of the table, {row: number}; its scores (n,); the labels.

    normal: Diff on the held-out normal images, {c: (n, 1 + P)}, or None.
    """
    split = test_split(
        settings["dataset"],
        settings["data_root"],
        settings["category"],
        size=model.teacher.image_size,
    )
    diffs, s_a = score_parts(model, split.images)
    scores = variants(diffs, s_a, model.top_k)
    if normal is not None:
        for name, find in (("layer", normal_of_layer), ("layer and position", Normal.of)):
            values = standardised(diffs, find(normal), model.top_k)
            scores[f"S_D, standardised per {name}"] = values
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
        settings.append(runs.read_config(run)["settings"])
        normal = held_out_diffs(model, settings[-1])
        normals.append(normal and {c: d.cpu() for c, d in normal.items()})
        columns.append(column(settings[-1], model, normals[-1]))
    names = [f"{run.parent.name} {run.name}" for run in args.runs]
    print(f"| score | {' | '.join(names)} |")
    print("|---" + "|---" * len(columns) + "|")
    for name in columns[0][0]:
        cells = [f"{numbers[name]:.2f}" if name in numbers else "" for numbers, _, _ in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    for group in but_for_the_seed(settings):
        if len(group) > 1:
            mean = torch.stack([columns[i][1] for i in group]).mean(dim=0)
            labels = columns[group[0]][2]
            which = ", ".join(names[i] for i in group)
            print(f"\n{SCORE}, the mean of {which}: {auroc(mean, labels):.2f}")
    if None not in normals:
        print(f"\n{noise_table(names, normals, settings)}")


if __name__ == "__main__":
    sys.exit(main())
