"""ResNet-50 (He et al., "Deep Residual Learning for Image Recognition", 2016, table 1) with random weights, to measure latency.

The stride of a stage stands in its first 3x3 convolution instead of the 1x1 before it ("v1.5", as most published latencies have
it). The weights come from one seed and mean nothing: what classes this network names says nothing about accuracy.
"""

from __future__ import annotations

import torch
from torch import nn

from .random_weights import randomized

#: (width, repeats, stride of the first block) of each stage; a block's output has EXPANSION times its width.
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
EXPANSION = 4
SEED = 50


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; a 1x1 convolution shortcut where the shape changes (option B).

    Input `(N, in_channels, H, W)`, output `(N, 4 width, H / stride, W / stride)`.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = width * EXPANSION
        self.reduce = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.spatial = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.expand = nn.Sequential(nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.expand(self.spatial(self.reduce(x))) + self.shortcut(x))


class ResNet50(nn.Module):
    """Input `(N, 3, 224, 224)` float32, output `(N, 1000)` logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        channels = 64
        for width, repeats, first_stride in STAGES:
            for index in range(repeats):
                blocks.append(Bottleneck(channels, width, first_stride if index == 0 else 1))
                channels = width * EXPANSION
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(x, 1))


def random_resnet50() -> ResNet50:
    return randomized(ResNet50(), SEED, lambda module: module.expand[1] if isinstance(module, Bottleneck) else None)
