"""relevance: how much a layer contributes to the predicted class, by layer-wise relevance propagation."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import fx
from torch.func import grad

from ...ir.batch import over_samples
from ...ir.errors import OptionError
from ...ir.program import Program, shape_of
from ...passes.relevance import RelevanceRules
from .base import Layer, Scorer, Scores, Task, register
from .groups import Group, collect, groups_of, layers_key
from .loss import SelfLoss, choose
from .network import Network, Values, differentiable
from .sqnr import noise_to_signal
from .statistics import sampled

_SMALL = 1e-9


@register
@dataclass(frozen=True)
class Relevance(Scorer):
    """loss = sum over a layer's outputs of |R| / |y| times ||Q(w_l) - w_l||^2 / ||w_l||^2, R the relevance for the class score y.

    Layer-wise relevance propagation from the predicted class (Bach et al. 2015) gives each layer its contribution, which sets its
    bits, as in Ranjan & Savakis 2024, LRP-QViT (arXiv:2401.11243). Relevance is gradient times value in a network whose nonlinear
    parts are replaced by their local rule (Montavon et al. 2019, section 10.2; for attention and layer norm Ali et al. 2022,
    arXiv:2202.07304):

        convolution, linear   epsilon rule: R_j = sum_k a_j w_jk / (z_k + epsilon rms(z) sign z_k) R_k
        relu, gelu, ...       R passes through: f(x) = x * constant
        softmax, sigmoid      constants; layer norm: its deviation is a constant
        product               one half to each factor that is no constant

    Sums of R are the same for every layer of a chain; sums of |R| are larger where contributions of both signs cancel. A program
    without class scores starts from y = ||outputs||^2.

    Options:
        epsilon: see above; larger values keep the strongest contributions only.
    """

    name: ClassVar[str] = "relevance"

    epsilon: float = 0.25

    def score(self, task: Task) -> Scores:
        start = time.perf_counter()
        values, sizes = self.contributions(task)
        losses = values[:, :, None] * noise_to_signal(task)
        return sampled(self.name, task, losses, sizes, time.perf_counter() - start)

    def contributions(self, task: Task) -> tuple[np.ndarray, np.ndarray]:
        """Sum of |R| / |y| over each layer's outputs, (groups, layers), and the groups' sizes."""
        if self.epsilon < 0:
            raise OptionError(f"option 'epsilon' of {self.name} must be at least 0, not {self.epsilon}")
        self.require(task)
        network = RelevanceNetwork(task.program, task.layers, self.epsilon)
        loss = choose("auto", task.program)
        nodes = [layer.node for layer in task.layers]

        def explained(values: Values) -> torch.Tensor:
            if isinstance(loss, SelfLoss):
                return values[loss.nodes[0]].amax(-1).sum()
            return torch.stack([(values[node] * values[node].detach()).sum() for node in loss.nodes]).sum()

        def one(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
            def run(offsets: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[list[torch.Tensor], torch.Tensor]]:
                values = network.values(inputs, offsets={node: offsets[node.name] for node in nodes})
                y = explained(values)
                return y, ([values[node] for node in nodes], y)

            zeros = {node.name: torch.zeros(shape_of(node)) for node in nodes}
            slopes, (activations, y) = grad(run, has_aux=True)(zeros)
            relevance = [(a * slopes[node.name]).abs().sum() for a, node in zip(activations, nodes, strict=True)]
            return torch.stack(relevance) / y.abs().clamp_min(_SMALL)

        def compute(group: Group) -> np.ndarray:
            with differentiable(task.program, self.name):
                return over_samples(one, group.inputs).double().mean(0).numpy()

        return collect(task, self, groups_of(task), compute, (layers_key(task),))


class RelevanceNetwork(Network):
    """A network with the values of the program and the gradients of `passes.relevance`."""

    def __init__(self, program: Program, layers: Iterable[Layer], epsilon: float) -> None:
        super().__init__(program, layers)
        self.rules = RelevanceRules(program, epsilon)

    def _compute(self, node: fx.Node, found: Values) -> Any:
        return self.rules.apply(node, super()._compute(node, found), found)
