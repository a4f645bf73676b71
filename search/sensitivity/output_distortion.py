"""output-distortion: what the network's output loses with one layer quantized at a time, measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import fx

from ...ir.batch import over_samples
from .base import Layer, Scorer, Scores, Task, register
from .groups import Group, choices_key, collect, groups_of
from .loss import LossName, choose, relative_error
from .network import Network, Values
from .statistics import sampled


@register
@dataclass(frozen=True)
class OutputDistortion(Scorer):
    """loss = E[loss with Q(w_l) in place of w_l] - E[loss of the float model], everything else float.

    No derivative and no second-order model: one partial forward run a layer, choice and sample, from the layer on. With `self`
    this is the KL divergence of the class probabilities, with `labels` the true increase of the cross entropy.

    Options:
        loss: what is measured, see `loss`.
        at: `outputs`, or `layers`: ||y - y_float||^2 / ||y_float||^2, averaged over the outputs of all layers and of the network
            (0 before the quantized layer). That is the distance of Model Compression Toolkit's mixed-precision search (Habi et
            al. 2021, arXiv:2109.09113), its interest points weighted equally. `loss` does not count then.
        samples: samples used at most.
    """

    name: ClassVar[str] = "output-distortion"

    loss: LossName = "auto"
    at: Literal["outputs", "layers"] = "outputs"
    samples: int = 512

    @property
    def wants_labels(self) -> bool:
        return self.loss == "labels" and self.at == "outputs"

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        loss = choose(self.loss, task.program)
        self.require(task)
        network = Network(task.program, task.layers)
        points = [*(layer.node for layer in task.layers), *task.program.outputs]

        def one(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
            values = network.values(inputs)
            if self.at == "outputs":
                target = loss.target(values, labels)
                base = loss.value(values, target)
                rows = [[loss.value(v, target) - base for v in _quantized(network, values, layer, task)] for layer in task.layers]
            else:
                rows = [
                    [_mean_error(v, values, points) for v in _quantized(network, values, layer, task)] for layer in task.layers
                ]
            return torch.stack([torch.stack(row) for row in rows])

        def compute(group: Group) -> np.ndarray:
            with torch.no_grad():
                return over_samples(one, group.inputs, group.labels).double().mean(0).numpy()

        values, sizes = collect(task, self, groups_of(task, self.samples), compute, (choices_key(task),))
        return sampled(self.name, task, values, sizes, time.perf_counter() - start)


def _quantized(network: Network, values: Values, layer: Layer, task: Task) -> Iterator[Values]:
    """The network's values with `layer` in each choice."""
    return (network.replay(values, {layer.origin: layer.rounded(choice)}) for choice in task.choices)


def _mean_error(values: Values, exact: Values, points: list[fx.Node]) -> torch.Tensor:
    return torch.stack([relative_error(values[p], exact[p]) for p in points]).mean()
