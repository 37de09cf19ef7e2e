"""The Vision Transformer, from scratch: the teacher and the student of vitad.

An image is cut into P patches; each becomes a token of width D by one linear projection, a class token is put in front,
a position embedding is added, and M encoder blocks follow (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").
Parameters carry timm's names, so a public checkpoint loads strictly and without a table of models; `weights/convert.py` turns
the other public layouts into this one.

Shapes: B images, T = 1 + P tokens (class token first), D width, H heads.
"""
import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER_NORM_EPS = 1e-6  # of every ImageNet ViT; torch's default 1e-5 moves DeiT-Tiny's features by 2e-4 of their size


def quick_gelu(x):
    """The GELU of OpenAI's CLIP: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}  # F.gelu is the exact one, x * Phi(x)


class PatchEmbed(nn.Module):
    """Cut into patches and project each: a convolution whose stride is its kernel size. In float32 under autocast too.

    Learnt filters all but cancel a patch's mean colour, and bf16 would round before they do: at block 11 that alone moves CLIP's features by
    12 % of their size, DINOv2's by 3 %, DeiT-Tiny's by 7 %; all other products together by 2, 2 and 3 %. It is 0.7 % of ViT-B/16's products.
    """

    def __init__(self, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            return self.proj(images).flatten(2).transpose(1, 2)  # (B, 3, S, S) -> (B, D, g, g) -> (B, P, D)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(D / H)) v; q, k and v come from one joined projection, in this order."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # 3 x (B, H, T, D/H)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


class Mlp(nn.Module):
    """Two linear layers with an activation between, on every token alone."""

    def __init__(self, width, hidden, activation):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation = ACTIVATIONS[activation]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """One encoder block, pre-norm: x + attention(norm(x)), then x + mlp(norm(x)). Its output is phi_c of the paper."""

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
    """A Vision Transformer; the defaults are ViT-Base/16 at 224 x 224 without classifier.

    width D, depth M, heads H, patch size in pixels, grid = patches per side (P = grid^2), hidden = MLP width,
    classes > 0 adds the linear head, norm_pre adds a LayerNorm after the position embedding (CLIP), eps is every LayerNorm's.
    mean, std: the normalisation that the weights were trained with, on a 0 to 1 scale.
    """

    def __init__(self, width=768, depth=12, heads=12, patch=16, grid=14, hidden=3072, classes=0, norm_pre=False,
                 activation="gelu", eps=LAYER_NORM_EPS, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        # What makes a network of the same architecture: ViT(**teacher.config) is a student.
        self.config = dict(width=width, depth=depth, heads=heads, patch=patch, grid=grid, hidden=hidden,
                           norm_pre=norm_pre, activation=activation, eps=eps, mean=mean, std=std)
        self.image_size = patch * grid
        self.patch_embed = PatchEmbed(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.norm_pre = nn.LayerNorm(width, eps) if norm_pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, hidden, activation, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, classes) if classes else None
        # Buffers outside the state dict; their explicit device keeps them real when load_vit builds the rest on "meta".
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32, device="cpu").view(3, 1, 1), persistent=False)
        self.initialise()

    def initialise(self):
        """Truncated normal with deviation 0.02, zero bias: the usual ViT initialisation. LayerNorms stay at 1 and 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def prepare(self, images):
        """uint8 images (B, 3, s, s) of any size -> what the weights expect, (B, 3, S, S): enlarged (bicubic), (x / 255 - mean) / std."""
        images = images.to(self.mean.dtype)
        if images.shape[-1] != self.image_size:
            # antialias=True is Pillow's bicubic kernel, the one that `data.read_image` resizes with
            images = F.interpolate(images, (self.image_size, self.image_size), mode="bicubic", antialias=True).clamp(0, 255)
        return (images / 255 - self.mean) / self.std

    def forward(self, images, layers):
        """Normalised images (B, 3, S, S) -> {c: output of block c (B, 1 + P, D) for c in layers}.

        Blocks count from 0; their outputs are taken before the final LayerNorm; no block past the last one asked for is computed.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"expected images of shape (B, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        if not layers or not set(layers) <= set(range(len(self.blocks))):
            raise ValueError(f"expected layers between 0 and {len(self.blocks) - 1}, got {tuple(layers)}")
        x = self.patch_embed(images)  # (B, P, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P, D)
        x = self.norm_pre(x + self.pos_embed)
        features = {}
        for c, block in enumerate(self.blocks[:max(layers) + 1]):
            x = block(x)
            if c in layers:
                features[c] = x
        return features

    def classify(self, images):
        """Normalised images (B, 3, S, S) -> logits (B, classes): the head on the normed class token of the last block."""
        if self.head is None:
            raise ValueError("this ViT has no classifier head: its checkpoint came without one")
        last = len(self.blocks) - 1
        return self.head(self.norm(self.forward(images, (last,))[last])[:, 0])


def sha256(path):
    """The SHA-256 of a file, in hexadecimal: the name by which weights are known."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_vit(path):
    """Load a converted checkpoint (weights/convert.py), strictly: every tensor named, shaped and used.

    The sizes come from the tensors' shapes, heads from the metadata or else D / 64, norm_pre from the keys. The metadata (one JSON
    object under the key "vitad") gives mean, std, activation and eps, with source, licence and sha256 of the original beside them; it is
    left as `vit.metadata`, the file's own sha256 as `vit.sha256`. Anything that does not fit is one ValueError.
    """
    path = Path(path)
    convert = f"python weights/convert.py {path}"
    if not path.is_file():
        raise ValueError(f"{path}: expected a weights file, got no such file; weights/README.md says where to get one")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("vitad", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        cut = "incomplete" in str(error).lower() or "EOF" in str(error)
        got = "a truncated one: copy or download it again" if cut else f"another kind of file: try {convert}"
        raise ValueError(f"{path}: expected a safetensors file, got {got} ({error})") from None
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= set(tensors):
        raise ValueError(f"{path}: expected vitad's key names, got another layout ({min(tensors, default='no tensor')}, ...): run {convert}")
    if not {"mean", "std", "activation"} <= set(metadata) or metadata["activation"] not in ACTIVATIONS:
        raise ValueError(f"{path}: expected mean, std and activation in the metadata, got a file that was not converted: run {convert}")
    for key, ndim in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4), ("blocks.0.mlp.fc1.weight", 2)):
        if tensors[key].ndim != ndim:
            raise ValueError(f"{path}: expected {key} with {ndim} dimensions, got {tuple(tensors[key].shape)}: convert the original again")

    width, tokens = tensors["cls_token"].shape[-1], tensors["pos_embed"].shape[1]
    heads = metadata.get("heads", max(width // 64, 1))
    if width % heads:
        raise ValueError(f"{path}: expected a width that {heads} heads divide, got {width}: convert the original again with --heads")
    config = dict(
        width=width,
        depth=len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        heads=heads,
        patch=tensors["patch_embed.proj.weight"].shape[-1],
        grid=math.isqrt(tokens - 1),
        hidden=len(tensors["blocks.0.mlp.fc1.weight"]),
        classes=len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        norm_pre="norm_pre.weight" in tensors,
        activation=metadata["activation"],
        eps=metadata.get("eps", LAYER_NORM_EPS),
        mean=tuple(metadata["mean"]), std=tuple(metadata["std"]),
    )
    with torch.device("meta"):  # shapes only: the values come from the file
        vit = ViT(**config)
    for key, parameter in vit.state_dict().items():
        if key not in tensors:
            raise ValueError(f"{path}: expected a tensor {key} of shape {tuple(parameter.shape)}, got none: convert the original again")
        if tensors[key].shape != parameter.shape:
            raise ValueError(f"{path}: expected {key} of shape {tuple(parameter.shape)}, got {tuple(tensors[key].shape)}: convert the original again")
    extra = sorted(set(tensors) - set(vit.state_dict()))
    if extra:
        raise ValueError(f"{path}: expected no tensors beyond the model's, got {', '.join(extra[:5])}: run {convert}")
    vit.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, strict=True, assign=True)
    vit.metadata, vit.sha256 = metadata, sha256(path)
    return vit.eval()


def pick_device(name, precision="fp32"):
    """--device as torch names it; None: cuda where there is one, else cpu. Products in float32 are exact, unless `precision` is tf32, or bf16 and
    the product is the patch projection, a convolution: TF32 rounds an eighth as far as bf16."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch: an unknown name, or a device that this machine or build lacks
        raise ValueError(f"--device: expected a device that torch can use here, got {name!r} ({str(error).splitlines()[0]})") from None
    return name
