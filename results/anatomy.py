#!/usr/bin/env python3
"""What of the score carries a run's AUROC: layers, class token and patches, k of Eq. 9, the weight of S_A. An observation, nothing to choose by.

    python results/anatomy.py runs/mvtec/pill/seed0 ...

prints a Markdown table with a column per run: image AUROC in % on the complete test split, of each variant of the score.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import test_split  # noqa: E402
from evaluate import auroc  # noqa: E402
from weights.files import fail, one_sentence, read_config  # noqa: E402


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
    yield "S_D + S_A (Eq. 10)", cls + patches + s_a
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="complete run folders")
    args = parser.parse_args()
    columns, teachers = [], {}
    with one_sentence():
        from vitad import load

        for run in args.runs:
            settings, model = read_config(run)["settings"], load(run, teachers=teachers)
            split = test_split(settings["dataset"], settings["data_root"], settings["category"], model.teacher.image_size)
            columns.append({name: auroc(values, split.labels) for name, values in variants(*parts(model, split.images), model.top_k)})
    print("| score | " + " | ".join(f"{run.parent.name} {run.name}" for run in args.runs) + " |\n|---" + "|---" * len(columns) + "|")
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2f}" if name in column else "" for column in columns) + " |")


if __name__ == "__main__":
    main()
