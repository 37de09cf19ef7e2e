#!/usr/bin/env python3
"""How fast vitad is, as ratios against named peers: one machine, no data or weights needed.

    python tests/benchmark.py                    # 8 minutes on 2 CPU cores, 8 GB of memory
    python tests/benchmark.py --device cuda      # the GPU table
    python tests/benchmark.py --parts            # where the time of a step goes, 2 minutes

Networks are ViT-B/16, with --parts of DeiT-Tiny's size, at 224 x 224 with random weights. Each time
is the median of repeats that alternate between ours and the peer, after one run of each that does
not count. The plain baseline is the training step as one would first write it: the teacher computed
anew in every step, a loop over layers, float32, eager, optimiser as it comes. What counts as work:
35 GFLOP a forward and image, a backward two forwards.
"""

import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

import runs
from train import GraphedStep, Settings, TeacherCache, make_optimizers
from vit import ViT
from vitad import LAYERS, Distillation, anchor_loss, distill_loss, gram_loss, total_loss
from weights.convert import TORCHVISION, rename

LR = 0.01  # of SGD, in both training steps

# ------------------------------------------------------------------------------------------- timing


def synchronize(device):
    if "cuda" in device:
        torch.cuda.synchronize()


def alternate(device, repeats, functions, pick=statistics.median):
    """{name: function} -> {name: median seconds}, taken in turn; with pick=min the least."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: pick(values) for name, values in times.items()}


def matmul_rate(device, dtype, size):
    """The machine's own limit: FLOP/s of one large product of matrices, at its fastest."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    count = 20 if "cuda" in device else 2
    product = {"product": lambda: [a @ b for _ in range(count)]}
    return count * 2 * size**3 / alternate(device, 15, product, pick=min)["product"]


def forward_flop(vit, images):
    c = vit.config
    P, D = c["grid"] ** 2, c["width"]
    T = P + 1
    block = T * (4 * D * D + 2 * D * c["hidden"]) + 2 * T * T * D
    return 2 * images * (P * 3 * c["patch"] ** 2 * D + c["depth"] * block)


def random_vit(device):
    return ViT(mean=(0.5,) * 3, std=(0.5,) * 3).to(device).eval().requires_grad_(False)


def random_images(count, device):
    return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=device)


# ------------------------------------------------------------------------------- the training steps


class Plain:
    """The training step as one would first write it."""

    def __init__(self, teacher):
        self.teacher = teacher
        self.student = ViT(**teacher.config).to(teacher.pos_embed.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), LR, momentum=0.9)

    def step(self, images):
        x = self.teacher.prepare(images)
        with torch.no_grad():
            t = self.teacher(x, LAYERS)
        s = self.student(x, LAYERS)
        anchor = F.normalize(t[LAYERS[-1]][:, 0].mean(dim=0), dim=-1)
        cls = F.normalize(s[LAYERS[-1]][:, 0], dim=-1)
        loss = (cls - anchor).norm(dim=-1).mean()
        for c in LAYERS:
            difference = F.normalize(t[c], dim=-1) - F.normalize(s[c], dim=-1)
            loss = loss + difference.norm(dim=-1).mean()
            loss = loss + (1 - F.cosine_similarity(t[c], s[c], dim=-1)).mean()
        pairs = list(combinations(LAYERS, 2))
        for a, b in pairs:
            gram_t = F.normalize(t[a], dim=-1) @ F.normalize(t[b], dim=-1).transpose(1, 2)
            gram_s = F.normalize(s[a], dim=-1) @ F.normalize(s[b], dim=-1).transpose(1, 2)
            norm = (gram_t - gram_s).square().mean(dim=(1, 2)).sqrt()
            loss = loss + norm.mean() / len(pairs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """The training step of train.py, with the teacher's features of the batch already known."""

    def __init__(self, teacher, images, device, *, precision="fp32", graphed=False, compiled=False):
        on_gpu = "cuda" in device
        self.model = Distillation(teacher, precision=precision).to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, LR, momentum=0.9, fused=on_gpu)
        place = "device" if on_gpu else "host"
        self.cache = TeacherCache(self.model, len(images), device, folder=".", place=place)
        self.loss_terms = self.model.loss_terms
        if compiled:
            self.loss_terms = torch.compile(self.loss_terms, dynamic=False)
        self.model.update_anchor(self.look_up(images))
        self.graphs = defaultdict(lambda: self.take_step)  # by the batch's size
        if graphed:
            for B in (4, len(images)):
                self.graphs[B] = GraphedStep(self.take_step, [self.optimizer], B)

    def look_up(self, images):
        return self.cache(torch.arange(len(images)), images)

    def step(self, images):
        self.graphs[len(images)](images, self.look_up(images))

    def take_step(self, images, t):
        terms = self.loss_terms(images, t)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        self.optimizer.step()
        return {name: x.detach() for name, x in terms.items()}

    def outside(self, images):
        """A step without the networks: data, losses and their gradient, a loss read for the log."""
        t = self.look_up(images)
        self.model.teacher.prepare(images)
        s = {c: x.detach().requires_grad_() for c, x in t.items()}
        anchor = anchor_loss(s[LAYERS[-1]][:, 0], self.model.anchor.value)
        loss = total_loss(distill_loss(t, s), anchor, gram_loss(t, s))
        loss.backward()
        float(loss.detach())


def process_bytes(field):
    """A number of the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def memory_of_a_step(device):
    """Peak bytes of a training step of 4 images, for a process of its own.

    Beyond weights, gradients, momentum and the teacher's features.
    """
    on_gpu = "cuda" in device
    teacher, images = random_vit(device), random_images(4, device)
    before = torch.cuda.memory_allocated() if on_gpu else process_bytes("VmRSS")
    ours = Ours(teacher, images, device)
    ours.step(images)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    ours.step(images)
    peak = torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM")
    weights = sum(p.nbytes for p in ours.model.student.parameters())
    learnt = sum(p.nbytes for p in ours.parameters)  # as much for gradients, and for momentum
    return peak - before - weights - 2 * learnt - ours.cache.bytes


# ------------------------------------------------------------------------------------- measurements


def row(what, value, bound=""):
    print(f"| {what} | {value} | {bound} |", flush=True)


def ratio(seconds, ours, peer):
    return f"{seconds[ours]:.3f} s / {seconds[peer]:.3f} s = {seconds[ours] / seconds[peer]:.3f}"


def measure_forward(device, repeats):
    """Ours against torchvision.

    In a fresh process: torchvision makes larger temporaries (attention matrices), which the
    allocator then has to fetch from the system. Later, with memory at hand, the two are level.
    """
    peer = torchvision.models.vit_b_16().to(device).eval()
    ours = ViT(classes=1000)
    # The very same memory: where weights happen to lie moves a forward by several per cent from
    # one process to the next.
    ours.load_state_dict(rename(peer.state_dict(), TORCHVISION), assign=True)
    ours = ours.to(device).eval()
    x = ours.prepare(random_images(8, device))
    forwards = {"ours": lambda: ours.classify(x), "torchvision": lambda: peer(x)}
    with torch.inference_mode():
        torch.testing.assert_close(ours.classify(x), peer(x), rtol=1e-3, atol=1e-3)
        seconds = alternate(device, 5 * repeats, forwards)
    name = "forward, ours / torchvision, batch 8, float32"
    row(name, ratio(seconds, "ours", "torchvision"), "<= 1.00")


def measure_rates(device):
    """-> {dtype: FLOP/s}"""
    size = 8192 if "cuda" in device else 2048
    rate = {dtype: matmul_rate(device, dtype, size) for dtype in (torch.float32, torch.bfloat16)}
    shown = " / ".join(f"{r / 1e12:.2f} TFLOP/s" for r in rate.values())
    row(f"product of {size} x {size} matrices, float32 / bfloat16", shown)
    return rate


def measure_memory(device):
    command = [sys.executable, __file__, "--memory", "--device", device]
    process = subprocess.run(command, capture_output=True, text=True)
    shown = "unknown" if process.returncode else f"{int(process.stdout) / 1e9:.2f} GB"
    what = "beyond weights, gradients, momentum, teacher's features"
    row(f"peak memory of a training step, batch 4, {what}", shown, "<= 2.5 GB")


def measure_steps(steps, images, device, repeats, *, rate):
    """Training steps against the plain one; -> their seconds for the last of the batches."""
    flop_an_image = 3 * forward_flop(steps["plain"].teacher, 1)
    for batch in images:
        one = {name: partial(s.step, batch) for name, s in steps.items()}
        seconds = alternate(device, repeats, one)
        B = len(batch)
        for name in list(steps)[1:]:
            bounds = {"fp32": "<= 0.78", "bf16": "<= 0.50 on a CPU"}
            bound = bounds.get(name, "<= 0.25 at batch 4")
            what = f"training step, batch {B}, {name} / plain float32"
            row(what, ratio(seconds, name, "plain"), bound)
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            share = B * flop_an_image / seconds[name] / rate[dtype]
            bounds = {
                "fp32": ">= 65 % at batch 32 on a CPU",
                "bf16": "",
                "bf16 graph": "",
                "bf16 graph compiled": ">= 45 % at batch 32",
            }
            of = f"share of the {name[:4]} product's rate"
            row(
                f"the same, {flop_an_image / 1e9:.0f} GFLOP an image, {of}",
                f"{share:.0%}",
                bounds[name],
            )
    return seconds


def measure_scoring(steps, B, device, repeats, *, rate):
    batch = random_images(B, device)
    for name, key in (("float32", "fp32"), ("bfloat16", "bf16")):
        model = steps[key].model
        scoring = {"scores": partial(model.scores, batch)}
        seconds = alternate(device, repeats, scoring)["scores"]
        share = 2 * forward_flop(model.teacher, B) / seconds / rate[getattr(torch, name)]
        shown = f"{B / seconds:.1f} images/s, {share:.0%} of the product's rate"
        bound = ">= 55 % on a GPU" if name == "bfloat16" else ""
        row(f"scoring, batch {B}, {name}", shown, bound)


def parts_of_a_step(teacher, B, device, precision):
    """{name: function}, each a part of a training step of B images with train.py's optimisers."""
    images = random_images(B, device)
    ours = Ours(teacher, images, device, precision=precision)
    model = ours.model
    make = partial(
        make_optimizers, parameters=ours.parameters, peak=1e-3, peak_rest=1e-3, device=device
    )
    muon, rest = make(Settings(precision=precision))
    [adamw] = make(Settings(optimizer="adamw"))
    ours.step(images)  # from here on there are gradients
    gradients = [torch.rand_like(x) for x in model.features(model.student, images).values()]

    def forward():
        return list(model.features(model.student, images).values())

    parts = {
        "student, forward": forward,
        "student, forward and backward": lambda: torch.autograd.backward(forward(), gradients),
        "data, losses and their gradient": partial(ours.outside, images),
        "Muon, the blocks' matrices": muon.step,
        "AdamW, the rest": rest.step,
        "AdamW instead, for all": adamw.step,
    }
    if precision == "bf16":  # torch's is in bf16 always
        matrices = muon.param_groups[0]["params"]
        peer = torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="match_rms_adamw")
        parts["torch.optim.Muon instead of Muon"] = peer.step
    return parts


def measure_parts(device, repeats, precision):
    """Where a step's time goes, at DeiT-Tiny's size."""
    teacher = ViT(width=192, heads=3, hidden=768).to(device).eval()
    if precision is None:  # as train.py's auto
        precision = "bf16" if runs.multiplies_bf16(device) else "fp32"
    print(f"| part of a step, DeiT-Tiny's size, {precision} | batch 4 | batch 32 |\n|---|---|---|")
    parts = [parts_of_a_step(teacher, B, device, precision) for B in (4, 32)]
    seconds = [alternate(device, 3 * repeats, functions) for functions in parts]
    for name in seconds[0]:
        row(name, *(f"{1000 * column[name]:.1f} ms" for column in seconds))


# ------------------------------------------------------------------------------------- command line


def make_parser():
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    add("--repeats", type=int, default=3, help="of the steps; of forwards 5 times that (default 3)")
    add("--batch", type=int, default=32, help="the larger batch (default 32)")
    add("--memory", action="store_true", help="only print the peak memory of a step, in bytes")
    add("--parts", action="store_true", help="only print the parts of a step, at DeiT-Tiny's size")
    add("--precision", choices=["fp32", "bf16"], help="with --parts (default as train.py's auto)")
    return parser


@runs.script
def main(argv):
    args = make_parser().parse_args(argv)
    for name, least in (("repeats", 1), ("batch", 4)):
        runs.check_whole(name, getattr(args, name), least)
    device = runs.pick_device(args.device)
    if "cuda" in device:
        torch.cuda.set_device(torch.device(device).index or 0)  # whose time and memory are asked
    runs.set_tf32("fp32")
    if args.memory:
        print(memory_of_a_step(device))
        return
    torch.manual_seed(0)
    if args.parts:
        measure_parts(device, args.repeats, args.precision)
        return
    on_gpu = "cuda" in device
    repeats = args.repeats * (10 if on_gpu else 1)
    name = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    if on_gpu:
        name = torch.cuda.get_device_name(device)
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"{name}, {versions}; ViT-B/16, batch sizes 4 and {args.batch}\n")
    print("| what | measured | bound |\n|---|---|---|")

    measure_forward(device, repeats)
    rate = measure_rates(device)
    measure_memory(device)

    # Training steps.
    teacher = random_vit(device)
    images = [random_images(B, device) for B in (4, args.batch)]
    steps = {"plain": Plain(teacher)}
    for precision in ("fp32", "bf16"):
        steps[precision] = Ours(teacher, images[-1], device, precision=precision)
    if on_gpu:
        options = {"precision": "bf16", "graphed": True}
        steps["bf16 graph"] = Ours(teacher, images[-1], device, **options)
        compiled = Ours(teacher, images[-1], device, **options, compiled=True)
        steps["bf16 graph compiled"] = compiled
    seconds = measure_steps(steps, images, device, repeats, rate=rate)
    outside = {"outside": partial(steps["fp32"].outside, images[-1])}
    share = alternate(device, 3 * args.repeats, outside)["outside"] / seconds["fp32"]
    what = f"outside the networks (data, losses, log) in a step, batch {args.batch}, float32"
    row(what, f"{share:.1%}", "<= 8 %")

    measure_scoring(steps, 256 if on_gpu else args.batch, device, repeats, rate=rate)


if __name__ == "__main__":
    sys.exit(main())
