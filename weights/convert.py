#!/usr/bin/env python3
"""Turn a public ViT checkpoint into the one file format that vit.py loads.

    python weights/convert.py FILE                                      # a known checkpoint (KNOWN below)
    python weights/convert.py FILE --mean .5 .5 .5 --std .5 .5 .5       # any other: say how its images were normalised

FILE is .safetensors, .npz, or .pth / .pt / .bin (read with weights_only=True, so no code in it runs). Its layout is recognised from the keys:
timm (also DeiT, DINO, MAE, DINOv2 and CLIP's image tower under timm's names), Hugging Face transformers, torchvision, Google's .npz.
The result, weights/<stem of FILE>.safetensors, has timm's names in float32 and carries normalisation, activation, source, licence and
sha256 of the original in its metadata. ViT-B/16 takes a few seconds.
"""
import argparse
import json
import math
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from vit import load_vit, sha256  # noqa: E402
from weights.files import atomic, fail, one_sentence  # noqa: E402

IMAGE_SIZE = 224
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Known checkpoints by file stem: (mean, std), activation, source, licence. The normalisation is the model card's, never a guess:
# of files called ViT-B/16, Google's want 0.5 / 0.5 and the others ImageNet's.
GOOGLE = (HALF, "gelu", "Google Research, vision_transformer", "Apache-2.0")
AUGREG = (HALF, "gelu", "Google Research, vision_transformer (AugReg), through timm", "Apache-2.0")
DEIT = (IMAGENET, "gelu", "Meta, facebookresearch/deit", "Apache-2.0")
DINO = (IMAGENET, "gelu", "Meta, facebookresearch/dino", "Apache-2.0")
DINOV2 = (IMAGENET, "gelu", "Meta, facebookresearch/dinov2", "Apache-2.0")
MAE = (IMAGENET, "gelu", "Meta, facebookresearch/mae", "CC-BY-NC-4.0")
OPENAI = (CLIP, "quick_gelu", "OpenAI, CLIP's image tower", "code MIT; the weights' card states none")
KNOWN = {
    "vit_base_patch16_224": GOOGLE,
    "vit_base_patch16_224.orig_in21k_ft_in1k": GOOGLE,
    "ViT-B_16-224": GOOGLE,
    "vit_base_patch16_224.augreg2_in21k_ft_in1k": AUGREG,
    **{f"vit_{size}_patch16_224.{tag}": AUGREG for size in ("tiny", "small", "base", "large")
       for tag in ("augreg_in21k", "augreg_in21k_ft_in1k")},
    "vit_b_16-c867db91": (IMAGENET, "gelu", "torchvision, ViT_B_16_Weights.IMAGENET1K_V1", "BSD-3-Clause"),
    **{f"deit_{size}_patch16_224{tag}": DEIT for size, own in (("tiny", "a1311bcf"), ("small", "cd65a155"), ("base", "b5f2ef4d"))
       for tag in ("", ".fb_in1k", f"-{own}")},
    "dino_vitbase16_pretrain": DINO, "vit_base_patch16_224.dino": DINO,
    "dino_deitsmall16_pretrain": DINO, "vit_small_patch16_224.dino": DINO,
    "mae_pretrain_vit_base": MAE, "vit_base_patch16_224.mae": MAE,
    **{name: DINOV2 for size, s in (("small", "s"), ("base", "b"), ("large", "l"))
       for name in (f"dinov2_vit{s}14_pretrain", f"dinov2_vit{s}14_fp16", f"vit_{size}_patch14_dinov2", f"vit_{size}_patch14_dinov2.lvd142m")},
    "clip_vit_base_patch16_224": OPENAI, "vit_base_patch16_clip_quickgelu_224.openai": OPENAI,
}
# The same by the sha256 of the file, for those whose file name says nothing (model.safetensors).
KNOWN_SHA256 = {
    "669b949ea91fd19217f200cee259780bde32210c1eb9a5af3859f0dd8346b2ec": "vit_base_patch16_224.orig_in21k_ft_in1k",
    "32aa17d6e17b43500f531d5f6dc9bc93e56ed8841b8a75682e1bb295d722405b": "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "b2e17235172c1dcddacb55aa8914e2f8b4b95eb9bb7d7782f333bcbef77151b8": "deit_tiny_patch16_224",
    "84ae4df9727fe82c5f498dcf831f5ef773512447c9e6435de19b160147fb5e69": "vit_small_patch14_dinov2",
    "f9075e860007ee51e31e1b8f14a22b39e724c76156fbdba16e0e88a27a6e09b7": "vit_base_patch16_clip_quickgelu_224.openai",
}

# Each layout's parts -> ours, as (pattern, replacement); what no pattern names is dropped or refused in `to_timm`.
HUGGING_FACE = (
    (r"^(vit|deit|model)\.", ""),
    (r"^layers\.", "encoder.layer."),  # this and the next four: module names since transformers 5; files keep the older ones
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
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
# Pre-training's own heads and tokens.
DROPPED = r"(head\.(mlp|last_layer)\.|mask_token|pooler\.|pre_logits\.|decoder\.|decoder_|mask_embed|embeddings\.mask_token)"
OURS = (r"(cls_token|pos_embed|(patch_embed\.proj|norm_pre|norm|head|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2))"
        r"\.(weight|bias))")


def read(path):
    """A checkpoint file -> ({name: tensor}, whether vitad wrote it); ValueError if it cannot be read safely."""
    if not path.is_file():
        raise ValueError(f"{path}: expected a checkpoint file, got no such file; weights/README.md says where to get one")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: torch.from_numpy(arrays[key]) for key in arrays.files}, False
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, "vitad" in (file.metadata() or {})
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise ValueError("the suffix is none of .safetensors, .npz, .pth, .pt, .bin")
    except Exception as error:  # parsers on foreign bytes fail in every way there is
        raise ValueError(f"{path}: expected a checkpoint of plain tensors, got a file that cannot be read as one "
                         f"({str(error).splitlines()[0]}): download it again") from None
    try:
        with warnings.catch_warnings(action="ignore"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the same; torch's text advises to let the code in the file run
        raise ValueError(f"{path}: expected a checkpoint of plain tensors, got a broken file or one with code in it, which is not run: "
                         f"download it again, or save a plain state_dict") from None
    for wrapper in ("model", "state_dict", "teacher"):  # DeiT and MAE, many others, DINO's full checkpoint
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(loaded).__name__}: save the model's state_dict")
    return {re.sub(r"^(module\.)?(backbone\.)?", "", key): value for key, value in loaded.items()}, False


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
            joined[f"{match[1]}qkv{match[3]}"] = torch.cat([tensors[f"{match[1]}{part}{match[3]}"] for part in ("query", "key", "value")])
    return joined


def from_google(tensors):
    """JAX's axes -> torch's: a kernel is (in, out), and attention's have the heads as an axis of their own."""
    turned = {}
    for key, tensor in rename(tensors, GOOGLE_NPZ).items():
        if key == "patch_embed.proj.weight":
            tensor = tensor.permute(3, 2, 0, 1)  # (p, p, 3, D) -> (D, 3, p, p)
        elif re.search(r"\.attn\.(query|key|value)\.", key):
            tensor = tensor.flatten(-2).T if tensor.ndim == 3 else tensor.flatten()  # (D, H, D/H) -> (D, D); (H, D/H) -> (D,)
        elif key.endswith(".attn.proj.weight"):
            tensor = tensor.flatten(0, 1).T  # (H, D/H, D) -> (D, D)
        elif key.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor.T
        turned[key] = tensor
    return turned


def to_timm(tensors):
    """Recognise the layout by its keys -> (its name, the tensors under timm's names, heads where the file tells them)."""
    heads = None
    if any(key.endswith("embedding/kernel") for key in tensors):
        layout = "Google .npz"
        queries = [value for key, value in tensors.items() if key.endswith("query/bias")]
        heads = queries[0].shape[0] if queries else None  # (H, D/H)
        tensors = from_google(tensors)
    elif any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in tensors):
        layout, tensors = "Hugging Face transformers", rename(tensors, HUGGING_FACE)
    elif "conv_proj.weight" in tensors:
        layout, tensors = "torchvision", rename(tensors, TORCHVISION)
    elif "patch_embed.proj.weight" in tensors:
        layout = "timm"
    else:
        raise ValueError(f"expected the keys of a ViT (timm, transformers, torchvision or Google's .npz), got {', '.join(sorted(tensors)[:3])}, ...")
    try:
        return layout, join_qkv(tensors), heads
    except KeyError as error:
        raise ValueError(f"expected query, key and value in every block, got none called {error}") from None


def fold_layer_scale(tensors):
    """DINOv2 multiplies each branch by a vector gamma (D,); the branch's last projection can do that: W' = diag(gamma) W, b' = gamma b."""
    for key in [key for key in tensors if re.search(r"\.ls[12]\.gamma$", key)]:
        gamma = tensors.pop(key)
        projection = key.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        tensors[f"{projection}.weight"] = gamma[:, None] * tensors[f"{projection}.weight"]
        tensors[f"{projection}.bias"] = gamma * tensors[f"{projection}.bias"]


def resample_positions(pos_embed, grid):
    """A position embedding (1, 1 + g^2, D) of another grid -> (1, 1 + grid^2, D): bicubic, antialiased; the class token's row stays."""
    old = math.isqrt(pos_embed.shape[1] - 1)
    if 1 + old * old != pos_embed.shape[1]:
        raise ValueError(f"expected a position embedding of 1 + g x g tokens, got {pos_embed.shape[1]}: "
                         f"distillation and register tokens are not supported")
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, D, g, g)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
    return torch.cat([cls, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def canonical(tensors):
    """A checkpoint in any of the layouts -> (its tensors as vit.py names them, in float32; heads or None; what was done, in words)."""
    layout, tensors, heads = to_timm({key: value.float() for key, value in tensors.items()})
    said = [f"layout {layout}"]
    dropped = [key for key in tensors if re.match(DROPPED, key)]
    if any(key.startswith("pre_logits.") for key in dropped):
        dropped += [key for key in tensors if key.startswith("head.")]  # the head reads pre_logits, not the class token
    for key in dropped:
        del tensors[key]
    said.append(f"dropped {', '.join(dropped) or 'nothing'}")
    if any(".ls1." in key for key in tensors):
        fold_layer_scale(tensors)
        said.append("folded LayerScale into the projections")
    unknown = sorted(key for key in tensors if not re.fullmatch(OURS, key))
    if unknown:
        raise ValueError(f"expected a plain ViT with a class token, got tensors that it does not have: {', '.join(unknown[:5])}")
    missing = [key for key in ("cls_token", "pos_embed", "patch_embed.proj.weight") if key not in tensors]
    if missing:
        raise ValueError(f"expected a plain ViT with a class token, got no {', '.join(missing)}")
    weight = tensors["patch_embed.proj.weight"]
    if "patch_embed.proj.bias" not in tensors:  # CLIP's projection has none
        tensors["patch_embed.proj.bias"] = torch.zeros(len(weight))
        said.append("added a zero patch bias")
    grid, rest = divmod(IMAGE_SIZE, weight.shape[-1])
    if rest:
        raise ValueError(f"expected a patch size that divides {IMAGE_SIZE}, got {weight.shape[-1]}")
    if tensors["pos_embed"].shape[1] != 1 + grid * grid:
        said.append(f"resampled the position embedding from {math.isqrt(tensors['pos_embed'].shape[1] - 1)}^2 to {grid}^2 patches")
        tensors["pos_embed"] = resample_positions(tensors["pos_embed"], grid)
    return {key: value.contiguous() for key, value in tensors.items()}, heads, said


def metadata(path, digest, args, heads, norm_pre):
    """What the file cannot tell by its shapes: from the options, else from KNOWN, and never guessed; ValueError if that is not enough."""
    name = KNOWN_SHA256.get(digest, path.stem)
    normalisation, activation, source, license = KNOWN.get(name, (None, None if norm_pre else "gelu", f"unknown, from {path.name}", "unknown"))
    mean, std = args.mean or (normalisation and normalisation[0]), args.std or (normalisation and normalisation[1])
    activation = args.activation or activation
    eps = 1e-5 if norm_pre else 1e-6  # CLIP's towers, the only ones with norm_pre, use torch's default
    if not mean or not std:
        raise ValueError(f"expected a known checkpoint, got {path.name}, sha256 {digest[:12]}...: its card says how images were normalised; "
                         f"pass that as --mean R G B --std R G B")
    if not activation:
        raise ValueError("expected a known activation, got a checkpoint with norm_pre of unknown origin: pass --activation quick_gelu "
                         "(OpenAI's CLIP) or gelu (most others)")
    heads = args.heads or heads
    return {"mean": list(mean), "std": list(std), "activation": activation, "eps": eps, **({"heads": heads} if heads else {}),
            "name": name if name in KNOWN else path.stem, "source": args.source or source,
            "license": args.license or license, "original_sha256": digest}


def convert(path, out, args):
    """Read `path`, write `out`; -> the lines that say what was done. ValueError, with nothing written, if that is not possible."""
    tensors, ours = read(path)
    if ours:
        raise ValueError(f"{path}: expected a public checkpoint, got a file that vitad wrote: use it as it is")
    digest = sha256(path)
    lines = [f"read {path}: {len(tensors)} tensors, sha256 {digest}"]
    try:
        tensors, heads, said = canonical(tensors)
        about = metadata(path, digest, args, heads, "norm_pre.weight" in tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if out.exists() and out.samefile(path):
        raise ValueError(f"{out}: expected another name than the original's, got the same: choose one with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as temporary:
        # One key, one sorted JSON text: safetensors writes several keys in random order, and the file's sha256 is the teacher's name.
        save_file(tensors, temporary, metadata={"vitad": json.dumps(about, sort_keys=True)})
        try:
            vit = load_vit(temporary)
        except ValueError as error:
            raise ValueError(str(error).replace(str(temporary), str(path))) from None
    c, classes = vit.config, len(vit.head.weight) if vit.head else 0
    return [*lines, "; ".join(said),
            f"normalisation mean {about['mean']} std {about['std']}, activation {about['activation']}, "
            f"LayerNorm eps {about['eps']:g}, source {about['source']}, licence {about['license']}",
            f"wrote {out}: width {c['width']}, depth {c['depth']}, heads {c['heads']}, patch {c['patch']}, grid {c['grid']} x {c['grid']}, "
            f"{classes} classes, {sum(p.numel() for p in vit.parameters()):,} parameters, sha256 {vit.sha256}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail  # one sentence, without the usage before it
    parser.add_argument("file", type=Path, help="the public checkpoint")
    parser.add_argument("--out", type=Path, help="where to write (default weights/<stem of FILE>.safetensors)")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="of the images, on a 0 to 1 scale")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    parser.add_argument("--activation", choices=["gelu", "quick_gelu"], help="of the MLPs")
    parser.add_argument("--heads", type=int, help="attention heads (default: as the file tells, else width / 64)")
    parser.add_argument("--source", help="where the checkpoint is from, for the metadata")
    parser.add_argument("--license", help="its licence, for the metadata")
    args = parser.parse_args()
    with one_sentence():
        print("\n".join(convert(args.file, args.out or HERE / f"{args.file.stem}.safetensors", args)))


if __name__ == "__main__":
    main()
