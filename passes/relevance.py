"""Layer-wise relevance propagation as gradients: the local rules that replace the nonlinear parts of a network.

Relevance is gradient times value in a network whose values are the program's and whose gradients follow the rules (Bach et al.
2015; Montavon et al. 2019, section 10.2; for attention and layer norm Ali et al. 2022, arXiv:2202.07304):

    convolution, linear   epsilon rule: R_j = sum_k a_j w_jk / (z_k + epsilon rms(z) sign z_k) R_k
    relu, gelu, ...       R passes through: f(x) = x * constant
    softmax, sigmoid      constants; layer norm: its deviation is a constant
    product               one half to each factor that is no constant
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..ir.program import Program
from .quantize import operators as ops

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


class RelevanceRules:
    """The rules for the nodes of one program.

    Args:
        epsilon: of the convolutions' and linear layers' rule; larger values keep the strongest contributions only.
    """

    def __init__(self, program: Program, epsilon: float) -> None:
        self.epsilon = epsilon
        #: Nodes that relevance can flow through: they depend on an input other than through a gate.
        self.live: set[fx.Node] = set(program.inputs)
        for node in program.nodes:
            if node.op == "call_function" and node.target not in _GATES and not self.live.isdisjoint(node.all_input_nodes):
                self.live.add(node)

    def apply(self, node: fx.Node, value: Any, found: Mapping[fx.Node, Any]) -> Any:
        """`value`, which the node computed from `found`, with the gradient of its rule."""
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


def _layer_norm(node: fx.Node, found: Mapping[fx.Node, Any]) -> torch.Tensor:
    """Layer normalization with a constant deviation, up to its bias."""
    args: list[Any] = [found[a] if isinstance(a, fx.Node) else a for a in node.args]
    x, shape, weight = args[0], args[1], args[2] if len(args) > 2 else None
    epsilon = float(node.args[4]) if len(node.args) > 4 else float(node.kwargs.get("eps", 1e-5))  # type: ignore[arg-type]
    dims = list(range(-len(shape), 0))
    centered = x - x.mean(dims, keepdim=True)
    normalized = centered / (centered.square().mean(dims, keepdim=True) + epsilon).sqrt().detach()
    return normalized if weight is None else normalized * weight
