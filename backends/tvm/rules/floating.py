"""Float layers with a designed kernel: convolution, linear, matmul, and the clamp that follows a layer."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.program import shape_of, single_user
from ..kernels import convolution_f32, depthwise_f32, linear_f32, matmul_f32
from ..kernels.base import LANES
from ..kernels.convolution_f32 import pack_bias
from ..kernels.float_base import NO_ACTIVATION, RELU, RELU6, Activation
from ..lower import Lowering, rule
from ..values import DTYPES, arguments, of_node
from .generic import fallback
from .operands import matmul_operands, planar, without_frame

aten = torch.ops.aten


def _activation(lowering: Lowering, node: fx.Node) -> tuple[Activation, tuple[fx.Node, ...]]:
    """The clamp that alone reads `node`, and the nodes a kernel that does it covers."""
    reader = single_user(node)
    if reader is None or lowering.integer:
        return NO_ACTIVATION, (node,)
    found: Activation | None = None
    if reader.target is aten.relu.default:
        found = RELU
    elif reader.target is aten.relu6.default:
        found = RELU6
    elif reader.target in (aten.clamp.default, aten.hardtanh.default) and len(arguments(reader)) == 3:
        low, high = arguments(reader)[1:]
        if all(v is None or isinstance(v, (int, float)) for v in (low, high)):
            found = Activation(*(None if v is None else float(v) for v in (low, high)))
    return (NO_ACTIVATION, (node,)) if found is None else (found, (node, reader))


def _stored(lowering: Lowering, argument: Any) -> np.ndarray | None:
    tensor = lowering.program.parameter(argument)
    return None if tensor is None else tensor.detach().cpu().numpy()


def _is_float32(*nodes: Any) -> bool:
    return all(DTYPES[n.meta["val"].dtype] == "float32" for n in nodes)


@rule(aten.convolution.default)
def convolution(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = arguments(node)
    kernel, offset = _stored(lowering, weight), _stored(lowering, bias)
    shape = None if kernel is None else planar(shape_of(x), kernel.shape, stride, padding, dilation, groups)
    if kernel is None or shape is None or transposed or not _is_float32(x, weight) or (bias is not None and offset is None):
        fallback(lowering, node)
        return
    x, shape = without_frame(lowering, x, shape, 0.0)
    activation, nodes = _activation(lowering, node)
    kernel = kernel.reshape(shape.filters, -1, *shape.kernel)
    if shape.depthwise:
        generator, label, packed = depthwise_f32.depthwise, "depthwise_f32", depthwise_f32.pack_weight(shape, kernel)
        spec, source = (shape, activation, lowering.float_level), lowering.channels(x)
    else:
        generator, label, packed = convolution_f32.convolution, "convolution_f32", convolution_f32.pack_weight(shape, kernel)
        # The image a network is given is planar, with few channels: a first layer reads it as it is.
        planar_input = shape.channels <= LANES and not lowering.is_channels(x) and len(x.users) == 1
        source = lowering.dense(x) if planar_input else lowering.channels(x)
        spec = (shape, activation, lowering.float_level, None, planar_input)
    inputs = [source, packed, pack_bias(shape.filters, offset)]
    out = lowering.kernel(generator, *spec, inputs=inputs, nodes=nodes, macs=shape.macs, label=label)
    lowering.bind_all(nodes, of_node(nodes[-1], channels=out))


@rule(aten.linear.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias = (*arguments(node), None)[:3]
    _linear(lowering, node, x, _stored(lowering, weight), bias)


@rule(aten.addmm.default)
def addmm(lowering: Lowering, node: fx.Node) -> None:
    bias, x, weight = arguments(node)
    matrix = _stored(lowering, weight)
    plain = not node.kwargs and len(shape_of(bias)) == 1
    _linear(lowering, node, x, matrix.T if matrix is not None and plain else None, bias)


def _linear(lowering: Lowering, node: fx.Node, x: Any, matrix: np.ndarray | None, bias: Any) -> None:
    offset = _stored(lowering, bias)
    if matrix is None or not _is_float32(x, node) or (bias is not None and offset is None):
        fallback(lowering, node)
        return
    outputs, inputs = matrix.shape
    if offset is not None and offset.size == 1:
        offset = np.full(outputs, offset.reshape(()))
    activation, nodes = _activation(lowering, node)
    lead = shape_of(x)[:-1] or (1,)
    parameters = [linear_f32.pack_weight(matrix), pack_bias(outputs, offset)]
    out = lowering.kernel(
        linear_f32.linear, lead, inputs, outputs, activation, lowering.float_level,
        inputs=[lowering.dense(x), *parameters], nodes=nodes, macs=prod(lead) * inputs * outputs, label="linear_f32",
    )  # fmt: skip
    lowering.bind_all(nodes, of_node(nodes[-1], dense=out))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(lowering: Lowering, node: fx.Node) -> None:
    a, b = arguments(node)
    matrix = _stored(lowering, b)
    if matrix is not None and matrix.ndim == 2 and _stored(lowering, a) is None:
        _linear(lowering, node, a, matrix.T, None)
        return
    operands = matmul_operands(a, b) if _is_float32(a, b) else None
    if operands is None:
        fallback(lowering, node)
        return
    batch, rows, inner, columns, source, transposed = operands
    out = lowering.kernel(
        matmul_f32.matmul, (batch,), rows, inner, columns, transposed, lowering.float_level,
        inputs=[lowering.dense(a), lowering.dense(source)], nodes=(node,), macs=batch * rows * inner * columns,
        label="matmul_f32",
    )  # fmt: skip
    lowering.bind(node, of_node(node, dense=out))
