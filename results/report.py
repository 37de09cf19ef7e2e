"""Tables of results, from nothing but the result.json files of runs, which are kept beside them."""
import json
import shutil
import statistics
from pathlib import Path

from data import PAPER_AUROC, slug
from weights.files import atomic

COLUMNS = {"AUROC": "auroc", "S_D": "auroc_score_d", "S_A": "auroc_score_a", "teacher's term": "auroc_score_a_teacher", "pixels": "pixel_auroc",
           "AU-PRO": "au_pro"}
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion_mnist": "Fashion-MNIST", "mvtec": "MVTec AD"}


def cell(values):
    """Numbers of several seeds -> "85.52", or mean and standard deviation "85.52 ± 0.40"; "" where nothing is known."""
    values = [value for value in values if value is not None]
    return "" if not values else f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def table(results):
    """The results of one data set with one teacher -> Markdown: a row per category in the paper's order, means, and how each was made."""
    dataset = results[0]["dataset"]
    order = [*PAPER_AUROC[dataset], *sorted({r["category"] for r in results} - set(PAPER_AUROC[dataset]))]
    runs = {category: [r for r in results if r["category"] == category] for category in order}
    columns = {title: key for title, key in COLUMNS.items() if any(r.get(key) is not None for r in results)}
    lines = [f"# {NAMES.get(dataset, dataset)}, teacher {results[0]['teacher']}", "",
             "Image AUROC in %, last epoch; mean ± standard deviation over the seeds. S_D, S_A and the teacher's term of S_A, which needs no training: the",
             "AUROC of these alone. Generated from the result.json files beside this table by the command at its end.", "",
             "| category | paper | " + " | ".join(columns) + " | seeds | steps |", "|---" * (len(columns) + 4) + "|"]
    for category, of in runs.items():
        paper = PAPER_AUROC[dataset].get(category)
        cells = [cell([r.get(key) for r in of]) for key in columns.values()] if of else ["not yet run", *[""] * (len(columns) - 1)]
        lines.append(f"| {category} | {'' if paper is None else paper} | " + " | ".join(cells)
                     + f" | {', '.join(str(r['seed']) for r in of)} | {', '.join(sorted({str(r['steps']) for r in of}))} |")
    done = [category for category in order if runs[category]]
    means = [cell([mean_of(runs, done, key)]) for key in columns.values()]
    known = [PAPER_AUROC[dataset][category] for category in done if PAPER_AUROC[dataset].get(category) is not None]
    lines.append(f"| mean of {len(done)} | {cell([statistics.fmean(known)]) if known else ''} | " + " | ".join(means) + " | | |")
    lines += ["", "| command | commit | device | torch | date |", "|---|---|---|---|---|"]
    for r in sorted(results, key=lambda r: (order.index(r["category"]), r["seed"])):
        made = r["trained"]
        lines.append(f"| `{made['command']}` | {made['commit']} | {made['device']} | {r['versions']['torch']} | {made['date'][:10]} |")
    return "\n".join(lines) + "\n"


def mean_of(runs, categories, key):
    """Over the categories, each the mean of its seeds; None if one lacks the number."""
    values = [[r.get(key) for r in runs[category]] for category in categories]
    return None if any(value is None for of in values for value in of) else statistics.fmean(map(statistics.fmean, values))


def report(folder, runs):
    """Keep each run's result.json as folder/<dataset>/<category>_seed<seed>.json, and write folder/<dataset>.md from all that lie there; -> its files."""
    folder = Path(folder)
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        kept = folder / result["dataset"] / f"{slug(result['category'])}_seed{result['seed']}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic(kept) as temporary:
            shutil.copyfile(run / "result.json", temporary)
    return [write(path) for path in sorted(folder.iterdir()) if path.is_dir()]


def write(folder):
    """folder/*.json -> the table beside the folder."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if len({r["teacher_sha256"] for r in results}) > 1:
        raise ValueError(f"{folder}: expected the results of one teacher, got {', '.join(sorted({str(r['teacher']) for r in results}))}: "
                         f"give each its own --report")
    with atomic(folder.with_suffix(".md")) as temporary:
        temporary.write_text(table(results))
    return folder.with_suffix(".md")
