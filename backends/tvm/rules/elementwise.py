"""Element-wise integer ops: quantize, dequantize, stand-alone rescales, add, multiply, lookup."""

from __future__ import annotations

import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..kernels import elementwise_int8 as kernels
from ..kernels import layout, lookup_int8, quantize_image
from ..kernels.base import LANES, Tail, padded
from ..lower import Lowering, rule, unsupported
from ..values import DTYPES, FloatImage, arguments, of_node, shape_of_var
from .tails import TAIL_OPS, expanded, find, tail_of

#: Ops that read their first input as [N, H, W, Cp].
SPATIAL_READERS = (
    gw.convolution.default,
    gw.max_pool2d.default,
    gw.sum_pool2d.default,
    torch.ops.aten.constant_pad_nd.default,
    torch.ops.aten.pad.default,
)


@rule(gw.quantize.default)
def quantize(lowering: Lowering, node: fx.Node) -> None:
    x, scale, zero_point, qmin, qmax, dtype = arguments(node)
    spec = (float(scale), zero_point, qmin, qmax, DTYPES[dtype])
    if lowering.is_channels(x):
        var = lowering.channels(x)
        out = lowering.kernel(kernels.quantize, shape_of_var(var), *spec, inputs=[var], nodes=(node,))
        lowering.bind(node, of_node(node, channels=out))
    elif any(user.target in SPATIAL_READERS for user in node.users) and len(shape_of(node)) in (3, 4):
        value = lowering.value(x)
        shape = (*value.shape[:2], *value.spatial)
        source = lowering.dense(x)
        if shape[1] <= quantize_image.MOST_CHANNELS and shape[2] * shape[3] >= LANES:
            image = FloatImage(source, quantize_image.Quantize(*spec))
            lowering.bind(node, of_node(node, pending=image))
            if len(node.users) > 1:
                lowering.settled(node)
            return
        out = lowering.kernel(layout.quantize_to_channels, shape, *spec, inputs=[source], nodes=(node,))
        lowering.bind(node, of_node(node, channels=out))
    else:
        out = lowering.kernel(kernels.quantize, shape_of(node), *spec, inputs=[lowering.dense(x)], nodes=(node,))
        lowering.bind(node, of_node(node, dense=out))


def _map(lowering: Lowering, node: fx.Node, generator, *spec, extra=()) -> None:
    """One kernel over a single tensor input, in whatever layout that input has."""
    x = arguments(node)[0]
    place = "channels" if lowering.is_channels(x) else "dense"
    var = lowering.channels(x) if place == "channels" else lowering.dense(x)
    out = lowering.kernel(generator, shape_of_var(var), *spec, inputs=[var, *extra], nodes=(node,))
    lowering.bind(node, of_node(node, **{place: out}))


@rule(gw.dequantize.default)
def dequantize(lowering: Lowering, node: fx.Node) -> None:
    x, scale, zero_point = arguments(node)
    _map(lowering, node, kernels.dequantize, lowering.value(x).dtype, float(scale), zero_point)


@rule(gw.lookup.default)
def lookup(lowering: Lowering, node: fx.Node) -> None:
    x, table = arguments(node)
    place = lowering.dense(table)
    spec = lowering.value(x).dtype, lowering.value(table).dtype, lowering.float_level
    _map(lowering, node, lookup_int8.lookup, *spec, extra=(place,))


@rule(*TAIL_OPS)
def rescale(lowering: Lowering, node: fx.Node) -> None:
    """A rescale whose accumulator has other readers, or a shape that no kernel could finish."""
    found = tail_of(lowering, node)
    if found is None:
        raise unsupported(node, "its scale is computed, not a parameter; fold constants first")
    tail, parameters, axis = found
    acc = arguments(node)[0]
    if lowering.is_channels(acc) and (axis == 1 or all(p.size == 1 for p in parameters.values())):
        var, axis, place = lowering.channels(acc), 3, "channels"
    else:
        var, place = lowering.dense(acc), "dense"
    shape = shape_of_var(var)
    if not shape:
        shape, axis = (1,), 0
    vectors = [expanded(p, shape[axis]) for p in parameters.values()]
    out = lowering.kernel(kernels.rescale, shape, axis, tail, inputs=[var, *vectors], nodes=(node,))
    lowering.bind(node, of_node(node, **{place: out}))


def _operands(lowering: Lowering, node: fx.Node):
    """Both operands of a broadcasting op in one layout: (a, b, layout name)."""
    a, b = arguments(node)[:2]
    spatial = len(shape_of(a)) == len(shape_of(b)) == 4 and shape_of(a)[1] == shape_of(b)[1]
    if spatial and (lowering.is_channels(a) or lowering.is_channels(b)):
        return lowering.channels(a), lowering.channels(b), "channels"
    return lowering.dense(a), lowering.dense(b), "dense"


@rule(gw.add.default)
def add(lowering: Lowering, node: fx.Node) -> None:
    _, _, ma, mb, shift, za, zb, zero_point, qmin, qmax, dtype = arguments(node)
    tail = Tail("none", DTYPES[dtype], zero_point, qmin, qmax)
    a, b, place = _operands(lowering, node)
    types = [lowering.value(n).dtype for n in arguments(node)[:2]]
    spec = (shape_of_var(a), shape_of_var(b), *types, (ma, mb), shift, (za, zb), tail)
    out = lowering.kernel(kernels.add, *spec, inputs=[a, b], nodes=(node,))
    lowering.bind(node, of_node(node, **{place: out}))


@rule(gw.multiply.default)
def multiply(lowering: Lowering, node: fx.Node) -> None:
    _, _, za, zb = arguments(node)
    a, b, place = _operands(lowering, node)
    rank = len(shape_of(node))
    axis = 1 if place == "channels" else max(rank - 1, 0)
    finish = find(lowering, node, axis)
    types = [lowering.value(n).dtype for n in arguments(node)[:2]]
    lanes = padded(shape_of(node)[1]) if place == "channels" else shape_of(node)[-1]
    spec = (shape_of_var(a), shape_of_var(b), *types, (za, zb), 3 if place == "channels" else axis, finish.tail)
    out = lowering.kernel(kernels.multiply, *spec, inputs=[a, b, *finish.vectors(lanes)], nodes=finish.nodes)
    lowering.bind_all(finish.nodes, of_node(finish.node, **{place: out}))
