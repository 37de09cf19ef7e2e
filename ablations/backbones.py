"""Convolutional networks as sources of tokens, so that Eqs. 1 to 3 and 7 to 10 apply unchanged.

The output of a stage, (B, D, h, w), becomes a token per position. In front of them stands their
mean, in place of the class token: (B, 1 + hw, D). Width and number of tokens differ from stage to
stage, which Eq. 4 does not allow, so these networks train without the Gram term.

Another backbone is one class with one method, which returns a torchvision network and its stages.
"""

import math

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from runs import UserError
from vit import IMAGENET_MEAN, IMAGENET_STD, ViT, not_finite, sha256


class Backbone(nn.Module):
    """What `vitad.Distillation` needs of a teacher: config, blocks, image_size, prepare, forward.

    image_size: pixels a side. tensors: weights by torchvision's names, or None for random ones.
    found: width and grid of the last stage, which a student is given and finds again.
    """

    def __init__(self, image_size=224, tensors=None, **found):
        super().__init__()
        network, stages = self.build()
        if tensors is not None:
            fill(network, tensors)
        self.image_size = image_size
        self.blocks = nn.ModuleList(stages)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        last = len(stages) - 1
        with torch.no_grad():
            features = self(torch.zeros(1, 3, image_size, image_size), (last,))
        _, tokens, width = features[last].shape
        self.config = {"image_size": image_size, "width": width, "grid": math.isqrt(tokens - 1)}

    def build(self):
        """-> (network, its stages in order)"""
        raise NotImplementedError

    prepare = ViT.prepare

    def forward(self, images, layers):
        """Prepared images (B, 3, S, S) -> {c: tokens of stage c, (B, 1 + hw, D), for c in layers}.

        Stages count from 0.
        """
        # Batch normalisation takes the batch's statistics while a student learns, running ones
        # for teachers and scores.
        self.train(torch.is_grad_enabled())
        # Channels last in memory are 1.1 to 1.4 times as fast on a CPU in bf16.
        x = images.contiguous(memory_format=torch.channels_last)
        features = {}
        for c, stage in enumerate(self.blocks[: max(layers) + 1]):
            x = stage(x)
            if c in layers:
                tokens = x.flatten(2).mT  # (B, hw, D)
                features[c] = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        return features


class VGG16(Backbone):
    """Tapped behind each of its five poolings."""

    least_size = 32  # pixels a side: one position behind the last

    def build(self):
        network = torchvision.models.vgg16()
        network.classifier = nn.Identity()
        f = network.features
        return network, [f[:5], f[5:10], f[10:17], f[17:24], f[24:31]]


class ResNet18(Backbone):
    """Tapped behind each of its four residual stages. The stem belongs to the first."""

    least_size = 33  # 2 x 2 positions: batch normalisation of one image needs more than one

    def build(self):
        n = torchvision.models.resnet18()
        n.fc = nn.Identity()
        first = nn.Sequential(n.conv1, n.bn1, n.relu, n.maxpool, n.layer1)
        return n, [first, n.layer2, n.layer3, n.layer4]


BACKBONES = {"vgg16": VGG16, "resnet18": ResNet18}


def fill(network, tensors):
    """Load weights into a network; all that it holds have to be there, others are left out."""
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"expected finite weights, got {broken}")
    try:
        missing = network.load_state_dict(tensors, strict=False).missing_keys
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(
            f"expected tensors of the network's shapes, got others ({reason})"
        ) from None
    if missing:
        raise UserError(f"expected a tensor {missing[0]}, got none")


def load(name, path, image_size=224):
    """A teacher: the network `name` with ImageNet weights in torchvision's names."""
    try:
        network = BACKBONES[name](image_size, load_file(path))
    except (OSError, SafetensorError, UserError) as error:
        raise UserError(
            f"{path}: expected weights of torchvision's {name}: {error}; "
            f"ablations/README.md says how to get them"
        ) from None
    network.metadata = {"name": name, "image_size": image_size}
    network.sha256 = sha256(path)
    return network
