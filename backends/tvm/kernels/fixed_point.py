"""The arithmetic of the integer stage as TIR expressions; each mirrors one function of `ir.dialect.integer`.

Every float expression here is a multiply followed by a clamp: there is no sum that a compiler could contract into a fused
multiply-add.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from .base import Tail
from .schedule import te

Expr = Any


def f32(value: float) -> Expr:
    return tirx.const(float(np.float32(value)), "float32")


def lowest(dtype: str) -> int:
    return int(np.iinfo(dtype).min)


def round_steps(value: Expr, zero_point: int, qmin: int, qmax: int, dtype: str) -> Expr:
    """round_half_even(clamp(value, qmin - z, qmax - z)) + z, stored as `dtype`. value float32."""
    steps = te.min(te.max(value, f32(qmin - zero_point)), f32(qmax - zero_point))
    return (tirx.nearbyint(steps).astype("int32") + tirx.const(zero_point, "int32")).astype(dtype)


def quantized(x: Expr, scale: float, zero_point: int, qmin: int, qmax: int, dtype: str) -> Expr:
    """`gw::quantize`. The reciprocal is rounded to float32, as the reference rounds it."""
    return round_steps(x * f32(float(np.float32(1.0) / np.float32(scale))), zero_point, qmin, qmax, dtype)


def dequantized(x: Expr, scale: float, zero_point: int) -> Expr:
    """`gw::dequantize`."""
    return centered(x, zero_point).astype("float32") * f32(scale)


def centered(x: Expr, zero_point: int) -> Expr:
    """x - zero_point in s32."""
    wide = x.astype("int32")
    return wide - tirx.const(zero_point, "int32") if zero_point else wide


def finished(tail: Tail, acc: Expr, parameters: Sequence[Any], channel: Expr) -> Expr:
    """`tail` applied to an s32 accumulator of output channel `channel`; parameters as `Tail` lists them."""
    if tail.kind == "none":
        return acc
    if tail.kind == "scale":
        return acc.astype("float32") * parameters[0][channel]
    if tail.kind == "rescale":
        product = acc.astype("float32") * parameters[0][channel]
        return round_steps(product, tail.zero_point, tail.qmin, tail.qmax, tail.dtype)
    return _dyadic(tail, acc, parameters[0][channel], parameters[1][channel])


def _dyadic(tail: Tail, acc: Expr, multiplier: Expr, shift: Expr) -> Expr:
    wide = shift.astype("int64")
    half = tirx.shift_left(tirx.const(1, "int64"), wide - tirx.const(1, "int64"))
    steps = tirx.shift_right(acc.astype("int64") * multiplier.astype("int64") + half, wide)
    # Clamping before the zero point is added keeps the vector narrow; both orders give the same integers.
    low, high = tirx.const(tail.qmin - tail.zero_point, "int64"), tirx.const(tail.qmax - tail.zero_point, "int64")
    steps = te.min(te.max(steps, low), high).astype("int32")
    return (steps + tirx.const(tail.zero_point, "int32")).astype(tail.dtype)


def tail_placeholders(tail: Tail, channels: int) -> list[Any]:
    """The packed parameters of `tail`, each (channels,), in the order `finished` reads them."""
    names = {"rescale": ["scale"], "scale": ["scale"], "dyadic": ["multiplier", "shift"], "none": []}[tail.kind]
    dtype = "int32" if tail.kind == "dyadic" else "float32"
    return [te.placeholder((channels,), dtype, name=name) for name in names]
