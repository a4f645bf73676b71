"""ResNet-20 for 28x28 grey images (He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2)."""

from __future__ import annotations

import torch
from torch import nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution shortcut where the shape changes (option B).

    Input `(N, in_channels, H, W)`, output `(N, out_channels, H / stride, W / stride)`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet20(nn.Module):
    """The CIFAR ResNet of depth `6 n + 2` with `n = 3`, its first convolution taking one channel.

    Input `(N, 1, 28, 28)` float32, output `(N, 10)` logits; stages of 16, 32 and 64 channels, times `width`, at 28, 14 and 7
    pixels.
    """

    def __init__(self, classes: int = 10, width: int = 1) -> None:
        super().__init__()
        channels = 16 * width
        self.conv = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        blocks: list[nn.Module] = []
        for stage, first_stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(3):
                blocks.append(BasicBlock(channels, stage * width, first_stride if index == 0 else 1))
                channels = stage * width
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.pool(self.blocks(x))
        return self.classifier(torch.flatten(x, 1))
