"""Float depthwise convolution: channels in lanes, a run of outputs of one line in registers. Levels of `half_neon` multiply
float16 as it lies; the others widen it.

for image, vector of channels, output row:                                     (one task of the parallel loop)
    for tile of `rows` outputs:
        acc[rows] = bias
        for ky in the kernel rows inside the image, kx (unrolled):
            acc[i] += X[pixel(i, ky, kx), channels] * W[ky, kx, channels]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Convolution, padded
from .convolution_f32 import pack_bias
from .emit import bind, build, clamp_start, loop, parallel_kind
from .float_base import CACHED_BYTES, PLAIN, Buffers, FloatSpec, Level, declare, level_of
from .half import NUMPY, is_half, widened
from .half_neon import CHAINED, LONG, WINDOW, HalfSums, LongSums, pair, scale_of, scaled_panels
from .isa import T
from .multiply import Sums, Whole
from .window import Segment, column_segments, kernel_rows

__all__ = ["depthwise", "pack_bias", "pack_weight", "packed_weight_shape"]


def packed_weight_shape(shape: Convolution, chained: bool = False) -> tuple[int, int, int]:
    return padded(shape.filters) // LANES, chained + shape.kernel[0] * shape.kernel[1], LANES


def chains(shape: Convolution) -> bool:
    """Whether a window is small enough for the sums in float16 of level `half_neon.CHAINED`."""
    return shape.kernel[0] * shape.kernel[1] <= WINDOW


def pack_weight(shape: Convolution, weight: np.ndarray, dtype: str = "float32", chained: bool = False) -> np.ndarray:
    """(C, 1, KH, KW) -> [C / LANES, KH * KW, LANES], zeros in the padding; chained: behind one row of scales, see `half_neon`."""
    expected = (shape.filters, 1, *shape.kernel)
    if weight.shape != expected:
        raise OptionError(f"depthwise weight: expected shape {expected}, got {weight.shape}")
    full = np.zeros((padded(shape.filters), shape.kernel[0] * shape.kernel[1]), np.float32)
    full[: shape.filters] = weight.reshape(shape.filters, -1)
    panels = np.ascontiguousarray(full.reshape(-1, LANES, full.shape[1]).transpose(0, 2, 1))
    return scaled_panels(panels, full.shape[1]) if chained else panels.astype(NUMPY[dtype])


def choose_rows(level: Level, shape: Convolution) -> int:
    """Outputs of one tile: half the register file, and as even a cut of the line as that allows."""
    most = max(1, min(level.registers // 2 - 2, shape.out_width)) if level.registers > 8 else min(4, shape.out_width)
    return -(-shape.out_width // -(-shape.out_width // most))


def depthwise(shape: Convolution, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    """(X [N, H, W, Cp], W packed, bias [Cp], Y [N, OH, OW, Cp]); lanes of Y past C hold anything. A tile has one group.

    Raises:
        OptionError: not a depthwise shape, or a window too large for level `half_neon.CHAINED`. UnknownNameError: unknown level.
    """
    if spec.chained and not chains(shape):
        raise OptionError(f"depthwise: level {spec.level} sums at most {WINDOW} taps, not {shape.kernel}")
    if not shape.groups == shape.channels == shape.filters:
        raise OptionError(f"depthwise: groups, channels and filters must be equal, got {shape}")
    level = level_of(spec.level)
    rows = min(spec.tile.rows if spec.tile else choose_rows(level, shape), shape.out_width)
    groups = padded(shape.channels) // LANES

    def body() -> None:
        x_shape = (shape.batch, shape.height, shape.width, groups * LANES)
        y_shape = (shape.batch, shape.out_height, shape.out_width, groups * LANES)
        buffers = declare(spec, x_shape, packed_weight_shape(shape, spec.chained), groups * LANES, y_shape)
        _sweep(shape, spec, buffers).emit(shape, rows, buffers.x, 2 * shape.macs / (level.flops_per_us / 4))

    return build("depthwise_f32", body, spec.level)


def _sweep(shape: Convolution, spec: FloatSpec, buffers: Buffers) -> Sweep:
    panel = packed_weight_shape(shape, spec.chained)[1]

    def place(group: Any, ky: Any, kx: int) -> Any:
        return (group * panel + spec.chained + ky * shape.kernel[1] + kx) * LANES

    def scaled(value: Any, group: Any) -> Any:
        return value * scale_of(buffers.w, group * (panel * LANES)) + buffers.first(group) if spec.chained else value

    sweep = Sweep(
        initial=buffers.first,
        tap=lambda group, ky, kx: bind(widened(buffers.w, place(group, ky, kx))),
        add=lambda sums, value, weight: sums.start(sums.value() + value * weight),
        finish=lambda value, offset, group: buffers.finish(spec, scaled(value, group), offset),
    )
    if spec.level not in (LONG, CHAINED):
        return sweep
    return replace(
        sweep,
        tap=lambda group, ky, kx: pair(buffers.w, place(group, ky, kx)),
        add=lambda sums, value, weight: sums.add(weight, value),
        read=pair,
        sums=HalfSums if spec.chained else LongSums,
    )


@dataclass(frozen=True)
class Sweep:
    """What a channel-wise window computes: finish(sums of the window's taps inside the image, from `initial` on).

    initial(group) and tap(group, ky, kx) give vectors; read(X, offset) the LANES of a pixel; add(sums, pixel, tap);
    finish(value, offset, group) stores.
    """

    initial: Callable[[Any], Any]
    tap: Callable[[Any, Any, int], Any]
    add: Callable[[Any, Any, Any], None]
    finish: Callable[[Any, Any, Any], None]
    read: Callable[[Any, Any], Any] = widened
    sums: Callable[[], Sums] = Whole

    def emit(self, shape: Convolution, rows: int, x: Any, microseconds: float) -> None:
        """Emits the loops over images, vectors of channels, output rows and tiles of `rows` outputs; x is a flat buffer."""
        groups = padded(shape.channels) // LANES
        segments = column_segments(shape, rows)
        with loop(shape.batch * groups * shape.out_height, parallel_kind(microseconds)) as index:
            # A small image is walked vector by vector, so that the rows a window shares are read from the first-level cache; a
            # large one streams past row by row.
            if shape.height * shape.width * groups * LANES * (2 if is_half(x) else 4) > CACHED_BYTES:
                group, oy = T.floormod(index, groups), T.floormod(T.floordiv(index, groups), shape.out_height)
            else:
                oy, group = T.floormod(index, shape.out_height), T.floormod(T.floordiv(index, shape.out_height), groups)
            group, oy = bind(group), bind(oy)
            image = bind(T.floordiv(index, shape.out_height * groups))
            bounds = kernel_rows(shape, oy)
            for segment in segments:
                with loop(segment.count) as tile:
                    column = clamp_start(segment.first + tile, rows, shape.out_width)
                    column = column if isinstance(column, int) else bind(column)
                    self._tile(shape, segment, x, (image, oy, column, group), bounds)

    def _tile(
        self, shape: Convolution, segment: Segment, x: Any, place: tuple[Any, Any, Any, Any], bounds: tuple[Any, Any]
    ) -> None:
        image, oy, column, group = place
        row_size = padded(shape.channels)
        first = bind(self.initial(group))
        acc = [self.sums() for _ in segment.valid]
        for total in acc:
            total.start(first)
        low, high = bounds
        with loop(shape.kernel[0]) if isinstance(low, int) else T.serial(low, high) as ky:
            line = (image * shape.height + oy * shape.stride[0] + ky * shape.dilation[0] - shape.padding[0]) * shape.width
            pixel = line + column * shape.stride[1] - shape.padding[1]
            x_base = bind(pixel * row_size + group * LANES)
            for first_kx, count, rows in segment.runs():
                for kx in range(first_kx, first_kx + count):
                    tap = self.tap(group, ky, kx)
                    for i in rows:
                        offset = (i * shape.stride[1] + kx * shape.dilation[1]) * row_size
                        self.add(acc[i], self.read(x, x_base + offset), tap)
        out = bind(((image * shape.out_height + oy) * shape.out_width + column) * row_size + group * LANES)
        for i, total in enumerate(acc):
            self.finish(total.value(), out + i * row_size, group)
