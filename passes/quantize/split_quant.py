"""SplitQuant: a layer becomes a sum of layers whose weights lie close together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program, origin_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from ..rules import matching
from . import operators as ops

aten = torch.ops.aten

#: Lloyd's iterations; the boundaries of a few clusters on a line settle in fewer.
ITERATIONS = 100


@register
@dataclass(frozen=True)
class SplitQuant(Pass):
    """Splits a layer by clusters of its weights, each of which then has a scale of its own.

        %y = linear(%x, W, b)      ->      %1 = linear(%x, W where lower else 0, b)
                                           %2 = linear(%x, W where middle else 0)
                                           %3 = linear(%x, W where upper else 0)
                                           %y = add(add(%1, %2), %3)

    Song and Lin 2025 (arXiv:2501.12428): k-means on the weights of a layer, k = 3. Convolutions and linear layers. The bias
    stays with the first part: it is 32 bits wide in the integer stage, and needs no clusters.

    It multiplies weights and work by k: three layers of 2 bits are as large as one of 6, which is more accurate. It serves where
    a format is given and its error is not: 2-bit hardware, or a single bad layer (`layers`). Run it before `quantize`.

    Options:
        clusters: k, at least 2.
        layers: origins (or globs) of the layers to split.

    Stats: layers split.
    """

    name: ClassVar[str] = "split-quant"
    effect: ClassVar = EXACT

    clusters: int = 3
    layers: tuple[str, ...] = ("*",)

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.clusters < 2:
            raise OptionError(f"option 'clusters' of {self.name} must be at least 2, not {self.clusters}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        found = [n for n in program.nodes if _splits(program, n)]
        asked = set(matching(self.layers, [origin_of(n) for n in found], f"'layers' of {self.name}")) if found else ()
        chosen = [n for n in found if origin_of(n) in asked]
        split = sum(_split(program, layer, self.clusters) for layer in chosen)
        program.sweep()
        return PassResult(program, split > 0, {"layers": split})


def _splits(program: Program, node: fx.Node) -> bool:
    layer = node.target in (ops.CONVOLUTION, ops.LINEAR) and not ops.is_transposed(node)
    return layer and program.parameter(node.args[1]) is not None


def clusters_of(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The cluster of each weight, 0 the lowest: k-means on a line, from evenly spaced quantiles on."""
    values = weight.detach().reshape(-1).to(torch.float64).sort().values
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    centers = values[((torch.arange(count) + 0.5) / count * len(values)).long().clamp_max(len(values) - 1)]
    for _ in range(ITERATIONS):
        edges = torch.searchsorted(values, (centers[1:] + centers[:-1]) / 2)
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(values))])
        sizes = bounds.diff()
        means = sums[bounds].diff() / sizes.clamp_min(1)
        moved = torch.where(sizes > 0, means, centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    return torch.bucketize(weight.detach().to(torch.float64).contiguous(), (centers[1:] + centers[:-1]) / 2, right=True)


def _split(program: Program, layer: fx.Node, count: int) -> bool:
    """Splits one layer; False where its weights make a single cluster."""
    weight: torch.Tensor = program.parameter(layer.args[1]).detach()  # type: ignore[union-attr]
    cluster = clusters_of(weight, count)
    parts = [torch.where(cluster == index, weight, 0.0) for index in range(count)]
    parts = [part for part in parts if bool(part.any())]
    if len(parts) < 2:
        return False
    name, after = str(layer.args[1].target), layer.next  # type: ignore[union-attr]
    total = None
    for index, part in enumerate(parts):
        weight_node = program.add_parameter(f"{name}_part{index}", part, after, origin_of(layer))
        args = list(layer.args)
        args[1] = weight_node
        if index and len(args) > 2:
            args[2] = None
        piece = program.insert(layer.target, tuple(args), after, origin_of(layer), **layer.kwargs)  # type: ignore[arg-type]
        total = piece if total is None else program.insert(aten.add.Tensor, (total, piece), after, origin_of(layer))
    assert total is not None
    layer.replace_all_uses_with(total)
    return True
