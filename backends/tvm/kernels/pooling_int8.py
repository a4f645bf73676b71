"""Window reductions of the integer stage over [N, H, W, Cp]: maximum, sum and global sum, with the tail fused."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from .base import Tail, padded
from .fixed_point import centered, finished, lowest, tail_placeholders
from .schedule import schedule_rows, schedule_window, te


@dataclass(frozen=True)
class Pool:
    """Shape of a 2-D pooling; spatial extents are (height, width), output extents are given (ceil mode changes them)."""

    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    out_height: int
    out_width: int

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def reads_outside(self) -> bool:
        """Whether any window leaves the input: by padding, or by ceil mode at the far edges."""
        last_row = (self.out_height - 1) * self.stride[0] - self.padding[0] + (self.kernel[0] - 1) * self.dilation[0]
        last_column = (self.out_width - 1) * self.stride[1] - self.padding[1] + (self.kernel[1] - 1) * self.dilation[1]
        return any(self.padding) or last_row >= self.height or last_column >= self.width


def max_pool2d(pool: Pool, dtype: str) -> tirx.PrimFunc:
    """`gw::max_pool2d`: x [N, H, W, Cp] u8 / s8 -> out [N, OH, OW, Cp]."""
    x = te.placeholder((pool.batch, pool.height, pool.width, padded(pool.channels)), dtype, name="x")
    shape = (pool.batch, pool.out_height, pool.out_width, padded(pool.channels))
    window = te.reduce_axis((0, pool.kernel[0]), "kh"), te.reduce_axis((0, pool.kernel[1]), "kw")
    least = tirx.const(lowest(dtype), dtype)
    acc = te.compute(shape, lambda *i: te.max(_tap(pool, x, i, window, least), axis=list(window)), name="acc")
    out = te.compute(shape, lambda *i: acc(*i), name="out")
    return schedule_window(te.create_prim_func([x, out]), pool.taps)


def sum_pool2d(pool: Pool, dtype: str, zero_point: int, tail: Tail) -> tirx.PrimFunc:
    """`gw::sum_pool2d` and its tail: x [N, H, W, Cp] u8 / s8, tail parameters [Cp] -> out [N, OH, OW, Cp] of `tail.dtype`."""
    channels = padded(pool.channels)
    x = te.placeholder((pool.batch, pool.height, pool.width, channels), dtype, name="x")
    parameters = tail_placeholders(tail, channels)
    shape = (pool.batch, pool.out_height, pool.out_width, channels)
    window = te.reduce_axis((0, pool.kernel[0]), "kh"), te.reduce_axis((0, pool.kernel[1]), "kw")
    # Padding holds the zero point, which the subtraction turns into the real value 0.
    zero = tirx.const(zero_point, dtype)
    acc = te.compute(
        shape, lambda *i: te.sum(centered(_tap(pool, x, i, window, zero), zero_point), axis=list(window)), name="acc"
    )
    out = te.compute(shape, lambda *i: finished(tail, acc(*i), parameters, i[3]), name="out")
    return schedule_window(te.create_prim_func([x, *parameters, out]), pool.taps)


def _tap(pool: Pool, x, index, window, outside):
    """The input value under tap `window` of output `index`; `outside` where the window leaves the input."""
    n, h, w, c = index
    row = h * pool.stride[0] + window[0] * pool.dilation[0] - pool.padding[0]
    column = w * pool.stride[1] + window[1] * pool.dilation[1] - pool.padding[1]
    if not pool.reads_outside:
        return x(n, row, column, c)
    inside = te.all(row >= 0, row < pool.height, column >= 0, column < pool.width)
    return te.if_then_else(inside, x(n, row, column, c), outside)


def dense_sum(shape: tuple[int, ...], dims: tuple[int, ...], dtype: str, zero_point: int, axis: int, tail: Tail) -> tirx.PrimFunc:
    """`gw::sum` over any axes of a dense tensor, reduced axes kept as 1, and its tail along `axis` of the output."""
    x = te.placeholder(shape, dtype, name="x")
    axes = {d: te.reduce_axis((0, shape[d]), f"r{d}") for d in dims}
    out_shape = tuple(1 if d in axes else size for d, size in enumerate(shape))
    parameters = tail_placeholders(tail, out_shape[axis])

    def total(*index):
        position = [axes.get(d, index[d]) for d in range(len(shape))]
        return te.sum(centered(x(*position), zero_point), axis=list(axes.values()))

    acc = te.compute(out_shape, total, name="acc")
    out = te.compute(out_shape, lambda *i: finished(tail, acc(*i), parameters, i[axis]), name="out")
    return _schedule_dense_sum(te.create_prim_func([x, *parameters, out]))


def _schedule_dense_sum(function: tirx.PrimFunc) -> tirx.PrimFunc:
    return schedule_rows(function)
