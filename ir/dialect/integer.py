"""Integer ops of the `gw::` dialect: the meaning of the integer stage.

Quantized tensors are u8 or s8 with one scale and zero point a tensor; weights are s8, symmetric; accumulators are s32.
Float rescaling is one IEEE float32 multiply and one round-half-even, never fused with another operation. Dyadic rescaling
(HAWQ-V3, arXiv:2011.10680, section 3.1) is a 64-bit product, a rounding constant and an arithmetic shift: no float anywhere.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._library import define
from .fake import broadcast_along

#: Every integer up to this magnitude is a float32, so a float32 sum that stays below it is exact in any order.
FLOAT32_EXACT = 1 << 24


def _same(x, *_args, **_kwargs):
    return torch.empty_like(x)


def _as(dtype_index: int):
    def shape(*args):
        return torch.empty_like(args[0], dtype=args[dtype_index])

    return shape


def largest_magnitude(dtype: torch.dtype, zero_point: int) -> int:
    """Largest |q - zero_point| of a quantized type."""
    info = torch.iinfo(dtype)
    return max(abs(info.min - zero_point), abs(info.max - zero_point))


def accumulator_bound(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype, zero_point: int) -> int:
    """Largest |accumulator| of a convolution or linear layer, over any input: max over rows of ||w||_1 * max|q - z| + |b|."""
    rows = weight.reshape(weight.shape[0], -1).to(torch.int64).abs().sum(1) * largest_magnitude(dtype, zero_point)
    if bias is not None:
        rows = rows + bias.to(torch.int64).abs()
    return int(rows.max()) if rows.numel() else 0


def _exact_float(bound: int) -> torch.dtype:
    # Sums of integers below 2^24 are exact in float32, whatever their order; float64 covers the whole s32 range.
    return torch.float32 if bound < FLOAT32_EXACT else torch.float64


def _quantize_shape(x, scale, zero_point, qmin, qmax, dtype):
    return torch.empty_like(x, dtype=dtype)


@define("quantize(Tensor x, float scale, int zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor", _quantize_shape)
def quantize(x, scale: float, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype):
    """round_half_even(clamp(x * float32(1 / scale), qmin - z, qmax - z)) + z. x float32, any shape."""
    inverse = torch.reciprocal(torch.tensor(scale, dtype=torch.float32))
    steps = torch.round(torch.clamp(x * inverse, qmin - zero_point, qmax - zero_point))
    return (steps.to(torch.int32) + zero_point).to(dtype)


@define(
    "dequantize(Tensor x, float scale, int zero_point) -> Tensor",
    lambda x, scale, zero_point: torch.empty_like(x, dtype=torch.float32),
)
def dequantize(x, scale: float, zero_point: int):
    """float32(q - z) * scale."""
    return (x.to(torch.int32) - zero_point).to(torch.float32) * torch.tensor(scale, dtype=torch.float32)


def _convolution_shape(x, weight, bias, stride, padding, dilation, groups, zero_point):
    out = torch.nn.functional
    conv = {3: out.conv1d, 4: out.conv2d, 5: out.conv3d}[x.dim()]
    return conv(x.to(torch.float32), weight.to(torch.float32), None, stride, padding, dilation, groups).to(torch.int32)


@define(
    "convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation, "
    "int groups, int zero_point) -> Tensor",
    _convolution_shape,
)
def convolution(x, weight, bias, stride, padding, dilation, groups: int, zero_point: int):
    """sum (x - zero_point) * w + bias in s32. x (N, C, *spatial) u8/s8, weight (O, C / groups, *kernel) s8, bias (O,) s32.

    Padding is symmetric and stands for the real value 0, that is, for `zero_point`.
    """
    exact = _exact_float(accumulator_bound(weight, None, x.dtype, zero_point))
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    acc = conv(x.to(exact) - zero_point, weight.to(exact), None, stride, padding, dilation, groups).to(torch.int32)
    return acc if bias is None else acc + broadcast_along(bias, x.dim(), 1)


def _linear_shape(x, weight, bias, zero_point):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int32, device=x.device)


@define("linear(Tensor x, Tensor weight, Tensor? bias, int zero_point) -> Tensor", _linear_shape)
def linear(x, weight, bias, zero_point: int):
    """(x - zero_point) @ weight^T + bias in s32. x (..., K) u8/s8, weight (N, K) s8, bias (N,) s32."""
    exact = _exact_float(accumulator_bound(weight, None, x.dtype, zero_point))
    acc = F.linear(x.to(exact) - zero_point, weight.to(exact)).to(torch.int32)
    return acc if bias is None else acc + bias


def _matmul_shape(a, b, a_zero_point, b_zero_point):
    return torch.matmul(a.to(torch.float32), b.to(torch.float32)).to(torch.int32)


@define("matmul(Tensor a, Tensor b, int a_zero_point, int b_zero_point) -> Tensor", _matmul_shape)
def matmul(a, b, a_zero_point: int, b_zero_point: int):
    """(a - a_zero_point) @ (b - b_zero_point) in s32, batched and broadcast as torch.matmul. a (..., M, K), b (..., K, N)."""
    bound = a.shape[-1] * largest_magnitude(a.dtype, a_zero_point) * largest_magnitude(b.dtype, b_zero_point)
    exact = _exact_float(bound)
    return torch.matmul(a.to(exact) - a_zero_point, b.to(exact) - b_zero_point).to(torch.int32)


@define(
    "rescale(Tensor acc, Tensor scale, int zero_point, int qmin, int qmax, ScalarType dtype, int axis) -> Tensor",
    _as(5),
)
def rescale(acc, scale, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype, axis: int):
    """round_half_even(clamp(float32(acc) * scale, qmin - z, qmax - z)) + z. acc s32; scale float32, (1,) or (C,) along `axis`."""
    product = acc.to(torch.float32) * broadcast_along(scale, acc.dim(), axis)
    steps = torch.round(torch.clamp(product, qmin - zero_point, qmax - zero_point))
    return (steps.to(torch.int32) + zero_point).to(dtype)


@define(
    "rescale_dyadic(Tensor acc, Tensor multiplier, Tensor shift, int zero_point, int qmin, int qmax, "
    "ScalarType dtype, int axis) -> Tensor",
    _as(6),
)
def rescale_dyadic(acc, multiplier, shift, zero_point: int, qmin: int, qmax: int, dtype: torch.dtype, axis: int):
    """clamp(((acc * multiplier + 2^(shift - 1)) >> shift) + z, qmin, qmax) in 64-bit integers.

    multiplier s32 and shift s32 in [1, 62], each (1,) or (C,) along `axis`; the real factor is multiplier / 2^shift.
    """
    multiplier = broadcast_along(multiplier, acc.dim(), axis).to(torch.int64)
    shift = broadcast_along(shift, acc.dim(), axis).to(torch.int64)
    half = torch.bitwise_left_shift(torch.ones_like(shift), shift - 1)
    steps = torch.bitwise_right_shift(acc.to(torch.int64) * multiplier + half, shift)
    return torch.clamp(steps + zero_point, qmin, qmax).to(dtype)


@define(
    "scale(Tensor acc, Tensor scale, int axis) -> Tensor",
    lambda acc, scale, axis: torch.empty_like(acc, dtype=torch.float32),
)
def scale(acc, scale, axis: int):
    """float32(acc) * scale: an accumulator leaves its integer region. scale float32, (1,) or (C,) along `axis`."""
    return acc.to(torch.float32) * broadcast_along(scale, acc.dim(), axis)


def _add_shape(a, b, *rest):
    return torch.empty(torch.broadcast_shapes(a.shape, b.shape), dtype=rest[-1], device=a.device)


@define(
    "add(Tensor a, Tensor b, int a_multiplier, int b_multiplier, int shift, int a_zero_point, int b_zero_point, "
    "int zero_point, int qmin, int qmax, ScalarType dtype) -> Tensor",
    _add_shape,
)
def add(
    a,
    b,
    a_multiplier: int,
    b_multiplier: int,
    shift: int,
    a_zero_point: int,
    b_zero_point: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
):
    """clamp((((a - za) * ma + (b - zb) * mb + 2^(shift - 1)) >> shift) + z, qmin, qmax), all in s32.

    The same fixed-point sum serves both rescaling modes. |ma|, |mb| <= 2^21 keeps every intermediate inside s32.
    """
    total = (a.to(torch.int32) - a_zero_point) * a_multiplier + (b.to(torch.int32) - b_zero_point) * b_multiplier
    steps = torch.bitwise_right_shift(total + (1 << (shift - 1)), shift)
    return torch.clamp(steps + zero_point, qmin, qmax).to(dtype)


@define(
    "multiply(Tensor a, Tensor b, int a_zero_point, int b_zero_point) -> Tensor",
    lambda a, b, a_zero_point, b_zero_point: torch.empty(
        torch.broadcast_shapes(a.shape, b.shape), dtype=torch.int32, device=a.device
    ),
)
def multiply(a, b, a_zero_point: int, b_zero_point: int):
    """(a - za) * (b - zb) in s32, broadcast."""
    return (a.to(torch.int32) - a_zero_point) * (b.to(torch.int32) - b_zero_point)


@define("lookup(Tensor x, Tensor table) -> Tensor", lambda x, table: torch.empty_like(x, dtype=table.dtype))
def lookup(x, table):
    """table[x - lowest value of x's type]: any unary function of an 8-bit value. table (256,) u8 or s8."""
    return table[x.to(torch.int64) - torch.iinfo(x.dtype).min]


def _max_pool_shape(x, kernel, stride, padding, dilation, ceil_mode):
    return F.max_pool2d(x.to(torch.float32), kernel, stride, padding, dilation, ceil_mode).to(x.dtype)


@define(
    "max_pool2d(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool ceil_mode) -> Tensor",
    _max_pool_shape,
)
def max_pool2d(x, kernel, stride, padding, dilation, ceil_mode: bool):
    """Maximum over windows of an 8-bit (N, C, H, W) tensor; padding never wins."""
    return F.max_pool2d(x.to(torch.float32), kernel, stride, padding, dilation, ceil_mode).to(x.dtype)


def _sum_pool_shape(x, kernel, stride, padding, zero_point):
    return F.avg_pool2d(x.to(torch.float32), kernel, stride, padding).to(torch.int32)


@define(
    "sum_pool2d(Tensor x, SymInt[] kernel, SymInt[] stride, SymInt[] padding, int zero_point) -> Tensor",
    _sum_pool_shape,
)
def sum_pool2d(x, kernel, stride, padding, zero_point: int):
    """Sum of (x - zero_point) over windows in s32; padding counts as 0. An average pool is this and a rescale by 1 / count."""
    return F.avg_pool2d(x.to(torch.float64) - zero_point, kernel, stride, padding, divisor_override=1).to(torch.int32)


def _sum_shape(x, dims, keepdim, zero_point):
    return torch.sum(x.to(torch.int32), dims, keepdim, dtype=torch.int32)


@define("sum(Tensor x, int[] dims, bool keepdim, int zero_point) -> Tensor", _sum_shape)
def sum(x, dims, keepdim: bool, zero_point: int):
    """Sum of (x - zero_point) over `dims` in s32. A mean is this and a rescale by 1 / count."""
    return torch.sum(x.to(torch.int32) - zero_point, dims, keepdim, dtype=torch.int32)
