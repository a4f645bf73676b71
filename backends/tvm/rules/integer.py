"""Convolution, linear and matmul of the integer stage, with rescale and residual addition fused."""

from __future__ import annotations

from math import prod

import numpy as np
from torch import fx

from ....ir.dialect import gw
from ....ir.errors import OptionError
from ....ir.program import shape_of
from ..kernels import convolution_int8, linear_int8, matmul_int8
from ..kernels.base import Convolution
from ..lower import Lowering, rule, unsupported
from ..values import of_node
from .operands import matmul_operands, planar
from .tails import Finish, find


def constant_of(lowering: Lowering, node: fx.Node, argument, what: str) -> np.ndarray | None:
    """A weight or bias as numpy. Raises UnsupportedOpError where it is computed instead of stored."""
    if argument is None:
        return None
    tensor = lowering.program.parameter(argument)
    if tensor is None:
        raise unsupported(node, f"its {what} is computed, not a parameter; packing needs the values at build time")
    return tensor.detach().cpu().numpy()


@rule(gw.convolution.default)
def convolution(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups, zero_point = node.args
    kernel = constant_of(lowering, node, weight, "weight")
    shape = planar(shape_of(x), kernel.shape, stride, padding, dilation, groups)  # type: ignore[arg-type,union-attr]
    if shape is None:
        raise unsupported(node, f"integer convolutions are 1-D or 2-D; this one has {len(shape_of(x)) - 2} spatial axes")  # type: ignore[arg-type]
    spec = convolution_int8.ConvolutionInt8(shape, lowering.value(x).dtype, int(zero_point))  # type: ignore[arg-type,call-overload]
    finish = find(lowering, node, axis=1, residual=True)
    kernel = kernel.reshape(shape.filters, -1, *shape.kernel)  # type: ignore[union-attr]
    level = lowering.int8_level
    bias = constant_of(lowering, node, bias, "bias")
    packed = convolution_int8.pack(spec, finish.tail, level, kernel, bias, **finish.parameters)
    inputs = [lowering.channels(x), *_residual(lowering.channels, finish), *packed]  # type: ignore[arg-type]
    out = lowering.kernel(
        convolution_int8.build,
        spec,
        finish.tail,
        level,
        inputs=inputs,
        nodes=finish.nodes,
        macs=shape.macs,
        label=_label(shape),
    )
    lowering.bind_all(finish.nodes, of_node(finish.node, channels=out))


def _label(shape: Convolution) -> str:
    kind = "depthwise" if shape.depthwise else "convolution" if shape.groups == 1 else "grouped_convolution"
    return f"{kind}_int8"


def _residual(read, finish: Finish) -> list:
    return [] if finish.residual is None else [read(finish.residual)]


@rule(gw.linear.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias, zero_point = node.args
    matrix = constant_of(lowering, node, weight, "weight")
    outer, inner = matrix.shape  # type: ignore[union-attr]
    rows = prod(shape_of(x)[:-1])  # type: ignore[arg-type]
    spec = linear_int8.LinearInt8(rows, inner, outer, lowering.value(x).dtype, int(zero_point))  # type: ignore[arg-type,call-overload]
    finish = find(lowering, node, axis=len(shape_of(node)) - 1, residual=True)
    bias = constant_of(lowering, node, bias, "bias")
    packed = linear_int8.pack(spec, finish.tail, lowering.int8_level, matrix, bias, **finish.parameters)  # type: ignore[arg-type]
    out = lowering.kernel(
        linear_int8.build,
        spec,
        finish.tail,
        lowering.int8_level,
        inputs=[lowering.dense(x), *_residual(lowering.dense, finish), *packed],  # type: ignore[arg-type]
        nodes=finish.nodes,
        macs=rows * inner * outer,
        label="linear_int8",
    )
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))


@rule(gw.matmul.default)
def matmul(lowering: Lowering, node: fx.Node) -> None:
    a, b, za, zb = node.args
    operands = matmul_operands(a, b)  # type: ignore[arg-type]
    if operands is None:
        raise unsupported(node, "its batch axes broadcast; expand the smaller operand first")
    batch, rows, inner, columns, source, transposed = operands
    types = lowering.value(a).dtype, lowering.value(b).dtype  # type: ignore[arg-type]
    spec = matmul_int8.MatmulInt8(batch, rows, inner, columns, types[0], int(za), types[1], int(zb), transposed)  # type: ignore[call-overload]
    finish = find(lowering, node, axis=len(shape_of(node)) - 1)
    try:
        packed = matmul_int8.pack(spec, finish.tail, lowering.int8_level, **finish.parameters)
        out = lowering.kernel(
            matmul_int8.build,
            spec,
            finish.tail,
            lowering.int8_level,
            inputs=[lowering.dense(a), lowering.dense(source), *packed],  # type: ignore[arg-type]
            nodes=finish.nodes,
            macs=batch * rows * inner * columns,
            label="matmul_int8",
        )
    except OptionError as error:
        raise unsupported(node, str(error)) from error
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))
