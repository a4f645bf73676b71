"""Float ops whose order of operations is part of the meaning: softmax, layer normalization, sum."""

from __future__ import annotations

from math import prod

from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..kernels import layer_norm_exact, reduce_exact, softmax_exact
from ..lower import Lowering, rule
from ..values import arguments, of_node


def _rows(node: fx.Node) -> tuple[int, int]:
    shape = shape_of(node)
    return prod(shape[:-1]), shape[-1]


@rule(gw.softmax.default)
def softmax(lowering: Lowering, node: fx.Node) -> None:
    out = lowering.kernel(softmax_exact.softmax, *_rows(node), inputs=[lowering.dense(arguments(node)[0])], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.layer_norm.default)
def layer_norm(lowering: Lowering, node: fx.Node) -> None:
    *tensors, eps = arguments(node)
    inputs = [lowering.dense(t) for t in tensors]
    out = lowering.kernel(layer_norm_exact.layer_norm, *_rows(node), float(eps), inputs=inputs, nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.reduce_sum.default)
def reduce_sum(lowering: Lowering, node: fx.Node) -> None:
    x, dim, keepdim = arguments(node)
    spec = (shape_of(x), int(dim), bool(keepdim))
    out = lowering.kernel(reduce_exact.reduce_sum, *spec, inputs=[lowering.dense(x)], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))
