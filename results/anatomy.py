#!/usr/bin/env python3
"""What of the score carries a run's AUROC: layers, class token and patches, k of Eq. 9, the weight of S_A. An observation, nothing to choose by.

    python results/anatomy.py runs/mvtec/pill/seed0 ...

prints a Markdown table with a column per run, on the complete test split: image AUROC in % of each variant of the score; and, where there are masks, how
much of the k hottest patches of Eq. 9 lies on the defect, in images found and missed at delta.
"""
import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import test_split  # noqa: E402
from evaluate import auroc  # noqa: E402
from weights.files import fail, one_sentence, read_config  # noqa: E402

NAME = "S_D + S_A (Eq. 10)"


def parts(model, images, batch_size=32):
    """-> {c: Diff_c of Eq. 8 (N, 1 + P)}, and the two terms of S_A together (N,)"""
    import torch

    from vitad import diff, score_a

    layers, anchors, last = {c: [] for c in model.layers}, [], model.layers[-1]
    for batch in images.split(batch_size):
        batch = batch.to(model.delta.device)
        with torch.no_grad():
            t, s = model.teach(batch), model.features(model.student, batch)
            for c in layers:
                layers[c].append(diff(t[c], s[c], model.reading).cpu())
            anchors.append(sum(score_a(t[last][:, 0], s[last][:, 0], model.anchor.value, model.reading)).cpu())
    return {c: torch.cat(of) for c, of in layers.items()}, torch.cat(anchors)


def variants(d, s_a, top_k):
    """Scores (N,) by what they are made of."""
    from vitad import score_d

    cls, patches = score_d(d, top_k)
    yield NAME, cls + patches + s_a
    yield "S_D", cls + patches
    yield "S_A", s_a
    yield "S_D, class tokens only", cls
    yield "S_D, patches only", patches
    for c in d:
        yield f"S_D, layer {c} only", sum(score_d({c: d[c]}, top_k))
    patches_of = min(x.shape[1] for x in d.values()) - 1
    for k in (*(k for k in (1, 5, 20, 50) if k < patches_of), patches_of):
        yield f"S_D with k = {k}", sum(score_d(d, k))
    for weight in (2, 5, 10, 20):
        yield f"S_D + {weight} S_A", cls + patches + weight * s_a


def on_the_defect(d, masks, anomalous, top_k):
    """Shares in % of the patches, and of each layer's k hottest, that touch the mask: means over the `anomalous` images (N,). Of ViTs, whose
    layers share one grid."""
    import torch
    import torch.nn.functional as F

    if not anomalous.any():
        return
    side = math.isqrt(next(iter(d.values())).shape[1] - 1)
    touched = torch.cat([F.adaptive_max_pool2d(mask[None].float(), side).flatten(1) for mask in masks])[anomalous]  # (n, P)
    yield "all patches", 100 * touched.mean().item()
    for c, x in d.items():
        yield f"the {top_k} hottest of layer {c}", 100 * touched.gather(1, x[anomalous, 1:].topk(top_k, dim=1).indices).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="complete run folders")
    args = parser.parse_args()
    columns, teachers = [], {}
    with one_sentence():
        import torch

        from vitad import load

        for run in args.runs:
            settings, model = read_config(run)["settings"], load(run, teachers=teachers)
            split = test_split(settings["dataset"], settings["data_root"], settings["category"], model.teacher.image_size)
            d, s_a = parts(model, split.images)
            scores = dict(variants(d, s_a, model.top_k))
            columns.append({name: auroc(values, split.labels) for name, values in scores.items()})
            for word, verdict in (("found", True), ("missed", False)) if split.masks is not None else ():
                chosen = (scores[NAME] >= model.delta.item()).eq(verdict) & (torch.tensor(split.labels) == 1)
                columns[-1].update({f"on the defect, %, {word}: {name}": value for name, value in on_the_defect(d, split.masks, chosen, model.top_k)})
    print("| score | " + " | ".join(f"{run.parent.name} {run.name}" for run in args.runs) + " |\n|---" + "|---" * len(columns) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" if name in column else "" for column in columns) + " |")


if __name__ == "__main__":
    main()
