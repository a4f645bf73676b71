"""`gw::layer_norm` over dense rows, bit-equal to its torch definition on every target."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....ir.errors import OptionError
from .emit import arguments, bind, build, loop, parallel_kind, splat
from .exact_float import for_chunks, lane_sum, product, reciprocal, square_root, zero_past
from .float_base import load_lanes, store_lanes

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 2000


def layer_norm(rows: int, length: int, eps: float, name: str = "layer_norm_exact") -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]), float32. Raises OptionError for an empty extent."""
    if min(rows, length) < 1:
        raise OptionError(f"layer_norm: every extent must be at least 1, got {rows} x {length}")

    def body() -> None:
        x, weight, bias, y = arguments(
            ("X", (rows, length), "float32"),
            ("weight", (length,), "float32"),
            ("bias", (length,), "float32"),
            ("Y", (rows, length), "float32"),
        )
        with loop(rows, parallel_kind(rows * length / ELEMENTS_PER_US)) as row:
            _row((x, weight, bias, y), bind(row * length), length, eps)

    return build(name, body)


def _row(buffers: tuple[Any, Any, Any, Any], base: Any, length: int, eps: float) -> None:
    x, weight, bias, y = buffers
    inverse = T.float32(float(np.float32(1.0) / np.float32(length)))
    mean = bind(product(lane_sum(length, lambda start, valid: load_lanes(x, base + start, valid)), inverse))

    def squares(start: Any, valid: int) -> Any:
        d = bind(load_lanes(x, base + start, valid) - splat(mean))
        store_lanes(y, base + start, d, valid)
        return zero_past(product(d, d), valid)

    variance = bind(product(lane_sum(length, squares), inverse))
    deviation = bind(reciprocal(square_root(variance + T.float32(float(np.float32(eps))))))

    def affine(start: Any, valid: int) -> None:
        d = load_lanes(y, base + start, valid) * splat(deviation)
        scaled = product(d, load_lanes(weight, start, valid))
        store_lanes(y, base + start, scaled + load_lanes(bias, start, valid), valid)

    for_chunks(length, affine)
