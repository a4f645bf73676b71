"""The ops of `ir.dialect.exact` written as ONNX nodes that round once each: computed one by one, they give the same bits.

Add, Sub, Mul, Div, Max, Round and conversions are IEEE 754's in ONNX as they are in the dialect; a reduction's order is not
defined there, so a sum is spelled out as additions of slices:

    lane_sum(x)    Split into chunks of 16 along the last axis -> Add, Add, ... -> halves: Split -> Add, four times
    exp            the polynomial term by term; 2^n from a table
    square_root    Cast to float64 -> Sqrt -> Cast back, as the reference does

Nothing here is a pattern that runtimes replace by kernels of their own or by fewer roundings.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .dialect.exact import EXP_LOWEST, EXP_POLYNOMIAL, LANES, LN2_HIGH, LN2_LOW, LOG2_E
from .onnx_nodes import Writer

#: 2^0, 2^-1, ... as far down as exp goes.
POWERS = np.exp2(-np.arange(int(-EXP_LOWEST * LOG2_E) + 2)).astype(np.float32)


def lane_sum(w: Writer, x: ir.Value, shape: list[int]) -> ir.Value:
    """`exact.lane_sum`: sum over the last axis of x (of `shape`, whose other extents may be unknown), kept as size 1."""
    lanes, *rest = _chunks(w, x, shape)
    for chunk in rest:
        lanes = w.Add(lanes, chunk)
    width = LANES
    while width > 1:
        width //= 2
        low, high = w.op("Split", (lanes,), outputs=2, axis=-1, num_outputs=2)
        lanes = w.Add(low, high)
    return lanes


def _chunks(w: Writer, x: ir.Value, shape: list[int]) -> list[ir.Value]:
    """Slices of 16 along the last axis, the last one filled with zeros.

    Pads are spelled out for every axis: ONNX Runtime 1.32 moves a Transpose past a Pad with `axes` and then fails.
    """
    length, rank = shape[-1], len(shape)
    count = -(-length // LANES)
    chunks = [x]
    if count > 1:
        sizes = [LANES] * (count - 1) + [length - LANES * (count - 1)]
        chunks = list(w.op("Split", (x, np.array(sizes)), outputs=count, axis=-1))
    missing = -length % LANES
    if missing:
        chunks[-1] = w.Pad(chunks[-1], np.array([0] * (2 * rank - 1) + [missing]), 0.0)
    return chunks


def exp(w: Writer, x: ir.Value) -> ir.Value:
    """`exact.exp_reference`, for x <= 0."""
    x = w.Max(x, EXP_LOWEST)
    n = w.Round(w.Mul(x, LOG2_E))
    r = w.Sub(x, w.Mul(n, LN2_HIGH))
    r = w.Sub(r, w.Mul(n, LN2_LOW))
    p: ir.Value | float = EXP_POLYNOMIAL[0]
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = w.Add(w.Mul(r, p), coefficient)
    p = w.Add(w.Mul(p, w.Mul(r, r)), r)
    p = w.Add(p, 1.0)
    return w.Mul(p, w.Gather(POWERS, w.cast(w.Neg(n), ir.DataType.INT32), axis=0))


def softmax(w: Writer, x: ir.Value, shape: list[int]) -> ir.Value:
    """`gw::softmax` over the last axis."""
    e = exp(w, w.Sub(x, w.ReduceMax(x, np.array([-1]), keepdims=1)))
    return w.Mul(e, reciprocal(w, lane_sum(w, e, shape)))


def layer_norm(w: Writer, x: ir.Value, weight: ir.Value, bias: ir.Value, eps: float, shape: list[int]) -> ir.Value:
    """`gw::layer_norm` over the last axis."""
    inverse = float(np.float32(1) / np.float32(shape[-1]))
    d = w.Sub(x, w.Mul(lane_sum(w, x, shape), inverse))
    variance = w.Mul(lane_sum(w, w.Mul(d, d), shape), inverse)
    return w.Add(w.Mul(w.Mul(d, reciprocal(w, square_root(w, w.Add(variance, eps)))), weight), bias)


def reciprocal(w: Writer, x: ir.Value) -> ir.Value:
    """1 / x, rounded once.

    ONNX Runtime's optimizer makes y / x, which rounds once, of y * (1 / x), which rounds twice. It does not see through signs.
    """
    return w.Neg(w.Div(-1.0, x))


def square_root(w: Writer, x: ir.Value) -> ir.Value:
    """`gw::square_root`."""
    return w.cast(w.Sqrt(w.cast(x, ir.DataType.DOUBLE)), ir.DataType.FLOAT)


def reduce_sum(w: Writer, x: ir.Value, dim: int, keepdim: bool, shape: list[int]) -> ir.Value:
    """`gw::reduce_sum` over one axis of x, of shape `shape`."""
    axis, rank = dim % len(shape), len(shape)
    swapped = [*(d for d in range(rank) if d != axis), axis]
    moved = x if axis == rank - 1 else w.Transpose(x, perm=swapped)
    total = lane_sum(w, moved, [shape[d] for d in swapped])
    if not keepdim:
        return w.Squeeze(total, np.array([-1]))
    return total if axis == rank - 1 else w.Transpose(total, perm=[swapped.index(d) for d in range(rank)])
