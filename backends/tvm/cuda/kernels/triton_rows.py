"""Triton kernels over rows whose order of operations is part of their meaning (`ir/dialect/exact.py`).

A program takes BLOCK rows as a tile [BLOCK, LANES]: lane i of a row keeps the running sum of elements i, i + LANES, ..., and the
lanes are added pairwise, 8, 4, 2, 1 apart. Divisions and square roots are the correctly rounded ones, and nothing is contracted
(kernels are compiled without fused multiply-add), so the bits are those of the definition. Inputs are finite.
Rows of half precision are read as float32, and their result is rounded once more.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .....ir.dialect import exact
from .triton_e4m3 import keep

LANES = tl.constexpr(exact.LANES)
EXP_LOWEST = tl.constexpr(exact.EXP_LOWEST)
LOG2_E = tl.constexpr(exact.LOG2_E)
LN2_HIGH = tl.constexpr(exact.LN2_HIGH)
LN2_LOW = tl.constexpr(exact.LN2_LOW)
C0, C1, C2, C3 = (tl.constexpr(c) for c in exact.EXP_POLYNOMIAL)

#: 1.5 * 2^23: a float of up to 2^22 added to it is rounded to an integer, half to even.
INTEGER = tl.constexpr(12582912.0)

#: Vectors whose loads are in flight at once.
UNROLL = tl.constexpr(4)

#: Columns that are read and written at once where nothing is summed, so that no order counts.
WIDE = tl.constexpr(128)


@triton.jit
def round_even(x):
    """The integer nearest to x, half to even, as a float. |x| < 2^22."""
    return (x + INTEGER) - INTEGER


@triton.jit
def exp(x):
    """`exp_reference` for x <= 0."""
    x = tl.maximum(x, EXP_LOWEST)
    n = round_even(x * LOG2_E)
    r = tl.math.fma(n, -LN2_HIGH, x)  # the products are exact: 15 and 17 bits by seven
    r = tl.math.fma(n, -LN2_LOW, r)
    p = r * C0 + C1
    p = p * r + C2
    p = p * r + C3
    p = p * (r * r) + r
    p = p + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return p * power


@triton.jit
def across(sums, BLOCK: tl.constexpr):
    """[BLOCK, LANES] -> [BLOCK]: lanes added pairwise. A sum of two is the same in either order."""
    sums = tl.sum(tl.reshape(sums, [BLOCK, 2, 8]), 1)
    sums = tl.sum(tl.reshape(sums, [BLOCK, 2, 4]), 1)
    sums = tl.sum(tl.reshape(sums, [BLOCK, 2, 2]), 1)
    return tl.sum(sums, 1)


@triton.jit
def softmax(x_ptr, y_ptr, ROWS: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """`gw::softmax` over x [ROWS, LENGTH]. The powers are computed twice: that is cheaper than a trip through memory."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    base = row[:, None] * LENGTH + lane[None, :]
    inside = row[:, None] < ROWS
    highest = tl.full([BLOCK, LANES], float("-inf"), tl.float32)
    for start in range(0, LENGTH, LANES * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * LANES
            valid = inside & (at + lane < LENGTH)[None, :]
            highest = tl.maximum(highest, tl.load(x_ptr + base + at, valid, float("-inf")).to(tl.float32))
    # A row outside keeps its differences finite.
    top = tl.where(row < ROWS, tl.max(highest, 1), 0.0)[:, None]
    sums = tl.zeros([BLOCK, LANES], tl.float32)
    for start in range(0, LENGTH, LANES * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * LANES
            valid = inside & (at + lane < LENGTH)[None, :]
            power = exp(tl.load(x_ptr + base + at, valid, 0.0).to(tl.float32) - top)
            sums = sums + tl.where(valid, power, 0.0)
    total = tl.where(row < ROWS, across(sums, BLOCK), 1.0)
    inverse = tl.math.div_rn(1.0, total)[:, None]
    for start in range(0, LENGTH, LANES * UNROLL):
        for step in tl.static_range(UNROLL):
            at = start + step * LANES
            valid = inside & (at + lane < LENGTH)[None, :]
            power = exp(tl.load(x_ptr + base + at, valid, 0.0).to(tl.float32) - top)
            tl.store(y_ptr + base + at, power * inverse, valid)


@triton.jit
def layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    twin_weight_ptr,
    twin_bias_ptr,
    inverse_ptr,
    statistics_ptr,
    y_ptr,
    q_ptr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    MEAN: tl.constexpr,
    STEPS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    ZERO: tl.constexpr,
):
    """`gw::layer_norm` of x [ROWS, LENGTH] to y, and `gw::quantize` of it to q; either may be None.

    twin_weight, twin_bias: q is of the normalization with these; None: of y.
    statistics: mean and inverse deviation of each row [ROWS, 2], for who normalizes as he reads; None: not stored.
    inverse: 1 / scale, one number, of 8-bit floats in q (`gw::quantize_fp8`); None: q holds integers.
    MEAN: 1 / LENGTH. STEPS: 1 / scale. LOW, HIGH: limits of the codes before their zero point ZERO is added.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    base = row[:, None] * LENGTH + lane[None, :]
    inside = row[:, None] < ROWS
    sums = tl.load(x_ptr + base, inside & (lane < LENGTH)[None, :], 0.0).to(tl.float32)
    for at in range(LANES, LENGTH, LANES):
        sums = sums + tl.load(x_ptr + base + at, inside & (at + lane < LENGTH)[None, :], 0.0).to(tl.float32)
    mean = (across(sums, BLOCK) * MEAN)[:, None]
    difference = tl.load(x_ptr + base, inside & (lane < LENGTH)[None, :], 0.0).to(tl.float32) - mean
    sums = tl.where((lane < LENGTH)[None, :], difference * difference, 0.0)
    for at in range(LANES, LENGTH, LANES):
        difference = tl.load(x_ptr + base + at, inside & (at + lane < LENGTH)[None, :], 0.0).to(tl.float32) - mean
        sums = sums + tl.where((at + lane < LENGTH)[None, :], difference * difference, 0.0)
    variance = across(sums, BLOCK) * MEAN
    inverse = tl.math.div_rn(1.0, tl.math.sqrt_rn(variance + EPS))[:, None]
    if statistics_ptr is not None:
        tl.store(statistics_ptr + 2 * row[:, None], mean, inside)
        tl.store(statistics_ptr + 2 * row[:, None] + 1, inverse, inside)
    for at in range(0, LENGTH, WIDE):
        column = at + tl.arange(0, WIDE)
        valid = inside & (column < LENGTH)[None, :]
        place = row[:, None] * LENGTH + column[None, :]
        centered = tl.load(x_ptr + place, valid, 0.0).to(tl.float32) - mean
        # Read once a row: one vector for all rows would have to change hands between lanes.
        each = tl.broadcast_to(column[None, :], (BLOCK, WIDE))
        weight = tl.load(weight_ptr + each, valid, 0.0)
        bias = tl.load(bias_ptr + each, valid, 0.0)
        normal = centered * inverse
        value = normal * weight + bias
        if inverse_ptr is not None:
            keep(value, y_ptr, q_ptr, inverse_ptr, place, valid)
        elif y_ptr is not None:
            tl.store(y_ptr + place, value, valid)
        if q_ptr is not None and inverse_ptr is None:
            if twin_weight_ptr is not None:
                value = normal * tl.load(twin_weight_ptr + each, valid, 0.0) + tl.load(twin_bias_ptr + each, valid, 0.0)
            steps = tl.minimum(tl.maximum(value * STEPS, LOW), HIGH)
            code = round_even(steps).to(tl.int32) + ZERO
            tl.store(q_ptr + place, code.to(q_ptr.dtype.element_ty), valid)


@triton.jit
def weighted(x_ptr, weight_ptr, place, valid, EACH: tl.constexpr):
    """Elements of x, each times its weight, of which EACH neighbours share one; 0 where not valid."""
    value = tl.load(x_ptr + place, valid, 0.0).to(tl.float32)
    if weight_ptr is not None:
        value = value * tl.load(weight_ptr + place // EACH, valid, 0.0)
    return value


@triton.jit
def reduce_sum(
    x_ptr,
    weight_ptr,
    y_ptr,
    OUTPUTS: tl.constexpr,
    LENGTH: tl.constexpr,
    INNER: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`gw::reduce_sum` of x [OUTPUTS / INNER, LENGTH, INNER] over its middle axis; weight_ptr: of x * weights, or None."""
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    base = ((out // INNER) * (LENGTH * INNER) + out % INNER)[:, None] + (lane * INNER)[None, :]
    inside = out[:, None] < OUTPUTS
    sums = weighted(x_ptr, weight_ptr, base, inside & (lane < LENGTH)[None, :], EACH)
    for at in range(LANES, LENGTH, LANES):
        sums = sums + weighted(x_ptr, weight_ptr, base + at * INNER, inside & (at + lane < LENGTH)[None, :], EACH)
    tl.store(y_ptr + out, across(sums, BLOCK), out < OUTPUTS)
