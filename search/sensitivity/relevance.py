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
from ...passes.quantize import operators as ops
from .base import Layer, Scorer, Scores, Task, register
from .groups import Group, collect, groups_of, layers_key
from .loss import SelfLoss, choose
from .network import Network, Values, differentiable
from .sqnr import noise_to_signal
from .statistics import sampled

aten = torch.ops.aten

_LINEAR = frozenset({ops.CONVOLUTION, ops.LINEAR})
#: f(x) with f(0) = 0: the relevance of f(x) is that of x.
_THROUGH_ZERO = frozenset(
    {
        aten.gelu.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.tanh.default,
        aten.mish.default,
        aten.elu.default,
        aten.leaky_relu.default,
        aten.erf.default,
        aten.abs.default,
    }
)
#: Gates and weights of sums: constants, so that relevance flows to what they weigh.
_GATES = ops.SOFTMAX | {
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.exp.default,
    aten.softplus.default,
    aten.pow.Tensor_Scalar,
    aten.linalg_vector_norm.default,
}
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
    """A network with the values of the program and the gradients of the rules above."""

    def __init__(self, program: Program, layers: Iterable[Layer], epsilon: float) -> None:
        super().__init__(program, layers)
        self.epsilon = epsilon
        #: Nodes that relevance can flow through: they depend on an input other than through a gate.
        self.live: set[fx.Node] = set(program.inputs)
        for node in program.nodes:
            if node.op == "call_function" and node.target not in _GATES and not self.live.isdisjoint(node.all_input_nodes):
                self.live.add(node)

    def _compute(self, node: fx.Node, found: Values) -> Any:
        value = super()._compute(node, found)
        if node.target in _GATES:
            return value.detach()
        if node.target in _LINEAR:
            # z / (z + e sign z) = |z| / (|z| + e)
            stabilizer = self.epsilon * value.square().mean().sqrt() + _SMALL
            return _with_gradient_of(value, value * (value.abs() / (value.abs() + stabilizer)).detach())
        if node.target in _THROUGH_ZERO or ops.clamp_bounds(node) is not None:
            x = found[node.args[0]]  # type: ignore[index]
            ratio = torch.where(
                x.abs() > _SMALL, value / torch.where(x.abs() > _SMALL, x, torch.ones_like(x)), torch.zeros_like(x)
            )
            return _with_gradient_of(value, x * ratio.detach())
        if node.target is ops.LAYER_NORM:
            return _with_gradient_of(value, _layer_norm(node, found))
        if node.target in (ops.MULTIPLY, *ops.MATMUL) and all(arg in self.live for arg in node.args[:2]):
            a, b = (found[arg] for arg in node.args[:2])  # type: ignore[index]
            halves = node.target(a, b.detach()) + node.target(a.detach(), b)  # type: ignore[operator]
            return _with_gradient_of(value, 0.5 * halves)
        return value


def _with_gradient_of(value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return other + (value - other).detach()


def _layer_norm(node: fx.Node, found: Values) -> torch.Tensor:
    """Layer normalization with a constant deviation, up to its bias."""
    args: list[Any] = [found[a] if isinstance(a, fx.Node) else a for a in node.args]
    x, shape, weight = args[0], args[1], args[2] if len(args) > 2 else None
    epsilon = float(node.args[4]) if len(node.args) > 4 else float(node.kwargs.get("eps", 1e-5))  # type: ignore[arg-type]
    dims = list(range(-len(shape), 0))
    centered = x - x.mean(dims, keepdim=True)
    normalized = centered / (centered.square().mean(dims, keepdim=True) + epsilon).sqrt().detach()
    return normalized if weight is None else normalized * weight
