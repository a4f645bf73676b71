"""u8/s8 depthwise convolution, channels in lanes.

portable: one output vector at a time, widen and multiply each tap. AArch64: see `depthwise_neon`.

avx512-vnni, 8-bit output, no dilation: vpdpbusd sums four taps of one channel in an s32 lane. The four are a quad: 2 x 2
neighbouring pixels at even rows and columns of the padded image. A task first rearranges its band of input rows into quads, four
vectors of [16 channels][4 pixels] for each (two levels of in-lane unpacking: 8 shuffles), borders filled in. Every byte of the
input is shuffled once, and then serves all the outputs whose window covers it: a window that starts at an odd row or column
reads quads that stick out of it, and has a zero weight there. So the weights are packed up to four times, once for each parity.

    3 x 3, stride 1: 2 shuffles and 16 dot instructions for 64 outputs     5 x 5: 2 and 36
    3 x 3, stride 2: 8 shuffles and 16 dot instructions                    5 x 5: 8 and 36

A chunk of `COLUMNS` outputs stays in registers. The final saturating packs undo the order that the unpacking leaves.

64 lanes are 64 channels; the 16 or 32 channels that a tensor has beyond whole vectors (or at all) are taken together with those
of 4 or 2 vertical strips of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np

from . import depthwise_neon
from .base import LANES, Convolution, Tail, padded
from .emit import accumulator, balanced, bind, loop, parallel_kind, shuffle, splat, store
from .frame import pad_image
from .isa import Isa, T
from .packed import Packing, Storage
from .tail import TailCode, declare, interleaved_order, pack_tail

#: Tasks that a kernel should have where the image is large enough, and the least rows of a band worth a task.
TASKS, LOWEST_BAND = 12, 8

#: Bytes of a vector register, and pixels whose bytes one s32 lane holds.
BYTES, TAPS = 64, 4

#: Output vectors of a chunk: times four accumulators they fill the register file. Even, so that chunks start at an even column.
COLUMNS = 6


@dataclass(frozen=True)
class Strips:
    """How the 64 lanes of some blocks of channels are filled: `channels` of each of `count` strips of output columns.

    A strip has `width` columns; each starts `step` columns after the one before (they may overlap).
    """

    channels: int
    count: int
    step: int
    width: int


@dataclass(frozen=True)
class Plan:
    """How the AVX-512 kernel cuts a depthwise convolution: a task is `rows` output rows of one block of channels.

    starts: first channel of each block. Blocks before `wide` have 64 channels of one strip, the last may be `narrow`.
    """

    shape: Convolution
    starts: tuple[int, ...]
    wide: int
    narrow: Strips | None
    rows: int

    @property
    def blocks(self) -> int:
        return len(self.starts)

    def strips(self, narrow: bool) -> Strips:
        return self.narrow if narrow and self.narrow is not None else Strips(BYTES, 1, 0, self.shape.out_width)

    @cached_property
    def order(self) -> np.ndarray:
        """[blocks][4][LANES]: channel of each s32 lane."""
        sizes = [self.strips(block >= self.wide).channels for block in range(self.blocks)]
        return np.stack([start + interleaved_order() % size for start, size in zip(self.starts, sizes, strict=True)])

    def parities(self, axis: int) -> int:
        """Whether windows start at even rows (columns) only, 1, or at odd ones too, 2."""
        return 1 + self.shape.stride[axis] % 2

    def reach(self, axis: int, parity: int | None = None) -> int:
        """Quads under one window that starts at a pixel of `parity`, the worst one by default."""
        return ceil((self.shape.kernel[axis] + (self.parities(axis) - 1 if parity is None else parity)) / 2)

    @property
    def line(self) -> int:
        """Quads of one line, of the widest strip."""
        return _quads(self.shape, 1, self.shape.out_width if self.wide or self.narrow is None else self.narrow.width)

    @property
    def kept(self) -> int:
        """Lines of quads under the output rows that are computed together: one row for each parity."""
        return _quads(self.shape, 0, self.parities(0))

    @property
    def step(self) -> int:
        """Lines of quads between two such groups of rows."""
        return self.parities(0) * self.shape.stride[0] // 2


def _quads(shape: Convolution, axis: int, outputs: int) -> int:
    """Quads under `outputs` neighbouring windows, the first of which starts at an even pixel."""
    return ceil(((outputs - 1) * shape.stride[axis] + shape.kernel[axis]) / 2)


def choose_plan(shape: Convolution, tail: Tail, isa: Isa) -> Plan | None:
    """The AVX-512 plan, or None where the portable code runs (no VNNI, output wider than 8 bits, dilation, rows too short)."""
    if not isa.vnni or tail.dtype not in ("uint8", "int8") or shape.dilation != (1, 1):
        return None
    pitch = padded(shape.channels)
    whole, rest = divmod(pitch, BYTES)
    narrow = _strips(shape, rest) if rest in (16, 32) and tail.residual is None else None
    if narrow is None and pitch < BYTES:
        return None
    starts = [BYTES * block for block in range(whole)]
    if rest:
        # Without strips the last block moves back to overlap its neighbour.
        starts.append(BYTES * whole if narrow is not None else pitch - BYTES)
    wide = whole if narrow is not None else len(starts)
    # Bands as high as leaves every core some tasks: each one rearranges a few lines that its neighbour rearranges too.
    most = max(LOWEST_BAND, shape.batch * len(starts) * shape.out_height // TASKS)
    even = 1 + shape.stride[0] % 2
    rows = ceil(balanced(shape.out_height, most) / even) * even
    return Plan(shape, tuple(starts), wide, narrow, rows)


def _strips(shape: Convolution, channels: int) -> Strips | None:
    """Strips for the last `channels` channels; None where the image is too narrow for them."""
    count, even = BYTES // channels, 1 + shape.stride[1] % 2
    step = shape.out_width // count // even * even
    return Strips(channels, count, step, shape.out_width - (count - 1) * step) if step else None


def pack(
    shape: Convolution,
    tail: Tail,
    isa: Isa,
    weight: np.ndarray,
    bias: np.ndarray,
    values: dict[str, np.ndarray],
    packing: Packing | None = None,
) -> tuple[np.ndarray, ...]:
    """Weights (C, 1, KH, KW) s8, folded bias s32 (C,) and tail parameters in the order the kernel reads them."""
    plan, pitch = choose_plan(shape, tail, isa), padded(shape.channels)
    wide = np.zeros(pitch, np.int32)
    wide[: shape.channels] = bias
    full = np.zeros((pitch, *shape.kernel), np.int8)
    full[: shape.channels] = weight[:, 0]
    if plan is None:
        neon = depthwise_neon.pack_weight(shape, full) if depthwise_neon.by_dots(isa) else None
        flat = np.ascontiguousarray(full.transpose(1, 2, 0)).reshape(-1) if neon is None else neon
        flat = storage(shape, plan, packing, isa).pack(flat)
        return flat, wide, *pack_tail(tail, shape.channels, **values)
    down, across = plan.reach(0), plan.reach(1)
    quads = np.zeros((plan.parities(0), plan.parities(1), pitch, 2 * down, 2 * across), np.int8)
    for y, x in np.ndindex(quads.shape[:2]):
        quads[y, x, :, y : y + shape.kernel[0], x : x + shape.kernel[1]] = full
    quads = quads.reshape(*quads.shape[:2], pitch, down, 2, across, 2).transpose(2, 0, 1, 3, 5, 4, 6)
    lanes = quads.reshape(*quads.shape[:5], TAPS)[plan.order]  # [blocks][4][LANES][row parity][column parity][down][across][4]
    packed = storage(shape, plan, packing, isa).pack(np.ascontiguousarray(lanes.transpose(0, 3, 5, 4, 6, 1, 2, 7)).reshape(-1))
    order = plan.order.reshape(-1)
    return packed, wide[order], *pack_tail(tail, shape.channels, order, **values)


def storage(shape: Convolution, plan: Plan | None, packing: Packing | None, isa: Isa) -> Storage:
    """The weights of all channels together, or those of each block of a plan."""
    if plan is None and depthwise_neon.by_dots(isa):
        return Storage(depthwise_neon.weight_size(shape), 1, packing)
    if plan is None:
        return Storage(padded(shape.channels) * shape.kernel[0] * shape.kernel[1], 1, packing)
    return Storage(plan.parities(0) * plan.parities(1) * plan.reach(0) * plan.reach(1) * TAPS * BYTES, plan.blocks, packing)


def emit(shape: Convolution, dtype: str, zero_point: int, tail: Tail, isa: Isa, packing: Packing | None = None) -> None:
    """Emits the function's arguments and body; see `convolution_int8` for the buffers."""
    plan, pitch = choose_plan(shape, tail, isa), padded(shape.channels)
    lanes = pitch if plan is None else plan.blocks * BYTES
    stored = storage(shape, plan, packing, isa)
    image = ("X", (shape.batch, shape.height, shape.width, pitch), dtype)
    out_shape = (shape.batch, shape.out_height, shape.out_width, pitch)
    packed = [stored.argument, ("B", (lanes,), "int32")]
    (x, weights, bias), code = declare(tail, isa, lanes, [image], packed, out_shape)
    if plan is None and isa.neon:
        if shape.bordered or isa.shift(dtype):
            x = pad_image(shape, x, zero_point, pitch, isa)
        depthwise_neon.emit(shape, isa, x, stored.shared(weights), bias, code)
    elif plan is None:
        _portable(shape, zero_point, isa, x, stored.shared(weights), bias, code)
    else:
        Quads(plan, isa, zero_point, x, weights, bias, code, stored).emit()


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
class Quads:
    """Emits the AVX-512 kernel: parallel over (image, block of channels, band of rows)."""

    plan: Plan
    isa: Isa
    zero_point: int
    x: Any
    weights: Any
    bias: Any
    code: TailCode
    storage: Storage

    def emit(self) -> None:
        plan, shape = self.plan, self.plan.shape
        bands = ceil(shape.out_height / plan.rows)
        work = shape.batch * shape.out_height * shape.out_width * padded(shape.channels)
        work *= plan.reach(0) * plan.reach(1) * TAPS + 8
        with loop(shape.batch * plan.blocks * bands, parallel_kind(work / 400_000)) as task:
            image, block, band = task // (plan.blocks * bands), bind(task // bands % plan.blocks + T.int32(0)), task % bands
            top = bind(band * plan.rows + T.int32(0))
            scratch = T.alloc_buffer((plan.kept * plan.line * TAPS * BYTES,), "uint8")
            if self.storage.packing:
                unpacked = self.storage.scratch(1)
                self.storage.unpack(self.weights, block, unpacked, 0)
                self.weights = unpacked
            if plan.wide in (0, plan.blocks):
                self._band(plan.strips(plan.wide == 0), image, block, top, scratch)
                return
            with T.If(block < plan.wide):
                with T.Then():
                    self._band(plan.strips(False), image, block, top, scratch)
                with T.Else():
                    self._band(plan.strips(True), image, block, top, scratch)

    def _band(self, strips: Strips, image: Any, block: Any, top: Any, scratch: Any) -> None:
        """The output rows from `top` on of one block of channels. Lines of quads are made one after the other, in a ring."""
        plan, shape = self.plan, self.plan.shape
        pitch, parities = padded(shape.channels), plan.parities(0)
        channel = bind(T.min(block * BYTES, pitch - strips.channels))
        rows = bind(T.min(plan.rows, shape.out_height - top))
        target = bind(((image * shape.out_height + top) * shape.out_width) * pitch + channel)
        size = plan.line * TAPS * BYTES
        groups = bind((rows + parities - 1) // parities)
        with T.serial(0, (groups - 1) * plan.step + plan.kept) as line:
            y = bind(top * shape.stride[0] + 2 * line - shape.padding[0])
            self._rearrange(strips, image, channel, y, scratch, bind(line % plan.kept * size))
            made = bind(line - (plan.kept - 1))
            with T.If(T.And(made >= 0, made % plan.step == 0)), T.Then():
                first = bind(made // plan.step * parities)
                with T.serial(0, T.min(rows - first, parities)) as place:
                    row = bind(first + place)
                    self._row(strips, scratch, row, block, bind(target + row * (shape.out_width * pitch)))

    def _row(self, strips: Strips, scratch: Any, row: Any, block: Any, to: Any) -> None:
        """One output row of every strip."""
        pitch, step = padded(self.plan.shape.channels), COLUMNS * self.plan.shape.stride[1] // 2 * TAPS * BYTES
        full, rest = divmod(strips.width, COLUMNS)
        if full:
            with loop(full) as chunk:
                self._chunk(strips, COLUMNS, scratch, bind(chunk * step + T.int32(0)), row, block, to + chunk * (COLUMNS * pitch))
        if rest:
            self._chunk(strips, rest, scratch, full * step, row, block, to + full * COLUMNS * pitch)

    def _chunk(self, strips: Strips, columns: int, scratch: Any, base: Any, row: Any, block: Any, to: Any) -> None:
        """`columns` output vectors from output element `to` on; their windows start at `base` in every line of quads."""
        plan, stride, pitch = self.plan, self.plan.shape.stride[1], padded(self.plan.shape.channels)
        acc = [[accumulator() for _ in range(TAPS)] for _ in range(columns)]
        for i in range(TAPS):
            bias = bind(self.bias.vload([block * BYTES + i * LANES], f"int32x{LANES}"))
            for vectors in acc:
                store(vectors[i], 0, bias)
        # Quad of the chunk's line -> (output vector, parity of its first column, quad of its window).
        users: dict[int, list[tuple[int, int, int]]] = {}
        for u in range(columns):
            first, odd = divmod(u * stride, 2)
            for j in range(plan.reach(1, odd)):
                users.setdefault(first + j, []).append((u, odd, j))
        first_line = bind(row * plan.shape.stride[0] // 2)
        parity = bind(row * plan.shape.stride[0] % 2) if plan.parities(0) == 2 else 0
        # At stride 1 the extent depends on the row also where it need not (3 x 3): LLVM would unroll a loop of constant extent,
        # mix its parts, and spill the quads.
        with T.serial(0, (plan.shape.kernel[0] + 1 + row * plan.shape.stride[0] % 2) // 2) as down:
            line = bind(base + (first_line + down) % plan.kept * (plan.line * TAPS * BYTES))
            weights = bind(self._weight(block, parity, down))
            for i in range(TAPS):
                for quad in sorted(users):
                    at = line + (quad * TAPS + i) * BYTES
                    value = bind(T.reinterpret(f"int8x{BYTES}", scratch.vload([at], f"uint8x{BYTES}")))
                    for u, odd, j in users[quad]:
                        weight = self.isa.weight(self.weights, weights + ((odd * plan.reach(1) + j) * TAPS + i) * BYTES)
                        store(acc[u][i], 0, self.isa.dot(acc[u][i].vload([0], f"int32x{LANES}"), value, weight))
        parameters = [self.code.load(block * BYTES + i * LANES) for i in range(TAPS)]
        pieces = None if strips.count == 1 else (strips.channels, strips.step * pitch)
        for u, vectors in enumerate(acc):
            values = [bind(vector.vload([0], f"int32x{LANES}")) for vector in vectors]
            self.code.emit_four(values, parameters, to + u * pitch, pieces)

    def _weight(self, block: Any, parity: Any, down: Any) -> Any:
        """Where the weights of one line of quads start: [block][row parity][down][column parity][across][4 vectors]."""
        plan = self.plan
        line = plan.parities(1) * plan.reach(1) * TAPS * BYTES
        block = 0 if self.storage.packing else block  # a task unpacks its own block
        return ((block * plan.parities(0) + parity) * plan.reach(0) + down) * line

    def _rearrange(self, strips: Strips, image: Any, channel: Any, y: Any, scratch: Any, at: Any) -> None:
        """Writes the quads of image rows y and y + 1 at `at`: [line][4 vectors][LANES][4 pixels]."""
        shape = self.plan.shape
        with T.If(T.And(y >= 0, y + 1 < shape.height)):
            with T.Then():
                rows = [bind(self._pixel(image, y + dy, channel)) for dy in (0, 1)]
                self._line(strips, lambda dy, column: self._read(strips, rows[dy], column), scratch, at)
            with T.Else():
                clamped = [T.max(T.min(y + dy, shape.height - 1), 0) for dy in (0, 1)]
                starts = [bind(self._pixel(image, row, channel)) for row in clamped]
                inside = [bind(T.And(y + dy >= 0, y + dy < shape.height)) for dy in (0, 1)]

                def read(dy: int, column: Any) -> Any:
                    return T.Select(inside[dy], self._read(strips, starts[dy], column), self._blank(strips))

                self._line(strips, read, scratch, at)

    def _line(self, strips: Strips, read: Callable[[int, Any], Any], scratch: Any, at: Any) -> None:
        """One line of quads; those over the left and right border one by one, all others in a loop."""
        shape = self.plan.shape
        pad, shift = shape.padding[1], strips.step * shape.stride[1]

        def columns(quad: Any, dx: int) -> list[Any]:
            return [2 * quad + dx - pad + strip * shift for strip in range(strips.count)]

        def write(quad: Any) -> None:
            pixels = []
            for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
                outside = [isinstance(c, int) and not 0 <= c < shape.width for c in columns(quad, dx)]
                pieces = [
                    self._blank(strips) if out else read(dy, column)
                    for column, out in zip(columns(quad, dx), outside, strict=True)
                ]
                pixels.append(bind(pieces[0] if len(pieces) == 1 else shuffle(pieces, list(range(BYTES)))))
            for i, vector in enumerate(interleave(pixels)):
                store(scratch, at + (quad * TAPS + i) * BYTES, T.reinterpret(f"uint8x{BYTES}", vector), BYTES)

        quads = range(_quads(shape, 1, strips.width))
        inner = [q for q in quads if all(0 <= c < shape.width for dx in (0, 1) for c in columns(q, dx))]
        for quad in quads:
            if quad not in inner:
                write(quad)
        if inner:
            with T.serial(0, len(inner)) as index:
                write(index + inner[0])

    def _pixel(self, image: Any, row: Any, channel: Any) -> Any:
        """Element of X where a row of one block of channels starts."""
        shape = self.plan.shape
        return (image * shape.height + row) * (shape.width * padded(shape.channels)) + channel

    def _read(self, strips: Strips, row: Any, column: Any) -> Any:
        """The bytes of one pixel as u8; s8 becomes x + 128."""
        size = strips.channels
        value = self.x.vload([row + column * padded(self.plan.shape.channels)], f"{self.x.dtype}x{size}")
        if str(self.x.dtype) == "uint8":
            return value
        return T.reinterpret(f"uint8x{size}", value) ^ T.Broadcast(T.uint8(128), size)

    def _blank(self, strips: Strips) -> Any:
        return T.Broadcast(T.uint8(self.zero_point + self.isa.shift(str(self.x.dtype))), strips.channels)


def interleave(rows: list[Any]) -> list[Any]:
    """Four vectors of 64 bytes -> four vectors whose s32 lanes hold one byte of each (`interleaved_order`)."""
    pairs = [[bind(T.reinterpret("int16x32", _unpack(a, b, BYTES, half))) for a, b in (rows[:2], rows[2:])] for half in (0, 1)]
    return [bind(T.reinterpret(f"int8x{BYTES}", _unpack(a, b, BYTES // 2, half))) for a, b in pairs for half in (0, 1)]


def _unpack(a: Any, b: Any, lanes: int, half: int) -> Any:
    """vpunpckl/h: in each 128-bit lane, alternate the elements of the low (0) or high (1) half of a and b."""
    group = lanes // 4
    firsts = [start + half * group // 2 for start in range(0, lanes, group)]
    return shuffle([a, b], [source + first + e for first in firsts for e in range(group // 2) for source in (0, lanes)])
