#!/usr/bin/env python3
"""Score the test split of trained runs and print their AUROC; or score any pictures, one by one.

    python evaluate.py                                  # every complete run below runs/
    python evaluate.py runs/mvtec/bottle/seed0 ...      # these
    python evaluate.py RUN --images FILE_OR_FOLDER ...  # other pictures: score, delta, verdict
    python evaluate.py RUN --heatmaps DIR               # where the score comes from, as pictures and a page; with --images too

prints the mistakes at delta by kind of defect, one table per data set, whose last line is the mean, with the paper's AUROC beside ours, and
writes into each run folder scores.csv (one line per image: raw scores, higher = more anomalous) and result.json. Bottle with DeiT-Tiny
takes about 5 seconds on 2 CPU cores.

AUROC columns: Score = S_D + S_A of Eq. 10; S_D alone; S_A alone; and the teacher's term of S_A alone, which needs no training; where there are masks,
of the pixels, and AU-PRO up to a false-positive rate of 0.3.
"""
import argparse
import csv
import itertools
import json
import math
import sys
from contextlib import suppress
from pathlib import Path

from data import PAPER_AUROC, SMALL, images_in, read_image, test_split
from weights.files import atomic, fail, one_sentence, provenance, read_config
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


def regions(mask):
    """Numbers for the connected regions (8 neighbours) of a mask (S, S) of 0 and 1: (S, S), 0 where the mask is."""
    import torch
    import torch.nn.functional as F

    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:  # every pixel takes the largest number around it, until none changes
        spread = F.max_pool2d(numbers[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, numbers):
            return numbers
        numbers = spread


def localisation(heat, masks, limit=0.3, bins=1 << 14):
    """How well heat (N, P) finds masks (N, S, S), in per cent: AUROC of the pixels, and AU-PRO (Bergmann et al. 2021): the share of a defective region
    that is found, a mean over all regions, as an area up to a false-positive rate of `limit`, over `limit`. NaN without a defective pixel.

    Heat is enlarged to S x S and sorted into `bins` between its extremes, so that the memory does not depend on N.
    """
    import torch
    import torch.nn.functional as F

    low, high = heat.min(), heat.max()
    normal, defective, found = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))
    for values, mask in zip(heat, masks):
        values = F.interpolate(values.view(1, 1, math.isqrt(len(values)), -1), mask.shape, mode="bilinear")[0, 0]
        level = ((high - values) / (high - low + 1e-12) * bins).long().clamp(0, bins - 1)  # the hottest come first
        normal += level[mask == 0].bincount(minlength=bins)
        numbers = regions(mask)
        for number in numbers[numbers > 0].unique():
            inside = level[numbers == number].bincount(minlength=bins).double()
            defective, found = defective + inside, found + inside / inside.sum()
    if defective.sum() == 0 or normal.sum() == 0:
        return math.nan, math.nan
    x, hits, overlap = (F.pad(counts.cumsum(0) / counts.sum(), (1, 0)) for counts in (normal, defective, found))
    inside = x <= limit
    last = int(inside.sum())  # the curve goes on straight from point last - 1 to point last
    at_limit = overlap[last - 1] + (overlap[last] - overlap[last - 1]) * (limit - x[last - 1]) / (x[last] - x[last - 1])
    pro = torch.trapezoid(torch.cat([overlap[inside], at_limit[None]]), torch.cat([x[inside], torch.tensor([limit], dtype=torch.float64)]))
    return 100 * float(torch.trapezoid(hits, x)), 100 * float(pro / limit)


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


def of_one_kind(item):
    """What runs have to share for the teacher to see their test images once for all of them: all runs of CIFAR and Fashion-MNIST do."""
    run, config = item
    settings = config["settings"]
    return (settings["dataset"], settings["data_root"] or "", "" if settings["dataset"] in SMALL else settings["category"],
            config["teacher"]["sha256"], settings["layers"], settings.get("precision", "fp32"))


def evaluate(runs, args, device, teachers):
    """Score the test split of runs of one kind, [(run, config)]; write their scores.csv and result.json; -> results of those that could be scored."""
    import torch

    from results.pictures import show
    from vitad import load

    jobs = []
    for run, config in runs:
        s = config["settings"]
        with suppress(SystemExit), one_sentence():  # a run that cannot be scored says why, and does not stop the others
            model = load(run, args.weights, device, args.precision, teachers)
            split = test_split(s["dataset"], args.data_root or s["data_root"], s["category"], model.teacher.image_size, args.skip_bad)
            jobs.append((run, config, model, split, []))
    for images in jobs[0][3].images.split(args.batch_size) if jobs else ():
        images = images.to(device, non_blocking=True)
        t = jobs[0][2].teach(images)
        for _, _, model, _, parts in jobs:
            parts.append({name: value.cpu() for name, value in model.scores(images, t).items()})
    results = []
    for run, config, model, split, parts in jobs:
        scores = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        with suppress(SystemExit), one_sentence():
            result = write(run, config, float(model.delta), split, scores, device)
            if args.heatmaps or args.show_failures or args.plot:
                show(args, run, model, split, scores, result["auroc"])
            results.append(result)
    return results


def write(run, config, delta, split, scores, device):
    """One run's scores.csv and result.json, from its scores by column, (N,) each, and heat (N, P); -> the result."""
    import numpy as np

    if not all(values.isfinite().all() for values in scores.values()):
        raise ValueError(f"{run}: expected finite scores, got some that are not: the run is broken, train it again")

    settings, labels = config["settings"], np.array(split.labels)
    anomalous = scores["score"].numpy() >= delta  # Eq. 10
    percent = {"auroc": auroc(scores["score"], labels),
               "auroc_score_d": auroc(scores["score_d"], labels),
               "auroc_score_a": auroc(scores["score_a_teacher"] + scores["score_a_student"], labels),
               "auroc_score_a_teacher": auroc(scores["score_a_teacher"], labels)}
    percent["pixel_auroc"], percent["au_pro"] = (math.nan, math.nan) if split.masks is None else localisation(scores["heat"], split.masks)
    kinds = np.array([name.split("/")[-2] for name in split.names])  # of defect, or classes: test/scratch/000.png
    log = run / "log.jsonl"  # its last line is the calibration's
    result = {"dataset": settings["dataset"], "category": settings["category"], "seed": settings["seed"],
              **{name: None if math.isnan(value) else value for name, value in percent.items()},
              "steps": json.loads(log.read_text().splitlines()[-1])["step"] if log.is_file() else None,
              "paper_auroc": PAPER_AUROC[settings["dataset"]].get(settings["category"]),
              "n_normal": int((labels == 0).sum()), "n_anomalous": int((labels == 1).sum()), "skipped": split.skipped,
              "delta": delta, "false_alarms": int((anomalous & (labels == 0)).sum()), "misses": int((~anomalous & (labels == 1)).sum()),
              "misses_by_kind": {str(kind): [int((~anomalous & (kinds == kind)).sum()), int((kinds == kind).sum())]
                                 for kind in np.unique(kinds[labels == 1])},
              "teacher": config["teacher"].get("name"), "teacher_sha256": config["teacher"]["sha256"],
              "trained": {key: config[key] for key in ("commit", "device", "command", "date")}, **provenance(device)}
    columns = ("score", "score_d", "score_a_teacher", "score_a_student")
    with atomic(run / "scores.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "label", *columns))
        for i, name in enumerate(split.names):
            writer.writerow((name, split.labels[i], *(f"{scores[c][i]:.9g}" for c in columns)))
    with atomic(run / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    return result


def score_images(args, device):
    """--images: score, delta and verdict of any pictures, as a table or as JSON lines; -> whether one is anomalous. A batch is in memory at a time."""
    import numpy as np
    import torch

    from results.pictures import Gallery
    from vitad import load

    with one_sentence():
        model = load(args.runs[0], args.weights, device, args.precision)
        delta, size = float(model.delta), model.teacher.image_size
        files = [file for path in args.images for file in (images_in(path) if path.is_dir() else [path])]
        gallery = args.heatmaps and Gallery(args.heatmaps, str(args.runs[0]), delta, model.heat_scale.tolist())
        if not args.json:
            print(f"{'score':>9} {'delta':>9} verdict    image")
        found = False
        for start in range(0, len(files), args.batch_size):
            decoded = []
            for file in files[start:start + args.batch_size]:
                try:
                    decoded.append((file, read_image(file, size)))
                except ValueError as error:
                    if not args.skip_bad:
                        raise
                    print(f"skipped: {error}", file=sys.stderr)
            if not decoded:
                continue
            scores = model.scores(torch.from_numpy(np.stack([image for _, image in decoded])).permute(0, 3, 1, 2).to(device))
            for i, (file, _) in enumerate(decoded):
                one = {name: float(value[i]) for name, value in scores.items() if name != "heat"}
                anomalous = one["score"] >= delta  # Eq. 10
                found = found or anomalous
                if args.json:
                    print(json.dumps({"image": str(file), "anomalous": anomalous, "delta": delta, **one}), flush=True)
                else:
                    print(f"{one['score']:9.3f} {delta:9.3f} {'anomalous' if anomalous else 'normal':9}  {file}", flush=True)
                if gallery:
                    gallery.add(str(file), read_image(file, None), scores["heat"][i].cpu(), one)
        if gallery:
            print(f"heat maps: {gallery.close()}", file=sys.stderr)
    return found


def mean(values):
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def table(results):
    """The results of one data set as text: a row per run, the last line their means (over categories, each the mean of its seeds)."""
    columns = {"AUROC": "auroc", "paper": "paper_auroc", "S_D": "auroc_score_d", "S_A": "auroc_score_a", "S_A teacher": "auroc_score_a_teacher"}
    if any(result.get("pixel_auroc") is not None for result in results):
        columns |= {"pixels": "pixel_auroc", "AU-PRO": "au_pro"}
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


def mistakes(result):
    """A line about the verdicts at delta: false alarms on normal images, misses by kind of defect."""
    missed = ", ".join(f"{kind} {n} of {of}" for kind, (n, of) in result["misses_by_kind"].items())
    return (f"{result['category']} seed {result['seed']}, delta {result['delta']:.3f}: false alarms {result['false_alarms']} of {result['n_normal']}"
            + (f"; missed {missed}" if missed else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: every complete run below --out)")
    parser.add_argument("--out", default="runs", help="where to look for runs (default runs)")
    parser.add_argument("--images", nargs="+", type=Path, metavar="PATH", help="pictures, or folders of them, to score in place of the test split")
    parser.add_argument("--json", action="store_true", help="with --images: a JSON object per picture and line; messages go to stderr")
    parser.add_argument("--exit-code", action="store_true", help="with --images: exit with 1 if a picture is anomalous")
    parser.add_argument("--heatmaps", type=Path, metavar="DIR", help="write a heat map of every image, and a page that shows the worst first")
    parser.add_argument("--show-failures", type=int, default=0, metavar="N", help="list the N worst misses and false alarms; heat maps in RUN/failures")
    parser.add_argument("--plot", action="store_true", help="write the histogram of the scores and the ROC curve into the run folder, as SVG")
    parser.add_argument("--report", type=Path, metavar="DIR", help="keep the runs' result.json in DIR and write its tables; runs that have one are not scored again")
    parser.add_argument("--data-root", help="folder that holds the categories (default: as in training)")
    parser.add_argument("--weights", help="the teacher's file (default: as in training)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that do not decode, and list them at the end")
    parser.add_argument("--batch-size", type=int, default=32, help="images at a time; scores do not depend on it (default 32)")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="of the networks (default: as in training)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    args = parser.parse_args()
    for name, least in (("batch_size", 1), ("show_failures", 0)):
        if getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    for name in ("json", "exit_code"):
        if getattr(args, name) and not args.images:
            fail(f"--{name.replace('_', '-')}: expected --images with it, got none")
    with one_sentence():
        runs = [(run, read_config(run)) for run in find_runs(args.runs, args.out)]
        if (args.images or args.heatmaps) and len(runs) > 1:
            raise ValueError(f"{'--images' if args.images else '--heatmaps'}: expected one run, got {len(runs)}: name one, like {runs[0][0]}")
    from vit import pick_device

    with one_sentence():
        device = pick_device(args.device)
    if args.images:
        args.runs = [runs[0][0]]
        sys.exit(int(score_images(args, device) and args.exit_code))
    todo = [(run, config) for run, config in runs if not (args.report and (run / "result.json").is_file())]
    results, teachers, scored = {}, {}, 0
    for _, group in itertools.groupby(sorted(todo, key=of_one_kind), key=of_one_kind):
        for result in evaluate(list(group), args, device, teachers):
            results.setdefault(result["dataset"], []).append(result)
            scored += 1
            if sys.stderr.isatty():
                print(f"{result['category']}: {result['n_normal']} normal, {result['n_anomalous']} anomalous", file=sys.stderr)
    for dataset, rows in results.items():
        order = list(PAPER_AUROC[dataset])  # the paper's, then what it does not have
        rows.sort(key=lambda row: (order.index(row["category"]) if row["category"] in order else len(order), row["seed"]))
        teacher = ", ".join(sorted({str(row["teacher"]) for row in rows}))
        print("\n".join(map(mistakes, rows)))
        print(f"{dataset}: image AUROC in %, last epoch, teacher {teacher}")
        print(table(rows))
    for why in (why for rows in results.values() for row in rows for why in row["skipped"]):
        print(f"skipped: {why}", file=sys.stderr)
    if scored < len(todo):
        if len(todo) > 1:
            print(f"{len(todo) - scored} of {len(todo)} runs could not be scored, for the reasons above", file=sys.stderr)
        sys.exit(2)
    if args.report:
        from results.report import report

        with one_sentence():
            print("\n".join(f"table: {path}" for path in report(args.report, [run for run, _ in runs])))


if __name__ == "__main__":
    main()
