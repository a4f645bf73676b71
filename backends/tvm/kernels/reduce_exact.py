"""`gw::reduce_sum` over one axis of a dense tensor, bit-equal to its torch definition on every target."""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, VECTOR
from .emit import accumulator, arguments, bind, build, loop, parallel_kind, store
from .exact_float import constant, fence, lane_sum
from .float_base import load_lanes, store_lanes
from .isa import T

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 4000


def reduction(shape: tuple[int, ...], axis: int, keepdim: bool) -> tuple[tuple[int, int, int], tuple[int, ...]]:
    """((elements before, on and behind the axis), shape of the sums).

    Raises:
        OptionError: an empty extent, or an axis the shape does not have.
    """
    if not -len(shape) <= axis < len(shape) or min(shape) < 1:
        raise OptionError(f"reduce_sum: axis {axis} of shape {shape}; extents must be at least 1")
    axis %= len(shape)
    sizes = prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :])
    return sizes, (*shape[:axis], *((1,) if keepdim else ()), *shape[axis + 1 :])


def reduce_sum(shape: tuple[int, ...], axis: int, keepdim: bool = False, name: str = "reduce_sum_exact") -> tirx.PrimFunc:
    """(X [shape], Y [shape without `axis`, or with it as 1]), float32, dense. Raises as `reduction`."""
    (outer, length, inner), out = reduction(shape, axis, keepdim)

    def body() -> None:
        x, y = arguments(("X", shape, "float32"), ("Y", out, "float32"))
        kind = parallel_kind(outer * length * inner / ELEMENTS_PER_US)
        if inner == 1:
            with loop(outer, kind) as row:
                base = bind(row * length)
                total = lane_sum(length, lambda start, valid: load_lanes(x, base + start, valid))
                T.buffer_store(y, total, [row])
            return
        full, rest = divmod(inner, LANES)
        if full:
            with loop(outer * full, kind) as index:
                _column(x, y, bind(T.floordiv(index, full)), bind(T.floormod(index, full) * LANES), length, inner, LANES)
        if rest:
            with loop(outer, kind) as row:
                _column(x, y, row, full * LANES, length, inner, rest)

    return build(name, body)


def _column(x: Any, y: Any, row: Any, first: Any, length: int, inner: int, valid: int) -> None:
    """Sums `valid` neighbouring columns: here the LANES running sums of the definition are LANES vectors."""
    zero = fence(constant(0.0))  # x + 0 turns -0 into +0, as the zero padding of the definition does
    sums = [accumulator("float32") for _ in range(LANES)]
    base = bind(row * (length * inner) + first)
    full, rest = divmod(length, LANES)

    def element(index: Any, lane: int) -> Any:
        return load_lanes(x, base + (index * LANES + lane) * inner, valid)

    for lane, total in enumerate(sums):
        store(total, 0, element(0, lane) if lane < length else zero)
    if full > 1:
        with loop(full - 1) as index:
            for lane, total in enumerate(sums):
                store(total, 0, total.vload([0], VECTOR) + element(index + 1, lane))
    if rest and full:
        for lane, total in enumerate(sums):
            store(total, 0, total.vload([0], VECTOR) + (element(full, lane) if lane < rest else zero))
    width = LANES
    while width > 1:
        width //= 2
        for lane in range(width):
            store(sums[lane], 0, sums[lane].vload([0], VECTOR) + sums[lane + width].vload([0], VECTOR))
    store_lanes(y, row * inner + first, sums[0].vload([0], VECTOR), valid)
