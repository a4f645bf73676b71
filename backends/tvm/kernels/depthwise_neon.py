"""u8/s8 depthwise convolution on AArch64. By sdot (usdot) the four products of a lane are four rows of one channel:

    rows y, y + d, y + 2 d, y + 3 d of a column, 16 channels each  ── 8 zips ──►  four vectors of [4 channels][4 rows]

A kernel of height 3 leaves one of the four rows over, so the same vectors serve two output rows at stride 1, once with weights
[w0 w1 w2 0] and once with [0 w0 w1 w2]; higher kernels take further groups of four rows. A vector serves all the outputs of its
chunk whose window covers its column.

    3 x 3, stride 1: 40 zips and 72 dot instructions for 3 x 2 outputs of 16 channels     864 products in 112 instructions

Cores without them widen to s16 and multiply by smlal; a widened column serves the outputs of a chunk.

The image is first copied into a frame with its border and, where the level's instruction reads s8, its values flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from .base import LANES, Convolution, padded
from .emit import bind, clamp_start, loop, parallel_kind, store
from .isa import Isa, T
from .register_tile import QUARTERS, WORDS, Q, interleaved, joined, quarter, quarters
from .tail import TailCode

#: Rows that one dot instruction takes.
TAPS = 4

#: Most s32 vectors of a chunk's quarter of the channels, and most columns of zipped rows beside them.
SUMS, COLUMNS = 6, 5

#: Output columns of a chunk by smlal: four registers of sums each.
WIDENED = 4


@dataclass(frozen=True)
class Chunk:
    """Output rows x columns that are computed together, from `groups` groups of four input rows."""

    rows: int
    columns: int
    groups: int


def choose_chunk(shape: Convolution) -> Chunk:
    """As many output rows as the last group of input rows has room for, then columns while their inputs stay in registers."""
    height = shape.kernel[0]
    groups = ceil(height / TAPS)
    # Rows of a group are a dilation apart: output rows share them only where their windows start that far apart.
    shared = shape.stride[0] % shape.dilation[0] == 0
    step = shape.stride[0] // shape.dilation[0]
    rows = min((groups * TAPS - height) // step + 1, shape.out_height, SUMS) if shared else 1
    columns = 1
    while columns < min(shape.out_width, SUMS // rows) and len(_touched(shape, columns + 1)) <= COLUMNS:
        columns += 1
    return Chunk(rows, columns, groups)


def _touched(shape: Convolution, columns: int) -> dict[int, list[tuple[int, int]]]:
    """Input column of a chunk -> (output column, tap) that read it."""
    users: dict[int, list[tuple[int, int]]] = {}
    for column in range(columns):
        for tap in range(shape.kernel[1]):
            users.setdefault(column * shape.stride[1] + tap * shape.dilation[1], []).append((column, tap))
    return dict(sorted(users.items()))


def pack_weight(shape: Convolution, full: np.ndarray) -> np.ndarray:
    """s8 (padded channels, KH, KW) -> flat [block][group][quarter][output row][KW][4 channels][4 rows]."""
    chunk, (height, width) = choose_chunk(shape), shape.kernel
    step = shape.stride[0] // shape.dilation[0]
    taps = np.zeros((chunk.rows, full.shape[0], chunk.groups * TAPS, width), np.int8)
    for row in range(chunk.rows):
        taps[row, :, row * step : row * step + height] = full
    taps = taps.reshape(chunk.rows, -1, QUARTERS, WORDS, chunk.groups, TAPS, width)
    return np.ascontiguousarray(taps.transpose(1, 4, 2, 0, 6, 3, 5)).reshape(-1)


def weight_size(shape: Convolution) -> int:
    """Packed bytes of all channels."""
    chunk = choose_chunk(shape)
    return padded(shape.channels) * chunk.groups * TAPS * chunk.rows * shape.kernel[1]


def by_dots(isa: Isa) -> bool:
    return isa.neon in ("sdot", "smmla")  # i8mm comes with the dot product instructions


def emit(shape: Convolution, isa: Isa, x: Any, weights: Any, bias: Any, code: TailCode) -> None:
    """Emits the loops. x: the framed image [N, framed height, framed width, Cp].

    weights: as `pack_weight`, or [KH][KW][Cp] where there are no dot instructions.
    """
    chunk = choose_chunk(shape) if by_dots(isa) else Chunk(1, min(WIDENED, shape.out_width), 1)
    pitch = padded(shape.channels)
    down, across = ceil(shape.out_height / chunk.rows), ceil(shape.out_width / chunk.columns)
    blocks = pitch // LANES
    work = shape.batch * down * across * blocks * chunk.rows * chunk.columns * (shape.kernel[1] * chunk.groups + 6) / 500
    with loop(shape.batch * down, parallel_kind(work)) as line:
        image, index = (line // down, line % down) if shape.batch > 1 else (0, line)
        top = bind(clamp_start(index, chunk.rows, shape.out_height) + T.int32(0))
        with loop(blocks) as block, loop(across) as index:
            left = bind(clamp_start(index, chunk.columns, shape.out_width) + T.int32(0))
            first = bind(bias.vload([block * LANES], f"int32x{LANES}"))
            _chunk(shape, chunk, isa, (x, weights, first), code, (image, top, left, block))


def _chunk(shape: Convolution, chunk: Chunk, isa: Isa, buffers: tuple, code: TailCode, where: tuple) -> None:
    """One chunk of one block of channels."""
    (x, weights, first), (image, top, left, block) = buffers, where
    pitch = padded(shape.channels)
    acc = [[quarters(QUARTERS) for _ in range(chunk.columns)] for _ in range(chunk.rows)]
    for row in acc:
        for column in row:
            for q, place in enumerate(column):
                store(place, 0, quarter(first, q), WORDS)
    base = bind((image * shape.framed_height + top * shape.stride[0]) * (shape.framed_width * pitch) + block * LANES)
    base = bind(base + left * shape.stride[1] * pitch)
    multiply = _dots if by_dots(isa) else _widened
    multiply(shape, chunk, isa, x, weights, acc, base, block)
    parameters = code.load(block * LANES)
    for row in range(chunk.rows):
        line = (image * shape.out_height + top + row) * shape.out_width + left
        for column in range(chunk.columns):
            sums = joined([place.vload([0], f"int32x{WORDS}") for place in acc[row][column]])
            code.emit(sums, parameters, bind((line + column) * pitch + block * LANES))


def _dots(shape: Convolution, chunk: Chunk, isa: Isa, x: Any, weights: Any, acc: Any, base: Any, block: Any) -> None:
    pitch, (height, width) = padded(shape.channels), shape.kernel
    used = height * shape.dilation[0] + (chunk.rows - 1) * shape.stride[0] - shape.dilation[0] + 1  # input rows under the chunk
    size = Q * chunk.rows * width
    at = bind(block * (chunk.groups * QUARTERS * size) + T.int32(0))
    users = _touched(shape, chunk.columns)
    for group in range(chunk.groups):
        lines = [min((group * TAPS + tap) * shape.dilation[0], used - 1) for tap in range(TAPS)]
        lines = [line * shape.framed_width * pitch for line in lines]
        zipped = {column: _zipped([base + line + column * pitch for line in lines], x) for column in users}
        for q in range(QUARTERS):
            for row in range(chunk.rows):
                for tap in range(width):
                    place = at + (group * QUARTERS + q) * size + (row * width + tap) * Q
                    weight = bind(weights.vload([place], f"int8x{Q}"))
                    for source, outputs in users.items():
                        for column, reader in outputs:
                            if reader == tap:
                                _add(isa, str(x.dtype), acc[row][column][q], zipped[source][q], weight)


def _widened(shape: Convolution, chunk: Chunk, _isa: Isa, x: Any, weights: Any, acc: Any, base: Any, block: Any) -> None:
    pitch, (height, width), users = padded(shape.channels), shape.kernel, _touched(shape, chunk.columns)
    kind = f"int32x{WORDS}"
    with loop(height) as i:
        line = bind(base + i * (shape.dilation[0] * shape.framed_width * pitch))
        taps = [_wide(weights, (i * width + tap) * pitch + block * LANES) for tap in range(width)]
        for source, outputs in users.items():
            value = _wide(x, line + source * pitch)
            for column, tap in outputs:
                for q, place in enumerate(acc[0][column]):
                    operands = quarter(value, q), quarter(taps[tap], q)
                    product = T.call_llvm_pure_intrin(kind, "llvm.aarch64.neon.smull", *operands)
                    store(place, 0, place.vload([0], kind) + product, WORDS)


def _wide(buffer: Any, offset: Any) -> Any:
    """LANES bytes as s16."""
    return bind(T.Cast(f"int16x{LANES}", buffer.vload([offset], f"{buffer.dtype}x{LANES}")))


def _add(isa: Isa, dtype: str, acc: Any, value: Any, weight: Any) -> None:
    name = "usdot" if dtype == "uint8" and isa.operand is None else "sdot"
    kind = f"int32x{WORDS}"
    store(acc, 0, T.call_llvm_pure_intrin(kind, f"llvm.aarch64.neon.{name}", acc.vload([0], kind), value, weight), WORDS)


def _zipped(places: list[Any], x: Any) -> list[Any]:
    """Four rows of 16 channels -> four vectors of [4 channels][4 rows]."""
    return interleaved([bind(T.reinterpret(f"int8x{Q}", x.vload([place], f"{x.dtype}x{Q}"))) for place in places])
