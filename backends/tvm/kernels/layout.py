"""Data movement between and inside physical layouts; values pass through unchanged (or are quantized on the way in)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule

from ..strided import Strided
from .base import LANES, padded
from .fixed_point import quantized
from .schedule import WIDE, extents, finish, for_cpus, product, schedule_rows, split_for_threads, te

Shape = tuple[int, ...]


def to_channels(shape: Shape, dtype: str) -> tirx.PrimFunc:
    """x [N, C, H, W] -> out [N, H, W, Cp], zero in the lanes past C."""
    n, c, h, w = shape
    x = te.placeholder(shape, dtype, name="x")

    def value(n, h, w, lane):
        return _inside(lane, c, lambda: x(n, lane, h, w), tirx.const(0, dtype))

    out = te.compute((n, h, w, padded(c)), value, name="out")
    return _schedule_transpose(te.create_prim_func([x, out]), c)


def quantize_to_channels(shape: Shape, scale: float, zero_point: int, qmin: int, qmax: int, dtype: str) -> tirx.PrimFunc:
    """`gw::quantize` of x float32 [N, C, H, W] straight into [N, H, W, Cp], the zero point in the lanes past C."""
    n, c, h, w = shape
    x = te.placeholder(shape, "float32", name="x")

    def value(n, h, w, lane):
        inside = lambda: quantized(x(n, lane, h, w), scale, zero_point, qmin, qmax, dtype)  # noqa: E731
        return _inside(lane, c, inside, tirx.const(zero_point, dtype))

    out = te.compute((n, h, w, padded(c)), value, name="out")
    return _schedule_transpose(te.create_prim_func([x, out]), c)


def _inside(lane, channels: int, value, outside):
    return value() if channels == padded(channels) else te.if_then_else(lane < channels, value(), outside)


@for_cpus
def _schedule_transpose(function: tirx.PrimFunc, channels: int) -> tirx.PrimFunc:
    """Reads rows of x in vectors: for each channel, 16 pixels of a row; the store strides by Cp."""
    schedule: Any = Schedule(function)
    n, h, w, c = schedule.get_loops(schedule.get_sblock("out"))
    sizes = extents(schedule, [n, h, w, c])
    rows = schedule.fuse(n, h)
    block, pixel = schedule.split(w, [None, min(LANES, sizes[2])])
    chunk, lane = schedule.split(c, [None, LANES])
    schedule.reorder(rows, block, chunk, lane, pixel)
    # Unrolled, every lane past C is known to be constant.
    if channels < LANES:
        schedule.unroll(lane)
    split_for_threads(schedule, rows, product(sizes))
    return finish(schedule)


def from_channels(shape: Shape, dtype: str) -> tirx.PrimFunc:
    """x [N, H, W, Cp] -> out [N, C, H, W]; `shape` is the output's."""
    n, c, h, w = shape
    x = te.placeholder((n, h, w, padded(c)), dtype, name="x")
    out = te.compute(shape, lambda n, c, h, w: x(n, h, w, c), name="out")
    return _schedule_planes(te.create_prim_func([x, out]))


@for_cpus
def _schedule_planes(function: tirx.PrimFunc) -> tirx.PrimFunc:
    schedule: Any = Schedule(function)
    loops = schedule.get_loops(schedule.get_sblock("out"))
    work = product(extents(schedule, loops))
    split_for_threads(schedule, schedule.fuse(loops[0], loops[1]), work)
    return finish(schedule)


def copy_strided(strided: Strided, dtype: str) -> tirx.PrimFunc:
    """x [strided.source] -> out [strided.shape], by the index map."""
    x = te.placeholder(strided.source, dtype, name="x")

    def value(*index):
        return x(*(start if axis is None else index[axis] * step + start for axis, start, step in strided.axes))

    out = te.compute(strided.shape or (1,), value, name="out")
    return schedule_rows(te.create_prim_func([x, out]), widest=WIDE if strided.contiguous else 1)


def drop_lanes(rows: int, channels: int, dtype: str) -> tirx.PrimFunc:
    """x [rows, Cp] -> out [rows, C]."""
    x = te.placeholder((rows, padded(channels)), dtype, name="x")
    out = te.compute((rows, channels), lambda m, c: x(m, c), name="out")
    return schedule_rows(te.create_prim_func([x, out]))


def add_lanes(rows: int, channels: int, dtype: str) -> tirx.PrimFunc:
    """x [rows, C] -> out [rows, Cp], zero in the lanes past C."""
    x = te.placeholder((rows, channels), dtype, name="x")
    zero = tirx.const(0, dtype)
    out = te.compute((rows, padded(channels)), lambda m, c: te.if_then_else(c < channels, x(m, c), zero), name="out")
    return _schedule_pixels(te.create_prim_func([x, out]))


def pad_channels(shape: Shape, before: tuple[int, int], after: tuple[int, int], value: float, dtype: str) -> tirx.PrimFunc:
    """x [N, H, W, Cp] framed by `value`: `before` and `after` are (rows, columns) added at each end."""
    n, h, w, lanes = shape
    x = te.placeholder(shape, dtype, name="x")

    def framed(n, row, column, lane):
        row, column = row - before[0], column - before[1]
        inside = te.all(row >= 0, row < h, column >= 0, column < w)
        return te.if_then_else(inside, x(n, row, column, lane), tirx.const(value, dtype))

    out = te.compute((n, before[0] + h + after[0], before[1] + w + after[1], lanes), framed, name="out")
    return schedule_rows(te.create_prim_func([x, out]), widest=lanes if lanes <= 64 else 64)


def concatenate_channels(pixels: int, channels: tuple[int, ...], dtype: str) -> tirx.PrimFunc:
    """Inputs [pixels, Cp_i] -> out [pixels, Cp] of the channels side by side; zero in the lanes past their sum."""
    inputs = [te.placeholder((pixels, padded(c)), dtype, name=f"x{i}") for i, c in enumerate(channels)]
    total = sum(channels)
    starts = [sum(channels[:i]) for i in range(len(channels))]

    def value(pixel, lane):
        result = tirx.const(0, dtype)
        for x, start, count in reversed(list(zip(inputs, starts, channels, strict=True))):
            result = te.if_then_else(te.all(lane >= start, lane < start + count), x(pixel, lane - start), result)
        return result

    out = te.compute((pixels, padded(total)), value, name="out")
    return _schedule_pixels(te.create_prim_func([*inputs, out]), whole=all(c % LANES == 0 for c in channels))


def slice_channels(pixels: int, channels: int, start: int, stop: int, dtype: str) -> tirx.PrimFunc:
    """x [pixels, Cp] -> out [pixels, padded(stop - start)], zero in the lanes past the slice."""
    count = stop - start
    x = te.placeholder((pixels, padded(channels)), dtype, name="x")

    def value(pixel, lane):
        return _inside(lane, count, lambda: x(pixel, lane + start), tirx.const(0, dtype))

    out = te.compute((pixels, padded(count)), value, name="out")
    function = te.create_prim_func([x, out])
    return schedule_rows(function) if count == padded(count) else _schedule_pixels(function)


@for_cpus
def _schedule_pixels(function: tirx.PrimFunc, whole: bool = False) -> tirx.PrimFunc:
    """For a map over [pixels, lanes] whose lanes are not alike. whole: every run of LANES of them is."""
    schedule: Any = Schedule(function)
    pixel, lane = schedule.get_loops(schedule.get_sblock("out"))
    work = product(extents(schedule, [pixel, lane]))
    if whole:
        chunk, inner = schedule.split(lane, [None, LANES])
        schedule.vectorize(inner)
        schedule.unroll(chunk)
    split_for_threads(schedule, pixel, work)
    return finish(schedule)
