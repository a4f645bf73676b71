"""Float 2-D convolution in the physical layout, dense or grouped, with fused bias, residual and activation.

Out[m, o] = act(residual[m, o] + bias[o] + sum over taps t, channels c of X[pixel(m, t), c] * W[t, c, o]), as a register-tiled
matrix product:

    for tile of `rows` outputs of one line, panel of `groups` vectors of output channels:     (one task of the parallel loop)
        acc[rows][groups] = bias
        for ky in the kernel rows inside the image, kx (unrolled), c:
            acc[i][j] += broadcast(X[pixel(i, ky, kx), c]) * W[group + j][ky, kx, c][0:LANES]
        Y[tile, panel] = act(acc + R[tile, panel])

A 1x1 convolution of stride 1 without padding has one line of N*H*W outputs. Grouped convolutions run as banded dense ones: a
vector of output channels reads the range of input channels that its conv groups cover, with zero weights outside each one's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Convolution, padded
from .emit import bind, build, clamp_start, loop, parallel_kind, prefetch, splat
from .float_base import (
    PLAIN,
    Buffers,
    FloatSpec,
    Tile,
    choose_tile,
    declare,
    fits,
    level_of,
    panel_widths,
)
from .half import NUMPY, stored_panels, weight_step
from .half_neon import scale_of, scaled_panels
from .isa import T
from .multiply import Sums, Weights
from .product_source import Source, Value, source_of
from .window import Segment, column_segments, kernel_rows

#: Inputs and outputs of one block of tiles, bytes: they stay in the second-level cache while the panels of weights pass by.
BLOCK_BYTES = 1024 * 1024

#: Two panels of weights up to this size stay in the second-level cache together.
PANEL_BYTES = 256 * 1024

#: Steps of the inner loop that a larger panel is read ahead.
AHEAD = 128


def band(shape: Convolution) -> tuple[int, Callable[[Any], Any]]:
    """(channels, start): a vector of output channels `group` reads input channels start(group) .. start(group) + channels - 1."""
    if shape.groups == 1:
        return shape.channels, lambda group: 0
    inputs, outputs = shape.channels // shape.groups, shape.filters // shape.groups
    starts, stops = [], []
    for first in range(0, shape.filters, LANES):
        last = min(first + LANES, shape.filters) - 1
        starts.append(first // outputs * inputs)
        stops.append((last // outputs + 1) * inputs)
    span = max(stop - start for start, stop in zip(starts, stops, strict=True))
    highest = shape.channels - span

    def start(group: Any) -> Any:
        first = group * LANES // outputs * inputs if isinstance(group, int) else T.floordiv(group * LANES, outputs) * inputs
        return min(first, highest) if isinstance(first, int) else T.min(first, highest)

    return span, start


def packed_weight_shape(shape: Convolution, dtype: str = "float32", chained: bool = False) -> tuple[int, int, int]:
    depth = shape.kernel[0] * shape.kernel[1] * padded(band(shape)[0], weight_step(dtype))
    return padded(shape.filters) // LANES, depth + chained, LANES


def pack_weight(shape: Convolution, weight: np.ndarray, dtype: str = "float32", chained: bool = False) -> np.ndarray:
    """(O, C / groups, KH, KW) -> [O / LANES, KH * KW * band, LANES], zeros where a lane reads no such channel.

    chained: behind one row of scales, see `half_neon.scaled_panels`.
    """
    expected = (shape.filters, shape.channels // shape.groups, *shape.kernel)
    if weight.shape != expected:
        raise OptionError(f"convolution weight: expected shape {expected}, got {weight.shape}")
    span, start = band(shape)
    inputs, outputs = shape.channels // shape.groups, shape.filters // shape.groups
    packed = np.zeros((padded(shape.filters) // LANES, *shape.kernel, span, LANES), np.float32)
    taps = weight.astype(np.float32).transpose(0, 2, 3, 1)
    if shape.groups == 1:
        full = np.zeros((padded(shape.filters), *shape.kernel, span), np.float32)
        full[: shape.filters] = taps
        packed[:] = full.reshape(-1, LANES, *shape.kernel, span).transpose(0, 2, 3, 4, 1)
    else:
        for filter_ in range(shape.filters):
            first = filter_ // outputs * inputs - start(filter_ // LANES)
            packed[filter_ // LANES, :, :, first : first + inputs, filter_ % LANES] = taps[filter_]
    panels = np.ascontiguousarray(packed.reshape(packed_weight_shape(shape)))
    return scaled_panels(panels) if chained else stored_panels(panels, span, dtype)


def pack_bias(filters: int, bias: np.ndarray | None) -> np.ndarray:
    """(O,) or None -> [padded(O)], zeros in the padding."""
    packed = np.zeros(padded(filters), np.float32)
    if bias is not None:
        packed[:filters] = bias
    return packed


def convolution(shape: Convolution, spec: FloatSpec = PLAIN, planar_input: bool = False) -> tirx.PrimFunc:
    """(X [N, H, W, Cp], W packed, bias [Op], Y [N, OH, OW, Op]); lanes of Y past O hold anything.

    planar_input: X is dense [N, C, H, W] instead, as a network's input is; the first layer then needs no change of layout.

    Raises:
        OptionError: the tile does not fit the register file. UnknownNameError: unknown level.
    """

    interleaved = (shape.batch, shape.height, shape.width, padded(shape.channels))
    x_shape = (shape.batch, shape.channels, shape.height, shape.width) if planar_input else interleaved
    outputs = padded(shape.filters)

    def body() -> None:
        y_shape = (shape.batch, shape.out_height, shape.out_width, outputs)
        buffers = declare(spec, x_shape, packed_weight_shape(shape, spec.dtype, spec.chained), outputs, y_shape)
        pointwise = shape.kernel == (1, 1) == shape.stride and not shape.bordered and not planar_input
        pixels = shape.batch * shape.height * shape.width
        lines = replace(shape, batch=1, height=1, width=pixels) if pointwise else shape
        strides = (1, shape.height * shape.width) if planar_input else (padded(shape.channels), 1)
        emit_product(Product(lines, *strides, outputs, spec), buffers)

    return build("convolution_f32", body, spec.level)


@dataclass(frozen=True)
class Product:
    """A convolution with the strides of its operands, in elements.

    x_pixel, x_channel: from one pixel, one channel of X to the next. y_row: elements of an output pixel; where it is less than
    padded(filters), the last vector is stored in part. batched: one weight for each image, as in a batch of matrix products; it
    is float32 whatever the type of X and Y.
    """

    shape: Convolution
    x_pixel: int
    x_channel: int
    y_row: int
    spec: FloatSpec
    batched: bool = False

    @property
    def groups(self) -> int:
        return padded(self.shape.filters) // LANES

    @property
    def x_image(self) -> int:
        pixels = self.shape.height * self.shape.width
        return pixels * self.shape.channels if self.x_channel != 1 else pixels * self.x_pixel

    @property
    def weights(self) -> Weights:
        return self.spec.weights(planar=self.x_channel != 1, batched=self.batched)

    @property
    def tap(self) -> int:
        """Channels of one tap, as its weights are stored."""
        return padded(band(self.shape)[0], self.weights.step)

    @property
    def depth(self) -> int:
        return self.shape.kernel[0] * self.shape.kernel[1] * self.tap

    @property
    def scaled(self) -> bool:
        """A row of scales stands before each panel of weights."""
        return self.spec.chained and not self.batched

    @property
    def panel(self) -> int:
        """Elements of one panel of weights."""
        return (self.depth + self.scaled) * LANES

    def tile(self) -> Tile:
        """The register tile asked for, or the best one, cut down to the shape."""
        shape, tile = self.shape, self.spec.tile
        level = self.spec.machine_of(self.weights)
        # A banded (grouped) product gives each vector its own channels, so neighbouring vectors share no broadcast value.
        most = self.groups if shape.groups == 1 else 1
        if tile is None:
            tile = choose_tile(level, shape.batch * shape.out_height, shape.out_width, most, self.depth)
        tile = Tile(min(tile.rows, shape.out_width), min(tile.groups, most))
        if not fits(level, tile):
            raise OptionError(f"{tile} needs more than the {level.registers} vector registers of level {level.name}")
        return tile


def emit_product(product: Product, buffers: Buffers) -> None:
    """Emits the whole loop nest."""
    shape, tile = product.shape, product.tile()
    tiles_per_line = -(-shape.out_width // tile.rows)
    line_tiles = shape.batch * shape.out_height * tiles_per_line
    segments = column_segments(shape, tile.rows)
    source = source_of(product, buffers.x, segments)

    def task(line_tile: Any, group: Any, width: int, valid: int) -> None:
        xt = bind(T.floormod(line_tile, tiles_per_line))
        oy = bind(T.floormod(T.floordiv(line_tile, tiles_per_line), shape.out_height))
        image = bind(T.floordiv(line_tile, tiles_per_line * shape.out_height))
        column = bind(clamp_start(xt, tile.rows, shape.out_width))

        def segment_code(segment: Segment) -> Callable[[], None]:
            panel = Panel(tile.rows, width, valid)
            return lambda: _tile(product, segment, buffers, source, (image, oy, column, line_tile), group, panel)

        _switch(xt, [(segment.first + segment.count, segment_code(segment)) for segment in segments])

    floats = tile.rows * (shape.channels * shape.stride[0] * shape.stride[1] + product.y_row)
    block = max(1, BLOCK_BYTES // (4 * floats))
    _tasks(product, line_tiles, block, tile.groups, task, source)


@dataclass(frozen=True)
class Panel:
    """rows x width accumulators; `valid` lanes of the last vector are stored."""

    rows: int
    width: int
    valid: int


def _tasks(
    product: Product, line_tiles: int, block: int, width: int, task: Callable[[Any, Any, int, int], None], source: Source
) -> None:
    """One flat parallel loop over (block of tiles, panel, tile): each thread's share is contiguous and reuses its panel."""
    blocks = -(-line_tiles // min(block, line_tiles))
    block = -(-line_tiles // blocks)
    rest = product.y_row - (product.groups - 1) * LANES
    runs: list[tuple[int, int, int, int]] = []
    for first, panels, groups in panel_widths(product.groups, width):
        partial = rest < LANES and first + panels * groups == product.groups
        if partial and panels > 1:
            runs += [(first, panels - 1, groups, LANES), (first + (panels - 1) * groups, 1, groups, rest)]
        else:
            runs.append((first, panels, groups, rest if partial else LANES))
    panels = sum(run[1] for run in runs)
    microseconds = 2 * product.shape.out_width * product.shape.out_height * product.shape.batch
    microseconds *= product.depth * product.groups * LANES / level_of(product.spec.level).flops_per_us
    with loop(blocks * panels * block, parallel_kind(microseconds)) as index:
        source.allocate()
        panel = bind(T.floormod(T.floordiv(index, block), panels))
        line_tile = bind(T.floordiv(index, block * panels) * block + T.floormod(index, block))

        def run_code(first: int, groups: int, valid: int, before: int) -> Callable[[], None]:
            return lambda: task(line_tile, first + (panel - before) * groups, groups, valid)

        cases, before = [], 0
        for first, count, groups, valid in runs:
            cases.append((before + count, run_code(first, groups, valid, before)))
            before += count
        if blocks * block == line_tiles:
            _switch(panel, cases)
        else:
            with T.If(line_tile < line_tiles), T.Then():
                _switch(panel, cases)


def _switch(index: Any, cases: list[tuple[int, Callable[[], None]]]) -> None:
    """Runs the first case whose bound is above `index`."""
    (bound, code), *others = cases
    if not others:
        code()
        return
    with T.If(index < bound):
        with T.Then():
            code()
        with T.Else():
            _switch(index, others)


def _ahead(product: Product, panel: Panel, line_tile: Any, weight_base: Any) -> list[Any]:
    """Where the weights start that a tile asks for while it works: a layer's weights come from behind the second-level cache once
    a run, and a processor's own prefetching stops at every page.

    Each tile takes one vector of the next panel, so that its panel's tiles share the traffic; where two panels do not fit the
    cache together, it takes the vectors of its own panel AHEAD steps on.
    """
    size = product.panel
    if panel.width * size * (4 if product.batched else np.dtype(NUMPY[product.spec.dtype]).itemsize) > PANEL_BYTES:
        return [weight_base + j * size + AHEAD * LANES for j in range(panel.width)]
    return [bind(weight_base + (panel.width + T.floormod(line_tile, panel.width)) * size)]


def _tile(
    product: Product,
    segment: Segment,
    buffers: Buffers,
    source: Source,
    place: tuple[Any, Any, Any, Any],
    group: Any,
    panel: Panel,
) -> None:
    shape, (image, oy, column, line_tile) = product.shape, place
    span, start = band(shape)
    group = bind(group)
    acc = [[product.weights.sums() for _ in range(panel.width)] for _ in range(panel.rows)]
    for j in range(panel.width):
        first = splat(T.float32(0.0)) if product.scaled else buffers.first(group + j)
        for row in acc:
            row[j].start(first)
    panel_base = group * product.panel
    if product.batched:
        panel_base = panel_base + image * (product.groups * product.panel)
    panel_base = bind(panel_base)
    weight_base = bind(panel_base + LANES) if product.scaled else panel_base
    out = bind(((image * shape.out_height + oy) * shape.out_width + column) * product.y_row + group * LANES)
    if buffers.residual is not None:
        # Read at the very end, with nothing left to do meanwhile: ask for it now.
        for i in range(panel.rows):
            for j in range(panel.width):
                prefetch(buffers.residual, out + (i * product.y_row + j * LANES))
    vectors = product.spec.level.startswith("avx512")
    ahead = _ahead(product, panel, line_tile, weight_base) if panel.rows > 1 and vectors else None
    steps = _Steps(product, buffers.w, acc, weight_base, ahead)
    low, high = kernel_rows(shape, oy)
    with loop(shape.kernel[0]) if isinstance(low, int) else T.serial(low, high) as ky:
        line = (oy * shape.stride[0] + ky * shape.dilation[0] - shape.padding[0]) * shape.width
        for first_kx, taps, rows in segment.runs():

            def base(tap: Any, line: Any = line, first_kx: int = first_kx) -> Any:
                pixel = line + column * shape.stride[1] + ((first_kx + tap) * shape.dilation[1] - shape.padding[1])
                return image * product.x_image + pixel * product.x_pixel + start(group) * product.x_channel

            for first, channels in source.chunks(span):
                read = source.read(base, taps, rows, first, channels)
                count, width = (1, taps * channels) if source.joins_taps else (taps, channels)
                with loop(count) as tap:
                    value = read(tap)
                    w_base = bind(weight_base + (ky * shape.kernel[1] + first_kx + tap) * (product.tap * LANES) + first * LANES)
                    steps.emit(value, rows, w_base, width, unrolled=source.joins_taps)
    _store(product, buffers, acc, group, panel_base, out, panel)


def _store(
    product: Product, buffers: Buffers, acc: list[list[Sums]], group: Any, panel_base: Any, out: Any, panel: Panel
) -> None:
    """Finishes a tile. Scaled sums have begun at zero: their scale comes first, and then the bias."""
    columns = range(panel.width) if product.scaled else ()
    scales = [(scale_of(buffers.w, panel_base + j * product.panel), buffers.first(group + j)) for j in columns]
    for i, row in enumerate(acc):
        for j, sums in enumerate(row):
            valid = panel.valid if j == panel.width - 1 else LANES
            value = sums.value() * scales[j][0] + scales[j][1] if scales else sums.value()
            buffers.finish(product.spec, value, out + (i * product.y_row + j * LANES), valid)


@dataclass(frozen=True)
class _Steps:
    """The inner loop over channels: acc[i][j] += value(i, channel) * W[j][channel]."""

    product: Product
    w: Any
    acc: list[list[Sums]]
    weight_base: Any
    ahead: list[Any] | None

    def emit(self, value: Value, rows: list[int], w_base: Any, channels: int, unrolled: bool) -> None:
        turn = self.product.weights.turn
        full, rest = divmod(channels, turn)
        if unrolled:
            for index in range(full):
                self._turn(value, rows, w_base, index * turn, turn)
        elif full:
            with loop(full) as index:
                self._turn(value, rows, w_base, index * turn, turn)
        if rest:
            self._turn(value, rows, w_base, full * turn, rest)

    def _turn(self, value: Value, rows: list[int], w_base: Any, channel: Any, channels: int) -> None:
        """channels: how many of a turn count."""
        size = self.product.panel
        vectors = [w_base + channel * LANES + j * size for j in range(len(self.acc[0]))]
        for vector in self.ahead or ():
            prefetch(self.w, vector + (w_base - self.weight_base) + channel * LANES)
        sums = {i: self.acc[i] for i in rows}
        self.product.weights.multiply(sums, self.w, vectors, lambda i, c: value(i, channel + c, channels), channels)
