"""Float products on a GPU: float32, float16 and bfloat16, summed in float32, with bias, residual and activation fused.

Half-precision tiles go to the tensor cores; float32 is multiplied exactly (PRECISION "ieee", on the plain units) unless "tf32" is
asked for. Lanes past the last channel may hold anything, so they are masked: zero times infinity is no zero. Otherwise as
`triton_int8`: all shapes are compile-time constants, absent pointers are None.
"""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from .triton_e4m3 import keep
from .triton_tails import tile_of


@triton.jit
def two_to(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x):
    """Within an ulp (`kernels/vector_math`): 2^n in two halves, so that the product overflows and underflows as it should."""
    x = tl.minimum(tl.maximum(x, -104.0), 89.0)
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = x - n * 0.693145751953125 - n * 1.428605173714459e-06
    p = r * 0.001381449634 + 0.008368751965
    p = p * r + 0.04166839272
    p = p * r + 0.1666651964
    p = p * r + 0.4999999404
    p = p * (r * r) + r + 1.0
    whole = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = whole >> 1
    return p * two_to(half) * two_to(whole - half)


@triton.jit
def tanh(x):
    x = tl.minimum(tl.maximum(x, -7.90531110763549805), 7.90531110763549805)
    s = x * x
    p = s * -2.76076847742355e-16 + 2.00018790482477e-13
    p = p * s + -8.60467152213735e-11
    p = p * s + 5.12229709037114e-08
    p = p * s + 1.48572235717979e-05
    p = p * s + 0.000637261928875436
    p = p * s + 0.00489352455891786
    q = s * 1.19825839466702e-06 + 0.000118534705686654
    q = q * s + 0.002268434632439
    q = q * s + 0.00489352518554385
    return tl.div_rn(x * p, q)


@triton.jit
def gelu(x):
    """x Phi(x) = max(x, 0) - t (1 - Phi(t)) with t = |x|; the polynomial of `kernels/vector_math`.

    Kernels are compiled without contraction, for the integers' sake; here nothing depends on the second rounding.
    """
    t = tl.minimum(tl.abs(x), 5.6)
    s = t * (2.0 / 5.6) - 1.0
    p = tl.fma(s, 0.00288295024, -0.00919991452)
    p = tl.fma(p, s, -0.00475277146)
    p = tl.fma(p, s, 0.045691818)
    p = tl.fma(p, s, -0.0321017168)
    p = tl.fma(p, s, -0.0783391669)
    p = tl.fma(p, s, 0.137916952)
    p = tl.fma(p, s, -0.00860636402)
    p = tl.fma(p, s, -0.189506501)
    p = tl.fma(p, s, 0.218792677)
    p = tl.fma(p, s, -0.0286021288)
    p = tl.fma(p, s, -0.198107049)
    p = tl.fma(p, s, 0.274728686)
    p = tl.fma(p, s, -0.198068544)
    p = tl.fma(p, s, 0.0868795291)
    p = tl.fma(p, s, -0.022163583)
    p = tl.fma(p, s, 0.00255513517)
    return tl.maximum(x, 0.0) - t * p


@triton.jit
def activate(value, FUNCTION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`float_base.Activation`: a function by name, then a clamp; None leaves out a side. Bounds as in `kernels/vector_math`."""
    if FUNCTION == "exp":
        value = exp(value)
    elif FUNCTION == "sigmoid":
        value = tl.div_rn(1.0, 1.0 + exp(-value))
    elif FUNCTION == "silu":
        low = tl.maximum(value, -104.0)
        value = tl.div_rn(low, 1.0 + exp(-low))
    elif FUNCTION == "tanh":
        value = tanh(value)
    elif FUNCTION == "gelu":
        value = gelu(value)
    elif FUNCTION == "gelu_tanh":
        low = tl.maximum(value, -12.0)
        capped = tl.minimum(low, 12.0)
        value = tl.div_rn(low, 1.0 + exp(capped * (capped * capped * -0.07135481627260025 - 1.5957691216057308)))
    elif FUNCTION == "hardsigmoid":
        value = tl.maximum(tl.minimum(value + 3.0, 6.0), 0.0) * (1.0 / 6.0)
    elif FUNCTION == "hardswish":
        value = tl.maximum(value, -3.0) * (tl.maximum(tl.minimum(value + 3.0, 6.0), 0.0) * (1.0 / 6.0))
    if LOW is not None:
        value = tl.maximum(value, LOW)
    if HIGH is not None:
        value = tl.minimum(value, HIGH)
    return value


@triton.jit
def store(
    acc,
    residual,
    y,
    offsets,
    mask,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    codes=None,
    inverse=None,
):
    """act(acc + residual), as `keep` stores it."""
    if RESIDUAL:
        acc += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    keep(activate(acc, FUNCTION, LOW, HIGH), y, codes, inverse, offsets, mask)


@triton.jit
def linear(
    x,
    residual,
    w,
    bias,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    W_PITCH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Y [M, N] = act(X [M, K] W^T + bias + residual); W [N padded to 16, W_PITCH], rows of X are X_PITCH apart."""
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
    acc = tl.zeros((BM, BN), tl.float32)
    # Counted steps, not `range(0, K, BK)`: ptxas then keeps 16 integer multiply-adds a step instead of 50, and a float16 product
    # of 4096^3 runs at 0.95 of cuBLAS instead of 0.82 (H200).
    for step in range(tl.cdiv(K, BK)):
        start = step * BK
        if K % BK == 0:
            left = tl.load(x_at + start)
            right = tl.load(w_at + start)
        else:
            left = tl.load(x_at + start, mask=k[None, :] < K - start, other=0.0)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc += tl.load(bias + column)[None, :]
    offsets = row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, residual, y, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def convolution(
    x,
    residual,
    w,
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
    PLANAR: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    W_PITCH: tl.constexpr,
    BAND_FILTERS: tl.constexpr,
    BAND_CHANNELS: tl.constexpr,
    BAND_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = act(implicit GEMM + bias + residual); N is padded to 16.

    X [BATCH, HEIGHT, WIDTH, X_PITCH] of which CHANNELS hold numbers; W [N, W_PITCH], k = (tap, BLOCK_CHANNELS channels).
    PLANAR: X is [BATCH, CHANNELS, HEIGHT, WIDTH]. Bands as in `triton_int8.convolution`.
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
    acc = tl.zeros((BM, BN), tl.float32)
    if PLANAR:
        for step in range(tl.cdiv(TAPS * BLOCK_CHANNELS, BK)):
            start = step * BK
            depth = start + k
            tap = depth // BLOCK_CHANNELS
            channel = depth % BLOCK_CHANNELS
            y_in = top[:, None] + (tap // KERNEL_WIDTH * DILATION_Y)[None, :]
            x_in = left[:, None] + (tap % KERNEL_WIDTH * DILATION_X)[None, :]
            inside = (y_in >= 0) & (y_in < HEIGHT) & (x_in >= 0) & (x_in < WIDTH)
            inside = inside & ((channel < CHANNELS) & (tap < TAPS))[None, :]
            plane = image[:, None] * CHANNELS + channel[None, :]
            value = tl.load(x + (plane * HEIGHT + y_in) * WIDTH + x_in, mask=inside, other=0.0)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0.0)
            acc = tl.dot(value, right, acc, input_precision=PRECISION)
    elif BLOCK_CHANNELS % BK == 0:
        # A k block lies inside one tap: its place is a scalar.
        origin = x + ((image * HEIGHT + top) * WIDTH + left) * X_PITCH
        x_at = origin[:, None] + (first + k)[None, :]
        BLOCKS: tl.constexpr = BLOCK_CHANNELS // BK
        for block in range(TAPS * BLOCKS):
            tap = block // BLOCKS
            channel = block % BLOCKS * BK
            down = tap // KERNEL_WIDTH * DILATION_Y
            along = tap % KERNEL_WIDTH * DILATION_X
            offset = (down * WIDTH + along) * X_PITCH + channel
            inside = ((top + down >= 0) & (top + down < HEIGHT) & (left + along >= 0) & (left + along < WIDTH))[:, None]
            if CHANNELS % BK != 0:
                inside = inside & (first + channel + k < CHANNELS)[None, :]
            value = tl.load(x_at + offset, mask=inside, other=0.0)
            right = tl.load(w_at + block * BK)
            acc = tl.dot(value, right, acc, input_precision=PRECISION)
    else:
        origin = x + ((image * HEIGHT + top) * WIDTH + left) * X_PITCH
        for step in range(tl.cdiv(TAPS * BLOCK_CHANNELS, BK)):
            start = step * BK
            depth = start + k
            tap = depth // BLOCK_CHANNELS
            channel = first + depth % BLOCK_CHANNELS
            down = tap // KERNEL_WIDTH * DILATION_Y
            along = tap % KERNEL_WIDTH * DILATION_X
            offset = (down * WIDTH + along) * X_PITCH + channel
            y_in = top[:, None] + down[None, :]
            x_in = left[:, None] + along[None, :]
            inside = (y_in >= 0) & (y_in < HEIGHT) & (x_in >= 0) & (x_in < WIDTH)
            inside = inside & ((channel < CHANNELS) & (tap < TAPS))[None, :]
            value = tl.load(origin[:, None] + offset[None, :], mask=inside, other=0.0)
            right = tl.load(w_at + start, mask=k[:, None] < W_PITCH - start, other=0.0)
            acc = tl.dot(value, right, acc, input_precision=PRECISION)
    acc += tl.load(bias + column)[None, :]
    offsets = row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, residual, y, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH, codes, inverse)


@triton.jit
def depthwise(
    x,
    residual,
    w,
    bias,
    inverse,
    y,
    codes,
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
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Y [BATCH, OUT_HEIGHT, OUT_WIDTH, N] = act(one filter a channel + bias + residual); W [taps, N]."""
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
    acc = tl.zeros((BM, BN), tl.float32) + tl.load(bias + column)[None, :]
    for i in tl.static_range(KERNEL_HEIGHT):
        for j in tl.static_range(KERNEL_WIDTH):
            down = top + i * DILATION_Y
            along = left + j * DILATION_X
            inside = (down >= 0) & (down < HEIGHT) & (along >= 0) & (along < WIDTH)
            offset = (i * DILATION_Y * WIDTH + j * DILATION_X) * N
            value = tl.load(x_at + offset, mask=inside[:, None] & (columns < N)[None, :], other=0.0).to(tl.float32)
            acc += value * tl.load(w + (i * KERNEL_WIDTH + j) * N + column).to(tl.float32)[None, :]
    offsets = row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, residual, y, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH, codes, inverse)


@triton.jit
def matmul(
    a,
    residual,
    b,
    y,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FUNCTION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Y [B, M, N] = act(A [B, M, K] times B [B, K, N], or [B, N, K] where TRANSPOSED, + residual); program axis 1: batch."""
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
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(K, BK)):
        start = step * BK
        if K % BK == 0:
            left = tl.load(a_at + start)
            right = tl.load(b_at + start * B_INNER)
        else:
            left = tl.load(a_at + start, mask=k[None, :] < K - start, other=0.0)
            right = tl.load(b_at + start * B_INNER, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    offsets = batch * (M * N) + row[:, None] * N + columns[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    store(acc, residual, y, offsets, mask, RESIDUAL, FUNCTION, LOW, HIGH)


@triton.jit
def attention(
    q,
    k,
    v,
    mask,
    inverse,
    y,
    codes,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HEADS: tl.constexpr,
    Q_START: tl.constexpr,
    Q_OUTER: tl.constexpr,
    Q_HEAD: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_START: tl.constexpr,
    K_OUTER: tl.constexpr,
    K_HEAD: tl.constexpr,
    K_KEY: tl.constexpr,
    V_START: tl.constexpr,
    V_OUTER: tl.constexpr,
    V_HEAD: tl.constexpr,
    V_KEY: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_START: tl.constexpr,
    MASK_OUTER: tl.constexpr,
    MASK_HEAD: tl.constexpr,
    MASK_ROW: tl.constexpr,
    Y_OUTER: tl.constexpr,
    Y_HEAD: tl.constexpr,
    Y_ROW: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
):
    """Y = softmax(scale Q K^T + mask) V: BM query rows of one head a program, over BN keys at a time (FlashAttention, Dao et
    al., arXiv:2205.14135: the running sum and product are rescaled where a larger score is met). Grid (row tiles, heads).

    Element [outer, head, row, d] stands at START + outer * OUTER + head * HEAD + row * ROW + d of its buffer.
    """
    outer = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    row = tl.minimum(rows, ROWS - 1)
    inner = tl.arange(0, BD)
    columns = tl.arange(0, BV)
    q_at = q + (Q_START + outer * Q_OUTER + head * Q_HEAD) + row[:, None] * Q_ROW + inner[None, :]
    query = tl.load(q_at, mask=(inner < WIDTH)[None, :], other=0.0)
    k_at = k + (K_START + outer * K_OUTER + head * K_HEAD) + inner[:, None]
    v_at = v + (V_START + outer * V_OUTER + head * V_HEAD) + columns[None, :]
    highest = tl.full((BM,), -3.0e38, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BV), tl.float32)
    for start in range(0, KEYS, BN):
        keys = start + tl.arange(0, BN)
        valid = keys < KEYS
        key = tl.load(k_at + keys[None, :] * K_KEY, mask=valid[None, :] & (inner < WIDTH)[:, None], other=0.0)
        score = tl.dot(query, key, input_precision=PRECISION) * SCALE
        if MASKED:
            place = mask + (MASK_START + outer * MASK_OUTER + head * MASK_HEAD) + row[:, None] * MASK_ROW + keys[None, :]
            score += tl.load(place, mask=valid[None, :], other=0.0).to(tl.float32)
        score = tl.where(valid[None, :], score, float("-inf"))
        larger = tl.maximum(highest, tl.max(score, axis=1))
        power = exp(score - larger[:, None])
        power = tl.where(valid[None, :], power, 0.0)
        shrink = exp(highest - larger)
        total = total * shrink + tl.sum(power, axis=1)
        value = tl.load(v_at + keys[:, None] * V_KEY, mask=valid[:, None] & (columns < VALUES)[None, :], other=0.0)
        acc = acc * shrink[:, None] + tl.dot(power.to(value.dtype), value, input_precision=PRECISION)
        highest = larger
    out = tl.div_rn(acc, total[:, None] + tl.zeros((BM, BV), tl.float32))
    offsets = (outer * Y_OUTER + head * Y_HEAD) + row[:, None] * Y_ROW + columns[None, :]
    stored = (rows < ROWS)[:, None] & (columns < VALUES)[None, :]
    keep(out, y, codes, inverse, offsets, stored)
