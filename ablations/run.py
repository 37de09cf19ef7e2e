#!/usr/bin/env python3
"""The paper's ablations, section 4.3: train what a figure compares, score it, and draw it.

    python ablations/run.py --figure 4 --categories bottle,pill --seeds 0,1,2
    python ablations/run.py --figure 3b --categories bottle --epochs 8 --results figures

Any other option is train.py's and holds for all runs of the figure. Refused are --overwrite,
--dataset, --category, --without, --pos-embed, and with a CNN --cache. The command may be stopped at
any time and goes on when it is given again: complete runs are not trained again, scored ones not
scored again. Figure 5 is made of the tables of 3b, 3c and 4 where they are there. Runs lie in
<out>/ablations/<variant>/, results in --results: figure_4.csv, .md and .svg.
"""

import os

if __name__ == "__main__":
    # See train.py: threads that wait for each other should not spin for long.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import itertools
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

import runs
import train
from ablations import backbones
from data import CATEGORIES, find_category
from evaluate import evaluate, is_scored, report_and_go_on, write_result
from results.pictures import grouped_bars
from results.report import NAMES, cell, mean_and_spread, read_result, row
from runs import UserError
from weights.download import ensure_weights


@dataclass(frozen=True)
class Variant:
    """A bar of a figure: its backbone, its options of train.py, and the score that it compares.

    Without L_anchor nothing brings the student's class token to the anchor, so S_D alone is
    compared, else S_D + S_A.
    """

    backbone: str
    options: tuple
    score: str = "auroc"


S_D = "auroc_score_d"
# A CNN has no position embedding, and stages of unequal widths do not go into one array.
CNN = ("--pos-embed", "learn", "--cache", "off")
PAPERS_VGG = ("--optimizer", "sgd", "--lr", "0.001", "--batch-size", "128")  # section 4.3
VGG = (*CNN, *PAPERS_VGG, "--layers", "0,1,2,3,4")
# Muon is for a ViT's matrices. The epochs are those of the results that are there: 1,600 steps.
RESNET = (*CNN, "--optimizer", "adamw", "--epochs", "31", "--layers", "0,1,2,3")
VARIANTS = {
    "VGG": Variant("vgg16", (*VGG, "--without", "anchor,gram"), S_D),
    "VGG + L_anchor": Variant("vgg16", (*VGG, "--without", "gram")),
    "ResNet": Variant("resnet18", (*RESNET, "--without", "anchor,gram"), S_D),
    "ResNet + L_anchor": Variant("resnet18", (*RESNET, "--without", "gram")),
    "ViT": Variant("vit", ("--without", "anchor,gram"), S_D),
    "ViT + L_Gram": Variant("vit", ("--without", "anchor"), S_D),
    "ViT + L_Gram + L_anchor": Variant("vit", ()),
    "position embedding learnt": Variant("vit", ("--pos-embed", "learn")),
}


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: (variant, what it is compared with), and what the paper says of it."""

    dataset: str
    variants: tuple
    claim: str


FIGURES = {
    "3a": Figure(
        "cifar10",
        (("VGG", None), ("VGG + L_anchor", "VGG")),
        "every class gains by L_anchor, about 1 point",
    ),
    "3b": Figure(
        "mvtec",
        (("VGG", None), ("VGG + L_anchor", "VGG")),
        "the mean gains by L_anchor; some categories lose",
    ),
    "3c": Figure(
        "mvtec",
        (("ResNet", None), ("ResNet + L_anchor", "ResNet")),
        "most categories gain by L_anchor, leather and pill clearly",
    ),
    "4": Figure(
        "mvtec",
        (("ViT", None), ("ViT + L_Gram", "ViT"), ("ViT + L_Gram + L_anchor", "ViT + L_Gram")),
        "each term adds about 1 point to the mean",
    ),
    "5": Figure(
        "mvtec",
        (
            ("VGG", None),
            ("VGG + L_anchor", "VGG"),
            ("ResNet", None),
            ("ResNet + L_anchor", "ResNet"),
            ("ViT + L_Gram", None),
            ("ViT + L_Gram + L_anchor", "ViT + L_Gram"),
        ),
        "ten of 15 categories gain by L_anchor with the ViT, pill and metal nut by 8 points; "
        "fewer with VGG",
    ),
    "7": Figure(
        "mvtec",
        (
            ("position embedding learnt", None),
            ("ViT + L_Gram + L_anchor", "position embedding learnt"),
        ),
        "the teacher's embedding, frozen, is better in nearly every category",
    ),
}
PARTS_OF_5 = ("3b", "3c", "4")  # whose tables it is made of
COLUMNS = (  # of a figure's CSV
    "variant",
    "category",
    "seed",
    "value",
    "auroc",
    "auroc_score_d",
    "auroc_score_a_teacher",
    "steps",
    "delta",
    "commit",
    "device",
    "date",
    "command",
)
SIZES = (32, 2048)  # of the CNNs' images: five poolings halve the side; VGG's maps need memory
FILLS = ("#9ecae1", "#1f77b4", "#fdae6b", "#e6550d", "#a1d99b", "#31a354")  # of the bars


# --------------------------------------------------------------------------------- train and score


@dataclass(frozen=True)
class Request:
    """What the command line asks for, besides the figure."""

    categories: list
    seeds: tuple
    results: Path  # folder for tables and charts
    weights: dict  # backbone: file or name of the teacher's weights
    image_size: int  # of the CNNs
    options: list  # train.py's


def load_teacher(backbone, weights, image_size):
    """-> (file of the weights, the teacher)"""
    if backbone == "vit":
        path = ensure_weights(weights)
        return path, runs.load_teacher(path)
    least = backbones.BACKBONES[backbone].least_size
    if image_size < least:
        raise UserError(f"--image-size: expected {least} or more for {backbone}, got {image_size}")
    path = runs.weights_path(weights)
    return path, backbones.load(backbone, path, image_size)


def check_options(figure, request):
    """Refuse options that would make a variant another one, and to overwrite what figures share."""
    for name, _ in FIGURES[figure].variants:
        variant = VARIANTS[name]
        own = ["--dataset", FIGURES[figure].dataset, "--category", request.categories[0]]
        own += variant.options
        plain, _, _ = train.parse(own)
        given, _, existing = train.parse([*own, *request.options])
        if existing == "overwrite":
            raise UserError(
                "--overwrite: expected none, since figures share runs: use another --out"
            )
        fixed = ["dataset", "category", "without", "pos_embed"]
        if variant.backbone != "vit":
            fixed.append("cache")
        for option in fixed:
            value = getattr(given, option)
            if value != getattr(plain, option):
                raise UserError(
                    f"{runs.flag(option)}: expected none, which is part of {name}, got {value}"
                )


def run_variant(name, dataset, request):
    """Train and score a variant on every category with every seed; -> its results."""
    variant = VARIANTS[name]
    path, teacher = load_teacher(
        variant.backbone, request.weights[variant.backbone], request.image_size
    )
    folder = name.replace(" + ", "+").replace(" ", "_")
    if variant.backbone != "vit" and request.image_size != 224:
        folder += f"_{request.image_size}px"
    own = ["--dataset", dataset, "--category", request.categories[0], "--weights", str(path)]
    settings, _, _ = train.parse([*own, *variant.options, *request.options])
    settings = replace(settings, out=str(Path(settings.out) / "ablations" / folder))
    settings, device = train.set_up(settings)
    runs.check_teacher(asdict(settings), teacher)
    folders, left = [], []
    for category in request.categories:
        settings = replace(settings, category=category)
        todo = train.runs_to_do(settings, request.seeds, "resume")
        left += train.train_all(todo, teacher, device, "resume")
        folders += [train.run_folder(replace(settings, seed=seed)) for seed in request.seeds]
    if left:
        raise UserError(
            f"{name}: expected runs that no other process trains, got {', '.join(left)}: "
            f"give the command again when they are complete"
        )
    configs = {run: runs.read_config(run) for run in folders}
    unscored = [(run, config) for run, config in configs.items() if not is_scored(run, config)]
    for scored in evaluate(unscored, device, teacher=teacher):
        with report_and_go_on(unscored):
            write_result(scored, device)
    if not all(is_scored(run, config) for run, config in configs.items()):
        raise UserError(f"{name}: some of its runs could not be scored, for the reasons above")
    results = [read_result(run / "result.json") for run in folders]
    for run, result in zip(folders, results, strict=True):
        if result[variant.score] is None:
            raise UserError(f"{run}: expected normal and anomalous test images, got one kind")
    return results


def csv_rows(name, results):
    """The rows of a figure's CSV for one variant."""
    for result in results:
        yield {
            **{column: result.get(column) for column in COLUMNS},
            "variant": name,
            "value": result[VARIANTS[name].score],
            **{key: result["trained"][key] for key in ("commit", "device", "date", "command")},
        }


def read_csv(figure, request):
    """The rows of a figure's CSV for what is asked for; none if one of its runs is missing."""
    path = request.results / f"figure_{figure}.csv"
    variants = [name for name, _ in FIGURES[figure].variants]
    wanted = set(itertools.product(variants, request.categories, map(str, request.seeds)))
    if not path.is_file():
        return []
    rows = runs.read_csv(path, COLUMNS)
    rows = [r for r in rows if (r["variant"], r["category"], r["seed"]) in wanted]
    for r in rows:
        if not runs.is_number(r["value"]):
            raise UserError(f"{path}: expected numbers as value, got {r['value']!r}: make it again")
    found = sorted((r["variant"], r["category"], r["seed"]) for r in rows)
    return rows if found == sorted(wanted) else []  # each once


def refuse_to_lose(path, request):
    """Refuse to write fewer categories or seeds over a figure's CSV, if that is a whole one."""
    there = set()
    with contextlib.suppress(UserError, OSError):
        there = {(r["category"], r["seed"]) for r in runs.read_csv(path, COLUMNS)}
    lost = there - set(itertools.product(request.categories, map(str, request.seeds)))
    if lost:
        category, seed = min(lost)
        raise UserError(
            f"{path}: expected its categories and seeds, got none of {category}, seed {seed}: "
            f"name them too, or another --results"
        )


def make(figure, request):
    """Run what a figure compares, write its CSV, table and chart; -> the rows of the CSV."""
    names = [name for name, _ in FIGURES[figure].variants]
    path = request.results / f"figure_{figure}.csv"
    parts = PARTS_OF_5 if figure == "5" else ()
    for one in (figure, *parts):
        refuse_to_lose(request.results / f"figure_{one}.csv", request)
        check_options(one, request)
    rows = []
    if figure == "5":
        for part in parts:
            known = read_csv(part, request)
            if known:
                print(f"figure {part}: {request.results}/figure_{part}.csv, as it is")
            rows += known or make(part, request)
        rows = [r for name in names for r in rows if r["variant"] == name]
    else:
        for name in names:
            rows += csv_rows(name, run_variant(name, FIGURES[figure].dataset, request))
    runs.write_csv(path, COLUMNS, rows)
    rows = read_csv(figure, request)
    runs.write_text(path.with_suffix(".md"), table(figure, rows))
    runs.write_text(path.with_suffix(".svg"), bars(figure, rows))
    return rows


# --------------------------------------------------------------------------------- table and chart


def seed_means(rows, variant, category=None):
    """{seed: AUROC} of a variant in one category, or its mean over all."""
    by_seed = {}
    for r in rows:
        if r["variant"] == variant and category in (None, r["category"]):
            by_seed.setdefault(r["seed"], []).append(float(r["value"]))
    return {seed: statistics.fmean(values) for seed, values in by_seed.items()}


def differences(rows, variant, other, category=None):
    """AUROC of `variant` minus that of `other`, seed by seed."""
    ours, theirs = seed_means(rows, variant, category), seed_means(rows, other, category)
    return [ours[seed] - theirs[seed] for seed in theirs]


def verdict(gains):
    """In words: do differences, one a seed, go beyond their own standard deviation?"""
    if len(gains) < 2:
        return "one seed, so no spread"
    mean = statistics.fmean(gains)
    if abs(mean) <= statistics.stdev(gains):
        return "no difference beyond the spread"
    return "better" if mean > 0 else "worse"


def distinct(rows, column):
    return list(dict.fromkeys(r[column] for r in rows))


def table(figure, rows):
    """The rows of a figure's CSV -> Markdown: AUROC per category, differences, how it was made."""
    dataset, variants = FIGURES[figure].dataset, FIGURES[figure].variants
    categories = distinct(rows, "category")
    names = [name for name, _ in variants]
    lines = [
        f"## Figure {figure}, {NAMES[dataset]}",
        "",
        f"Image AUROC in %, last epoch, mean ± standard deviation over seeds "
        f"{', '.join(map(str, distinct(rows, 'seed')))}; of S_D + S_A, or of S_D alone without "
        f"L_anchor.",
        "",
        row(["category", *names]),
        "|---" * (len(names) + 1) + "|",
    ]
    for category in [*categories, None]:
        cells = [cell(seed_means(rows, name, category).values()) for name in names]
        lines.append(row([category or "mean", *cells]))
    lines += [
        "",
        f"The paper: {FIGURES[figure].claim}. Here, seed by seed:",
        "",
        "| difference | category | points | |",
        "|---|---|---|---|",
    ]
    for name, other in variants:
        if other is None:
            continue
        for category in [*categories, None]:
            gains = differences(rows, name, other, category)
            difference = f"{name} against {other}"
            lines.append(row([difference, category or "mean", cell(gains), verdict(gains)]))
    made = {(r["variant"], str(r["steps"]), r["device"], r["commit"], r["date"][:10]) for r in rows}
    lines += ["", "| variant | steps | device | commit | date |", "|---|---|---|---|---|"]
    lines += [row(cells) for cells in sorted(made)]
    return "\n".join(lines) + "\n"


def bars(figure, rows):
    """The same as a bar chart, SVG: a group of bars a category and for the mean.

    Whiskers are one standard deviation over the seeds.
    """
    groups = [*distinct(rows, "category"), None]
    series = {}
    for name, _ in FIGURES[figure].variants:
        of_groups = [list(seed_means(rows, name, category).values()) for category in groups]
        series[name] = [mean_and_spread(x) for x in of_groups]
    names = [category or "mean" for category in groups]
    return grouped_bars(f"Figure {figure}", names, series, FILLS)


# ------------------------------------------------------------------------------------ command line


def parse(argv):
    """Command line -> (figure, Request)."""
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--figure", required=True, choices=list(FIGURES), help="of the paper")
    add("--categories", help="comma-separated (default all of the data set)")
    add("--seeds", type=runs.whole_numbers, default="0", help="comma-separated (default 0)")
    add("--weights", default=train.TEACHER, help="the ViT teacher, a file or a name")
    for name in backbones.BACKBONES:
        add(f"--{name}", default=name, help=f"its weights, a file or a name (default {name})")
    add("--image-size", type=int, default=224, help="of the CNNs, in pixels (default the paper's)")
    results = Path(__file__).parent / "results"
    add("--results", type=Path, default=results, help="folder for tables and charts")
    args, options = parser.parse_known_args(argv)
    dataset = FIGURES[args.figure].dataset
    categories = list(CATEGORIES[dataset])
    if not SIZES[0] <= args.image_size <= SIZES[1]:
        sizes = f"{SIZES[0]} to {SIZES[1]}"
        raise UserError(f"--image-size: expected {sizes}, got {args.image_size}")
    if args.categories is not None:  # one that is named twice is run once
        named = [find_category(dataset, name) for name in args.categories.split(",")]
        categories = list(dict.fromkeys(named))
    request = Request(
        categories=categories,
        seeds=args.seeds,
        results=args.results,
        weights={"vit": args.weights, **{name: vars(args)[name] for name in backbones.BACKBONES}},
        image_size=args.image_size,
        options=options,
    )
    return args.figure, request


@runs.script
def main(argv):
    figure, request = parse(argv)
    with runs.new_folder(request.results):  # one that cannot be is found out before the training
        print(table(figure, make(figure, request)))


if __name__ == "__main__":
    sys.exit(main())
