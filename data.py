"""Images in: the data sets, split as the paper does into normal training and labelled test images.

| data set | normal is | read from, below --data-root |
|---|---|---|
| cifar10, fashion_mnist | one class | <dataset>/{train,test}/<class>/*.png, or official files |
| cifar100 | one superclass of 5 classes | the same |
| mvtec | one category's train/good | <category>/{train,test,ground_truth}/<kind>/*.png |
| folder | train/good | {train,test,ground_truth}/<kind>/*, test and ground_truth to evaluate |
| demo | generated washers | nothing: weights/demo_washers.py draws them |

A split holds its images as one uint8 tensor. Small images stay small (32 or 28 pixels). Others are
resized directly to S x S (bicubic, antialiased), once, and kept in a memory-mapped cache.
`ViT.prepare` does the rest on the device: resizing small ones and normalising.
"""

import contextlib
import difflib
import hashlib
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageOps

from runs import UserError, atomic, cache_folder, one_at_a_time
from weights.demo_washers import draw_washers

# Categories are in the order of the paper's tables, which is the official one but for MVTec AD.
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# CIFAR-100's superclasses and their classes.
CIFAR100 = {
    "aquatic mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit and vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household electrical devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large man-made outdoor things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large natural outdoor scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large omnivores and herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium-sized mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles 1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles 2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
# MVTec AD's categories, and how many images train/good, test/good and all defects of test hold.
MVTEC = {
    "bottle": (209, 20, 63),
    "hazelnut": (391, 40, 70),
    "capsule": (219, 23, 109),
    "metal_nut": (220, 22, 93),
    "leather": (245, 32, 92),
    "pill": (267, 26, 141),
    "wood": (247, 19, 60),
    "carpet": (280, 28, 89),
    "tile": (230, 33, 84),
    "grid": (264, 21, 57),
    "cable": (224, 58, 92),
    "transistor": (213, 60, 40),
    "toothbrush": (60, 12, 30),
    "screw": (320, 41, 119),
    "zipper": (240, 32, 119),
}
CATEGORIES = {
    "cifar10": CIFAR10,
    "cifar100": tuple(CIFAR100),
    "fashion_mnist": FASHION_MNIST,
    "mvtec": tuple(MVTEC),
    "demo": ("washer",),
    "folder": (),  # the folder's own name
}


@dataclass(frozen=True)
class OfficialFiles:
    """Images per class in the official train and test files, and torchvision's class for them."""

    train: int
    test: int
    reader: str


SMALL = {
    "cifar10": OfficialFiles(5000, 1000, "CIFAR10"),
    "cifar100": OfficialFiles(500, 100, "CIFAR100"),
    "fashion_mnist": OfficialFiles(6000, 1000, "FashionMNIST"),
}
# Raise it when `read_image` gives other pixels: what the cache holds is then decoded anew.
DECODER_VERSION = 1
OPEN_LOCK = threading.Lock()  # of `open_image`: filters of warnings belong to the whole process
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Split:
    """One split of one run, n images."""

    images: torch.Tensor  # uint8 (n, 3, s, s)
    labels: list  # 1 = anomalous
    names: list
    skipped: list = field(default_factory=list)  # why files were left out, if that was allowed
    masks: torch.Tensor | None = None  # uint8 (n, S, S), 1 at anomalous pixels, if known
    files: list | None = None  # paths of the originals; None for small sets and the demo


# --------------------------------------------------------------------------------------- categories


def slug(name):
    """A category's name as a folder's name: "T-shirt/top" -> "T-shirt_top"."""
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)


def find_category(dataset, text):
    """A category by its name (in any case, "_" for any other sign) or its place in CATEGORIES."""
    known = CATEGORIES[dataset]
    names = {slug(name).lower(): name for name in known}
    wanted = slug(text).lower()
    if wanted in names:
        return names[wanted]
    if wanted in map(str, range(len(known))):
        return known[int(wanted)]
    others = [
        other for other in CATEGORIES if wanted in {slug(c).lower() for c in CATEGORIES[other]}
    ]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(names[name] for name in near)}?"
    elif others:
        hint = f"that is one of --dataset {others[0]}"
    else:
        hint = f"choose from {', '.join(known)}, or 0 to {len(known) - 1}"
    raise UserError(f"--category: expected a category of {dataset}, got {text!r}: {hint}")


# ------------------------------------------------------------------------------------------- splits


def train_split(dataset, root, category, size=224):
    """The normal training images of a run. size: pixels a side, but for small sets and the demo."""
    check_place(dataset, root, category)
    if dataset == "demo":
        return demo_split(train=True)
    if dataset in SMALL:
        return small_split(dataset, root, category, train=True)
    folder, paths = train_files(dataset, root, category)
    note_inner_folders(folder / "train" / "good")
    if dataset == "mvtec":
        note_counts(category, {"train/good": len(paths)})
    images, names = decode(folder, paths, size)
    return Split(images, [0] * len(names), names)


def train_files(dataset, root, category):
    """The folder of an MVTec AD category or of own pictures, and its training images."""
    folder = category_folder(dataset, root, category)
    return folder, images_in(folder / "train" / "good")


def test_split(dataset, root, category, size=224, skip_bad=False):
    """The labelled test images of a run. skip_bad leaves out files that do not decode."""
    check_place(dataset, root, category)
    if dataset == "demo":
        return demo_split(train=False)
    if dataset in SMALL:
        return small_split(dataset, root, category, train=False)
    folder = category_folder(dataset, root, category)
    kinds = sorted(path for path in folder.glob("test/[!.]*") if path.is_dir())
    if not kinds:
        raise UserError(
            f"{folder / 'test'}: expected folders of test images, good and one per kind of defect, "
            f"got none"
        )
    paths = [path for kind in kinds for path in images_in(kind)]
    for kind in kinds:
        note_inner_folders(kind)
    skipped = {}
    if skip_bad:
        with ThreadPoolExecutor() as pool:
            reasons = dict(zip(paths, pool.map(why_unreadable, paths), strict=True))
        skipped = {path: why for path, why in reasons.items() if why}
    paths = [path for path in paths if path not in skipped]
    for path in paths:
        check_name(path)
    if not paths:
        raise UserError(f"{folder / 'test'}: expected images that decode, got none")
    labels = [int(path.parent.name != "good") for path in paths]
    if dataset == "mvtec":
        note_counts(category, {"test/good": labels.count(0), "test/<defects>": labels.count(1)})
    images, names = decode(folder, paths, size)
    return Split(
        images,
        labels,
        names,
        skipped=list(skipped.values()),
        masks=read_masks(folder, paths, size),
        files=paths,
    )


def check_place(dataset, root, category):
    """Refuse what cannot be: config.json may have been edited."""
    if dataset not in CATEGORIES:
        raise UserError(f"dataset: expected one of {', '.join(CATEGORIES)}, got {dataset!r}")
    if CATEGORIES[dataset] and category not in CATEGORIES[dataset]:
        raise UserError(f"category: expected one of {dataset}, got {category!r}")
    if root is None and dataset != "demo":
        raise UserError("data_root: expected a folder, got none: name it with --data-root")


def check_name(path):
    """Refuse a name that no result could be written with."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}: expected a name in UTF-8, got another: rename it") from None


def demo_split(train):
    images, masks, names = draw_washers(train)
    labels = [int(mask.any()) for mask in masks]
    return Split(torch.from_numpy(images), labels, names, masks=torch.from_numpy(masks))


# --------------------------------------------------------------- CIFAR-10, CIFAR-100, Fashion-MNIST


def small_split(dataset, root, category, train):
    """Training: the images of the normal classes. Test: those of every class, labelled."""
    classes = CATEGORIES[dataset]
    normal = (category,)
    if dataset == "cifar100":  # its categories are superclasses; its files number sorted classes
        classes = sorted(sum(CIFAR100.values(), ()))
        normal = CIFAR100[category]
    part = "train" if train else "test"
    wanted = normal if train else classes
    folder = Path(root) / dataset
    if folder.is_dir():
        paths = [path for name in wanted for path in images_in(folder / part / slug(name))]
        images, names = decode(folder, paths, size=None)
        image_classes = [path.parent.name for path in paths]
    else:
        images, targets = read_official(dataset, root, train)
        chosen = [i for i, target in enumerate(targets) if classes[target] in wanted]
        images = images[chosen]
        image_classes = [slug(classes[targets[i]]) for i in chosen]
        names = [f"{part}/{c}/{i:05d}" for c, i in zip(image_classes, chosen, strict=True)]
    official = SMALL[dataset]
    expected = official.train if train else official.test
    for name in wanted:
        got = image_classes.count(slug(name))
        if got != expected:
            raise UserError(
                f"{root}: expected {expected} {part} images of class {name}, the official number, "
                f"got {got}: complete the data set, or use --dataset folder for your own selection"
            )
    normal_slugs = {slug(name) for name in normal}
    return Split(images, [int(c not in normal_slugs) for c in image_classes], names)


def read_official(dataset, root, train):
    """The official files below `root`, downloaded if absent -> uint8 (n, 3, s, s), class numbers.

    torchvision checks the MD5 of CIFAR's pickles before it opens them. Fashion-MNIST's files are
    plain arrays.
    """
    name = SMALL[dataset].reader
    try:
        with one_at_a_time("data"):
            data = getattr(torchvision.datasets, name)(root, train=train, download=True)
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{root}: expected the official files of {name} or folders {dataset}/train/<class>, "
            f"got neither, and the download failed ({reason}): "
            f"download them elsewhere and name their folder with --data-root"
        ) from None
    images = torch.as_tensor(data.data)
    if images.ndim == 3:  # grey: three equal channels
        images = images[:, None].expand(-1, 3, -1, -1)
    else:
        images = images.permute(0, 3, 1, 2)
    return images, [int(target) for target in data.targets]


# --------------------------------------------------------------------------- MVTec AD, own pictures


def category_folder(dataset, root, category):
    """The folder that holds train/ and test/."""
    folder = Path(root) if dataset == "folder" else Path(root) / category
    if not (folder / "train").is_dir() and not (folder / "test").is_dir():
        where = "--data-root is the folder that holds train and test"
        if dataset == "mvtec":
            where = (
                "it is downloaded from mvtec.com (licence CC BY-NC-SA 4.0) and unpacked "
                "so that --data-root holds the categories"
            )
        raise UserError(
            f"{folder}: expected train/good/* and test/<kind>/* in it, got no such folders: {where}"
        )
    return folder


def images_in(folder):
    """The image files of a folder, sorted by name, so that no file system decides their order.

    Hidden ones, as macOS and notebooks leave them, are not taken.
    """
    paths = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"{folder}: expected images ({suffixes}), got none")
    return paths


def note_inner_folders(folder):
    """A line on stderr of the folders in a folder of images, which are not read."""
    inner = sorted(path.name for path in folder.glob("[!.]*/"))
    if inner:
        print(f"note: {folder}: folders in it are not read: {', '.join(inner)}", file=sys.stderr)


def note_counts(category, counts):
    """A line on stderr where an MVTec AD category has other counts than the official one."""
    official = dict(
        zip(("train/good", "test/good", "test/<defects>"), MVTEC[category], strict=True)
    )
    different = [
        f"{kind} {count} (official {official[kind]})"
        for kind, count in counts.items()
        if count != official[kind]
    ]
    if different:
        print(
            f"note: {category} is not the official one: {', '.join(different)} images",
            file=sys.stderr,
        )


def read_masks(folder, paths, size):
    """Masks of the images `paths`, uint8 (n, size, size), 1 where an image is defective.

    None where there is no ground_truth folder. A mask is found by its image's name, and has to have
    its image's size.
    """
    if not (folder / "ground_truth").is_dir():
        return None
    masks = np.zeros((len(paths), size, size), dtype=np.uint8)
    for mask, path in zip(masks, paths, strict=True):
        if path.parent.name == "good":
            continue
        file = folder / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        expected = image_size(path)
        got = image_size(file)
        if got != expected:
            raise UserError(
                f"{file}: expected the mask of {path.parent.name}/{path.name}, {expected}, "
                f"got {got or 'none that opens'}: replace it, or remove ground_truth"
            )
        try:
            with open_image(file) as image:
                upright = ImageOps.exif_transpose(image).convert("L")
                defective = torch.from_numpy(np.array(upright) > 0)
        except Exception as error:  # as in `read_image`
            raise undecodable(file, error, "replace it, or remove ground_truth") from None
        # A small pixel is defective where any of its large ones is, so that no thin defect is lost.
        mask[:] = F.adaptive_max_pool2d(defective[None].float(), size)[0]
    return torch.from_numpy(masks)


def image_size(path):
    """(width, height) of an image file upright; None if it does not open.

    Read from the file's header, but for TIFF.
    """
    try:
        with open_image(path) as image:
            if image.format == "TIFF":
                image.load()  # turns `size` too, which some versions of Pillow do before
            # Of a PNG without EXIF before its pixels, Pillow would decode all to look behind them.
            cheap = image.format != "PNG" or "exif" in image.info
            orientation = image.getexif().get(ExifTags.Base.Orientation) if cheap else None
            turned = orientation in (5, 6, 7, 8)  # by 90 degrees
            return image.size[::-1] if turned else image.size
    except Exception:  # as in `read_image`
        return None


# ----------------------------------------------------------------------------------------- decoding


def open_image(path):
    """Image.open, without its warning of an image above 89 megapixels. 179 are an error."""
    if not path.is_file():
        raise FileNotFoundError("no such file")  # a pipe would be waited for
    with OPEN_LOCK, warnings.catch_warnings():  # which all threads share
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(path)


def undecodable(path, error, advice):
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(
        f"{path}: expected an image, got a file that does not decode ({reason}): {advice}"
    )


def read_image(path, size):
    """One image file as RGB, uint8 (size, size, 3); in its own size where `size` is None.

    EXIF rotation is applied. Unsigned 16 bits become their upper 8; 32 bits are refused, since
    nothing tells their range. Transparency is laid on white. Grey and palette images become RGB.
    """
    try:
        with open_image(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError(f"Pillow's mode {image.mode}, whose range nothing tells")
            if image.mode.startswith("I;16"):  # grey, which Pillow's conversion would clip
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
            if size is not None:
                image = image.resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except Exception as error:  # a decoder on foreign bytes fails in every way there is
        advice = "replace or remove it (evaluate.py --skip-bad leaves it out)"
        raise undecodable(path, error, advice) from None


def why_unreadable(path):
    """Why an image file does not decode, in a sentence; None if it does."""
    try:
        read_image(path, None)
    except UserError as error:
        return str(error)
    return None


def decode(folder, paths, size):
    """Image files -> uint8 tensor (n, 3, s, s), and their names relative to `folder`.

    size: s, or None to keep the images as they are, all of one size. They are decoded once, into a
    file that is memory-mapped, so that the next start is immediate and a set may be larger than
    memory. The file is whole or not there, and may be deleted at any time.
    """
    names = [path.relative_to(folder).as_posix() for path in paths]
    side = (size, size) if size else read_image(paths[0], None).shape[:2]
    shape = (len(paths), 3, *side)
    cache = cache_file(folder, paths, shape)
    with contextlib.suppress(OSError, EOFError, ValueError):  # not there, or damaged
        return torch.from_numpy(np.load(cache, mmap_mode="c")), names
    layout = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with atomic(cache) as temporary, open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, layout)
            for image in decoded(paths, size, shape[1:]):
                file.write(image)
    except OSError as error:
        print(
            f"note: no cache at {cache.parent} ({error.strerror}): the images stay in memory",
            file=sys.stderr,
        )
        return torch.from_numpy(np.stack(list(decoded(paths, size, shape[1:])))), names
    return torch.from_numpy(np.load(cache, mmap_mode="c")), names


def cache_file(folder, paths, shape):
    """Its name is a digest of DECODER_VERSION and of the images' paths, sizes and dates."""
    stats = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:  # a link to nowhere
            raise undecodable(path, error.strerror, "replace or remove it") from None
        stats.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    digest = hashlib.sha256(repr((DECODER_VERSION, shape, stats)).encode()).hexdigest()[:24]
    return cache_folder() / f"{slug(folder.name)}-{digest}.npy"


def decoded(paths, size, shape):
    """Each image as uint8 (3, s, s), in order; several threads decode at a time."""

    def decode_one(path):
        image = np.ascontiguousarray(read_image(path, size).transpose(2, 0, 1))
        if image.shape != shape:
            raise UserError(
                f"{path}: expected an image of the others' size {shape[1:]}, "
                f"got {image.shape[1:]}: replace or remove it"
            )
        return image

    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock
        for i in range(0, len(paths), 256):  # all at once would fill the memory
            yield from pool.map(decode_one, paths[i : i + 256])
