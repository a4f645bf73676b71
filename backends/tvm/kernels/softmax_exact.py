"""`gw::softmax` over dense rows, bit-equal to its torch definition on every target."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....ir.errors import OptionError
from .emit import arguments, bind, build, loop, parallel_kind, splat
from .exact_float import exp, fold, for_chunks, lane_sum, reciprocal, zero_past
from .float_base import load_lanes, store_lanes

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 1000


def softmax(rows: int, length: int, name: str = "softmax_exact") -> tirx.PrimFunc:
    """(X [rows, length], Y [rows, length]), float32. Raises OptionError for an empty extent."""
    if min(rows, length) < 1:
        raise OptionError(f"softmax: every extent must be at least 1, got {rows} x {length}")

    def body() -> None:
        x, y = arguments(("X", (rows, length), "float32"), ("Y", (rows, length), "float32"))
        with loop(rows, parallel_kind(rows * length / ELEMENTS_PER_US)) as row:
            _row(x, y, bind(row * length), length)

    return build(name, body)


def _row(x: Any, y: Any, base: Any, length: int) -> None:
    # The largest element: the order of comparisons cannot change it, and -0 against +0 gives the same differences below.
    highest = fold(length, lambda start, valid: load_lanes(x, base + start, valid, float("-inf")), T.max)

    def powers(start: Any, valid: int) -> Any:
        e = exp(load_lanes(x, base + start, valid) - splat(highest))
        store_lanes(y, base + start, e, valid)
        return zero_past(e, valid)

    inverse = bind(reciprocal(lane_sum(length, powers)))

    def scale(start: Any, valid: int) -> None:
        store_lanes(y, base + start, load_lanes(y, base + start, valid) * splat(inverse), valid)

    for_chunks(length, scale)
