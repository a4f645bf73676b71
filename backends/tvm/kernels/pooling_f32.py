"""Float pooling of [N, H, W, Cp]: the largest or the mean of each window, channels in lanes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .base import Convolution, padded
from .depthwise_f32 import Sweep, choose_rows
from .emit import arguments, build
from .exact_float import constant
from .float_base import level_of, store_lanes
from .isa import T

#: Elements of windows that one core handles in a microsecond, for the choice between a serial and a parallel loop.
TAPS_PER_US = 10_000


def max_pool(shape: Convolution, level: str = "avx512", dtype: str = "float32") -> tirx.PrimFunc:
    """(X [N, H, W, Cp], Y [N, OH, OW, Cp]); a tap outside the image never is the largest. shape: channels = filters = groups."""
    return _pool("max_pool_f32", shape, (level, dtype), float("-inf"), T.max, lambda value: value)


def mean_pool(shape: Convolution, level: str = "avx512", dtype: str = "float32") -> tirx.PrimFunc:
    """The same for the mean over all taps, those outside the image counted as zeros. Bound: taps * 2^-23 * mean |x|, and the
    rounding of half precision."""
    taps = shape.kernel[0] * shape.kernel[1]
    return _pool("mean_pool_f32", shape, (level, dtype), 0.0, lambda a, b: a + b, lambda total: total * constant(1.0 / taps))


def _pool(name: str, shape: Convolution, form: tuple[str, str], start: float, combine: Any, finish: Any) -> tirx.PrimFunc:
    level, dtype = form

    def body() -> None:
        channels = padded(shape.channels)
        x, y = arguments(
            ("X", (shape.batch, shape.height, shape.width, channels), dtype),
            ("Y", (shape.batch, shape.out_height, shape.out_width, channels), dtype),
        )
        sweep = Sweep(
            initial=lambda group: constant(start),
            tap=lambda group, ky, kx: None,
            add=lambda largest, value, tap: largest.start(combine(largest.value(), value)),
            finish=lambda value, offset, group: store_lanes(y, offset, finish(value), level=level),
        )
        rows = min(choose_rows(level_of(level), shape), shape.out_width)
        sweep.emit(shape, rows, x, shape.macs / TAPS_PER_US)

    return build(name, body, level)
