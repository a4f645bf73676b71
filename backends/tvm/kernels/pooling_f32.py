"""Float pooling of [N, H, W, Cp]: the largest or the mean of each window, channels in lanes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .base import Convolution, padded
from .depthwise_f32 import Sweep, choose_rows
from .emit import arguments, build, store
from .exact_float import constant
from .float_base import level_of
from .isa import T

#: Elements of windows that one core handles in a microsecond, for the choice between a serial and a parallel loop.
TAPS_PER_US = 10_000


def max_pool(shape: Convolution, level: str = "avx512") -> tirx.PrimFunc:
    """(X [N, H, W, Cp], Y [N, OH, OW, Cp]); a tap outside the image never is the largest. shape: channels = filters = groups."""
    return _pool("max_pool_f32", shape, level, float("-inf"), T.max, lambda value: value)


def mean_pool(shape: Convolution, level: str = "avx512") -> tirx.PrimFunc:
    """The same for the mean over all taps, those outside the image counted as zeros. Bound: taps * 2^-23 * mean |x|."""
    taps = shape.kernel[0] * shape.kernel[1]
    return _pool("mean_pool_f32", shape, level, 0.0, lambda a, b: a + b, lambda total: total * constant(1.0 / taps))


def _pool(name: str, shape: Convolution, level: str, start: float, combine: Any, finish: Any) -> tirx.PrimFunc:
    def body() -> None:
        channels = padded(shape.channels)
        x, y = arguments(
            ("X", (shape.batch, shape.height, shape.width, channels), "float32"),
            ("Y", (shape.batch, shape.out_height, shape.out_width, channels), "float32"),
        )
        sweep = Sweep(
            initial=lambda group: constant(start),
            tap=lambda group, ky, kx: None,
            combine=lambda total, value, tap: combine(total, value),
            finish=lambda value, offset: store(y, offset, finish(value)),
        )
        rows = min(choose_rows(level_of(level), shape), shape.out_width)
        sweep.emit(shape, rows, x, shape.macs / TAPS_PER_US)

    return build(name, body)
