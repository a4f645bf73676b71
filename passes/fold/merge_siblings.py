"""merge-siblings: linear layers of one input stand side by side in one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import fx

from ...ir.program import Program, shape_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import Layer, layer_of
from .match import argument, aten, is_call, substitute


@register
@dataclass(frozen=True)
class MergeSiblings(Pass):
    """One wide linear layer in the place of several that read one value, such as queries, keys and values.

        %q = aten.linear(%x, Wq, bq);  %k = aten.linear(%x, Wk, bk);  %v = aten.linear(%x, Wv, bv)
     -> %y = aten.linear(%x, [Wq; Wk; Wv], [bq; bk; bv]);  %q = aten.slice(%y, -1, 0, n);  %k = ...

    Same products, fewer and wider kernels; slices that attention reads cost no copy. Not part of `canonicalize`: whether one wide
    layer is faster depends on shapes and target, so measure. Layers are merged where their results are together at most `widest`
    times as wide as what they read.

    Args:
        widest: most outputs of a merged layer, relative to its inputs.
    """

    widest: float = 4.0

    name = "merge-siblings"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = 0
        for node in list(program.nodes):
            layers = [layer for layer in (layer_of(program, n) for n in _readers(node)) if layer is not None]
            outputs = sum(layer.out_channels for layer in layers)
            if len(layers) > 1 and outputs <= self.widest * layers[0].in_channels:
                _merge(program, layers)
                merged += len(layers)
        return PassResult(program, merged > 0, {"merged": merged})


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    """The linear layers that read a value as their input."""
    return [user for user in node.users if is_call(user, aten.linear.default) and user.args[0] is node]


def _merge(program: Program, layers: list[Layer]) -> None:
    order = {node: index for index, node in enumerate(program.nodes)}
    layers = sorted(layers, key=lambda layer: order[layer.node])
    first = layers[0].node
    weight = torch.cat([layer.weight for layer in layers])
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = torch.cat([layer.bias64().to(weight.dtype) for layer in layers])
    name, origin = str(first.args[1].target), first.meta.get("origin", "")  # type: ignore[union-attr]
    parameters = [program.add_parameter(name, weight, first, origin)]
    if bias is not None:
        given = argument(first, 2, "bias")
        bias_name = str(given.target) if given is not None else f"{name.removesuffix('_weight')}_bias"
        parameters.append(program.add_parameter(bias_name, bias, first, origin))
    wide = program.insert(aten.linear.default, (layers[0].input, *parameters), first, origin)
    axis = len(shape_of(wide)) - 1
    bounds = pairwise([0, *accumulate(layer.out_channels for layer in layers)])
    parts = [
        program.insert(aten.slice.Tensor, (wide, axis, start, stop), first, layer.node.meta.get("origin", ""))
        for layer, (start, stop) in zip(layers, bounds, strict=True)
    ]
    for layer, part in zip(layers, parts, strict=True):
        substitute(program, layer.node, part)
