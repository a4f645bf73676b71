"""Device functions that the integer kernels share: from s32 accumulators to stored values, bit-equal to `ir/dialect/integer.py`.

Needs `enable_fp_fusion=False`: a product and the addition after it round one by one. Imports Triton and nothing else, so that
these kernels can be interpreted, compiled ahead of time, and measured on a machine that has only Triton.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter knows no assembly.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

#: Four s32 as four bytes, limited: the upper two first, which the second instruction moves up.
_PACK = "{{ .reg .b32 high; cvt.pack.sat.{0}.s32.b32 high, $4, $3, 0; cvt.pack.sat.{0}.s32.b32 $0, $2, $1, high; }}"
PACK_S8: tl.constexpr = tl.constexpr(_PACK.format("s8"))
PACK_U8: tl.constexpr = tl.constexpr(_PACK.format("u8"))


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
def within(value, LOW: tl.constexpr, HIGH: tl.constexpr):
    """s32 values limited to LOW .. HIGH; where that ends as a type of 8 bits does, in that type: two instructions pack and limit
    four values, where a minimum and a maximum are two for each."""
    if HIGH == 127 and LOW >= -128 and not INTERPRETED:
        value = tl.maximum(value, LOW) if LOW > -128 else value
        value = tl.inline_asm_elementwise(PACK_S8, "=r,r,r,r,r", [value], dtype=tl.int8, is_pure=True, pack=4)
    elif HIGH == 255 and LOW >= 0 and not INTERPRETED:
        value = tl.maximum(value, LOW) if LOW > 0 else value
        value = tl.inline_asm_elementwise(PACK_U8, "=r,r,r,r,r", [value], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        value = tl.minimum(tl.maximum(value, LOW), HIGH)
    return value


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
    KIND "bounded": a "rescale" of products below 2^22.
    """
    value = acc
    # s8 codes that are only looked up count from 0: bytes without a sign are indices as they stand.
    SHIFT: tl.constexpr = 128 if table is not None and KIND == "bounded" and RESIDUAL == "" and QMAX == 127 else 0
    if KIND == "bounded":
        product = acc.to(tl.float32) * tl.load(scale + columns)[None, :]
        value = within(round_even(product) + (ZERO_POINT + SHIFT), QMIN + SHIFT, QMAX + SHIFT)
    elif KIND == "rescale":
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
        total = (value.to(tl.int32) - A_ZERO_POINT) * A_MULTIPLIER + (other - B_ZERO_POINT) * B_MULTIPLIER
        steps = ((total + (1 << (ADD_SHIFT - 1))) >> ADD_SHIFT) + ADD_ZERO_POINT
        value = within(steps, ADD_QMIN, ADD_QMAX)
    elif RESIDUAL == "tile":
        value = value + residual
    elif RESIDUAL == "float":
        value = value + tl.load(residual + offsets, mask=mask, other=0.0)
    if table is not None:
        # From shared memory: of 32 lanes that read 256 bytes at random in device memory, few are served at a time.
        indices = tl.reshape(value.to(tl.int32) & 255, (value.shape[0] * value.shape[1],))
        value = tl.reshape(tl.gather(tl.load(table + (tl.arange(0, 256) ^ SHIFT)), indices, 0), value.shape)
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
