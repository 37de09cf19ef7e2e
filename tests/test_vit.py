"""vit.py against torchvision's vit_b_16 block by block, and against timm's numbers on real weights.

Also what load_vit reads, and what it refuses.
"""

import functools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import vit_b_16

from conftest import perturb, save_vit, shared, tiny_vit
from runs import WEIGHTS
from vit import ViT, load_vit, quick_gelu
from weights import convert

BOUND = 3e-5  # largest absolute difference over mean absolute value, fp32


def error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().mean()).item()


def test_parameter_count():
    with torch.device("meta"):
        assert sum(p.numel() for p in ViT(classes=1000).parameters()) == 86_567_656


@pytest.fixture(scope="module")
def torchvision_vit():
    """torchvision's ViT-B/16 with random weights: an input, each block's output, the logits."""
    torch.manual_seed(0)
    model = perturb(vit_b_16(weights=None), scale=0.03).eval()
    images = torch.randn(2, 3, 224, 224)
    blocks = []
    for block in model.encoder.layers:
        block.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    with torch.no_grad():
        logits = model(images)
    return SimpleNamespace(state=model.state_dict(), images=images, blocks=blocks, logits=logits)


def ours_from(torchvision_vit):
    tensors, _, _ = convert.canonical(torchvision_vit.state)
    with torch.device("meta"):
        vit = ViT(classes=1000)
    vit.load_state_dict(tensors, strict=True, assign=True)
    return vit.eval()


def block_errors(vit, torchvision_vit, count=12):
    with torch.no_grad():
        features = vit(torchvision_vit.images, range(count))
    return [error(features[c], torchvision_vit.blocks[c]) for c in range(count)]


def test_every_block_equals_torchvision(torchvision_vit):
    vit = ours_from(torchvision_vit)
    assert max(block_errors(vit, torchvision_vit)) <= BOUND
    with torch.no_grad():
        assert error(vit.classify(torchvision_vit.images), torchvision_vit.logits) <= BOUND


def mutate_eps(vit):
    for module in vit.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5


def mutate_gelu(vit):
    for block in vit.blocks:
        block.mlp.activation = lambda x: F.gelu(x, approximate="tanh")


def mutate_qk(vit):
    for block in vit.blocks:
        for parameter in (block.attn.qkv.weight, block.attn.qkv.bias):
            q, k, v = parameter.data.chunk(3)
            parameter.data = torch.cat([k, q, v])


@pytest.mark.parametrize("mutate", [mutate_eps, mutate_gelu, mutate_qk])
def test_a_mutated_network_does_not_pass(torchvision_vit, mutate):
    vit = ours_from(torchvision_vit)
    mutate(vit)
    assert max(block_errors(vit, torchvision_vit, count=2)) > 2 * BOUND


def test_forward_gives_the_named_blocks_and_computes_no_more():
    vit = tiny_vit()
    images = torch.randn(2, 3, 224, 224)
    every = vit(images, range(12))
    vit.blocks[7].forward = None  # calling it would fail
    some = vit(images, (2, 6))
    assert list(some) == [2, 6] and some[2].shape == (2, 50, 32)
    assert torch.equal(some[2], every[2]) and torch.equal(some[6], every[6])


@pytest.mark.parametrize(
    "images, layers, words",
    [
        (torch.zeros(1, 3, 128, 128), (1,), "(B, 3, 224, 224), got (1, 3, 128, 128)"),
        (torch.zeros(3, 224, 224), (1,), "got (3, 224, 224)"),
        (torch.zeros(1, 3, 224, 224), (12,), "between 0 and 11, got (12,)"),
        (torch.zeros(1, 3, 224, 224), (-1,), "between 0 and 11"),
        (torch.zeros(1, 3, 224, 224), (), "between 0 and 11"),
    ],
)
def test_forward_refuses(images, layers, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        tiny_vit()(images, layers)


def test_the_patch_projection_stays_float32_under_autocast():
    vit, images = tiny_vit(), torch.rand(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        under = vit.patch_embed(images)
    assert under.dtype == torch.float32 and torch.equal(under, vit.patch_embed(images))


def test_classify_needs_a_head():
    with pytest.raises(ValueError, match="no classifier head"):
        tiny_vit().classify(torch.zeros(1, 3, 224, 224))


def test_quick_gelu_is_clips():
    x = torch.tensor([-1.0, 0.5, 2.0])
    expected = [v / (1 + math.exp(-1.702 * v)) for v in x.tolist()]
    assert quick_gelu(x).tolist() == pytest.approx(expected)


def test_norm_pre_follows_the_position_embedding():
    network, seen = tiny_vit(norm_pre=True), []
    network.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        network(images, (0,))
        tokens = torch.cat([network.cls_token, network.patch_embed(images)], dim=1)
        norm = network.norm_pre
        expected = F.layer_norm(tokens + network.pos_embed, (32,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(seen[0], expected)


def test_class_token_and_position_embedding_begin_at_random():
    vit = ViT(width=512, depth=1, heads=8, patch=32, grid=7, hidden=64)
    for name in ("cls_token", "pos_embed"):
        assert 0.017 < getattr(vit, name).std() < 0.023, name


def test_prepare_normalises():
    vit = tiny_vit(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    pixels = torch.tensor([51, 102, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    expected = torch.tensor([(0.2 - 0.1) / 0.4, (0.4 - 0.2) / 0.5, (1 - 0.3) / 0.6])
    expected = expected.view(1, 3, 1, 1).expand(1, 3, 224, 224)
    torch.testing.assert_close(vit.prepare(pixels), expected)


def test_prepare_takes_bytes_of_any_shape():
    vit = tiny_vit()
    for height, width in ((224, 100), (100, 224)):
        images = torch.zeros(1, 3, height, width, dtype=torch.uint8)
        assert vit.prepare(images).shape == (1, 3, 224, 224)
    with pytest.raises(ValueError, match="expected images as uint8, 0 to 255, got torch.float32"):
        vit.prepare(torch.rand(1, 3, 224, 224))


@pytest.mark.parametrize("low, high", [(80, 176), (0, 256)])
def test_prepare_enlarges_small_images_as_pillow_does(low, high):
    vit = tiny_vit(mean=(0, 0, 0), std=(1, 1, 1))
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(low, high, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ours = vit.prepare(small) * 255
    assert ours.shape == (2, 3, 224, 224)
    for image, pixels in zip(ours, small, strict=True):
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        theirs = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC))
        # Pillow rounds to uint8 after each axis, and cuts what lies beyond 0 and 255.
        difference = np.abs(image.permute(1, 2, 0).numpy() - theirs)
        assert difference.mean() < 0.5 and np.quantile(difference, 0.9) < 1.5
        assert low == 0 or difference.max() < 1.5
        assert image.min() >= 0 and image.max() <= 255


# ---------------------------------------------------------------------------------------- load_vit


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"classes": 5},
        {"norm_pre": True, "activation": "quick_gelu", "eps": 1e-5},
        {"width": 128, "heads": 2, "depth": 3, "patch": 16, "grid": 14},
    ],
)
def test_load_vit_reads_every_size_from_the_file(tmp_path, changes):
    saved = tiny_vit(**changes)
    heads = None if saved.config["width"] == 64 * saved.config["heads"] else saved.config["heads"]
    loaded = load_vit(save_vit(saved, tmp_path / "vit.safetensors", heads=heads))
    assert loaded.config == saved.config
    assert loaded.metadata["source"] == "test" and len(loaded.sha256) == 64
    images, last = torch.randn(1, 3, 224, 224), len(saved.blocks) - 1
    with torch.no_grad():
        assert torch.equal(loaded(images, (last,))[last], saved(images, (last,))[last])


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("dist_token", (1,), "got dist_token"),
        ("blocks.2.mlp.fc2.weight", (32, 65), "blocks.2.mlp.fc2.weight of shape (32, 64), got (32"),
    ],
)
def test_load_vit_refuses_tensors_that_are_not_the_networks(tmp_path, name, shape, words):
    """What else it refuses: test_bad_input.py."""
    about = {"mean": [0.5] * 3, "std": [0.5] * 3, "activation": "gelu", "heads": 2}
    tensors = {**tiny_vit().state_dict(), name: torch.zeros(shape)}
    save_file(tensors, tmp_path / "vit.safetensors", metadata={"vitad": json.dumps(about)})
    with pytest.raises(ValueError) as caught:
        load_vit(tmp_path / "vit.safetensors")
    assert words in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------- real weights, timm's numbers


@pytest.fixture(scope="module")
def real_vit(tmp_path_factory):
    """Name of a file of real weights -> its ViT, converted once."""
    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def convert_and_load(name):
        built = WEIGHTS / "original" / name  # by ../shared/get_clip_vitb16.py
        convert.convert(built if built.exists() else shared(f"weights/{name}"), folder / name)
        return load_vit(folder / name)

    return convert_and_load


def photo(name):
    pixels = np.array(Image.open(shared(f"photos/{name}_224.png")).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    "weights, golden, bound",
    [
        ("deit_tiny_patch16_224.safetensors", "deit_tiny", 1e-4),
        ("dinov2_vits14_fp16.safetensors", "dinov2_vits14", 1e-3),
        ("clip_vit_base_patch16_224.safetensors", "clip_vitb16", 1e-4),
    ],
)
def test_real_weights_give_timms_features(real_vit, weights, golden, bound):
    golden = load_file(shared(f"golden/{golden}_timm_1.0.31.safetensors"))
    vit = real_vit(weights)
    for name, label in (("chelsea", 285), ("coffee", 967)):  # Egyptian cat, espresso
        with torch.no_grad():
            images = vit.prepare(photo(name))
            features = vit(images, (3, 6, 9, 11))
            logits = vit.classify(images)[0] if f"{name}.logits" in golden else None
        for c, x in features.items():
            [key] = [key for key in golden if key.startswith(f"{name}.block{c}.patches_")]
            patches = [1 + int(p) for p in key.rsplit("patches_")[1].split("_")]
            assert error(x[0, 0], golden[f"{name}.block{c}.cls"]) <= bound
            assert error(x[0, patches], golden[key]) <= bound
            assert error(x[0].norm(dim=-1), golden[f"{name}.block{c}.token_norms"]) <= bound
        if logits is not None:
            assert error(logits, golden[f"{name}.logits"]) <= bound
            assert logits.argmax() == label


def test_a_cpu_attends_in_float32(monkeypatch):
    vit, seen = tiny_vit(), []
    attend = F.scaled_dot_product_attention

    def noted(q, k, v):
        seen.append((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    images = torch.randn(1, 3, 224, 224)
    with torch.autocast("cpu", torch.bfloat16):
        vit(images, (1,))
    vit.double()(images.double(), (0,))
    assert seen == [*2 * [3 * (torch.float32,)], 3 * (torch.float64,)]


@pytest.mark.parametrize(
    "weights, bound",
    [("deit_tiny_patch16_224.safetensors", 0.018), ("dinov2_vits14_fp16.safetensors", 0.027)],
)
def test_real_features_survive_bf16(real_vit, weights, bound, monkeypatch):
    """A photo in a black frame, which a patch projection in bf16 would blur.

    Measured at block 11: the error's share of a token's length, the mean over the tokens.
    """
    vit = real_vit(weights)
    photos = photo("chelsea")[:, :, 56:168, 56:168]
    images = vit.prepare(F.pad(photos, (56, 56, 56, 56)))
    with torch.no_grad():
        exact = vit(images, (11,))[11]

    def blurred():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = vit(images, (11,))[11]
        return ((rounded - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()

    assert blurred() <= bound
    in_bf16 = lambda x: vit.patch_embed.proj(x).flatten(2).transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(vit.patch_embed, "forward", in_bf16)
    assert blurred() > bound
