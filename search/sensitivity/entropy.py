"""entropy: how much information a layer's activations carry, times the noise of its weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from ...ir.batch import over_samples
from .base import Scorer, Scores, Task, register
from .groups import Group, collect, groups_of, layers_key
from .layers import activation_of
from .network import Network
from .sqnr import noise_to_signal
from .statistics import sampled

#: Activations are counted in as many bins as an 8-bit encoding has codes.
BINS = 256


@register
@dataclass(frozen=True)
class Entropy(Scorer):
    """loss = entropy(a_l) ||Q(w_l) - w_l||^2 / ||w_l||^2, with the entropy in bits of the layer's output in 256 equal bins.

    Layers whose feature maps carry more information deserve more bits, as in Sun et al. 2022, "Entropy-driven mixed-precision
    quantization for deep network design" (NeurIPS), section 3.2. A constant output has entropy 0 and no cost. It needs one
    forward run and no derivative, and knows nothing of what the network does with the information.
    """

    name: ClassVar[str] = "entropy"

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        self.require(task)
        network = Network(task.program, task.layers)
        nodes = [activation_of(layer) for layer in task.layers]

        def one(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
            values = network.values(inputs)
            return [values[node] for node in nodes]

        def compute(group: Group) -> np.ndarray:
            with torch.no_grad():
                return np.array([bits(value) for value in over_samples(one, group.inputs)])

        values, sizes = collect(task, self, groups_of(task), compute, (layers_key(task),))
        losses = values[:, :, None] * noise_to_signal(task)
        return sampled(self.name, task, losses, sizes, time.perf_counter() - start)


def bits(value: torch.Tensor) -> float:
    """Entropy in bits of a tensor's values, counted in `BINS` equal bins between its smallest and largest."""
    low, high = (float(v) for v in torch.aminmax(value))
    if low == high:
        return 0.0
    share = torch.histc(value.float(), BINS, low, high).double() / value.numel()
    return float(-torch.special.xlogy(share, share).sum() / np.log(2))
