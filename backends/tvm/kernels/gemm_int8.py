"""The register-tiled u8/s8 x s8 -> s32 inner kernel that convolution, linear and matmul share; `tilings` chooses its blocking.

One task computes `rows` output pixels x `panels` * LANES output channels in registers:

    acc[r][p] = bias[p]
    for each k step:   w[p] = packed weights (one vector a panel);   acc[r][p] += dot(broadcast(x[r], step bytes), w[p])
    tail, store

`rows` + 1 loads serve `rows * panels` dot instructions, so the tile is as square as the register file allows (Goto and van de
Geijn, "Anatomy of high-performance matrix multiplication", 2008). The operand whose re-reading costs less is swept in the
inner loop: see `tilings.choose_tiling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import Any, ClassVar

import numpy as np

from .base import LANES
from .emit import bind, clamp_start, loop, parallel_kind, prefetch
from .isa import Isa, T
from .register_tile import Broadcast, register_tile

#: Fewer patches of rows are one block: the second one's first tile reads all weights anew.
LEAST_PATCHES = 8

#: What one core keeps in its first-level data cache, leaving room for the other streams.
L1_BYTES = 32 * 1024


@dataclass(frozen=True)
class Pixels:
    """Where GEMM rows lie: images x height x width rows, with element strides in the source; the output is row-major.

    A plain matrix is one image of height 1. *_image strides step the packed weights and bias of a batched product.
    pitch: elements from one output row to the next, of which `columns` are written (0: all of them).
    """

    images: int
    height: int
    width: int
    x_image: int
    x_row: int
    x_column: int
    pitch: int
    weight_image: int = 0
    bias_image: int = 0
    columns: int = 0

    @property
    def valid(self) -> int:
        return self.columns or self.pitch

    @property
    def rows(self) -> int:
        return self.images * self.height * self.width


@dataclass(frozen=True)
class Segment:
    """A run of panels computed with one register tile: tiles * panels panels from `start` on, patches of height x width rows."""

    start: int
    tiles: int
    panels: int
    height: int
    width: int

    def patches(self, pixels: Pixels) -> tuple[int, int]:
        return ceil(pixels.height / self.height), ceil(pixels.width / self.width)

    def count(self, pixels: Pixels) -> int:
        down, across = self.patches(pixels)
        return pixels.images * down * across * self.tiles


@dataclass(frozen=True)
class Tiling:
    """How a product is cut. rows_outer: a task order that keeps a patch of rows and sweeps the panels."""

    segments: tuple[Segment, ...]
    rows_outer: bool


def pack_panels(matrix: np.ndarray, isa: Isa) -> np.ndarray:
    """[K, N] s8 -> flat [N / LANES][K / step][LANES][step], both axes padded with zeros."""
    depth, columns = matrix.shape
    steps, panels = ceil(depth / isa.step), ceil(columns / LANES)
    full = np.zeros((steps * isa.step, panels * LANES), np.int8)
    full[:depth, :columns] = matrix
    return np.ascontiguousarray(full.reshape(steps, isa.step, panels, LANES).transpose(2, 0, 3, 1)).reshape(-1)


def fold_bias(weight: np.ndarray, bias: np.ndarray | None, zero_point: int) -> np.ndarray:
    """bias - zero_point * sum(weight), modulo 2^32 as the accumulator itself. weight s8 (O, ...)."""
    sums = weight.reshape(weight.shape[0], -1).astype(np.int64).sum(1)
    total = (0 if bias is None else bias.astype(np.int64)) - zero_point * sums
    return total.astype(np.int32)


@dataclass
class Product:
    """One product to emit. taps: (extent, source stride) of the outer k loops (kernel rows and columns); channels: inner k.

    tail: a `TailCode`, or what has its `load`, `emit`, `narrow` and `bytes`. origin: where x, weights, bias and output start, in
    elements.
    """

    isa: Isa
    pixels: Pixels
    taps: tuple[tuple[int, int], ...]
    channels: int
    x: Any
    flip: bool
    weights: Any
    bias: Any
    tail: Any
    origin: tuple[Any, Any, Any, Any] = (0, 0, 0, 0)
    #: What the tile being emitted fetches ahead of its use (`_ahead`).
    ahead: tuple[int, Any] | None = None

    #: Whether weights are read from memory as they are multiplied.
    streams: ClassVar[bool] = True

    @property
    def steps(self) -> int:
        return int(np.prod([extent for extent, _ in self.taps], dtype=np.int64)) * ceil(self.channels / self.isa.step)

    def emit(self, tiling: Tiling, kind: str | None = None) -> None:
        """Emits the whole product as one loop over all tiles of all segments, parallel where it pays or of the given kind."""
        pixels = self.pixels
        counts = [segment.tiles * prod(self._rows(tiling, segment)) for segment in tiling.segments]
        columns = sum(segment.tiles * segment.panels for segment in tiling.segments) * LANES
        work = pixels.rows * columns * self.steps * self.isa.step / self.isa.macs_per_us + pixels.rows * columns / 20_000
        with loop(sum(counts), kind or parallel_kind(work)) as task:
            self._dispatch(tiling, counts, task, 0)

    def _dispatch(self, tiling: Tiling, counts: list[int], task: Any, first: int) -> None:
        segment, rest = tiling.segments[first], tiling.segments[first + 1 :]
        if not rest:
            self._tile(tiling, segment, task)
            return
        with T.If(task < counts[first]):
            with T.Then():
                self._tile(tiling, segment, task)
            with T.Else():
                self._dispatch(tiling, counts, task - counts[first], first + 1)

    def _tile(self, tiling: Tiling, segment: Segment, task: Any) -> None:
        pixels = self.pixels
        down, across = segment.patches(pixels)
        patches = down * across
        place = 0
        if tiling.rows_outer:
            patch, tile = (task // segment.tiles, task % segment.tiles) if segment.tiles > 1 else (task, 0)
        else:
            blocks, total = self._rows(tiling, segment)
            block, rest = (task // (segment.tiles * total), task % (segment.tiles * total)) if blocks > 1 else (0, task)
            place, tile = (rest % total, rest // total) if total > 1 else (0, rest)
            patch = T.min(block * total + place, patches - 1) if blocks > 1 else place  # the blocks may count one patch too many
        image = patch // patches if pixels.images > 1 else 0
        patch = patch % patches if pixels.images > 1 else patch
        top = clamp_start(patch // across if down > 1 else 0, segment.height, pixels.height)
        left = clamp_start(patch % across if across > 1 else 0, segment.width, pixels.width)
        x_start, _, bias_start, y_start = self.origin
        x_base = bind(x_start + image * pixels.x_image + top * pixels.x_row + left * pixels.x_column + T.int32(0))
        y_base = bind(y_start + ((image * pixels.height + top) * pixels.width + left) * pixels.pitch + T.int32(0))
        panel = bind(tile * segment.panels + segment.start + T.int32(0))
        where = [(r // segment.width, r % segment.width) for r in range(segment.height * segment.width)]
        sources = [r * pixels.x_row + c * pixels.x_column for r, c in where]
        targets = [(r * pixels.width + c) * pixels.pitch for r, c in where]
        tile = register_tile(self.isa, len(where), segment.panels)
        for p in range(segment.panels):
            first = bias_start + image * pixels.bias_image + (panel + p) * LANES
            tile.start(p, lambda first=first: self.bias.vload([first], f"int32x{LANES}"))
        weight_base, panel_size = self._panel(image, panel)
        if self.streams and self.isa.vnni and not tiling.rows_outer and not pixels.weight_image:
            self.ahead = self._ahead(tiling, segment, place, weight_base, panel_size)
        self._accumulate(tile, sources, x_base, weight_base, panel_size)
        if self.tail.narrow and segment.panels in (2, 4):
            self._finish_side_by_side(
                tile, [self.tail.load((panel + p) * LANES) for p in range(segment.panels)], targets, y_base, panel
            )
            return
        for p in range(segment.panels):
            lane = (panel + p) * LANES
            parameters = self.tail.load(lane)
            valid = min(LANES, pixels.valid - (segment.start + p) * LANES) if segment.tiles == 1 else LANES
            values = [tile.value(row, p) for row in range(tile.rows)]
            offsets = [y_base + target + lane for target in targets]
            self._finish(values, parameters, offsets, valid)

    def _rows(self, tiling: Tiling, segment: Segment) -> tuple[int, int]:
        """(blocks of rows, patches of each): the order of tasks is block, tile of panels, patch.

        Two cores that share the panels both read every row, and half of what they read lies in the other core's cache, where
        the layer before wrote it; so does half of what the next layer reads of theirs. Two blocks of rows let each core keep to
        its own rows, for weights that both read instead. A byte from another core costs about two of weights.
        """
        pixels = self.pixels
        patches = segment.count(pixels) // segment.tiles
        source = pixels.height * pixels.x_row if pixels.height > 1 else pixels.width * pixels.x_column
        weights = sum(s.tiles * s.panels for s in tiling.segments) * LANES * self.steps * self.isa.step
        if tiling.rows_outer or pixels.images > 1 or source < L1_BYTES or patches < LEAST_PATCHES:
            return 1, patches
        moved = source + pixels.rows * pixels.valid * self.tail.bytes
        return (1, patches) if weights > 2 * moved else (2, ceil(patches / 2))

    def _panel(self, image: Any, panel: Any) -> tuple[Any, int]:
        """Where the weights of a panel start, and elements between panels."""
        size = self.steps * self.isa.step * LANES
        return bind(self.origin[1] + image * self.pixels.weight_image + panel * size), size

    def _finish_side_by_side(
        self, tile: Broadcast, parameters: list[tuple[Any, ...]], targets: list[int], y_base: Any, panel: Any
    ) -> None:
        """Tails of two or four full panels: a row's vectors are neighbours in memory, so one store takes them all."""
        panels = len(parameters)
        together = 4 // panels
        for first in range(0, tile.rows, together):
            rows = range(first, min(first + together, tile.rows))
            values = [tile.value(row, p) for row in rows for p in range(panels)]
            offsets = [y_base + targets[row] + panel * LANES for row in rows]
            missing = together - len(offsets)
            self.tail.emit_four(values + values[:panels] * missing, parameters * together, offsets + [None] * missing)

    def _finish(self, values: list[Any], parameters: tuple[Any, ...], offsets: list[Any], valid: int) -> None:
        """Tail of one panel: four rows at a time where the level can narrow them together."""
        if not self.tail.narrow or valid < LANES or len(values) == 1:
            for value, offset in zip(values, offsets, strict=True):
                self.tail.emit(value, parameters, offset, valid)
            return
        for first in range(0, len(values), 4):
            four, where = values[first : first + 4], offsets[first : first + 4]
            missing = 4 - len(four)
            self.tail.emit_four(four + four[:1] * missing, [parameters] * 4, where + [None] * missing)

    def _ahead(self, tiling: Tiling, segment: Segment, patch: Any, weight_base: Any, panel_size: int) -> tuple[int, Any]:
        """(lines a k step, first byte) that one patch asks for of the next panels' weights.

        While these panels are used from the second-level cache, all patches together bring the next ones there: hardware
        prefetch starts anew at every page. Patches that find nothing left ask for lines at hand; the last panels ask for what
        lies behind the weights, which is the next layer's.
        """
        tile = segment.panels * panel_size
        lines = ceil(segment.panels / self._rows(tiling, segment)[1])
        share = patch * (lines * panel_size)
        return lines, bind(weight_base + T.Select(share < tile, tile + share, 0))

    def _accumulate(self, tile: Broadcast, sources: list[int], x_base: Any, weight_base: Any, panel_size: int) -> None:
        isa = self.isa
        inner = ceil(self.channels / isa.step)
        whole, rest = divmod(inner, tile.steps)
        for part in range(tile.passes):
            with loop(self.taps[0][0]) as i, loop(self.taps[1][0]) as j:
                x_tap = bind(x_base + i * self.taps[0][1] + j * self.taps[1][1])
                weight_tap = bind(weight_base + (i * self.taps[1][0] + j) * (inner * isa.step * LANES))

                def multiply(k: Any, count: int, part=part, x_tap=x_tap, weight_tap=weight_tap) -> None:
                    size = tile.steps * isa.step
                    at = weight_tap + k * (size * LANES)
                    self._fetch(at - weight_base)
                    rows = [x_tap + source + k * size for source in sources]
                    tile.multiply(self, rows, at, panel_size, part, count)

                if whole:
                    with loop(whole) as k:
                        multiply(k, tile.steps)
                if rest:
                    multiply(whole, rest)
            tile.finish(part)

    def _fetch(self, done: Any) -> None:
        """Asks for the next panels' share of one k step, `done` elements into these."""
        if self.ahead is not None:
            lines, start = self.ahead
            for line in range(lines):
                prefetch(self.weights, start + done * lines + line * (self.isa.step * LANES))
