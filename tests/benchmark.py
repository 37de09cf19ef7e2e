#!/usr/bin/env python3
"""How fast vitad is, as ratios against named peers, in one process on one machine; no data or weights needed.

    python tests/benchmark.py                    # 8 minutes on 2 CPU cores, 8 GB of memory
    python tests/benchmark.py --device cuda      # the GPU table

All networks are ViT-B/16 at 224 x 224 with random weights. Each time is the median of repeats that alternate between ours and the peer, after
one run of each that does not count. The plain baseline is the training step as one would first write it: the teacher computed anew in every
step, a loop over layers, float32, eager, optimiser as it comes. What counts as work: 35 GFLOP a forward and image, a backward two forwards.
"""
import argparse
import platform
import statistics
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "weights")]
from convert import canonical  # noqa: E402
from vit import ViT  # noqa: E402
from vitad import LAYERS, Distillation, TeacherCache, anchor_loss, distill_loss, gram_loss, pick_device, total_loss  # noqa: E402


def synchronize(device):
    if "cuda" in device:
        torch.cuda.synchronize()


def alternate(device, repeats, pick=statistics.median, **functions):
    """Median seconds of each function, taken in turn; with pick=min the least."""
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
    seconds = alternate(device, 15, min, product=lambda: [a @ b for _ in range(count)])["product"]
    return count * 2 * size ** 3 / seconds


def forward_flop(vit, images):
    c = vit.config
    P, D = c["grid"] ** 2, c["width"]
    T = P + 1
    block = T * (4 * D * D + 2 * D * c["hidden"]) + 2 * T * T * D
    return 2 * images * (P * 3 * c["patch"] ** 2 * D + c["depth"] * block)


class Plain:
    """The training step as one would first write it."""

    def __init__(self, teacher, lr):
        self.teacher, self.student = teacher, ViT(**teacher.config).to(teacher.pos_embed.device)
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr, momentum=0.9)

    def step(self, images):
        x = self.teacher.prepare(images)
        with torch.no_grad():
            t = self.teacher(x, LAYERS)
        s = self.student(x, LAYERS)
        anchor = t[LAYERS[-1]][:, 0].mean(dim=0)
        loss = (F.normalize(s[LAYERS[-1]][:, 0], dim=-1) - F.normalize(anchor, dim=-1)).norm(dim=-1).mean()
        for c in LAYERS:
            loss = loss + (F.normalize(t[c], dim=-1) - F.normalize(s[c], dim=-1)).norm(dim=-1).mean()
            loss = loss + (1 - F.cosine_similarity(t[c], s[c], dim=-1)).mean()
        pairs = list(combinations(LAYERS, 2))
        for a, b in pairs:
            gram_t = F.normalize(t[a], dim=-1) @ F.normalize(t[b], dim=-1).transpose(1, 2)
            gram_s = F.normalize(s[a], dim=-1) @ F.normalize(s[b], dim=-1).transpose(1, 2)
            loss = loss + (gram_t - gram_s).square().mean(dim=(1, 2)).sqrt().mean() / len(pairs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


class Ours:
    """The training step of train.py, with the teacher's features of the batch already known."""

    def __init__(self, teacher, images, device, lr, precision="fp32", compiled=False):
        self.model = Distillation(teacher, precision=precision).to(device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr, momentum=0.9, fused="cuda" in device)
        self.cache = TeacherCache(self.model, len(images), device, ".", "device" if "cuda" in device else "host")
        self.loss_terms = self.model.loss_terms
        if compiled:
            self.loss_terms = torch.compile(self.loss_terms, mode="reduce-overhead", dynamic=False)
        self.model.update_anchor(self.look_up(images))

    def look_up(self, images):
        return self.cache(torch.arange(len(images)), images)

    def step(self, images):
        terms = self.loss_terms(images, self.look_up(images))
        self.optimizer.zero_grad()
        terms["loss"].backward()
        self.optimizer.step()

    def outside(self, images):
        """All of a step but the networks: data, teacher's features, losses and their gradient, as train.py's log reads them."""
        t = self.look_up(images)
        self.model.teacher.prepare(images)
        s = {c: x.detach().requires_grad_() for c, x in t.items()}
        last = LAYERS[-1]
        loss = total_loss(distill_loss(t, s), anchor_loss(s[last][:, 0], self.model.anchor.value), gram_loss(t, s))
        loss.backward()
        float(loss.detach())


def memory_of_a_step(device):
    """Peak bytes of a training step of 4 images beyond weights, gradients, momentum and the teacher's features; for a process of its own."""
    def status(field):  # bytes, from the kernel's account of this process
        return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)))

    teacher, images = random_vit(device), random_images(4, device)
    before = torch.cuda.memory_allocated() if "cuda" in device else status("VmRSS")
    ours = Ours(teacher, images, device, 0.01)
    ours.step(images)
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    ours.step(images)
    peak = torch.cuda.max_memory_allocated() if "cuda" in device else status("VmHWM")
    weights = sum(p.nbytes for p in ours.model.student.parameters())
    learnt = sum(p.nbytes for p in ours.parameters)  # as many bytes again for the gradients, and for the momentum
    return peak - before - weights - 2 * learnt - ours.cache.bytes


def random_vit(device):
    return ViT(mean=(0.5,) * 3, std=(0.5,) * 3).to(device).eval().requires_grad_(False)


def random_images(count, device):
    return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, device=device)


def row(what, value, bound):
    print(f"| {what} | {value} | {bound} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of the training steps; of the forwards five times as many (default 3)")
    parser.add_argument("--batch", type=int, default=32, help="the larger batch (default 32)")
    parser.add_argument("--memory", action="store_true", help="print the peak memory of a training step in bytes, and nothing else")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.memory:
        return print(memory_of_a_step(device))
    on_gpu, repeats = "cuda" in device, args.repeats * (10 if "cuda" in device else 1)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, torchvision {torchvision.__version__}; ViT-B/16, batch sizes 4 and {args.batch}\n")
    print("| what | measured | bound |\n|---|---|---|")

    # First, in a fresh process: torchvision makes larger temporaries (attention matrices), which the allocator then has to fetch from the system;
    # later in this process, with memory at hand, the two are level.
    peers = {"torchvision": torchvision.models.vit_b_16().to(device).eval()}
    ours = ViT(classes=1000)
    # The very same memory: where weights happen to lie moves a forward by several per cent from one process to the next.
    ours.load_state_dict(canonical(peers["torchvision"].state_dict())[0], assign=True)
    ours = ours.to(device).eval()
    try:
        import timm  # a peer only for who has it already: nothing needs it, no number of the README is against it, and pytest does not collect this file
        peers["timm"] = timm.create_model("vit_base_patch16_224").to(device).eval()
    except ImportError:
        pass
    x = ours.prepare(random_images(8, device))
    with torch.inference_mode():
        torch.testing.assert_close(ours.classify(x), peers["torchvision"](x), rtol=1e-3, atol=1e-3)
        seconds = alternate(device, 5 * repeats, ours=lambda: ours.classify(x), **{name: lambda peer=peer: peer(x) for name, peer in peers.items()})
    for peer in peers:
        row(f"forward, ours / {peer}, batch 8, float32", f"{seconds['ours']:.3f} s / {seconds[peer]:.3f} s = {seconds['ours'] / seconds[peer]:.3f}",
            "<= 1.00" if peer == "torchvision" else "")
    del peers, ours

    size = 8192 if on_gpu else 2048
    rate = {dtype: matmul_rate(device, dtype, size) for dtype in (torch.float32, torch.bfloat16)}
    row(f"product of {size} x {size} matrices, float32 / bfloat16", " / ".join(f"{r / 1e12:.2f} TFLOP/s" for r in rate.values()), "")

    memory = subprocess.run([sys.executable, __file__, "--memory", "--device", device], capture_output=True, text=True)
    row("peak memory of a training step, batch 4, beyond weights, gradients, momentum, teacher's features",
        "unknown" if memory.returncode else f"{int(memory.stdout) / 1e9:.2f} GB", "<= 2.5 GB")

    teacher = random_vit(device)
    images = {B: random_images(B, device) for B in (4, args.batch)}
    plain = Plain(teacher, 0.01)
    fp32, bf16 = (Ours(teacher, images[args.batch], device, 0.01, precision) for precision in ("fp32", "bf16"))
    steps = {"plain": plain, "fp32": fp32, "bf16": bf16}
    if on_gpu:
        steps["bf16 compiled"] = Ours(teacher, images[args.batch], device, 0.01, "bf16", compiled=True)
    for B in (4, args.batch):
        seconds = alternate(device, repeats, **{name: lambda one=one: one.step(images[B]) for name, one in steps.items()})
        flop = 3 * forward_flop(teacher, B)
        for name in list(steps)[1:]:
            bound = {"fp32": "<= 0.78", "bf16": "<= 0.50 on a CPU"}.get(name, "<= 0.25 at batch 4")
            row(f"training step, batch {B}, {name} / plain float32",
                f"{seconds[name]:.3f} s / {seconds['plain']:.3f} s = {seconds[name] / seconds['plain']:.3f}", bound)
            dtype = torch.float32 if name == "fp32" else torch.bfloat16
            row(f"the same, {flop / B / 1e9:.0f} GFLOP an image, share of the {name[:4]} product's rate", f"{flop / seconds[name] / rate[dtype]:.0%}",
                {"fp32": ">= 65 % at batch 32 on a CPU", "bf16": "", "bf16 compiled": ">= 45 % at batch 32"}[name])
    outside = alternate(device, 3 * args.repeats, outside=lambda: fp32.outside(images[args.batch]))["outside"]
    row(f"outside the networks (data, losses, log) in a step, batch {args.batch}, float32", f"{outside / seconds['fp32']:.1%}", "<= 8 %")

    B = 256 if on_gpu else args.batch
    batch = random_images(B, device)
    for name, one in (("float32", fp32), ("bfloat16", bf16)):
        seconds = alternate(device, repeats, scores=lambda: one.model.scores(batch))["scores"]
        share = 2 * forward_flop(teacher, B) / seconds / rate[getattr(torch, name)]
        row(f"scoring, batch {B}, {name}", f"{B / seconds:.1f} images/s, {share:.0%} of the product's rate",
            ">= 55 % on a GPU" if name == "bfloat16" else "")


if __name__ == "__main__":
    main()
