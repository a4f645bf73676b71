"""The float and the annotated values of one program, node by node over all samples: what every calibrated correction reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ...ir.data import Sample
from ...ir.program import Program
from ...ir.verify import FAKE
from . import operators as ops
from .encoding import is_fake_quantize


def is_quantized_layer(node: fx.Node) -> bool:
    """A convolution or linear layer whose weight is fake-quantized or behind a table."""
    if node.target not in (ops.CONVOLUTION, ops.LINEAR):
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and weight.target in FAKE


def output_errors(original: Program, corrected: Program, samples: tuple[Sample, ...]) -> tuple[float, float]:
    """Squared error of both programs' outputs against the float outputs, relative to the squared float outputs."""
    exact = original.clone()
    for node in list(exact.nodes):
        if node.target in FAKE:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    exact.sweep()
    signal, errors = 0.0, [0.0, 0.0]
    for sample in samples:
        expected = [o.to(torch.float64) for o in exact(*sample)]
        signal += sum(float(e.square().sum()) for e in expected)
        for index, program in enumerate((original, corrected)):
            errors[index] += sum(float((o - e).square().sum()) for o, e in zip(program(*sample), expected, strict=True))
    return errors[0] / max(signal, 1e-300), errors[1] / max(signal, 1e-300)


@dataclass
class SideBySide:
    """Runs a program twice at once: as it is (`values`), and with fake quantization bypassed (`exact`: the float model).

    Annotation leaves the weights untouched, so bypassing it gives the float model. Values go by node and sample; each is dropped
    after its last reader, so that a few activations are in memory.
    """

    program: Program
    samples: tuple[Sample, ...]
    progress: Callable[[int, int, str], None]
    what: str
    values: dict[fx.Node, list[Any]] = field(default_factory=dict)
    exact: dict[fx.Node, list[Any]] = field(default_factory=dict)

    def nodes(self) -> Iterator[fx.Node]:
        """Every node once its values are there, with those of its inputs.

        The caller may replace a node's values, or rewrite what it reads and ask for them again (`redo`), before it goes on.
        """
        last_reader = {a: n for n in self.program.nodes for a in n.all_input_nodes}
        nodes = [n for n in self.program.nodes if n.op != "output"]
        for index, node in enumerate(nodes):
            with torch.no_grad():
                self.exact[node] = self._evaluate(node, self.exact, bypass=True)
                self.values[node] = self._evaluate(node, self.values, bypass=False)
            yield node
            for read in (node, *node.all_input_nodes):
                if last_reader.get(read, node) is node:
                    self.exact.pop(read, None)
                    self.values.pop(read, None)
            self.progress(index + 1, len(nodes), self.what)

    def layers(self) -> Iterator[fx.Node]:
        """The layers whose weights have codes of an encoding."""
        return (n for n in self.nodes() if is_quantized_layer(n) and is_fake_quantize(n.args[1]))  # type: ignore[arg-type]

    def redo(self, layer: fx.Node) -> None:
        """Makes the annotated values of a layer anew, from the weight and bias it reads now."""
        with torch.no_grad():
            for node in (layer.args[1], (*layer.args, None)[2]):
                if isinstance(node, fx.Node):
                    for read in (*node.all_input_nodes, node):
                        self.values[read] = self._evaluate(read, self.values, bypass=False)
            self.values[layer] = self._evaluate(layer, self.values, bypass=False)

    def _evaluate(self, node: fx.Node, known: dict[fx.Node, list[Any]], bypass: bool) -> list[Any]:
        """The values of `node` on every sample, given those of its inputs."""
        count = len(self.samples)
        if node.op == "placeholder":
            position = self.program.inputs.index(node)
            return [sample[position] for sample in self.samples]
        if node.op == "get_attr":
            return [self.program.parameter(node)] * count
        if bypass and node.target in FAKE:
            return known[node.args[0]]  # type: ignore[index]
        constant = all(n.op == "get_attr" for n in node.all_input_nodes)
        results = []
        for index in range(1 if constant else count):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n, i=index: known[n][i])  # type: ignore[misc]
            results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return results * count if constant else results
