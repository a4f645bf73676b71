"""One run of the calibration samples through a program, with a histogram of every value asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...ir.data import Calibration, Sample
from ...ir.program import Program, origin_of
from .histogram import Histogram


class _Visitor(fx.Interpreter):
    def __init__(self, program: Program, visits: Mapping[fx.Node, Callable[[torch.Tensor], None]]) -> None:
        super().__init__(program.graph_module)
        self.visits = visits

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.visits:
            self.visits[n](value)
        return value


def visit(
    program: Program,
    visits: Mapping[fx.Node, Callable[[torch.Tensor], None]],
    samples: Sequence[Sample],
    progress: Callable[[int, int, str], None],
) -> None:
    """Runs the samples one by one and shows each node's value to its visitor."""
    program.graph_module.recompile()
    visitor = _Visitor(program, visits)
    with torch.no_grad():
        for done, sample in enumerate(samples, 1):
            visitor.run(*sample)
            progress(done, len(samples), "calibration")


def collect(
    program: Program, nodes: Iterable[fx.Node], calibration: Calibration, progress: Callable[[int, int, str], None]
) -> dict[fx.Node, Histogram]:
    """Histograms of the float values of `nodes`, sample by sample: memory is one sample's activations and 16 KiB a node."""
    histograms = {node: Histogram(f"'{node.name}' (from {origin_of(node)})") for node in nodes}
    visit(program, {node: histogram.observe for node, histogram in histograms.items()}, calibration.samples, progress)
    return histograms
