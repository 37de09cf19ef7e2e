"""The demo's images: washers with six bolts, drawn by formulas.

Anomalous ones lack a bolt, are scratched, or stained.
"""

import numpy as np

SIZE = 224  # pixels a side
KINDS = {"train": {"good": 80}, "test": {"good": 16, "missing": 8, "scratch": 8, "stain": 8}}


def draw_washers(train):
    """-> images uint8 (n, 3, 224, 224), masks uint8 (n, 224, 224), names; the same every time."""
    part = "train" if train else "test"
    rng = np.random.default_rng(0 if train else 1)
    images, masks, names = [], [], []
    for kind, count in KINDS[part].items():
        for i in range(count):
            image, mask = draw_washer(rng, kind)
            images.append(image)
            masks.append(mask)
            names.append(f"{part}/{kind}/{i:03}")
    return np.stack(images), np.stack(masks), names


def draw_washer(rng, kind):
    """One washer -> uint8 (3, 224, 224), and its mask (224, 224), 1 where a defect shows."""
    y, x = np.mgrid[:SIZE, :SIZE] - rng.uniform(110, 114, (2, 1, 1))
    r = np.hypot(x, y) / rng.uniform(0.98, 1.02)
    angle = np.arctan2(y, x) % (2 * np.pi)
    metal = inside(96 - r) * inside(r - 30)
    plate = draw_plate(rng, r, angle, metal)
    normal, sector, u, v = draw_bolts(rng, plate, r, angle)
    changed = normal

    # The defect. Good washers draw a place for it too.
    place = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(-0.6, 0.6)
    a = x - 63 * np.cos(place)
    b = y - 63 * np.sin(place)
    if kind == "scratch":
        turn = place + slope
        along = b * np.cos(turn) - a * np.sin(turn)
        across = a * np.cos(turn) + b * np.sin(turn)
        changed = draw_scratch(rng, changed, metal, along=along, across=across)
    if kind == "stain":
        changed = draw_stain(rng, changed, metal, a=a, b=b)
    if kind == "missing":
        hole = paint(plate, (22, 22, 26), inside(12 - np.hypot(u, v)))
        changed = np.where(sector == rng.integers(6), hole, changed)

    # The light falls from one side, and the camera has noise.
    light = rng.uniform(0.96, 1.04)
    light = light + (x * rng.uniform(-0.04, 0.04) + y * rng.uniform(-0.04, 0.04)) / 112
    noise = rng.normal(0, 4, (3, SIZE, SIZE))
    normal = np.clip(normal * light + noise, 0, 255).round().astype(np.uint8)
    changed = np.clip(changed * light + noise, 0, 255).round().astype(np.uint8)
    return changed, (normal != changed).any(axis=0).astype(np.uint8)


def draw_plate(rng, r, angle, metal):
    """A metal ring with turning marks along its circles, in which the light opens as two fans."""
    marks = rng.normal(0, 7, (180, 120))
    marks = marks[r.astype(int), (angle * 120 / (2 * np.pi)).astype(int) % 120]
    edge = inside(2 - np.minimum(96 - r, r - 30))
    sheen = 22 * np.cos(2 * (angle - rng.uniform(0.7, 0.9))) - 40 * edge
    ground = np.zeros((3, SIZE, SIZE)) + np.reshape((52, 60, 70), (3, 1, 1))
    plate = paint(ground, (165, 168, 174) + rng.normal(0, 1, 3), metal)
    return plate + metal * (marks + sheen)


def draw_bolts(rng, plate, r, angle):
    """Six bolts -> the image, and of each pixel its sector of 60 degrees and coordinates u, v.

    In every sector u runs outwards and v around, with the bolt at (0, 0).
    """
    turned = (angle - rng.uniform(-0.08, 0.08)) % (2 * np.pi)
    sector, within = np.divmod(turned, np.pi / 3)
    u = r * np.cos(within - np.pi / 6) - 63
    v = r * np.sin(within - np.pi / 6)
    turn = rng.uniform(0, np.pi / 3, 6)[sector.astype(int)]
    sides = [
        np.abs(u * np.cos(turn + a) + v * np.sin(turn + a)) for a in (0, np.pi / 3, 2 * np.pi / 3)
    ]
    hexagon = 17 - np.max(sides, axis=0)
    image = paint(plate, (70, 66, 62), inside(hexagon))
    image = paint(image, (128, 116, 92), inside(hexagon - 2.5))
    image = paint(image, (160, 148, 120), inside(8 - np.hypot(u, v)))
    return image, sector, u, v


def draw_scratch(rng, image, metal, along, across):
    """A bent bright line with a dark edge."""
    across = across - rng.uniform(-0.006, 0.006) * along**2
    ends = inside(rng.uniform(36, 56) - np.abs(along)) * metal
    image = paint(image, (62, 62, 66), ends * inside(4 - np.abs(across)))
    return paint(image, (238, 238, 240), ends * inside(2 - np.abs(across)))


def draw_stain(rng, image, metal, a, b):
    """A translucent brown blot with a wavy outline."""
    size = rng.uniform(20, 26)
    waves = sum(0.13 * np.sin(n * np.arctan2(b, a) + rng.uniform(0, 6)) for n in (2, 3, 5))
    outline = size * (1 + waves)
    return paint(image, (88, 52, 26), 0.75 * metal * inside((outline - np.hypot(a, b)) / 3))


def inside(depth):
    """A shape's coverage by depth in pixels: 1 within, 0 outside, a soft edge of one pixel."""
    return np.clip(depth + 0.5, 0, 1)


def paint(image, colour, coverage):
    return image + coverage * (np.reshape(colour, (3, 1, 1)) - image)
