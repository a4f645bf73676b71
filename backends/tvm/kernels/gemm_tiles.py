"""The u8/s8 x s8 -> s32 product on a tile unit, for convolution, linear and matmul; `gemm_int8` is its sibling on registers.

A block is up to 2 x 2 accumulator tiles, 32 rows by 32 columns, whose two A and two B tiles take the unit's other four:

    tiles = bias (a load with stride 0)
    for each k step:   load A0, B0, B1, A1, four dots;   a share of the tail of the block before
    store the four tiles to a scratch that stays in the first-level cache

The tail trails one block behind and is woven between the dots of deep products, so that the core's vectors finish one block
while the tile unit sums the next: the window in which a core reorders is shorter than a block. A task keeps one operand and
sweeps the other (`choose_blocking`; Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008). The last
tile of a line is moved back to overlap its neighbour; only rows that are results are finished and stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np

from .base import LANES, Tail, padded
from .emit import bind, clamp_start, loop, opaque, parallel_kind
from .isa import T
from .tail import TailCode
from .tile_unit import DEPTH, ROWS, Tiles, TileUnit

#: Bytes of one packed B tile: DEPTH k x ROWS columns.
TILE_BYTES = DEPTH * ROWS
#: Tiles of a block along each side.
SIDE = 2

# Nanoseconds, fitted to the layers of ResNet-50, EfficientNet-lite0 and MiniLM on one core of an Emerald Rapids (within a tenth
# of most); they choose between forms and decide nothing about results.
#: One dot of two tiles, loads included.
DOT_NS = 10.0
#: Finishing LANES accumulators: of two panels together, of one panel alone, and for outputs wider than 8 bits.
PAIR_NS, SINGLE_NS, WIDE_NS = 1.5, 2.6, 3.0
#: Configuring the unit and releasing it.
TASK_NS = 150.0
#: `gemm_int8` with VNNI: a multiply-accumulate, and finishing LANES accumulators.
VECTOR_MAC_NS, VECTOR_TAIL_NS = 0.0027, 0.8
#: A byte from the second-level cache and from further away.
NEAR_NS, FAR_NS = 0.008, 0.04
#: What one core keeps close, leaving room for the other streams.
L1_BYTES, L2_BYTES = 32 * 1024, 1536 * 1024

#: Forms are compared with an 8-bit tail, because weights are packed for a form where the tail is not known yet.
NARROW = Tail("rescale", "uint8")

#: From so many k steps on it pays to weave the tail between them (measured: a tenth to a sixth of ResNet-50's 1x1 layers).
WOVEN_STEPS = 4

#: Tasks of a product, and what one should be worth at least, microseconds.
MOST_TASKS, TASK_US = 48, 3.0


@dataclass(frozen=True)
class Lines:
    """Where the rows of A lie: images x lines x length positions, strides in elements of the source.

    Of every `group` positions the first `outputs` are results, in the row-major order of the output; the others lie between two
    lines of a padded image and are computed for nothing. *_image strides step the weights and bias of a batched product.
    """

    images: int
    lines: int
    length: int
    x_image: int
    x_line: int
    x_position: int
    group: int
    outputs: int
    weight_image: int = 0
    bias_image: int = 0

    @classmethod
    def matrix(cls, rows: int, pitch: int, images: int = 1, weight_image: int = 0, bias_image: int = 0) -> Lines:
        """images matrices of dense rows."""
        return cls(images, 1, rows, rows * pitch, 0, pitch, rows, rows, weight_image, bias_image)

    @property
    def dense(self) -> bool:
        return self.group == self.outputs

    @property
    def line_tiles(self) -> int:
        return ceil(self.length / ROWS)

    @property
    def image_tiles(self) -> int:
        return self.lines * self.line_tiles

    @property
    def tiles(self) -> int:
        return self.images * self.image_tiles

    @property
    def line_outputs(self) -> int:
        whole, rest = divmod(self.length, self.group)
        return whole * self.outputs + min(rest, self.outputs)

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return self.images * self.lines * self.line_outputs

    def output(self, position: Any) -> Any:
        """How many results of a line lie before a position."""
        if self.dense:
            return position
        return T.truncdiv(position, self.group) * self.outputs + T.min(T.truncmod(position, self.group), self.outputs)

    def position(self, output: Any) -> Any:
        """Where the line's result number `output` lies."""
        if self.dense:
            return output
        return T.truncdiv(output, self.outputs) * self.group + T.truncmod(output, self.outputs)


@dataclass(frozen=True)
class Run:
    """Neighbouring k: they start `offset` elements from a row's first one and take `steps` dots."""

    offset: int
    steps: int


def total_steps(runs: Iterable[Run]) -> int:
    return sum(run.steps for run in runs)


@dataclass(frozen=True)
class Blocking:
    """rows_outer: a task keeps its rows and sweeps the panels. chunks: tasks that share one sweep."""

    rows_outer: bool
    chunks: int


def product_ns(lines: Lines, columns: int, runs: tuple[Run, ...], tail: Tail) -> float:
    """Estimate of one core's time. The tile unit and the vectors share the core's power: dots and tails add up."""
    panels = columns // LANES
    if tail.dtype in ("uint8", "int8"):
        finish = PAIR_NS * (panels // SIDE * SIDE) + SINGLE_NS * (panels % SIDE)
    else:
        finish = WIDE_NS * panels
    return lines.tiles * panels * total_steps(runs) * DOT_NS + lines.rows * finish


def vector_ns(rows: int, columns: int, depth: int) -> float:
    """The same product on 512-bit registers (`gemm_int8`)."""
    return rows * columns * (depth * VECTOR_MAC_NS + VECTOR_TAIL_NS / LANES)


def tiles_pay(lines: Lines, depth: int, columns: int) -> bool:
    """Whether a product of dense rows belongs on the tile unit; `lines` gives its rows, `depth` its k."""
    if lines.length < ROWS:
        return False  # a tile would read rows that are not there
    tiles = product_ns(lines, columns, (Run(0, ceil(depth / DEPTH)),), NARROW) + TASK_NS
    return tiles < vector_ns(lines.rows, columns, padded(depth, 4))


def choose_blocking(lines: Lines, columns: int, runs: tuple[Run, ...], tail: Tail, by_columns: bool = False) -> Blocking:
    """The order that moves less past the first-level cache, or the one `by_columns`, and tasks that are many enough to share and
    large enough to pay."""
    depth = total_steps(runs) * DEPTH
    row_units, column_units = ceil(lines.tiles / SIDE), ceil(columns / (SIDE * LANES))
    rows, weights = lines.images * lines.x_image, columns * depth

    def moved(kept: int, kept_units: int, swept: int, swept_units: int) -> float:
        """kept: an operand whose blocks stay for a sweep each; swept: one that passes once for every such block."""
        again = swept * (kept_units if swept > L1_BYTES else 1) * (NEAR_NS if swept <= L2_BYTES else FAR_NS)
        return again + kept * (swept_units if kept > L1_BYTES * kept_units else 1) * NEAR_NS

    rows_outer = moved(rows, row_units, weights, column_units) <= moved(weights, column_units, rows, row_units)
    rows_outer = (rows_outer or lines.weight_image != 0) and not by_columns
    outer, inner = (row_units, column_units) if rows_outer else (column_units, row_units)
    tasks = min(MOST_TASKS, product_ns(lines, columns, runs, tail) / 1000 / TASK_US)
    return Blocking(rows_outer, max(1, min(inner, ceil(tasks / outer))))


def pack_runs(matrices: Iterable[np.ndarray], columns: int) -> np.ndarray:
    """Runs of k, each s8 [depth, N], -> flat [padded(N) / 16][all steps][16][16][4]; every run is padded to whole steps."""
    parts = []
    for matrix in matrices:
        full = np.zeros((ceil(len(matrix) / DEPTH) * DEPTH, padded(columns)), np.int8)
        full[: len(matrix), :columns] = matrix
        parts.append(full)
    whole = np.concatenate(parts)
    return np.ascontiguousarray(whole.reshape(len(whole) // 4, 4, -1, LANES).transpose(2, 0, 3, 1)).reshape(-1)


@dataclass(frozen=True)
class Part:
    """Blocks of one size along one side: `count` of them, `size` tiles or panels each, from number `first` on.

    each: blocks an image (rows only). valid: lanes of the last panel that exist (columns only).
    """

    first: int
    size: int
    count: int
    each: int = 0
    valid: int = LANES


@dataclass
class _Rows:
    """One tile of rows: where it is read, and which results of its line it finishes."""

    source: Any
    start: Any
    first: Any
    stop: Any
    base: Any


@dataclass
class Block:
    rows: list[_Rows]
    panels: int
    panel: Any
    image: Any
    valid: int


@dataclass
class TileProduct:
    """One product to emit. columns: padded; pitch: elements between rows of the output. x: u8 or s8, with DEPTH - 1 readable
    bytes past its end; weights as `pack_runs`; bias s32 [columns]."""

    unit: TileUnit
    lines: Lines
    runs: tuple[Run, ...]
    columns: int
    pitch: int
    x: Any
    weights: Any
    bias: Any
    tail: TailCode

    def emit(self, blocking: Blocking | None = None) -> None:
        """Emits the product as one parallel loop."""
        plan = blocking or choose_blocking(self.lines, self.columns, self.runs, self.tail.tail)
        outer, inner = (self._row_parts, self._column_parts) if plan.rows_outer else (self._column_parts, self._row_parts)
        work = product_ns(self.lines, self.columns, self.runs, self.tail.tail) / 1000
        count = sum(part.count for part in outer) * plan.chunks
        with loop(count, parallel_kind(work)) as task, self.unit.task() as tiles:
            self._begin()
            scratch = T.alloc_buffer((SIDE * SIDE * ROWS * ROWS,), "int32")
            self._dispatch(tiles, scratch, plan, outer, inner, task)

    @cached_property
    def _row_parts(self) -> list[Part]:
        images, count = self.lines.images, self.lines.image_tiles
        parts = [Part(0, SIDE, images * (count // SIDE), count // SIDE), Part(count - 1, 1, images * (count % SIDE), 1)]
        return [part for part in parts if part.count]

    @cached_property
    def _column_parts(self) -> list[Part]:
        ragged = self.columns - self.pitch
        panels = self.columns // LANES - (ragged > 0)
        parts = [Part(0, SIDE, panels // SIDE), Part(panels - 1, 1, panels % SIDE)]
        if ragged > 0:
            parts.append(Part(panels, 1, 1, valid=LANES - ragged))
        return [part for part in parts if part.count]

    def _dispatch(self, tiles: Tiles, scratch: Any, plan: Blocking, outer: list[Part], inner: list[Part], task: Any) -> None:
        """The part of the outer side that a task belongs to; then its share of each inner part."""
        part, rest = outer[0], outer[1:]
        with _branches(task < part.count * plan.chunks if rest else None) as (this, others):
            with this:
                index, chunk = (task, 0) if plan.chunks == 1 else (T.truncdiv(task, plan.chunks), T.truncmod(task, plan.chunks))
                index, chunk = bind(index + T.int32(0)), bind(chunk + T.int32(0))
                self._kept(part, index)
                for swept in inner:
                    begin = bind(T.truncdiv(chunk * swept.count, plan.chunks))
                    end = bind(T.truncdiv((chunk + 1) * swept.count, plan.chunks))
                    self._sweep(tiles, scratch, plan, part, index, swept, begin, end)
            with others:
                if rest:
                    self._dispatch(tiles, scratch, plan, rest, inner, task - part.count * plan.chunks)

    def _begin(self) -> None:
        """Called at the start of a task."""

    def _kept(self, part: Part, index: Any) -> None:
        """Called before a task sweeps past block `index` of the operand that it keeps."""

    def _panel(self, block: Block) -> Any:
        """Where the weights of a block's first panel start."""
        return bind(block.image * self.lines.weight_image + block.panel * (total_steps(self.runs) * TILE_BYTES))

    def _sweep(
        self, tiles: Tiles, scratch: Any, plan: Blocking, kept: Part, index: Any, swept: Part, begin: Any, end: Any
    ) -> None:
        """Blocks begin .. end - 1 of the swept side, the tail one behind: round b sums block b while it finishes block b - 1."""

        def block(number: Any) -> Block:
            return self._block(kept, index, swept, number) if plan.rows_outer else self._block(swept, number, kept, index)

        with T.serial(0, T.Select(end > begin, end - begin + 1, 0)) as place:
            number = bind(begin + place)
            before = bind(T.max(number - 1, begin))
            with T.If(number < end):
                with T.Then():
                    self._sum(tiles, block(number), _Finish(self, scratch, block(before), place > 0))
                    for accumulator in range(kept.size * swept.size):
                        tiles.store(accumulator, scratch, accumulator * (ROWS * ROWS))
                with T.Else():
                    _Finish(self, scratch, block(before), place > 0).emit_all()

    def _block(self, rows: Part, row: Any, columns: Part, column: Any) -> Block:
        image = opaque(T.truncdiv(row, rows.each)) if self.lines.images > 1 else 0
        number = opaque(T.truncmod(row, rows.each)) if self.lines.images > 1 else row
        tiles = [self._rows(image, rows.first + number * rows.size + place) for place in range(rows.size)]
        return Block(tiles, columns.size, bind(columns.first + column * columns.size + T.int32(0)), image, columns.valid)

    def _rows(self, image: Any, tile: Any) -> _Rows:
        lines = self.lines
        line = opaque(T.truncdiv(tile, lines.line_tiles)) if lines.lines > 1 else 0
        tile = opaque(T.truncmod(tile, lines.line_tiles) if lines.lines > 1 else tile)
        start = opaque(clamp_start(tile, ROWS, lines.length)) if lines.length >= ROWS else 0
        source = opaque(image * lines.x_image + line * lines.x_line + start * lines.x_position)
        first = opaque(lines.output(tile * ROWS))
        stop = opaque(lines.output(T.min(tile * ROWS + ROWS, lines.length)))
        return _Rows(source, start, first, stop, opaque((image * lines.lines + line) * lines.line_outputs))

    def _sum(self, tiles: Tiles, block: Block, finish: _Finish) -> None:
        """Sums a block; each k step is followed by its share of another block's tail, or the last one by all of it."""
        steps = total_steps(self.runs)
        share = ceil(finish.count / steps) if steps >= WOVEN_STEPS else 0
        height, width = len(block.rows), block.panels
        size = total_steps(self.runs) * TILE_BYTES
        base = self._panel(block)
        signed = str(self.x.dtype) == "int8"
        for place in range(height * width):
            lane = block.image * self.lines.bias_image + (block.panel + place % width) * LANES
            tiles.load(place, self.bias, lane, 0)
        left, right = height * width, height * width + height
        for offset, at, step in self._steps():
            for row, source in enumerate(block.rows):
                tiles.load(left + row, self.x, source.source + offset, self.lines.x_position)
                for panel in range(width):
                    if row == 0:
                        tiles.load(right + panel, self.weights, base + panel * size + at, DEPTH)
                    tiles.dot(row * width + panel, left + row, right + panel, signed)
            if share:
                with loop(share) as part:
                    finish.emit(step * share + part)
        if not share:
            finish.emit_all()

    def _steps(self) -> Iterator[tuple[Any, Any, Any]]:
        """(source offset, weight offset, number) of each k step, inside the loops over them."""
        grid = _grid(self.runs)
        if grid is not None:
            (outer, inner), (far, near) = grid
            steps = self.runs[0].steps
            with loop(outer) as i, loop(inner) as j, loop(steps) as k:
                step = (i * inner + j) * steps + k
                yield self.runs[0].offset + i * far + j * near + k * DEPTH, step * TILE_BYTES, step
            return
        done = 0
        for run in self.runs:
            with loop(run.steps) as k:
                yield run.offset + k * DEPTH, (done + k) * TILE_BYTES, done + k
            done += run.steps


class _Finish:
    """The tail of one block in `count` groups of results, emitted one at a time, in any place and order.

    active: whether there is a block to finish; without one, `emit` does nothing at run time.
    """

    def __init__(self, product: TileProduct, scratch: Any, block: Block, active: Any) -> None:
        self._product, self._scratch, self._block = product, scratch, block
        self._code = product.tail
        self._lane = block.panel * LANES
        self._parameters = [self._code.load(self._lane + panel * LANES) for panel in range(block.panels)]
        self._together = 4 // block.panels if self._code.narrow and block.valid == LANES else 1
        self._each = ROWS // self._together
        self.count = self._each * len(block.rows)
        sizes = [T.truncdiv(rows.stop - rows.first + (self._together - 1), self._together) for rows in block.rows]
        self._sizes = [opaque(T.Select(active, size, 0)) for size in sizes]

    def emit_all(self) -> None:
        """Finishes and stores the whole block."""
        for tile, rows in enumerate(self._block.rows):
            with T.serial(0, self._sizes[tile]) as place:
                self._group(tile, place, rows)

    def emit(self, group: Any) -> None:
        """Finishes and stores group 0 .. count - 1; groups from count on are none."""
        tiles = self._block.rows
        if len(tiles) == 1:
            with T.If(group < self._sizes[0]), T.Then():
                self._group(0, group, tiles[0])
            return

        def of_tile(values: list[Any]) -> Any:
            return opaque(T.Select(tile > 0, values[1], values[0]))

        tile = opaque(T.truncdiv(group, self._each))
        place = opaque(group - tile * self._each)
        with T.If(T.And(tile < len(tiles), place < of_tile(self._sizes))), T.Then():
            fields = {name: of_tile([getattr(rows, name) for rows in tiles]) for name in ("start", "first", "stop", "base")}
            self._group(tile, place, _Rows(source=None, **fields))

    def _group(self, tile: Any, place: Any, rows: _Rows) -> None:
        """Group `place` of row tile `tile`."""
        product, block, code = self._product, self._block, self._code
        outputs = [bind(rows.first + place * self._together)]
        # Past the last result the group repeats it: the same bytes go to the same place.
        outputs += [bind(T.min(outputs[0] + index, rows.stop - 1)) for index in range(1, self._together)]
        values, offsets = [], []
        for output in outputs:
            row = opaque((product.lines.position(output) - rows.start + tile * (block.panels * ROWS)) * ROWS)
            offsets.append(bind((rows.base + output) * product.pitch + self._lane))
            values += [
                bind(self._scratch.vload([row + panel * (ROWS * ROWS)], f"int32x{LANES}")) for panel in range(block.panels)
            ]
        if self._together > 1:
            code.emit_four(values, self._parameters * self._together, offsets)
            return
        for panel, value in enumerate(values):
            code.emit(value, self._parameters[panel], offsets[0] + panel * LANES, block.valid)


def _grid(runs: tuple[Run, ...]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """((rows, columns), (offset of a row, of a column)) where runs of one length form a grid; otherwise each has its own code."""
    offsets = [run.offset - runs[0].offset for run in runs]
    if any(run.steps != runs[0].steps for run in runs):
        return None
    for rows in range(1, len(runs) + 1):
        columns, rest = divmod(len(runs), rows)
        if rest == 0:
            far, near = offsets[columns] if rows > 1 else 0, offsets[1] if columns > 1 else 0
            if offsets == [row * far + column * near for row in range(rows) for column in range(columns)]:
                return (rows, columns), (far, near)
    return None


@contextmanager
def _branches(condition: Any) -> Iterator[tuple[Any, Any]]:
    """Then and else of a condition; without one, the first alone."""
    if condition is None:
        yield nullcontext(), nullcontext()
        return
    with T.If(condition):
        yield T.Then(), T.Else()
