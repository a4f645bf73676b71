"""A float function of one tensor, element by element, where no kernel before it could take it in; without one, a cast."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES
from .emit import arguments, bind, build, loop, parallel_kind
from .float_base import Activation, load_lanes, store_lanes
from .isa import T

SINGLE = ("float32", "float32")

#: Vectors of one iteration: their chains of dependent operations overlap.
UNROLL = 4

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 4000


def activation(size: int, function: Activation, dtypes: tuple[str, str] = SINGLE, level: str = "") -> tirx.PrimFunc:
    """(X [size], Y [size]) of the two types, float32 or half precision; level: of the rounding.

    Raises OptionError for an empty extent.
    """
    if size < 1:
        raise OptionError(f"activation: the size must be at least 1, got {size}")

    def body() -> None:
        x, y = arguments(("X", (size,), dtypes[0]), ("Y", (size,), dtypes[1]))

        def vectors(start: Any, count: int, rest: int = LANES) -> None:
            valid = [LANES] * (count - 1) + [rest]
            values = [bind(function.emit(load_lanes(x, start + i * LANES, v))) for i, v in enumerate(valid)]
            for i, (value, v) in enumerate(zip(values, valid, strict=True)):
                store_lanes(y, start + i * LANES, value, v, level=level)

        blocks, rest = divmod(size, UNROLL * LANES)
        tail = lambda: vectors(blocks * UNROLL * LANES, -(-rest // LANES), (rest - 1) % LANES + 1)  # noqa: E731
        if not blocks:
            tail()
            return
        with loop(blocks + (rest > 0), parallel_kind(size / ELEMENTS_PER_US)) as index:
            if not rest:
                vectors(bind(index * T.int32(UNROLL * LANES)), UNROLL)
                return
            with T.If(index < blocks):
                with T.Then():
                    vectors(bind(index * T.int32(UNROLL * LANES)), UNROLL)
                with T.Else():
                    tail()

    return build("activation_f32", body, level)
