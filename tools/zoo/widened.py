"""ResNet-20 and MobileNetV2 with four times their channels and random weights, to measure what pruning does to latency.

The small networks leave kernels too little to do: at 16 channels a run is as much overhead as arithmetic. Sixteen times the
arithmetic shows what cut channels save. The weights come from one seed and mean nothing.
"""

from __future__ import annotations

import torch
from torch import nn

from .mobilenetv2 import InvertedResidual, MobileNetV2
from .resnet import BasicBlock, ResNet20
from .resnet50 import BRANCH_SCALE

WIDTH = 4
SEED = 4


def wide_resnet20() -> nn.Module:
    """ResNet-20 of 64, 128 and 256 channels."""
    return _randomized(ResNet20(width=WIDTH))


def wide_mobilenetv2() -> nn.Module:
    """The small MobileNetV2 of 64 to 384 channels between its blocks, up to 2,304 inside them."""
    return _randomized(MobileNetV2(width=WIDTH))


def _randomized(model: nn.Module) -> nn.Module:
    """Weights after He et al., "Delving Deep into Rectifiers" (2015), the same in every process; see `resnet50` for branches."""
    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (BasicBlock, InvertedResidual)):
            last = module.bn2 if isinstance(module, BasicBlock) else module.layers[-1]
            assert isinstance(last, nn.BatchNorm2d)
            nn.init.constant_(last.weight, BRANCH_SCALE)
    return model.eval()
