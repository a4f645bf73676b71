"""u8/s8 depthwise convolution, channels in lanes.

portable: one output vector at a time, widen and multiply each tap.

avx512-vnni, 8-bit output: vpdpbusd sums four taps of one channel in an s32 lane, so four rows of one input column are
interleaved byte by byte (two levels of in-lane unpacking: 8 shuffles make 4 vectors of [16 channels][4 rows] from 64 channels).
Each interleaved column serves every output column whose window covers it: a chunk of `columns` outputs stays in registers.
Kernels taller than four rows take several row groups. The final saturating packs undo the interleaving.

Borders: where most chunks lie inside the image, those read it in place and each of the others copies its window to a patch,
zero points included. Small images have mostly borders: there a task copies its whole band of input rows, padding included.
Either way the chunk code exists once or twice, not once for every kind of border.

64 lanes are `pixels` neighbouring output columns x `channels` channels, so that narrow tensors fill the register too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np

from .base import LANES, Convolution, Tail, padded
from .emit import accumulator, balanced, bind, clamp_start, loop, parallel_kind, shuffle, splat, store
from .isa import Isa, T
from .tail import TailCode, declare, interleaved_order, pack_tail

#: What a task's copy of its input may take: half of a first-level cache and a good part of a second-level one.
SCRATCH_BYTES = 64 * 1024

#: Bytes of a vector register, and rows whose bytes one s32 lane holds.
BYTES, TAPS = 64, 4


@dataclass(frozen=True)
class Plan:
    """How the AVX-512 kernel cuts a depthwise convolution: a task is `rows` output rows of one block of channels."""

    shape: Convolution
    channels: int
    pixels: int
    columns: int
    rows: int
    direct: bool

    @property
    def blocks(self) -> int:
        return ceil(padded(self.shape.channels) / self.channels)

    def start(self, block: Any) -> Any:
        """First channel of a block; the last block moves back to overlap its neighbour."""
        total = padded(self.shape.channels)
        if total % self.channels == 0:
            return block * self.channels
        last = total - self.channels
        return min(block * self.channels, last) if isinstance(block, int) else T.min(block * self.channels, last)

    @property
    def groups(self) -> int:
        return ceil(self.shape.kernel[0] / TAPS)

    @cached_property
    def order(self) -> np.ndarray:
        """[blocks][4][LANES]: channel of each s32 lane."""
        lanes = interleaved_order() % self.channels
        return np.stack([self.start(block) + lanes for block in range(self.blocks)])

    @property
    def span(self) -> int:
        """Output columns of one chunk."""
        return self.columns * self.pixels

    @property
    def reach(self) -> tuple[int, int]:
        """Input rows and columns under one chunk, dilation included."""
        shape = self.shape
        columns = (self.span - 1) * shape.stride[1] + (shape.kernel[1] - 1) * shape.dilation[1] + 1
        return (shape.kernel[0] - 1) * shape.dilation[0] + 1, columns

    @property
    def scratch_rows(self) -> int:
        """Input rows under one band of output rows."""
        return (self.rows - 1) * self.shape.stride[0] + (self.shape.kernel[0] - 1) * self.shape.dilation[0] + 1

    @property
    def scratch_width(self) -> int:
        return self.shape.framed_width


def choose_plan(shape: Convolution, tail: Tail, isa: Isa) -> Plan | None:
    """The AVX-512 plan, or None where the portable code runs (no VNNI, output wider than 8 bits, rows too short)."""
    if not isa.vnni or tail.dtype not in ("uint8", "int8"):
        return None
    pitch = padded(shape.channels)
    channels = max(size for size in (16, 32, 64) if size <= pitch)
    pixels = BYTES // channels
    if shape.out_width < pixels or (pixels > 1 and tail.residual is not None):
        return None
    most = min(5, shape.out_width // pixels)  # 5 x 4 accumulators leave 12 registers for columns and constants

    def cost(columns: int) -> int:
        # Interleaving 8 shuffles a row group and column, 4 dot instructions a tap, about 21 for the tail.
        groups, (_, width) = ceil(shape.kernel[0] / TAPS), shape.kernel
        built = (columns - 1) * shape.stride[1] * pixels + width if pixels == 1 else columns * width
        each = groups * (8 * built + 4 * width * columns) + 21 * columns
        return ceil(shape.out_width / (columns * pixels)) * each

    columns = min(range(1, most + 1), key=cost)
    line = shape.framed_width * channels * shape.stride[0]
    rows = balanced(shape.out_height, max(1, SCRATCH_BYTES // line))
    in_place = pixels == 1 or (shape.stride[1] == 1 and pitch == channels)
    # Copying costs a strided kernel more, because each output reads more fresh input. Measured on EfficientNet-lite0's layers.
    direct = in_place and _inside_share(shape, columns * pixels) > (0.65 if shape.stride == (1, 1) else 0.5)
    return Plan(shape, channels, pixels, columns, rows, direct)


def _inside_share(shape: Convolution, span: int) -> float:
    """Fraction of the chunks of `span` output columns whose window lies inside the image."""
    share = 1.0
    for axis, size, out, step in ((0, shape.height, shape.out_height, 1), (1, shape.width, shape.out_width, span)):
        stride, pad = shape.stride[axis], shape.padding[axis]
        reach = (step - 1) * stride + (shape.kernel[axis] - 1) * shape.dilation[axis]
        starts = [min(index * step, out - step) * stride - pad for index in range(ceil(out / step))]
        share *= sum(start >= 0 and start + reach < size for start in starts) / len(starts)
    return share


def pack(
    shape: Convolution, tail: Tail, isa: Isa, weight: np.ndarray, bias: np.ndarray, values: dict[str, np.ndarray]
) -> tuple[np.ndarray, ...]:
    """Weights (C, 1, KH, KW) s8, folded bias s32 (C,) and tail parameters in the order the kernel reads them."""
    plan, pitch = choose_plan(shape, tail, isa), padded(shape.channels)
    wide = np.zeros(pitch, np.int32)
    wide[: shape.channels] = bias
    full = np.zeros((pitch, *shape.kernel), np.int8)
    full[: shape.channels] = weight[:, 0]
    if plan is None:
        return np.ascontiguousarray(full.transpose(1, 2, 0)).reshape(-1), wide, *pack_tail(tail, shape.channels, **values)
    rows = np.zeros((pitch, plan.groups * TAPS, shape.kernel[1]), np.int8)
    rows[:, : shape.kernel[0]] = full
    lanes = rows.reshape(pitch, plan.groups, TAPS, shape.kernel[1])[plan.order]  # [blocks][4][LANES][groups][TAPS][KW]
    packed = np.ascontiguousarray(lanes.transpose(0, 3, 5, 1, 2, 4)).reshape(-1)
    order = plan.order.reshape(-1)
    return packed, wide[order], *pack_tail(tail, shape.channels, order, **values)


def emit(shape: Convolution, dtype: str, zero_point: int, tail: Tail, isa: Isa) -> None:
    """Emits the function's arguments and body; see `convolution_int8` for the buffers."""
    plan, pitch = choose_plan(shape, tail, isa), padded(shape.channels)
    lanes = plan.blocks * BYTES if plan else pitch
    taps = shape.kernel[1] * (plan.groups * TAPS if plan else shape.kernel[0])
    image = ("X", (shape.batch, shape.height, shape.width, pitch), dtype)
    out_shape = (shape.batch, shape.out_height, shape.out_width, pitch)
    packed = [("W", (lanes * taps,), "int8"), ("B", (lanes,), "int32")]
    (x, weights, bias), code = declare(tail, isa, lanes, [image], packed, out_shape)
    if plan is None:
        _portable(shape, zero_point, isa, x, weights, bias, code)
    else:
        Interleaved(plan, isa, zero_point, x, weights, bias, code).emit()


def _portable(shape: Convolution, zero_point: int, isa: Isa, x: Any, weights: Any, bias: Any, code: TailCode) -> None:
    pitch, shift, lanes = padded(shape.channels), isa.shift(str(x.dtype)), f"int32x{LANES}"
    (kernel_height, kernel_width), rows = shape.kernel, shape.batch * shape.out_height
    with loop(rows, parallel_kind(shape.macs / 20_000)) as row, loop(shape.out_width) as column:
        image, out_y = row // shape.out_height, row % shape.out_height
        with loop(pitch // LANES) as block:
            acc = accumulator()
            store(acc, 0, bias.vload([block * LANES], lanes))
            with loop(kernel_height) as i, loop(kernel_width) as j:
                y = bind(out_y * shape.stride[0] + i * shape.dilation[0] - shape.padding[0] + T.int32(0))
                z = bind(column * shape.stride[1] + j * shape.dilation[1] - shape.padding[1] + T.int32(0))
                inside = T.And(T.And(y >= 0, y < shape.height), T.And(z >= 0, z < shape.width))
                weight = bind(T.Cast(lanes, weights.vload([(i * kernel_width + j) * pitch + block * LANES], f"int8x{LANES}")))
                old = acc.vload([0], lanes)
                with T.If(inside):
                    with T.Then():
                        at = ((image * shape.height + y) * shape.width + z) * pitch + block * LANES
                        value = T.Cast(lanes, x.vload([at], f"{x.dtype}x{LANES}")) + splat(T.int32(shift))
                        store(acc, 0, old + value * weight)
                    with T.Else():
                        store(acc, 0, old + splat(T.int32(zero_point + shift)) * weight)
            target = (row * shape.out_width + column) * pitch + block * LANES
            code.emit(bind(acc.vload([0], lanes)), code.load(block * LANES), target)


@dataclass
class Interleaved:
    """Emits the AVX-512 kernel: parallel over (block, row), chunks of columns inside."""

    plan: Plan
    isa: Isa
    zero_point: int
    x: Any
    weights: Any
    bias: Any
    code: TailCode

    def emit(self) -> None:
        plan, shape = self.plan, self.plan.shape
        bands = ceil(shape.out_height / plan.rows)
        work = shape.batch * shape.out_height * shape.out_width * plan.blocks * plan.channels
        work *= shape.kernel[1] * plan.groups + 8
        with loop(shape.batch * plan.blocks * bands, parallel_kind(work / 400_000)) as task:
            image, block, band = task // (plan.blocks * bands), task // bands % plan.blocks, task % bands
            channel = bind(plan.start(block) + T.int32(0))
            top = bind(clamp_start(band, plan.rows, shape.out_height) + T.int32(0))
            target = bind((image * shape.out_height + top) * (shape.out_width * padded(shape.channels)) + channel)
            if plan.direct:
                patch = T.alloc_buffer((shape.kernel[0] * plan.reach[1] * plan.channels,), "uint8")
            else:
                scratch = self._copy(image * shape.height, top * shape.stride[0] - shape.padding[0], channel)
            with loop(plan.rows) as row, loop(ceil(shape.out_width / plan.span)) as chunk:
                start = bind(clamp_start(chunk, plan.span, shape.out_width) + T.int32(0))
                to = bind(target + (row * shape.out_width + start) * padded(shape.channels))
                if plan.direct:
                    y = bind((top + row) * shape.stride[0] - shape.padding[0] + T.int32(0))
                    z = bind(start * shape.stride[1] - shape.padding[1] + T.int32(0))
                    self._direct(patch, block, image * shape.height, y, z, channel, to)
                else:
                    line = plan.scratch_width * plan.channels
                    base = bind(row * (shape.stride[0] * line) + start * (shape.stride[1] * plan.channels) + T.int32(0))
                    self._chunk(scratch, base, (shape.dilation[0] * line, plan.channels), block, to)

    def _direct(self, patch: Any, block: Any, first: Any, y: Any, z: Any, channel: Any, to: Any) -> None:
        """The chunk whose window starts at input row y, column z: in place where it lies inside the image, else from a patch."""
        plan, shape = self.plan, self.plan.shape
        pitch, (down, across) = padded(shape.channels), plan.reach
        line = shape.width * pitch
        inside = T.And(T.And(y >= 0, y + down <= shape.height), T.And(z >= 0, z + across <= shape.width))
        with T.If(inside):
            with T.Then():
                base = bind((first + y) * line + z * pitch + channel)
                self._chunk(self.x, base, (shape.dilation[0] * line, pitch), block, to)
            with T.Else():
                with T.serial(0, shape.kernel[0]) as t, T.serial(0, across) as c:
                    row, column = bind(y + t * shape.dilation[0]), bind(z + c)
                    at = (t * across + c) * plan.channels
                    within = T.And(T.And(row >= 0, row < shape.height), T.And(column >= 0, column < shape.width))
                    with T.If(within):
                        with T.Then():
                            value = self._bytes(self.x, (first + row) * line + column * pitch + channel, plan.channels)
                            store(patch, at, value, plan.channels)
                        with T.Else():
                            store(patch, at, self._blank(), plan.channels)
                self._chunk(patch, 0, (across * plan.channels, plan.channels), block, to)

    def _blank(self) -> Any:
        return T.Broadcast(T.uint8(self.zero_point + self.isa.shift(str(self.x.dtype))), self.plan.channels)

    def _bytes(self, source: Any, at: Any, lanes: int) -> Any:
        """Bytes as u8; s8 becomes x + 128."""
        value = source.vload([at], f"{source.dtype}x{lanes}")
        if str(source.dtype) == "uint8":
            return value
        return T.reinterpret(f"uint8x{lanes}", value) ^ T.Broadcast(T.uint8(128), lanes)

    def _copy(self, first: Any, top: Any, channel: Any) -> Any:
        """The band's input as u8 [scratch_rows][scratch_width][channels]. first: row of X where the image starts."""
        plan, shape, size = self.plan, self.plan.shape, self.plan.channels
        pitch, pad = padded(shape.channels), shape.padding[1]
        scratch = T.alloc_buffer((plan.scratch_rows * plan.scratch_width * size,), "uint8")
        with loop(plan.scratch_rows) as row:
            y = bind(top + row)
            line = bind(row * (plan.scratch_width * size) + T.int32(0))

            def fill(start: int, columns: int, line: Any = line) -> None:
                with T.serial(0, columns) as column:
                    store(scratch, line + (start + column) * size, self._blank(), size)

            with T.If(T.And(y >= 0, y < shape.height)):
                with T.Then():
                    if pad:
                        fill(0, pad)
                    if pad + shape.width < plan.scratch_width:
                        fill(pad + shape.width, plan.scratch_width - pad - shape.width)
                    with T.serial(0, shape.width) as column:
                        value = self._bytes(self.x, ((first + y) * shape.width + column) * pitch + channel, size)
                        store(scratch, line + (pad + column) * size, value, size)
                with T.Else():
                    fill(0, plan.scratch_width)
        return scratch

    def _chunk(self, source: Any, base: Any, strides: tuple[int, int], block: Any, to: Any) -> None:
        """`columns` output vectors from output element `to` on; their window starts at `base`. strides: kernel row, column."""
        plan, shape = self.plan, self.plan.shape
        acc = [[accumulator() for _ in range(TAPS)] for _ in range(plan.columns)]
        for i in range(TAPS):
            bias = bind(self.bias.vload([block * BYTES + i * LANES], f"int32x{LANES}"))
            for vectors in acc:
                store(vectors[i], 0, bias)
        # Input column (relative to the chunk) -> the (output vector, kernel column) pairs that read it.
        users: dict[int, list[tuple[int, int]]] = {}
        for u in range(plan.columns):
            for j in range(shape.kernel[1]):
                users.setdefault(u * plan.pixels * shape.stride[1] + j * shape.dilation[1], []).append((u, j))
        for column in sorted(users):
            for group in range(plan.groups):
                rows = range(group * TAPS, min((group + 1) * TAPS, shape.kernel[0]))
                loads = [self._load(source, base + t * strides[0] + column * strides[1], strides[1]) for t in rows]
                vectors = interleave(loads)
                for u, j in users[column]:
                    tap = ((block * plan.groups + group) * shape.kernel[1] + j) * (TAPS * BYTES)
                    for i in range(TAPS):
                        weight = self.weights.vload([tap + i * BYTES], f"int8x{BYTES}")
                        store(acc[u][i], 0, self.isa.dot(acc[u][i].vload([0], f"int32x{LANES}"), vectors[i], weight))
        parameters = [self.code.load(block * BYTES + i * LANES) for i in range(TAPS)]
        pitch = padded(shape.channels)
        contiguous = plan.pixels == 1 or pitch == plan.channels
        for u, vectors in enumerate(acc):
            values = [bind(vector.vload([0], f"int32x{LANES}")) for vector in vectors]
            offset = to + u * plan.pixels * pitch
            self.code.emit_four(values, parameters, offset, None if contiguous else (plan.channels, pitch))

    def _load(self, source: Any, at: Any, column: int) -> Any:
        """64 lanes of one source row: `pixels` columns, stride apart, of `channels` channels. column: distance of columns."""
        size, pixels, stride = self.plan.channels, self.plan.pixels, self.plan.shape.stride[1]
        if pixels == 1 or stride == 1:
            return bind(self._bytes(source, at, BYTES))
        pieces = [self._bytes(source, at + p * stride * column, size) for p in range(pixels)]
        return bind(shuffle(pieces, list(range(BYTES))))


def interleave(rows: list[Any]) -> list[Any]:
    """Up to four vectors of 64 bytes -> four vectors whose s32 lanes hold one channel of every row (`interleaved_order`)."""
    zero = T.Broadcast(T.uint8(0), BYTES)
    rows = rows + [zero] * (TAPS - len(rows))
    pairs = [[bind(T.reinterpret("int16x32", _unpack(a, b, BYTES, half))) for a, b in (rows[:2], rows[2:])] for half in (0, 1)]
    return [bind(T.reinterpret(f"int8x{BYTES}", _unpack(a, b, BYTES // 2, half))) for a, b in pairs for half in (0, 1)]


def _unpack(a: Any, b: Any, lanes: int, half: int) -> Any:
    """vpunpckl/h: in each 128-bit lane, alternate the elements of the low (0) or high (1) half of a and b."""
    group = lanes // 4
    firsts = [start + half * group // 2 for start in range(0, lanes, group)]
    return shuffle([a, b], [source + first + e for first in firsts for e in range(group // 2) for source in (0, lanes)])
