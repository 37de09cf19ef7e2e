"""Convolutional networks as sources of tokens, so that Eqs. 1 to 3 and 7 to 10 apply to them unchanged.

The output of a stage, (B, D, h, w), becomes a token per position and, in front of them, their mean, which stands for the class token: (B, 1 + hw, D).
Width and number of tokens differ from stage to stage, which Eq. 4 does not allow; so these networks train without the Gram term.

Another backbone is one class with one method, which returns a torchvision network and its stages in order.
"""
import math

import torch
import torchvision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vit import IMAGENET_MEAN, IMAGENET_STD, ViT, sha256


class Backbone(nn.Module):
    """What `vitad.Distillation` needs of a teacher, and of its student, which is built from `config`: blocks, image_size, prepare, forward.

    image_size: pixels a side. tensors: weights by torchvision's key names, or None for random ones. found: width and grid of the last stage, which
    the teacher found when it was built, and its student finds again.
    """

    def __init__(self, image_size=224, tensors=None, **found):
        super().__init__()
        network, stages = self.build()
        if tensors is not None:
            fill(network, stages, tensors)
        self.image_size, self.blocks = image_size, nn.ModuleList(stages)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        last = len(stages) - 1
        with torch.no_grad():
            tokens, width = self(torch.zeros(1, 3, image_size, image_size), (last,))[last][0].shape
        self.config = dict(image_size=image_size, width=width, grid=math.isqrt(tokens - 1))

    def build(self):
        """-> (network, its stages in order)"""
        raise NotImplementedError

    prepare = ViT.prepare

    def forward(self, images, layers):
        """Normalised images (B, 3, S, S) -> {c: tokens of stage c (B, 1 + hw, D) for c in layers}, stages counted from 0."""
        # Batch normalisation, where there is one, takes the batch's statistics while a student learns, and the running ones for teachers and scores.
        self.train(torch.is_grad_enabled())
        # Channels last in memory: on a CPU in bf16 VGG16 (ResNet18) goes forward 1.3 (1.4) times as fast, and trains 1.1 (1.2) times as fast.
        features, x = {}, images.contiguous(memory_format=torch.channels_last)
        for c, stage in enumerate(self.blocks[:max(layers) + 1]):
            x = stage(x)
            if c in layers:
                tokens = x.flatten(2).mT
                features[c] = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        return features


class VGG16(Backbone):
    """Tapped behind each of its five poolings."""

    def build(self):
        network = torchvision.models.vgg16()
        f = network.features
        return network, [f[:5], f[5:10], f[10:17], f[17:24], f[24:31]]


class ResNet18(Backbone):
    """Tapped behind each of its four residual stages; the stem belongs to the first."""

    def build(self):
        n = torchvision.models.resnet18()
        return n, [nn.Sequential(n.conv1, n.bn1, n.relu, n.maxpool, n.layer1), n.layer2, n.layer3, n.layer4]


BACKBONES = {"vgg16": VGG16, "resnet18": ResNet18}


def fill(network, stages, tensors):
    """Load weights into a network; ValueError if one is missing that the stages hold, or has another shape."""
    names = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    held = {id(x) for stage in stages for x in (*stage.parameters(), *stage.buffers())}
    for name, x in names.items():
        if id(x) in held and x.ndim and name not in tensors:  # without dimensions is a counter, which eval() does not look at
            raise ValueError(f"expected a tensor {name} of shape {tuple(x.shape)}, got none")
    try:
        network.load_state_dict({name: x.float() for name, x in tensors.items() if name in names}, strict=False)
    except RuntimeError as error:
        raise ValueError(f"expected tensors of the network's shapes, got others ({str(error).splitlines()[1].strip()})") from None


def load(name, path, image_size=224):
    """A teacher: the network `name` with the weights of a safetensors file, ImageNet's, by torchvision's key names."""
    try:
        network = BACKBONES[name](image_size, load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: expected weights of torchvision's {name}: {error}; ablations/README.md says how to get them") from None
    network.metadata, network.sha256 = {"name": name, "image_size": image_size}, sha256(path)
    return network
