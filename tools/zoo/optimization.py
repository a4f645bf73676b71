"""What training the reference models shares: weight decay groups, learning rate schedule, moving average, mixed precision."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_EMA_DECAY = 0.9995
_WARMUP = 0.05


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and kernels; leave biases, normalization and position vectors alone."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and name != "position"]
    rest = [p for name, p in model.named_parameters() if p.ndim <= 1 or name == "position"]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def cosine_schedule(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over the first 5% of `total` steps, then half a cosine down to zero."""
    warmup = max(1, round(_WARMUP * total))
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total))),
    )


class WeightAverage:
    """Exponential moving average of parameters and float buffers, its decay ramped up over the first steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._source = [value for value in model.state_dict().values() if value.is_floating_point()]
        self._target = [value for value in self.model.state_dict().values() if value.is_floating_point()]
        self._steps = 0

    def update(self) -> None:
        self._steps += 1
        decay = min(_EMA_DECAY, (1 + self._steps) / (10 + self._steps))
        get_ema_multi_avg_fn(decay)(self._target, self._source, self._steps)


def autocast(device: torch.device) -> AbstractContextManager:
    """bfloat16 products on a GPU, float32 on the CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
