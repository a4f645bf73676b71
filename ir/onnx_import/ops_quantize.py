"""Quantization operators of a QDQ model, in float arithmetic: scale division, round half to even, clamp."""

from __future__ import annotations

import math

import onnx
import torch

from .ops_nn import CONV, pad_spatial, pads_of, spatial
from .registry import Call, op, torch_type

RANGES: dict[int, tuple[int, int]] = {onnx.TensorProto.INT4: (-8, 7), onnx.TensorProto.UINT4: (0, 15)}


def _along(value: torch.Tensor, x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Scales and zero points of one value, of one axis, or of blocks of an axis, shaped to broadcast over `x`."""
    if value.numel() == 1:
        return value.reshape(())
    axis %= x.dim()
    if block:
        return value.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return value.reshape([-1 if i == axis else 1 for i in range(x.dim())])


def _quantize(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype, low: int, high: int
) -> torch.Tensor:
    steps = torch.round(x / scale.to(x.dtype))
    if zero is not None:
        steps = steps + zero.to(steps.dtype)
    return torch.clamp(steps, low, high).to(dtype) if dtype.itemsize < 4 else steps.to(dtype)


@op("QuantizeLinear")
def quantize_linear(call: Call, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    element = call.attr("output_dtype") or call.narrow(2)
    dtype = zero.dtype if zero is not None else torch_type(element, call.name) if element else torch.uint8
    axis, block = call.attr("axis", 1), call.attr("block_size", 0)
    if call.version < 13:
        axis = 0
    scale = _along(scale, x, axis, block)
    zero = None if zero is None else _along(zero, x, axis, block)
    if dtype.is_floating_point:
        largest = torch.finfo(dtype).max
        return torch.clamp(x / scale, -largest, largest).to(dtype)
    low, high = RANGES.get(element, (torch.iinfo(dtype).min, torch.iinfo(dtype).max))
    return _quantize(x if x.is_floating_point() else x.to(torch.float32), scale, zero, dtype, low, high)


@op("DequantizeLinear")
def dequantize_linear(call: Call, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
    axis, block = call.attr("axis", 1), call.attr("block_size", 0)
    dtype = torch_type(call.attr("output_dtype"), call.name) if call.attr("output_dtype") else scale.dtype
    if x.dtype.is_floating_point:
        return (x.to(torch.float32) * _along(scale, x, axis, block)).to(dtype)
    steps = x.to(torch.int32)
    if zero is not None:
        steps = steps - _along(zero, x, axis, block).to(torch.int32)
    return (steps.to(scale.dtype) * _along(scale, x, axis, block)).to(dtype)


@op("DynamicQuantizeLinear")
def dynamic_quantize_linear(call: Call, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = torch.clamp(torch.amin(x), max=0.0), torch.clamp(torch.amax(x), min=0.0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255).to(torch.uint8)
    return _quantize(x, scale, zero, torch.uint8, 0, 255), scale, zero


def _requantize(total: torch.Tensor, factor: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    limits = torch.iinfo(zero.dtype)
    steps = torch.round(total.to(torch.float32) * factor) + zero.to(torch.float32)
    return torch.clamp(steps, limits.min, limits.max).to(zero.dtype)


@op("QLinearMatMul")
def qlinear_matmul(call: Call, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero) -> torch.Tensor:
    total = torch.matmul(a.to(torch.int32) - a_zero.to(torch.int32), b.to(torch.int32) - b_zero.to(torch.int32))
    factor = a_scale.to(torch.float32) * b_scale.to(torch.float32) / y_scale.to(torch.float32)
    return _requantize(total, factor, y_zero)


def _conv_exact(call: Call, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """An integer convolution in float64, which holds every sum of 8-bit products exactly."""
    rank = spatial(call, x)
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    before, after = pads_of(call, list(x.shape[2:]), list(w.shape[2:]), strides, dilations)
    y = CONV[rank](pad_spatial(x, before, after), w, bias, strides, 0, dilations, call.attr("group"))
    return y.to(torch.int32)


def _centered(x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    wide = x.to(torch.float64)
    if zero is None:
        return wide
    shape = [math.prod(zero.shape), *[1] * (x.dim() - 1)] if zero.numel() > 1 else []
    return wide - zero.to(torch.float64).reshape(shape)


@op("ConvInteger")
def conv_integer(call: Call, x, w, x_zero=None, w_zero=None) -> torch.Tensor:
    return _conv_exact(call, _centered(x, x_zero), _centered(w, w_zero), None)


@op("QLinearConv")
def qlinear_conv(call: Call, x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, bias=None) -> torch.Tensor:
    total = _conv_exact(call, _centered(x, x_zero), _centered(w, w_zero), None if bias is None else bias.to(torch.float64))
    factor = x_scale * w_scale / y_scale
    return _requantize(total, factor.reshape(-1, *[1] * (x.dim() - 2)) if factor.numel() > 1 else factor.reshape(()), y_zero)
