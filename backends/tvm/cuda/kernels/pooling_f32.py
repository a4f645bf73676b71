"""Float pooling of [N, H, W, Cp]: the largest or the mean of each window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from ...kernels.base import Convolution, padded
from ...kernels.schedule import te

#: A tap outside the image.
LOWEST = float("-inf")


def max_pool(shape: Convolution, level: str = "", dtype: str = "float32") -> tirx.PrimFunc:
    """(X [N, H, W, Cp], Y [N, OH, OW, Cp]); a tap outside the image never is the largest. shape: channels = filters = groups."""
    return _pool((shape, dtype), te.max, LOWEST, lambda value: value)


def mean_pool(shape: Convolution, level: str = "", dtype: str = "float32") -> tirx.PrimFunc:
    """The same for the mean over all taps, those outside the image counted as zeros. Bound: taps * 2^-23 * mean |x|."""
    share = tirx.const(1.0 / (shape.kernel[0] * shape.kernel[1]), "float32")
    return _pool((shape, dtype), te.sum, 0.0, lambda total: total * share)


def _pool(form: tuple[Convolution, str], combine: Any, outside: float, finish: Callable[[Any], Any]) -> tirx.PrimFunc:
    """Windows are combined in float32, whatever type holds them."""
    shape, dtype = form
    channels = padded(shape.channels)
    x = te.placeholder((shape.batch, shape.height, shape.width, channels), dtype, name="X")
    out = (shape.batch, shape.out_height, shape.out_width, channels)
    window = [te.reduce_axis((0, extent), name) for extent, name in zip(shape.kernel, ("ky", "kx"), strict=True)]

    def tap(n: Any, oy: Any, ox: Any, c: Any) -> Any:
        y, column = (
            place * shape.stride[axis] + window[axis] * shape.dilation[axis] - shape.padding[axis]
            for axis, place in enumerate((oy, ox))
        )
        if not shape.bordered:
            return x(n, y, column, c).astype("float32")
        inside = te.all(y >= 0, y < shape.height, column >= 0, column < shape.width)
        return te.if_then_else(inside, x(n, y, column, c).astype("float32"), tirx.const(outside, "float32"))

    acc = te.compute(out, lambda *index: combine(tap(*index), axis=window), name="acc")
    return te.create_prim_func([x, te.compute(out, lambda *index: finish(acc(*index)).astype(dtype), name="out")])
