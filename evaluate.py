#!/usr/bin/env python3
"""Score the test split of trained runs and print their AUROC.

    python evaluate.py                        # every complete run below runs/
    python evaluate.py runs/mvtec/bottle/seed0 ...

prints one table per data set, whose last line is the mean, with the paper's AUROC beside ours, and writes into each run folder
scores.csv (one line per image: raw scores, higher = more anomalous) and result.json. Bottle with DeiT-Tiny takes about 5 seconds
on 2 CPU cores.

AUROC columns: Score = S_D + S_A of Eq. 10; S_D alone; S_A alone; and the teacher's term of S_A alone, which needs no training.
"""
import argparse
import csv
import itertools
import json
import math
import sys
from pathlib import Path

from data import PAPER_AUROC, SMALL, atomic, fail, one_sentence, test_split
from train import provenance, read_config
# torch and NumPy are imported where they are first needed: --help and wrong arguments are answered at once.


def auroc(scores, labels):
    """Area under the ROC curve in per cent: how often an anomalous image scores above a normal one, a tie counting half.

    scores (N,), labels (N,) with 1 = anomalous. By ranks: sum of the anomalous images' ranks (ties share theirs) minus its
    smallest possible value, over the number of pairs. NaN if one of the two kinds is missing.
    """
    import numpy as np

    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    n_anomalous = int((labels == 1).sum())
    pairs = n_anomalous * (len(labels) - n_anomalous)
    if pairs == 0:
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of a tie, the middle one
    return float(100 * (ranks[labels == 1].sum() - n_anomalous * (n_anomalous + 1) / 2) / pairs)


def find_runs(paths, out):
    """The run folders named, or every complete one below `out`; ValueError if there is none."""
    runs = [Path(path) for path in paths] or sorted(path.parent for path in Path(out).glob("**/model.safetensors"))
    if not runs:
        raise ValueError(f"{out}: expected complete runs (folders with model.safetensors), got none: train one with python train.py")
    for run in runs:
        for name in ("config.json", "model.safetensors"):
            if not (run / name).is_file():
                unfinished = (run / "checkpoint.safetensors").is_file() or (run / "log.jsonl").is_file()
                got = "an unfinished one: train it to the end" if unfinished else "none: python train.py makes one"
                raise ValueError(f"{run / name}: expected a complete run, got {got}")
    return runs


def load_run(run, config, teacher, precision):
    """The trained model of a run folder, around the loaded teacher."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from vitad import Distillation

    settings = config["settings"]
    model = Distillation(teacher, settings["layers"], settings["distance"], settings["pos_embed"], settings["anchor"],
                         settings["lam"], settings["top_k"], precision, settings.get("patch_embed", "learn"))
    try:
        model.load_learned_state(load_file(run / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{run / 'model.safetensors'}: expected the student, anchor and delta of this run, got a file that does not fit "
                         f"({str(error).splitlines()[0]}): train the run again") from None
    return model


def load_teacher(run, config, weights, loaded):
    """The teacher that a run was trained with; `weights` is where else to look for it, `loaded` keeps teachers by path."""
    from vit import load_vit
    from weights.download import weights_file

    path = weights_file(weights or config["settings"]["weights"])
    if path not in loaded:
        loaded[path] = load_vit(path)
    teacher, expected = loaded[path], config["teacher"]["sha256"]
    if teacher.sha256 != expected:
        raise ValueError(f"{path}: expected the teacher that {run} was trained with, sha256 {expected[:12]}..., "
                         f"got {teacher.sha256[:12]}...: name the right file with --weights")
    return teacher


def of_one_kind(item):
    """What runs have to share for the teacher to see their test images once for all of them: all runs of CIFAR and Fashion-MNIST do."""
    run, config = item
    settings = config["settings"]
    return (settings["dataset"], settings["data_root"] or "", "" if settings["dataset"] in SMALL else settings["category"],
            config["teacher"]["sha256"], settings["layers"], settings.get("precision", "fp32"))


def evaluate(runs, args, device, teachers):
    """Score the test split of runs of one kind, [(run, config)]; write their scores.csv and result.json; -> their results."""
    import torch

    from vitad import pick_device

    with one_sentence():
        run, config = runs[0]
        precision = args.precision or config["settings"].get("precision", "fp32")
        pick_device(device, precision)
        teacher = load_teacher(run, config, args.weights, teachers).to(device)
        models = [load_run(run, config, teacher, precision).to(device) for run, config in runs]
        splits = [test_split(s["dataset"], args.data_root or s["data_root"], s["category"], teacher.image_size, args.skip_bad)
                  for s in (config["settings"] for _, config in runs)]
    parts = [[] for _ in models]
    for images in splits[0].images.split(args.batch_size):
        images = images.to(device, non_blocking=True)
        t = models[0].teach(images)
        for part, model in zip(parts, models):
            part.append(model.scores(images, t))
    scores = [{name: torch.cat([batch[name] for batch in part]).cpu().numpy() for name in part[0]} for part in parts]
    return [write(run, config, float(model.delta), split, own, device) for (run, config), model, split, own in zip(runs, models, splits, scores)]


def write(run, config, delta, split, scores, device):
    """One run's scores.csv and result.json, from its scores by column, (N,) each; -> the result."""
    import numpy as np

    if not all(np.isfinite(values).all() for values in scores.values()):
        fail(f"{run}: expected finite scores, got some that are not: the run is broken, train it again")

    settings, labels = config["settings"], np.array(split.labels)
    anomalous = scores["score"] >= delta  # Eq. 10
    percent = {"auroc": auroc(scores["score"], labels),
               "auroc_score_d": auroc(scores["score_d"], labels),
               "auroc_score_a": auroc(scores["score_a_teacher"] + scores["score_a_student"], labels),
               "auroc_score_a_teacher": auroc(scores["score_a_teacher"], labels)}
    result = {"dataset": settings["dataset"], "category": settings["category"], "seed": settings["seed"],
              **{name: None if math.isnan(value) else value for name, value in percent.items()},
              "paper_auroc": PAPER_AUROC[settings["dataset"]].get(settings["category"]),
              "n_normal": int((labels == 0).sum()), "n_anomalous": int((labels == 1).sum()), "skipped": split.skipped,
              "delta": delta, "false_alarms": int((anomalous & (labels == 0)).sum()), "misses": int((~anomalous & (labels == 1)).sum()),
              "teacher": config["teacher"].get("name"), "teacher_sha256": config["teacher"]["sha256"],
              "trained": {key: config[key] for key in ("commit", "device", "command", "date")}, **provenance(device)}
    columns = ("score", "score_d", "score_a_teacher", "score_a_student")
    with one_sentence():
        with atomic(run / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("image", "label", *columns))
            for i, name in enumerate(split.names):
                writer.writerow((name, split.labels[i], *(f"{scores[c][i]:.9g}" for c in columns)))
        with atomic(run / "result.json") as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return result


def mean(values):
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(results):
    """The results of one data set as text: a row per run, the last line their means (over categories, each the mean of its seeds)."""
    columns = {"AUROC": "auroc", "paper": "paper_auroc", "S_D": "auroc_score_d", "S_A": "auroc_score_a", "S_A teacher": "auroc_score_a_teacher"}
    categories = {}
    for result in results:
        categories.setdefault(result["category"], []).append(result)
    per_category = [{key: mean(r[key] for r in runs) for key in columns.values()} for runs in categories.values()]
    rows = [(r["category"], str(r["seed"]), r) for r in results]
    rows.append(("mean", "", {key: mean(r[key] for r in per_category) for key in columns.values()}))
    width = max(len("category"), *(len(name) for name, _, _ in rows))
    lines = [f"{'category':{width}} {'seed':>4} " + " ".join(f"{title:>11}" for title in columns)]
    for name, seed, values in rows:
        cells = ("n/a" if values[key] is None else f"{values[key]:.2f}" for key in columns.values())
        lines.append(f"{name:{width}} {seed:>4} " + " ".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders (default: every complete run below --out)")
    parser.add_argument("--out", default="runs", help="where to look for runs (default runs)")
    parser.add_argument("--data-root", help="folder that holds the categories (default: as in training)")
    parser.add_argument("--weights", help="the teacher's file (default: as in training)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out test images that do not decode, and list them at the end")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time; scores do not depend on it (default 32)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="of the networks (default: as in training)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    args = parser.parse_args()
    if args.batch_size < 1:
        fail(f"--batch-size: expected at least 1, got {args.batch_size}")
    with one_sentence():
        runs = [(run, read_config(run)) for run in find_runs(args.runs, args.out)]
    from vitad import pick_device

    with one_sentence():
        device = pick_device(args.device)
    results, teachers = {}, {}
    for _, group in itertools.groupby(sorted(runs, key=of_one_kind), key=of_one_kind):
        for result in evaluate(list(group), args, device, teachers):
            results.setdefault(result["dataset"], []).append(result)
            if sys.stderr.isatty():
                print(f"{result['category']}: {result['n_normal']} normal, {result['n_anomalous']} anomalous", file=sys.stderr)
    for dataset, rows in results.items():
        order = list(PAPER_AUROC[dataset])  # the paper's, then what it does not have
        rows.sort(key=lambda row: (order.index(row["category"]) if row["category"] in order else len(order), row["seed"]))
        teacher = ", ".join(sorted({str(row["teacher"]) for row in rows}))
        print(f"{dataset}: image AUROC in %, last epoch, teacher {teacher}")
        print(table(rows))
    for why in (why for rows in results.values() for row in rows for why in row["skipped"]):
        print(f"skipped: {why}", file=sys.stderr)


if __name__ == "__main__":
    main()
