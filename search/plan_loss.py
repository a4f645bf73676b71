"""What a whole plan loses, measured: every layer's weight rounded to its format at once, everything else float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ir.batch import over_samples
from .sensitivity.base import Task
from .sensitivity.groups import groups_of
from .sensitivity.loss import choose
from .sensitivity.network import Network

#: Samples run at once.
CHUNK = 32


class PlanLoss:
    """The callback of `solvers.evolutionary`: (chosen, samples) -> mean loss of the network on its first samples.

    The loss is the one that scorers take, by default without labels: KL divergence from the float model's class probabilities, or
    the relative squared error of outputs that are no classes. Weights alone are rounded, as scorers of weights do.

    Args:
        task: program, layers, choices and samples; samples come in the order of the task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.network = Network(task.program, task.layers)
        self.loss = choose("auto", task.program)
        self._rounded = [[layer.rounded(choice) for choice in task.choices] for layer in task.layers]
        groups = groups_of(task)
        self._inputs = tuple(torch.cat([group.inputs[i] for group in groups]) for i in range(len(groups[0].inputs)))
        with torch.no_grad():
            parts = [self._run(first, self.samples, self._target) for first in range(0, self.samples, CHUNK)]
        self._targets = tuple(map(torch.cat, zip(*parts, strict=True)))

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self._inputs[0])

    def __call__(self, chosen: Sequence[int], samples: int) -> float:
        weights = {layer.origin: self._rounded[i][c] for i, (layer, c) in enumerate(zip(self.task.layers, chosen, strict=True))}
        samples = min(samples, self.samples)

        def one(inputs: tuple[torch.Tensor, ...], target: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return self.loss.value(self.network.values(inputs, weights), target)

        with torch.no_grad():
            parts = [self._run(first, samples, one, self._targets) for first in range(0, samples, CHUNK)]
        return sum(float(part.double().sum()) for part in parts) / samples

    def _target(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return self.loss.target(self.network.values(inputs), None)

    def _run(self, first: int, end: int, function: Callable[..., Any], *beside: tuple[torch.Tensor, ...]) -> Any:
        """`function` of each of the samples from `first` on, a chunk of them, and what lies beside them."""
        part = slice(first, min(first + CHUNK, end))
        return over_samples(function, *(tuple(x[part] for x in values) for values in (self._inputs, *beside)))
