"""Images in: the data sets, as the paper's protocols split them into normal training images and labelled test images.

| data set | run | read from, below --data-root |
|---|---|---|
| cifar10, cifar100, fashion_mnist | one class, or one of the 20 superclasses, is normal | <dataset>/{train,test}/<class>/*.png, or the official files |
| mvtec | one category | <category>/{train,test,ground_truth}/<kind>/*.png, the official layout |
| folder | anyone's pictures | train/good/*, and test/good/*, test/<kind of defect>/* to evaluate |
| demo | washers, generated here | nothing |

A split is one uint8 tensor. Small images stay small (32 x 32); larger ones are decoded once, as RGB, resized directly to S x S (bicubic,
antialiased; the paper's "all images are enlarged or reduced to 224 x 224"), and kept in a memory-mapped cache. What is left, enlarging and
normalising, happens on the device (`ViT.prepare`). Nothing here imports torch at import time: wrong arguments are answered at once.
"""
import difflib
import hashlib
import io
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from weights.files import atomic

# The categories of each protocol, in the order of the paper's table: the paper's image AUROC (Tables 1 to 4, row "ours"), CIFAR-100's classes of
# each superclass, MVTec AD's own counts of train/good, test/good and test/<every other kind>.
PROTOCOLS = json.loads((Path(__file__).parent / "results" / "protocols.json").read_text())
PAPER_AUROC = {dataset: {category: facts["paper_auroc"] for category, facts in categories.items()} for dataset, categories in PROTOCOLS.items()}
PAPER_AUROC |= {"demo": {"washer": None}, "folder": {}}
# Images per class in the official train and test files, and the class of torchvision that reads those.
SMALL = {"cifar10": (5000, 1000, "CIFAR10"), "cifar100": (500, 100, "CIFAR100"), "fashion_mnist": (6000, 1000, "FashionMNIST")}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Split:
    """One split of one run: images uint8 (N, 3, s, s), labels with 1 = anomalous, names of the images."""

    images: "torch.Tensor"
    labels: list
    names: list
    skipped: list = field(default_factory=list)  # files that do not decode, where the caller allowed that
    masks: "torch.Tensor" = None  # uint8 (N, S, S), 1 where an image is anomalous, if that is known
    files: list = None  # of pictures that are kept smaller than they are


def slug(name):
    """A category's name as a folder's name: "T-shirt/top" -> "T-shirt_top"."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def find_category(dataset, category):
    """A category by name (in any case, "_" for what a path cannot hold) or by its place in the paper's table; ValueError with the nearest names."""
    known = list(PAPER_AUROC[dataset])
    names = {slug(name).lower(): name for name in known} | {str(i): name for i, name in enumerate(known)}
    if slug(category).lower() in names:
        return names[slug(category).lower()]
    near = [] if category.isdigit() else difflib.get_close_matches(slug(category).lower(), names, n=3, cutoff=0.5)
    others = [name for name in PAPER_AUROC if slug(category).lower() in {slug(other).lower() for other in PAPER_AUROC[name]}]
    hint = (f"did you mean {' or '.join(names[name] for name in near)}?" if near else f"that is one of --dataset {others[0]}" if others
            else f"choose from {', '.join(known)}, or 0 to {len(known) - 1}")
    raise ValueError(f"--category: expected a category of {dataset}, or all, got {category!r}: {hint}")


def train_split(dataset, root, category, size=224):
    """The normal training images of a run."""
    if dataset == "demo":
        return washers(train=True)
    if dataset in SMALL:
        return small_split(dataset, root, category, train=True)
    folder, paths = train_files(dataset, root, category)
    compare_counts(dataset, category, {"train/good": len(paths)})
    images, names = decode(folder, paths, size)
    return Split(images, [0] * len(names), names)


def train_files(dataset, root, category):
    """The folder of an MVTec AD category or of own pictures, and its normal training images; ValueError if there are none."""
    folder = category_folder(dataset, root, category)
    return folder, images_in(folder / "train" / "good")


def test_split(dataset, root, category, size=224, skip_bad=False):
    """The test images of a run, labelled; with `skip_bad` files that do not decode are left out and listed in `skipped`."""
    if dataset == "demo":
        return washers(train=False)
    if dataset in SMALL:
        return small_split(dataset, root, category, train=False)
    folder = category_folder(dataset, root, category)
    kinds = sorted(path for path in folder.glob("test/*") if path.is_dir())
    if not kinds:
        raise ValueError(f"{folder / 'test'}: expected folders of test images, good and one per kind of defect, got none")
    paths = [path for kind in kinds for path in images_in(kind)]
    skipped = {path: why for path in paths if (why := unreadable(path))} if skip_bad else {}
    paths = [path for path in paths if path not in skipped]
    if not paths:
        raise ValueError(f"{folder / 'test'}: expected images that decode, got none")
    labels = [int(path.parent.name != "good") for path in paths]
    compare_counts(dataset, category, {"test/good": labels.count(0), "test/<defects>": labels.count(1)})
    images, names = decode(folder, paths, size)
    return Split(images, labels, names, list(skipped.values()), read_masks(folder, paths, size), paths)


# ------------------------------------------------------------------------------- CIFAR-10, CIFAR-100, Fashion-MNIST

def small_split(dataset, root, category, train):
    """Training: the images of the normal class or superclass. Test: those of every class, labelled by whether theirs is normal."""
    classes, normal = list(PROTOCOLS[dataset]), [category]
    if dataset == "cifar100":  # its classes are the superclasses' members, five each
        classes, normal = sorted(sum((facts["classes"] for facts in PROTOCOLS[dataset].values()), [])), PROTOCOLS[dataset][category]["classes"]
    part, wanted = ("train", normal) if train else ("test", classes)
    folder = Path(root) / dataset
    if folder.is_dir():
        paths = [path for name in wanted for path in images_in(folder / part / slug(name))]
        images, names = decode(folder, paths, size=None)
        of_class = [path.parent.name for path in paths]
    else:
        images, targets = official_files(dataset, root, train)
        chosen = [i for i, target in enumerate(targets) if classes[target] in wanted]
        images, of_class = images[chosen], [slug(classes[targets[i]]) for i in chosen]
        names = [f"{part}/{name}/{i:05d}" for name, i in zip(of_class, chosen)]
    expected = SMALL[dataset][0 if train else 1]
    for name in wanted:
        if (got := of_class.count(slug(name))) != expected:
            raise ValueError(f"{root}: expected {expected} {part} images of class {name}, the official number, got {got}: complete the data set, "
                             f"or use --dataset folder for a selection of your own")
    return Split(images, [int(name not in map(slug, normal)) for name in of_class], names)


def official_files(dataset, root, train):
    """The official files below `root`, downloaded where absent: images uint8 (N, 3, s, s), class numbers.

    torchvision checks the MD5 of CIFAR's pickles before it opens them; Fashion-MNIST's files are plain arrays.
    """
    import torch
    import torchvision

    name = SMALL[dataset][2]
    try:
        data = getattr(torchvision.datasets, name)(root, train=train, download=True)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{root}: expected the official files of {name} or folders {dataset}/train/<class>, got neither, and the download "
                         f"failed ({str(error).splitlines()[0]}): download them elsewhere and name their folder with --data-root") from None
    images = torch.as_tensor(data.data)
    images = images[:, None].expand(-1, 3, -1, -1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images, [int(target) for target in data.targets]


# ------------------------------------------------------------------------------------------------ MVTec AD and own pictures

def category_folder(dataset, root, category):
    folder = Path(root) if dataset == "folder" else Path(root) / category
    if not (folder / "train").is_dir() and not (folder / "test").is_dir():
        where = ("it is downloaded from mvtec.com (licence CC BY-NC-SA 4.0) and unpacked so that --data-root holds the categories"
                 if dataset == "mvtec" else "--data-root is the folder that holds train and test")
        raise ValueError(f"{folder}: expected train/good/* and test/<kind>/* in it, got no such folders: {where}")
    return folder


def images_in(folder):
    """The image files of a folder, sorted by name, so that their order does not depend on the file system."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), got none")
    return paths


def read_masks(folder, paths, size):
    """Where there is a ground_truth folder: uint8 (N, size, size), 1 where an image is defective, each mask found by its image's name and of its size;
    ValueError if not. Without the folder: None.
    """
    import numpy as np
    import torch
    from PIL import Image

    if not (folder / "ground_truth").is_dir():
        return None
    masks = np.zeros((len(paths), size, size), dtype=np.uint8)
    for mask, path in zip(masks, paths):
        if path.parent.name != "good":
            file = folder / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
            expected, got = image_size(path), image_size(file)
            if got != expected:
                raise ValueError(f"{file}: expected the mask of {path.parent.name}/{path.name}, {expected}, got {got or 'none that opens'}: "
                                 f"replace it, or remove ground_truth")
            mask[:] = np.asarray(Image.open(file).convert("L").resize((size, size), Image.Resampling.NEAREST)) > 0
    return torch.from_numpy(masks)


def image_size(path):
    """(width, height) from an image file's header; None if it does not open."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size
    except OSError:
        return None


def compare_counts(dataset, category, counts):
    """One line on stderr where an MVTec AD category has other counts than the official one."""
    if dataset == "mvtec":
        official = dict(zip(("train/good", "test/good", "test/<defects>"), PROTOCOLS[dataset][category]["images"]))
        if other := [f"{kind} {count} (official {official[kind]})" for kind, count in counts.items() if count != official[kind]]:
            print(f"note: {category} is not the official one: {', '.join(other)} images", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ decoding

def read_image(path, size):
    """One image file as RGB, uint8 (size, size, 3), or in its own size where size is None; ValueError if it does not decode.

    EXIF rotation is applied, 16 bits become their upper 8, transparency is laid on white, grey and palette images become RGB.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
                image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            return np.asarray(image if size is None else image.resize((size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # a decoder on foreign bytes fails in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: expected an image, got a file that does not decode ({reason}): replace or remove it "
                         f"(evaluate.py --skip-bad leaves it out)") from None


def unreadable(path):
    """Why an image file does not decode, in a sentence; None if it does."""
    try:
        read_image(path, None)
    except ValueError as error:
        return str(error)


def decode(folder, paths, size):
    """Image files -> uint8 tensor (N, 3, s, s) and their names relative to `folder`; size None: as they are, all of one size.

    Decoded once, into a memory-mapped file in the cache folder, so that the next start is immediate and a set may be larger than memory.
    The file's name is a digest of the images' names, sizes and times; it appears whole or not at all, and can be deleted at any time.
    """
    import numpy as np
    import torch

    names = [path.relative_to(folder).as_posix() for path in paths]
    shape = (len(paths), 3, *((size, size) if size else read_image(paths[0], None).shape[:2]))
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    digest = hashlib.sha256(repr((shape, stats)).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitad" / f"{slug(folder.name)}-{digest}.npy"

    def one(path):
        image = np.ascontiguousarray(read_image(path, size).transpose(2, 0, 1))
        if image.shape != shape[1:]:
            raise ValueError(f"{path}: expected an image of the others' size {shape[2:]}, got {image.shape[1:]}: replace or remove it")
        return image

    def images():  # several threads at a time: Pillow releases the interpreter lock
        with ThreadPoolExecutor() as pool:
            yield from pool.map(one, paths)

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    if not cache.is_file() or cache.stat().st_size != header.tell() + math.prod(shape):  # absent, or cut short by something else
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic(cache) as temporary, open(temporary, "wb") as file:
                file.write(header.getvalue())
                for image in images():
                    file.write(image)
        except OSError as error:
            print(f"note: no cache at {cache.parent} ({error.strerror}): the images stay in memory", file=sys.stderr)
            return torch.from_numpy(np.stack(list(images()))), names
    return torch.from_numpy(np.load(cache, mmap_mode="c")), names


# ---------------------------------------------------------------------------------------------------------------- demo

def washer(rng, kind):
    """One generated washer with six bolts -> image uint8 (3, 224, 224) and mask (224, 224), 1 where the defect changed a pixel."""
    import numpy as np

    def inside(depth):  # a shape's coverage from its depth in pixels: 1 within, 0 outside, one pixel of soft edge
        return np.clip(depth + 0.5, 0, 1)

    def paint(image, colour, coverage):
        return image + coverage * (np.reshape(colour, (3, 1, 1)) - image)

    y, x = np.mgrid[:224, :224] - rng.uniform(110, 114, (2, 1, 1))
    r, angle = np.hypot(x, y) / rng.uniform(0.98, 1.02), np.arctan2(y, x) % (2 * np.pi)
    metal = inside(96 - r) * inside(r - 30)
    # Turning marks run along circles, and the light's reflection opens as two fans.
    marks = rng.normal(0, 7, (180, 120))[r.astype(int), (angle * 120 / (2 * np.pi)).astype(int) % 120]
    sheen = 22 * np.cos(2 * (angle - rng.uniform(0.7, 0.9))) - 40 * inside(2 - np.minimum(96 - r, r - 30))
    plate = paint(np.zeros((3, 224, 224)) + np.reshape((52, 60, 70), (3, 1, 1)), (165, 168, 174) + rng.normal(0, 1, 3), metal)
    plate = plate + metal * (marks + sheen)
    # Six bolts at once: each 60 degrees of the ring have coordinates of their own, u outwards and v around, with the bolt at (0, 0).
    sector, within = np.divmod((angle - rng.uniform(-0.08, 0.08)) % (2 * np.pi), np.pi / 3)
    u, v = r * np.cos(within - np.pi / 6) - 63, r * np.sin(within - np.pi / 6)
    turn = rng.uniform(0, np.pi / 3, 6)[sector.astype(int)]
    hexagon = 17 - np.max([np.abs(u * np.cos(turn + a) + v * np.sin(turn + a)) for a in (0, np.pi / 3, 2 * np.pi / 3)], axis=0)
    bolts = paint(paint(plate, (70, 66, 62), inside(hexagon)), (128, 116, 92), inside(hexagon - 2.5))
    normal = changed = paint(bolts, (160, 148, 120), inside(8 - np.hypot(u, v)))

    place, slope = rng.uniform(0, 2 * np.pi), rng.uniform(-0.6, 0.6)
    a, b = x - 63 * np.cos(place), y - 63 * np.sin(place)
    if kind == "scratch":  # a bent line, roughly around the ring, with a dark edge
        along, across = b * np.cos(place + slope) - a * np.sin(place + slope), a * np.cos(place + slope) + b * np.sin(place + slope)
        across, ends = across - rng.uniform(-0.006, 0.006) * along ** 2, inside(rng.uniform(36, 56) - np.abs(along)) * metal
        changed = paint(paint(changed, (62, 62, 66), ends * inside(4 - np.abs(across))), (238, 238, 240), ends * inside(2 - np.abs(across)))
    if kind == "stain":  # a translucent brown blot with a wavy outline
        outline = rng.uniform(20, 26) * (1 + sum(0.13 * np.sin(n * np.arctan2(b, a) + rng.uniform(0, 6)) for n in (2, 3, 5)))
        changed = paint(changed, (88, 52, 26), 0.75 * metal * inside((outline - np.hypot(a, b)) / 3))
    if kind == "missing":  # one bolt's hole
        hole = paint(plate, (22, 22, 26), inside(12 - np.hypot(u, v)))
        changed = np.where(sector == rng.integers(6), hole, changed)
    light = rng.uniform(0.96, 1.04) + (x * rng.uniform(-0.04, 0.04) + y * rng.uniform(-0.04, 0.04)) / 112
    noise = rng.normal(0, 4, (3, 224, 224))
    normal, changed = (np.clip(image * light + noise, 0, 255).round().astype(np.uint8) for image in (normal, changed))
    return changed, (normal != changed).any(axis=0).astype(np.uint8)


def washers(train):
    """The demo: washers with six bolts, drawn from fixed seeds; anomalous ones lack a bolt, are scratched, or stained."""
    import numpy as np
    import torch

    part, kinds = ("train", {"good": 56}) if train else ("test", {"good": 16, "missing": 8, "scratch": 8, "stain": 8})
    rng = np.random.default_rng(0 if train else 1)
    names = [f"{part}/{kind}/{i:03}" for kind, count in kinds.items() for i in range(count)]
    images, masks = zip(*(washer(rng, name.split("/")[1]) for name in names))
    return Split(torch.from_numpy(np.stack(images)), [int(mask.any()) for mask in masks], names, masks=torch.from_numpy(np.stack(masks)))
