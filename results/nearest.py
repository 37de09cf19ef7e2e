#!/usr/bin/env python3
"""What the teacher can do without a student: distances to the nearest normal patches.

    python results/nearest.py --dataset mvtec --category bottle --data-root data/mvtec --weights W

A memory holds the teacher's patch tokens of the normal training images, at most M a layer. An image
scores the mean of its patches' largest 1 % of distances (1 - cosine) to the nearest token in it,
summed over the layers, as in PatchCore and AnomalyDINO. The result is in <out>/<dataset>/nearest/.
"""

import json
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    import _root  # noqa: F401 (the top of the project goes onto the path)

import torch

import runs
from data import CATEGORIES, SMALL, find_category, slug, test_split, train_split
from evaluate import auroc
from results import report
from train import EVAL_BATCH, PER_DATASET, TEACHER
from vitad import LAYERS
from weights.download import ensure_weights


@torch.no_grad()
def patch_tokens(teacher, images, layers):
    """uint8 images -> batches {c: their patch tokens, of length 1, (B, P, D)}."""
    for batch in images.split(EVAL_BATCH):
        features = teacher(teacher.prepare(batch.to(teacher.mean.device)), layers)
        yield {c: torch.nn.functional.normalize(x[:, 1:], dim=-1) for c, x in features.items()}


def fill_memory(teacher, images, layers, most):
    """-> {c: (M, D)}: a random sample of `most` patches of all images, or every patch."""
    chosen = torch.zeros(len(images), teacher.config["grid"] ** 2, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    chosen.view(-1)[torch.randperm(chosen.numel(), generator=generator)[:most]] = True
    seen = chosen.any(dim=1)  # with a small memory most images have no chosen patch
    memory = {c: [] for c in layers}
    batches = patch_tokens(teacher, images[seen], layers)
    for tokens, wanted in zip(batches, chosen[seen].split(EVAL_BATCH), strict=True):
        for c, x in tokens.items():
            memory[c].append(x[wanted.to(x.device)])
    return {c: torch.cat(parts) for c, parts in memory.items()}


def score(tokens, memory):
    """Patches of one image (P, D) and the memory (M, D), of length 1 -> a scalar."""
    nearest = 1 - (tokens @ memory.T).amax(dim=1)
    return nearest.topk(math.ceil(len(tokens) / 100)).values.mean()


def score_images(teacher, images, memories):
    """-> [{c: scores (n,)}], one of each memory {c: (M, D)}. The teacher sees the images once."""
    scores = [{c: [] for c in memory} for memory in memories]
    for tokens in patch_tokens(teacher, images, tuple(memories[0])):
        for found, memory in zip(scores, memories, strict=True):
            for c, x in tokens.items():
                found[c] += [score(patches, memory[c]) for patches in x]
    return [{c: torch.stack(values).cpu() for c, values in found.items()} for found in scores]


def results_of(categories, args, teacher):
    """Yields the results of categories, which have the same test images."""
    labels, memories = [], []
    for name in categories:
        place = (args.dataset, args.data_root, name, teacher.image_size)
        normal, test = train_split(*place).images, test_split(*place)
        if len(set(test.labels)) < 2:
            raise runs.UserError(f"{name}: expected normal and anomalous test images, got one kind")
        labels.append(test.labels)
        memories.append(fill_memory(teacher, normal, LAYERS, args.memory))
    for i, scores in enumerate(score_images(teacher, test.images, memories)):
        value = auroc(sum(scores.values()), labels[i])
        size = len(memories[i][LAYERS[0]])
        yield {"dataset": args.dataset, "category": categories[i], "auroc": value, "memory": size}


@runs.script
def main(argv):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, choices=[d for d in PER_DATASET if d != "folder"])
    add("--category", default="0", help="name or place; of the small data sets several, or all")
    add("--data-root", help="folder of the data set (default as in train.py)")
    add("--weights", help=f"teacher: a file or a name (default {TEACHER}; demo demo_teacher)")
    add("--memory", type=int, default=20000, metavar="M", help="patches a layer (default 20000)")
    add("--device", help="cpu, cuda, cuda:1, ... (default cuda where there is one)")
    add("--out", type=Path, help="folder for the result (default results/<teacher>)")
    args = parser.parse_args(argv)
    runs.check_whole("memory", args.memory, 1)
    args.data_root = args.data_root or PER_DATASET[args.dataset].get("data_root")
    names = [args.category]
    if args.dataset in SMALL:  # whose categories share their test images
        names = CATEGORIES[args.dataset] if args.category == "all" else args.category.split(",")
    categories = [find_category(args.dataset, name) for name in names]
    weights = args.weights or PER_DATASET[args.dataset].get("weights", TEACHER)
    device = runs.pick_device(args.device)
    runs.set_tf32("fp32")
    teacher = runs.load_teacher(ensure_weights(weights)).to(device)
    runs.check_teacher({"layers": LAYERS, "top_k": 1}, teacher)
    name = teacher.metadata.get("name", Path(weights).stem)
    made = {"teacher": name, "teacher_sha256": teacher.sha256, **runs.provenance(device)}
    folder = (args.out or Path(__file__).parent / slug(name)) / args.dataset
    report.refuse_another_teacher(folder, made)
    with runs.new_folder(folder / "nearest"):  # one that cannot be is found out before the work
        for result in results_of(categories, args, teacher):
            path = folder / f"nearest/{slug(result['category'])}.json"
            runs.write_text(path, json.dumps({**result, **made}, indent=2) + "\n")
            print(f"{result['category']}: {result['auroc']:.2f}; {path}")
    report.report(folder.parent, [])  # the tables with this column


if __name__ == "__main__":
    sys.exit(main())
