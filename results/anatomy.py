#!/usr/bin/env python3
"""What of the score carries a run's AUROC. An observation, nothing to choose by.

    python results/anatomy.py runs/mvtec/pill/seed0 ...

prints a Markdown table with a column per run, on the complete test split. It has the image AUROC in
% of variants of the score: single layers, class token and patches, other k of Eq. 9, other weights
of S_A. Where there are masks, it has how much of the k hottest patches of Eq. 9 lies on the defect.
"""

import math
import sys
from pathlib import Path

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

import torch
import torch.nn.functional as F

import runs
from data import test_split
from evaluate import auroc, find_runs
from vitad import diff, score_a, score_d

SCORE = "S_D + S_A (Eq. 10)"


@torch.no_grad()
def score_parts(model, images, batch_size=32):
    """-> {c: Diff_c of Eq. 8 (n, 1 + P)}, and S_A (n,)."""
    diffs = {c: [] for c in model.layers}
    anchors = []
    last = model.layers[-1]
    for batch in images.split(batch_size):
        batch = batch.to(model.delta.device)
        t = model.teach(batch)
        s = model.features(model.student, batch)
        for c in model.layers:
            diffs[c].append(diff(t[c], s[c], model.reading).cpu())
        terms = score_a(t[last][:, 0], s[last][:, 0], model.anchor.value, model.reading)
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


def column(run, model):
    """One run's column of the table, {row: number}."""
    settings = runs.read_config(run)["settings"]
    split = test_split(
        settings["dataset"],
        settings["data_root"],
        settings["category"],
        size=model.teacher.image_size,
    )
    diffs, s_a = score_parts(model, split.images)
    scores = variants(diffs, s_a, model.top_k)
    numbers = {name: auroc(values, split.labels) for name, values in scores.items()}
    if split.masks is None:
        return numbers
    anomalous = torch.tensor(split.labels) == 1
    found = scores[SCORE] >= model.delta.item()
    for word, chosen in (("found", anomalous & found), ("missed", anomalous & ~found)):
        shares = on_the_defect(diffs, split.masks, chosen, model.top_k)
        numbers |= {f"on the defect, %, {word}: {name}": x for name, x in shares.items()}
    return numbers


@runs.script
def main(argv):
    parser = runs.Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="complete run folders")
    args = parser.parse_args(argv)
    columns, teacher = [], None
    runs.set_tf32("fp32")
    for run in find_runs(args.runs, out=None):
        model = runs.load(run, teacher=teacher)
        teacher = model.teacher
        columns.append(column(run, model))
    names = [f"{run.parent.name} {run.name}" for run in args.runs]
    print(f"| score | {' | '.join(names)} |")
    print("|---" + "|---" * len(columns) + "|")
    for name in columns[0]:
        cells = [f"{numbers[name]:.2f}" if name in numbers else "" for numbers in columns]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
