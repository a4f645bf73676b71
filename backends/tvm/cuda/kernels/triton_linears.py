"""Several int8 linear layers of the same rows in one launch: queries, keys and values, or a layer and its outlier channels.

A launch costs as much as a small layer takes, and a small layer fills the chip better beside its neighbours. The weights stand
one below the other; a program computes a tile of one layer and finishes it with that layer's tail. A layer of a few outputs rides
along: tiles of its own would be as many programs as a wide column of the others has, for next to no work, so the programs of a
row of tiles compute a few rows of it each before they begin their own.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tails import signed, store_tile, tile_of

#: Outputs that a layer may have to ride along: the least columns, and rows, of an instruction of the tensor cores.
RIDER: tl.constexpr = tl.constexpr(16)


@triton.jit
def store_part(
    acc,
    bias,
    scale,
    table,
    y,
    rows,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
):
    """Y [M, N] of the layer whose vectors begin at START."""
    store_tile(
        acc, bias + START, scale + START, None, table, None, None, y, 0, rows, columns, M, N, KIND, ZERO_POINT, QMIN, QMAX,
        "", 0, 0, 1, 0, 0, 0, 0, 0,
    )  # fmt: skip


@triton.jit
def store_rider(
    x,
    w,
    bias,
    scale,
    table,
    y,
    first,
    M: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    FLIP: tl.constexpr,
    N: tl.constexpr,
    START: tl.constexpr,
    KIND: tl.constexpr,
    ZERO_POINT: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    SIDE: tl.constexpr,
    SIDE_K: tl.constexpr,
):
    """SIDE rows of the riding layer, from row `first` on. SIDE_K: of the inner dimension a step; nothing hides its loads."""
    rows = first + tl.arange(0, SIDE)
    row = tl.minimum(rows, M - 1)
    if M * X_PITCH >= 2**31:
        row = row.to(tl.int64)
    columns = tl.arange(0, RIDER)
    k = tl.arange(0, SIDE_K)
    acc = tl.zeros((SIDE, RIDER), tl.int32)
    for step in range(tl.cdiv(K, SIDE_K)):
        inner = step * SIDE_K + k
        left = tl.load(x + (row * X_PITCH)[:, None] + inner[None, :], mask=inner[None, :] < K, other=0)
        right = tl.load(w + ((START + columns) * W_PITCH)[None, :] + inner[:, None], mask=inner[:, None] < K, other=0)
        acc = tl.dot(signed(left, FLIP), right, acc, out_dtype=tl.int32)
    store_part(acc, bias, scale, table, y, rows, columns, M, N, START, KIND, ZERO_POINT, QMIN, QMAX)


@triton.jit
def linears(
    x,
    w,
    bias,
    scale,
    table_0,
    table_1,
    table_2,
    table_rider,
    y_0,
    y_1,
    y_2,
    y_rider,
    M: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    FLIP: tl.constexpr,
    N_0: tl.constexpr,
    N_1: tl.constexpr,
    N_2: tl.constexpr,
    N_RIDER: tl.constexpr,
    START_1: tl.constexpr,
    START_2: tl.constexpr,
    START_RIDER: tl.constexpr,
    KIND: tl.constexpr,
    ZERO_POINT_0: tl.constexpr,
    ZERO_POINT_1: tl.constexpr,
    ZERO_POINT_2: tl.constexpr,
    ZERO_POINT_RIDER: tl.constexpr,
    QMIN_0: tl.constexpr,
    QMIN_1: tl.constexpr,
    QMIN_2: tl.constexpr,
    QMIN_RIDER: tl.constexpr,
    QMAX_0: tl.constexpr,
    QMAX_1: tl.constexpr,
    QMAX_2: tl.constexpr,
    QMAX_RIDER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    SIDE: tl.constexpr,
    SIDE_K: tl.constexpr,
):
    """Y_i [M, N_i] = tail_i(X [M, K] W_i^T + bias_i); the rows of W_i begin at START_i. N_i = 0: there is none."""
    TILES_0: tl.constexpr = (N_0 + BN - 1) // BN
    TILES_1: tl.constexpr = (N_1 + BN - 1) // BN
    TILES_2: tl.constexpr = (N_2 + BN - 1) // BN
    row_tile, tile = tile_of(M, (TILES_0 + TILES_1 + TILES_2) * BN, BM, BN, GROUP)
    second = tile >= TILES_0
    third = tile >= TILES_0 + TILES_1
    first = tl.where(third, TILES_0 + TILES_1, tl.where(second, TILES_0, 0))
    start = tl.where(third, START_2, tl.where(second, START_1, 0))
    outputs = tl.where(third, N_2, tl.where(second, N_1, N_0))
    rows = row_tile * BM + tl.arange(0, BM)
    columns = (tile - first) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, M - 1)
    column = start + tl.minimum(columns, outputs - 1)
    if M * X_PITCH >= 2**31:
        row = row.to(tl.int64)
    k = tl.arange(0, BK)
    x_at = x + (row * X_PITCH)[:, None] + k[None, :]
    w_at = w + (column * W_PITCH)[None, :] + k[:, None]
    if N_RIDER > 0:  # noqa: SIM102 (settled at compile time)
        if tile * SIDE < BM:
            store_rider(
                x, w, bias, scale, table_rider, y_rider, row_tile * BM + tile * SIDE, M, K, X_PITCH, W_PITCH, FLIP, N_RIDER,
                START_RIDER, KIND, ZERO_POINT_RIDER, QMIN_RIDER, QMAX_RIDER, SIDE, SIDE_K,
            )  # fmt: skip
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(tl.cdiv(K, BK)):
        depth = step * BK
        if K % BK == 0:
            left = tl.load(x_at + depth)
            right = tl.load(w_at + depth)
        else:
            left = tl.load(x_at + depth, mask=k[None, :] < K - depth, other=0)
            right = tl.load(w_at + depth, mask=k[:, None] < W_PITCH - depth, other=0)
        acc = tl.dot(signed(left, FLIP), right, acc, out_dtype=tl.int32)
    if tile < TILES_0:
        store_part(acc, bias, scale, table_0, y_0, rows, columns, M, N_0, 0, KIND, ZERO_POINT_0, QMIN_0, QMAX_0)
    if N_1 > 0:  # noqa: SIM102 (settled at compile time)
        if (tile >= TILES_0) & (tile < TILES_0 + TILES_1):
            store_part(acc, bias, scale, table_1, y_1, rows, columns, M, N_1, START_1, KIND, ZERO_POINT_1, QMIN_1, QMAX_1)
    if N_2 > 0:  # noqa: SIM102 (settled at compile time)
        if tile >= TILES_0 + TILES_1:
            store_part(acc, bias, scale, table_2, y_2, rows, columns, M, N_2, START_2, KIND, ZERO_POINT_2, QMIN_2, QMAX_2)
