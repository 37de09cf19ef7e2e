"""Results to look at: heat maps with their page, the histogram of the scores and the ROC curve. PNG by Pillow; SVG and HTML are text."""
import html
import math
from pathlib import Path

from data import read_image
from weights.files import atomic

COLOURS = (0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)  # black, violet, red, orange, yellow
CAPTION = 44  # pixels below a heat map
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; background: #fff; color: #222 }}
figure {{ margin: 2em 0 }} img {{ max-width: 100%; min-width: min(100%, 42em); image-rendering: auto }} .anomalous {{ color: #b00020; font-weight: bold }}
</style>
<h1>{title}</h1>
<p>The highest score first; delta is {delta:.3f}. Each picture: the image, the heat of its patches (Diff summed over the layers), and both together. Black is the
usual heat of a normal image ({low:.2f}), red the most that 99 % of normal images reach anywhere ({high:.2f}), yellow twice as far and beyond.</p>
{figures}
</html>
"""


def colour(heat, scale):
    """Heat -> RGB from 0 to 255 (..., 3) and its strength from 0 to 1: 0 at what is usual, 1/2 where normal images end, 1 as far again."""
    import numpy as np

    low, high = scale
    strength = np.clip((heat - low) / (2 * max(high - low, 1e-12)), 0, 1)
    stops = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(strength, stops, channel) for channel in zip(*COLOURS)], axis=-1), strength


class Gallery:
    """A folder of heat maps, one PNG per image, and index.html, which shows the highest score first. Holds one image at a time."""

    def __init__(self, folder, title, delta, scale):
        self.folder, self.title, self.delta, self.scale, self.figures = Path(folder), title, delta, scale, []
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name, image, heat, scores):
        """image uint8 (h, w, 3), its patches' heat (P,), and its scores by column; -> the picture's file."""
        import numpy as np
        import torch
        import torch.nn.functional as F
        from PIL import Image, ImageDraw, ImageFont

        h, w = image.shape[:2]
        enlarged = F.interpolate(torch.as_tensor(heat).view(1, 1, math.isqrt(len(heat)), -1), (h, w), mode="bilinear")[0, 0].numpy()
        colours, strength = colour(enlarged, self.scale)
        overlay = image + 0.7 * strength[..., None] * (colours - image)
        row = np.concatenate([image, colours, overlay], axis=1).round().astype(np.uint8)
        verdict = "anomalous" if scores["score"] >= self.delta else "normal"
        lines = (f"score {scores['score']:.3f}, delta {self.delta:.3f}: {verdict}",
                 f"patches {scores['score_d'] - scores['score_d_cls']:.3f} + class tokens {scores['score_d_cls']:.3f} + anchor: teacher "
                 f"{scores['score_a_teacher']:.3f}, student {scores['score_a_student']:.3f}")
        font = ImageFont.load_default(14)
        canvas = Image.new("RGB", (max(3 * w, 8 + math.ceil(max(font.getlength(line) for line in lines))), h + CAPTION), "white")
        canvas.paste(Image.fromarray(row), (0, 0))
        for i, line in enumerate(lines):
            ImageDraw.Draw(canvas).text((4, h + 3 + 19 * i), line, fill="black", font=font)
        file = self.folder / f"{len(self.figures):05d}_{Path(name).stem}.png"
        with atomic(file) as temporary:
            canvas.save(temporary, "PNG")
        self.figures.append((scores["score"], f'<figure><img src="{html.escape(file.name)}" alt="" loading="lazy"><figcaption>{html.escape(name)}: '
                             f'score {scores["score"]:.3f}, delta {self.delta:.3f}, <span class="{verdict}">{verdict}</span></figcaption></figure>'))
        return file

    def close(self):
        """Write the page; -> its file."""
        figures = "\n".join(figure for _, figure in sorted(self.figures, key=lambda pair: -pair[0]))
        text = PAGE.format(title=html.escape(self.title), delta=self.delta, low=self.scale[0], high=self.scale[1], figures=figures)
        with atomic(self.folder / "index.html") as temporary:
            temporary.write_text(text)
        return self.folder / "index.html"


def svg(title, x_label, y_label, x_range, y_range, marks, legend, legend_y=56, x_ticks=None, width=480):
    """A plot of `width` x 360 pixels with axes; `marks` maps a function from data to pixels to the elements inside. x_ticks: [(x, text)], or numbers."""
    (x0, x1), (y0, y1) = x_range, y_range

    def at(x, y):
        return 60 + (width - 80) * (x - x0) / (x1 - x0), 310 - 270 * (y - y0) / (y1 - y0)

    fractions = [i / 4 for i in range(5)]
    x_ticks = x_ticks or [(x, f"{x:.3g}") for x in (x0 + (x1 - x0) * f for f in fractions)]
    ticks = [f'<text x="{at(x, y0)[0]:.1f}" y="326" text-anchor="middle">{html.escape(text)}</text>' for x, text in x_ticks]
    ticks += [f'<text x="54" y="{at(x0, y)[1] + 4:.1f}" text-anchor="end">{y:.3g}</text>' for y in (y0 + (y1 - y0) * f for f in fractions)]
    names = "".join(f'<text x="{width - 30}" y="{legend_y + 16 * i}" text-anchor="end" fill="{fill}">{html.escape(text)}</text>' for i, (text, fill) in enumerate(legend))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 360" font-family="sans-serif" font-size="12">'
            f'<rect width="{width}" height="360" fill="#fff"/><text x="{width / 2 + 20}" y="24" text-anchor="middle" font-size="14">{html.escape(title)}</text>'
            f'{"".join(marks(at))}<path d="M60 40V310H{width - 20}" fill="none" stroke="#222"/>{"".join(ticks)}{names}'
            f'<text x="{width / 2 + 20}" y="348" text-anchor="middle">{x_label}</text>'
            f'<text x="16" y="175" text-anchor="middle" transform="rotate(-90 16 175)">{y_label}</text></svg>\n')


def histogram(title, scores, labels, delta, bins=40):
    """How the scores of normal and of anomalous images lie, each as shares of its own number, and delta -> SVG text."""
    import numpy as np

    low, high = min(scores.min(), delta), max(scores.max(), delta)
    edges = np.linspace(low, high + 1e-6 * (1 + abs(high)), bins + 1)
    kinds = [(label, name, fill) for label, name, fill in ((0, "normal", "#1f77b4"), (1, "anomalous", "#d62728")) if (labels == label).any()]
    shares = {label: np.histogram(scores[labels == label], edges)[0] / (labels == label).sum() for label, _, _ in kinds}
    top = max(share.max() for share in shares.values())

    def marks(at):
        for label, _, fill in kinds:
            for share, left, right in zip(shares[label], edges, edges[1:]):
                (x, y), (x_right, bottom) = at(left, share), at(right, 0)
                yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{x_right - x:.1f}" height="{bottom - y:.1f}" fill="{fill}" fill-opacity=".5"/>'
        x, y = at(delta, top)
        yield f'<path d="M{x:.1f} {y:.1f}V310" stroke="#222" stroke-dasharray="4 3"/>'

    legend = [(name, fill) for _, name, fill in kinds] + [(f"delta {delta:.3g}", "#222")]
    return svg(title, "score", "share of the images", (edges[0], edges[-1]), (0, top), marks, legend)


def roc(title, scores, labels, auroc):
    """The ROC curve -> SVG text: per threshold, the share of anomalous images above it over that of the normal ones."""
    import numpy as np

    thresholds = np.unique(scores)[::-1]
    points = [(0.0, 0.0)] + [(float((scores[labels == 0] >= cut).mean()), float((scores[labels == 1] >= cut).mean())) for cut in thresholds]

    def marks(at):
        yield f'<path d="M{at(0, 0)[0]} {at(0, 0)[1]}L{at(1, 1)[0]} {at(1, 1)[1]}" stroke="#bbb"/>'
        yield '<polyline fill="none" stroke="#d62728" stroke-width="2" points="' + " ".join(f"{x:.2f},{y:.2f}" for x, y in (at(*p) for p in points)) + '"/>'

    return svg(title, "false alarms, share of normal images", "found, share of anomalous images", (0, 1), (0, 1), marks, [(f"AUROC {auroc:.2f} %", "#222")], 290)


def show(args, run, model, split, scores, auroc):
    """What --heatmaps, --show-failures and --plot of evaluate.py ask for, of one run's test split."""
    import numpy as np

    delta, labels, score = float(model.delta), np.array(split.labels), scores["score"].numpy()

    def gallery(folder, indices):
        pages = Gallery(folder, f"{run}: test images", delta, model.heat_scale.tolist())
        for i in indices:
            image = read_image(split.files[i], None) if split.files else split.images[i].permute(1, 2, 0).numpy()
            pages.add(split.names[i], image, scores["heat"][i], {name: float(value[i]) for name, value in scores.items() if name != "heat"})
        print(f"heat maps: {pages.close()}")

    if args.heatmaps:
        gallery(args.heatmaps, range(len(score)))
    if args.show_failures:
        order = np.argsort(score, kind="stable")
        misses = [i for i in order if labels[i] and score[i] < delta][:args.show_failures]
        alarms = [i for i in order[::-1] if not labels[i] and score[i] >= delta][:args.show_failures]
        for i in misses + alarms:
            print(f"{'missed' if labels[i] else 'false alarm'}: {split.names[i]}, score {score[i]:.3f}, delta {delta:.3f}")
        gallery(run / "failures", misses + alarms)
    if args.plot:
        title = f"{run.parent.name}, {run.name}"
        plots = {"histogram.svg": histogram(title, score, labels, delta)}
        if auroc is not None:  # there are images of both kinds
            plots["roc.svg"] = roc(title, score, labels, auroc)
        for name, text in plots.items():
            with atomic(run / name) as temporary:
                temporary.write_text(text)
            print(f"plot: {run / name}")
