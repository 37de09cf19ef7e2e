"""weights/convert.py: a ViT written in every public layout comes back as it was.

Each layout is written by the rules of that layout's own code.
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torchvision.models import VisionTransformer

from conftest import (
    ROOT,
    assert_one_sentence,
    call,
    perturb,
    run_script,
    save_vit,
    shared,
    tiny_vit,
)
from runs import UserError
from vit import Block, load_vit, sha256
from weights import convert

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
MEAN_AND_STD = ("--mean", *MEAN, "--std", *STD)
IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
# width / 64 heads, for layouts that do not tell heads.
HEAD64 = {"width": 128, "depth": 2, "heads": 2, "patch": 32, "grid": 7, "hidden": 64}


def converted(tensors, path, **changes):
    """Save in the format that the suffix names, convert, load."""
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    out = path.with_name("converted.safetensors")
    convert.convert(path, out, **{"mean": MEAN, "std": STD, **changes})
    return load_vit(out)


def assert_same(vit, original):
    """The same tensors and the same output."""
    assert vit.config["heads"] == original.config["heads"]
    ours = vit.state_dict()
    theirs = original.state_dict()
    assert set(ours) == set(theirs)
    for key in theirs:
        assert torch.equal(ours[key], theirs[key]), key
    with torch.no_grad():
        torch.testing.assert_close(vit(IMAGES, (1,))[1], original(IMAGES, (1,))[1])


# -------------------------------------------------------------------------------- Hugging Face

# timm's part of a block -> those of transformers: in the hub's files, and in a state_dict since 5.
FILES = {
    "layer": "encoder.layer",
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
    "norm1": ["layernorm_before"],
    "norm2": ["layernorm_after"],
}
MODULES = {
    **FILES,
    "layer": "layers",
    "attn.qkv": [f"attention.{part}_proj" for part in "qkv"],
    "attn.proj": ["attention.o_proj"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
    "head": "classifier",
}


def hugging_face(vit, names):
    """timm's names -> those of transformers, FILES or MODULES."""
    out = {}
    for key, value in vit.state_dict().items():
        if key in OUTSIDE:
            out[OUTSIDE[key]] = value
            continue
        part, _, kind = key.rpartition(".")
        if part in OUTSIDE:
            out[f"{OUTSIDE[part]}.{kind}"] = value
            continue
        _, i, part = part.split(".", 2)
        targets = names[part]
        for target, piece in zip(targets, value.chunk(len(targets)), strict=True):
            out[f"{names['layer']}.{i}.{target}.{kind}"] = piece
    return out


@pytest.mark.parametrize("names", [FILES, MODULES], ids=["files", "modules"])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face(tmp_path, names, prefix):
    original = tiny_vit(**HEAD64, classes=3)
    tensors = {
        key if key.startswith("classifier") else prefix + key: value
        for key, value in hugging_face(original, names).items()
    }
    assert_same(converted(tensors, tmp_path / "model.safetensors"), original)


def test_hugging_face_without_classifier_drops_the_pooler(tmp_path):
    original = tiny_vit(**HEAD64)
    tensors = {
        **hugging_face(original, FILES),
        "pooler.dense.weight": torch.zeros(128, 128),
        "pooler.dense.bias": torch.zeros(128),
    }
    assert_same(converted(tensors, tmp_path / "model.safetensors"), original)


# -------------------------------------------------------------------------- torchvision and timm


@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision(tmp_path, old_names):
    theirs = VisionTransformer(
        image_size=224,
        patch_size=32,
        num_layers=2,
        num_heads=2,
        hidden_dim=128,
        mlp_dim=64,
        num_classes=3,
    )
    theirs = perturb(theirs, scale=0.1).eval()
    tensors = theirs.state_dict()
    if old_names:
        tensors = {
            key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value
            for key, value in tensors.items()
        }
    ours = converted(tensors, tmp_path / "model.pth")
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(IMAGES), theirs(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
def test_timm_deit_mae_and_dino(tmp_path, wrapper):
    original = tiny_vit(**HEAD64)
    tensors = dict(original.state_dict())
    if wrapper == "model":  # MAE's pre-training checkpoint
        tensors["mask_token"] = torch.zeros(1, 1, 128)
        tensors["decoder_pos_embed"] = torch.zeros(1, 50, 64)
        tensors["decoder_embed.weight"] = torch.zeros(64, 128)
    if wrapper == "teacher":  # DINO's full checkpoint
        tensors = {f"backbone.{key}": value for key, value in tensors.items()}
        tensors["head.mlp.0.weight"] = torch.zeros(4, 128)
        tensors["head.last_layer.weight_v"] = torch.zeros(4, 4)
    if wrapper:
        tensors = {wrapper: tensors}
    assert_same(converted(tensors, tmp_path / "model.pth"), original)


# -------------------------------------------------------------------------------------- Google


def google(vit, style):
    """Our tensors -> Flax's: (in, out) kernels, the heads as an axis of their own.

    style: whose numbering of the sub-modules.
    """
    numbering = {"vision_transformer": ("1", "3", "2"), "big_vision": ("0", "0", "1")}
    attention, mlp, second = numbering[style]
    pos_embed = "Transformer/posembed_input/pos_embedding"
    if style == "big_vision":
        pos_embed = "pos_embedding"
    kernel = vit.patch_embed.proj.weight.permute(2, 3, 1, 0)
    out = {
        "cls": vit.cls_token,
        pos_embed: vit.pos_embed,
        "embedding/kernel": kernel,
        "embedding/bias": vit.patch_embed.proj.bias,
        **google_norm("Transformer/encoder_norm", vit.norm),
    }
    if vit.head:
        out |= google_dense("head", vit.head)
    for i, block in enumerate(vit.blocks):
        name = f"Transformer/encoderblock_{i}"
        out |= google_norm(f"{name}/LayerNorm_0", block.norm1)
        out |= google_norm(f"{name}/LayerNorm_{second}", block.norm2)
        out |= google_attention(f"{name}/MultiHeadDotProductAttention_{attention}", block.attn)
        out |= google_dense(f"{name}/MlpBlock_{mlp}/Dense_0", block.mlp.fc1)
        out |= google_dense(f"{name}/MlpBlock_{mlp}/Dense_1", block.mlp.fc2)
    return {key: value.detach() for key, value in out.items()}


def google_norm(name, norm):
    return {f"{name}/scale": norm.weight, f"{name}/bias": norm.bias}


def google_dense(name, linear):
    return {f"{name}/kernel": linear.weight.T, f"{name}/bias": linear.bias}


def google_attention(name, attn):
    heads = attn.heads
    width = attn.proj.out_features
    out = {
        f"{name}/out/kernel": attn.proj.weight.T.reshape(heads, -1, width),
        f"{name}/out/bias": attn.proj.bias,
    }
    weights = attn.qkv.weight.chunk(3)
    biases = attn.qkv.bias.chunk(3)
    for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
        out[f"{name}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
        out[f"{name}/{part}/bias"] = bias.reshape(heads, -1)
    return out


@pytest.mark.parametrize("style", ["vision_transformer", "big_vision"])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_google_npz(tmp_path, style, prefix):
    original = tiny_vit(classes=3)  # 2 heads at width 32: this layout tells them
    tensors = {prefix + key: value for key, value in google(original, style).items()}
    assert_same(converted(tensors, tmp_path / "model.npz"), original)


def test_google_in21k_drops_pre_logits_with_its_head(tmp_path):
    original = tiny_vit(classes=3)
    tensors = google(original, "vision_transformer")
    tensors["pre_logits/kernel"] = torch.zeros(32, 32)
    tensors["pre_logits/bias"] = torch.zeros(32)
    original.head = None
    assert_same(converted(tensors, tmp_path / "model.npz"), original)


# ----------------------------------------------------------------------------- DINOv2 and CLIP


class ScaledBlock(nn.Module):
    """The block with LayerScale, as DINOv2 writes it."""

    def __init__(self, block, scale1, scale2):
        super().__init__()
        self.block = block
        self.scale1 = scale1
        self.scale2 = scale2

    def forward(self, x):
        x = x + self.scale1 * self.block.attn(self.block.norm1(x))
        return x + self.scale2 * self.block.mlp(self.block.norm2(x))


def test_dinov2_layer_scale_is_folded_exactly(tmp_path):
    original = tiny_vit(**HEAD64)
    tensors = dict(original.state_dict())
    tensors["mask_token"] = torch.zeros(1, 128)
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for i, block in enumerate(original.blocks):
        scale1, scale2 = torch.rand(2, 128, generator=generator) + 0.1
        tensors[f"blocks.{i}.ls1.gamma"] = scale1
        tensors[f"blocks.{i}.ls2.gamma"] = scale2
        blocks.append(ScaledBlock(block, scale1, scale2))
    vit = converted(tensors, tmp_path / "model.pth")
    original.blocks = nn.ModuleList(blocks)
    with torch.no_grad():
        ours = vit(IMAGES, (1,))[1]
        theirs = original(IMAGES, (1,))[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert isinstance(vit.blocks[0], Block)


def test_position_grid_of_another_size_is_resampled(tmp_path):
    original = tiny_vit(**{**HEAD64, "grid": 12})
    vit = converted(dict(original.state_dict()), tmp_path / "model.pth")
    old = original.pos_embed.detach()
    patches = old[:, 1:].reshape(1, 12, 12, 128).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, (7, 7), mode="bicubic", antialias=True)
    assert torch.equal(vit.pos_embed[:, :1], old[:, :1])
    assert torch.equal(vit.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 49, 128))


def test_clip_tower(tmp_path):
    original = tiny_vit(**HEAD64, norm_pre=True, activation="quick_gelu", eps=1e-5, classes=4)
    original.patch_embed.proj.bias.data.zero_()
    tensors = dict(original.state_dict())
    del tensors["patch_embed.proj.bias"]
    vit = converted(tensors, tmp_path / "model.safetensors", activation="quick_gelu")
    assert vit.config == {**original.config, "mean": MEAN, "std": STD}
    assert_same(vit, original)


def test_clip_of_unknown_origin_needs_the_activation(tmp_path):
    tensors = dict(tiny_vit(**HEAD64, norm_pre=True).state_dict())
    with pytest.raises(UserError, match="pass --activation"):
        converted(tensors, tmp_path / "model.safetensors")


# ---------------------------------------------------------------------------- what is written


def test_half_precision_becomes_float32(tmp_path):
    original = tiny_vit(**HEAD64)
    halves = {key: value.half() for key, value in original.state_dict().items()}
    assert_same(converted(halves, tmp_path / "model.safetensors"), original.half().float())


def test_heads_option(tmp_path):
    original = tiny_vit()
    tensors = dict(original.state_dict())
    assert_same(converted(tensors, tmp_path / "model.safetensors", heads=2), original)


@pytest.mark.parametrize("width", [96, 1280])
def test_heads_are_not_guessed_where_they_may_not_be_64_wide(tmp_path, width):
    original = tiny_vit(depth=2, width=width, hidden=8, heads=2)
    tensors = dict(original.state_dict())
    with pytest.raises(UserError, match=f"of heads of 64, got {width}: .* as --heads"):
        converted(tensors, tmp_path / "model.safetensors")
    assert_same(converted(tensors, tmp_path / "model.safetensors", heads=2), original)


def test_metadata_says_where_it_is_from_and_the_bytes_repeat(tmp_path):
    path = tmp_path / "deit_tiny_patch16_224.safetensors"  # a known name: no options needed
    out = tmp_path / "out.safetensors"
    save_file(dict(tiny_vit(**HEAD64).state_dict()), path)
    digests = set()
    for _ in range(4):
        convert.convert(path, out)
        digests.add(sha256(out))
    assert len(digests) == 1
    with safe_open(out, "pt") as file:
        assert list(file.metadata()) == ["vitad"]
        metadata = json.loads(file.metadata()["vitad"])
    assert metadata == {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "activation": "gelu",
        "eps": 1e-6,
        "name": "deit_tiny_patch16_224",
        "source": "Meta, facebookresearch/deit",
        "license": "Apache-2.0",
        "original_sha256": sha256(path),
    }


def test_options_come_before_the_table(tmp_path):
    path = tmp_path / "deit_tiny_patch16_224.safetensors"
    tensors = dict(tiny_vit(**HEAD64).state_dict())
    options = {"activation": "quick_gelu", "heads": 4, "source": "me", "license": "mine"}
    metadata = converted(tensors, path, **options).metadata
    assert metadata["mean"] == list(MEAN) and metadata["std"] == list(STD)
    assert {key: metadata[key] for key in options} == options


def test_the_bytes_are_those_of_every_earlier_version(tmp_path):
    """Runs name their teacher by its sha256, so a checkpoint must always convert to the same."""
    # Values are only copied here, so that every machine writes these bytes.
    convert.convert(shared("weights/deit_tiny_patch16_224.safetensors"), tmp_path / "out")
    expected = "57513ae7bc3dd6d9c9712c2ed8933a715126ac20bec330fc78e8c6645f2cfce2"
    assert sha256(tmp_path / "out") == expected


def test_table_of_known_checkpoints():
    google = (
        "vit_base_patch16_224",
        "vit_base_patch16_224.orig_in21k_ft_in1k",
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
    )
    for name in google:
        assert convert.KNOWN[name].mean == convert.KNOWN[name].std == (0.5, 0.5, 0.5)
    others = (
        "vit_base_patch16_224.dino",
        "vit_base_patch16_224.mae",
        "vit_b_16-c867db91",
        "deit_base_patch16_224",
        "vit_small_patch14_dinov2",
    )
    for name in others:
        assert convert.KNOWN[name].mean == (0.485, 0.456, 0.406)
        assert convert.KNOWN[name].std == (0.229, 0.224, 0.225)
    assert set(convert.KNOWN_SHA256.values()) <= set(convert.KNOWN)
    assert all(len(digest) == 64 for digest in convert.KNOWN_SHA256)


# ------------------------------------------------------------------------------------ refusals


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def change_tensors(tensors, kind):
    """A checkpoint's tensors, spoilt."""
    if kind == "distilled":
        tensors["pos_embed"] = torch.zeros(1, 51, 128)
    if kind == "registers":
        tensors["register_tokens"] = torch.zeros(1, 4, 128)
    if kind == "foreign":
        return {"conv1.weight": torch.zeros(1)}
    if kind == "incomplete":
        del tensors["blocks.1.attn.qkv.weight"]
    if kind == "list":
        return [torch.zeros(1)]
    if kind == "epoch":
        return {**tensors, "epoch": 3}
    if kind == "nested":
        return {"state_dict": {"model": tensors}}
    if kind == "meta":  # a shape without values
        tensors["norm.weight"] = torch.empty(1, device="meta")
    return tensors


def change_file(path, kind):
    """A checkpoint file, spoilt; -> its path."""
    if kind == "ours":
        return save_vit(tiny_vit(**HEAD64), path.with_name("ours.safetensors"))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    if kind == "text":
        path.write_text("just words")
    if kind == "suffix":
        return path.rename(path.with_suffix(".h5"))
    if kind == "absent":
        return path.with_name("nowhere.pth")
    if kind == "npz with objects":
        path = path.with_suffix(".npz")
        np.savez(path, **{"embedding/kernel": np.array([{"a": 1}], dtype=object)})
    return path


REFUSED = {
    "unknown": "--mean R G B --std R G B",
    "distilled": "1 + g x g tokens, got 51",
    "registers": "register_tokens",
    "foreign": "expected the keys of a ViT",
    "incomplete": "expected a tensor blocks.1.attn.qkv.weight",
    "ours": "a file that vitad wrote",
    "pickle": "expected a checkpoint of plain tensors",
    "list": "expected a dictionary of tensors, got list",
    "epoch": "expected a dictionary of tensors, got int at 'epoch'",
    "nested": "expected a dictionary of tensors, got dict at 'model'",
    "meta": "expected tensors with values, got norm.weight without",
    "text": "expected a checkpoint of plain tensors",
    "suffix": "got the suffix '.h5'",
    "absent": "no such file",
    "npz with objects": "expected a checkpoint of plain tensors",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_in_one_sentence(tmp_path, kind):
    path = tmp_path / "model.pth"
    tensors = change_tensors(dict(tiny_vit(**HEAD64).state_dict()), kind)
    torch.save(tensors, path)
    path = change_file(path, kind)
    arguments = [path, "--out", tmp_path / "out.safetensors"]
    if kind != "unknown":
        arguments += MEAN_AND_STD
    result = call(convert.main, *arguments, cwd=tmp_path)
    assert_one_sentence(result, REFUSED[kind], str(path))
    assert not (tmp_path / "executed").exists()
    assert not list(tmp_path.glob("*out.safetensors*"))


def test_tensors_may_share_memory(tmp_path):
    tensors = tiny_vit(**HEAD64).state_dict()
    tensors["blocks.1.norm1.weight"] = tensors["blocks.0.norm1.weight"]
    torch.save(dict(tensors), tmp_path / "tied.pth")
    out = tmp_path / "out.safetensors"
    result = call(convert.main, tmp_path / "tied.pth", "--out", out, *MEAN_AND_STD)
    assert result.code == 0, result.err
    blocks = load_vit(out).blocks
    assert torch.equal(blocks[1].norm1.weight, blocks[0].norm1.weight)


def test_an_error_without_words_has_a_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise EOFError

    path = tmp_path / "model.npz"
    np.savez(path, a=np.zeros(1))
    monkeypatch.setattr(np, "load", fail)
    assert_one_sentence(call(convert.main, path, *MEAN_AND_STD), "read as one (EOFError)")


def test_does_not_overwrite_the_original(tmp_path):
    path = tmp_path / "deit_tiny_patch16_224.safetensors"
    save_file(dict(tiny_vit(**HEAD64).state_dict()), path)
    before = path.read_bytes()
    assert_one_sentence(call(convert.main, path, "--out", path), "--out")
    assert path.read_bytes() == before


def test_does_not_overwrite_the_teacher_of_another_original(tmp_path, monkeypatch):
    """Unless --out names it: Hugging Face has many a model.safetensors."""
    monkeypatch.setattr(convert, "WEIGHTS", tmp_path)
    ours = tmp_path / "model.safetensors"
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    for seed, path in enumerate((first, second)):
        path.parent.mkdir()
        save_file(dict(tiny_vit(seed, **HEAD64).state_dict()), path)
    assert call(convert.main, first, *MEAN_AND_STD).code == 0
    before = ours.read_bytes()
    result = call(convert.main, second, *MEAN_AND_STD)
    assert_one_sentence(result, f"{ours}: expected no teacher, or one converted from {second}, got")
    assert ours.read_bytes() == before
    assert call(convert.main, first, *MEAN_AND_STD).code == 0  # the same again
    assert call(convert.main, second, *MEAN_AND_STD, "--out", ours).code == 0
    assert ours.read_bytes() != before


# ---------------------------------------------------------------------------- the command line


def test_the_command_line(tmp_path):
    """As a user gives it, from the repository's root; it says what it did."""
    path = tmp_path / "deit_tiny_patch16_224.safetensors"
    out = tmp_path / "out.safetensors"
    save_file({**tiny_vit(**HEAD64).state_dict(), "mask_token": torch.zeros(1)}, path)
    result = run_script("weights/convert.py", path, "--out", out, cwd=ROOT)
    assert result.code == 0, result.err
    words = (
        f"sha256 {sha256(path)}",
        "layout timm",
        "dropped mask_token",
        "mean [0.485, 0.456, 0.406]",
        "Apache-2.0",
        "width 128, depth 2, heads 2",
        f"sha256 {load_vit(out).sha256}",
    )
    for word in words:
        assert word in result.out


def test_wrong_arguments():
    assert_one_sentence(call(convert.main), "file")
    assert_one_sentence(call(convert.main, "a.pth", "--mean", 1), "--mean")
