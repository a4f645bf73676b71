"""Products of 8-bit floats (e4m3) on tensor cores: scales, bias, residual, activation and the next layer's rounding are fused.

Operands are bytes, read through pointers to `float8e4nv`. A product of two e4m3 numbers is exact in float32. Its sum is not: the
tensor cores of sm_89 and sm_90 align the 32 products of an instruction and the sum so far to the largest of them, keep 13 bits
behind its leading one and cut off the rest (DeepSeek-V3, arXiv:2412.19437, section 3.5.2, found about 14 bits). That adds up over
the depth, so `plan_fp8.SUMMED` products at most go into one such sum, and these are added in float32. A result is off by

    (ceil(SUMMED / 32) + 1) * 2^-13 * scale * sum |x| |w|

at most, on top of what results of `triton_float` are: 2^-7 for 2048 products, each of which lost up to 2^-3 when its factors were
rounded to e4m3. Lanes past the last channel may hold anything, so they are masked.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_e4m3 import codes_of, keep
from .triton_float import activate
from .triton_tails import tile_of


@triton.jit
def store(
    acc,
    scale,
    bias,
    inverse,
    residual,
    y,
    codes,
    columns,
    offsets,
    mask,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """act(acc * scale + bias + residual), as `keep` stores it.

    scale and bias are read at `columns`, which lie inside; the residual at `offsets`.
    """
    value = acc * tl.load(scale + columns)[None, :] + tl.load(bias + columns)[None, :]
    if RESIDUAL:
        value += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    keep(activate(value, FUNCTION, LOW, HIGH), y, codes, inverse, offsets, mask)


@triton.jit
def linear(
    x,
    residual,
    w,
    scale,
    bias,
    inverse,
    y,
    codes,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Y [M, N] = act(X [M, K] W^T * scale + bias + residual); W [N padded to 16, W_PITCH], rows of X are X_PITCH bytes apart.

    STEPS: of BK products that one sum of the tensor cores takes.
    """
    row_tile, column_tile = tile_of(M, N, BM, BN, GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    columns = column_tile * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = tl.minimum(columns, N - 1)
    if M * X_PITCH >= 2**31 or M * N >= 2**31:
        row = row.to(tl.int64)
    k = tl.arange(0, BK)
    x_at = x.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + (row * X_PITCH)[:, None] + k[None, :]
    w_at = w.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + (column * W_PITCH)[None, :] + k[:, None]
    TOTAL: tl.constexpr = (K + BK - 1) // BK
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, TOTAL, STEPS):
        part = tl.zeros((BM, BN), tl.float32)
        # A count that is known, where it can be: the loop then has the addresses of a loop that stands alone.
        for counted in range(STEPS if TOTAL % STEPS == 0 else tl.minimum(STEPS, TOTAL - first)):
            start = (first + counted) * BK
            if K % BK == 0:
                left = tl.load(x_at + start)
                right = tl.load(w_at + start)
            else:
                left = tl.load(x_at + start, mask=k[None, :] < K - start, other=0.0)
                right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0.0)
            part = tl.dot(left, right, part)
        acc += part
    offsets = row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, scale, bias, inverse, residual, y, codes, column, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def convolution(
    x,
    residual,
    w,
    scale,
    bias,
    inverse,
    y,
    codes,
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
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = act(implicit GEMM * scale + bias + residual); N is padded to 16.

    X [BATCH, HEIGHT, WIDTH, X_PITCH] of which CHANNELS hold numbers; W [N, W_PITCH], k = (tap, X_PITCH channels), zeros in the
    lanes past CHANNELS. STEPS as in `linear`.
    """
    M: tl.constexpr = BATCH * OUT_HEIGHT * OUT_WIDTH
    TAPS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    TOTAL: tl.constexpr = (TAPS * X_PITCH + BK - 1) // BK
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
    k = tl.arange(0, BK)
    w_at = w.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + column[None, :] * W_PITCH + k[:, None]
    origin = x.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + ((image * HEIGHT + top) * WIDTH + left) * X_PITCH
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, TOTAL, STEPS):
        part = tl.zeros((BM, BN), tl.float32)
        for counted in range(STEPS if TOTAL % STEPS == 0 else tl.minimum(STEPS, TOTAL - first)):
            step = first + counted
            if X_PITCH % BK == 0:
                # A k block lies inside one tap: its place is a scalar.
                tap = step // (X_PITCH // BK)
                channel = step % (X_PITCH // BK) * BK
                down = tap // KERNEL_WIDTH * DILATION_Y
                along = tap % KERNEL_WIDTH * DILATION_X
                inside = ((top + down >= 0) & (top + down < HEIGHT) & (left + along >= 0) & (left + along < WIDTH))[:, None]
                if CHANNELS % BK != 0:
                    inside = inside & (channel + k < CHANNELS)[None, :]
                offset = (down * WIDTH + along) * X_PITCH + channel
                value = tl.load(origin[:, None] + k[None, :] + offset, mask=inside, other=0.0)
                right = tl.load(w_at + step * BK)
            else:
                depth = step * BK + k
                tap = depth // X_PITCH
                channel = depth % X_PITCH
                down = tap // KERNEL_WIDTH * DILATION_Y
                along = tap % KERNEL_WIDTH * DILATION_X
                y_in = top[:, None] + down[None, :]
                x_in = left[:, None] + along[None, :]
                inside = (y_in >= 0) & (y_in < HEIGHT) & (x_in >= 0) & (x_in < WIDTH)
                inside = inside & ((channel < CHANNELS) & (tap < TAPS))[None, :]
                offset = (down * WIDTH + along) * X_PITCH + channel
                value = tl.load(origin[:, None] + offset[None, :], mask=inside, other=0.0)
                right = tl.load(w_at + step * BK, mask=k[:, None] < W_PITCH - step * BK, other=0.0)
            part = tl.dot(value, right, part)
        acc += part
    offsets = row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, scale, bias, inverse, residual, y, codes, column, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def quantize(x, inverse, y, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Y [SIZE] = e4m3(X [SIZE] * inverse), X of any float type; inverse: one number. Grid (blocks)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = start + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    tl.store(y + at, codes_of(value * tl.load(inverse)), mask=at < SIZE)
