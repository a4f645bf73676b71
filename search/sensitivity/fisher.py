"""fisher: the squared gradients of the loss with true labels, times what rounding moves each weight."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from .base import Scorer, Scores, Task, register
from .curvature import Curvature
from .groups import Group, choices_key, collect, groups_of
from .loss import choose
from .network import Network, differentiable
from .statistics import sampled


@register
@dataclass(frozen=True)
class Fisher(Scorer):
    """loss = 1/2 sum over weights of E[g^2] (Q(w) - w)^2, with g the gradient of one sample's cross entropy.

    The diagonal of the empirical Fisher matrix in place of the Hessian's (LeCun et al. 1989, Optimal Brain Damage; Theis et al.
    2018, arXiv:1801.05787, equation 8). Unlike a trace it weighs every weight's own error. It needs labels: with the model's
    own classes the gradient of a sure model is next to nothing (`hessian-trace` needs none).
    """

    name: ClassVar[str] = "fisher"
    needs_labels: ClassVar[bool] = True

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        loss = choose("labels", task.program)
        self.require(task)
        network = Network(task.program, task.layers)
        errors = {
            layer.origin: torch.stack([(layer.rounded(c) - layer.weight).double().square().flatten() for c in task.choices], 1)
            for layer in task.layers
        }

        def compute(group: Group) -> np.ndarray:
            with differentiable(task.program, self.name):
                gradients = Curvature(network, loss, group).gradients()
            rows = [0.5 * g.double().square().mean(0).flatten() @ errors[origin] for origin, g in gradients.items()]
            return torch.stack(rows).numpy()

        values, sizes = collect(task, self, groups_of(task), compute, (choices_key(task),))
        return sampled(self.name, task, values, sizes, time.perf_counter() - start)
