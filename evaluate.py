#!/usr/bin/env python3
"""Score the test split of trained runs and print their AUROC; or score any pictures, one by one.

    python evaluate.py                                  # every complete run below runs/
    python evaluate.py runs/mvtec/bottle/seed0 ...      # these
    python evaluate.py RUN --images FILE_OR_FOLDER ...  # other pictures: score, delta, verdict
    python evaluate.py RUN --heatmaps DIR               # where the score comes from, as pictures

It prints the mistakes at delta by kind of defect, and a table per data set and teacher with the
paper's AUROC beside ours. Each run folder gets scores.csv (a line per image: raw scores, higher =
more anomalous) and result.json.

Columns, in %:
    AUROC         of the score S_D + S_A, Eq. 10
    paper         the paper's AUROC
    S_D, S_A      AUROC of each alone
    teacher       AUROC of the teacher's term of S_A, which needs no training
    S_D stand.    AUROC of S_D standardised, which is not the paper's, see `vitad.Standardiser`
    pixels        AUROC of the pixels of the heat maps, where there are masks
    AU-PRO        how much of a defect they find, see results/README.md
"""

import os

if __name__ == "__main__":
    # See train.py: threads that wait for each other should not spin for long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import itertools
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import runs
from data import (
    CATEGORIES,
    SMALL,
    Split,
    check_name,
    images_in,
    note_inner_folders,
    read_image,
    test_split,
)
from results import pictures, report
from runs import UserError
from vitad import FEW, Distillation
from weights.download import ensure_weights

TRAINED = ("commit", "device", "command", "date", "versions")  # of config.json, for result.json
SCORES = (  # columns of scores.csv
    "score",
    "score_d",
    "score_a_teacher",
    "score_a_student",
    "score_d_standardised",  # where the run has a vitad.Standardiser
)

# ------------------------------------------------------------------------------------------ metrics


def auroc(scores, labels):
    """Area under the ROC curve in per cent.

    It is how often an anomalous image scores above a normal one, a tie counting half. scores (n,),
    labels (n,), 1 = anomalous. By ranks: the sum of the anomalous images' ranks, less the smallest
    that it can be, over the number of pairs. NaN if one of the two kinds is missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels)
    n_anomalous = int((labels == 1).sum())
    pairs = n_anomalous * (len(labels) - n_anomalous)
    if pairs == 0:
        return math.nan
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of a tie, the middle one
    smallest = n_anomalous * (n_anomalous + 1) / 2
    return float(100 * (ranks[labels == 1].sum() - smallest) / pairs)


def regions(mask):
    """A mask (S, S) of 0 and 1 -> a number per connected region (8 neighbours), 0 outside."""
    numbers = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:  # every pixel takes the largest number around it, until none changes
        spread = F.max_pool2d(numbers[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, numbers):
            return numbers
        numbers = spread


def localisation(heat, masks, limit=0.3, bins=1 << 14):
    """How well heat (n, P) finds masks (n, S, S): pixel AUROC and AU-PRO, in per cent.

    AU-PRO (Bergmann et al. 2021): the area under the curve of the mean share of a defective region
    that is found, against the false-positive rate, from 0 to `limit`, over `limit`. NaN without
    defects.

    Heat is enlarged to S x S and sorted into `bins` between its extremes, the hottest first, so
    that the memory needed does not grow with n.
    """
    low, high = heat.min(), heat.max()
    normal, defective, found = (torch.zeros(bins, dtype=torch.float64) for _ in range(3))
    for patches, mask in zip(heat, masks, strict=True):
        side = math.isqrt(len(patches))
        square = patches.view(1, 1, side, side)
        pixels = F.interpolate(square, mask.shape, mode="bilinear")[0, 0]
        level = ((high - pixels) / (high - low + 1e-12) * bins).long().clamp(0, bins - 1)
        normal += level[mask == 0].bincount(minlength=bins)
        numbers = regions(mask)
        for number in numbers[numbers > 0].unique():
            inside = level[numbers == number].bincount(minlength=bins).double()
            defective += inside
            found += inside / inside.sum()
    if defective.sum() == 0 or normal.sum() == 0:
        return math.nan, math.nan
    false_positives, hits, overlap = (
        F.pad(counts.cumsum(0) / counts.sum(), (1, 0)) for counts in (normal, defective, found)
    )
    pixel_auroc = 100 * float(torch.trapezoid(hits, false_positives))
    au_pro = 100 * float(area_below(false_positives, overlap, limit) / limit)
    return pixel_auroc, au_pro


def area_below(x, y, limit):
    """The area under a curve through the points (x, y), x ascending, up to x = limit."""
    inside = x <= limit
    last = int(inside.sum())  # the curve goes on straight from point last - 1 to point last
    rise = (y[last] - y[last - 1]) * (limit - x[last - 1]) / (x[last] - x[last - 1])
    x_part = torch.cat([x[inside], torch.tensor([limit], dtype=x.dtype)])
    y_part = torch.cat([y[inside], (y[last - 1] + rise)[None]])
    return torch.trapezoid(y_part, x_part)


# ----------------------------------------------------------------------------- test splits of runs


@dataclass
class Scored:
    """A run, its test split, and the scores of the model on it, {column: (n,)} and heat (n, P)."""

    run: Path
    config: dict
    model: Distillation
    split: Split
    scores: dict = field(default_factory=dict)


def find_runs(paths, out):
    """The run folders named, or every complete one below `out`."""
    folders = [Path(path) for path in paths]
    if not folders:
        folders = sorted(path.parent for path in Path(out).glob("*/*/seed*/model.safetensors"))
    if not folders:
        raise UserError(
            f"{out}: expected complete runs (*/*/seed*/model.safetensors), got none: "
            f"train one with python train.py"
        )
    for run in folders:
        for name in ("config.json", "model.safetensors"):
            if not (run / name).is_file():
                got = "none: python train.py makes one"
                if (run / "checkpoint.safetensors").is_file() or (run / "log.jsonl").is_file():
                    got = "an unfinished one: train it to the end"
                raise UserError(f"{run / name}: expected a complete run, got {got}")
    return folders


def what_the_teacher_sees(run_and_config):
    """A key: runs with equal keys see the same test images through the same teacher.

    Its features are computed once for all of them: the categories of CIFAR and Fashion-MNIST, the
    seeds of an MVTec AD category.
    """
    _, config = run_and_config
    settings = config["settings"]
    category = "" if settings["dataset"] in SMALL else settings["category"]
    return (
        settings["dataset"],
        settings["data_root"] or "",
        category,
        config["teacher"]["sha256"],
        settings["layers"],
    )


def evaluate(
    todo,
    device,
    *,
    weights=None,
    data_root=None,
    precision="fp32",
    batch_size=32,
    skip_bad=False,
    teacher=None,
):
    """Score the test split of runs, [(run folder, its config)]; yields a Scored for each.

    A run that cannot be scored says why, and does not stop the others; a single one raises.
    teacher: one that is loaded already. The other options are those of the command line. On CUDA
    TF32 is set for the whole process.
    """
    runs.set_tf32(precision)
    ordered = sorted(todo, key=what_the_teacher_sees)
    for _, group in itertools.groupby(ordered, key=what_the_teacher_sees):
        group = list(group)
        jobs = []
        for run, config in group:
            settings = config["settings"]
            with report_and_go_on(todo):
                model = runs.load(run, weights, device, precision=precision, teacher=teacher)
                split = test_split(
                    settings["dataset"],
                    data_root or settings["data_root"],
                    settings["category"],
                    size=model.teacher.image_size,
                    skip_bad=skip_bad,
                )
                teacher = model.teacher
                jobs.append(Scored(run, config, model, split))
        score_together(jobs, device, batch_size)
        finite = []
        for job in jobs:
            with report_and_go_on(todo):
                check_finite(job)
                finite.append(job)
        yield from finite


@contextlib.contextmanager
def report_and_go_on(todo):
    """An error of one run among several is printed, and stops no other."""
    try:
        yield
    except (UserError, OSError) as error:
        if len(todo) == 1:
            raise
        runs.complain(error)


def check_finite(scored):
    if not all(values.isfinite().all() for values in scored.scores.values()):
        raise UserError(
            f"{scored.run}: expected finite scores, got some that are not: "
            f"the run is broken, train it again"
        )


def score_together(jobs, device, batch_size):
    """Fill in the scores of jobs with the same test images; the teacher sees these once."""
    if not jobs:
        return
    parts = [[] for _ in jobs]
    for images in jobs[0].split.images.split(batch_size):
        images = images.to(device, non_blocking=True)
        t = jobs[0].model.teacher_features(images)
        for job, collected in zip(jobs, parts, strict=True):
            scores = job.model.scores(images, t)
            collected.append({name: value.cpu() for name, value in scores.items()})
    for job, collected in zip(jobs, parts, strict=True):
        job.scores = {name: torch.cat([part[name] for part in collected]) for name in collected[0]}


def is_scored(run, config, precision="fp32"):
    """Whether a run has a result: of the model that is there, in `precision`, of every image."""
    path = run / "result.json"
    if not path.is_file():
        return False
    result = runs.read_json(path, {"trained": dict})
    # Before results said their precision, nearly all were scored in float32.
    made = result["trained"].get("date"), result.get("scored_in", "fp32")
    return made == (config["date"], precision) and not result.get("skipped")


def write_result(scored, device):
    """A run's scores.csv and result.json; -> the result."""
    run, split, scores = scored.run, scored.split, scored.scores
    result = {**summarise(scored), **runs.provenance(device)}
    columns = {"image": split.names, "label": split.labels}
    for name in SCORES:
        if name in scores:
            columns[name] = [f"{value:.9g}" for value in scores[name]]
    rows = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    runs.write_csv(run / "scores.csv", columns, rows)
    runs.write_text(run / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def summarise(scored):
    """The numbers of result.json: AUROC in per cent, and the mistakes at delta."""
    config, split, scores = scored.config, scored.split, scored.scores
    settings = config["settings"]
    labels = np.array(split.labels)
    delta = float(scored.model.delta)
    missed = (scores["score"].numpy() < delta) & (labels == 1)
    score_a = scores["score_a_teacher"] + scores["score_a_student"]
    pixel_auroc, au_pro = math.nan, math.nan
    if split.masks is not None:
        pixel_auroc, au_pro = localisation(scores["heat"], split.masks)
    percent = {
        "auroc": auroc(scores["score"], labels),
        "auroc_score_d": auroc(scores["score_d"], labels),
        "auroc_score_a": auroc(score_a, labels),
        "auroc_score_a_teacher": auroc(scores["score_a_teacher"], labels),
        "pixel_auroc": pixel_auroc,
        "au_pro": au_pro,
    }
    standardised = {}
    if scored.model.normal is not None:
        values = scores["score_d_standardised"]
        percent["auroc_standardised"] = auroc(values, labels)
        counts = at_delta(values, labels, float(scored.model.normal.delta))
        standardised = {f"{name}_standardised": value for name, value in counts.items()}
    kinds = np.array([name.split("/")[-2] for name in split.names])  # test/scratch/000.png
    misses_by_kind = {
        str(kind): [int(missed[kinds == kind].sum()), int((kinds == kind).sum())]
        for kind in np.unique(kinds[labels == 1])
    }
    return {
        "dataset": settings["dataset"],
        "category": settings["category"],
        "seed": settings["seed"],
        **{name: None if math.isnan(value) else value for name, value in percent.items()},
        "steps": steps_trained(scored.run),
        "paper_auroc": report.paper_auroc(settings["dataset"]).get(settings["category"]),
        "n_normal": int((labels == 0).sum()),
        "n_anomalous": int((labels == 1).sum()),
        "skipped": split.skipped,
        "scored_in": scored.model.precision,
        **at_delta(scores["score"], labels, delta),
        **standardised,
        "misses_by_kind": misses_by_kind,
        "teacher": config["teacher"].get("name"),
        "teacher_sha256": config["teacher"]["sha256"],
        "trained": {
            **{key: config[key] for key in TRAINED if key in config},
            "precision": settings.get("precision"),
        },
    }


def at_delta(scores, labels, delta):
    """The mistakes of Eq. 10: scores (n,), labels (n,), 1 = anomalous."""
    anomalous = scores.numpy() >= delta
    return {
        "delta": delta,
        "false_alarms": int((anomalous & (labels == 0)).sum()),
        "misses": int((~anomalous & (labels == 1)).sum()),
    }


def steps_trained(run):
    path = run / "log.jsonl"
    lines = runs.read_log(path) if path.is_file() else []
    return lines[-1][0] if lines else None


# ------------------------------------------------------------------------------------- any pictures


def score_pictures(args, run, device, weights):
    """--images: score, delta and verdict of each picture; -> the exit code.

    A batch of them is in memory at a time.
    """
    runs.set_tf32(args.precision)
    model = runs.load(run, weights, device, precision=args.precision)
    if args.standardised and model.normal is None:
        raise UserError(
            f"{run}: expected {FEW} or more images held out for --standardised, got fewer, "
            f"or a run of an earlier version: train it again"
        )
    for path in args.images:
        if not path.exists():
            raise UserError(f"{path}: expected a picture or a folder of them, got no such file")
    deltas = {"delta": float(model.delta)}
    if model.normal is not None:
        deltas["delta_standardised"] = float(model.normal.delta)
    column, threshold = "score", deltas["delta"]
    if args.standardised:
        column, threshold = "score_d_standardised", deltas["delta_standardised"]
    files = []
    for path in args.images:
        if path.is_dir():
            files.extend(images_in(path))
            note_inner_folders(path)
        else:
            files.append(path)
    gallery = None
    if args.heatmaps:
        heat_scale = model.heat_scale.tolist()
        gallery = pictures.Gallery(args.heatmaps, str(run), deltas["delta"], heat_scale)
    if not args.json:
        print(f"{'score':>9} {'delta':>9} verdict    image")
    any_decoded = any_anomalous = False
    for start in range(0, len(files), args.batch_size):
        batch = files[start : start + args.batch_size]
        decoded = list(decode_pictures(batch, model.teacher.image_size, args.skip_bad))
        if not decoded:
            continue
        any_decoded = True
        images = np.stack([image for _, image in decoded])
        scores = model.scores(torch.from_numpy(images).permute(0, 3, 1, 2))
        for i, (file, _) in enumerate(decoded):
            values = {name: float(x[i]) for name, x in scores.items() if name != "heat"}
            anomalous = values[column] >= threshold  # Eq. 10
            any_anomalous |= anomalous
            if args.json:
                line = {"image": str(file), "anomalous": anomalous, **deltas, **values}
                print(json.dumps(line), flush=True)
            else:
                verdict = "anomalous" if anomalous else "normal"
                print(f"{values[column]:9.3f} {threshold:9.3f} {verdict:9}  {file}", flush=True)
            if gallery:
                gallery.add(str(file), read_image(file, None), scores["heat"][i].cpu(), values)
    if not any_decoded:
        raise UserError(f"{args.images[0]}: expected pictures that decode, got none: see above")
    if gallery:
        print(f"heat maps: {gallery.close()}", file=sys.stderr)
    return int(any_anomalous and args.exit_code)


def decode_pictures(files, size, skip_bad):
    """Yields (file, image); a file that does not decode raises, or is skipped and said."""
    for file in files:
        try:
            check_name(file)
            yield file, read_image(file, size)
        except UserError as error:
            if not skip_bad:
                raise
            print(f"skipped: {error}", file=sys.stderr)


# ------------------------------------------------------------------------------------------- tables


def table(results):
    """The results of one data set and teacher as text: a row per run, and the mean.

    The mean is over the categories; each counts once, with the mean of its seeds.
    """
    columns = {
        "AUROC": "auroc",
        "paper": "paper_auroc",
        "S_D": "auroc_score_d",
        "S_A": "auroc_score_a",
        "teacher": "auroc_score_a_teacher",
    }
    if any(result.get("auroc_standardised") is not None for result in results):
        columns["S_D stand."] = "auroc_standardised"
    if any(result.get("pixel_auroc") is not None for result in results):
        columns |= {"pixels": "pixel_auroc", "AU-PRO": "au_pro"}
    by_category = {}
    for result in results:
        by_category.setdefault(result["category"], []).append(result)
    means = {key: report.mean_over_categories(by_category, key) for key in columns.values()}
    rows = [(result["category"], str(result["seed"]), result) for result in results]
    rows.append(("mean", "", means))
    width = max(len("category"), *(len(name) for name, _, _ in rows))
    titles = " ".join(f"{title:>10}" for title in columns)
    lines = [f"{'category':{width}} {'seed':>4} {titles}"]
    for name, seed, values in rows:
        cells = [values.get(key) for key in columns.values()]
        shown = " ".join(f"{'n/a' if x is None else f'{x:.2f}':>10}" for x in cells)
        lines.append(f"{name:{width}} {seed:>4} {shown}")
    return "\n".join(lines)


def mistakes(result):
    """Lines on the verdicts at delta: false alarms, and misses by kind of defect."""
    line = (
        f"{result['category']} seed {result['seed']}, delta {result['delta']:.3f}: "
        f"false alarms {result['false_alarms']} of {result['n_normal']}"
    )
    missed = [f"{kind} {n} of {total}" for kind, (n, total) in result["misses_by_kind"].items()]
    if missed:
        line += f"; missed: {', '.join(missed)}"
    if "delta_standardised" in result:
        line += (
            f"\n  by S_D standardised, delta {result['delta_standardised']:.3f}: "
            f"false alarms {result['false_alarms_standardised']} of {result['n_normal']}; "
            f"missed {result['misses_standardised']} of {result['n_anomalous']}"
        )
    return line


def print_results(results):
    """The mistakes and the table of each data set and teacher, then the files that were skipped."""
    groups = {}
    for result in results:
        key = result["dataset"], str(result["teacher"]), result["teacher_sha256"]
        groups.setdefault(key, []).append(result)
    for (dataset, teacher, _), rows in groups.items():
        order = [*CATEGORIES[dataset], *(row["category"] for row in rows)]
        rows.sort(key=lambda row, order=order: (order.index(row["category"]), row["seed"]))
        print("\n".join(map(mistakes, rows)))
        print(f"{dataset}: image AUROC in %, last epoch, teacher {teacher}")
        print(table(rows))
    for rows in groups.values():
        for reason in itertools.chain.from_iterable(row["skipped"] for row in rows):
            print(f"skipped: {reason}", file=sys.stderr)


# ------------------------------------------------------------------------------------- command line


def make_parser():
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    precisions = runs.CHOICES["precision"]
    add("runs", nargs="*", metavar="RUN", help="run folders (default every complete one of --out)")
    add("--out", default="runs", help="where to look for runs (default runs)")
    add("--images", nargs="+", type=Path, metavar="PATH", help="pictures, or folders of them")
    add(
        "--json", action="store_true", help="with --images: a JSON object per picture, one per line"
    )
    add("--exit-code", action="store_true", help="with --images: exit 1 if one is anomalous")
    add(
        "--standardised",
        action="store_true",
        help="with --images: the verdict is by S_D standardised; pictures keep the paper's score",
    )
    add(
        "--heatmaps",
        type=Path,
        metavar="DIR",
        help="heat maps, and a page of them, highest score first",
    )
    add(
        "--show-failures",
        type=int,
        default=0,
        metavar="N",
        help="the N worst misses and false alarms, in RUN/failures",
    )
    add("--plot", action="store_true", help="RUN/training.svg, histogram.svg and roc.svg")
    add(
        "--report",
        type=Path,
        metavar="DIR",
        help="keep results in DIR, write its tables; scored runs are not scored again",
    )
    add("--data-root", help="folder of the data set, as for train.py (default as in training)")
    add("--weights", help="the teacher's file (default as in training)")
    add("--skip-bad", action="store_true", help="leave out images that do not decode, and say so")
    add("--batch-size", type=int, default=32, help="images at a time (default 32)")
    add("--precision", choices=precisions, default="fp32", help="of both networks (default fp32)")
    add("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    return parser


def parse(argv):
    args = make_parser().parse_args(argv)
    for name, least in (("batch_size", 1), ("show_failures", 0)):
        runs.check_whole(name, getattr(args, name), least)
    for name in ("json", "exit_code", "standardised"):
        if getattr(args, name) and not args.images:
            raise UserError(f"{runs.flag(name)}: expected --images with it, got none")
    for name in ("report", "plot", "show_failures", "data_root"):
        if getattr(args, name) and args.images:
            raise UserError(f"{runs.flag(name)}: expected a test split, got --images with it")
    return args


@runs.script
def main(argv):
    args = parse(argv)
    folders = find_runs(args.runs, args.out)
    for option, given in (("--images", args.images), ("--heatmaps", args.heatmaps)):
        if given and len(folders) > 1:
            raise UserError(
                f"{option}: expected one run, got {len(folders)}: name one, like {folders[0]}"
            )
    device = runs.pick_device(args.device)
    weights = None if args.weights is None else ensure_weights(args.weights)
    with contextlib.ExitStack() as stack:
        for folder in (args.heatmaps, args.report):
            if folder:  # one that cannot be is found out before the scoring
                stack.enter_context(runs.new_folder(folder))
        if args.images:
            return score_pictures(args, folders[0], device, weights)
        score_runs(args, folders, device, weights)


def score_runs(args, folders, device, weights):
    """The test splits of runs, from the command line."""
    todo = [(run, runs.read_config(run)) for run in folders]
    drawn = args.heatmaps or args.show_failures or args.plot
    if args.report and not drawn and not args.data_root:
        todo = [item for item in todo if not is_scored(*item, args.precision)]
    results = []
    for scored in evaluate(
        todo,
        device,
        weights=weights,
        data_root=args.data_root,
        precision=args.precision,
        batch_size=args.batch_size,
        skip_bad=args.skip_bad,
    ):
        with report_and_go_on(todo):
            result = write_result(scored, device)
            if args.heatmaps:
                pictures.write_heatmaps(args.heatmaps, scored, range(len(scored.split.names)))
            if args.show_failures:
                pictures.write_failures(scored, args.show_failures)
            if args.plot:
                pictures.write_plots(scored, result["auroc"])
            results.append(result)
            if sys.stderr.isatty():
                counts = f"{result['n_normal']} normal, {result['n_anomalous']} anomalous"
                print(f"{result['category']}: {counts}", file=sys.stderr)
    print_results(results)
    if len(results) < len(todo):
        raise UserError(
            f"{len(todo) - len(results)} of {len(todo)} runs could not be scored, "
            f"for the reasons above"
        )
    if args.report:
        for path in report.report(args.report, folders):
            print(f"table: {path}")


if __name__ == "__main__":
    sys.exit(main())
