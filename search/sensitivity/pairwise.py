"""pairwise: what two layers lose together on top of what each loses alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch.func import jvp, vjp

from ...ir.batch import over_samples
from ...ir.errors import OptionError
from ...ir.program import shape_of
from .base import Layer, Scorer, Scores, Task, register
from .groups import Group, choices_key, collect, groups_of
from .loss import Loss, choose
from .network import Network, Values, differentiable
from .statistics import mean_interval, sampled

Outputs = tuple[torch.Tensor, ...]


@register
@dataclass(frozen=True)
class Pairwise(Scorer):
    """loss = 1/2 d_i^T H_ii d_i and pairs = d_i^T H_ij d_j, with d = Q(w) - w: the second-order loss without dropping a block.

    The dependencies between layers that Schaefer et al. 2023, "Augmenting Hessians with inter-layer dependencies for
    mixed-precision post-training quantization" (arXiv:2306.04879), add to single losses, as blocks of one Hessian. H is the
    Gauss-Newton matrix J^T F J (`curvature`), so that all products come from the movements J_i d_i of the outputs: one
    forward-mode run a layer and choice, and no run a pair. Unlike a trace this takes the rounding errors as they are, not as
    noise.

    Options:
        loss: what H is the Hessian of, see `loss`.
        by: `hessian`, or `measurement`: the loss itself with one and with two layers quantized, a run for every two choices of
            every two layers; for small networks and few samples.
        samples: samples used at most.
        strongest: pairs kept at most, the largest terms first; pairs whose interval holds 0 for all choices are left out before.
    """

    name: ClassVar[str] = "pairwise"

    loss: Literal["auto", "self", "squared"] = "auto"
    by: Literal["hessian", "measurement"] = "hessian"
    samples: int = 512
    strongest: int = 256

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        if self.samples < 1 or self.strongest < 0:
            raise OptionError(f"options of {self.name}: samples must be at least 1 and strongest at least 0")
        self.require(task)
        loss = choose(self.loss, task.program)
        network = Network(task.program, task.layers)
        tables = _moved if self.by == "hessian" else _measured

        def one(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            return tables(network, loss, task, network.values(inputs))

        def compute(group: Group) -> np.ndarray:
            with differentiable(task.program, self.name), torch.no_grad():
                return over_samples(one, group.inputs).double().mean(0).numpy()

        # Which pairs are kept does not change what is computed.
        values, sizes = collect(task, replace(self, strongest=0), groups_of(task, self.samples), compute, (choices_key(task),))
        layers, choices = len(task.layers), len(task.choices)
        single = values.diagonal(axis1=1, axis2=2).reshape(-1, layers, choices)
        scores = sampled(self.name, task, single, sizes, 0.0)
        pairs = self._strongest(*mean_interval(values, sizes), layers, choices)
        return replace(scores, pairs=pairs, seconds=time.perf_counter() - start)

    def _strongest(self, mean: np.ndarray, width: np.ndarray, layers: int, choices: int) -> dict[tuple[int, int], np.ndarray]:
        found = {}
        for i in range(layers):
            for j in range(i + 1, layers):
                block = np.s_[i * choices : (i + 1) * choices, j * choices : (j + 1) * choices]
                if (np.abs(mean[block]) > width[block]).any():
                    found[i, j] = mean[block]
        strongest = sorted(found, key=lambda pair: -float(np.abs(found[pair]).max()))[: self.strongest]
        return {pair: found[pair] for pair in sorted(strongest)}


def _errors(task: Task) -> list[tuple[Layer, torch.Tensor]]:
    """Every layer's rounding error in every choice, layers first."""
    return [(layer, layer.rounded(choice) - layer.weight) for layer in task.layers for choice in task.choices]


def _moved(network: Network, loss: Loss, task: Task, values: Values) -> torch.Tensor:
    """(layers x choices, layers x choices) for one sample: half of |B^T J d|^2 on the diagonal, products beside."""
    shapes = [torch.zeros(shape_of(node)) for node in loss.nodes]
    transposed = vjp(lambda signs: loss.root(values, signs), tuple(shapes))[1]
    rows = []
    for layer, error in _errors(task):

        def outputs(weight: torch.Tensor, layer: Layer = layer) -> Outputs:
            moved = network.replay(values, {layer.origin: weight})
            return tuple(moved[node] for node in loss.nodes)

        movement = jvp(outputs, (layer.weight,), (error,))[1]
        rows.append(torch.cat([part.flatten() for part in transposed(movement)[0]]))
    matrix = torch.stack(rows)
    products = matrix @ matrix.T
    return products - 0.5 * torch.diag_embed(products.diagonal())


def _measured(network: Network, loss: Loss, task: Task, values: Values) -> torch.Tensor:
    """The same table from the loss itself; zero below the blocks of the diagonal."""
    target = loss.target(values, None)
    base = loss.value(values, target)
    weights = [(layer, layer.rounded(choice)) for layer in task.layers for choice in task.choices]
    alone = [network.replay(values, {layer.origin: weight}) for layer, weight in weights]
    singles = [loss.value(moved, target) - base for moved in alone]
    zero = torch.zeros_like(base)
    rows = []
    for a, (first, _) in enumerate(weights):
        row = []
        for b, (second, weight) in enumerate(weights):
            if a == b:
                row.append(singles[a])
            elif b < a or first is second:
                row.append(zero)
            else:
                both = loss.value(network.replay(alone[a], {second.origin: weight}), target) - base
                row.append(both - singles[a] - singles[b])
        rows.append(torch.stack(row))
    return torch.stack(rows)
