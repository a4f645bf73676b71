"""Dense u8/s8 convolution on a tile unit: how it becomes a product of lines of pixels, and the frame those lie in.

An A tile is 16 output pixels at one distance from each other in memory, so no operand is rearranged in full:

    flat   the pixels of an image follow each other over the width of its frame; those between two output lines are dropped.
           A stride splits the frame into its phases, planes of every stride-th pixel, in which neighbours are neighbours.
    lines  16 pixels of one output line, `stride` apart.

The one with fewer dots is taken: `flat` wastes the frame's borders, `lines` the part of a line that fills no tile. Taps that lie
side by side in the frame are one run of k. A frame with borders or phases is a scratch that a first loop fills; otherwise the
image itself is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from .base import Convolution, padded
from .emit import bind, loop, parallel_kind, store
from .gemm_tiles import NARROW, TASK_NS, Lines, Run, TileProduct, pack_runs, product_ns, total_steps, vector_ns
from .isa import T
from .tail import TailCode
from .tile_unit import DEPTH, ROWS, TileUnit

#: Filling a byte of a frame, nanoseconds.
FILL_NS = 0.03


@dataclass(frozen=True)
class Frame:
    """The padded image as planes [image][phase y][phase x][height][width][pitch].

    Plane (p, q) holds the padded image's pixels (p + stride[0] * y, q + stride[1] * x); `phases` lists the ones taps read.
    copied: the planes are a scratch; otherwise the one plane is the image.
    """

    shape: Convolution
    stride: tuple[int, int]
    phases: tuple[tuple[int, ...], tuple[int, ...]]
    height: int
    width: int
    pitch: int
    copied: bool

    @property
    def plane(self) -> int:
        return self.height * self.width * self.pitch

    @property
    def image(self) -> int:
        return len(self.phases[0]) * len(self.phases[1]) * self.plane

    @property
    def size(self) -> int:
        """Elements, with what tiles read past the end."""
        return self.shape.batch * self.image + (ROWS * self.shape.stride[1] * self.pitch + DEPTH)

    def tap(self, ky: int, kx: int) -> int:
        """Where the tap of output pixel (0, 0) lies."""
        (sy, sx), (dy, dx) = self.stride, self.shape.dilation
        plane = self.phases[0].index(ky * dy % sy) * len(self.phases[1]) + self.phases[1].index(kx * dx % sx)
        return plane * self.plane + ((ky * dy // sy) * self.width + kx * dx // sx) * self.pitch


@dataclass(frozen=True)
class TiledConvolution:
    """A convolution as a product: taps[i] are the (row, column) taps that run i covers."""

    frame: Frame
    lines: Lines
    runs: tuple[Run, ...]
    taps: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def ns(self) -> float:
        """Estimate for comparing forms: the product, and the frame's filling."""
        filling = self.frame.shape.batch * self.frame.image * FILL_NS if self.frame.copied else 0.0
        return product_ns(self.lines, padded(self.frame.shape.filters), self.runs, NARROW) + filling


def tiled(shape: Convolution, words: int | None = None) -> TiledConvolution | None:
    """The form in which the tile unit computes a dense convolution; None where 512-bit registers are estimated to be faster.

    words: bytes a pixel of a frame that quantizing the image fills anyway.
    """
    forms = [candidate for split in (True, False) if (candidate := form(shape, split, words)) is not None]
    if not forms:
        return None
    best = min(forms, key=lambda form: form.ns)
    framed = shape.batch * shape.height * shape.width * padded(shape.channels) * FILL_NS
    framed = framed if shape.bordered or words is not None else 0.0
    depth = shape.kernel[0] * shape.kernel[1] * padded(shape.channels, 4)
    vectors = vector_ns(best.lines.rows, padded(shape.filters), depth) + framed
    return best if best.ns + TASK_NS < vectors else None


def form(shape: Convolution, split: bool, words: int | None = None) -> TiledConvolution | None:
    """The form `flat` (split) or `lines` of a dense convolution; None where its tiles would read outside the image.

    words: as in `tiled`; only `lines`, which need no phases, read such a frame.
    """
    if words is not None:
        return None if split or shape.out_width < ROWS else _lines(shape, words)
    (oh, ow), stride = (shape.out_height, shape.out_width), shape.stride if split else (1, 1)
    bordered = shape.bordered
    copied = bordered or stride != (1, 1)
    if not copied and (shape.kernel, shape.stride) == ((1, 1), (1, 1)):
        return _pointwise(shape) if split else None
    span = [(k - 1) * d for k, d in zip(shape.kernel, shape.dilation, strict=True)]
    if split:
        sizes = [out + reach // step for out, reach, step in zip((oh, ow), span, stride, strict=True)]
    else:
        sizes = [(out - 1) * step + reach + 1 for out, step, reach in zip((oh, ow), shape.stride, span, strict=True)]
    length = (oh - 1) * sizes[1] + ow if split else ow
    if not copied:
        if length < ROWS:
            return None
        sizes = [shape.height, shape.width]
        length = (oh - 1) * sizes[1] + ow if split else ow
    taps = [sorted({k * d % s for k in range(count)}) for count, d, s in zip(shape.kernel, shape.dilation, stride, strict=True)]
    phases = (tuple(taps[0]), tuple(taps[1]))
    pitches = {padded(shape.channels, 4), padded(shape.channels)} if copied else {padded(shape.channels)}
    frames = [Frame(shape, stride, phases, sizes[0], sizes[1], pitch, copied) for pitch in sorted(pitches, reverse=True)]
    runs = {frame: _runs(frame) for frame in frames}
    frame = min(frames, key=lambda frame: total_steps(runs[frame][0]))
    step = (shape.stride[0] * frame.width * frame.pitch, shape.stride[1] * frame.pitch)
    if split:
        lines = Lines(shape.batch, 1, length, frame.image, 0, frame.pitch, frame.width, ow)
    else:
        lines = Lines(shape.batch, oh, ow, frame.image, *step, ow, ow)
    return TiledConvolution(frame, lines, *runs[frame])


def _lines(shape: Convolution, pitch: int) -> TiledConvolution:
    """Lines over the whole frame, of `pitch` elements a pixel."""
    frame = Frame(shape, (1, 1), ((0,), (0,)), shape.framed_height, shape.framed_width, pitch, copied=True)
    step = (shape.stride[0] * frame.width * pitch, shape.stride[1] * pitch)
    lines = Lines(shape.batch, shape.out_height, shape.out_width, frame.image, *step, shape.out_width, shape.out_width)
    return TiledConvolution(frame, lines, *_runs(frame))


def _pointwise(shape: Convolution) -> TiledConvolution | None:
    rows, pitch = shape.batch * shape.height * shape.width, padded(shape.channels)
    if rows < ROWS:
        return None
    frame = Frame(shape, (1, 1), ((0,), (0,)), shape.height, shape.width, pitch, copied=False)
    return TiledConvolution(frame, Lines.matrix(rows, pitch), (Run(0, ceil(shape.channels / DEPTH)),), (((0, 0),),))


def _runs(frame: Frame) -> tuple[tuple[Run, ...], tuple[tuple[tuple[int, int], ...], ...]]:
    """Taps of each kernel row in the order they lie in memory; neighbours join."""
    joined: list[list[tuple[int, int]]] = []
    for ky in range(frame.shape.kernel[0]):
        row = sorted(((ky, kx) for kx in range(frame.shape.kernel[1])), key=lambda tap: frame.tap(*tap))
        for place, tap in enumerate(row):
            if place and frame.tap(*tap) == frame.tap(*joined[-1][-1]) + frame.pitch:
                joined[-1].append(tap)
            else:
                joined.append([tap])
    depth = frame.shape.channels
    runs = tuple(Run(frame.tap(*taps[0]), ceil(((len(taps) - 1) * frame.pitch + depth) / DEPTH)) for taps in joined)
    return runs, tuple(tuple(taps) for taps in joined)


def pack(form: TiledConvolution, weight: np.ndarray) -> np.ndarray:
    """s8 (O, C, KH, KW) -> flat tiles in the order of the form's runs; lanes past C meet zeros."""
    filters, channels = weight.shape[:2]
    matrices = []
    for taps in form.taps:
        matrix = np.zeros((len(taps), form.frame.pitch, filters), np.int8)
        for place, (ky, kx) in enumerate(taps):
            matrix[place, :channels] = weight[:, :, ky, kx].T
        matrices.append(matrix.reshape(-1, filters)[: (len(taps) - 1) * form.frame.pitch + channels])
    return pack_runs(matrices, filters)


def packed_size(form: TiledConvolution) -> int:
    return padded(form.frame.shape.filters) * total_steps(form.runs) * DEPTH


def product(form: TiledConvolution, unit: TileUnit, x: Any, weights: Any, bias: Any, code: TailCode) -> TileProduct:
    """The product to emit. x: the frame's planes."""
    columns = padded(form.frame.shape.filters)
    return TileProduct(unit, form.lines, form.runs, columns, columns, x, weights, bias, code)


def fill(frame: Frame, x: Any, zero_point: int) -> Any:
    """Copies the image into the frame's planes; borders hold the zero point."""
    shape, kind, pitch = frame.shape, str(x.dtype), frame.pitch
    scratch = T.alloc_buffer((frame.size,), kind)
    border = T.Cast(kind, T.int32(zero_point))
    phases_y, phases_x = frame.phases

    def blank(offset: Any, count: int) -> None:
        _each_vector(count * pitch, lambda at, lanes: _put(scratch, offset + at, border, lanes))

    def copy(offset: Any, source: Any, count: int) -> None:
        """count pixels, stride[1] pixels apart in the source."""
        apart = frame.stride[1] * padded(shape.channels)
        if apart == pitch:
            _each_vector(count * pitch, lambda at, lanes: _move(scratch, offset + at, x, source + at, lanes))
            return
        with loop(count) as pixel:
            to, start = offset + pixel * pitch, source + pixel * apart
            _each_vector(pitch, lambda at, lanes: _move(scratch, to + at, x, start + at, lanes))

    rows = shape.batch * len(phases_y) * frame.height
    with loop(rows, parallel_kind(shape.batch * frame.image * FILL_NS / 1000)) as index:
        row, plane = bind(T.truncmod(index, frame.height)), bind(T.truncdiv(index, frame.height))
        image, phase = bind(T.truncdiv(plane, len(phases_y))), bind(T.truncmod(plane, len(phases_y)))
        y = bind(row * frame.stride[0] + _table(phases_y, phase) - shape.padding[0])
        for number, px in enumerate(phases_x):
            base = bind((plane * len(phases_x) + number) * frame.plane + row * (frame.width * pitch))
            first, stop = _inside(px - shape.padding[1], frame.stride[1], shape.width, frame.width)
            with T.If(T.And(y >= 0, y < shape.height)):
                with T.Then():
                    blank(base, first)
                    left = first * frame.stride[1] + px - shape.padding[1]
                    line = ((image * shape.height + y) * shape.width + left) * padded(shape.channels)
                    copy(base + first * pitch, line, stop - first)
                    blank(base + stop * pitch, frame.width - stop)
                with T.Else():
                    blank(base, frame.width)
    return scratch


def _inside(start: int, step: int, size: int, count: int) -> tuple[int, int]:
    """Bounds of the i in range(count) for which start + i * step lies in range(size)."""
    first = min(count, max(0, ceil(-start / step)))
    return first, max(first, min(count, (size - 1 - start) // step + 1))


def _table(values: Sequence[int], index: Any) -> Any:
    """values[index] for an index known only at run time."""
    if list(values) == list(range(len(values))):
        return index if len(values) > 1 else 0
    found: Any = T.int32(values[-1])
    for place in range(len(values) - 2, -1, -1):
        found = T.Select(index == place, T.int32(values[place]), found)
    return found


def _each_vector(count: int, body: Any) -> None:
    """Calls body(offset, lanes) so that count elements are covered by the widest vectors that fit."""
    done = 0
    for lanes in (64, 32, 16, 8, 4, 2, 1):
        pieces = (count - done) // lanes
        if pieces:
            with loop(pieces) as index:
                body(done + index * lanes, lanes)
            done += pieces * lanes


def _put(buffer: Any, offset: Any, value: Any, lanes: int) -> None:
    if lanes == 1:
        T.buffer_store(buffer, value, [offset])
    else:
        store(buffer, offset, T.Broadcast(value, lanes), lanes)


def _move(target: Any, offset: Any, source: Any, start: Any, lanes: int) -> None:
    if lanes == 1:
        T.buffer_store(target, source.vload([start]), [offset])
    else:
        store(target, offset, source.vload([start], f"{source.dtype}x{lanes}"), lanes)
