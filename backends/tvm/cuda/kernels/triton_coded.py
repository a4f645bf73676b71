"""Weights stored as codes of a table: a linear layer of few rows that decodes as it multiplies, and the decoding of a weight.

Codes lie as `kernels/coded_f32.Coded` packs them, [panel][byte][16 rows], so that a program reads whole lines of memory; scales
and zeros as [panel][group][16 rows]. An entry is computed where the table follows a rule (FIRST: consecutive integers; ORIGIN,
MANTISSA, LOWEST: floating point), else looked up. Decoding rounds as `ir/dialect/codebook` does: entry - zero, times the scale.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_float import store


@triton.jit
def entry_of(
    code, table, RULE: tl.constexpr, FIRST: tl.constexpr, ORIGIN: tl.constexpr, MANTISSA: tl.constexpr, LOWEST: tl.constexpr
):
    """Table entries of s32 codes, float32."""
    value = code
    if RULE == "integers":
        # The code in the low bits of 2^23: one exact subtraction, where a conversion runs at a quarter of the rate.
        value = (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - FIRST)
    elif RULE == "minifloat":
        signed = code - ORIGIN
        size = tl.abs(signed)
        exponent = size >> MANTISSA
        whole = (size & ((1 << MANTISSA) - 1)) | (tl.minimum(exponent, 1) << MANTISSA)
        power = ((tl.maximum(exponent, 1) + (126 + LOWEST)) << 23).to(tl.float32, bitcast=True)
        value = whole.to(tl.float32) * power
        value = tl.where(signed < 0, -value, value)
    else:
        value = tl.load(table + code)
    return value


@triton.jit
def linear(
    x,
    residual,
    codes,
    scale,
    zero,
    table,
    bias,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    ORIGIN: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    ZEROS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Y [rows, N] = act(X [rows, K] W^T + bias + residual); program (panel of 16 outputs, row).

    A step takes CHUNKS runs of CHUNK bytes (BITS of 1, 2, 4 or 8: whole codes a byte) or weights (others: read one by one); a
    run lies inside one group. The row's sum is taken in float32.
    """
    panel = tl.program_id(0)
    row = tl.program_id(1)
    lane = tl.arange(0, 16)[None, None, :]
    WHOLE: tl.constexpr = 8 % BITS == 0
    EACH: tl.constexpr = 8 // BITS if WHOLE else 1
    LENGTH: tl.constexpr = ROW_BYTES if WHOLE else K
    MASK: tl.constexpr = (1 << BITS) - 1
    base = codes + panel * (ROW_BYTES * 16)
    acc = tl.zeros((CHUNKS, CHUNK, 16), tl.float32)
    for start in tl.range(0, LENGTH, CHUNKS * CHUNK, num_stages=4):
        chunk = start // CHUNK + tl.arange(0, CHUNKS)
        place = chunk[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, :, None]
        group = tl.minimum(chunk * (CHUNK * EACH) // GROUP, GROUPS - 1)
        at = (panel * GROUPS + group)[:, None, None] * 16 + lane
        factor = tl.load(scale + at)
        if WHOLE:
            word = tl.load(base + place * 16 + lane, mask=place < ROW_BYTES, other=0).to(tl.int32)
        else:
            byte = place * BITS // 8
            word = tl.load(base + byte * 16 + lane, mask=place < K, other=0).to(tl.int32)
            more = tl.load(base + (byte + 1) * 16 + lane, mask=(place < K) & (byte + 1 < ROW_BYTES), other=0).to(tl.int32)
            word = (word | (more << 8)) >> (place * BITS % 8)
        part = tl.zeros((CHUNKS, CHUNK, 16), tl.float32)
        for index in tl.static_range(EACH):
            code = (word >> (index * BITS)) & MASK
            value = entry_of(code, table, RULE, FIRST, ORIGIN, MANTISSA, LOWEST)
            if ZEROS:
                value = value - tl.load(zero + at)
            inner = place * EACH + index
            part = tl.fma(value, tl.load(x + row * K + inner, mask=inner < K, other=0.0).to(tl.float32), part)
        acc += part * factor
    column = panel * 16 + tl.arange(0, 16)
    total = tl.sum(tl.sum(acc, axis=1), axis=0) + tl.load(bias + column)
    store(total, residual, y, row * N + column, column < N, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def add_product(part, word, x, SHIFT: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr):
    """part + ((word >> SHIFT & MASK) + FIRST) * v for x = v / 2^SHIFT; MASK << SHIFT stays below bit 23.

    In the low bits of 2^23 a code is a number without a conversion, and one exact subtraction leaves its entry times 2^SHIFT.
    """
    value = (word & (MASK << SHIFT) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - FIRST * (1 << SHIFT))
    return tl.fma(value, x, part)


@triton.jit
def linear_of_integers(
    x,
    residual,
    codes,
    scale,
    zero,
    table,
    bias,
    y,
    N: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    ORIGIN: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    ZEROS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """As `linear`, for BITS of 1, 2, 4 or 8 and entries that count up from FIRST, without zeros.

    A thread takes one byte of all 16 rows at a time: one load of 16 bytes, as four words of four rows each. A code is masked
    where it stands in its word and multiplied with x over the power of two of its place: three instructions a weight. Eight
    threads side by side read a line of memory; UNROLL lines after one another, of one group, are theirs.
    """
    panel = tl.program_id(0)
    row = tl.program_id(1)
    quad = tl.arange(0, 4)[None, :]
    index = tl.arange(0, 32 * WARPS)[:, None]
    EACH: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = (1 << BITS) - 1
    words = codes.to(tl.pointer_type(tl.int32)) + panel * (ROW_BYTES * 4)
    acc0 = tl.zeros((32 * WARPS, 4), tl.float32)
    acc1 = tl.zeros((32 * WARPS, 4), tl.float32)
    acc2 = tl.zeros((32 * WARPS, 4), tl.float32)
    acc3 = tl.zeros((32 * WARPS, 4), tl.float32)
    for start in range(0, ROW_BYTES, 32 * WARPS * UNROLL):
        first = start + index // 8 * (8 * UNROLL) + index % 8
        part0 = tl.zeros((32 * WARPS, 4), tl.float32)
        part1 = tl.zeros((32 * WARPS, 4), tl.float32)
        part2 = tl.zeros((32 * WARPS, 4), tl.float32)
        part3 = tl.zeros((32 * WARPS, 4), tl.float32)
        for line in tl.static_range(UNROLL):
            place = first + line * 8
            low = tl.load(words + place * 4 + quad, mask=place < ROW_BYTES, other=0)
            high = low >> 16
            for each in tl.static_range(EACH):
                inner = place * EACH + each
                value = tl.load(x + row * K + inner, mask=inner < K, other=0.0).to(tl.float32)
                even = value * (1.0 / (1 << each * BITS))
                odd = value * (1.0 / (1 << each * BITS + 8))
                part0 = add_product(part0, low, even, each * BITS, MASK, FIRST)
                part1 = add_product(part1, low, odd, each * BITS + 8, MASK, FIRST)
                part2 = add_product(part2, high, even, each * BITS, MASK, FIRST)
                part3 = add_product(part3, high, odd, each * BITS + 8, MASK, FIRST)
        group = tl.minimum(first * EACH // GROUP, GROUPS - 1)
        factors = scale + (panel * GROUPS + group) * 16 + quad * 4
        acc0 = tl.fma(part0, tl.load(factors), acc0)
        acc1 = tl.fma(part1, tl.load(factors + 1), acc1)
        acc2 = tl.fma(part2, tl.load(factors + 2), acc2)
        acc3 = tl.fma(part3, tl.load(factors + 3), acc3)
    rows = tl.join(tl.join(acc0, acc2), tl.join(acc1, acc3)).reshape(32 * WARPS, 16)
    column = panel * 16 + tl.arange(0, 16)
    total = tl.sum(rows, axis=0) + tl.load(bias + column)
    store(total, residual, y, row * N + column, column < N, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def decode(
    codes,
    scale,
    zero,
    table,
    y,
    COUNT: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    ORIGIN: tl.constexpr,
    MANTISSA: tl.constexpr,
    LOWEST: tl.constexpr,
    ZEROS: tl.constexpr,
    ROW_STEP: tl.constexpr,
    INNER_STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    BK: tl.constexpr,
):
    """The weight as the float kernels read it: weight k = tap * CHANNELS + channel of row n at n * ROW_STEP + k * INNER_STEP of
    Y, zeros where a tap has no such channel or k is past the last weight. Program (panel of 16 rows, BK of DEPTH)."""
    panel = tl.program_id(0)
    lane = tl.arange(0, 16)[None, :]
    k = (tl.program_id(1) * BK + tl.arange(0, BK))[:, None]
    PRESENT: tl.constexpr = COUNT // TAPS
    tap = k // CHANNELS
    channel = k % CHANNELS
    valid = (tap < TAPS) & (channel < PRESENT)
    place = tap * PRESENT + channel
    group = tl.minimum((channel * TAPS + tap) // GROUP, GROUPS - 1)
    byte = place * BITS // 8
    base = codes + panel * (ROW_BYTES * 16) + lane
    word = tl.load(base + byte * 16, mask=valid, other=0).to(tl.int32)
    more = tl.load(base + (byte + 1) * 16, mask=valid & (byte + 1 < ROW_BYTES), other=0).to(tl.int32)
    code = ((word | (more << 8)) >> (place * BITS % 8)) & ((1 << BITS) - 1)
    value = entry_of(code, table, RULE, FIRST, ORIGIN, MANTISSA, LOWEST)
    at = (panel * GROUPS + group) * 16 + lane
    if ZEROS:
        value = value - tl.load(zero + at, mask=valid, other=0.0)
    value = tl.where(valid, value * tl.load(scale + at, mask=valid, other=0.0), 0.0)
    tl.store(y + (panel * 16 + lane) * ROW_STEP + k * INNER_STEP, value.to(y.dtype.element_ty), mask=k < DEPTH)
