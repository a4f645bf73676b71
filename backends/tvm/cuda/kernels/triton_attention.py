"""Attention of the integer stage in one kernel, bit-equal to matmul, scale, mask, `gw::softmax`, quantize and matmul one by one.

The order of the softmax's additions is part of its meaning: 16 running sums, lane i takes keys i, i + 16, ..., then lanes 8, 4, 2
and 1 apart (ir/dialect/exact.py). Here a tile of probabilities is seen as [rows, keys / 16, 16]; the place of one 16-key chunk is
singled out by adding zeros, which is exact, and chunks are added in order. Every product is rounded before it is added
(`enable_fp_fusion=False`), the division is the correctly rounded one.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_rows import C0, C1, C2, C3, EXP_LOWEST, LN2_HIGH, LN2_LOW, LOG2_E
from .triton_tails import finish, round_even, signed


@triton.jit
def exp(x):
    """The bits of `exp_reference` (ir/dialect/exact.py) for x <= 0."""
    x = tl.maximum(x, EXP_LOWEST)
    shifted = x * LOG2_E + 12582912.0
    n = shifted - 12582912.0
    r = tl.math.fma(n, -LN2_HIGH, x)  # the products are exact: 15 and 17 bits by seven
    r = tl.math.fma(n, -LN2_LOW, r)
    p = r * C0 + C1
    p = p * r + C2
    p = p * r + C3
    p = p * (r * r) + r
    p = p + 1.0
    # p * 2^n is p with n added to its exponent: n >= -93, so that it stays normal, and stands in the low bits of `shifted`.
    return (p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def add_chunks(lanes, e, BM: tl.constexpr, COUNT: tl.constexpr):
    """lanes [BM, 16] plus the COUNT 16-key chunks of e, first to last: those of the first half, then those of the second."""
    if COUNT == 1:
        lanes = lanes + tl.reshape(e, (BM, 16))
    else:
        first, second = tl.split(tl.permute(tl.reshape(e, (BM, 2, COUNT * 8)), (0, 2, 1)))
        lanes = add_chunks(lanes, first, BM, COUNT // 2)
        lanes = add_chunks(lanes, second, BM, COUNT // 2)
    return lanes


@triton.jit
def add_lanes(lanes, BM: tl.constexpr):
    """Lanes 8, 4, 2 and 1 apart; a sum of two is the same in either order."""
    lanes = tl.sum(tl.reshape(lanes, (BM, 2, 8)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (BM, 2, 4)), axis=1)
    lanes = tl.sum(tl.reshape(lanes, (BM, 2, 2)), axis=1)
    return tl.sum(lanes, axis=1)


@triton.jit
def add_offset(acc, tile, OFFSET: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """acc [BM, N] plus OFFSET times the sums of the columns of tile [BK, N], on tensor cores, which have time.

    OFFSET: -255 to 255, in two steps where it is no s8.
    """
    if OFFSET != 0:
        NEAR: tl.constexpr = min(max(OFFSET, -128), 127)
        acc = tl.dot(tl.full((BM, BK), NEAR, tl.int8), tile, acc, out_dtype=tl.int32)
        if OFFSET != NEAR:
            acc = tl.dot(tl.full((BM, BK), OFFSET - NEAR, tl.int8), tile, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def scores(
    query,
    k_at,
    mask_at,
    start,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    K_KEY: tl.constexpr,
    K_INNER: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
    ONE_MASK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
):
    """Scores of BN keys from `start` on; minus infinity past the last key. ONE_MASK: all rows have the mask at the pointer."""
    keys = start + tl.arange(0, BN)
    inner = tl.arange(0, BD)
    valid = keys < KEYS
    tile = tl.load(
        k_at + keys[None, :] * K_KEY + inner[:, None] * K_INNER, mask=valid[None, :] & (inner < WIDTH)[:, None], other=0
    )
    acc = tl.dot(query, tile, out_dtype=tl.int32)
    acc = add_offset(acc, tile, OFFSET, query.shape[0], BD)
    value = acc.to(tl.float32) * SCALE
    if MASKED and ONE_MASK:
        value = value + tl.load(mask_at + keys, mask=valid, other=0.0)[None, :]
    elif MASKED:
        value = value + tl.load(mask_at + keys[None, :], mask=valid[None, :], other=0.0)
    if KEYS % BN != 0:
        value = tl.where(valid[None, :], value, float("-inf"))
    return value


@triton.jit
def codes_of(
    e,
    inverse,
    INVERSE_STEP: tl.constexpr,
    P_ZERO_POINT: tl.constexpr,
    P_QMIN: tl.constexpr,
    P_QMAX: tl.constexpr,
    P_FLIP: tl.constexpr,
):
    """`gw::quantize` of e * inverse, as s8."""
    steps = (e * inverse[:, None]) * INVERSE_STEP
    # No probability lies below zero or above one, so that most limits never bind.
    if P_QMIN > P_ZERO_POINT:
        steps = tl.maximum(steps, 1.0 * (P_QMIN - P_ZERO_POINT))
    if INVERSE_STEP > P_QMAX - P_ZERO_POINT:
        steps = tl.minimum(steps, 1.0 * (P_QMAX - P_ZERO_POINT))
    return (round_even(steps) + (P_ZERO_POINT - 128 * P_FLIP)).to(tl.int8)


@triton.jit
def values_of(
    v_at,
    start,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    V_KEY: tl.constexpr,
    V_COLUMN: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
):
    """The values [BN, BV] of BN keys from `start` on; 0 past the last key."""
    keys = start + tl.arange(0, BN)
    columns = tl.arange(0, BV)
    mask = (keys < KEYS)[:, None] & (columns < VALUES)[None, :]
    return tl.load(v_at + keys[:, None] * V_KEY + columns[None, :] * V_COLUMN, mask=mask, other=0)


@triton.jit
def weighted(codes, values, OFFSET: tl.constexpr):
    """codes [BM, BN], each with OFFSET added, by values [BN, BV]."""
    acc = tl.dot(codes, values, out_dtype=tl.int32)
    return add_offset(acc, values, OFFSET, codes.shape[0], codes.shape[1])


@triton.jit
def attention(
    q,
    k,
    v,
    mask,
    scale,
    shift,
    y,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HEADS: tl.constexpr,
    Q_START: tl.constexpr,
    Q_OUTER: tl.constexpr,
    Q_HEAD: tl.constexpr,
    Q_ROW: tl.constexpr,
    Q_INNER: tl.constexpr,
    K_START: tl.constexpr,
    K_OUTER: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_INNER: tl.constexpr,
    K_KEY: tl.constexpr,
    V_START: tl.constexpr,
    V_OUTER: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_KEY: tl.constexpr,
    V_COLUMN: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_START: tl.constexpr,
    MASK_OUTER: tl.constexpr,
    MASK_HEAD: tl.constexpr,
    MASK_ROW: tl.constexpr,
    Y_OUTER: tl.constexpr,
    Y_HEAD: tl.constexpr,
    Y_ROW: tl.constexpr,
    Q_FLIP: tl.constexpr,
    Q_OFFSET: tl.constexpr,
    SCORE_SCALE: tl.constexpr,
    P_INVERSE: tl.constexpr,
    P_ZERO_POINT: tl.constexpr,
    P_QMIN: tl.constexpr,
    P_QMAX: tl.constexpr,
    P_FLIP: tl.constexpr,
    P_OFFSET: tl.constexpr,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """Y = tail(quantize(softmax(scale Q K^T + mask)) V): BM query rows of one head a program; grid (row tiles, heads).

    Operands are read where they lie: element [outer, head, row, column] stands at START + outer * OUTER + ... of its buffer.
    *_OFFSET: what is missing in each code as it is multiplied (128 where flipped, less the zero point). Rows of at most BN keys
    are computed once; longer ones sweep the keys three times (largest score, sum, product).
    """
    outer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, ROWS - 1)
    inner = tl.arange(0, BD)
    q_at = q + (Q_START + outer * Q_OUTER + head * Q_HEAD) + row[:, None] * Q_ROW + inner[None, :] * Q_INNER
    query = signed(tl.load(q_at, mask=(inner < WIDTH)[None, :], other=0), Q_FLIP)
    k_at = k + (K_START + outer * K_OUTER + head * K_HEAD)
    v_at = v + (V_START + outer * V_OUTER + head * V_HEAD)
    mask_at = k_at
    if MASKED:
        mask_at = mask + (MASK_START + outer * MASK_OUTER + head * MASK_HEAD)
        if MASK_ROW != 0:
            mask_at = mask_at + row[:, None] * MASK_ROW
    lanes = tl.zeros((BM, 16), tl.float32)
    if KEYS <= BN:
        values = values_of(v_at, 0, KEYS, VALUES, V_KEY, V_COLUMN, BN, BV)  # on its way while scores are computed
        s = scores(query, k_at, mask_at, 0, KEYS, WIDTH, K_KEY, K_INNER, Q_OFFSET, SCORE_SCALE, MASKED, MASK_ROW == 0, BN, BD)
        e = exp(s - tl.max(s, axis=1)[:, None])
        if KEYS < BN:
            e = tl.where((tl.arange(0, BN) < KEYS)[None, :], e, 0.0)
        inverse = tl.div_rn(1.0, add_lanes(add_chunks(lanes, e, BM, BN // 16), BM))
        codes = codes_of(e, inverse, P_INVERSE, P_ZERO_POINT, P_QMIN, P_QMAX, P_FLIP)
        acc = weighted(codes, values, P_OFFSET)
    else:
        highest = tl.full((BM,), float("-inf"), tl.float32)
        for start in range(0, KEYS, BN):
            s = scores(
                query, k_at, mask_at, start, KEYS, WIDTH, K_KEY, K_INNER, Q_OFFSET, SCORE_SCALE, MASKED, MASK_ROW == 0, BN, BD
            )
            highest = tl.maximum(highest, tl.max(s, axis=1))
        for start in range(0, KEYS, BN):
            s = scores(
                query, k_at, mask_at, start, KEYS, WIDTH, K_KEY, K_INNER, Q_OFFSET, SCORE_SCALE, MASKED, MASK_ROW == 0, BN, BD
            )
            e = tl.where((start + tl.arange(0, BN) < KEYS)[None, :], exp(s - highest[:, None]), 0.0)
            lanes = add_chunks(lanes, e, BM, BN // 16)
        inverse = tl.div_rn(1.0, add_lanes(lanes, BM))
        acc = tl.zeros((BM, BV), tl.int32)
        for start in range(0, KEYS, BN):
            s = scores(
                query, k_at, mask_at, start, KEYS, WIDTH, K_KEY, K_INNER, Q_OFFSET, SCORE_SCALE, MASKED, MASK_ROW == 0, BN, BD
            )
            e = exp(s - highest[:, None])
            codes = codes_of(e, inverse, P_INVERSE, P_ZERO_POINT, P_QMIN, P_QMAX, P_FLIP)
            acc += weighted(codes, values_of(v_at, start, KEYS, VALUES, V_KEY, V_COLUMN, BN, BV), P_OFFSET)
    columns = tl.arange(0, BV)
    column = tl.minimum(columns, VALUES - 1)
    offsets = (outer * Y_OUTER + head * Y_HEAD) + row[:, None] * Y_ROW + columns[None, :]
    stored = (rows < ROWS)[:, None] & (columns < VALUES)[None, :]
    value = finish(
        acc, scale, shift, None, None, None, column, offsets, stored, KIND, ZERO_POINT, QMIN, QMAX, "", 0, 0, 1, 0, 0, 0, 0, 0
    )
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=stored)
