"""Layer normalization over dense rows: (x - mean) / sqrt(variance + eps) * weight + bias.

A row is read from memory once; mean, variance (of the differences, so that a large mean cancels nothing) and the result are three
sweeps over it in the first-level cache. Bound, with m the largest |x| of the row and d its sqrt(variance + eps):

    |y - exact| <= (N / 64 + 16) * 2^-23 * (|weight| * (|exact x| + m / d) + |bias|),   x standing for the normalized value

Half-precision rows are normalized in float32; their result is rounded once more.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, VECTOR
from .emit import accumulator, arguments, bind, build, loop, parallel_kind, splat, store
from .exact_float import constant, for_chunks, square_root, zero_past
from .float_base import load_lanes, store_lanes
from .isa import T

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 4000

#: Running sums: one for each cycle that an addition takes.
SUMS = 4


def layer_norm(rows: int, length: int, eps: float, dtype: str = "float32", level: str = "") -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]); X and Y of `dtype`, the rest float32.

    Raises OptionError for an empty extent.
    """
    if min(rows, length) < 1:
        raise OptionError(f"layer_norm: every extent must be at least 1, got {rows} x {length}")

    def body() -> None:
        x, weight, bias, y = arguments(
            ("X", (rows, length), dtype),
            ("weight", (length,), "float32"),
            ("bias", (length,), "float32"),
            ("Y", (rows, length), dtype),
        )
        with loop(rows, parallel_kind(rows * length / ELEMENTS_PER_US)) as row:
            _row((x, weight, bias, y), bind(row * T.int32(length)), length, eps, level)

    return build("layer_norm_f32", body, level)


def _row(buffers: tuple[Any, Any, Any, Any], base: Any, length: int, eps: float, level: str) -> None:
    x, weight, bias, y = buffers
    inverse = T.float32(1.0 / length)
    mean = bind(row_sum(length, lambda start, valid: load_lanes(x, base + start, valid)) * inverse)

    def squares(start: Any, valid: int) -> Any:
        d = bind(load_lanes(x, base + start, valid) - splat(mean))
        return zero_past(d * d, valid)

    variance = bind(row_sum(length, squares) * inverse)
    factor = bind(T.float32(1.0) / square_root(variance + T.float32(eps)))

    def affine(start: Any, valid: int) -> None:
        scale = bind(splat(factor) * load_lanes(weight, start, valid))
        d = load_lanes(x, base + start, valid) - splat(mean)
        store_lanes(y, base + start, d * scale + load_lanes(bias, start, valid), valid, level=level)

    for_chunks(length, affine)


def row_sum(length: int, chunk: Any) -> Any:
    """Sum of a row in SUMS vectors of running sums; chunk(start, valid) gives a vector with zeros in the lanes past `valid`."""
    sums = [accumulator("float32") for _ in range(SUMS)]
    for total in sums:
        store(total, 0, constant(0.0))

    def add(total: Any, start: Any, valid: int) -> None:
        store(total, 0, total.vload([0], VECTOR) + chunk(start, valid))

    blocks, rest = divmod(length, SUMS * LANES)
    if blocks:
        with loop(blocks) as block:
            for index, total in enumerate(sums):
                add(total, block * (SUMS * LANES) + index * LANES, LANES)
    for index in range(-(-rest // LANES)):
        add(sums[index], (blocks * SUMS + index) * LANES, min(LANES, rest - index * LANES))
    return add_lanes(sums)


def add_lanes(sums: list[Any]) -> Any:
    """The sum of all lanes of a power of two of vectors; overwrites them. Returns a scalar."""
    while len(sums) > 1:
        half = len(sums) // 2
        for low, high in zip(sums[:half], sums[half:], strict=True):
            store(low, 0, low.vload([0], VECTOR) + high.vload([0], VECTOR))
        sums = sums[:half]
    (total,), width = sums, LANES
    while width > 2:
        width //= 2
        store(total, 0, total.vload([0], f"float32x{width}") + total.vload([width], f"float32x{width}"), width)
    return bind(total.vload([0]) + total.vload([1]))
