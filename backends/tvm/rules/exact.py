"""Float ops whose every rounding is part of the meaning: softmax, layer normalization, sum, square root."""

from __future__ import annotations

from math import prod

import torch
from torch import fx
from tvm import relax

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..cuda.kernels import layer_norm_exact as cuda_layer_norm
from ..cuda.kernels import reduce_exact as cuda_reduce
from ..kernels import layer_norm_exact, reduce_exact, softmax_exact
from ..kernels.quantize_image import Quantize
from ..lower import Lowering, rule
from ..values import DTYPES, Normalization, arguments, of_node
from . import maps

aten = torch.ops.aten


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
    pair = _twins(lowering, node)
    if _is_deferred(lowering, *(pair or (node, node))):
        _emit_statistics(lowering, *(pair or (node, node)))
        return
    if pair is not None:
        _emit_twins(lowering, *pair)
        return
    *tensors, eps = arguments(node)
    inputs = [lowering.dense(t) for t in tensors]
    spec = (*_rows(node), float(eps))
    reader = _quantize_of(node)
    if reader is None:
        out = lowering.kernel(layer_norm_exact.layer_norm, *spec, inputs=inputs, nodes=(node,))
        lowering.bind(node, of_node(node, dense=out))
        return
    keep = len(node.users) > 1
    spec = (*spec, _codes(reader), keep, lowering.int8_level)
    generator, nodes = layer_norm_exact.layer_norm, (node, reader)
    if keep:
        whole, codes = lowering.kernel_outputs(generator, *spec, inputs=inputs, nodes=nodes, outputs=2)
        lowering.bind(node, of_node(node, dense=whole))
        lowering.bind(reader, of_node(reader, dense=codes))
    else:
        codes = lowering.kernel(generator, *spec, inputs=inputs, nodes=nodes)
        lowering.bind_all(nodes, of_node(reader, dense=codes))


def _is_deferred(lowering: Lowering, value: fx.Node, coded: fx.Node) -> bool:
    """Whether the float result is better computed where it is read: additions of linear layers alone read it, on CUDA.

    value: the normalization whose result is read; coded: the one whose codes are, of the same rows or the same node.
    """
    reader = _quantize_of(coded)
    others = [user for user in value.users if user is not reader]
    if lowering.target.arch != "cuda" or reader is None or not others:
        return False
    return all(user.target is aten.add.Tensor and not user.kwargs and _adds_product(user, value) for user in others)


def _adds_product(add: fx.Node, value: fx.Node) -> bool:
    a, b = arguments(add)
    other = b if a is value else a
    while isinstance(other, fx.Node) and other.target is aten.add.Tensor:  # a layer's outliers
        other = arguments(other)[0]
    return isinstance(other, fx.Node) and other.target is gw.scale.default and arguments(other)[0].target is gw.linear.default


def _emit_statistics(lowering: Lowering, value: fx.Node, coded: fx.Node) -> None:
    """The codes, and of the value what its readers need to normalize on their own: nothing is written only to be read."""
    reader = _quantize_of(coded)
    assert reader is not None
    x, weight, bias, eps = arguments(coded)
    spec = (*_rows(value), float(eps), _codes(reader), lowering.int8_level)
    nodes = tuple(dict.fromkeys((value, coded, reader)))
    inputs = [lowering.dense(t) for t in (x, weight, bias)]
    generator = cuda_layer_norm.layer_norm_statistics
    statistics, codes = lowering.kernel_outputs(generator, *spec, inputs=inputs, nodes=nodes, outputs=2)
    lowering.bind_all(nodes[1:], of_node(reader, dense=codes))
    lowering.bind(value, of_node(value, normalization=Normalization(x, statistics, *arguments(value)[1:3])))


def _quantize_of(node: fx.Node) -> fx.Node | None:
    return next((user for user in node.users if user.target is gw.quantize.default), None)


def _codes(quantize: fx.Node) -> Quantize:
    _, scale, zero_point, qmin, qmax, dtype = arguments(quantize)
    return Quantize(float(scale), zero_point, qmin, qmax, DTYPES[dtype])


def _twins(lowering: Lowering, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Two normalizations of the same rows, one of them `node`: the value of the first is read, of the second its codes alone.

    `smooth-quant` leaves them: the residual stream reads the value, and the next layer the codes of another scale. One kernel
    reads the rows once for both.
    """
    x, *_, eps = arguments(node)
    values, coded = [], []
    for other in x.users:
        if other.target is not gw.layer_norm.default or lowering.lowered(other):
            continue
        rows, *affine, other_eps = arguments(other)
        if rows is not x or other_eps != eps or any(lowering.program.parameter(t) is None for t in affine):
            continue
        if _quantize_of(other) is None:
            values.append(other)
        elif len(other.users) == 1:
            coded.append(other)
    mine, others = (values, coded) if node in values else (coded, values)
    if node not in mine or not others:
        return None
    return (node, others[0]) if mine is values else (others[0], node)


def _emit_twins(lowering: Lowering, value: fx.Node, coded: fx.Node) -> None:
    x, *affine, eps = arguments(value)
    reader = _quantize_of(coded)
    assert reader is not None
    inputs = [lowering.dense(t) for t in (x, *affine, *arguments(coded)[1:-1])]
    spec = (*_rows(value), float(eps), _codes(reader), lowering.int8_level)
    nodes = (value, coded, reader)
    whole, codes = lowering.kernel_outputs(layer_norm_exact.layer_norm_twins, *spec, inputs=inputs, nodes=nodes, outputs=2)
    lowering.bind(value, of_node(value, dense=whole))
    lowering.bind_all((coded, reader), of_node(reader, dense=codes))


@rule(gw.reduce_sum.default)
def reduce_sum(lowering: Lowering, node: fx.Node) -> None:
    x, dim, keepdim = arguments(node)
    spec = (shape_of(x), int(dim), bool(keepdim))
    factors = maps.weighted(x) if lowering.value(x).expression is not None else None
    if factors is not None:
        inputs = [lowering.dense(factor) for factor in factors]
        spec = (*spec, shape_of(factors[1]))
        out = lowering.kernel(cuda_reduce.weighted_sum, *spec, inputs=inputs, nodes=(x, node))
        lowering.bind(node, of_node(node, dense=out))
        return
    out = lowering.kernel(reduce_exact.reduce_sum, *spec, inputs=[lowering.dense(x)], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.square_root.default)
def square_root(lowering: Lowering, node: fx.Node) -> None:
    if maps.take(lowering, node):
        return
    source = lowering.dense(arguments(node)[0])
    out = lowering.builder.emit(relax.op.sqrt(source))
    lowering.record("square_root", (node,), "island", [source, out])
    lowering.bind(node, of_node(node, dense=out))
