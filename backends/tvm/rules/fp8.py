"""Layers of 8-bit floats, on targets whose tensor cores multiply them. Values are bytes until a kernel reads them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.dialect.fp8 import inverse_of
from ....ir.errors import TargetError
from ....ir.program import dtype_of, origin_of, shape_of
from ..cuda.kernels import convolution_fp8, linear_fp8, plan_fp8, quantize_fp8
from ..cuda.kernels.plan_float import pack_bias
from ..cuda.kernels.plan_fp8 import Store
from ..kernels.float_base import MatrixProduct
from ..lower import Lowering, rule, unsupported
from ..values import DTYPES, SUFFIXES, Value, arguments, shape_of_var
from .floating import Finish, finish
from .operands import planar, without_frame


def require_fp8(lowering: Lowering, node: fx.Node) -> None:
    """Raises TargetError where the target multiplies no 8-bit floats."""
    target = lowering.target
    if target.arch != "cuda" or target.level not in plan_fp8.LEVELS:
        levels = ", ".join(f"cuda:{level}" for level in plan_fp8.LEVELS)
        raise TargetError(
            f"{target} has no products of 8-bit floats, which '{node.name}' (from {origin_of(node)}) computes; compile for "
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


@dataclass(frozen=True)
class End:
    """How a layer's kernel ends: its tail, and the codes that the next layers read of its value."""

    finish: Finish
    store: Store
    codes: fx.Node | None = None

    def bind(self, lowering: Lowering, results: list[Any], place: str) -> None:
        """Binds what the kernel wrote, in that layout."""
        *before, last = self.finish.nodes
        for node in before:
            lowering.bind(node, [])
        written = list(results)
        lowering.bind(last, _value(last, DTYPES[dtype_of(last)], place, written.pop(0)) if self.store.value else [])
        if self.codes is not None:
            lowering.bind(self.codes, _value(self.codes, "uint8", place, written.pop(0)))


def _value(node: fx.Node, dtype: str, place: str, var: Any) -> Value:
    return Value(shape_of(node), dtype, **{place: var})


def end_of(lowering: Lowering, node: fx.Node) -> End:
    """Takes in the addition and the activation that follow, and the codes that are made of the result."""
    done = finish(lowering, node)
    last = done.nodes[-1]
    codes = next((user for user in last.users if user.target is gw.quantize_fp8.default), None)
    if codes is None:
        return End(done, Store())
    return End(done, Store(value=len(last.users) > 1, codes=True), codes)


def _inverse(node: fx.Node) -> np.ndarray:
    """(1,): what `quantize_fp8` multiplies with. A buffer, so that layers of one shape are one kernel whatever their scales."""
    return inverse_of(arguments(node)[1]).numpy().reshape(1)


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
    spec, inputs = (prod(shape), dtype), [var, _inverse(node)]
    out = lowering.kernel(quantize_fp8.quantize, *spec, inputs=inputs, nodes=(node,), label="quantize_fp8")
    lowering.bind(node, _value(node, "uint8", place, lowering.reshape(out, shape)))


@rule(gw.linear_fp8.default)
def linear(lowering: Lowering, node: fx.Node) -> None:
    require_fp8(lowering, node)
    x, weight, *vectors, _ = arguments(node)
    matrix = parameter(lowering, node, weight)
    assert matrix is not None
    outputs, inner = matrix.shape
    shape, end = MatrixProduct(prod(shape_of(x)[:-1]), inner, outputs), end_of(lowering, node)
    operands = [lowering.dense(x), *_residual(lowering.dense, end), plan_fp8.pack_linear(matrix)]
    operands += _vectors(lowering, node, outputs, *vectors)
    _emit(lowering, linear_fp8.linear, shape, end, operands, "dense")


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
    end = end_of(lowering, node)
    packed = plan_fp8.pack_convolution(shape, kernel.reshape(shape.filters, -1, *shape.kernel))
    operands = [lowering.channels(x), *_residual(lowering.channels, end), packed]
    operands += _vectors(lowering, node, shape.filters, scale, bias)
    _emit(lowering, convolution_fp8.convolution, shape, end, operands, "channels")


def _residual(read: Any, end: End) -> list[Any]:
    return [] if end.finish.residual is None else [read(end.finish.residual)]


def _vectors(lowering: Lowering, node: fx.Node, outputs: int, scale: fx.Node, bias: fx.Node | None) -> list[np.ndarray]:
    factors = parameter(lowering, node, scale)
    assert factors is not None
    return [plan_fp8.pack_scale(outputs, factors), pack_bias(outputs, parameter(lowering, node, bias))]


def _emit(lowering: Lowering, generator: Any, shape: Any, end: End, operands: list[Any], place: str) -> None:
    covered = (*end.finish.nodes, *([] if end.codes is None else [end.codes]))
    options = {"nodes": covered, "macs": shape.macs, "label": generator.__module__.rpartition(".")[2]}
    inputs = [*operands, *([] if end.codes is None else [_inverse(end.codes)])]
    spec = shape, end.finish.spec, end.store
    results = lowering.kernel_outputs(generator, *spec, inputs=inputs, outputs=end.store.outputs, **options)
    end.bind(lowering, results, place)
