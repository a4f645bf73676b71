"""ResNet-20 and MobileNetV2 with four times their channels and random weights, to measure what pruning does to latency.

The small networks leave kernels too little to do: at 16 channels a run is as much overhead as arithmetic. Sixteen times the
arithmetic shows what cut channels save. The weights come from one seed and mean nothing.
"""

from __future__ import annotations

from torch import nn

from .mobilenetv2 import InvertedResidual, MobileNetV2
from .random_weights import randomized
from .resnet import BasicBlock, ResNet20

WIDTH = 4
SEED = 4


def wide_resnet20() -> nn.Module:
    """ResNet-20 of 64, 128 and 256 channels."""
    return randomized(ResNet20(width=WIDTH), SEED, _last_norm)


def wide_mobilenetv2() -> nn.Module:
    """The small MobileNetV2 of 64 to 384 channels between its blocks, up to 2,304 inside them."""
    return randomized(MobileNetV2(width=WIDTH), SEED, _last_norm)


def _last_norm(module: nn.Module) -> nn.Module | None:
    if isinstance(module, BasicBlock):
        return module.bn2
    return module.layers[-1] if isinstance(module, InvertedResidual) else None
