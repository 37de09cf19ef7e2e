#!/usr/bin/env python3
"""Held-out distance over the steps: from the logs of runs into recipe.csv, and from there a chart.

    python results/curves.py RUN...              # add these runs to results/recipe.csv
    python results/curves.py --category pill     # draw results/recipe_pill.svg from it

A row of recipe.csv is an epoch's end of a run: its settings, the held-out distance (mean and per
layer), the mean training loss since the log's line before. No test image has a part in it.
"""

if __name__ == "__main__":
    import _root  # noqa: F401 (the top of the project goes onto the path)

import json
import math
import sys
from pathlib import Path

import runs
from data import slug
from results.pictures import Axes
from runs import UserError
from train import Settings

TABLE = Path(__file__).parent / "recipe.csv"
SETTINGS = (
    "dataset",
    "category",
    "optimizer",
    "batch_size",
    "weight_decay",
    "seed",
    "holdout",
    "warmup",
    "decay",
    "precision",
)
# Runs that differ in these too are not for the table.
OTHERS = ("distance", "anchor", "pos_embed", "without", "lam", "momentum", "clip_grad")
BLOCKS = [3, 6, 9, 11]
OF_BLOCKS = tuple(f"block{c}" for c in BLOCKS)
MEASURED = ("epochs", "step", "held_out_mean", *OF_BLOCKS, "loss")
RATES = ("lr", "lr_rest")  # the second: of what AdamW trains beside Muon
COLUMNS = ("teacher", *SETTINGS, *RATES, *MEASURED, "commit")
FIRST = 100
COLOURS = {"sgd": "#7f7f7f", "adamw": "#1f77b4", "muon": "#d62728"}


def read_table():
    rows = runs.read_csv(TABLE, COLUMNS)
    for row in rows:
        numbers = row["step"].isdecimal() and runs.is_number(row["held_out_mean"])
        if not numbers or int(row["step"]) < 1 or row["optimizer"] not in COLOURS:
            raise UserError(f"{TABLE}: expected a step, a distance, an optimizer, got {row}")
    return rows


def rows_of(run):
    """The rows of one run folder, as strings."""
    config = runs.read_config(run)
    path = Path(run) / "config.json"
    runs.check_values(path, config, {"lr": float, "epochs": int})
    numbers = {"batch_size": int, "weight_decay": float, "holdout": float, "warmup": int}
    texts = {"optimizer": list(COLOURS), "decay": str, "precision": str}
    runs.check_values(path, config["settings"], {**texts, **numbers})
    if config["settings"]["layers"] != BLOCKS:
        layers = ",".join(map(str, config["settings"]["layers"]))
        raise UserError(f"{run}: expected a run with --layers 3,6,9,11, got {layers}")
    muon = config["settings"]["optimizer"] == "muon"
    config.setdefault("lr_rest", config["lr"] if muon else None)  # one rate, before --lr-rest
    runs.check_values(path, config, {"lr_rest": float | None})
    for name in OTHERS:
        default = getattr(Settings, name)
        value = config["settings"].get(name, default)
        if value != default:
            raise UserError(
                f"{run}: expected a run with {runs.flag(name)} {default}, for which the table has "
                f"no column, got {value}"
            )
    fixed = {name: config["settings"][name] for name in SETTINGS}
    fixed["teacher"] = config["teacher"].get("name", "")
    fixed |= {"lr": config["lr"], "lr_rest": config["lr_rest"] if muon else ""}
    fixed |= {"epochs": config["epochs"], "commit": config["commit"]}
    rows = []
    loss = math.nan
    path = Path(run) / "log.jsonl"
    for _, text in runs.read_log(path):
        line = json.loads(text)
        loss = line.get("loss", loss)
        if "held_out_mean" not in line:
            continue
        runs.check_values(path, line, {"held_out_mean": float, "held_out": list})
        runs.check_values(path, {"loss": loss}, {"loss": float})
        numbers = [*line["held_out"], line["held_out_mean"]]
        known = [isinstance(x, float) and math.isfinite(x) for x in numbers]
        if len(known) != len(BLOCKS) + 1 or not all(known):
            raise UserError(
                f"{path}: expected finite distances of four layers and their mean, got {numbers}: "
                f"leave this run out"
            )
        values = dict(zip((*OF_BLOCKS, "held_out_mean"), numbers, strict=True)) | {"loss": loss}
        rounded = {name: f"{value:.5f}" for name, value in values.items()}
        rows.append({**fixed, **rounded, "step": line["step"]})
    if not rows:
        raise UserError(f"{run}: expected a run with --holdout, got no distance in its log")
    return [{name: str(row[name]) for name in COLUMNS} for row in rows]


def key(row):
    """What tells one run from another."""
    return tuple(row[name] for name in ("teacher", *SETTINGS, *RATES, "epochs"))


def draw(rows, title):
    """Every run a curve over doubling steps, with a dot at its end -> SVG.

    What lies before step FIRST, far above the rest, is left out where there is a rest.
    """
    rows = [row for row in rows if int(row["step"]) >= FIRST] or rows
    steps = [math.log2(int(row["step"])) for row in rows]
    distances = [float(row["held_out_mean"]) for row in rows]
    axes = Axes((min(steps), max(steps)), (min(distances), max(distances)))
    by_run = {}
    for row, *point in zip(rows, steps, distances, strict=True):
        by_run.setdefault((COLOURS[row["optimizer"]], key(row)), []).append(point)
    for (colour, _), points in by_run.items():
        axes.line(points, colour)
        x, y = axes.at(*points[-1])
        axes.marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    low, high = math.ceil(min(steps)), math.floor(max(steps))
    ticks = [(x, str(2**x)) for x in range(low, high + 1)]
    ticks = ticks or [(x, f"{2**x:.0f}") for x in sorted({min(steps), max(steps)})]
    used = {row["optimizer"] for row in rows}
    legend = [(name, colour) for name, colour in COLOURS.items() if name in used]
    return axes.svg(title, "steps", "held-out distance", legend=legend, x_ticks=ticks)


@runs.script
def main(argv):
    parser = runs.Parser(__doc__)
    parser.add_argument("runs", nargs="*", help="run folders to take into the table")
    parser.add_argument("--category", help="draw its runs, its name as in the table")
    parser.add_argument("--teacher", default="deit_tiny_patch16_224", help="of the runs to draw")
    args = parser.parse_args(argv)
    if not args.runs and args.category is None:
        raise UserError("expected runs or --category, got neither")
    rows = read_table()
    for run in args.runs:
        new = rows_of(run)
        rows = [row for row in rows if key(row) != key(new[0])] + new
    if args.category is None:
        runs.write_csv(TABLE, COLUMNS, rows)
        return
    wanted = (args.teacher, args.category)
    drawn = [row for row in rows if (row["teacher"], row["category"]) == wanted]
    if not drawn:
        raise UserError(f"{TABLE}: expected runs of {' with '.join(reversed(wanted))}, got none")
    chart = draw(drawn, f"{args.category}: distance to the teacher on images held out")
    if args.runs:
        runs.write_csv(TABLE, COLUMNS, rows)
    file = TABLE.with_name(f"recipe_{slug(args.category)}.svg")
    runs.write_text(file, chart)
    print(file)


if __name__ == "__main__":
    sys.exit(main())
