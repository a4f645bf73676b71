"""The float and the annotated values of one program, node by node over all samples: what every calibrated correction reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.data import Sample
from ...ir.program import Program
from ...ir.verify import FAKE
from ..base import PassContext
from ..fold.fold_constants import FoldConstants
from ..layerwise import TwoRuns
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
    quantized = [_folded(original), _folded(corrected)]
    signal, errors = 0.0, [0.0, 0.0]
    for sample in samples:
        expected = [o.to(torch.float64) for o in exact(*sample)]
        signal += sum(float(e.square().sum()) for e in expected)
        for index, program in enumerate(quantized):
            errors[index] += sum(float((o - e).square().sum()) for o, e in zip(program(*sample), expected, strict=True))
    return errors[0] / max(signal, 1e-300), errors[1] / max(signal, 1e-300)


def _folded(program: Program) -> Program:
    """The program with its weights on their grids already: they are quantized once, not once a sample."""
    folded = FoldConstants().run(program.clone(), PassContext()).program
    folded.sweep()
    return folded


@dataclass
class SideBySide(TwoRuns):
    """Runs a program twice at once: as it is (`values`), and with fake quantization bypassed (`exact`: the float model).

    Annotation leaves the weights untouched, so bypassing it gives the float model.
    """

    def layers(self, tables: bool = False) -> Iterator[fx.Node]:
        """The layers whose weights have codes of an encoding; with `tables` also those whose codes are of a table."""
        return (n for n in self.nodes() if is_quantized_layer(n) and (tables or is_fake_quantize(n.args[1])))  # type: ignore[arg-type]

    def redo(self, layer: fx.Node) -> None:
        """Makes the annotated values of a layer anew, from the weight and bias it reads now."""
        with torch.no_grad():
            for node in (layer.args[1], (*layer.args, None)[2]):
                if isinstance(node, fx.Node):
                    for read in (*node.all_input_nodes, node):
                        self.values[read] = self.value_of(read)
            self.values[layer] = self.value_of(layer)

    def exact_of(self, node: fx.Node) -> list[Any]:
        return self.exact[node.args[0]] if node.target in FAKE else super().exact_of(node)  # type: ignore[index]
