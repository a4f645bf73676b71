"""Schedules of the memory-bound kernels: which loops run in parallel, which become vector registers.

They are for CPUs. Under a target whose threads are a grid (`tvm.target.Target.current()` is a GPU) the same generators leave
their loops as they are written, and `cuda/schedule.py` binds them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec

import tvm
from tvm import te as _te
from tvm import tirx
from tvm.s_tir import Schedule

from .base import LANES

#: TVM's tensor expressions, untyped: the stubs give `compute` the union of everything it may return.
te: Any = _te

#: Below this many element operations a fork and join (about 2 us) costs more than the second core brings.
PARALLEL_WORK = 1 << 15

#: Elements of one vector statement: four 512-bit registers of s32, one of s8.
WIDE = 64

P = ParamSpec("P")


def for_cpus(
    schedule: Callable[Concatenate[tirx.PrimFunc, P], tirx.PrimFunc],
) -> Callable[Concatenate[tirx.PrimFunc, P], tirx.PrimFunc]:
    """Decorates a function that schedules a PrimFunc for CPUs: under a GPU target it returns the PrimFunc as it was given."""

    @functools.wraps(schedule)
    def scheduled(function: tirx.PrimFunc, *args: P.args, **kwargs: P.kwargs) -> tirx.PrimFunc:
        target: Any = tvm.target.Target.current(allow_none=True)
        if target is not None and "gpu" in target.keys:
            return function
        return schedule(function, *args, **kwargs)

    return scheduled


def finish(schedule: Any) -> tirx.PrimFunc:
    """The scheduled function, ready for a module: private, and marked so that no default schedule touches it."""
    return schedule.mod["main"].without_attr("global_symbol").with_attr("tirx.is_scheduled", True)


def extents(schedule: Any, loops: list[Any]) -> list[int]:
    return [int(schedule.get(loop).extent) for loop in loops]


def product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total


def split_for_threads(schedule: Any, loop: Any, work: int) -> None:
    """Runs `loop` in parallel where `work` element operations pay for it."""
    if work >= PARALLEL_WORK and int(schedule.get(loop).extent) > 1:
        schedule.parallel(loop)


def vector_width(size: int, widest: int = WIDE) -> int:
    """Widest power of two up to `widest`, and at least 4, that divides `size`; 1 where there is none."""
    width = widest
    while width >= 4:
        if size % width == 0:
            return width
        width //= 2
    return 1


@for_cpus
def schedule_linear(function: tirx.PrimFunc, block: str = "out", cost: int = 1) -> tirx.PrimFunc:
    """For a map whose buffers all have the output's shape: one flat loop, split into vectors."""
    schedule: Any = Schedule(function)
    loops = schedule.get_loops(schedule.get_sblock(block))
    if not loops:
        return finish(schedule)
    size = product(extents(schedule, loops))
    flat = schedule.fuse(*loops) if len(loops) > 1 else loops[0]
    width = vector_width(size)
    if width > 1:
        outer, inner = schedule.split(flat, [None, width])
        schedule.vectorize(inner)
        split_for_threads(schedule, outer, size * cost)
        return finish(schedule)
    pieces = next((d for d in range(64, 1, -1) if size % d == 0), 1)
    if pieces > 1:
        outer, _ = schedule.split(flat, [pieces, None])
        split_for_threads(schedule, outer, size * cost)
    return finish(schedule)


@for_cpus
def schedule_rows(function: tirx.PrimFunc, block: str = "out", cost: int = 1, widest: int = WIDE) -> tirx.PrimFunc:
    """For a map that indexes its inputs differently: the last axis in vectors, all others one parallel loop."""
    schedule: Any = Schedule(function)
    loops = schedule.get_loops(schedule.get_sblock(block))
    if not loops:
        return finish(schedule)
    sizes = extents(schedule, loops)
    *outer, last = loops
    width = vector_width(sizes[-1], widest)
    if width > 1:
        chunk, inner = schedule.split(last, [None, width])
        schedule.vectorize(inner)
        if not outer:
            outer = [chunk]
    if outer:
        rows = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
        split_for_threads(schedule, rows, product(sizes) * cost)
    return finish(schedule)


@for_cpus
def schedule_window(function: tirx.PrimFunc, taps: int, reduce_block: str = "acc", block: str = "out") -> tirx.PrimFunc:
    """For a reduction over windows of [N, H, W, Cp] and its tail: LANES channels of one pixel stay in registers."""
    schedule: Any = Schedule(function)
    out, acc = schedule.get_sblock(block), schedule.get_sblock(reduce_block)
    n, h, w, c = schedule.get_loops(out)
    sizes = extents(schedule, [n, h, w, c])
    chunk, lane = schedule.split(c, [None, LANES])
    schedule.vectorize(lane)
    schedule.compute_at(acc, chunk)
    schedule.set_scope(acc, 0, "local")
    loops = schedule.get_loops(acc)
    lane_loop = loops[4]
    reductions = loops[5:]
    schedule.reorder(*reductions, lane_loop)
    schedule.vectorize(lane_loop)
    # One output pixel has no rows to share: split the channels instead.
    outer = schedule.fuse(n, h) if sizes[0] * sizes[1] > 1 else chunk
    split_for_threads(schedule, outer, product(sizes) * taps)
    init = schedule.decompose_reduction(acc, reductions[0])
    schedule.vectorize(schedule.get_loops(init)[-1])
    return finish(schedule)
