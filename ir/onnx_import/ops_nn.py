"""Convolution, pooling and normalization."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .registry import Call, op

CONV: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Callable[..., torch.Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL: dict[int, Callable[..., torch.Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
GLOBAL_AVG_POOL: dict[int, Callable[..., torch.Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}

Pads = tuple[list[int], list[int]]


def spatial(call: Call, x: torch.Tensor) -> int:
    rank = x.dim() - 2
    if rank not in (1, 2, 3):
        raise call.fail(f"its input has {rank} spatial dimensions; 1, 2 or 3 are supported")
    return rank


def pads_of(call: Call, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]) -> Pads:
    """Pads before and after each spatial axis, with `auto_pad` worked out."""
    rank = len(kernel)
    auto = call.attr("auto_pad", "NOTSET")
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
        ]
        small = [t // 2 for t in totals]
        large = [t - t // 2 for t in totals]
        return (small, large) if auto == "SAME_UPPER" else (large, small)
    pads = call.attr("pads") or [0] * (2 * rank)
    return list(pads[:rank]), list(pads[rank:])


def pad_spatial(x: torch.Tensor, before: list[int], after: list[int], value: float = 0.0) -> torch.Tensor:
    return F.pad(x, [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair], value=value)


@op("Conv")
def conv(call: Call, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    rank = spatial(call, x)
    kernel = list(w.shape[2:])
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    before, after = pads_of(call, list(x.shape[2:]), kernel, strides, dilations)
    if before != after:
        x, before = pad_spatial(x, before, after), [0] * rank
    return CONV[rank](x, w, b, strides, before, dilations, call.attr("group"))


@op("ConvTranspose")
def conv_transpose(call: Call, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """Where the pads are not the same on both sides, the whole result is computed and cropped."""
    rank = spatial(call, x)
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    extra = call.attr("output_padding") or [0] * rank
    full = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], strides, w.shape[2:], dilations, strict=True)]
    wanted = call.attr("output_shape")
    auto = call.attr("auto_pad", "NOTSET")
    if wanted or auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = wanted or [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
        totals = [max(f + e - o, 0) for f, e, o in zip(full, extra, wanted, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        before, after = pads_of(call, list(x.shape[2:]), list(w.shape[2:]), strides, dilations)
        wanted = [f + e - p - q for f, e, p, q in zip(full, extra, before, after, strict=True)]
    run = CONV_TRANSPOSE[rank]
    if before == after and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
        extra = [o - (f - 2 * p) for o, f, p in zip(wanted, full, before, strict=True)]
        if all(0 <= e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True)):
            return run(x, w, b, strides, before, extra, call.attr("group"), dilations)
    y = run(x, w, None, strides, 0, 0, call.attr("group"), dilations)
    # A negative pad crops; output padding (or an output shape beyond the whole result) pads with zeros, then the bias comes.
    y = pad_spatial(y, [-p for p in before], [o + p - f for o, p, f in zip(wanted, before, full, strict=True)])
    return y if b is None else y + b.reshape(-1, *[1] * rank)


# -- pooling -----------------------------------------------------------------------------------------------------------------


def _window(call: Call, x: torch.Tensor) -> tuple[int, list[int], list[int], list[int], Pads]:
    rank = spatial(call, x)
    kernel = call.attr("kernel_shape")
    strides, dilations = call.attr("strides") or [1] * rank, call.attr("dilations") or [1] * rank
    return rank, kernel, strides, dilations, pads_of(call, list(x.shape[2:]), kernel, strides, dilations)


def _fits(before: list[int], after: list[int], kernel: list[int]) -> bool:
    """torch pools take one pad for both sides, at most half the window."""
    return before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))


@op("MaxPool")
def max_pool(call: Call, x: torch.Tensor) -> Any:
    rank, kernel, strides, dilations, (before, after) = _window(call, x)
    ceil, dtype, sizes = bool(call.attr("ceil_mode", 0)), x.dtype, list(x.shape[2:])
    x = x if x.is_floating_point() else x.to(torch.float32)
    indices = len(call.wanted) > 1 and call.wanted[1]
    if not _fits(before, after, kernel):
        if indices:
            raise call.fail("indices of a pool with uneven pads are not supported; pad first with a Pad node")
        x, before = pad_spatial(x, before, after, -math.inf), [0] * rank
    if not indices:
        return MAX_POOL[rank](x, kernel, strides, before, dilations, ceil).to(dtype)
    y, where = MAX_POOL[rank](x, kernel, strides, before, dilations, ceil, return_indices=True)
    if call.attr("storage_order", 0):
        # torch counts row by row; storage order 1 counts column by column.
        remaining, position, stride = where, torch.zeros_like(where), math.prod(sizes)
        for size in reversed(sizes):
            stride //= size
            position, remaining = position + remaining % size * stride, torch.div(remaining, size, rounding_mode="floor")
        where = position
    volume = math.prod(sizes)
    starts = torch.arange(x.shape[0] * x.shape[1]).reshape(x.shape[0], x.shape[1], *[1] * rank) * volume
    return y.to(dtype), where + starts


@op("AveragePool")
def average_pool(call: Call, x: torch.Tensor) -> torch.Tensor:
    rank, kernel, strides, dilations, (before, after) = _window(call, x)
    ceil, include = bool(call.attr("ceil_mode", 0)), bool(call.attr("count_include_pad", 0))
    if any(d != 1 for d in dilations):
        raise call.fail("dilated average pooling is not supported")
    if _fits(before, after, kernel):
        return AVG_POOL[rank](x, kernel, strides, before, ceil, include)
    padded = pad_spatial(x, before, after)
    y = AVG_POOL[rank](padded, kernel, strides, 0, ceil)
    if include:
        return y

    def share() -> np.ndarray:
        ones = pad_spatial(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype), before, after)
        return AVG_POOL[rank](ones, kernel, strides, 0, ceil).numpy()

    return y / call.buffer("share", share)


@op("LpPool")
def lp_pool(call: Call, x: torch.Tensor) -> torch.Tensor:
    rank, kernel, strides, dilations, (before, after) = _window(call, x)
    if any(d != 1 for d in dilations):
        raise call.fail("dilated Lp pooling is not supported")
    p = call.attr("p")
    padded = pad_spatial(torch.pow(torch.abs(x), p), before, after)
    mean = AVG_POOL[rank](padded, kernel, strides, 0, bool(call.attr("ceil_mode", 0)))
    return torch.pow(mean * math.prod(kernel), 1.0 / p)


@op("GlobalAveragePool")
def global_average_pool(call: Call, x: torch.Tensor) -> torch.Tensor:
    return GLOBAL_AVG_POOL[spatial(call, x)](x, 1)


@op("GlobalMaxPool")
def global_max_pool(call: Call, x: torch.Tensor) -> torch.Tensor:
    return torch.amax(x, list(range(2, x.dim())), True)


@op("GlobalLpPool")
def global_lp_pool(call: Call, x: torch.Tensor) -> torch.Tensor:
    p = call.attr("p")
    return torch.pow(torch.sum(torch.pow(torch.abs(x), p), list(range(2, x.dim())), True), 1.0 / p)


# -- normalization -----------------------------------------------------------------------------------------------------------


@op("BatchNormalization", since=7)
def batch_norm(
    call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor
) -> torch.Tensor:
    if call.attr("training_mode", 0) or any(call.wanted[1:]):
        raise call.fail("it is in training mode; export the model for inference")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.1, call.attr("epsilon"))


@op("InstanceNormalization")
def instance_norm(call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.attr("epsilon"))


@op("GroupNormalization", since=18)
def group_norm_by_group(call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Opset 18 to 20: one scale and bias a group."""
    each = x.shape[1] // call.attr("num_groups")
    scale, bias = scale.repeat_interleave(each), bias.repeat_interleave(each)
    return F.group_norm(x, call.attr("num_groups"), scale, bias, call.attr("epsilon"))


@op("GroupNormalization", since=21)
def group_norm(call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x, call.attr("num_groups"), scale, bias, call.attr("epsilon"))


@op("LayerNormalization")
def layer_norm(call: Call, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    axis = call.attr("axis") % x.dim()
    shape = list(x.shape[axis:])
    epsilon = call.attr("epsilon")
    fitting = list(scale.shape) == shape and (bias is None or list(bias.shape) == shape)
    y = F.layer_norm(x, shape, scale if fitting else None, bias if fitting else None, epsilon)
    if not fitting:  # scale and bias broadcast
        y = y * scale if bias is None else y * scale + bias
    if not any(call.wanted[1:]):
        return y
    over = list(range(axis, x.dim()))
    wide = x.to(torch.float32)
    mean = torch.mean(wide, over, True)
    return y, mean, torch.rsqrt(torch.mean((wide - mean) ** 2, over, True) + epsilon)


@op("RMSNormalization")
def rms_norm(call: Call, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    over = list(range(call.attr("axis") % x.dim(), x.dim()))
    wide = x.to(torch.float32) if x.dtype != torch.float64 else x
    y = wide * torch.rsqrt(torch.mean(wide * wide, over, True) + call.attr("epsilon"))
    return y.to(x.dtype) * scale


@op("LRN")
def local_response_norm(call: Call, x: torch.Tensor) -> torch.Tensor:
    size, alpha, beta, bias = call.attr("size"), call.attr("alpha"), call.attr("beta"), call.attr("bias")
    squares = (x * x).movedim(1, -1)
    padded = F.pad(squares, ((size - 1) // 2, size - 1 - (size - 1) // 2))
    window = sum(padded[..., i : i + x.shape[1]] for i in range(size))
    return x / torch.pow(window.movedim(-1, 1) * (alpha / size) + bias, beta)  # type: ignore[union-attr]


@op("LpNormalization")
def lp_normalization(call: Call, x: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(x, call.attr("p"), call.attr("axis"), True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)
