"""`gw::layer_norm` over dense rows, bit-equal to its torch definition on every target."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES
from .emit import arguments, bind, build, loop, parallel_kind, splat
from .exact_float import for_chunks, lane_sum, product, reciprocal, square_root, zero_past
from .float_base import load_lanes, store_lanes
from .isa import T, isa_of
from .quantize_image import Quantize

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 2000

#: Rows that a task takes through each step before the next one: a row alone is a chain of sums, and neighbours' chains overlap.
BLOCK = 4


def layer_norm(
    rows: int,
    length: int,
    eps: float,
    quantize: Quantize | None = None,
    keep: bool = True,
    level: str = "portable",
    name: str = "layer_norm_exact",
    twin: bool = False,
) -> tirx.PrimFunc:
    """(X [rows, length], weight [length], bias [length], Y [rows, length]), float32.

    quantize: a last buffer Q [rows, length] takes `gw::quantize` of Y; keep=False leaves Y itself out. twin: Q is of a second
    normalization of the same rows, whose weight and bias stand behind the first ones.

    Raises:
        OptionError: an empty extent, nothing to write, or a twin without both results. UnknownNameError: an unknown level.
    """
    require_results(rows, length, quantize, keep, twin)
    isa = isa_of(level)

    def body() -> None:
        specs = [("X", (rows, length), "float32"), *affine_buffers(length, twin)]
        specs += [("Y", (rows, length), "float32")] if keep else []
        specs += [("Q", (rows, length), quantize.dtype)] if quantize is not None else []
        x, weight, bias, *rest = arguments(*specs)
        others, outputs = rest[: 2 * twin], rest[2 * twin :]
        with loop(ceil(rows / BLOCK), parallel_kind(rows * length / ELEMENTS_PER_US)) as block:
            first = bind(block * BLOCK + T.int32(0))
            count = bind(T.min(BLOCK, rows - first))
            centered = (outputs[0], first * length) if keep else (T.alloc_buffer((BLOCK * length,), "float32"), 0)
            means, deviations = T.alloc_buffer((BLOCK,), "float32"), T.alloc_buffer((BLOCK,), "float32")
            with T.serial(0, count) as row:
                T.buffer_store(means, _mean(x, bind((first + row) * length), length), [row])
            with T.serial(0, count) as row:
                source, target = bind((first + row) * length), (centered[0], bind(centered[1] + row * length))
                T.buffer_store(deviations, _deviation(x, source, target, bind(means.vload([row])), length, eps), [row])
            with T.serial(0, count) as row:
                deviation = splat(bind(deviations.vload([row])))
                base, place = bind((first + row) * length), bind(centered[1] + row * length)

                def affine(start: Any, valid: int, base: Any = base, place: Any = place, deviation: Any = deviation) -> None:
                    d = bind(load_lanes(centered[0], place + start, valid) * deviation)
                    value = bind(product(d, load_lanes(weight, start, valid)) + load_lanes(bias, start, valid))
                    if keep:
                        store_lanes(outputs[0], base + start, value, valid)
                    if twin:
                        value = bind(product(d, load_lanes(others[0], start, valid)) + load_lanes(others[1], start, valid))
                    if quantize is not None:
                        code = quantize.codes(value, isa) + splat(T.int32(quantize.zero_point))
                        codes = T.Cast(f"{quantize.dtype}x{LANES}", code)
                        store_lanes(outputs[-1], base + start, codes, valid, quantize.dtype)

                for_chunks(length, affine)

    return build(name, body)


def layer_norm_twins(rows: int, length: int, eps: float, quantize: Quantize, level: str = "portable") -> tirx.PrimFunc:
    """Two normalizations of the same rows: the value of the first, and the codes of the second."""
    return layer_norm(rows, length, eps, quantize, True, level, "layer_norm_twins", twin=True)


def require_results(rows: int, length: int, quantize: Quantize | None, keep: bool, twin: bool) -> None:
    """Raises OptionError for a kernel of no element or no result."""
    if min(rows, length) < 1:
        raise OptionError(f"layer_norm: every extent must be at least 1, got {rows} x {length}")
    if quantize is None and not keep:
        raise OptionError("layer_norm: keep=False without quantize leaves nothing to write")
    if twin and (quantize is None or not keep):
        raise OptionError("layer_norm: a twin makes codes beside a value that is kept")


def affine_buffers(length: int, twin: bool) -> list[tuple[str, tuple[int, ...], str]]:
    """Weight and bias, and those of the twin."""
    return [(f"{which}{name}", (length,), "float32") for which in ("", "twin_")[: 1 + twin] for name in ("weight", "bias")]


def _mean(x: Any, base: Any, length: int) -> Any:
    return bind(product(lane_sum(length, lambda start, valid: load_lanes(x, base + start, valid)), _inverse(length)))


def _deviation(x: Any, base: Any, centered: tuple[Any, Any], mean: Any, length: int, eps: float) -> Any:
    """Stores the row minus its mean at `centered` (buffer, element) and returns 1 / sqrt(variance + eps)."""

    def squares(start: Any, valid: int) -> Any:
        d = bind(load_lanes(x, base + start, valid) - splat(mean))
        store_lanes(centered[0], centered[1] + start, d, valid)
        return zero_past(product(d, d), valid)

    variance = bind(product(lane_sum(length, squares), _inverse(length)))
    return bind(reciprocal(square_root(variance + T.float32(float(np.float32(eps))))))


def _inverse(length: int) -> Any:
    return T.float32(float(np.float32(1.0) / np.float32(length)))
