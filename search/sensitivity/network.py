"""A float program as a function of its weights and activations that torch can differentiate, over many samples at once.

Programs have a fixed batch, often 1, baked into their reshapes. Samples are therefore batched by `torch.func.vmap`, which runs
each op once for all of them, and not by rewriting the graph. Curvature comes from forward-mode over reverse-mode
differentiation: unlike a double backward, that needs no second derivative of a grouped convolution, which torch computes group by
group.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from ...ir.errors import GraphwrightError
from ...ir.program import Program
from .base import Layer

Values = dict[fx.Node, Any]


class NotDifferentiableError(GraphwrightError):
    """A program holds an op that torch cannot differentiate as a scorer needs. Names the op and scorers that do without."""


class Network:
    """One sample's way through a program. Weights are named by their layer's origin.

    Args:
        program: float; never written to.
        layers: those whose weights are variables.
    """

    def __init__(self, program: Program, layers: Iterable[Layer]) -> None:
        self.program = program
        self.layers = tuple(layers)
        self.parameter_nodes: dict[str, list[fx.Node]] = {}
        for layer in self.layers:
            target = layer.node.args[1].target  # type: ignore[union-attr]
            self.parameter_nodes[layer.origin] = [n for n in program.nodes if n.op == "get_attr" and n.target == target]
        #: Origin -> float weight.
        self.weights = {layer.origin: layer.weight for layer in self.layers}
        self._nodes = [n for n in program.nodes if n.op != "output"]

    def values(
        self,
        inputs: Iterable[torch.Tensor],
        weights: Mapping[str, torch.Tensor] | None = None,
        offsets: Mapping[fx.Node, torch.Tensor] | None = None,
    ) -> Values:
        """The value of every node on one sample; `weights` replace the program's, `offsets` are added to what nodes compute."""
        found: Values = dict(zip(self.program.inputs, inputs, strict=True))
        found.update(self._replaced(weights or {}))
        for node in self._nodes:
            if node not in found:
                found[node] = self._compute(node, found)
            if offsets and node in offsets:
                found[node] = found[node] + offsets[node]
        return found

    def replay(self, values: Values, weights: Mapping[str, torch.Tensor]) -> Values:
        """`values` with other weights: only what depends on them is computed again."""
        found = values | self._replaced(weights)
        stale = set(self._replaced(weights))
        for node in self._nodes:
            if node.op == "call_function" and not stale.isdisjoint(node.all_input_nodes):
                stale.add(node)
                found[node] = self._compute(node, found)
        return found

    def _replaced(self, weights: Mapping[str, torch.Tensor]) -> Values:
        return {node: weight for origin, weight in weights.items() for node in self.parameter_nodes[origin]}

    def _compute(self, node: fx.Node, found: Values) -> Any:
        if node.op == "get_attr":
            value = self.program.parameter(node)
            assert value is not None
            return value.detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: found[n])  # type: ignore[misc]
        return node.target(*args, **kwargs)  # type: ignore[operator]


@contextlib.contextmanager
def differentiable(program: Program, scorer: str) -> Iterator[None]:
    """Turns torch's refusals into NotDifferentiableError."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        text = str(error)
        if not re.search(r"derivative|forward AD|forward-mode|batching rule|not implemented|autograd", text):
            raise
        raise NotDifferentiableError(
            f"scorer {scorer} cannot differentiate '{program.name}'{_culprit(program, text)}: {text.splitlines()[0]}; "
            "sqnr and output-distortion need no derivatives"
        ) from error


def _culprit(program: Program, text: str) -> str:
    """The op of the program that an error text speaks of."""
    for node in program.nodes:
        name = str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""
        if name and name in text:
            return f" because of {node.target} at '{node.name}' (from {node.meta.get('origin') or 'unknown'})"
    return ""
