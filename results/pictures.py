"""Results to look at: heat maps with their page, histograms of scores, ROC curves, charts.

PNG by Pillow; SVG and HTML are text.
"""

import html
import json
import math
import shutil
import textwrap
import urllib.parse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import runs
from data import read_image

# Heat from 0 to 1: black, violet, red, orange, yellow.
COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
MOST = 448  # pixels a side of a heat map's three pictures
CAPTION = 44  # pixels below them
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em;
  background: #fff; color: #222 }}
h1 {{ overflow-wrap: anywhere }}
figure {{ margin: 2em 0 }}
img {{ max-width: 100%; min-width: min(100%, 42em) }}
label {{ display: inline-block; margin-right: 1em }}
select {{ font: inherit; max-width: 100% }}
.anomalous {{ color: #b00020; font-weight: bold }}
</style>
<h1>{title}</h1>
<p>delta is {delta:.3f}. Each picture shows the image, the heat of its patches (Diff summed over the
layers), and both together. Black is the usual heat of a normal image ({low:.2f}), red what one
normal image in 100 should exceed anywhere ({high:.2f}), yellow twice as far and beyond.</p>
<p><label>Show <select id="show">{choices}</select></label>
<label>Sort by <select id="sort"><option value="high">highest score</option>
<option value="low">lowest score</option><option value="name">name</option></select></label>
<output id="count"></output></p>
<main>
{figures}
</main>
<script>
const figures = [...document.querySelectorAll("figure")];
const show = document.getElementById("show"), sort = document.getElementById("sort");
const orders = {{
  high: (a, b) => b.dataset.score - a.dataset.score,
  low: (a, b) => a.dataset.score - b.dataset.score,
  name: (a, b) => a.dataset.name.localeCompare(b.dataset.name),
}};
function update() {{
  for (const f of figures) f.hidden = show.value && !f.dataset.tags.split("/").includes(show.value);
  document.querySelector("main").append(...figures.sort(orders[sort.value]));
  const shown = figures.filter((f) => !f.hidden).length;
  document.getElementById("count").textContent = `${{shown}} of ${{figures.length}} pictures`;
}}
show.onchange = sort.onchange = update;
update();
</script>
</html>
"""
FIGURE = """<figure data-score="{score}" data-name="{name}" data-tags="{tags}">\
<img src="{file}" alt="image, heat, both" loading="lazy"><figcaption>{name}: \
score {score:.3f}, delta {delta:.3f}, <span class="{verdict}">{verdict}</span>{mistake}\
</figcaption></figure>"""

# ---------------------------------------------------------------------------------------- heat maps


def colour(heat, scale):
    """Heat -> RGB from 0 to 255 (..., 3), and its strength.

    Strength is 0 at what is usual, 1/2 where normal images end, 1 as far again.
    """
    low, high = scale
    strength = np.clip((heat - low) / (2 * max(high - low, 1e-12)), 0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    channels = [np.interp(strength, stops, channel) for channel in zip(*COLOURS, strict=True)]
    return np.stack(channels, axis=-1), strength


class Gallery:
    """A folder of heat maps, one PNG per image, and index.html, the highest score first.

    delta: of the run. scale: its heat_scale. One image is in memory at a time.
    """

    def __init__(self, folder, title, delta, scale):
        self.folder = Path(folder)
        self.title = title
        self.delta = delta
        self.scale = scale
        self.figures = []
        self.tags = set()
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name, image, heat, scores, *, label=None):
        """image uint8 (h, w, 3), its patches' heat (P,), its scores by column; -> the PNG.

        label: 1 where it is known to be anomalous, 0 where normal. Its name then has its kind, as
        in test/scratch/000.png.
        """
        shown = Image.fromarray(image)
        shown.thumbnail((MOST, MOST))
        image = np.asarray(shown)
        h, w = image.shape[:2]
        side = math.isqrt(len(heat))
        square = torch.as_tensor(heat).view(1, 1, side, side)
        enlarged = F.interpolate(square, (h, w), mode="bilinear")[0, 0].numpy()
        colours, strength = colour(enlarged, self.scale)
        overlay = image + 0.7 * strength[..., None] * (colours - image)
        row = np.concatenate([image, colours, overlay], axis=1).round().astype(np.uint8)
        verdict = "anomalous" if scores["score"] >= self.delta else "normal"
        file = self.folder / f"{len(self.figures):05d}_{Path(name).stem[:40]}.png"
        picture = with_caption(row, self.caption(scores, verdict))
        with runs.atomic(file) as temporary:
            picture.save(temporary, "PNG")
        mistake = {(1, "normal"): "missed", (0, "anomalous"): "false alarm"}.get((label, verdict))
        tags = [verdict, mistake, None if label is None else f"kind: {name.split('/')[-2]}"]
        self.tags.update(tag for tag in tags if tag)
        figure = FIGURE.format(
            file=urllib.parse.quote(file.name),
            name=html.escape(name),
            tags=html.escape("/".join(tag for tag in tags if tag)),  # no folder's name holds it
            score=scores["score"],
            delta=self.delta,
            verdict=verdict,
            mistake=f", {mistake}" if mistake else "",
        )
        self.figures.append((scores["score"], figure))
        return file

    def caption(self, scores, verdict):
        """Two lines: the verdict, and the parts of the score that have no place in the image."""
        patches = scores["score_d"] - scores["score_d_cls"]
        return (
            f"score {scores['score']:.3f}, delta {self.delta:.3f}: {verdict}",
            f"patches {patches:.3f} + class tokens {scores['score_d_cls']:.3f} + anchor: "
            f"teacher {scores['score_a_teacher']:.3f}, student {scores['score_a_student']:.3f}",
        )

    def close(self):
        """Write the page; -> its file."""
        figures = [figure for _, figure in sorted(self.figures, key=lambda pair: -pair[0])]
        low, high = self.scale
        values = [html.escape(tag) for tag in sorted(self.tags)]
        choices = [f'<option value="{value}">{value}</option>' for value in values]
        page = PAGE.format(
            title=html.escape(self.title),
            delta=self.delta,
            low=low,
            high=high,
            choices="".join(['<option value="">all</option>', *choices]),
            figures="\n".join(figures),
        )
        runs.write_text(self.folder / "index.html", page)
        return self.folder / "index.html"


def with_caption(pixels, lines):
    """uint8 (h, w, 3) -> a picture with lines of text below."""
    font = ImageFont.load_default(14)
    h, w = pixels.shape[:2]
    text_width = 8 + math.ceil(max(font.getlength(line) for line in lines))
    canvas = Image.new("RGB", (max(w, text_width), h + CAPTION), "white")
    canvas.paste(Image.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        draw.text((4, h + 3 + 19 * i), line, fill="black", font=font)
    return canvas


# ----------------------------------------------------------- what evaluate.py draws of a scored run


def write_heatmaps(folder, scored, indices):
    """Heat maps of test images, by their indices; `scored` is an evaluate.Scored."""
    model, split = scored.model, scored.split
    gallery = Gallery(
        folder, f"{scored.run}: test images", float(model.delta), model.heat_scale.tolist()
    )
    for i in indices:
        if split.files:
            image = read_image(split.files[i], None)
        else:
            image = split.images[i].permute(1, 2, 0).numpy()
        values = {name: float(x[i]) for name, x in scored.scores.items() if name != "heat"}
        heat = scored.scores["heat"][i]
        gallery.add(split.names[i], image, heat, values, label=split.labels[i])
    print(f"heat maps: {gallery.close()}")


def write_failures(scored, count):
    """List the `count` worst misses and false alarms, with heat maps in RUN/failures."""
    split, delta = scored.split, float(scored.model.delta)
    score = scored.scores["score"].numpy()
    order = np.argsort(score, kind="stable")
    misses = [i for i in order if split.labels[i] and score[i] < delta]
    alarms = [i for i in order[::-1] if not split.labels[i] and score[i] >= delta]
    worst = misses[:count] + alarms[:count]
    shutil.rmtree(scored.run / "failures", ignore_errors=True)
    for i in worst:
        kind = "missed" if split.labels[i] else "false alarm"
        print(f"{kind}: {split.names[i]}, score {score[i]:.3f}, delta {delta:.3f}")
    write_heatmaps(scored.run / "failures", scored, worst)


def write_plots(scored, auroc):
    """RUN/histogram.svg, roc.svg if there are images of both kinds, training.svg if a log."""
    settings = scored.config["settings"]
    title = f"{settings['category']}, seed {settings['seed']}"
    score = scored.scores["score"].numpy()
    labels = np.array(scored.split.labels)
    plots = {"histogram.svg": histogram(title, score, labels, float(scored.model.delta))}
    log = scored.run / "log.jsonl"
    lines = [json.loads(line) for _, line in runs.read_log(log)] if log.is_file() else []
    if any(is_above_0(line.get("loss")) for line in lines):
        plots["training.svg"] = training_curves(title, lines)
    if auroc is not None:
        plots["roc.svg"] = roc(title, score, labels, auroc)
    for name, text in plots.items():
        runs.write_text(scored.run / name, text)
        print(f"plot: {scored.run / name}")


# -------------------------------------------------------------------------------------------- plots


class Axes:
    """A plot of `width` x 360 pixels. `at` maps data to pixels; marks are SVG elements."""

    def __init__(self, x_range, y_range, width=480):
        self.x_range = x_range
        self.y_range = y_range
        self.width = width
        self.marks = []

    def at(self, x, y):
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across = (x - x0) / (x1 - x0 or 1)  # 1: of a single value
        up = (y - y0) / (y1 - y0 or 1)
        return 60 + (self.width - 80) * across, 310 - 270 * up

    def line(self, points, colour, width=1):
        """A mark: a line through points of the data."""
        pixels = " ".join(f"{x:.2f},{y:.2f}" for x, y in (self.at(*point) for point in points))
        self.marks.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="{width}" points="{pixels}"/>'
        )

    def svg(self, title, x_label, y_label, *, legend, legend_y=56, x_ticks=None, y_ticks=None):
        """The whole plot as text. legend: [(text, colour)]. Ticks: [(place, text)], or numbers."""
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        fractions = [i / 4 for i in range(5)]
        x_ticks = x_ticks or [(x, f"{x:.3g}") for x in (x0 + (x1 - x0) * f for f in fractions)]
        ticks = []
        for x, text in x_ticks:
            left = self.at(x, y0)[0]
            for i, line in enumerate(textwrap.wrap(text, 14)):
                ticks.append(
                    f'<text x="{left:.1f}" y="{326 + 13 * i}" text-anchor="middle">'
                    f"{html.escape(line)}</text>"
                )
        y_ticks = y_ticks or [(y, f"{y:.3g}") for y in (y0 + (y1 - y0) * f for f in fractions)]
        for y, text in y_ticks:
            top = self.at(x0, y)[1] + 4
            ticks.append(f'<text x="54" y="{top:.1f}" text-anchor="end">{text}</text>')
        names = []
        for i, (text, fill) in enumerate(legend):
            y = legend_y + 16 * i
            names.append(
                f'<rect x="{self.width - 30}" y="{y - 9}" width="10" height="10" fill="{fill}"/>'
                f'<text x="{self.width - 36}" y="{y}" text-anchor="end" stroke="#fff" '
                f'stroke-width="4" paint-order="stroke">{html.escape(text)}</text>'
            )
        middle = self.width / 2 + 20
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} 360" '
            f'font-family="sans-serif" font-size="12">'
            f"<title>{html.escape(title)}</title>"
            f'<rect width="{self.width}" height="360" fill="#fff"/>'
            f'<text x="{middle}" y="24" text-anchor="middle" font-size="14">'
            f"{html.escape(title)}</text>"
            f"{''.join(self.marks)}"
            f'<path d="M60 40V310H{self.width - 20}" fill="none" stroke="#222"/>'
            f"{''.join(ticks)}{''.join(names)}"
            f'<text x="{middle}" y="348" text-anchor="middle">{x_label}</text>'
            f'<text x="16" y="175" text-anchor="middle" transform="rotate(-90 16 175)">'
            f"{y_label}</text></svg>\n"
        )


def histogram(title, scores, labels, delta, bins=40):
    """The scores of normal and of anomalous images, as shares of each kind, and delta -> SVG."""
    low, high = min(scores.min(), delta), max(scores.max(), delta)
    edges = np.histogram_bin_edges(scores, bins, (low, high))
    kinds = [
        (label, name, fill)
        for label, name, fill in ((0, "normal", "#1f77b4"), (1, "anomalous", "#d62728"))
        if (labels == label).any()
    ]
    shares = {}
    for label, _, _ in kinds:
        counts, _ = np.histogram(scores[labels == label], edges)
        shares[label] = counts / (labels == label).sum()
    top = max(share.max() for share in shares.values())
    axes = Axes((edges[0], edges[-1]), (0, top))
    for label, _, fill in kinds:
        for share, left, right in zip(shares[label], edges[:-1], edges[1:], strict=True):
            x, y = axes.at(left, share)
            x_right, bottom = axes.at(right, 0)
            axes.marks.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{x_right - x:.1f}" '
                f'height="{bottom - y:.1f}" fill="{fill}" fill-opacity=".5"/>'
            )
    x, y = axes.at(delta, top)
    axes.marks.append(f'<path d="M{x:.1f} {y:.1f}V310" stroke="#222" stroke-dasharray="4 3"/>')
    legend = [(name, fill) for _, name, fill in kinds] + [(f"delta {delta:.3g}", "#222")]
    return axes.svg(title, "score", "share of the images", legend=legend)


def is_above_0(x):
    """Whether a value of a log can be drawn."""
    return isinstance(x, float) and 0 < x < math.inf


def training_curves(title, lines):
    """The loss, its terms, and the held-out distance over the steps, on a logarithmic scale -> SVG.

    lines: those of log.jsonl, as dicts.
    """
    colours = {
        "loss": "#222",
        "distill": "#1f77b4",
        "gram": "#2ca02c",
        "anchor": "#9467bd",
        "held_out_mean": "#d62728",
    }
    curves = {}
    for name in colours:
        points = [(x["step"], x[name]) for x in lines if is_above_0(x.get(name))]
        if points:
            curves[name] = [(step, math.log10(value)) for step, value in points]
    steps, heights = zip(*(point for curve in curves.values() for point in curve), strict=True)
    low, high = math.floor(min(heights)), math.ceil(max(heights))
    axes = Axes((0, max(steps)), (low, max(high, low + 1)))
    for name, curve in curves.items():
        axes.line(curve, colours[name])
    return axes.svg(
        title,
        "steps",
        "loss and its terms; held-out distance",
        legend=[(name.removesuffix("_mean"), colours[name]) for name in curves],
        legend_y=112,
        y_ticks=[(y, f"{10.0**y:g}") for y in range(low, high + 1)],
    )


def grouped_bars(title, groups, series, fills):
    """A group of bars for each of `groups`, in it one of each series -> SVG.

    series: {name: [(AUROC in %, spread), one for each group]}. A whisker is one spread up and down.
    """
    least = min(height for bars in series.values() for height, _ in bars)
    low = max(0, 10 * (least // 10) - 10)
    width, legend_width = 80 * len(groups), 40 + 7 * max(map(len, series))  # pixels
    axes = Axes((0, (width + legend_width) / 80), (low, 100), width=80 + width + legend_width)
    for x in range(len(groups)):
        for i, bars in enumerate(series.values()):
            height, spread = bars[x]
            left, top = axes.at(x + 0.1 + 0.8 * i / len(series), height)
            right, bottom = axes.at(x + 0.1 + 0.8 * (i + 1) / len(series), low)
            middle = (left + right) / 2
            high, deep = axes.at(x, height + spread)[1], axes.at(x, height - spread)[1]
            axes.marks.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
                f'height="{bottom - top:.1f}" fill="{fills[i]}"/>'
                f'<path d="M{middle:.1f} {high:.1f}V{deep:.1f}" stroke="#222"/>'
            )
    return axes.svg(
        title,
        "",
        "image AUROC, %",
        legend=list(zip(series, fills, strict=False)),
        x_ticks=[(x + 0.5, name) for x, name in enumerate(groups)],
    )


def roc(title, scores, labels, auroc):
    """The ROC curve -> SVG: per threshold, the share of anomalous images over that of normal."""
    axes = Axes((0, 1), (0, 1))
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores)[::-1]:
        above = scores >= threshold
        points.append((float(above[labels == 0].mean()), float(above[labels == 1].mean())))
    (left, bottom), (right, top) = axes.at(0, 0), axes.at(1, 1)
    axes.marks.append(f'<path d="M{left} {bottom}L{right} {top}" stroke="#bbb"/>')
    axes.line(points, "#d62728", width=2)
    return axes.svg(
        title,
        "false alarms, share of normal images",
        "found, share of anomalous images",
        legend=[(f"AUROC {auroc:.2f} %", "#222")],
        legend_y=290,
    )
