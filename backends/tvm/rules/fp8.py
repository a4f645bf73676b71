"""Layers of 8-bit floats, on targets whose tensor cores multiply them. Values are bytes until a kernel reads them."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.errors import TargetError
from ....ir.program import dtype_of, origin_of, shape_of
from ..cuda.kernels import convolution_fp8, linear_fp8, plan_fp8, quantize_fp8
from ..cuda.kernels.plan_float import pack_bias
from ..kernels.float_base import MatrixProduct
from ..lower import Lowering, rule, unsupported
from ..values import DTYPES, SUFFIXES, arguments, shape_of_var
from .codes_fp8 import bytes_of, emit_end, inverse, multiplies_fp8
from .floating import Finish, finish
from .operands import planar, without_frame


def require_fp8(lowering: Lowering, node: fx.Node) -> None:
    """Raises TargetError where the target multiplies no 8-bit floats."""
    if not multiplies_fp8(lowering):
        levels = ", ".join(f"cuda:{level}" for level in plan_fp8.LEVELS)
        raise TargetError(
            f"{lowering.target} has no products of 8-bit floats, which '{node.name}' (from {origin_of(node)}) needs; compile for "
            f"{levels}, or leave quantize-fp8 out of the pipeline: quantize gives integers that every target multiplies"
        )


def parameter(lowering: Lowering, node: fx.Node, argument: fx.Node | None) -> np.ndarray | None:
    """A parameter of a layer as numpy, 8-bit floats as their bytes. Raises UnsupportedOpError where it is computed."""
    if argument is None:
        return None
    tensor = lowering.program.parameter(argument)
    if tensor is None:
        raise unsupported(node, f"'{argument}' is computed, not a parameter; packing needs its values at build time")
    tensor = tensor.detach().cpu()
    return (tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor.float()).numpy()


@rule(gw.quantize_fp8.default)
def quantize(lowering: Lowering, node: fx.Node) -> None:
    """In the layout the value has; most are written by the kernel of the layer before."""
    require_fp8(lowering, node)
    x = arguments(node)[0]
    dtype = DTYPES[dtype_of(x)]
    if dtype not in SUFFIXES:
        raise unsupported(node, f"it reads {dtype}; 8-bit floats are made of float32, float16 and bfloat16")
    place = "channels" if lowering.is_channels(x) else "dense"
    var = lowering.channels(x) if place == "channels" else lowering.dense(x)
    shape = shape_of_var(var)
    spec, inputs = (prod(shape), dtype), [var, inverse(node)]
    out = lowering.kernel(quantize_fp8.quantize, *spec, inputs=inputs, nodes=(node,), label="quantize_fp8")
    lowering.bind(node, bytes_of(node, **{place: lowering.reshape(out, shape)}))


@rule(gw.linear_fp8.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    require_fp8(lowering, node)
    x, weight, *vectors, _ = arguments(node)
    matrix = parameter(lowering, node, weight)
    assert matrix is not None
    outputs, inner = matrix.shape
    shape, done = MatrixProduct(prod(shape_of(x)[:-1]), inner, outputs), finish(lowering, node)
    operands = [lowering.dense(x), *_residual(lowering.dense, done), plan_fp8.pack_linear(matrix)]
    operands += _vectors(lowering, node, outputs, *vectors)
    _emit(lowering, linear_fp8.linear, shape, done, operands, "dense")


@rule(gw.convolution_fp8.default)
def convolution(lowering: Lowering, node: fx.Node) -> None:
    require_fp8(lowering, node)
    x, weight, scale, bias, stride, padding, dilation, _ = arguments(node)
    kernel = parameter(lowering, node, weight)
    assert kernel is not None
    shape = planar(shape_of(x), kernel.shape, stride, padding, dilation, 1)
    if shape is None:
        raise unsupported(node, f"convolutions of 8-bit floats are 1-D or 2-D; this one has {len(shape_of(x)) - 2} spatial axes")
    x, shape = without_frame(lowering, x, shape, 0.0)
    done = finish(lowering, node)
    packed = plan_fp8.pack_convolution(shape, kernel.reshape(shape.filters, -1, *shape.kernel))
    operands = [lowering.channels(x), *_residual(lowering.channels, done), packed]
    operands += _vectors(lowering, node, shape.filters, scale, bias)
    _emit(lowering, convolution_fp8.convolution, shape, done, operands, "channels")


def _residual(read: Any, done: Finish) -> list[Any]:
    return [] if done.residual is None else [read(done.residual)]


def _vectors(lowering: Lowering, node: fx.Node, outputs: int, scale: fx.Node, bias: fx.Node | None) -> list[np.ndarray]:
    factors = parameter(lowering, node, scale)
    assert factors is not None
    return [plan_fp8.pack_scale(outputs, factors), pack_bias(outputs, parameter(lowering, node, bias))]


def _emit(lowering: Lowering, generator: Any, shape: Any, done: Finish, operands: list[Any], place: str) -> None:
    family = generator.__module__.rpartition(".")[2]
    options = {"macs": shape.macs, "label": family, "multiplied": "float8_e4m3fn"}
    emit_end(lowering, generator, [shape, done.spec], done.nodes, operands, place, **options)
