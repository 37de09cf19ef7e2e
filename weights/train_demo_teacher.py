#!/usr/bin/env python3
"""Train the demo's teacher, a small ViT, from scratch on images made by formulas.

    python weights/train_demo_teacher.py

It needs no data, network or GPU. In ten minutes on 2 CPU cores it writes
weights/demo_teacher.safetensors. On a machine with another CPU the last digits of the weights, and
so the file's sha256, come out different.

An image is a turned lattice of cells. A cell shows a shape, and sometimes a line, on a ground. Each
of these has a material of its own: a texture in a colour. Every token has to tell how much of its
patch is of which kind, texture and colour, and the class token how much of the whole image. They
are asked at each of the method's four layers. No image is drawn twice, so the losses shown are
those on unseen images.

The file is meant for the demo only. Pretrained teachers (weights/README.md) know far more.
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

from runs import WEIGHTS, Parser, UserError, atomic, check_whole, new_folder, script
from vit import ViT
from vitad import LAYERS
from weights.convert import save

CONFIG = {
    "width": 96,
    "depth": 12,
    "heads": 3,
    "patch": 16,
    "grid": 14,
    "hidden": 192,
    "mean": (0.5, 0.5, 0.5),
    "std": (0.25, 0.25, 0.25),
}
SIZE = CONFIG["patch"] * CONFIG["grid"]
LATTICE = 16  # cells a side, more than an image shows
CELLS = LATTICE**2

# The shape (lobes, swing) is the region r < size (1 + swing cos(lobes angle)).
SHAPES = torch.tensor(
    [
        (0, 0.0),  # disc
        (2, 0.4),  # bone
        (3, 0.3),  # trefoil
        (4, 0.3),
        (5, 0.3),
        (8, 0.25),
    ]
)
# The texture (wave, warp, cross, fine, coarse) is, of x and y turned to u and v, in pixels,
# cos(2 pi (u / wave + warp sin(2 pi v / 40))) cos(2 pi v / cross), with shares of two noises.
TEXTURES = torch.tensor(
    [
        (7, 0.0, 1e6, 0.1, 0.0),  # fine stripes
        (20, 0.0, 1e6, 0.1, 0.0),  # broad stripes
        (12, 0.0, 12, 0.1, 0.0),  # a grid
        (14, 0.6, 1e6, 0.1, 0.0),  # waves
        (1e6, 0.0, 1e6, 1.0, 0.0),  # grain
        (1e6, 0.0, 1e6, 0.0, 1.0),  # blots
        (1e6, 0.0, 1e6, 0.1, 0.0),  # almost nothing
    ]
)
COLOURS = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
KINDS = 1 + len(SHAPES) + 1  # the ground, the shapes, a line
COUNTS = (KINDS, len(TEXTURES), len(COLOURS))


# ----------------------------------------------------------------------------------------- drawing


def draw(B):
    """-> images uint8 (B, 3, S, S), and the shares of what each token covers.

    The shares are those of kinds, textures and colours: 3 x (B, 1 + P, count).
    """
    axis = torch.arange(SIZE) - SIZE / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cell, du, dv, side = draw_lattice(B, x, y)
    shape = torch.randint(len(SHAPES), (B, CELLS))
    region = 3 * cell + draw_parts(shape, cell, (du, dv), side)
    texture = torch.randint(len(TEXTURES), (B, CELLS, 3))
    colour = torch.randint(len(COLOURS), (B, CELLS, 3))
    relief = draw_relief(texture, region, x, y)
    tint = COLOURS[colour] + uniform(-0.05, 0.05, (B, CELLS, 3, 3))
    light = draw_light(B, x, y)
    channels = [255 * light * (per_pixel(c, region) + relief) for c in tint.unbind(3)]
    images = torch.stack(channels, dim=1)

    ground = torch.zeros_like(shape)
    line = torch.full_like(shape, KINDS - 1)
    kind = torch.stack([ground, 1 + shape, line], dim=2)
    tables = zip((kind, texture, colour), COUNTS, strict=True)
    shares = [token_shares(per_pixel(table, region), count) for table, count in tables]
    return images.clamp(0, 255).to(torch.uint8), shares


def draw_lattice(B, x, y):
    """A lattice, turned and scaled, over the pixels' coordinates x, y (S, S).

    -> each pixel's cell and its place there, du and dv from the centre in cells, all (B, S, S), and
    a cell's side in pixels (B, 1, 1).
    """
    turn = uniform(0, 2 * math.pi, (B, 1, 1))
    side = uniform(40, 110, (B, 1, 1))
    u = (x * turn.cos() + y * turn.sin()) / side + LATTICE / 2 + uniform(0, 1, (B, 1, 1))
    v = (y * turn.cos() - x * turn.sin()) / side + LATTICE / 2 + uniform(0, 1, (B, 1, 1))
    cell = u.long() * LATTICE + v.long()
    du = u % 1 - per_pixel(uniform(0.4, 0.6, (B, CELLS)), cell)
    dv = v % 1 - per_pixel(uniform(0.4, 0.6, (B, CELLS)), cell)
    return cell, du, dv, side


def draw_parts(shape, cell, place, side):
    """Which part of its cell each pixel is: 0 the ground, 1 the shape, 2 the line.

    shape: of each cell, (B, CELLS). A third of the cells have a line.
    """
    B = len(shape)
    du, dv = place
    lobes, swing = (per_pixel(table, cell) for table in SHAPES[shape].unbind(2))
    angle = torch.atan2(dv, du) + per_pixel(uniform(0, 2 * math.pi, (B, CELLS)), cell)
    size = per_pixel(uniform(0.2, 0.4, (B, CELLS)), cell)
    in_shape = torch.hypot(du, dv) < size * (1 + swing * torch.cos(lobes * angle))
    slope = per_pixel(uniform(0, math.pi, (B, CELLS)), cell)
    offset = per_pixel(uniform(-12, 12, (B, CELLS)), cell)
    across = (du * slope.cos() + dv * slope.sin()) * side + offset
    half_width = uniform(1, 3.5, (B, CELLS)) * (torch.rand(B, CELLS) < 1 / 3)
    in_line = across.abs() < per_pixel(half_width, cell)
    return torch.where(in_line, 2, in_shape.long())


def draw_relief(texture, region, x, y):
    """The textures' brightness (B, S, S), around 0. texture: of each region, (B, CELLS, 3)."""
    B = len(texture)
    parameters = TEXTURES[texture].unbind(3)
    wave, warp, cross, fine, coarse = (per_pixel(table, region) for table in parameters)
    turn = per_pixel(uniform(0, 2 * math.pi, (B, CELLS, 3)), region)
    scale = per_pixel(uniform(0.85, 1.15, (B, CELLS, 3)), region)
    u = x * turn.cos() + y * turn.sin()
    v = y * turn.cos() - x * turn.sin()
    along = torch.cos(2 * math.pi * (u / (wave * scale) + warp * torch.sin(2 * math.pi * v / 40)))
    waves = along * torch.cos(2 * math.pi * v / (cross * scale))
    blots = uniform(-2, 2, (B, 1, 28, 28))
    blots = F.interpolate(blots, size=SIZE, mode="bilinear")[:, 0]
    grain = uniform(-1, 1, (B, SIZE, SIZE))
    relief = (1 - fine - coarse) * waves + fine * grain + coarse * blots
    return relief * per_pixel(uniform(0.03, 0.3, (B, CELLS, 3)), region)


def draw_light(B, x, y):
    """Brightness (B, S, S), around 1: it differs between images and falls from one side."""
    level = uniform(0.85, 1.15, (B, 1, 1))
    in_x = uniform(-0.2, 0.2, (B, 1, 1))
    in_y = uniform(-0.2, 0.2, (B, 1, 1))
    return level + (in_x * x + in_y * y) / SIZE


def token_shares(labels, count):
    """Each pixel's label (B, S, S) -> each token's shares of the labels, (B, 1 + P, count)."""
    patches = F.pixel_unshuffle(labels[:, None], CONFIG["patch"])
    patches = patches.flatten(2).mT  # (B, P, pixels of a patch)
    weight = torch.full(patches.shape, 1 / patches.shape[2])
    shares = torch.zeros(*patches.shape[:2], count).scatter_add_(2, patches, weight)
    return torch.cat([shares.mean(dim=1, keepdim=True), shares], dim=1)


def uniform(low, high, shape):
    return torch.empty(shape).uniform_(low, high)


def per_pixel(table, index):
    """Values of cells or regions (B, ...), and each pixel's number (B, S, S) -> (B, S, S)."""
    return table.flatten(1).gather(1, index.flatten(1)).view(index.shape)


# ---------------------------------------------------------------------------------------- training


def train(steps, batch_size, lr):
    """-> the trained ViT.

    AdamW, linear warm-up over 50 steps, cosine decay to 0, gradient norm clipped to 1.
    """
    vit, heads = new_networks()
    parameters = [*vit.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    losses = []
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps)
            group["lr"] = lr * min(step / 50, decay)
        images, shares = draw(batch_size)
        features = vit(vit.prepare(images), LAYERS)
        loss = torch.stack(
            [layer_losses(head(features[c]), shares) for c, head in zip(LAYERS, heads, strict=True)]
        )  # (layers, 3)
        optimizer.zero_grad()
        loss.sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss[-1].detach())
        if step % 50 == 0 or step == steps:
            kind, texture, colour = torch.stack(losses[-50:]).mean(dim=0).tolist()
            seconds = time.perf_counter() - start
            print(
                f"step {step}/{steps} last layer: kind {kind:.3f} texture {texture:.3f} "
                f"colour {colour:.3f} {seconds:.0f} s",
                flush=True,
            )
    return vit


def new_networks():
    """-> the ViT, and a linear head for each layer that is asked."""
    vit = ViT(**CONFIG)
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            # A width of 96 learns nothing for long from the usual deviation of 0.02.
            nn.init.xavier_uniform_(module.weight)
    nn.init.trunc_normal_(vit.pos_embed, std=0.1)
    width = CONFIG["width"]
    heads = [nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(COUNTS))) for _ in LAYERS]
    return vit, nn.ModuleList(heads)


def layer_losses(logits, shares):
    """One layer's losses of kind, texture and colour, (3,), each 0 for a perfect answer.

    Cross entropy less the shares' own entropy, averaged over the tokens.
    """
    losses = []
    for x, y in zip(logits.split(COUNTS, dim=2), shares, strict=True):
        entropy = torch.special.entr(y).sum(dim=2).mean()
        losses.append(F.cross_entropy(x.flatten(0, 1), y.flatten(0, 1)) - entropy)
    return torch.stack(losses)


@script
def main(argv):
    parser = Parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=WEIGHTS / "demo_teacher.safetensors",
        help="where to write (default weights/demo_teacher.safetensors)",
    )
    parser.add_argument("--steps", type=int, default=1000, help="(default 1000)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default 16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    args = parser.parse_args(argv)
    for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
        check_whole(name, getattr(args, name), least)
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr: expected more than 0 and finite, got {args.lr}")
    # A place that takes no file is found out at once.
    with new_folder(args.out.parent), atomic(args.out) as temporary:
        torch.manual_seed(args.seed)
        vit = train(args.steps, args.batch_size, args.lr)
        halves = {key: value.half() for key, value in vit.state_dict().items()}
        written = save(temporary, halves, metadata(vit), args.out)  # fails if training diverged
    parameters = sum(p.numel() for p in written.parameters())
    print(f"wrote {args.out}: {parameters:,} parameters, sha256 {written.sha256}")


def metadata(vit):
    """What the file says of itself."""
    return {
        "mean": CONFIG["mean"],
        "std": CONFIG["std"],
        "activation": "gelu",
        "eps": vit.config["eps"],
        "heads": CONFIG["heads"],
        "name": "demo_teacher (DEMO: knows generated shapes only)",
        "source": "weights/train_demo_teacher.py",
        "license": "MIT",
    }


if __name__ == "__main__":
    sys.exit(main())
