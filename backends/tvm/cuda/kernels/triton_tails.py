"""Device functions that the integer kernels share: from s32 accumulators to stored values, bit-equal to `ir/dialect/integer.py`.

Needs `enable_fp_fusion=False`: a product and the addition after it round one by one. Imports Triton and nothing else, so that
these kernels can be interpreted, compiled ahead of time, and measured on a machine that has only Triton.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signed(value, FLIP: tl.constexpr):
    """u8 codes as s8 (x ^ 0x80, that is, x - 128), which the tensor cores multiply by s8; s8 codes as they are."""
    if FLIP:
        value = (value ^ 128).to(tl.int8, bitcast=True)
    return value


@triton.jit
def round_even(x):
    """Floats of magnitude up to 2^22 as s32, half to even: added to 1.5 * 2^23, the integer stands in the low bits."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def finish(
    acc,
    scale,
    shift,
    table,
    extra,
    residual,
    columns,
    offsets,
    mask,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    RESIDUAL: tl.constexpr,
    A_MULTIPLIER: tl.constexpr,
    B_MULTIPLIER: tl.constexpr,
    ADD_SHIFT: tl.constexpr,
    A_ZERO_POINT: tl.constexpr,
    B_ZERO_POINT: tl.constexpr,
    ADD_ZERO_POINT: tl.constexpr,
    ADD_QMIN: tl.constexpr,
    ADD_QMAX: tl.constexpr,
):
    """The tail (`base.Tail`) of a tile acc [rows, columns]; `scale` and `shift` are read at `columns`, the residual at `offsets`.

    scale: multipliers of a dyadic tail. table: where not None, the entry at (code & 255) is the result, `gw::lookup`.
    extra: where not None, a tile of floats that is added to a scaled one. residual: a tile, too, where RESIDUAL is "tile".
    """
    value = acc
    if KIND == "rescale":
        product = acc.to(tl.float32) * tl.load(scale + columns)[None, :]
        product = tl.minimum(tl.maximum(product, 1.0 * (QMIN - ZERO_POINT)), 1.0 * (QMAX - ZERO_POINT))
        value = round_even(product) + ZERO_POINT
    elif KIND == "dyadic":
        wide = tl.load(shift + columns).to(tl.int64)[None, :]
        half = tl.full([1, 1], 1, tl.int64) << (wide - 1)
        steps = (acc.to(tl.int64) * tl.load(scale + columns).to(tl.int64)[None, :] + half) >> wide
        value = tl.minimum(tl.maximum(steps + ZERO_POINT, QMIN), QMAX).to(tl.int32)
    elif KIND == "scale":
        value = acc.to(tl.float32) * tl.load(scale + columns)[None, :]
        if extra is not None:
            value = value + extra
    if RESIDUAL == "add":
        other = tl.load(residual + offsets, mask=mask, other=0).to(tl.int32)
        total = (value - A_ZERO_POINT) * A_MULTIPLIER + (other - B_ZERO_POINT) * B_MULTIPLIER
        steps = ((total + (1 << (ADD_SHIFT - 1))) >> ADD_SHIFT) + ADD_ZERO_POINT
        value = tl.minimum(tl.maximum(steps, ADD_QMIN), ADD_QMAX)
    elif RESIDUAL == "tile":
        value = value + residual
    elif RESIDUAL == "float":
        value = value + tl.load(residual + offsets, mask=mask, other=0.0)
    if table is not None:
        # From shared memory: of 32 lanes that read 256 bytes at random in device memory, few are served at a time.
        indices = tl.reshape(value & 255, (value.shape[0] * value.shape[1],))
        value = tl.reshape(tl.gather(tl.load(table + tl.arange(0, 256)), indices, 0), value.shape)
    return value


@triton.jit
def store_tile(
    acc,
    bias,
    scale,
    shift,
    table,
    extra,
    residual,
    y,
    first,
    rows,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    RESIDUAL: tl.constexpr,
    A_MULTIPLIER: tl.constexpr,
    B_MULTIPLIER: tl.constexpr,
    ADD_SHIFT: tl.constexpr,
    A_ZERO_POINT: tl.constexpr,
    B_ZERO_POINT: tl.constexpr,
    ADD_ZERO_POINT: tl.constexpr,
    ADD_QMIN: tl.constexpr,
    ADD_QMAX: tl.constexpr,
):
    """Y [M, N] at `rows` by `columns` (either may run past the end) = tail(acc + bias); Y and the residual start at `first`."""
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    if M * N >= 2**31:
        row = row.to(tl.int64)
    if bias is not None:
        acc += tl.load(bias + column)[None, :]
    offsets = first + row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    value = finish(
        acc, scale, shift, table, extra, residual, column, offsets, mask, KIND, ZERO_POINT, QMIN, QMAX, RESIDUAL,
        A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of this program: GROUP row tiles sweep the columns together, so that their operands meet in L2."""
    program = tl.program_id(0)
    rows: tl.constexpr = (M + BM - 1) // BM
    columns: tl.constexpr = (N + BN - 1) // BN
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % size, inside // size
