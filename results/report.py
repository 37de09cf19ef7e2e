"""Tables of results, made from nothing but the result.json files of runs, kept beside them."""

import functools
import json
import shutil
import statistics
import textwrap
from pathlib import Path

import runs
from data import CATEGORIES, slug
from results.pictures import grouped_bars
from runs import UserError

NAMES = {
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "fashion_mnist": "Fashion-MNIST",
    "mvtec": "MVTec AD",
}
COLUMNS = {  # of a table: the key in result.json
    "AUROC": "auroc",
    "S_D": "auroc_score_d",
    "S_D standardised": "auroc_standardised",
    "S_A": "auroc_score_a",
    "teacher's term": "auroc_score_a_teacher",
    "nearest patch": "auroc_nearest",
    "pixels": "pixel_auroc",
    "AU-PRO": "au_pro",
}
EXPLANATION = {  # what a table says of itself: always, or where it has the column
    "AUROC": "Image AUROC in %, last epoch; mean ± standard deviation over the seeds.",
    "S_D": "S_D, S_A, and the teacher's term of S_A, which needs no training: of these alone.",
    "S_D standardised": "S_D standardised (vitad.Standardiser) is not the paper's.",
    "nearest patch": "Nearest patch: the same teacher without a student, by nearest.py.",
}
ORIGIN = """\
Made by `evaluate.py --report` from the JSON files beside this table. The commands below trained and
scored the runs."""
FILLS = ("#9e9e9e", "#fdae6b", "#1f77b4")  # of the paper's bars, nearest patches' and ours
NUMBER = int | float | None
NEAREST = {"category": str, "auroc": float, "teacher": str, "teacher_sha256": str}
MADE = {"command": str, "commit": str | None, "device": str, "date": str}
RESULT = {  # what is read of a result.json, as runs.check_values has it
    "dataset": list(CATEGORIES),
    "category": str,
    "seed": int,
    "steps": int | None,
    "auroc": NUMBER,
    "auroc_score_d": NUMBER,
    "teacher": str | None,
    "teacher_sha256": str,
    "trained": dict,
    "versions": dict,
    **MADE,
}


@functools.cache
def paper_auroc(dataset):
    """{category: the paper's image AUROC, Tables 1 to 4, row "ours"}; empty where it has none."""
    tables = json.loads((Path(__file__).parent / "paper.json").read_text("utf-8"))
    return tables.get(dataset, {})


def cell(values):
    """Numbers of several seeds -> "85.52", or "85.52 ± 0.40"; "" where nothing is known."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:.2f} ± {spread:.2f}" if len(values) > 1 else f"{mean:.2f}"


def mean_and_spread(values):
    """Mean and standard deviation, which is 0 of a single one."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0


def row(cells):
    """A row of a Markdown table."""
    texts = [str(x).replace("|", r"\|") for x in cells]
    return f"| {' | '.join(texts)} |"


def table(results, nearest=()):
    """Results of one data set and one teacher -> Markdown.

    A row per category in the paper's order, their means, and how each run was made. nearest: the
    results of nearest.py.
    """
    auroc_nearest = {r["category"]: r["auroc"] for r in nearest}
    results = [{**r, "auroc_nearest": auroc_nearest.get(r["category"])} for r in results]
    dataset = results[0]["dataset"]
    own = sorted({r["category"] for r in results} - set(CATEGORIES[dataset]))
    categories = [*CATEGORIES[dataset], *own]
    results.sort(key=lambda r: r["seed"])
    by_category = {c: [r for r in results if r["category"] == c] for c in categories}
    columns = {
        title: key for title, key in COLUMNS.items() if any(r.get(key) is not None for r in results)
    }
    explanation = [text for title, text in EXPLANATION.items() if title in columns]
    lines = [
        f"# {NAMES.get(dataset, dataset)}, teacher {results[0]['teacher']}",
        "",
        textwrap.fill(" ".join(explanation), 100),
        "",
        ORIGIN,
        "",
        row(["category", "paper", *columns, "seeds", "steps"]),
        "|---" * (len(columns) + 4) + "|",
    ]
    for category, seeds in by_category.items():
        cells = ["not yet run", *[""] * (len(columns) - 1)]
        if seeds:
            values = {key: [r.get(key) for r in seeds] for key in columns.values()}
            if "auroc_nearest" in values:
                del values["auroc_nearest"][1:]  # it knows no seed
            cells = [cell(found) for found in values.values()]
        lines.append(
            row(
                [
                    category,
                    paper_auroc(dataset).get(category, ""),
                    *cells,
                    ", ".join(str(r["seed"]) for r in seeds),
                    ", ".join(sorted({str(r["steps"]) for r in seeds})),
                ]
            )
        )
    lines.append(means(dataset, by_category, columns))
    lines += ["", *how_made(results, categories)]
    return "\n".join(lines) + "\n"


def means(dataset, by_category, columns):
    """The last row: over the categories that have run, each the mean of its seeds."""
    done = {category: seeds for category, seeds in by_category.items() if seeds}
    known = [paper_auroc(dataset)[c] for c in done if c in paper_auroc(dataset)]
    cells = [cell([mean_over_categories(done, key)]) for key in columns.values()]
    return row(
        [f"mean of {len(done)}", cell([statistics.fmean(known)] if known else []), *cells, "", ""]
    )


def mean_over_categories(by_category, key):
    """{category: results} -> the mean of the means over the seeds; None if one lacks the number."""
    values = [[r.get(key) for r in seeds] for seeds in by_category.values()]
    if any(value is None for seeds in values for value in seeds):
        return None
    return statistics.fmean(map(statistics.fmean, values))


def chart(results, nearest=()):
    """The paper's AUROC and ours per category that has run, and the means -> SVG.

    None where one of ours is not known.
    """
    dataset = results[0]["dataset"]
    names = list(dict.fromkeys(r["category"] for r in results))
    names = [c for c in CATEGORIES[dataset] if c in names] or names
    ours = [[r["auroc"] for r in results if r["category"] == c] for c in names]
    if any(value is None for values in ours for value in values):
        return None
    other = {r["category"]: r["auroc"] for r in nearest}
    series = {
        "the paper, ViT-B/16": [[paper_auroc(dataset).get(c)] for c in names],
        "nearest patch": [[other.get(c)] for c in names],
        f"ours, {results[0]['teacher']}": ours,
    }
    bars, fills = {}, []
    for (name, of_categories), fill in zip(series.items(), FILLS, strict=True):
        if [None] in of_categories:
            continue
        known = [mean_and_spread(values) for values in of_categories]
        bars[name] = [*known, (statistics.fmean(mean for mean, _ in known), 0)]
        fills.append(fill)
    title = NAMES.get(dataset, dataset)
    return grouped_bars(title, [*names, f"mean of {len(names)}"], bars, fills)


def how_made(results, categories):
    """Commands, commits, devices, dates; one command may have made several runs."""
    ordered = sorted(results, key=lambda r: (categories.index(r["category"]), r["seed"]))
    rows = []
    for made in [*({**r, **r["trained"]} for r in ordered), *ordered]:
        command, torch = f"`{made['command']}`", made["versions"]["torch"]
        device = made["device"]
        if made.get("precision"):  # of training; older results do not name it
            device += f", {made['precision']}"
        rows.append(row([command, made["commit"] or "", device, torch, made["date"][:10]]))
    head = [row(["command", "commit", "device", "torch", "date"]), "|---|---|---|---|---|"]
    return [*head, *dict.fromkeys(rows)]


def read_result(path):
    """The result.json of a run."""
    result = runs.read_json(path, RESULT)
    runs.check_values(path, result["trained"], MADE)
    for made in (result, {**result, **result["trained"]}):  # an old run has no versions of its own
        runs.check_values(path, made, {"versions": dict})
        runs.check_values(path, made["versions"], {"torch": str})
    numbers = {name: NUMBER for name in COLUMNS.values() if name in result}
    runs.check_values(path, result, numbers)
    return result


def report(folder, run_folders):
    """Keep each run's result.json in `folder`, and write the tables of all that lie there.

    -> the tables, folder/<dataset>.md. The results are folder/<dataset>/<category>_seed<seed>.json.
    All are read before one is written.
    """
    folder = Path(folder)
    new = {}
    for run in run_folders:
        result = read_result(run / "result.json")
        target = folder / place(result)
        if target in new and new[target].parent != run:  # the same one may be named twice
            raise UserError(
                f"{run}: expected one run of a category and seed, got {new[target].parent} "
                f"too: name the runs, or give each its own --report"
            )
        new[target] = run / "result.json"
        if target.is_file() and read_result(target)["category"] != result["category"]:
            raise UserError(
                f"{target}: expected the result of {result['category']}, got that of another "
                f"category with the same file's name: give each its own --report"
            )
    sources = {path: path for path in folder.glob("*/*.json")} | new
    tables, charts = {}, {}
    for dataset in sorted({path.parent for path in sources}):
        kept = sorted(path for path in sources if path.parent == dataset)
        results = [read_result(sources[path]) for path in kept]
        for path, result in zip(kept, results, strict=True):
            if path != folder / place(result):
                raise UserError(
                    f"{path}: expected the result of this name, got that of {place(result)}: "
                    f"remove it, or rename it to that"
                )
        nearest = read_nearest(dataset)
        check_one_teacher(dataset, results + nearest)
        tables[dataset.with_suffix(".md")] = table(results, nearest)
        charts[dataset.with_suffix(".svg")] = chart(results, nearest)
    for path, source in new.items():
        with runs.new_folder(path.parent), runs.atomic(path) as temporary:
            shutil.copyfile(source, temporary)
    for path, text in {**tables, **charts}.items():
        if text is None:
            path.unlink(missing_ok=True)  # a chart of older results
        else:
            runs.write_text(path, text)
    return list(tables)


def place(result):
    """Where a result lies below a folder of results."""
    return Path(result["dataset"], f"{slug(result['category'])}_seed{result['seed']}.json")


def read_nearest(folder):
    """The results of nearest.py that lie below a folder of results."""
    return [runs.read_json(path, NEAREST) for path in sorted(folder.glob("nearest/*.json"))]


def refuse_another_teacher(folder, made):
    """Refuse a folder with results of another teacher than that of `made`."""
    known = [read_result(path) for path in sorted(folder.glob("*.json"))]
    check_one_teacher(folder, [*known, *read_nearest(folder), made])


def check_one_teacher(folder, results):
    """Refuse results of several teachers."""
    if len({r["teacher_sha256"] for r in results}) > 1:
        teachers = sorted({f"{r['teacher']} ({r['teacher_sha256'][:8]}...)" for r in results})
        raise UserError(
            f"{folder}: expected the results of one teacher, got {', '.join(teachers)}: "
            f"give each a folder of its own"
        )
