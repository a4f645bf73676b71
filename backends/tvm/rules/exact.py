"""Float ops whose every rounding is part of the meaning: softmax, layer normalization, sum, square root."""

from __future__ import annotations

from math import prod

from torch import fx
from tvm import relax

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..kernels import layer_norm_exact, reduce_exact, softmax_exact
from ..kernels.quantize_image import Quantize
from ..lower import Lowering, rule
from ..values import DTYPES, arguments, of_node


def _rows(node: fx.Node) -> tuple[int, int]:
    shape = shape_of(node)
    return prod(shape[:-1]), shape[-1]


@rule(gw.softmax.default)
def softmax(lowering: Lowering, node: fx.Node) -> None:
    out = lowering.kernel(softmax_exact.softmax, *_rows(node), inputs=[lowering.dense(arguments(node)[0])], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.layer_norm.default)
def layer_norm(lowering: Lowering, node: fx.Node) -> None:
    """With the quantization of its result, which alone the next layer reads; the float result is kept where others read it."""
    *tensors, eps = arguments(node)
    inputs = [lowering.dense(t) for t in tensors]
    spec = (*_rows(node), float(eps))
    reader = next((user for user in node.users if user.target is gw.quantize.default), None)
    if reader is None:
        out = lowering.kernel(layer_norm_exact.layer_norm, *spec, inputs=inputs, nodes=(node,))
        lowering.bind(node, of_node(node, dense=out))
        return
    _, scale, zero_point, qmin, qmax, dtype = arguments(reader)
    keep = len(node.users) > 1
    spec = (*spec, Quantize(float(scale), zero_point, qmin, qmax, DTYPES[dtype]), keep, lowering.int8_level)
    generator, nodes = layer_norm_exact.layer_norm, (node, reader)
    if keep:
        whole, codes = lowering.kernel_outputs(generator, *spec, inputs=inputs, nodes=nodes, outputs=2)
        lowering.bind(node, of_node(node, dense=whole))
        lowering.bind(reader, of_node(reader, dense=codes))
    else:
        codes = lowering.kernel(generator, *spec, inputs=inputs, nodes=nodes)
        lowering.bind_all(nodes, of_node(reader, dense=codes))


@rule(gw.reduce_sum.default)
def reduce_sum(lowering: Lowering, node: fx.Node) -> None:
    x, dim, keepdim = arguments(node)
    spec = (shape_of(x), int(dim), bool(keepdim))
    out = lowering.kernel(reduce_exact.reduce_sum, *spec, inputs=[lowering.dense(x)], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.square_root.default)
def square_root(lowering: Lowering, node: fx.Node) -> None:
    source = lowering.dense(arguments(node)[0])
    out = lowering.builder.emit(relax.op.sqrt(source))
    lowering.record("square_root", (node,), "island", [source, out])
    lowering.bind(node, of_node(node, dense=out))
