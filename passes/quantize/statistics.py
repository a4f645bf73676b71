"""One run of the calibration samples through a program, with a histogram of every value asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ...ir.data import Calibration
from ...ir.program import Program, origin_of
from .histogram import Histogram


class _Collector(fx.Interpreter):
    def __init__(self, program: Program, histograms: dict[fx.Node, Histogram]) -> None:
        super().__init__(program.graph_module)
        self.histograms = histograms

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.histograms:
            self.histograms[n].observe(value)
        return value


def collect(
    program: Program, nodes: Iterable[fx.Node], calibration: Calibration, progress: Callable[[int, int, str], None]
) -> dict[fx.Node, Histogram]:
    """Histograms of the float values of `nodes`, sample by sample: memory is one sample's activations and 16 KiB a node."""
    histograms = {node: Histogram(f"'{node.name}' (from {origin_of(node)})") for node in nodes}
    program.graph_module.recompile()
    collector = _Collector(program, histograms)
    with torch.no_grad():
        for done, sample in enumerate(calibration, 1):
            collector.run(*sample)
            progress(done, len(calibration), "calibration")
    return histograms
