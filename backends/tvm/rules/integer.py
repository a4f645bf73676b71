"""Convolution, linear and matmul of the integer stage, with rescale and residual addition fused."""

from __future__ import annotations

from math import prod

import numpy as np
from torch import fx

from ....ir.dialect import gw
from ....ir.errors import OptionError
from ....ir.program import shape_of
from ..cuda.kernels import plan_int8
from ..kernels import convolution_int8, linear_int8, matmul_int8
from ..kernels.base import Convolution, FloatAdd
from ..kernels.packed import Packing, packing_of
from ..lower import Lowering, rule, unsupported
from ..values import FloatImage, arguments, of_node
from .attention import lower_attention
from .bitmask import sparse_weight, stored
from .linears import lower_together
from .operands import matmul_operands, planar, without_frame
from .tails import Finish, bounded, find, looks_up


def weight_of(lowering: Lowering, node: fx.Node, argument: fx.Node) -> np.ndarray:
    """A weight or bias as numpy. Raises UnsupportedOpError where it is computed instead of stored."""
    tensor = lowering.program.parameter(argument)
    if tensor is None:
        raise unsupported(node, f"'{argument}' is computed, not a parameter; packing needs its values at build time")
    return tensor.detach().cpu().numpy()


def packed_weight(lowering: Lowering, node: fx.Node, argument: fx.Node, by_channel: bool) -> tuple[np.ndarray, Packing | None]:
    """The s8 values of a weight, and how the kernel stores them where the program packs them.

    by_channel: whether the kernel's weights may have lowest values of their own for each channel.
    """
    if argument.target is gw.from_bitmask.default:
        values = sparse_weight(lowering, argument)
        if values is None:
            raise unsupported(node, f"'{argument}' holds no s8 parameters; packing needs its values at build time")
        return values, None
    if argument.target is not gw.unpack.default:
        return weight_of(lowering, node, argument), None
    codes, bits, shape, *zero_point = arguments(argument)
    tensors = [lowering.program.parameter(n) for n in (codes, *(z for z in zero_point if z is not None))]
    values = gw.unpack(tensors[0], bits, shape, *tensors[1:]).numpy()
    return values, packing_of(values, bits, by_channel, lowering.int8_level)


@rule(gw.unpack.default)
def unpack(lowering: Lowering, node: fx.Node) -> None:
    """The value for readers other than layers, which ask for the packed weight."""
    lowering.bind(node, of_node(node, dense=lowering.constant(packed_weight(lowering, node, node, by_channel=True)[0])))


def bias_of(lowering: Lowering, node: fx.Node, argument: fx.Node | None) -> np.ndarray | None:
    return None if argument is None else weight_of(lowering, node, argument)


@rule(gw.convolution.default)
def convolution(lowering: Lowering, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, groups, zero_point = arguments(node)
    kernel, packing = packed_weight(lowering, node, weight, by_channel=int(groups) == 1)
    shape = planar(shape_of(x), kernel.shape, stride, padding, dilation, groups)
    if shape is None:
        raise unsupported(node, f"integer convolutions are 1-D or 2-D; this one has {len(shape_of(x)) - 2} spatial axes")
    x, shape = without_frame(lowering, x, shape, int(zero_point))
    image = lowering.value(x).pending if shape.groups == 1 else None
    quantize = image.quantize if isinstance(image, FloatImage) else None
    spec = convolution_int8.ConvolutionInt8(shape, lowering.value(x).dtype, int(zero_point), quantize, packing)
    finish = find(lowering, node, axis=1, residual=True, lookup=looks_up(lowering))
    kernel = kernel.reshape(shape.filters, -1, *shape.kernel)
    level = lowering.int8_level
    bias = bias_of(lowering, node, bias)
    finish = bounded(lowering, finish, kernel[0].size, bias)
    packed, *vectors = lowering.family(convolution_int8).pack(spec, finish.tail, level, kernel, bias, **finish.parameters)
    source = image.source if isinstance(image, FloatImage) else lowering.channels(x)
    inputs = [source, *_residual(lowering.channels, finish), stored(lowering, weight, packed), *vectors]
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


def _added(lowering: Lowering, finish: Finish) -> list:
    """The buffers of what a linear layer adds."""
    if isinstance(finish.tail.residual, FloatAdd) and finish.tail.residual.normalized:
        assert finish.residual is not None
        normalization = lowering.value(finish.residual).normalization
        assert normalization is not None
        return lowering.normalized(normalization)
    return _residual(lowering.dense, finish)


@rule(gw.linear.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    if lower_together(lowering, node):
        return
    x, weight, bias, zero_point = arguments(node)
    matrix, packing = packed_weight(lowering, node, weight, by_channel=True)
    outer, inner = matrix.shape
    rows = prod(shape_of(x)[:-1])
    spec = linear_int8.LinearInt8(rows, inner, outer, lowering.value(x).dtype, int(zero_point), packing)
    own = looks_up(lowering)
    few = plan_int8.MOST_OUTLIERS if own else 0
    finish = find(lowering, node, len(shape_of(node)) - 1, residual=True, lookup=own, outliers=few, normalized=own)
    bias = bias_of(lowering, node, bias)
    finish = bounded(lowering, finish, inner, bias)
    packed, *vectors = lowering.family(linear_int8).pack(
        spec, finish.tail, lowering.int8_level, matrix, bias, **finish.parameters
    )
    outliers = []
    if finish.outliers is not None and finish.tail.outliers is not None:
        outliers = [lowering.dense(finish.outliers)]
        vectors += plan_int8.pack_outliers(finish.tail.outliers, **finish.outlier_values)
    out = lowering.kernel(
        linear_int8.build,
        spec,
        finish.tail,
        lowering.int8_level,
        inputs=[lowering.dense(x), *outliers, *_added(lowering, finish), stored(lowering, weight, packed), *vectors],
        nodes=finish.nodes,
        macs=rows * inner * outer,
        label="linear_int8",
    )
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))


@rule(gw.matmul.default)
def matmul(lowering: Lowering, node: fx.Node) -> None:
    if lower_attention(lowering, node):
        return
    a, b, za, zb = arguments(node)
    operands = matmul_operands(a, b)
    if operands is None:
        raise unsupported(node, "its batch axes broadcast; expand the smaller operand first")
    batch, rows, inner, columns, source, transposed = operands
    types = lowering.value(a).dtype, lowering.value(b).dtype
    spec = matmul_int8.MatmulInt8(batch, rows, inner, columns, types[0], int(za), types[1], int(zb), transposed)
    finish = bounded(lowering, find(lowering, node, axis=len(shape_of(node)) - 1, lookup=looks_up(lowering)), inner)
    try:
        packed = lowering.family(matmul_int8).pack(spec, finish.tail, lowering.int8_level, **finish.parameters)
        out = lowering.kernel(
            matmul_int8.build,
            spec,
            finish.tail,
            lowering.int8_level,
            inputs=[lowering.dense(a), lowering.dense(source), *packed],
            nodes=finish.nodes,
            macs=batch * rows * inner * columns,
            label="matmul_int8",
        )
    except OptionError as error:
        raise unsupported(node, str(error)) from error
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))
