#!/usr/bin/env python3
"""Held-out distance over the steps: from the logs of runs into recipe.csv, and from there a chart.

    python results/curves.py RUN...              # add these runs to results/recipe.csv
    python results/curves.py --category pill     # draw results/recipe_pill.svg from it

A row of recipe.csv is an epoch's end of a run: its settings, the held-out distance (mean and per
layer), the training loss since the last line of the log. No test image has a part in it.
"""

if __name__ == "__main__":
    import _root  # noqa: F401 (the top of the project goes onto the path)

import csv
import io
import json
import math
import sys
from pathlib import Path

import runs
from results.pictures import Axes
from runs import UserError

TABLE = Path(__file__).parent / "recipe.csv"
SETTINGS = ("dataset", "category", "optimizer", "batch_size", "weight_decay", "seed", "holdout")
MEASURED = ("epochs", "step", "held_out_mean", "block3", "block6", "block9", "block11", "loss")
COLUMNS = ("teacher", *SETTINGS, "lr", *MEASURED, "commit")
COLOURS = {"sgd": "#7f7f7f", "adamw": "#1f77b4", "muon": "#d62728"}


def read_table():
    with open(TABLE, newline="") as file:
        return list(csv.DictReader(file))


def rows_of(run):
    """The rows of one run folder, as strings."""
    config = runs.read_config(run)
    fixed = {name: config["settings"][name] for name in SETTINGS}
    fixed["teacher"] = config["teacher"].get("name", "")
    fixed |= {"lr": config["lr"], "epochs": config["epochs"], "commit": config["commit"]}
    rows = []
    loss = math.nan
    for _, text in runs.read_log(Path(run) / "log.jsonl"):
        line = json.loads(text)
        loss = line.get("loss", loss)
        if "held_out_mean" not in line:
            continue
        values = dict(zip(("block3", "block6", "block9", "block11"), line["held_out"], strict=True))
        values = {**values, "held_out_mean": line["held_out_mean"], "loss": loss}
        rounded = {name: f"{value:.5f}" for name, value in values.items()}
        rows.append({**fixed, **rounded, "step": line["step"]})
    if not rows:
        raise UserError(f"{run}: expected a run with --holdout, got no distance in its log")
    return [{name: str(row[name]) for name in COLUMNS} for row in rows]


def write_table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runs.write_text(TABLE, text.getvalue())


def key(row):
    """What tells one run from another."""
    return tuple(row[name] for name in ("teacher", *SETTINGS, "lr", "epochs"))


def draw(rows, title):
    """Every run a curve over doubling steps, with a dot at its end -> SVG."""
    points = {}
    for row in rows:
        point = (math.log2(int(row["step"])), float(row["held_out_mean"]))
        points.setdefault((key(row), row["optimizer"]), []).append(point)
    steps, distances = zip(*(point for run in points.values() for point in run), strict=True)
    axes = Axes((min(steps), max(steps)), (min(distances), max(distances)))
    for (_, optimizer), run in points.items():
        pixels = [axes.at(*point) for point in run]
        curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        x, y = pixels[-1]
        axes.marks.append(
            f'<polyline fill="none" stroke="{COLOURS[optimizer]}" points="{curve}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{COLOURS[optimizer]}"/>'
        )
    low, high = math.ceil(min(steps)), math.floor(max(steps))
    ticks = [(x, str(2**x)) for x in range(low, high + 1)]
    used = {row["optimizer"] for row in rows}
    legend = [(name, colour) for name, colour in COLOURS.items() if name in used]
    return axes.svg(title, "steps", "held-out distance", legend=legend, x_ticks=ticks)


@runs.script
def main(argv):
    parser = runs.Parser(__doc__)
    parser.add_argument("runs", nargs="*", help="run folders to take into the table")
    parser.add_argument("--category", help="draw its runs")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224", help="of the runs to draw")
    args = parser.parse_args(argv)
    rows = read_table()
    for run in args.runs:
        new = rows_of(run)
        rows = [row for row in rows if key(row) != key(new[0])] + new
    if args.runs:
        write_table(rows)
    if args.category:
        wanted = (args.teacher, args.category)
        drawn = [row for row in rows if (row["teacher"], row["category"]) == wanted]
        if not drawn:
            raise UserError(
                f"{TABLE}: expected runs of {' with '.join(reversed(wanted))}, got none"
            )
        title = f"{args.category}: distance to the teacher on images held out"
        file = TABLE.with_name(f"recipe_{args.category}.svg")
        runs.write_text(file, draw(drawn, title))
        print(file)


if __name__ == "__main__":
    sys.exit(main())
