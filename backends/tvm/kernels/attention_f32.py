"""Float attention in one kernel: Y = softmax(scale Q K^T + mask) V for every head, without copies of Q, V or the scores' matrix.

    for head, panel of LANES keys:                       transpose the keys into lanes, times scale             (phase 1)
    for head, tile of `rows` queries:                                                                           (phase 2)
        S[rows][keys] = Q K^T + mask                     in a buffer that stays in the first-level cache; the largest of each row
        S = exp(S - largest), sum of each row
        Y[rows] = (S V) / sum                            divided once, after the product

Operands are read where they lie, such as inside the output of one projection to queries, keys and values; Y can be written in
the order the next projection reads. Scores are off by s = (width + 4) * 2^-23 * (scale * sum |q| |k| + |mask|) and their softmax
as in softmax_f32, so |y - exact| <= (2 s + (keys + 24 + largest score - score) * 2^-23) * sum p |v|; half-precision tensors are
widened as they are read, nothing between is rounded to half, and Y is, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, VECTOR, padded
from .emit import accumulator, arguments, bind, build, clamp_start, loop, parallel_kind, ramp, shuffle, splat, store
from .exact_float import constant
from .float_base import Level, Tile, choose_tile, fits, level_of, panel_widths, store_lanes
from .half import is_half, widened
from .isa import T
from .layer_norm_f32 import add_lanes
from .vector_math import exp_negative

#: Builds the load of an operand: (row or panel of the tile, step) -> scalar or vector.
Operand = Callable[[int, Any], Any]


@dataclass(frozen=True)
class Rows:
    """Where an operand's rows lie in a buffer of `size` floats: element d of row r of head h of image b at
    offset + b * image + h * head + r * row + d."""

    size: int
    offset: int
    image: int
    head: int
    row: int

    def at(self, image: Any, head: Any, row: Any = 0) -> Any:
        return image * self.image + head * self.head + row * self.row + self.offset


@dataclass(frozen=True)
class Attention:
    """width: of a query and of a key; value_width: of a value. mask: rows of `keys` floats added to the scores; a step of 0
    broadcasts. merged: Y is [batch, queries, heads, value_width] and not [batch, heads, queries, value_width]. dtype: of every
    tensor."""

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    value_width: int
    scale: float
    query: Rows
    key: Rows
    value: Rows
    mask: Rows | None = None
    merged: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if min(self.batch, self.heads, self.queries, self.keys, self.width, self.value_width) < 1:
            raise OptionError(f"attention: every extent must be at least 1, got {self}")

    @property
    def macs(self) -> int:
        return self.batch * self.heads * self.queries * self.keys * (self.width + self.value_width)

    @property
    def out(self) -> tuple[int, ...]:
        middle = (self.queries, self.heads) if self.merged else (self.heads, self.queries)
        return (self.batch, *middle, self.value_width)

    def out_rows(self) -> Rows:
        head, row = (1, self.heads) if self.merged else (self.queries, 1)
        size = self.heads * self.queries * self.value_width
        return Rows(self.batch * size, 0, size, head * self.value_width, row * self.value_width)


def attention(shape: Attention, level: str = "avx512") -> tirx.PrimFunc:
    """(Q [query.size], K [key.size], V [value.size], M [mask.size] if there is a mask, Y [shape.out]), of shape.dtype.

    A row is read in whole vectors: up to 60 bytes past the end of Q, K and V. Raises UnknownNameError for an unknown level.
    """
    chosen = level_of(level)

    def body() -> None:
        mask = [("M", (shape.mask.size,), shape.dtype)] if shape.mask else []
        operands = [(n, (r.size,), shape.dtype) for n, r in (("Q", shape.query), ("K", shape.key), ("V", shape.value))]
        q, k, v, *m, y = arguments(*operands, *mask, ("Y", shape.out, shape.dtype))
        packed = T.alloc_buffer((shape.batch * shape.heads * padded(shape.keys) * shape.width,), "float32")
        _pack_keys(shape, k, packed)
        tile = choose_tile(chosen, 1, shape.queries, padded(shape.value_width) // LANES, shape.keys)
        block = _Block(shape, chosen, tile, q, packed, v, m[0] if m else None, y)
        blocks = -(-shape.queries // tile.rows)
        microseconds = 3 * shape.macs / chosen.flops_per_us
        with loop(shape.batch * shape.heads * blocks, parallel_kind(microseconds)) as task:
            head = bind(T.floordiv(task, blocks))
            row = bind(clamp_start(bind(T.floormod(task, blocks)), tile.rows, shape.queries) + T.int32(0))
            block.emit(bind(T.floordiv(head, shape.heads)), bind(T.floormod(head, shape.heads)), row)

    return build("attention_f32", body, level)


def transpose(rows: list[Any]) -> list[Any]:
    """LANES vectors of LANES: interleaving the halves of the list log2(LANES) times moves element j of vector i to i of j."""
    orders = [[lane // 2 + half + (lane % 2) * LANES for lane in range(LANES)] for half in (0, LANES // 2)]
    for _ in range(LANES.bit_length() - 1):
        pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
        rows = [bind(shuffle([low, high], order)) for low, high in pairs for order in orders]
    return rows


def _pack_keys(shape: Attention, k: Any, packed: Any) -> None:
    """packed[image][head][panel][d][lane] = scale * key; lanes past the last key repeat it."""
    panels = padded(shape.keys) // LANES
    microseconds = shape.batch * shape.heads * shape.keys * shape.width / 8000
    with loop(shape.batch * shape.heads * panels, parallel_kind(microseconds)) as index:
        head, panel = bind(T.floordiv(index, panels)), bind(T.floormod(index, panels))
        image, head = bind(T.floordiv(head, shape.heads)), bind(T.floormod(head, shape.heads))
        keys = [T.min(panel * LANES + lane, shape.keys - 1) for lane in range(LANES)]
        starts = [bind(shape.key.at(image, head, key)) for key in keys]

        def part(d: Any, valid: int) -> None:
            lanes = transpose([bind(widened(k, start + d)) for start in starts])
            for i, vector in enumerate(lanes[:valid]):
                store(packed, (index * shape.width + d + i) * LANES, vector * constant(shape.scale))

        full, rest = divmod(shape.width, LANES)
        if full:
            with loop(full) as chunk:
                part(chunk * LANES, LANES)
        if rest:
            part(full * LANES, rest)


@dataclass(frozen=True)
class _Block:
    """Emits the attention of one tile of queries."""

    shape: Attention
    level: Level
    tile: Tile
    q: Any
    packed: Any
    v: Any
    mask: Any | None
    y: Any

    def emit(self, image: Any, head: Any, row: Any) -> None:
        shape, rows, pitch = self.shape, self.tile.rows, padded(self.shape.keys)
        scores = T.alloc_buffer((rows * pitch,), "float32")
        highest = [accumulator("float32") for _ in range(rows)]
        for lanes in highest:
            store(lanes, 0, constant(float("-inf")))
        widest = max(width for width in range(1, self.level.registers) if width == 1 or fits(self.level, Tile(rows, width)))
        queries = self._queries((image, head, row))
        full, rest = divmod(shape.keys, LANES)
        for first, count, width in panel_widths(full, widest):
            with loop(count) as index:
                self._scores(scores, highest, queries, (image, head, row), bind(index * width + T.int32(first)), width, LANES)
        if rest:
            self._scores(scores, highest, queries, (image, head, row), T.int32(full), 1, rest)
        inverse = self._powers(scores, highest)
        for first, count, width in panel_widths(padded(shape.value_width) // LANES, self.tile.groups):
            for index in range(count):
                self._values(scores, inverse, (image, head, row), first + index * width, width)

    def _multiply(
        self, acc: list[list[Any]], depth: int, left: Callable[[int, Any], Any], right: Callable[[int, Any], Any]
    ) -> None:
        """acc[i][j] = sum over step of left(i, step) * right(j, step)."""
        for row in acc:
            for total in row:
                store(total, 0, constant(0.0))
        with loop(depth) as step:
            vectors = [bind(right(j, step)) for j in range(len(acc[0]))]
            for i, row in enumerate(acc):
                value = splat(left(i, step))
                for total, vector in zip(row, vectors, strict=True):
                    store(total, 0, total.vload([0], VECTOR) + value * vector)

    def _queries(self, place: tuple[Any, Any, Any]) -> tuple[Any, Any, int]:
        """The tile's queries: (buffer, offset, distance of rows). Half precision is widened into a buffer of the task."""
        shape, (image, head, row) = self.shape, place
        base = bind(shape.query.at(image, head, row))
        if not is_half(self.q):
            return self.q, base, shape.query.row
        pitch = padded(shape.width)
        held = T.alloc_buffer((self.tile.rows * pitch,), "float32")
        with loop(self.tile.rows) as i, loop(pitch // LANES) as vector:
            store(held, i * pitch + vector * LANES, widened(self.q, base + i * shape.query.row + vector * LANES))
        return held, 0, pitch

    def _scores(
        self, scores: Any, highest: list[Any], rows: tuple[Any, Any, int], place: Any, panel: Any, width: int, valid: int
    ) -> None:
        """Scores of the tile's queries (`rows`: their buffer, first offset and step) and `width` panels of keys from `panel` on.

        Of the last panel `valid` keys are real.
        """
        shape, (image, head, row), pitch = self.shape, place, padded(self.shape.keys)
        acc = [[accumulator("float32") for _ in range(width)] for _ in highest]
        panels = (image * shape.heads + head) * (pitch // LANES) + panel
        queries, base, step = rows
        keys = bind(panels * (shape.width * LANES))
        self._multiply(
            acc,
            shape.width,
            lambda i, d: queries.vload([base + i * step + d]),
            lambda j, d: self.packed.vload([keys + (j * shape.width + d) * LANES], VECTOR),
        )
        for i, sums in enumerate(acc):
            for j, total in enumerate(sums):
                value = total.vload([0], VECTOR)
                if shape.mask is not None and self.mask is not None:
                    value = value + widened(self.mask, shape.mask.at(image, head, row + i) + (panel + j) * LANES)
                if valid < LANES:
                    value = T.Select(ramp(T.int32(0)) < splat(T.int32(valid)), value, constant(float("-inf")))
                value = bind(value)
                store(highest[i], 0, T.max(highest[i].vload([0], VECTOR), value))
                store(scores, i * pitch + (panel + j) * LANES, value)

    def _powers(self, scores: Any, highest: list[Any]) -> list[Any]:
        """Turns scores into exp(score - highest of the row). Returns 1 / sum of each row."""
        pitch = padded(self.shape.keys)
        largest = [splat(_largest(lanes)) for lanes in highest]
        sums = [accumulator("float32") for _ in highest]
        for total in sums:
            store(total, 0, constant(0.0))
        with loop(pitch // LANES) as panel:
            for i, total in enumerate(sums):
                start = i * pitch + panel * LANES
                power = exp_negative(scores.vload([start], VECTOR) - largest[i])
                power = bind(power)
                store(scores, start, power)
                store(total, 0, total.vload([0], VECTOR) + power)
        return [bind(splat(T.float32(1.0) / add_lanes([total]))) for total in sums]

    def _values(self, scores: Any, inverse: list[Any], place: tuple[Any, Any, Any], group: int, width: int) -> None:
        shape, (image, head, row), pitch = self.shape, place, padded(self.shape.keys)
        acc = [[accumulator("float32") for _ in range(width)] for _ in inverse]
        base = bind(shape.value.at(image, head) + T.int32(group * LANES))
        self._multiply(
            acc,
            shape.keys,
            lambda i, key: scores.vload([i * pitch + key]),
            lambda j, key: widened(self.v, base + key * shape.value.row + j * LANES),
        )
        rows = shape.out_rows()
        out = bind(rows.at(image, head, row) + T.int32(group * LANES))
        for i, sums in enumerate(acc):
            for j, total in enumerate(sums):
                valid = min(LANES, shape.value_width - (group + j) * LANES)
                result = total.vload([0], VECTOR) * inverse[i]
                store_lanes(self.y, out + i * rows.row + j * LANES, result, valid, level=self.level.name)


def _largest(lanes: Any) -> Any:
    """The largest lane of a vector; overwrites it."""
    width = LANES
    while width > 2:
        width //= 2
        store(lanes, 0, T.max(lanes.vload([0], f"float32x{width}"), lanes.vload([width], f"float32x{width}")), width)
    return bind(T.max(lanes.vload([0]), lanes.vload([1])))
