#!/usr/bin/env python3
"""Turn a public ViT checkpoint into the one file format that vit.py loads.

    python weights/convert.py FILE
    python weights/convert.py FILE --mean .5 .5 .5 --std .5 .5 .5

The first is for a known checkpoint (KNOWN below). For any other, its card says how its images were
normalised.

FILE is .safetensors, .npz, or .pth / .pt / .bin, of which no code is run (weights_only=True).
Its layout is recognised by the keys: timm (also DeiT, DINO, MAE, DINOv2, and CLIP's image tower
under timm's names), Hugging Face transformers, torchvision, Google's .npz.

The result is weights/<stem of FILE>.safetensors. It has timm's names in float32. Its metadata hold
normalisation, activation, source, licence and sha256 of the original. ViT-B/16 takes a few seconds.
"""

import json
import math
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

if __name__ == "__main__":
    import _root  # noqa: F401 (puts the repository on the path)

from runs import WEIGHTS, Parser, UserError, atomic, check_whole, new_folder, script
from vit import ACTIVATIONS, IMAGENET_MEAN, IMAGENET_STD, LAYER_NORM_EPS, load_vit, sha256

IMAGE_SIZE = 224
CLIP_EPS = 1e-5  # LayerNorm's in CLIP's towers, torch's default
# ViT-L's width. Up to it the heads of public ViTs are 64 wide; ViT-H's are 80, some ViT-g's 88.
WIDEST = 1024

# ------------------------------------------------------------------------------ known checkpoints


@dataclass(frozen=True)
class Card:
    """What a checkpoint's card says and its tensors do not show."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    license: str
    activation: str = "gelu"


# The normalisation is never guessed: Google's files called ViT-B/16 want 0.5, others ImageNet's.
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}

GOOGLE = Card(**HALF, source="Google Research, vision_transformer", license="Apache-2.0")
AUGREG = Card(
    **HALF,
    source="Google Research, vision_transformer (AugReg), through timm",
    license="Apache-2.0",
)
TORCHVISION_V1 = Card(
    **IMAGENET, source="torchvision, ViT_B_16_Weights.IMAGENET1K_V1", license="BSD-3-Clause"
)
DEIT = Card(**IMAGENET, source="Meta, facebookresearch/deit", license="Apache-2.0")
DINO = Card(**IMAGENET, source="Meta, facebookresearch/dino", license="Apache-2.0")
DINOV2 = Card(**IMAGENET, source="Meta, facebookresearch/dinov2", license="Apache-2.0")
MAE = Card(**IMAGENET, source="Meta, facebookresearch/mae", license="CC-BY-NC-4.0")
OPENAI = Card(
    **CLIP,
    source="OpenAI, CLIP's image tower",
    license="code MIT; the weights' card states none",
    activation="quick_gelu",
)

# By the stem of the file's name.
KNOWN = {
    "vit_base_patch16_224": GOOGLE,
    "vit_base_patch16_224.orig_in21k_ft_in1k": GOOGLE,
    "ViT-B_16-224": GOOGLE,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": AUGREG,
    "vit_tiny_patch16_224.augreg_in21k": AUGREG,
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "vit_small_patch16_224.augreg_in21k": AUGREG,
    "vit_small_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "vit_base_patch16_224.augreg_in21k": AUGREG,
    "vit_base_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "vit_large_patch16_224.augreg_in21k": AUGREG,
    "vit_large_patch16_224.augreg_in21k_ft_in1k": AUGREG,
    "vit_b_16": TORCHVISION_V1,
    "vit_b_16-c867db91": TORCHVISION_V1,
    "deit_tiny_patch16_224": DEIT,
    "deit_tiny_patch16_224.fb_in1k": DEIT,
    "deit_tiny_patch16_224-a1311bcf": DEIT,
    "deit_small_patch16_224": DEIT,
    "deit_small_patch16_224.fb_in1k": DEIT,
    "deit_small_patch16_224-cd65a155": DEIT,
    "deit_base_patch16_224": DEIT,
    "deit_base_patch16_224.fb_in1k": DEIT,
    "deit_base_patch16_224-b5f2ef4d": DEIT,
    "dino_vitb16": DINO,
    "dino_vitbase16_pretrain": DINO,
    "vit_base_patch16_224.dino": DINO,
    "dino_deitsmall16_pretrain": DINO,
    "vit_small_patch16_224.dino": DINO,
    "mae_pretrain_vit_base": MAE,
    "vit_base_patch16_224.mae": MAE,
    "dinov2_vits14": DINOV2,
    "dinov2_vits14_pretrain": DINOV2,
    "dinov2_vits14_fp16": DINOV2,
    "vit_small_patch14_dinov2": DINOV2,
    "vit_small_patch14_dinov2.lvd142m": DINOV2,
    "dinov2_vitb14": DINOV2,
    "dinov2_vitb14_pretrain": DINOV2,
    "dinov2_vitb14_fp16": DINOV2,
    "vit_base_patch14_dinov2": DINOV2,
    "vit_base_patch14_dinov2.lvd142m": DINOV2,
    "dinov2_vitl14_pretrain": DINOV2,
    "dinov2_vitl14_fp16": DINOV2,
    "vit_large_patch14_dinov2": DINOV2,
    "vit_large_patch14_dinov2.lvd142m": DINOV2,
    "clip_vit_base_patch16_224": OPENAI,
    "vit_base_patch16_clip_quickgelu_224.openai": OPENAI,
}
# By the file's sha256, for those whose name says nothing (model.safetensors).
KNOWN_SHA256 = {
    "669b949ea91fd19217f200cee259780bde32210c1eb9a5af3859f0dd8346b2ec": (
        "vit_base_patch16_224.orig_in21k_ft_in1k"
    ),
    "32aa17d6e17b43500f531d5f6dc9bc93e56ed8841b8a75682e1bb295d722405b": (
        "vit_base_patch16_224.augreg2_in21k_ft_in1k"
    ),
    "b2e17235172c1dcddacb55aa8914e2f8b4b95eb9bb7d7782f333bcbef77151b8": "deit_tiny_patch16_224",
    "84ae4df9727fe82c5f498dcf831f5ef773512447c9e6435de19b160147fb5e69": "vit_small_patch14_dinov2",
    "f9075e860007ee51e31e1b8f14a22b39e724c76156fbdba16e0e88a27a6e09b7": (
        "vit_base_patch16_clip_quickgelu_224.openai"
    ),
}

# ---------------------------------------------------------------------------------- naming rules

# Each layout's names -> ours, as (pattern, replacement), applied in order.
HUGGING_FACE = (
    (r"^(vit|deit|model)\.", ""),
    # Module names since transformers 5. Files keep the older ones.
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    # The older names -> ours.
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.", r"blocks.\1.attn.\2."),
    (r"^encoder\.layer\.(\d+)\.attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (r"^encoder\.layer\.(\d+)\.intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (r"^encoder\.layer\.(\d+)\.output\.dense\.", r"blocks.\1.mlp.fc2."),
    (r"^encoder\.layer\.(\d+)\.layernorm_before\.", r"blocks.\1.norm1."),
    (r"^encoder\.layer\.(\d+)\.layernorm_after\.", r"blocks.\1.norm2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
)
TORCHVISION = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"^heads\.head\.", "head."),
)
GOOGLE_NPZ = (
    (r"^(opt/target/)?(params/)?", ""),
    (r"^cls$", "cls_token"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^pos_embedding$", "pos_embed"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"/LayerNorm_0/", "/norm1/"),
    (r"/LayerNorm_[12]/", "/norm2/"),
    (r"/MultiHeadDotProductAttention_[01]/(query|key|value)/", r"/attn/\1/"),
    (r"/MultiHeadDotProductAttention_[01]/out/", "/attn/proj/"),
    (r"/MlpBlock_[03]/Dense_0/", "/mlp/fc1/"),
    (r"/MlpBlock_[03]/Dense_1/", "/mlp/fc2/"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)
# Heads and tokens that only the pre-training needs.
DROPPED = (
    r"(head\.(mlp|last_layer)\.|mask_token|pooler\.|pre_logits\.|decoder\.|decoder_|mask_embed"
    r"|embeddings\.mask_token)"
)
# The names of vit.py's tensors.
OURS = (
    r"(cls_token|pos_embed|(patch_embed\.proj|norm_pre|norm|head"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))\.(weight|bias))"
)
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight")

# ---------------------------------------------------------------------------------------- reading


def read(path):
    """A checkpoint file -> ({name: tensor}, whether vitad wrote it)."""
    if not path.is_file():
        raise UserError(
            f"{path}: expected a checkpoint file, got no such file; "
            f"weights/README.md says where to get one"
        )
    if path.suffix in (".pth", ".pt", ".bin"):
        return read_pickle(path), False
    if path.suffix not in (".npz", ".safetensors"):
        raise UserError(
            f"{path}: expected a file whose suffix is .safetensors, .npz, .pth, .pt or .bin, "
            f"got the suffix {path.suffix!r}"
        )
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}, False
        with safe_open(path, framework="pt") as file:
            ours = "vitad" in (file.metadata() or {})
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, ours
    except Exception as error:  # parsers fail on foreign bytes in every way there is
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: expected a checkpoint of plain tensors, got a file that cannot be read as "
            f"one ({reason}): download it again"
        ) from None


def read_pickle(path):
    """A file of torch.save -> {name: tensor}, without wrappers and common prefixes."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # as in `read`; torch's text advises to let the code in the file run
        raise UserError(
            f"{path}: expected a checkpoint of plain tensors, got a broken file or one with code "
            f"in it, which is not run: download it again, or save a plain state_dict"
        ) from None
    for wrapper in ("model", "state_dict", "teacher"):  # DeiT and MAE, many others, DINO in full
        if isinstance(tensors, dict) and isinstance(tensors.get(wrapper), dict):
            tensors = tensors[wrapper]
    if not isinstance(tensors, dict):
        raise UserError(
            f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}: "
            f"save the model's state_dict"
        )
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise UserError(
                f"{path}: expected a dictionary of tensors, got {type(value).__name__} at {key!r}: "
                f"save the model's state_dict alone"
            )
        if value.is_meta:
            raise UserError(
                f"{path}: expected tensors with values, got {key} without: "
                f"save the model after its weights are loaded"
            )
    return {re.sub(r"^(module\.)?(backbone\.)?", "", key): tensors[key] for key in tensors}


# --------------------------------------------------------------------------------- layout -> timm


def rename(tensors, rules):
    """Apply every rule to every key, in order."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = tensor
    return renamed


def join_qkv(tensors):
    """query, key and value of each block -> the one joined projection, in this order."""
    joined = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.attn\.)(query|key|value)(\..*)", key)
        if match is None:
            joined[key] = tensor
        elif match[2] == "query":
            parts = [tensors[match[1] + part + match[3]] for part in ("query", "key", "value")]
            joined[f"{match[1]}qkv{match[3]}"] = torch.cat(parts)
    return joined


def from_google(tensors):
    """JAX's axes -> torch's.

    A kernel is (in, out), and attention's have the heads as an axis of their own.
    """
    turned = {}
    for key, tensor in rename(tensors, GOOGLE_NPZ).items():
        if key == "patch_embed.proj.weight":
            tensor = tensor.permute(3, 2, 0, 1)  # (p, p, 3, D) -> (D, 3, p, p)
        elif re.search(r"\.attn\.(query|key|value)\.weight", key):
            tensor = tensor.flatten(-2).T  # (D, H, D/H) -> (D, D)
        elif re.search(r"\.attn\.(query|key|value)\.bias", key):
            tensor = tensor.flatten()  # (H, D/H) -> (D,)
        elif key.endswith(".attn.proj.weight"):
            tensor = tensor.flatten(0, 1).T  # (H, D/H, D) -> (D, D)
        elif key.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor.T
        turned[key] = tensor
    return turned


def to_timm(tensors):
    """Recognise the layout -> (its name, the tensors under timm's names, heads or None).

    Only Google's files show the number of heads.
    """
    heads = None
    if any(key.endswith("embedding/kernel") for key in tensors):
        layout = "Google .npz"
        queries = [value for key, value in tensors.items() if key.endswith("query/bias")]
        heads = queries[0].shape[0] if queries else None  # (H, D/H)
        tensors = from_google(tensors)
    elif any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        layout = "Hugging Face transformers"
        tensors = rename(tensors, HUGGING_FACE)
    elif "conv_proj.weight" in tensors:
        layout = "torchvision"
        tensors = rename(tensors, TORCHVISION)
    elif "patch_embed.proj.weight" in tensors:
        layout = "timm"
    else:
        raise UserError(
            f"expected the keys of a ViT (timm, transformers, torchvision or Google's .npz), "
            f"got {', '.join(sorted(tensors)[:3]) or 'none'}, ..."
        )
    try:
        return layout, join_qkv(tensors), heads
    except KeyError as error:
        raise UserError(
            f"expected query, key and value in every block, got none called {error}"
        ) from None


# ----------------------------------------------------------------------------------- timm -> ours


def canonical(tensors):
    """A checkpoint in any of the layouts -> (vit.py's tensors, heads or None, what was done).

    The tensors are in float32. What was done is a list of short texts.
    """
    layout, tensors, heads = to_timm(tensors)
    done = [f"layout {layout}"]
    dropped = drop_pretraining(tensors)
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise UserError(f"expected {key} as floating-point numbers, got {value.dtype}")
    tensors = {key: value.float() for key, value in tensors.items()}
    done.append(f"dropped {', '.join(dropped) or 'nothing'}")
    if any(".ls1." in key for key in tensors):
        fold_layer_scale(tensors)
        done.append("folded LayerScale into the projections")
    check_names(tensors)
    weight = tensors["patch_embed.proj.weight"]
    if "patch_embed.proj.bias" not in tensors:  # CLIP's projection has none
        tensors["patch_embed.proj.bias"] = torch.zeros(len(weight))
        done.append("added a zero patch bias")
    patch = weight.shape[-1]
    grid, rest = divmod(IMAGE_SIZE, patch)
    if rest:
        raise UserError(f"expected a patch size that divides {IMAGE_SIZE}, got {patch}")
    tokens = tensors["pos_embed"].shape[1]
    if tokens != 1 + grid * grid:
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"], grid)
        done.append(
            f"resampled the position embedding from {math.isqrt(tokens - 1)}^2 to {grid}^2 patches"
        )
    # Copies, since tensors that share memory cannot be saved.
    copies = {key: x.clone(memory_format=torch.contiguous_format) for key, x in tensors.items()}
    return copies, heads, done


def drop_pretraining(tensors):
    """Remove what only the pre-training needs, in place; -> the names."""
    dropped = [key for key in tensors if re.match(DROPPED, key)]
    if any(key.startswith("pre_logits.") for key in dropped):
        # This head reads pre_logits and not the class token.
        dropped += [key for key in tensors if key.startswith("head.")]
    for key in dropped:
        del tensors[key]
    return dropped


def fold_layer_scale(tensors):
    """DINOv2's LayerScale -> the last projection of its branch, in place.

    LayerScale multiplies each branch by a vector gamma (D,): W' = diag(gamma) W, b' = gamma b.
    """
    for key in [key for key in tensors if re.search(r"\.ls[12]\.gamma$", key)]:
        gamma = tensors.pop(key)
        projection = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        tensors[f"{projection}.weight"] = gamma[:, None] * tensors[f"{projection}.weight"]
        tensors[f"{projection}.bias"] = gamma * tensors[f"{projection}.bias"]


def check_names(tensors):
    """Are these the tensors of a plain ViT with a class token?"""
    unknown = sorted(key for key in tensors if not re.fullmatch(OURS, key))
    if unknown:
        raise UserError(
            f"expected a plain ViT with a class token, got tensors that it does not have: "
            f"{', '.join(unknown[:5])}"
        )
    missing = [key for key in NEEDED if key not in tensors]
    if missing:
        raise UserError(f"expected a plain ViT with a class token, got no {', '.join(missing)}")


def resample_positions(pos_embed, grid):
    """A position embedding of another grid, (1, 1 + g^2, D) -> (1, 1 + grid^2, D).

    Bicubic with antialiasing. The class token's row stays.
    """
    tokens = pos_embed.shape[1]
    old = math.isqrt(max(tokens - 1, 0))
    if 1 + old * old != tokens:
        raise UserError(
            f"expected a position embedding of 1 + g x g tokens, got {tokens}: "
            f"distillation and register tokens are not supported"
        )
    cls = pos_embed[:, :1]
    patches = pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


# ---------------------------------------------------------------------------------------- writing


def metadata_of(path, digest, norm_pre, options):
    """What the tensors do not show: from the options where given, else from KNOWN.

    Mean and std are never guessed. The activation is GELU unless something says otherwise.
    options: {"mean", "std", "activation", "heads", "source", "license"}, None where not given.
    """
    name = KNOWN_SHA256.get(digest, path.stem)
    unknown = {"source": f"unknown, from {path.name}", "license": "unknown"}
    card = vars(KNOWN[name]) if name in KNOWN else unknown
    values = {**card, **{key: value for key, value in options.items() if value}}
    if "mean" not in values or "std" not in values:
        raise UserError(
            f"expected a known checkpoint, got {path.name}, sha256 {digest[:12]}...: its card "
            f"says how images were normalised; pass that as --mean R G B --std R G B"
        )
    for key in ("mean", "std"):
        if max(values[key]) > 1:
            raise UserError(
                f"--{key}: expected numbers on a scale from 0 to 1, got {list(values[key])}: "
                f"of images from 0 to 255 divide them by 255"
            )
    if norm_pre and "activation" not in values:
        raise UserError(
            "expected a known activation, got a checkpoint with norm_pre of unknown origin: "
            "pass --activation quick_gelu (OpenAI's CLIP) or gelu (most others)"
        )
    values.setdefault("activation", "gelu")
    values["mean"] = list(values["mean"])
    values["std"] = list(values["std"])
    eps = CLIP_EPS if norm_pre else LAYER_NORM_EPS
    return {**values, "eps": eps, "name": name, "original_sha256": digest}


def check_heads(width, metadata):
    """Refuse to guess the number of heads where they may not be 64 wide."""
    if "heads" not in metadata and (width > WIDEST or max(width, 64) % 64):
        raise UserError(
            f"expected a width up to {WIDEST} of heads of 64, got {width}: "
            f"its card says how many heads there are (ViT-H 16); pass that as --heads"
        )


def save(path, tensors, metadata, name):
    """Write the file format of vit.load_vit; -> the ViT, read back. name: the file's, in an error.

    The metadata are one sorted JSON text under one key: safetensors writes several keys in random
    order, and the file's sha256 is the teacher's name.
    """
    save_file(tensors, path, metadata={"vitad": json.dumps(metadata, sort_keys=True)})
    try:
        return load_vit(path)
    except ValueError as error:
        raise UserError(str(error).replace(str(path), str(name))) from None


def convert(
    path,
    out,
    *,
    mean=None,
    std=None,
    activation=None,
    heads=None,
    source=None,
    license=None,
    check=None,
):
    """Convert the checkpoint `path` into `out`; -> lines that say what was done.

    check: is called with the ViT, and may refuse it by a UserError, which leaves nothing. The other
    arguments are for what the file does not show; see --help.
    """
    path = Path(path)
    out = Path(out)
    tensors, ours = read(path)
    if ours:
        raise UserError(
            f"{path}: expected a public checkpoint, got a file that vitad wrote: use it as it is"
        )
    if out.exists() and out.samefile(path):
        raise UserError(
            f"{out}: expected another name than the original's, got the same: choose one with --out"
        )
    digest = sha256(path)
    read_line = f"read {path}: {len(tensors)} tensors, sha256 {digest}"
    try:
        tensors, file_heads, done = canonical(tensors)
        options = {
            "mean": mean,
            "std": std,
            "activation": activation,
            "heads": heads or file_heads,
            "source": source,
            "license": license,
        }
        metadata = metadata_of(path, digest, "norm_pre.weight" in tensors, options)
        check_heads(tensors["cls_token"].shape[-1], metadata)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, LookupError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: expected tensors of a ViT's shapes, got others ({reason})"
        ) from None
    with new_folder(out.parent), atomic(out) as temporary:
        vit = save(temporary, tensors, metadata, path)
        if check:
            check(vit)
    return [read_line, "; ".join(done), *summary(out, vit)]


def refuse_to_lose(out, original):
    """Refuse to write over the teacher that another original was converted to.

    Many have the same name, like model.safetensors.
    """
    if not (out.is_file() and original.is_file()) or out.samefile(original):
        return
    try:
        with safe_open(out, framework="pt") as file:
            made_of = json.loads(file.metadata()["vitad"]).get("original_sha256")
    except Exception:  # no file of ours
        made_of = None
    if made_of != sha256(original):
        raise UserError(
            f"{out}: expected no teacher, or one converted from {original}, got another: "
            f"choose a name with --out"
        )


def summary(out, vit):
    """Two lines on a converted file: its metadata and its sizes."""
    metadata = vit.metadata
    config = vit.config
    classes = len(vit.head.weight) if vit.head else 0
    parameters = sum(p.numel() for p in vit.parameters())
    return [
        f"normalisation mean {metadata['mean']} std {metadata['std']}, "
        f"activation {metadata['activation']}, LayerNorm eps {metadata['eps']:g}, "
        f"source {metadata['source']}, licence {metadata['license']}",
        f"wrote {out}: width {config['width']}, depth {config['depth']}, "
        f"heads {config['heads']}, patch {config['patch']}, "
        f"grid {config['grid']} x {config['grid']}, {classes} classes, "
        f"{parameters:,} parameters, sha256 {vit.sha256}",
    ]


@script
def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="the public checkpoint")
    parser.add_argument(
        "--out", type=Path, help="where to write (default weights/<stem of FILE>.safetensors)"
    )
    rgb = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    parser.add_argument("--mean", **rgb, help="of the images, on a 0 to 1 scale")
    parser.add_argument("--std", **rgb, help="their standard deviation, on the same scale")
    parser.add_argument("--activation", choices=list(ACTIVATIONS), help="of the MLPs")
    parser.add_argument(
        "--heads",
        type=int,
        help="attention heads (default: as the file tells, else width / 64 up to a width of 1024)",
    )
    parser.add_argument("--source", help="where the checkpoint is from, for the metadata")
    parser.add_argument("--license", help="its licence, for the metadata")
    options = vars(parser.parse_args(argv))
    if options["heads"] is not None:
        check_whole("heads", options["heads"], 1)
    file = options.pop("file")
    out = options.pop("out")
    if out is None:
        out = WEIGHTS / f"{file.stem}.safetensors"
        refuse_to_lose(out, file)
    print("\n".join(convert(file, out, **options)))


if __name__ == "__main__":
    sys.exit(main())
