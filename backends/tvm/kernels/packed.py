"""Weights of 2 to 7 bits inside kernels: stored as bit planes, unpacked by the task that is about to multiply with them.

A kernel's weights, in the order it reads them, are `units` (a panel, a block of channels) of vectors of 64 bytes. A code of b
bits is cut into pieces of 4, 2 and 1 bits (7 = 4 + 2 + 1, 6 = 4 + 2, 3 = 2 + 1), and one stored vector holds the pieces of 2, 4
or 8 neighbouring vectors, so that unpacking is whole vectors of and, shift and add on every instruction set:

    4 bits    stored byte l = code[0][l] | code[1][l] << 4               code[0] = s & 15, code[1] = s >> 4
    6 bits    2 vectors of 4-bit pieces and 1 of 2-bit pieces            code[j] = 4-bit piece j | 2-bit piece j << 4
              for every 4 vectors

value = code + lowest, where lowest is -2^(bits - 1), or one byte for each of the 64 lanes of a unit (`shifted`).

How a product unpacks depends on how often a value is used:

    all of it       once a task, where all weights stay in the first-level cache
    a tile          the tasks sweep the rows of one tile of columns: its panels are unpacked first, then used for many rows
    in registers    products of few rows (a classifier of one image): each value is used once, memory is what counts
    shared          tiles too large for a task's stack: a loop before the product unpacks into the program's arena
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, ClassVar

import numpy as np

from .base import LANES
from .emit import Argument, bind, loop, parallel_kind, prefetch, shuffle, splat, store
from .gemm_int8 import L1_BYTES, Product, Segment, Tiling
from .gemm_tiles import SIDE, Block, Part, TileProduct, choose_blocking, product_ns
from .isa import ISAS, Isa, T
from .register_tile import Broadcast
from .slices import once_a_slice

#: Bytes of a vector.
VECTOR = 64

#: Sizes of the pieces of a code, lowest bits first.
PIECES = (4, 2, 1)

#: A task's scratch for unpacked weights; larger ones are shared by all tasks.
MOST_SCRATCH = 512 * 1024

#: Buffers that are not larger may be stack slots of one iteration (`tasks.STACK_BYTES`), which no slice shares.
LEAST_SCRATCH = 1024 + VECTOR

#: Bytes unpacked in a microsecond, for the choice between serial and parallel.
UNPACK_BYTES = 20_000

#: Tasks that a product swept by tiles of columns should have, and the least patches of rows for which a tile is unpacked again.
TASKS, LEAST_PATCHES = 24, 8

#: How far ahead of its use a product of few rows asks for its weights, bytes.
AHEAD = 2048

#: Patches of rows up to which unpacking in registers moves less than it repeats.
FEW_PATCHES = 2


@dataclass(frozen=True)
class Packing:
    """How weights are stored. shifted: lowest values differ between channels (asymmetric encodings)."""

    bits: int
    shifted: bool = False

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(width for width in PIECES if self.bits & width)

    @property
    def group(self) -> int:
        """Vectors whose pieces fill whole stored vectors."""
        return 8 // self.widths[-1]

    def stored(self, count: int) -> int:
        """Stored vectors of `count` vectors."""
        return sum(ceil(count * width / 8) for width in self.widths)

    def pieces(self, count: int) -> Iterator[tuple[int, int, int, int, int]]:
        """(stored vector, its shift, vector, position of the piece in the code, width) of `count` vectors."""
        first, position = 0, 0
        for width in self.widths:
            for vector in range(count):
                yield first + vector * width // 8, vector * width % 8, vector, position, width
            first, position = first + ceil(count * width / 8), position + width


def packing_of(weight: np.ndarray, bits: int, by_channel: bool, level: str) -> Packing | None:
    """How the values of an encoding of `bits` are stored; None where plain bytes are as small.

    by_channel: whether the kernel's layout lets channels have lowest values of their own; where it does not, an asymmetric
    weight takes a bit more. Nor does it where a k step of the level fills several vectors: their lanes are other channels.
    """
    isa = ISAS.get(level)
    by_channel = by_channel and (isa is None or isa.step * LANES <= VECTOR)  # GPUs store plain bytes
    for width in (bits, bits + 1):
        half = 1 << (width - 1)
        if width < 8 and weight.min(initial=0) >= -half and weight.max(initial=0) < half:
            return Packing(width)
        if by_channel:
            return Packing(bits, shifted=True)
    return None


@dataclass(frozen=True)
class Storage:
    """The weights of a kernel: `count` units of `unit` s8 elements, each packed on its own; packing None: plain bytes."""

    unit: int
    count: int
    packing: Packing | None = None

    @property
    def vectors(self) -> int:
        """Of a unit."""
        return ceil(self.unit / VECTOR)

    @property
    def stride(self) -> int:
        """Elements between unpacked units."""
        return self.vectors * VECTOR if self.packing else self.unit

    @property
    def unit_bytes(self) -> int:
        """Stored bytes of a unit: lowest values, whole groups, and what is left."""
        if self.packing is None:
            return self.unit
        groups, rest = divmod(self.vectors, self.packing.group)
        whole = groups * self.packing.stored(self.packing.group)
        return (self.packing.shifted + whole + self.packing.stored(rest)) * VECTOR

    @property
    def argument(self) -> Argument:
        return "W", (self.count * self.unit_bytes,), "uint8" if self.packing else "int8"

    def pack(self, flat: np.ndarray) -> np.ndarray:
        """The units' s8 elements, one after another, as stored. Raises ValueError: a value that its packing cannot hold."""
        packing = self.packing
        if packing is None:
            return flat
        values = np.zeros((self.count, self.stride), np.int16)
        values[:, : self.unit] = flat.reshape(self.count, self.unit)
        values = values.reshape(self.count, self.vectors, VECTOR)
        lowest = values.min(1) if packing.shifted else np.full((self.count, VECTOR), -(1 << (packing.bits - 1)), np.int16)
        codes = values - lowest[:, None]
        if codes.min() < 0 or codes.max() >= 1 << packing.bits:
            raise ValueError(f"weights in [{values.min()}, {values.max()}] do not fit {packing}")
        codes = codes.astype(np.uint8)
        parts = [lowest.astype(np.int8).view(np.uint8)] if packing.shifted else []
        parts += [_planes(packing, codes[:, g : g + packing.group]) for g in range(0, self.vectors, packing.group)]
        return np.concatenate(parts, 1).reshape(-1)

    # -- code ----------------------------------------------------------------------------------------------------------------

    def lowest(self, weights: Any, start: Any) -> Any:
        """What the codes of the unit stored from byte `start` on count from, as s8 lanes."""
        assert self.packing is not None
        if not self.packing.shifted:
            return splat(T.int8(-(1 << (self.packing.bits - 1))), VECTOR)
        return bind(T.reinterpret(f"int8x{VECTOR}", weights.vload([start], f"uint8x{VECTOR}")))

    def groups(self) -> tuple[int, int]:
        """(whole groups, vectors left) of a unit."""
        assert self.packing is not None
        return divmod(self.vectors, self.packing.group)

    def values(self, weights: Any, start: Any, group: Any, count: int, lowest: Any) -> list[Any]:
        """`count` vectors of group number `group` of the unit stored from byte `start` on, s8 in registers."""
        packing = self.packing
        assert packing is not None
        at = bind(start + (group * packing.stored(packing.group) + int(packing.shifted)) * VECTOR)
        stored = [bind(weights.vload([at + s * VECTOR], f"uint8x{VECTOR}")) for s in range(packing.stored(count))]
        codes: list[Any] = [None] * count
        for source, shift, vector, position, width in packing.pieces(count):
            piece = _moved(stored[source], shift, position, width)
            codes[vector] = piece if codes[vector] is None else codes[vector] | piece
        return [bind(T.reinterpret(f"int8x{VECTOR}", code) + lowest) for code in codes]

    def unpack(self, weights: Any, unit: Any, scratch: Any, target: Any) -> None:
        """Unit number `unit` into `stride` elements of the scratch from `target` on."""
        assert self.packing is not None
        start = bind(unit * self.unit_bytes + T.int32(0))
        lowest = self.lowest(weights, start)
        groups, rest = self.groups()
        if groups:
            with T.serial(0, groups) as group:
                self._put(weights, start, group, self.packing.group, lowest, scratch, target)
        if rest:
            self._put(weights, start, groups, rest, lowest, scratch, target)

    def _put(self, weights: Any, start: Any, group: Any, count: int, lowest: Any, scratch: Any, target: Any) -> None:
        assert self.packing is not None
        at = bind(target + group * (self.packing.group * VECTOR) + T.int32(0))
        for index, value in enumerate(self.values(weights, start, group, count, lowest)):
            store(scratch, at + index * VECTOR, value, VECTOR)

    def scratch(self, units: int) -> Any:
        return T.alloc_buffer((max(units * self.stride, LEAST_SCRATCH),), "int8")

    def unpack_all(self, weights: Any, scratch: Any) -> None:
        with T.serial(0, self.count) as unit:
            self.unpack(weights, unit, scratch, unit * self.stride)

    def shared(self, weights: Any) -> Any:
        """All units in a scratch that every task reads, filled by a loop of its own; `weights` itself where nothing is packed."""
        if self.packing is None:
            return weights
        scratch = self.scratch(self.count)
        groups, rest = self.groups()
        each = groups + (rest > 0)
        with loop(self.count * each, parallel_kind(self.count * self.stride / UNPACK_BYTES)) as index:
            unit, group = bind(T.truncdiv(index, each) + T.int32(0)), bind(T.truncmod(index, each) + T.int32(0))
            start = bind(unit * self.unit_bytes)
            lowest = self.lowest(weights, start)
            target = bind(unit * self.stride)
            if not rest or not groups:
                self._put(weights, start, group, rest or self.packing.group, lowest, scratch, target)
                return scratch
            with T.If(group < groups):
                with T.Then():
                    self._put(weights, start, group, self.packing.group, lowest, scratch, target)
                with T.Else():
                    self._put(weights, start, groups, rest, lowest, scratch, target)
        return scratch


def _planes(packing: Packing, codes: np.ndarray) -> np.ndarray:
    """u8 (units, vectors, 64), at most a group of vectors -> u8 (units, stored bytes)."""
    stored = np.zeros((len(codes), packing.stored(codes.shape[1]), VECTOR), np.uint8)
    for source, shift, vector, position, width in packing.pieces(codes.shape[1]):
        stored[:, source] |= (codes[:, vector] >> position & (1 << width) - 1) << shift
    return stored.reshape(len(codes), -1)


def _moved(stored: Any, shift: int, position: int, width: int) -> Any:
    """Bits [shift, shift + width) of every byte, moved to `position`; all others zero."""
    distance = splat(T.uint8(abs(shift - position)), VECTOR)
    if shift > position:
        stored = T.shift_right(stored, distance)
    elif shift < position:
        stored = T.shift_left(stored, distance)
    if (shift == 8 - width and shift >= position) and position == 0:
        return stored  # a shift to the right brings zeros
    return stored & splat(T.uint8(((1 << width) - 1) << position), VECTOR)


# -- products on registers -----------------------------------------------------------------------------------------------------


def emit_product(product: Product, storage: Storage, tiling: Tiling) -> None:
    """Emits a product of `gemm_int8` whose weights are stored so, a panel in a unit."""
    if storage.packing is None:
        product.emit(tiling)
        return
    pixels = product.pixels
    columns = sum(segment.tiles * segment.panels for segment in tiling.segments) * LANES
    work = pixels.rows * columns * (product.steps * product.isa.step / product.isa.macs_per_us + 1 / 20_000)
    kind = parallel_kind(work + storage.count * storage.stride / UNPACK_BYTES)
    patches = max(_patches(product, segment) for segment in tiling.segments)
    if patches <= FEW_PATCHES and product.isa.neon is None and product.taps[0][0] == product.taps[1][0] == 1:
        InRegisters(**vars(product), storage=storage).emit(tiling, kind)
    elif kind == "parallel" and storage.count * storage.stride <= L1_BYTES:
        OnceATask(**vars(product), storage=storage).emit(tiling, kind)
    elif kind == "parallel" and max(segment.panels for segment in tiling.segments) * storage.stride <= MOST_SCRATCH:
        ByTiles(**vars(product), storage=storage).emit(tiling, kind)
    else:
        unpacked = replace(product, weights=storage.shared(product.weights))
        Unpacked(**vars(unpacked), storage=storage).emit(tiling, kind)


def _patches(product: Product, segment: Segment) -> int:
    return segment.count(product.pixels) // segment.tiles


@dataclass
class Unpacked(Product):
    """A product over unpacked panels."""

    storage: Storage = Storage(0, 0)

    streams: ClassVar[bool] = False

    def _panel(self, image: Any, panel: Any) -> tuple[Any, int]:
        return bind(panel * self.storage.stride), self.storage.stride


@dataclass
class OnceATask(Unpacked):
    """Each task unpacks all weights into a scratch of its own before its first tile."""

    def _dispatch(self, tiling: Tiling, counts: list[int], task: Any, first: int) -> None:
        if first == 0:
            scratch = self.storage.scratch(self.storage.count)
            with once_a_slice("before"):
                self.storage.unpack_all(self.weights, scratch)
            self.weights = scratch
        super()._dispatch(tiling, counts, task, first)


@dataclass
class ByTiles(Unpacked):
    """A task unpacks the panels of one tile of columns, then takes its share of the patches of rows."""

    def emit(self, tiling: Tiling, kind: str | None = None) -> None:
        tiling = replace(tiling, rows_outer=False)
        tiles = sum(segment.tiles for segment in tiling.segments)
        self._chunks = {s: max(1, min(_patches(self, s) // LEAST_PATCHES, ceil(TASKS / tiles))) for s in tiling.segments}
        self._stored = self.weights
        counts = [segment.tiles * self._chunks[segment] for segment in tiling.segments]
        with loop(sum(counts), kind or "parallel") as task:
            self.weights = self.storage.scratch(max(segment.panels for segment in tiling.segments))
            self._dispatch(tiling, counts, task, 0)

    def _tile(self, tiling: Tiling, segment: Segment, task: Any) -> None:
        storage, patches, chunks = self.storage, _patches(self, segment), self._chunks[segment]
        tile, chunk = bind(T.truncdiv(task, chunks) + T.int32(0)), bind(T.truncmod(task, chunks) + T.int32(0))
        first = bind(tile * segment.panels + segment.start)
        with T.serial(0, segment.panels) as place:
            storage.unpack(self._stored, first + place, self.weights, place * storage.stride)
        begin, end = bind(T.truncdiv(chunk * patches, chunks)), bind(T.truncdiv((chunk + 1) * patches, chunks))
        with T.serial(0, end - begin) as place:
            super()._tile(tiling, segment, tile * patches + begin + place)

    def _rows(self, tiling: Tiling, segment: Segment) -> tuple[int, int]:
        return 1, _patches(self, segment)

    def _panel(self, image: Any, panel: Any) -> tuple[Any, int]:
        return T.int32(0), self.storage.stride


@dataclass
class InRegisters(Unpacked):
    """Every tile unpacks its weights step by step. For products of one tap and few rows."""

    def _panel(self, image: Any, panel: Any) -> tuple[Any, int]:
        return bind(panel * self.storage.unit_bytes), self.storage.unit_bytes

    def _accumulate(self, tile: Broadcast, sources: list[int], x_base: Any, weight_base: Any, panel_size: int) -> None:
        storage, isa, packing = self.storage, self.isa, self.storage.packing
        assert packing is not None
        acc = tile.acc
        starts = [bind(weight_base + p * panel_size) for p in range(tile.panels)]
        lowest = [storage.lowest(self.weights, start) for start in starts]
        steps = VECTOR // (isa.step * LANES)  # of a vector

        def ahead(group: Any) -> None:
            """Hardware prefetch starts anew at every page; panels follow each other, so what comes after one is the next."""
            size = packing.stored(packing.group) * VECTOR
            for start in starts:
                for line in range(size // VECTOR):
                    prefetch(self.weights, start + group * size + (AHEAD + line * VECTOR))

        def add(group: Any, count: int) -> None:
            first = bind(x_base + group * (packing.group * steps * isa.step) + T.int32(0))
            values = [
                [bind(isa.activation(self.x, first + source + k * isa.step, self.flip)) for k in range(count * steps)]
                for source in sources
            ]
            for p, start in enumerate(starts):
                for v, vector in enumerate(storage.values(self.weights, start, group, count, lowest[p])):
                    for step in range(steps):
                        weight = bind(_step(isa, vector, step))
                        for row, activations in zip(acc, values, strict=True):
                            old = row[p].vload([0], f"int32x{LANES}")
                            store(row[p], 0, isa.dot(old, activations[v * steps + step], weight))

        groups, rest = storage.groups()
        if groups:
            with loop(groups) as group:
                ahead(group)
                add(group, packing.group)
        if rest:
            add(groups, rest)


def _step(isa: Isa, vector: Any, step: int) -> Any:
    """One k step of a vector of weights, as `Isa.weight` loads it."""
    size = isa.step * LANES
    if size == VECTOR:
        return vector
    return T.Cast(f"int32x{LANES}", shuffle([vector], list(range(step * size, (step + 1) * size))))


# -- products on tiles ---------------------------------------------------------------------------------------------------------


def emit_tiles(product: TileProduct, storage: Storage) -> None:
    """Emits a product of `gemm_tiles` whose weights are stored so, a panel in a unit."""
    usual = choose_blocking(product.lines, product.columns, product.runs, product.tail.tail)
    if storage.packing is None:
        product.emit(usual)
        return
    size = storage.count * storage.stride
    serial = parallel_kind(product_ns(product.lines, product.columns, product.runs, product.tail.tail) / 1000) != "parallel"
    if size <= L1_BYTES and not serial:
        TilesOnceATask(**vars(product), storage=storage).emit(usual)
    elif SIDE * storage.stride <= MOST_SCRATCH and not serial:
        by_columns = choose_blocking(product.lines, product.columns, product.runs, product.tail.tail, by_columns=True)
        TilesByColumns(**vars(product), storage=storage).emit(by_columns)
    else:
        replace(product, weights=storage.shared(product.weights)).emit(usual)


@dataclass
class TilesOnceATask(TileProduct):
    """Each task unpacks all weights into a scratch of its own before its first block."""

    storage: Storage = Storage(0, 0)

    def _begin(self) -> None:
        scratch = self.storage.scratch(self.storage.count)
        with once_a_slice("before"):
            self.storage.unpack_all(self.weights, scratch)
        self.weights = scratch


@dataclass
class TilesByColumns(TileProduct):
    """A task unpacks the panels of a block of columns, then sweeps the rows."""

    storage: Storage = Storage(0, 0)

    def _begin(self) -> None:
        self._stored, self.weights = self.weights, self.storage.scratch(SIDE)

    def _kept(self, part: Part, index: Any) -> None:
        first = bind(part.first + index * part.size + T.int32(0))
        with T.serial(0, part.size) as place:
            self.storage.unpack(self._stored, first + place, self.weights, place * self.storage.stride)

    def _panel(self, block: Block) -> Any:
        return T.int32(0)
