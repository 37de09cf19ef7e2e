"""weights/convert.py: a ViT written in every public layout, by the rules of that layout's own code, comes back as it was."""
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_one_sentence, perturb, run, save_vit, tiny_vit
from safetensors import safe_open
from safetensors.torch import save_file
from torchvision.models import VisionTransformer

import convert
from vit import Block, load_vit, sha256

OPTIONS = SimpleNamespace(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], activation=None, heads=None, source=None, license=None)
IMAGES = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
HEAD64 = dict(width=128, depth=2, heads=2, patch=32, grid=7, hidden=64)  # width / 64 heads, for layouts that do not tell heads


def options(**changes):
    return SimpleNamespace(**{**vars(OPTIONS), **changes})


def converted(tensors, path, **changes):
    """Save in the format that the suffix names, convert, load."""
    if path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    convert.convert(path, path.with_name("converted.safetensors"), options(**changes))
    return load_vit(path.with_name("converted.safetensors"))


def assert_same(vit, original, exact=True):
    """The same tensors and the same output."""
    assert vit.config["heads"] == original.config["heads"]
    ours, theirs = vit.state_dict(), original.state_dict()
    assert set(ours) == set(theirs)
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)
    with torch.no_grad():
        torch.testing.assert_close(vit(IMAGES, (1,))[1], original(IMAGES, (1,))[1])


def hugging_face(vit, names):
    """timm's names -> those of transformers: `names` is "files" (the hub's) or "modules" (a state_dict since version 5)."""
    attention, mlp, layer = {
        "files": (("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"),
                  ("intermediate.dense", "output.dense"), "encoder.layer"),
        "modules": (("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc2"), "layers"),
    }[names]
    out = {}
    for key, value in vit.state_dict().items():
        part, _, kind = key.rpartition(".")
        if key == "cls_token":
            out["embeddings.cls_token"] = value
        elif key == "pos_embed":
            out["embeddings.position_embeddings"] = value
        elif part == "patch_embed.proj":
            out[f"embeddings.patch_embeddings.projection.{kind}"] = value
        elif part == "norm":
            out[f"layernorm.{kind}"] = value
        elif part == "head":
            out[f"classifier.{kind}"] = value
        else:
            _, i, *rest = part.split(".")
            rest, block = ".".join(rest), f"{layer}.{i}"
            if rest == "attn.qkv":
                for name, third in zip(attention, value.chunk(3)):
                    out[f"{block}.{name}.{kind}"] = third
            else:
                name = {"attn.proj": attention[3], "mlp.fc1": mlp[0], "mlp.fc2": mlp[1], "norm1": "layernorm_before", "norm2": "layernorm_after"}[rest]
                out[f"{block}.{name}.{kind}"] = value
    return out


@pytest.mark.parametrize("names", ["files", "modules"])
@pytest.mark.parametrize("prefix", ["", "vit."])
def test_hugging_face(tmp_path, names, prefix):
    original = tiny_vit(**HEAD64, classes=3)
    tensors = {key if key.startswith("classifier") else prefix + key: value for key, value in hugging_face(original, names).items()}
    assert_same(converted(tensors, tmp_path / "model.safetensors"), original)


def test_hugging_face_without_classifier_drops_the_pooler(tmp_path):
    original = tiny_vit(**HEAD64)
    tensors = {**hugging_face(original, "files"), "pooler.dense.weight": torch.zeros(128, 128), "pooler.dense.bias": torch.zeros(128)}
    assert_same(converted(tensors, tmp_path / "model.safetensors"), original)


@pytest.mark.parametrize("old_names", [False, True])
def test_torchvision(tmp_path, old_names):
    theirs = perturb(VisionTransformer(224, 32, 2, 2, 128, 64, num_classes=3), scale=0.1).eval()
    tensors = theirs.state_dict()
    if old_names:
        tensors = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): value for key, value in tensors.items()}
    ours = converted(tensors, tmp_path / "model.pth")
    with torch.no_grad():
        torch.testing.assert_close(ours.classify(IMAGES), theirs(IMAGES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "teacher"])
def test_timm_deit_mae_and_dino(tmp_path, wrapper):
    original = tiny_vit(**HEAD64)
    tensors = dict(original.state_dict())
    if wrapper == "model":  # MAE's pre-training checkpoint
        tensors.update({"mask_token": torch.zeros(1, 1, 128), "decoder_pos_embed": torch.zeros(1, 50, 64), "decoder_embed.weight": torch.zeros(64, 128)})
    if wrapper == "teacher":  # DINO's full checkpoint
        tensors = {f"backbone.{key}": value for key, value in tensors.items()} | {"head.mlp.0.weight": torch.zeros(4, 128), "head.last_layer.weight_v": torch.zeros(4, 4)}
    vit = converted({wrapper: tensors} if wrapper else tensors, tmp_path / "model.pth")
    assert_same(vit, original)


def google(vit, style):
    """Our tensors -> Flax's: (in, out) kernels, the heads as an axis of their own; `style` names the sub-modules' numbering."""
    heads, width = vit.config["heads"], vit.config["width"]
    attention, mlp, second = {"vision_transformer": ("1", "3", "2"), "big_vision": ("0", "0", "1")}[style]
    out = {"cls": vit.cls_token.detach(), "embedding/kernel": vit.patch_embed.proj.weight.detach().permute(2, 3, 1, 0),
           "embedding/bias": vit.patch_embed.proj.bias.detach(),
           "Transformer/encoder_norm/scale": vit.norm.weight.detach(), "Transformer/encoder_norm/bias": vit.norm.bias.detach(),
           "pos_embedding" if style == "big_vision" else "Transformer/posembed_input/pos_embedding": vit.pos_embed.detach()}
    if vit.head:
        out |= {"head/kernel": vit.head.weight.detach().T, "head/bias": vit.head.bias.detach()}
    for i, block in enumerate(vit.blocks):
        b = f"Transformer/encoderblock_{i}"
        for number, norm in (("0", block.norm1), (second, block.norm2)):
            out |= {f"{b}/LayerNorm_{number}/scale": norm.weight.detach(), f"{b}/LayerNorm_{number}/bias": norm.bias.detach()}
        for name, weight, bias in zip(("query", "key", "value"), block.attn.qkv.weight.detach().chunk(3), block.attn.qkv.bias.detach().chunk(3)):
            a = f"{b}/MultiHeadDotProductAttention_{attention}/{name}"
            out |= {f"{a}/kernel": weight.T.reshape(width, heads, -1), f"{a}/bias": bias.reshape(heads, -1)}
        a = f"{b}/MultiHeadDotProductAttention_{attention}/out"
        out |= {f"{a}/kernel": block.attn.proj.weight.detach().T.reshape(heads, -1, width), f"{a}/bias": block.attn.proj.bias.detach()}
        for n, layer in enumerate((block.mlp.fc1, block.mlp.fc2)):
            out |= {f"{b}/MlpBlock_{mlp}/Dense_{n}/kernel": layer.weight.detach().T, f"{b}/MlpBlock_{mlp}/Dense_{n}/bias": layer.bias.detach()}
    return out


@pytest.mark.parametrize("style", ["vision_transformer", "big_vision"])
@pytest.mark.parametrize("prefix", ["", "opt/target/", "params/"])
def test_google_npz(tmp_path, style, prefix):
    original = tiny_vit(classes=3)  # 2 heads at width 32: this layout tells them
    tensors = {prefix + key: value for key, value in google(original, style).items()}
    assert_same(converted(tensors, tmp_path / "model.npz"), original)


def test_google_in21k_drops_pre_logits_with_its_head(tmp_path):
    original = tiny_vit(classes=3)
    tensors = google(original, "vision_transformer") | {"pre_logits/kernel": torch.zeros(32, 32), "pre_logits/bias": torch.zeros(32)}
    original.head = None
    assert_same(converted(tensors, tmp_path / "model.npz"), original)


def test_dinov2_layer_scale_is_folded_exactly(tmp_path):
    original = tiny_vit(**HEAD64)
    tensors, scales = dict(original.state_dict()), {}
    for i in range(2):
        for n in "12":
            scales[i, n] = tensors[f"blocks.{i}.ls{n}.gamma"] = torch.rand(128, generator=torch.Generator().manual_seed(10 * i + int(n))) + 0.1
    tensors["mask_token"] = torch.zeros(1, 128)
    vit = converted(tensors, tmp_path / "model.pth")

    class Scaled(torch.nn.Module):  # the block with LayerScale, as DINOv2 writes it
        def __init__(self, block, one, two):
            super().__init__()
            self.block, self.one, self.two = block, one, two

        def forward(self, x):
            x = x + self.one * self.block.attn(self.block.norm1(x))
            return x + self.two * self.block.mlp(self.block.norm2(x))

    original.blocks = torch.nn.ModuleList(Scaled(block, scales[i, "1"], scales[i, "2"]) for i, block in enumerate(original.blocks))
    with torch.no_grad():
        torch.testing.assert_close(vit(IMAGES, (1,))[1], original(IMAGES, (1,))[1], rtol=1e-5, atol=1e-5)
    assert isinstance(vit.blocks[0], Block)


def test_position_grid_of_another_size_is_resampled(tmp_path):
    original = tiny_vit(**{**HEAD64, "grid": 12})
    vit = converted(dict(original.state_dict()), tmp_path / "model.pth")
    old = original.pos_embed.detach()
    expected = F.interpolate(old[:, 1:].reshape(1, 12, 12, 128).permute(0, 3, 1, 2), (7, 7), mode="bicubic", antialias=True)
    assert torch.equal(vit.pos_embed[:, :1], old[:, :1])
    assert torch.equal(vit.pos_embed[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 49, 128))


def test_clip_tower(tmp_path):
    original = tiny_vit(**HEAD64, norm_pre=True, activation="quick_gelu", eps=1e-5, classes=4)
    original.patch_embed.proj.bias.data.zero_()
    tensors = {key: value for key, value in original.state_dict().items() if key != "patch_embed.proj.bias"}
    vit = converted(tensors, tmp_path / "model.safetensors", activation="quick_gelu")
    assert vit.config == {**original.config, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    assert_same(vit, original)


def test_clip_of_unknown_origin_needs_the_activation(tmp_path):
    with pytest.raises(ValueError, match="pass --activation"):
        converted(dict(tiny_vit(**HEAD64, norm_pre=True).state_dict()), tmp_path / "model.safetensors")


def test_half_precision_becomes_float32(tmp_path):
    original = tiny_vit(**HEAD64)
    vit = converted({key: value.half() for key, value in original.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(vit, original.half().float())


def test_heads_option(tmp_path):
    original = tiny_vit()
    assert_same(converted(dict(original.state_dict()), tmp_path / "model.safetensors", heads=2), original)


def test_metadata_says_where_it_is_from_and_the_bytes_repeat(tmp_path):
    tensors = dict(tiny_vit(**HEAD64).state_dict())
    save_file(tensors, tmp_path / "deit_tiny_patch16_224.safetensors")  # a known name: no options needed
    digests = set()
    for i in range(4):
        convert.convert(tmp_path / "deit_tiny_patch16_224.safetensors", tmp_path / "out.safetensors", options(mean=None, std=None))
        digests.add(sha256(tmp_path / "out.safetensors"))
    assert len(digests) == 1
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        about = json.loads(file.metadata()["vitad"])
    assert about["mean"] == [0.485, 0.456, 0.406] and about["std"] == [0.229, 0.224, 0.225] and about["license"] == "Apache-2.0"
    assert about["original_sha256"] == sha256(tmp_path / "deit_tiny_patch16_224.safetensors")


def test_table_of_known_checkpoints():
    for name in ("vit_base_patch16_224", "vit_base_patch16_224.orig_in21k_ft_in1k", "vit_base_patch16_224.augreg2_in21k_ft_in1k"):
        assert convert.KNOWN[name][0] == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for name in ("vit_base_patch16_224.dino", "vit_base_patch16_224.mae", "vit_b_16-c867db91", "deit_base_patch16_224", "vit_small_patch14_dinov2"):
        assert convert.KNOWN[name][0][0] == (0.485, 0.456, 0.406)
    assert set(convert.KNOWN_SHA256.values()) <= set(convert.KNOWN) and all(len(digest) == 64 for digest in convert.KNOWN_SHA256)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("kind, words", [
    ("unknown", "--mean R G B --std R G B"),
    ("distilled", "1 + g x g tokens, got 51"),
    ("registers", "register_tokens"),
    ("foreign", "expected the keys of a ViT"),
    ("incomplete", "expected a tensor blocks.1.attn.qkv.weight"),
    ("ours", "a file that vitad wrote"),
    ("pickle", "expected a checkpoint of plain tensors"),
    ("list", "expected a dictionary of tensors, got list"),
    ("text", "expected a checkpoint of plain tensors"),
    ("suffix", "the suffix is none of"),
    ("absent", "no such file"),
    ("npz with objects", "expected a checkpoint of plain tensors"),
])
def test_refuses_in_one_sentence(tmp_path, kind, words):
    vit, path = tiny_vit(**HEAD64), tmp_path / "model.pth"
    tensors = dict(vit.state_dict())
    arguments = [] if kind == "unknown" else ["--mean", "0.5", "0.5", "0.5", "--std", "0.5", "0.5", "0.5"]
    if kind == "distilled":
        tensors["pos_embed"] = torch.zeros(1, 51, 128)
    if kind == "registers":
        tensors["register_tokens"] = torch.zeros(1, 4, 128)
    if kind == "foreign":
        tensors = {"conv1.weight": torch.zeros(1)}
    if kind == "incomplete":
        del tensors["blocks.1.attn.qkv.weight"]
    if kind == "list":
        tensors = [torch.zeros(1)]
    torch.save(tensors, path)
    if kind == "ours":
        path = save_vit(vit, tmp_path / "ours.safetensors")
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious()))
    if kind == "text":
        path.write_text("just words")
    if kind == "suffix":
        path = path.rename(tmp_path / "model.h5")
    if kind == "absent":
        path = tmp_path / "nowhere.pth"
    if kind == "npz with objects":
        path = tmp_path / "model.npz"
        np.savez(path, **{"embedding/kernel": np.array([{"a": 1}], dtype=object)})
    process = run(ROOT / "weights" / "convert.py", path, "--out", tmp_path / "out.safetensors", *arguments, cwd=tmp_path)
    assert_one_sentence(process, words, str(path.name))
    assert not (tmp_path / "executed").exists() and not list(tmp_path.glob("*out.safetensors*"))


def test_does_not_overwrite_the_original(tmp_path):
    path = tmp_path / "deit_tiny_patch16_224.safetensors"
    save_file(dict(tiny_vit(**HEAD64).state_dict()), path)
    before = path.read_bytes()
    assert_one_sentence(run(ROOT / "weights" / "convert.py", path, "--out", path), "--out")
    assert path.read_bytes() == before


def test_says_what_it_did(tmp_path):
    tensors = dict(tiny_vit(**HEAD64).state_dict()) | {"mask_token": torch.zeros(1)}
    save_file(tensors, tmp_path / "deit_tiny_patch16_224.safetensors")
    process = run(ROOT / "weights" / "convert.py", tmp_path / "deit_tiny_patch16_224.safetensors", "--out", tmp_path / "out.safetensors")
    assert process.returncode == 0, process.stderr
    for words in ("layout timm", "dropped mask_token", "mean [0.485, 0.456, 0.406]", "Apache-2.0", "width 128, depth 2, heads 2"):
        assert words in process.stdout
