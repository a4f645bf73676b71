"""Random weights for networks that only serve to measure time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)

#: Weight of the last normalization of a branch. Without statistics to normalize by, sixteen additions of unit variance would
#: grow the activations by 2^8; Goyal et al. (arXiv:1706.02677, section 5.1) start training at 0 for the same reason.
BRANCH_SCALE = 0.5


def randomized(model: M, seed: int, last_norm: Callable[[nn.Module], nn.Module | None]) -> M:
    """Weights after He et al., "Delving Deep into Rectifiers" (2015), the same in every process; the model is in eval mode.

    Args:
        last_norm: the last batch normalization of a residual branch, given its block; None for any other module.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
            nn.init.zeros_(module.bias)
        elif (norm := last_norm(module)) is not None:
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.constant_(norm.weight, BRANCH_SCALE)
    return model.eval()
