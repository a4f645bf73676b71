"""A small MobileNetV2 for 28x28 grey images (Sandler et al., "MobileNetV2", 2018, table 2, narrowed and shortened)."""

from __future__ import annotations

import torch
from torch import nn

# (expansion, output channels, repeats, stride of the first repeat)
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 3, 2), (6, 96, 3, 1))
_STEM_CHANNELS = 32
_HEAD_CHANNELS = 512


def _conv_bn(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels)]


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a residual sum where input and output shapes agree.

    Input `(N, in_channels, H, W)`, output `(N, out_channels, H / stride, W / stride)`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv_bn(in_channels, hidden, 1), nn.ReLU6()]
        layers += [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6()]
        layers += _conv_bn(hidden, out_channels, 1)
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """Input `(N, 1, 28, 28)` float32, output `(N, 10)` logits.

    The first convolution keeps the resolution (the images are small); stages run at 28, 14 and 7 pixels. `width` multiplies the
    channels of every stage, of the first convolution and of the last.
    """

    def __init__(self, classes: int = 10, dropout: float = 0.1, width: int = 1) -> None:
        super().__init__()
        channels, head = _STEM_CHANNELS * width, _HEAD_CHANNELS * width
        layers: list[nn.Module] = [*_conv_bn(1, channels, 3), nn.ReLU6()]
        for expansion, stage, repeats, first_stride in _STAGES:
            for index in range(repeats):
                layers.append(InvertedResidual(channels, stage * width, first_stride if index == 0 else 1, expansion))
                channels = stage * width
        layers += [*_conv_bn(channels, head, 1), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(head, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(self.pool(self.features(x)), 1)
        return self.classifier(self.dropout(x))
