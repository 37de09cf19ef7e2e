#!/usr/bin/env python3
"""Train the demo's teacher, a small ViT, from scratch on images made by formulas; no data, network or GPU.

    python weights/train_demo_teacher.py

writes weights/demo_teacher.safetensors in ten minutes on 2 CPU cores. On a machine with another CPU the last digits of the weights,
and so the file's sha256, come out different.

An image is a turned lattice of cells. Each shows a shape and sometimes a line on a ground; the three are of materials of their own, a texture
in a colour. Every token has to tell how much of its patch is of which kind, texture and colour; the class token, how much of the whole
image. It is asked at each of the method's four layers. No image is ever drawn twice, so the losses shown are those on unseen images.
The file is meant for the demo and for nothing else: pretrained teachers (weights/README.md) know far more.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from vit import ViT, load_vit  # noqa: E402
from vitad import LAYERS  # noqa: E402
from weights.files import atomic, fail, one_sentence  # noqa: E402

CONFIG = dict(width=96, depth=12, heads=3, patch=16, grid=14, hidden=192, mean=(0.5,) * 3, std=(0.25,) * 3)
SIZE = CONFIG["patch"] * CONFIG["grid"]
# A shape is the region r < size (1 + swing cos(lobes angle)), given by (lobes, swing): a disc, a bone, a trefoil, ...
SHAPES = torch.tensor([(0, 0.0), (2, 0.4), (3, 0.3), (4, 0.3), (5, 0.3), (8, 0.25)])
# A texture is cos(2 pi (u / wave + warp sin(2 pi v / 40))) cos(2 pi v / cross), mixed with noise: (wave, warp, cross, share of fine noise,
# share of coarse noise), u and v being x and y turned; lengths in pixels. Stripes fine and broad, a grid, waves, grain, blots, almost nothing.
TEXTURES = torch.tensor([(7, 0.0, 1e6, 0.1, 0.0), (20, 0.0, 1e6, 0.1, 0.0), (12, 0.0, 12, 0.1, 0.0), (14, 0.6, 1e6, 0.1, 0.0),
                         (1e6, 0.0, 1e6, 1.0, 0.0), (1e6, 0.0, 1e6, 0.0, 1.0), (1e6, 0.0, 1e6, 0.1, 0.0)])
COLOURS = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
COUNTS = (1 + len(SHAPES) + 1, len(TEXTURES), len(COLOURS))  # of kinds (the ground, a shape, a line), textures and colours
LATTICE = 16  # cells a side, more than an image shows
CELLS = LATTICE ** 2


def uniform(low, high, *shape):
    return torch.empty(shape).uniform_(low, high)


def draw(B):
    """-> images uint8 (B, 3, S, S), and what each token covers: its shares of kinds, textures and colours, 3 x (B, 1 + P, count)."""
    def per_pixel(table, index):
        return table.flatten(1).gather(1, index.flatten(1)).view(B, SIZE, SIZE)

    # The lattice, turned and scaled: which cell each pixel is in, and where in it (du, dv from the centre, in cells).
    y, x = torch.meshgrid(torch.arange(SIZE) - SIZE / 2, torch.arange(SIZE) - SIZE / 2, indexing="ij")
    turn, side = uniform(0, 2 * math.pi, B, 1, 1), uniform(40, 110, B, 1, 1)  # in pixels
    u = (x * turn.cos() + y * turn.sin()) / side + LATTICE / 2 + uniform(0, 1, B, 1, 1)
    v = (y * turn.cos() - x * turn.sin()) / side + LATTICE / 2 + uniform(0, 1, B, 1, 1)
    cell = u.long() * LATTICE + v.long()
    du, dv = (w % 1 - per_pixel(uniform(0.4, 0.6, B, CELLS), cell) for w in (u, v))

    # In each cell a ground, a shape, and in a third of them a line; `part` says which of the three a pixel is, `region` which one of all.
    shape = torch.randint(len(SHAPES), (B, CELLS))
    lobes, swing = (per_pixel(table, cell) for table in SHAPES[shape].unbind(2))
    angle = torch.atan2(dv, du) + per_pixel(uniform(0, 2 * math.pi, B, CELLS), cell)
    in_shape = torch.hypot(du, dv) < per_pixel(uniform(0.2, 0.4, B, CELLS), cell) * (1 + swing * torch.cos(lobes * angle))
    slope = per_pixel(uniform(0, math.pi, B, CELLS), cell)
    across = (du * slope.cos() + dv * slope.sin()) * side + per_pixel(uniform(-12, 12, B, CELLS), cell)
    half_width = uniform(1, 3.5, B, CELLS) * (torch.rand(B, CELLS) < 1 / 3)
    part = torch.where(across.abs() < per_pixel(half_width, cell), 2, in_shape.long())
    region = 3 * cell + part

    # Every region has a material of its own.
    texture, colour = (torch.randint(len(table), (B, CELLS, 3)) for table in (TEXTURES, COLOURS))
    wave, warp, cross, fine, coarse = (per_pixel(table, region) for table in TEXTURES[texture].unbind(3))
    turn, scale = (per_pixel(uniform(low, high, B, CELLS, 3), region) for low, high in ((0, 2 * math.pi), (0.85, 1.15)))
    u, v = x * turn.cos() + y * turn.sin(), y * turn.cos() - x * turn.sin()
    waves = torch.cos(2 * math.pi * (u / (wave * scale) + warp * torch.sin(2 * math.pi * v / 40))) * torch.cos(2 * math.pi * v / (cross * scale))
    blots = F.interpolate(uniform(-2, 2, B, 1, 28, 28), size=SIZE, mode="bilinear")[:, 0]
    relief = (1 - fine - coarse) * waves + fine * uniform(-1, 1, B, SIZE, SIZE) + coarse * blots
    relief = relief * per_pixel(uniform(0.03, 0.3, B, CELLS, 3), region)
    tint = COLOURS[colour] + uniform(-0.05, 0.05, B, CELLS, 3, 3)
    light = uniform(0.85, 1.15, B, 1, 1) + (uniform(-0.2, 0.2, B, 1, 1) * x + uniform(-0.2, 0.2, B, 1, 1) * y) / SIZE
    images = torch.stack([255 * light * (per_pixel(channel, region) + relief) for channel in tint.unbind(3)], dim=1)

    kind = torch.stack([torch.zeros_like(shape), 1 + shape, torch.full_like(shape, 1 + len(SHAPES))], dim=2)
    shares = []
    for table, count in zip((kind, texture, colour), COUNTS):
        pixels = F.pixel_unshuffle(per_pixel(table, region)[:, None], CONFIG["patch"]).flatten(2).mT  # (B, P, pixels of a patch)
        share = torch.zeros(*pixels.shape[:2], count).scatter_add_(2, pixels, torch.full(pixels.shape, 1 / pixels.shape[2]))
        shares.append(torch.cat([share.mean(dim=1, keepdim=True), share], dim=1))
    return images.clamp(0, 255).to(torch.uint8), shares


def train(steps, batch_size, lr):
    """-> the trained ViT: AdamW, linear warm-up over 50 steps, cosine decay to 0, gradient norm clipped to 1."""
    vit = ViT(**CONFIG)
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # the usual 0.02 is far too small at a width of 96: nothing is learnt for long
    nn.init.trunc_normal_(vit.pos_embed, std=0.1)
    heads = nn.ModuleList(nn.Sequential(nn.LayerNorm(CONFIG["width"]), nn.Linear(CONFIG["width"], sum(COUNTS))) for _ in LAYERS)
    parameters = [*vit.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.05)
    losses, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(step / 50, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps))
        images, shares = draw(batch_size)
        features = vit(vit.prepare(images), LAYERS)
        logits = [head(features[c]).split(COUNTS, dim=2) for c, head in zip(LAYERS, heads)]
        # Cross entropy less the shares' own entropy, which no prediction can go below; (layers, 3)
        loss = torch.stack([torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten(0, 1)) - torch.special.entr(y).sum(dim=2).mean()
                                         for x, y in zip(of_layer, shares)]) for of_layer in logits])
        optimizer.zero_grad()
        loss.sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss[-1].detach())
        if step % 50 == 0 or step == steps:
            kind, texture, colour = torch.stack(losses[-50:]).mean(dim=0).tolist()
            print(f"step {step}/{steps} last layer: kind {kind:.3f} texture {texture:.3f} colour {colour:.3f} "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
    return vit


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    parser.add_argument("--out", type=Path, default=HERE / "demo_teacher.safetensors", help="where to write (default weights/demo_teacher.safetensors)")
    parser.add_argument("--steps", type=int, default=1000, help="(default 1000)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (default 16)")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default 0)")
    args = parser.parse_args()
    if min(args.steps, args.batch_size) < 1:
        fail(f"--steps, --batch-size: expected at least 1, got {args.steps}, {args.batch_size}")
    torch.manual_seed(args.seed)
    vit = train(args.steps, args.batch_size, args.lr)
    about = {"mean": CONFIG["mean"], "std": CONFIG["std"], "activation": "gelu", "eps": vit.config["eps"], "heads": CONFIG["heads"],
             "name": "demo_teacher (DEMO: knows generated shapes only)", "source": "weights/train_demo_teacher.py", "license": "MIT"}
    with one_sentence(), atomic(args.out) as temporary:
        save_file({key: value.half() for key, value in vit.state_dict().items()}, temporary, metadata={"vitad": json.dumps(about, sort_keys=True)})
    print(f"wrote {args.out}: {sum(p.numel() for p in vit.parameters()):,} parameters, sha256 {load_vit(args.out).sha256}")


if __name__ == "__main__":
    main()
