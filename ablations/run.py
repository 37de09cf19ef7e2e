#!/usr/bin/env python3
"""The paper's ablations, section 4.3: train what a figure compares, score it, and write its table and bar chart.

    python ablations/run.py --figure 4 --categories bottle,pill --seeds 0,1,2 --weights weights/deit_tiny_patch16_224.safetensors
    python ablations/run.py --figure 3b --categories bottle --vgg16 vgg16.safetensors --epochs 8

Every other option is train.py's, for all runs of the figure. May be stopped at any time, and goes on with the same command: complete runs are not
trained again, scored ones not scored again; figure 5 is made of the tables of 3b, 3c and 4 where they are there. Runs lie in
<out>/ablations/<variant>/, results in --results: figure_4.csv, .md and .svg.
"""
import argparse
import csv
import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train  # noqa: E402
from data import find_category  # noqa: E402
from weights.files import atomic, fail, one_sentence, read_config  # noqa: E402

CNN = ["--pos-embed", "learn", "--cache", "off"]  # there is no position embedding; stages of unequal widths do not go into one array
VGG = [*CNN, "--optimizer", "sgd", "--lr", "0.001", "--batch-size", "128", "--layers", "0,1,2,3,4"]  # section 4.3
RESNET = [*CNN, "--layers", "0,1,2,3"]
VARIANTS = {  # name in the figures: its backbone and its options of train.py
    "VGG": ("vgg16", [*VGG, "--without", "anchor,gram"]),
    "VGG + L_anchor": ("vgg16", [*VGG, "--without", "gram"]),
    "ResNet": ("resnet18", [*RESNET, "--without", "anchor,gram"]),
    "ResNet + L_anchor": ("resnet18", [*RESNET, "--without", "gram"]),
    "ViT": ("vit", ["--without", "anchor,gram"]),
    "ViT + L_Gram": ("vit", ["--without", "anchor"]),
    "ViT + L_Gram + L_anchor": ("vit", []),
    "position embedding learnt": ("vit", ["--pos-embed", "learn"]),
}
FIGURES = {  # data set, (variant, what it is compared with), what the paper says came out
    "3a": ("cifar10", [("VGG", None), ("VGG + L_anchor", "VGG")], "every class gains by L_anchor, about 1 point"),
    "3b": ("mvtec", [("VGG", None), ("VGG + L_anchor", "VGG")], "the mean gains by L_anchor; some categories lose"),
    "3c": ("mvtec", [("ResNet", None), ("ResNet + L_anchor", "ResNet")], "most categories gain by L_anchor, leather and pill clearly"),
    "4": ("mvtec", [("ViT", None), ("ViT + L_Gram", "ViT"), ("ViT + L_Gram + L_anchor", "ViT + L_Gram")], "each term adds about 1 point to the mean"),
    "5": ("mvtec", [("VGG", None), ("VGG + L_anchor", "VGG"), ("ResNet", None), ("ResNet + L_anchor", "ResNet"), ("ViT + L_Gram", None),
                    ("ViT + L_Gram + L_anchor", "ViT + L_Gram")], "ten of 15 categories gain by L_anchor with the ViT, pill and metal nut by 8 points; fewer with VGG"),
    "7": ("mvtec", [("position embedding learnt", None), ("ViT + L_Gram + L_anchor", "position embedding learnt")],
          "the teacher's embedding, frozen, is better in nearly every category"),
}
PARTS_OF_5 = ("3b", "3c", "4")  # whose tables it is made of
COLUMNS = ("variant", "category", "seed", "value", "auroc", "auroc_score_d", "auroc_score_a_teacher", "steps", "delta", "commit", "device", "date", "command")


def teacher_of(backbone, args):
    """-> (file of the weights, the teacher)"""
    from vit import load_vit
    from weights.download import weights_file

    path = weights_file(getattr(args, backbone))
    if backbone == "vit":
        return path, load_vit(path)
    from ablations.backbones import load

    return path, load(backbone, path, args.image_size)


def run_variant(variant, dataset, args, options):
    """Train and score a variant on every category with every seed; -> its results, what result.json holds of each."""
    import evaluate
    from vit import pick_device

    backbone, own = VARIANTS[variant]
    with one_sentence():
        path, teacher = teacher_of(backbone, args)
    size = "" if backbone == "vit" or args.image_size == 224 else f"_{args.image_size}px"
    runs = []
    for category in args.categories:
        settings, _, _ = train.parse(["--dataset", dataset, "--category", category, "--weights", str(path), *own, *options])
        settings = replace(settings, out=str(Path(settings.out) / "ablations" / (variant.replace(" + ", "+").replace(" ", "_") + size)))
        train.main(settings, args.seeds, "resume", teacher)
        runs += [train.run_folder(replace(settings, seed=seed)) for seed in args.seeds]
    plain = SimpleNamespace(weights=None, data_root=None, precision="fp32", batch_size=32, skip_bad=False, heatmaps=None, show_failures=0, plot=False)
    todo = [(run, read_config(run)) for run in runs if not (run / "result.json").is_file()]
    for _, group in itertools.groupby(sorted(todo, key=evaluate.of_one_kind), key=evaluate.of_one_kind):
        evaluate.evaluate(list(group), plain, pick_device(settings.device), {path: teacher})
    if not all((run / "result.json").is_file() for run in runs):
        sys.exit(2)  # why is said already
    return [json.loads((run / "result.json").read_text()) for run in runs]


def rows_of(variant, results):
    """Rows of the CSV. The value compared is the AUROC of Score = S_D + S_A, or of S_D alone where there was no L_anchor to train S_A."""
    value = "auroc_score_d" if "anchor" in " ".join(VARIANTS[variant][1]) else "auroc"
    for r in results:
        yield {**{name: r.get(name) for name in COLUMNS}, "variant": variant, "value": r[value], **{k: r["trained"][k] for k in ("commit", "device", "date", "command")}}


def differences(rows, variant, other, category=None):
    """Value of `variant` minus that of `other`, seed by seed, as a mean over the categories (or of one)."""
    values = {}
    for row in rows:
        if row["variant"] in (variant, other) and category in (None, row["category"]):
            values.setdefault(row["seed"], {}).setdefault(row["variant"], []).append(float(row["value"]))
    return [statistics.fmean(of[variant]) - statistics.fmean(of[other]) for of in values.values()]


def verdict(gains):
    """In words: whether differences, one a seed, go beyond their own standard deviation."""
    if len(gains) < 2:
        return "one seed, so no spread"
    mean, spread = statistics.fmean(gains), statistics.stdev(gains)
    return "no difference beyond the spread" if abs(mean) <= spread else "better" if mean > 0 else "worse"


def table(figure, rows):
    """The rows of a figure's CSV -> Markdown: values per category, and differences with what the paper says of them."""
    from results.report import NAMES, cell

    dataset, variants, claim = FIGURES[figure]
    categories, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("category", "seed"))

    def values(variant, category=None):
        """One number a seed: of the category, or the mean of all."""
        of = {seed: [float(r["value"]) for r in rows if r["variant"] == variant and r["seed"] == seed and category in (None, r["category"])] for seed in seeds}
        return [statistics.fmean(x) for x in of.values()]

    names = [variant for variant, _ in variants]
    lines = [f"## Figure {figure}, {NAMES[dataset]}", "",
             f"Image AUROC in %, last epoch, mean ± standard deviation over seeds {', '.join(map(str, seeds))}; of S_D + S_A, or of S_D alone without L_anchor.", "",
             "| category | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {category} | " + " | ".join(cell(values(variant, category)) for variant in names) + " |" for category in categories]
    lines += ["| mean | " + " | ".join(cell(values(variant)) for variant in names) + " |", "", f"The paper: {claim}. Here, seed by seed:", "",
              "| difference | category | points | |", "|---|---|---|---|"]
    for variant, other in variants:
        for category in [*categories, None] if other else []:
            gains = differences(rows, variant, other, category)
            lines.append(f"| {variant} against {other} | {category or 'mean'} | {cell(gains)} | {verdict(gains)} |")
    made = sorted({(r["variant"], str(r["steps"]), r["device"], r["commit"], r["date"][:10]) for r in rows})
    lines += ["", "| variant | steps | device | commit | date |", "|---|---|---|---|---|", *("| " + " | ".join(row) + " |" for row in made)]
    return "\n".join(lines) + "\n"


def bars(figure, rows):
    """The same as a bar chart, SVG text: a group of bars per category and for the mean, whiskers of one standard deviation."""
    from results.pictures import svg

    _, variants, _ = FIGURES[figure]
    categories, seeds = (list(dict.fromkeys(row[name] for row in rows)) for name in ("category", "seed"))
    fills = ("#9ecae1", "#1f77b4", "#fdae6b", "#e6550d", "#a1d99b", "#31a354")
    low = max(0, 10 * (min(float(row["value"]) for row in rows) // 10) - 10)

    def marks(at):
        for x, category in enumerate([*categories, None]):
            for i, (variant, _) in enumerate(variants):
                values = [statistics.fmean(float(r["value"]) for r in rows if r["variant"] == variant and r["seed"] == seed and category in (None, r["category"]))
                          for seed in seeds]
                mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0
                (left, top), (right, bottom) = at(x + 0.1 + 0.8 * i / len(variants), mean), at(x + 0.1 + 0.8 * (i + 1) / len(variants), low)
                middle, (_, high), (_, deep) = (left + right) / 2, at(x, mean + spread), at(x, mean - spread)
                yield (f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="{fills[i]}"/>'
                       f'<path d="M{middle:.1f} {high:.1f}V{deep:.1f}" stroke="#222"/>')

    ticks = [(x + 0.5, category or "mean") for x, category in enumerate([*categories, None])]
    legend = [(variant, fill) for (variant, _), fill in zip(variants, fills)]
    width, names = 80 * len(ticks), 170  # pixels of the bars, and of the legend to their right
    return svg(f"Figure {figure}", "", "image AUROC, %", (0, (width + names) / 80), (low, 100), marks, legend, x_ticks=ticks, width=80 + width + names)


def read(figure, args):
    """The rows of a figure's CSV for the categories and seeds asked for; none if one of its runs is missing."""
    path, wanted = args.results / f"figure_{figure}.csv", set(itertools.product(args.categories, map(str, args.seeds)))
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["category"], row["seed"]) in wanted]
    return rows if len(rows) == len(wanted) * len(FIGURES[figure][1]) else []


def make(figure, args, options):
    """Run what a figure compares and write its CSV, table and chart; -> the rows of the CSV."""
    dataset, variants, _ = FIGURES[figure]
    if figure == "5":
        of_parts = [row for part in PARTS_OF_5 for row in read(part, args) or make(part, args, options)]
        rows = [row for variant, _ in variants for row in of_parts if row["variant"] == variant]
    else:
        rows = [row for variant, _ in variants for row in rows_of(variant, run_variant(variant, dataset, args, options))]
    args.results.mkdir(parents=True, exist_ok=True)
    with atomic(args.results / f"figure_{figure}.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    rows = read(figure, args)
    for suffix, render in ((".md", table), (".svg", bars)):
        with atomic(args.results / f"figure_{figure}{suffix}") as temporary:
            temporary.write_text(render(figure, rows))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--figure", required=True, choices=list(FIGURES), help="of the paper")
    parser.add_argument("--categories", help="comma-separated (default all of the data set)")
    parser.add_argument("--seeds", type=train.whole_numbers, default="0", help="comma-separated (default 0)")
    parser.add_argument("--weights", dest="vit", default="vit_base_patch16_224", help="the ViT teacher, a file or a name, as in train.py")
    parser.add_argument("--vgg16", default="weights/vgg16.safetensors", help="the VGG16 teacher (default weights/vgg16.safetensors)")
    parser.add_argument("--resnet18", default="weights/resnet18.safetensors", help="the ResNet18 teacher (default weights/resnet18.safetensors)")
    parser.add_argument("--image-size", type=int, default=224, help="of the CNNs, in pixels (default 224, the paper's)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="folder for tables and charts")
    args, options = parser.parse_known_args()
    dataset = FIGURES[args.figure][0]
    with one_sentence():
        everything = train.PAPER_AUROC[dataset]
        args.categories = list(dict.fromkeys(find_category(dataset, name) for name in args.categories.split(","))) if args.categories else list(everything)
    rows = make(args.figure, args, options)
    print(table(args.figure, rows))


if __name__ == "__main__":
    main()
