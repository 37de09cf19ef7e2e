"""The Vision Transformer: the network of teacher and student, and how its weights are loaded.

An image is cut into P patches. A linear projection turns each patch into a token of width D. A
class token is put in front, a position embedding is added, and M encoder blocks follow (Dosovitskiy
et al. 2021, "An Image is Worth 16x16 Words"). Parameters carry timm's names, so that public
checkpoints load strictly. `weights/convert.py` turns other layouts into this one.

Shapes: B images, 1 + P tokens (class token first), D width, H heads, S pixels a side.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# As in Google's, timm's and torchvision's ViTs. torch's default, 1e-5, moves DeiT-Tiny's
# features by 2e-4 of their size.
LAYER_NORM_EPS = 1e-6


def quick_gelu(x):
    """The GELU of OpenAI's CLIP: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}  # F.gelu is the exact one, x * Phi(x)


class PatchEmbed(nn.Module):
    """Cut into patches and project each one: a convolution whose stride is its kernel size.

    It stays out of autocast, in float32; on CUDA in TF32, where `runs.set_tf32` allows it. In bf16
    its rounding alone moves the features of block 11 by 3 to 12 % of their size (DINOv2, CLIP), all
    other products together by 2 %.
    """

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            x = self.proj(images)  # (B, 3, S, S) -> (B, D, grid, grid)
        return x.flatten(2).transpose(1, 2)  # (B, P, D)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(D / H)) v.

    One projection gives q, k and v, in this order. Under autocast they are bfloat16. On a CPU they
    go back to float32 first, since torch's attention is slower there in bfloat16.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, tokens, D = x.shape
        qkv = self.qkv(x).reshape(B, tokens, 3, self.heads, D // self.heads)
        if x.device.type == "cpu":
            qkv = qkv.to(x.dtype)  # float32
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, 1 + P, D/H)
        with torch.autocast(x.device.type, enabled=False):  # q, k and v keep their type
            x = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1 + P, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, tokens, D))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, on each token alone."""

    def __init__(self, width, hidden, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """One encoder block, pre-norm. Its output is phi_c of the paper."""

    def __init__(self, width, heads, hidden, activation, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, activation)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A Vision Transformer. The defaults are ViT-Base/16 at 224 x 224 without classifier.

    width D, depth M, heads H, patch (pixels a side), grid (patches a side, P = grid^2).
    hidden: width of the MLPs. classes: outputs of the linear head, 0 for none.
    norm_pre: a LayerNorm after the position embedding (CLIP has one). eps: of every LayerNorm.
    mean, std: how images were normalised for these weights, on a scale from 0 to 1.
    """

    def __init__(
        self,
        width=768,
        depth=12,
        heads=12,
        patch=16,
        grid=14,
        hidden=3072,
        classes=0,
        norm_pre=False,
        activation="gelu",
        eps=LAYER_NORM_EPS,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    ):
        super().__init__()
        # ViT(**teacher.config) is a student: the same architecture, without the head.
        self.config = {
            "width": width,
            "depth": depth,
            "heads": heads,
            "patch": patch,
            "grid": grid,
            "hidden": hidden,
            "norm_pre": norm_pre,
            "activation": activation,
            "eps": eps,
            "mean": mean,
            "std": std,
        }
        self.image_size = patch * grid
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.norm_pre = nn.LayerNorm(width, eps) if norm_pre else nn.Identity()
        blocks = [Block(width, heads, hidden, activation, eps=eps) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, classes) if classes else None
        # Their device is explicit, so that they are real where load_vit builds the rest on "meta".
        for name, values in (("mean", mean), ("std", std)):
            values = torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.initialise()

    def initialise(self):
        """Normal with deviation 0.02 and zero bias, the usual initialisation of a ViT.

        It is torch's and timm's truncated normal, whose bounds, -2 and 2, cut nothing here.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def prepare(self, images):
        """uint8 images (B, 3, h, w) -> the network's input (B, 3, S, S).

        Resized to S x S (bicubic), scaled to 0..1, normalised with mean and std.
        """
        if images.dtype != torch.uint8:
            raise ValueError(f"expected images as uint8, 0 to 255, got {images.dtype}")
        size = (self.image_size, self.image_size)
        images = images.to(self.mean.dtype)
        if images.shape[-2:] != size:
            # antialias=True is Pillow's bicubic kernel, with which data.read_image resizes too.
            images = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - self.mean) / self.std

    def forward(self, images, layers):
        """Prepared images (B, 3, S, S) -> {c: output of block c, (B, 1 + P, D), for c in layers}.

        Blocks count from 0. Outputs are taken before the final LayerNorm. Blocks after the last
        one asked for are not computed.
        """
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            size = self.image_size
            raise ValueError(
                f"expected images of shape (B, 3, {size}, {size}), got {tuple(images.shape)}"
            )
        if not layers or not set(layers) <= set(range(len(self.blocks))):
            last = len(self.blocks) - 1
            raise ValueError(f"expected layers between 0 and {last}, got {tuple(layers)}")
        x = self.patch_embed(images)  # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P, D)
        x = self.norm_pre(x + self.pos_embed)
        features = {}
        for c, block in enumerate(self.blocks[: max(layers) + 1]):
            x = block(x)
            if c in layers:
                features[c] = x
        return features

    def classify(self, images):
        """Prepared images (B, 3, S, S) -> logits (B, classes), from the last class token.

        The method never classifies; tests compare logits with torchvision's.
        """
        if self.head is None:
            raise ValueError("this ViT has no classifier head: its checkpoint came without one")
        last = len(self.blocks) - 1
        x = self.forward(images, (last,))[last]  # (B, 1 + P, D)
        cls = self.norm(x)[:, 0]
        return self.head(cls)


# ---------------------------------------------------------------------------------------- loading
# The network ends here. The rest checks a file that may be anything.


def sha256(path):
    """The SHA-256 of a file, in hexadecimal: the name by which weights are known."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_vit(path):
    """A converted checkpoint (weights/convert.py) -> the ViT, in evaluation mode.

    Strict: missing, extra, misshapen or infinite tensors are refused. The file's metadata, one JSON
    object under the key "vitad", is kept as `vit.metadata`, the file's sha256 as `vit.sha256`. A
    file that does not fit is a ValueError whose text is one sentence for the user.
    """
    path = Path(path)
    tensors, metadata = read_weights(path)
    check_layout(path, tensors, metadata)
    check_metadata(path, metadata)
    config = config_of(path, tensors, metadata)
    with torch.device("meta"):  # shapes only: the values come from the file
        vit = ViT(**config)
    check_shapes(path, tensors, vit.state_dict())
    values = {key: tensor.float() for key, tensor in tensors.items()}
    broken = not_finite(values)
    if broken:
        raise unfit(path, "finite weights", broken, "convert or download it again")
    vit.load_state_dict(values, strict=True, assign=True)
    vit.metadata = metadata
    vit.sha256 = sha256(path)
    return vit.eval()


def read_weights(path):
    """A safetensors file -> ({name: tensor}, metadata)."""
    if not path.is_file():
        advice = "weights/README.md says where to get one"
        raise unfit(path, "a weights file", "no such file", advice)
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("vitad", "{}")
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        got, advice = "another kind of file", f"try python weights/convert.py {path}"
        if "incomplete" in str(error).lower() or "EOF" in str(error):
            got, advice = "a truncated one", "copy or download it again"
        raise unfit(path, "a safetensors file", got, f"{advice} ({error})") from None
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise unfit(path, "metadata as a JSON object", repr(text[:20]))
    return tensors, metadata


def unfit(path, expected, got, advice="convert the original again"):
    """The error of a file that does not fit, as one sentence for the user."""
    return ValueError(f"{path}: expected {expected}, got {got}: {advice}")


def not_finite(tensors):
    """The first value among tensors that is not finite, "nan in <name>"; None if all are."""
    for name, x in tensors.items():
        finite = x.isfinite()
        if not finite.all():
            return f"{x[~finite][0].item()} in {name}"
    return None


def check_layout(path, tensors, metadata):
    """Refuse a file that weights/convert.py did not write."""
    convert = f"run python weights/convert.py {path}"
    dimensions = {
        "cls_token": 3,
        "pos_embed": 3,
        "patch_embed.proj.weight": 4,
        "blocks.0.mlp.fc1.weight": 2,
    }
    if not set(dimensions) <= set(tensors):
        first = min(tensors, default="no tensor")
        raise unfit(path, "vitad's key names", f"another layout ({first}, ...)", convert)
    known = {"mean", "std", "activation"} <= set(metadata)
    if not known or metadata["activation"] not in list(ACTIVATIONS):
        expected = "mean, std and activation in the metadata"
        raise unfit(path, expected, "a file that was not converted", convert)
    for key, ndim in {**dimensions, "head.weight": 2}.items():
        if key in tensors and tensors[key].ndim != ndim:
            raise unfit(path, f"{key} with {ndim} dimensions", tuple(tensors[key].shape))


def check_metadata(path, metadata):
    """Refuse numbers that cannot be those of a network."""

    def is_number(x):
        return isinstance(x, (int, float)) and -math.inf < x < math.inf

    def are_three(values):
        return isinstance(values, list) and len(values) == 3 and all(map(is_number, values))

    mean, std = metadata["mean"], metadata["std"]
    heads, eps = metadata.get("heads", 1), metadata.get("eps", LAYER_NORM_EPS)
    rules = (
        ("mean as three numbers", mean, are_three(mean)),
        ("std as three numbers above 0", std, are_three(std) and min(std) > 0),
        ("heads as a number from 1", heads, isinstance(heads, int) and heads > 0),
        ("eps as a number above 0", eps, is_number(eps) and eps > 0),
    )
    for expected, got, holds in rules:
        if not holds:
            raise unfit(path, expected, repr(got))


def config_of(path, tensors, metadata):
    """The arguments of ViT: sizes from the tensors' shapes, the rest from the metadata.

    Where that does not name the heads, they are 64 wide.
    """
    width = tensors["cls_token"].shape[-1]
    heads = metadata.get("heads", max(width // 64, 1))
    if width % heads:
        advice = "convert the original again with --heads"
        raise unfit(path, f"a width that {heads} heads divide", width, advice)
    return {
        "width": width,
        "depth": len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        "heads": heads,
        "patch": tensors["patch_embed.proj.weight"].shape[-1],
        "grid": math.isqrt(max(tensors["pos_embed"].shape[1] - 1, 0)),
        "hidden": len(tensors["blocks.0.mlp.fc1.weight"]),
        "classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "norm_pre": "norm_pre.weight" in tensors,
        "activation": metadata["activation"],
        "eps": metadata.get("eps", LAYER_NORM_EPS),
        "mean": tuple(metadata["mean"]),
        "std": tuple(metadata["std"]),
    }


def check_shapes(path, tensors, expected):
    """Refuse tensors that are missing, of another shape or kind, or not the network's."""
    for key, parameter in expected.items():
        shape = tuple(parameter.shape)
        if key not in tensors:
            raise unfit(path, f"a tensor {key} of shape {shape}", "none")
        if tensors[key].shape != parameter.shape:
            raise unfit(path, f"{key} of shape {shape}", tuple(tensors[key].shape))
        if not tensors[key].is_floating_point():
            raise unfit(path, f"{key} as floating-point numbers", tensors[key].dtype)
    extra = sorted(set(tensors) - set(expected))
    if extra:
        advice = f"run python weights/convert.py {path}"
        raise unfit(path, "no tensors beyond the model's", ", ".join(extra[:5]), advice)
