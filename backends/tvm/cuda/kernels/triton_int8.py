"""Int8 products on tensor cores: rows by weights, implicit-GEMM convolution, a product of two activations; and depthwise.

One program computes a BM x BN tile of the output. Its k loop is software-pipelined (the launch's `stages`) and counts its steps
(why: `triton_float.linear`). Both operands are contiguous along k: on Hopper, wgmma reads 8-bit operands only so. Lanes past the
last channel may hold anything: they meet zero weights, and a product of integers with zero is zero. u8 activations are multiplied
as x - 128 (`triton_tails.signed`), for which the packed bias makes up; a tap in the padding is the zero point.

All shapes are compile-time constants. Every kernel takes its pointers first: inputs, residual, weights, bias, the tail's vectors,
output; those it has not are None. Constants of the tail are those of `triton_tails.finish`.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tails import round_even, signed, store_tile, tile_of


@triton.jit
def linear(
    x,
    outlier_x,
    residual,
    statistics,
    norm_weight,
    norm_bias,
    w,
    bias,
    scale,
    shift,
    table,
    outlier_w,
    outlier_bias,
    outlier_scale,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    FLIP: tl.constexpr,
    OUTLIERS: tl.constexpr,
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
    """Y [M, N] = tail(X [M, K] W^T + bias); W [N padded to 16, W_PITCH], rows of X are X_PITCH apart.

    OUTLIERS: columns of a second product, which is scaled and added: outlier_x [M, OUTLIERS] by outlier_w [N padded, OUTLIERS].
    statistics: where not None, the residual is the layer normalization of what `residual` points to, with the (mean, inverse
    deviation) of each row there; `norm_weight`, `norm_bias` [N].
    """
    row_tile, column_tile = tile_of(M, N, BM, BN, GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    if M * X_PITCH >= 2**31 or M * N >= 2**31:
        row = row.to(tl.int64)
    k = tl.arange(0, BK)
    x_at = x + (row * X_PITCH)[:, None] + k[None, :]
    w_at = w + (column * W_PITCH)[None, :] + k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(tl.cdiv(K, BK)):
        start = step * BK
        if K % BK == 0:
            left = tl.load(x_at + start)
            right = tl.load(w_at + start)
        else:
            left = tl.load(x_at + start, mask=k[None, :] < K - start, other=0)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0)
        acc = tl.dot(signed(left, FLIP), right, acc, out_dtype=tl.int32)
    extra = None
    if OUTLIERS > 0:
        sums = tl.zeros((BM, BN), tl.int32) + tl.load(outlier_bias + column)[None, :]
        for index in tl.static_range(OUTLIERS):
            left = tl.load(outlier_x + row * OUTLIERS + index).to(tl.int32)
            right = tl.load(outlier_w + column * OUTLIERS + index).to(tl.int32)
            sums += left[:, None] * right[None, :]
        extra = sums.to(tl.float32) * tl.load(outlier_scale + column)[None, :]
    added = residual
    if statistics is not None:
        inside = (rows[:, None] < M) & (columns[None, :] < N)
        other = tl.load(residual + row[:, None] * N + columns[None, :], mask=inside, other=0.0)
        centered = other - tl.load(statistics + 2 * row)[:, None]
        normal = centered * tl.load(statistics + 2 * row + 1)[:, None]
        weight = tl.load(norm_weight + columns, mask=columns < N, other=0.0)
        added = normal * weight[None, :] + tl.load(norm_bias + columns, mask=columns < N, other=0.0)[None, :]
    store_tile(
        acc, bias, scale, shift, table, extra, added, y, 0, rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX, RESIDUAL,
        A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip


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
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    X_PITCH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    N: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    CHANNELS: tl.constexpr,
    W_PITCH: tl.constexpr,
    BAND_FILTERS: tl.constexpr,
    BAND_CHANNELS: tl.constexpr,
    BAND_LAST: tl.constexpr,
    FLIP: tl.constexpr,
    X_ZERO_POINT: tl.constexpr,
    INVERSE: tl.constexpr,
    X_QMIN: tl.constexpr,
    X_QMAX: tl.constexpr,
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
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = tail(implicit GEMM); N is padded to 16.

    X [BATCH, HEIGHT, WIDTH, X_PITCH] codes, of which CHANNELS are read at each tap; W [N, W_PITCH], k = (tap, channel).
    Where INVERSE is not 0, X is a float image [BATCH, CHANNELS, HEIGHT, WIDTH] instead, quantized on the way; k = (channel, tap).
    Where BAND_FILTERS is not 0 (groups), a column tile reads CHANNELS channels from
    min(first column // BAND_FILTERS * BAND_CHANNELS // 16 * 16, BAND_LAST) on.
    """
    M: tl.constexpr = BATCH * OUT_HEIGHT * OUT_WIDTH
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    row_tile, column_tile = tile_of(M, N, BM, BN, GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    image = row // (OUT_HEIGHT * OUT_WIDTH)
    top = row // OUT_WIDTH % OUT_HEIGHT * STRIDE_Y - PAD_Y
    left = row % OUT_WIDTH * STRIDE_X - PAD_X
    if BATCH * HEIGHT * WIDTH * X_PITCH >= 2**31 or M * N >= 2**31:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
    first = 0
    if BAND_FILTERS:
        first = tl.multiple_of(tl.minimum(column_tile * BN // BAND_FILTERS * BAND_CHANNELS // 16 * 16, BAND_LAST), 16)
    k = tl.arange(0, BK)
    w_at = w + column[None, :] * W_PITCH + k[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    if INVERSE != 0.0:
        # A gather: the k lanes walk taps of one channel's plane. What depends on k alone is computed once a lane.
        origin = x + (image * (CHANNELS * HEIGHT * WIDTH) + top * WIDTH + left)
        for step in range(tl.cdiv(TAPS * CHANNELS, BK)):
            start = step * BK
            depth = start + k
            tap = depth % TAPS
            down = tap // KERNEL_WIDTH * DILATION_Y
            along = tap % KERNEL_WIDTH * DILATION_X
            # As unsigned numbers, places above and left of the image lie past its end; so do the k past the last tap.
            down_or_out = tl.where(depth < TAPS * CHANNELS, down, 1 << 24)
            y_in = (top[:, None] + down_or_out[None, :]).to(tl.uint32, bitcast=True)
            x_in = (left[:, None] + along[None, :]).to(tl.uint32, bitcast=True)
            inside = (y_in < HEIGHT) & (x_in < WIDTH)
            offset = (depth // TAPS * HEIGHT + down) * WIDTH + along
            real = tl.load(origin[:, None] + offset[None, :], mask=inside, other=0.0) * INVERSE
            real = tl.minimum(tl.maximum(real, 1.0 * (X_QMIN - X_ZERO_POINT)), 1.0 * (X_QMAX - X_ZERO_POINT))
            # Outside the image stands the real value 0, whose code is the zero point.
            codes = (tl.where(inside, round_even(real), 0) + (X_ZERO_POINT - 128 * FLIP)).to(tl.int8)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0)
            acc = tl.dot(codes, right, acc, out_dtype=tl.int32)
    elif CHANNELS % BK == 0:
        # A k block lies inside one tap: its place is a scalar.
        origin = x + ((image * HEIGHT + top) * WIDTH + left) * X_PITCH
        x_at = origin[:, None] + (first + k)[None, :]
        BLOCKS: tl.constexpr = CHANNELS // BK
        for block in range(TAPS * BLOCKS):
            tap = block // BLOCKS
            down = tap // KERNEL_WIDTH * DILATION_Y
            along = tap % KERNEL_WIDTH * DILATION_X
            offset = (down * WIDTH + along) * X_PITCH + block % BLOCKS * BK
            inside = (top + down >= 0) & (top + down < HEIGHT) & (left + along >= 0) & (left + along < WIDTH)
            codes = tl.load(x_at + offset, mask=inside[:, None], other=X_ZERO_POINT)
            right = tl.load(w_at + block * BK)
            acc = tl.dot(signed(codes, FLIP), right, acc, out_dtype=tl.int32)
    else:
        origin = x + ((image * HEIGHT + top) * WIDTH + left) * X_PITCH
        for step in range(tl.cdiv(TAPS * CHANNELS, BK)):
            start = step * BK
            depth = start + k
            tap = depth // CHANNELS
            down = tap // KERNEL_WIDTH * DILATION_Y
            along = tap % KERNEL_WIDTH * DILATION_X
            offset = (down * WIDTH + along) * X_PITCH + first + depth % CHANNELS
            y_in = top[:, None] + down[None, :]
            x_in = left[:, None] + along[None, :]
            inside = (y_in >= 0) & (y_in < HEIGHT) & (x_in >= 0) & (x_in < WIDTH) & (depth[None, :] < TAPS * CHANNELS)
            codes = tl.load(origin[:, None] + offset[None, :], mask=inside, other=X_ZERO_POINT)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0)
            acc = tl.dot(signed(codes, FLIP), right, acc, out_dtype=tl.int32)
    store_tile(
        acc, bias, scale, shift, table, None, residual, y, 0, rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX, RESIDUAL,
        A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip


@triton.jit
def depthwise(
    x,
    residual,
    w,
    bias,
    scale,
    shift,
    table,
    y,
    BATCH: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    N: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PAD_Y: tl.constexpr,
    PAD_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    X_ZERO_POINT: tl.constexpr,
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
):
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = tail(one filter a channel); W [taps, N]. BM pixels by BN channels a program."""
    M: tl.constexpr = BATCH * OUT_HEIGHT * OUT_WIDTH
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    image = row // (OUT_HEIGHT * OUT_WIDTH)
    top = row // OUT_WIDTH % OUT_HEIGHT * STRIDE_Y - PAD_Y
    left = row % OUT_WIDTH * STRIDE_X - PAD_X
    if BATCH * HEIGHT * WIDTH * N >= 2**31 or M * N >= 2**31:
        image = image.to(tl.int64)
        row = row.to(tl.int64)
    x_at = x + (((image * HEIGHT + top) * WIDTH + left) * N)[:, None] + columns[None, :]
    acc = tl.zeros((BM, BN), tl.int32) + tl.load(bias + column)[None, :]
    for i in tl.static_range(KERNEL_HEIGHT):
        for j in tl.static_range(KERNEL_WIDTH):
            down = top + i * DILATION_Y
            along = left + j * DILATION_X
            inside = (down >= 0) & (down < HEIGHT) & (along >= 0) & (along < WIDTH)
            offset = (i * DILATION_Y * WIDTH + j * DILATION_X) * N
            code = tl.load(x_at + offset, mask=inside[:, None] & (columns < N)[None, :], other=X_ZERO_POINT).to(tl.int32)
            acc += code * tl.load(w + (i * KERNEL_WIDTH + j) * N + column).to(tl.int32)[None, :]
    store_tile(
        acc, None, scale, shift, table, None, residual, y, 0, rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX, RESIDUAL,
        A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip


@triton.jit
def matmul(
    a,
    b,
    residual,
    scale,
    shift,
    table,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    FLIP: tl.constexpr,
    OFFSET: tl.constexpr,
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
    """Y [B, M, N] = tail(A [B, M, K] times B [B, K, N], or [B, N, K] where TRANSPOSED); program axis 1 is the batch.

    OFFSET: what is missing in each value of A as it is multiplied (128 where flipped, less the zero point).
    """
    row_tile, column_tile = tile_of(M, N, BM, BN, GROUP)
    batch = tl.program_id(1).to(tl.int64)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    k = tl.arange(0, BK)
    a_at = a + batch * (M * K) + (row * K)[:, None] + k[None, :]
    # B's elements from one k to the next, and from one column to the next.
    B_INNER: tl.constexpr = 1 if TRANSPOSED else N
    B_COLUMN: tl.constexpr = K if TRANSPOSED else 1
    b_at = b + batch * (N * K) + (column * B_COLUMN)[None, :] + (k * B_INNER)[:, None]
    acc = tl.zeros((BM, BN), tl.int32)
    sums = tl.zeros((BN,), tl.int32)
    for step in range(tl.cdiv(K, BK)):
        start = step * BK
        if K % BK == 0:
            left = tl.load(a_at + start)
            right = tl.load(b_at + start * B_INNER)
        else:
            left = tl.load(a_at + start, mask=k[None, :] < K - start, other=0)
            right = tl.load(b_at + start * B_INNER, mask=k[:, None] < K - start, other=0)
        acc = tl.dot(signed(left, FLIP), right, acc, out_dtype=tl.int32)
        if OFFSET != 0:
            sums += tl.sum(right.to(tl.int32), axis=0)
    if OFFSET != 0:
        acc += (sums * OFFSET)[None, :]
    store_tile(
        acc, None, scale, shift, table, None, residual, y, batch * (M * N), rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX,
        RESIDUAL, A_MULTIPLIER, B_MULTIPLIER, ADD_SHIFT, A_ZERO_POINT, B_ZERO_POINT, ADD_ZERO_POINT, ADD_QMIN, ADD_QMAX,
    )  # fmt: skip
