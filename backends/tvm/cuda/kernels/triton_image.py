"""A first convolution of many taps over a float image, in two launches: quantize once into a frame of words, then multiply.

A word is the four codes of one pixel, so the taps of one kernel row lie beside each other in memory, and the border is part of
the frame: the product reads whole runs of bytes and asks nowhere whether it is inside the image.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tails import round_even, store_tile, tile_of


@triton.jit
def frame(
    x,
    y,
    BATCH: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    FRAME_HEIGHT: tl.constexpr,
    FRAME_WIDTH: tl.constexpr,
    FLIP: tl.constexpr,
    INVERSE: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X float32 [BATCH, CHANNELS <= 4, HEIGHT, WIDTH] -> Y [BATCH, FRAME_HEIGHT, FRAME_WIDTH] words of four codes, zero past the
    last channel. The image starts at row TOP and column LEFT; around it stands the zero point. FLIP: codes less 128."""
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image = word // (FRAME_HEIGHT * FRAME_WIDTH)
    row = word // FRAME_WIDTH % FRAME_HEIGHT - TOP
    column = word % FRAME_WIDTH - LEFT
    inside = (image < BATCH) & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
    if BATCH * CHANNELS * HEIGHT * WIDTH >= 2**31:
        image = image.to(tl.int64)
    at = (image * CHANNELS * HEIGHT + row) * WIDTH + column
    packed = tl.zeros((BLOCK,), tl.int32)
    for channel in tl.static_range(CHANNELS):
        real = tl.load(x + at + channel * (HEIGHT * WIDTH), mask=inside, other=0.0) * INVERSE
        real = tl.minimum(tl.maximum(real, 1.0 * (QMIN - ZERO_POINT)), 1.0 * (QMAX - ZERO_POINT))
        code = tl.where(inside, round_even(real), 0) + (ZERO_POINT - 128 * FLIP)
        packed = packed | ((code & 255) << (8 * channel))
    words = y.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(words + word, packed, mask=word < BATCH * FRAME_HEIGHT * FRAME_WIDTH)


@triton.jit
def convolution(
    x,
    residual,
    w,
    bias,
    scale,
    shift,
    table,
    y,
    BATCH: tl.constexpr,
    FRAME_HEIGHT: tl.constexpr,
    X_PITCH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    N: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    W_PITCH: tl.constexpr,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = tail(implicit GEMM) over a frame of s8 words; N is padded to 16.

    X [BATCH, FRAME_HEIGHT, X_PITCH] bytes; W [N, W_PITCH], k = (kernel row, ROW bytes): the taps of a row, then zeros.
    """
    M: tl.constexpr = BATCH * OUT_HEIGHT * OUT_WIDTH
    row_tile, column_tile = tile_of(M, N, BM, BN, GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    image = row // (OUT_HEIGHT * OUT_WIDTH)
    if BATCH * FRAME_HEIGHT * X_PITCH >= 2**31 or M * N >= 2**31:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
    first = (image * FRAME_HEIGHT + row // OUT_WIDTH % OUT_HEIGHT * STRIDE_Y) * X_PITCH + row % OUT_WIDTH * (4 * STRIDE_X)
    k = tl.arange(0, BK)
    x_at = x + first
    w_at = w + column * W_PITCH
    acc = tl.zeros((BM, BN), tl.int32)
    BLOCKS: tl.constexpr = ROW // BK
    for block in range(KERNEL_HEIGHT * BLOCKS):
        offset = block // BLOCKS * (DILATION_Y * X_PITCH) + block % BLOCKS * BK
        acc = tl.dot(
            tl.load(x_at[:, None] + (offset + k)[None, :]),
            tl.load(w_at[None, :] + (block * BK + k)[:, None]),
            acc,
            out_dtype=tl.int32,
        )
    store_tile(
        acc, bias, scale, shift, table, None, residual, y, 0, rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX, RESIDUAL,
        A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip
