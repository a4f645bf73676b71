"""Float depthwise convolution: channels in lanes, a run of outputs of one line in registers.

for image, vector of channels, output row:                                     (one task of the parallel loop)
    for tile of `rows` outputs:
        acc[rows] = bias
        for ky in the kernel rows inside the image, kx (unrolled):
            acc[i] += X[pixel(i, ky, kx), channels] * W[ky, kx, channels]
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....ir.errors import OptionError
from .base import LANES, Convolution, padded
from .convolution_f32 import pack_bias
from .emit import accumulator, arguments, bind, build, clamp_start, loop, parallel_kind, store
from .float_base import NO_ACTIVATION, VECTOR, Activation, Level, level_of
from .window import Segment, column_segments, kernel_rows

__all__ = ["depthwise", "pack_bias", "pack_weight", "packed_weight_shape"]


def packed_weight_shape(shape: Convolution) -> tuple[int, int, int]:
    return padded(shape.filters) // LANES, shape.kernel[0] * shape.kernel[1], LANES


def pack_weight(shape: Convolution, weight: np.ndarray) -> np.ndarray:
    """(C, 1, KH, KW) -> [C / LANES, KH * KW, LANES], zeros in the padding."""
    expected = (shape.filters, 1, *shape.kernel)
    if weight.shape != expected:
        raise OptionError(f"depthwise weight: expected shape {expected}, got {weight.shape}")
    full = np.zeros((padded(shape.filters), shape.kernel[0] * shape.kernel[1]), np.float32)
    full[: shape.filters] = weight.reshape(shape.filters, -1)
    return np.ascontiguousarray(full.reshape(-1, LANES, full.shape[1]).transpose(0, 2, 1))


def choose_rows(level: Level, shape: Convolution) -> int:
    """Outputs of one tile: half the register file, and as even a cut of the line as that allows."""
    most = max(1, min(level.registers // 2 - 2, shape.out_width)) if level.registers > 8 else min(4, shape.out_width)
    return -(-shape.out_width // -(-shape.out_width // most))


def depthwise(
    shape: Convolution,
    activation: Activation = NO_ACTIVATION,
    level: str = "avx512",
    rows: int | None = None,
    name: str = "depthwise_f32",
) -> tirx.PrimFunc:
    """(X [N, H, W, Cp], W packed, bias [Cp], Y [N, OH, OW, Cp]); lanes of Y past C hold anything.

    Raises:
        OptionError: not a depthwise shape. UnknownNameError: unknown level.
    """
    if not shape.groups == shape.channels == shape.filters:
        raise OptionError(f"depthwise: groups, channels and filters must be equal, got {shape}")
    chosen = level_of(level)
    rows = min(rows or choose_rows(chosen, shape), shape.out_width)
    groups = padded(shape.channels) // LANES

    def body() -> None:
        x, w, bias, y = arguments(
            ("X", (shape.batch, shape.height, shape.width, groups * LANES), "float32"),
            ("W", packed_weight_shape(shape), "float32"),
            ("bias", (groups * LANES,), "float32"),
            ("Y", (shape.batch, shape.out_height, shape.out_width, groups * LANES), "float32"),
        )
        segments = column_segments(shape, rows)
        microseconds = 2 * shape.macs / (chosen.flops_per_us / 4)
        with loop(shape.batch * groups * shape.out_height, parallel_kind(microseconds)) as index:
            oy = bind(T.floormod(index, shape.out_height))
            group = bind(T.floormod(T.floordiv(index, shape.out_height), groups))
            image = bind(T.floordiv(index, shape.out_height * groups))
            bounds = kernel_rows(shape, oy)
            for segment in segments:
                with loop(segment.count) as tile:
                    column = clamp_start(segment.first + tile, rows, shape.out_width)
                    column = column if isinstance(column, int) else bind(column)
                    _tile(shape, segment, activation, (x, w, bias, y), (image, oy, column, group), bounds)

    return build(name, body)


def _tile(
    shape: Convolution,
    segment: Segment,
    activation: Activation,
    buffers: tuple[Any, Any, Any, Any],
    place: tuple[Any, Any, Any, Any],
    bounds: tuple[Any, Any],
) -> None:
    (x, w, bias, y), (image, oy, column, group) = buffers, place
    row_size, taps = padded(shape.channels), shape.kernel[0] * shape.kernel[1]
    first = bind(bias.vload([group * LANES], VECTOR))
    acc = [accumulator("float32") for _ in segment.valid]
    for sums in acc:
        store(sums, 0, first)
    low, high = bounds
    with loop(shape.kernel[0]) if isinstance(low, int) else T.serial(low, high) as ky:
        line = (image * shape.height + oy * shape.stride[0] + ky * shape.dilation[0] - shape.padding[0]) * shape.width
        pixel = line + column * shape.stride[1] - shape.padding[1]
        x_base = bind(pixel * row_size + group * LANES)
        w_base = bind((group * taps + ky * shape.kernel[1]) * LANES)
        for kx in range(shape.kernel[1]):
            rows = segment.rows(kx)
            if not rows:
                continue
            weight = bind(w.vload([w_base + kx * LANES], VECTOR))
            for i in rows:
                offset = (i * shape.stride[1] + kx * shape.dilation[1]) * row_size
                store(acc[i], 0, acc[i].vload([0], VECTOR) + x.vload([x_base + offset], VECTOR) * weight)
    out = bind(((image * shape.out_height + oy) * shape.out_width + column) * row_size + group * LANES)
    for i, sums in enumerate(acc):
        store(y, out + i * row_size, activation.emit(sums.vload([0], VECTOR)))
