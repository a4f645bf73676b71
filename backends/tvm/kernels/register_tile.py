"""How a tile of rows x panels of s32 sums lies in registers, and what one k step does to it.

Broadcast   a vector of LANES sums for each row and panel; a step broadcasts `step` bytes of a row to all lanes
Dot         sdot: four vectors of 4 columns for each row; bytes [4 s, 4 s + 4) of 16 loaded ones are an operand by element
Matrix      smmla: eight 2 x 2 blocks for each two rows; a step zips eight bytes of both into one operand
Pairs       smull: a vector of partial sums for each row and column, which meet at the end; half a panel at a time

16 k of one panel        Dot                  Matrix                      Pairs
instructions a row       16 sdot + flip       8 smmla + 1 zip             16 (smull, smull2, 2 sadalp) + flip
products each            16                   32 (two rows)               8, and their sum
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar

from .base import LANES
from .emit import accumulator, bind, shuffle, splat, store
from .isa import Isa, T

if TYPE_CHECKING:
    from .gemm_int8 import Product

#: Bytes and s32 lanes of a q register, and those registers of LANES lanes.
Q, WORDS = 16, 4
QUARTERS = LANES // WORDS

_Q8, _Q32 = f"int8x{Q}", f"int32x{WORDS}"


class Broadcast:
    """Sums in whole vectors. The base of the others: rows x panels of sums, started from the bias.

    Attributes:
        steps: k steps that `multiply` takes at once. passes: times that the k loops run, each for a part of the panels.
    """

    steps: ClassVar[int] = 1
    passes: ClassVar[int] = 1

    def __init__(self, isa: Isa, rows: int, panels: int) -> None:
        self.isa, self.rows, self.panels = isa, rows, panels
        self.acc = [[accumulator() for _ in range(panels)] for _ in range(rows)]

    def start(self, panel: int, bias: Callable[[], Any]) -> None:
        """Starts the sums of one panel. bias: loads its LANES values."""
        value = bind(bias())
        for row in self.acc:
            store(row[panel], 0, value)

    def value(self, row: int, panel: int) -> Any:
        """The LANES sums of a row."""
        return bind(self.acc[row][panel].vload([0], f"int32x{LANES}"))

    def multiply(self, product: Product, rows: list[Any], at: Any, panel_size: int, part: int, count: int) -> None:
        """Adds `count` k steps of every row to pass number `part`.

        Args:
            rows: elements where the step's activations start. at: the step's first weight.
        """
        isa = self.isa
        weights = [bind(isa.weight(product.weights, at + p * panel_size)) for p in range(self.panels)]
        for row, source in zip(self.acc, rows, strict=True):
            value = bind(isa.activation(product.x, source, product.flip))
            for p, weight in enumerate(weights):
                store(row[p], 0, isa.dot(row[p].vload([0], f"int32x{LANES}"), value, weight))

    def finish(self, part: int) -> None:
        """After the last step of a pass."""


class Dot(Broadcast):
    """Sums in four q registers a row and panel: four columns each, four k steps of sdot from one load of a row."""

    steps = Q // 4

    def __init__(self, isa: Isa, rows: int, panels: int) -> None:
        self.isa, self.rows, self.panels = isa, rows, panels
        self.acc = [[quarters(QUARTERS) for _ in range(panels)] for _ in range(rows)]

    def start(self, panel: int, bias: Callable[[], Any]) -> None:
        value = bind(bias())
        for row in self.acc:
            for q, place in enumerate(row[panel]):
                store(place, 0, quarter(value, q), WORDS)

    def value(self, row: int, panel: int) -> Any:
        return joined([place.vload([0], _Q32) for place in self.acc[row][panel]])

    def multiply(self, product: Product, rows: list[Any], at: Any, panel_size: int, part: int, count: int) -> None:
        whole = count == self.steps
        loaded = [_row(product, row) for row in rows] if whole else []
        for step in range(count):
            values = [_lane(row, step) for row in loaded] or [_word(product, row + step * 4) for row in rows]
            for p in range(self.panels):
                for q in range(QUARTERS):
                    weight = bind(product.weights.vload([at + p * panel_size + (step * QUARTERS + q) * Q], _Q8))
                    for acc, value in zip(self.acc, values, strict=True):
                        sums = acc[p][q].vload([0], _Q32)
                        store(acc[p][q], 0, T.call_llvm_pure_intrin(_Q32, "llvm.aarch64.neon.sdot", sums, weight, value), WORDS)


class Matrix(Broadcast):
    """Sums of two rows by two columns in a q register. An odd last row is multiplied twice."""

    steps = Q // 8

    def __init__(self, isa: Isa, rows: int, panels: int) -> None:
        self.isa, self.rows, self.panels = isa, rows, panels
        self.acc = [[quarters(2 * QUARTERS) for _ in range(panels)] for _ in range(ceil(rows / 2))]

    def start(self, panel: int, bias: Callable[[], Any]) -> None:
        value = bind(bias())
        for pair in self.acc:
            for index, block in enumerate(pair[panel]):
                columns = [2 * index, 2 * index + 1]
                store(block, 0, shuffle([value], columns * 2), WORDS)

    def value(self, row: int, panel: int) -> Any:
        blocks = [bind(block.vload([0], _Q32)) for block in self.acc[row // 2][panel]]
        first = row % 2 * 2
        order = [first, first + 1, WORDS + first, WORDS + first + 1]
        return joined([shuffle(blocks[i : i + 2], order) for i in range(0, len(blocks), 2)])

    def multiply(self, product: Product, rows: list[Any], at: Any, panel_size: int, part: int, count: int) -> None:
        size = 8 * count
        dtype = str(product.x.dtype)
        loaded = [bind(product.x.vload([row], f"{dtype}x{size}")) for row in rows]
        loaded += loaded[-1:] * (len(rows) % 2)
        name = "llvm.aarch64.neon." + ("smmla" if dtype == "int8" else "usmmla")
        for step in range(count):
            order = [row * size + step * 8 + e for row in (0, 1) for e in range(8)]
            pairs = [bind(shuffle(loaded[i : i + 2], order)) for i in range(0, len(loaded), 2)]
            for p in range(self.panels):
                for index in range(2 * QUARTERS):
                    weight = bind(product.weights.vload([at + p * panel_size + (step * 2 * QUARTERS + index) * Q], _Q8))
                    for acc, pair in zip(self.acc, pairs, strict=True):
                        sums = acc[p][index].vload([0], _Q32)
                        store(acc[p][index], 0, T.call_llvm_pure_intrin(_Q32, name, sums, pair, weight), WORDS)


class Pairs(Broadcast):
    """Partial sums of 16 k in a q register for each row and column of half a panel.

    One product of two s8 values fits s16 and two need not ((-128)^2 twice), so each smull is followed by its sadalp.
    """

    passes = 2

    def __init__(self, isa: Isa, rows: int, panels: int) -> None:
        self.isa, self.rows, self.panels = isa, rows, panels
        self.half = LANES // self.passes
        self.acc = [quarters(self.half * panels) for _ in range(rows)]
        self.sums = [[quarters(QUARTERS) for _ in range(panels)] for _ in range(rows)]
        self.bias: list[Callable[[], Any]] = []

    def start(self, panel: int, bias: Callable[[], Any]) -> None:
        self.bias.append(bias)
        for row in self.acc:
            for column in range(self.half):
                store(row[panel * self.half + column], 0, splat(T.int32(0), WORDS), WORDS)

    def value(self, row: int, panel: int) -> Any:
        return bind(joined([place.vload([0], _Q32) for place in self.sums[row][panel]]) + self.bias[panel]())

    def multiply(self, product: Product, rows: list[Any], at: Any, panel_size: int, part: int, count: int) -> None:
        loaded = [_row(product, row) for row in rows]
        halves = [[_half(row, end) for end in (0, 1)] for row in loaded]
        for p in range(self.panels):
            for column in range(self.half):
                where = at + p * panel_size + (part * self.half + column) * Q
                weight = bind(product.weights.vload([where], _Q8))
                for acc, values in zip(self.acc, halves, strict=True):
                    place = acc[p * self.half + column]
                    for end in (0, 1):
                        wide = T.call_llvm_pure_intrin("int16x8", "llvm.aarch64.neon.smull", _half(weight, end), values[end])
                        pairs = T.call_llvm_pure_intrin(_Q32, "llvm.aarch64.neon.saddlp", wide)
                        store(place, 0, place.vload([0], _Q32) + pairs, WORDS)

    def finish(self, part: int) -> None:
        for row, acc in enumerate(self.acc):
            for p in range(self.panels):
                for q in range(self.half // WORDS):
                    first = p * self.half + q * WORDS
                    columns = [bind(acc[first + c].vload([0], _Q32)) for c in range(WORDS)]
                    pairs = [bind(_add_pairs(*columns[c : c + 2])) for c in (0, 2)]
                    store(self.sums[row][p][part * (self.half // WORDS) + q], 0, _add_pairs(*pairs), WORDS)
                    for c in range(WORDS):
                        store(acc[first + c], 0, splat(T.int32(0), WORDS), WORDS)


TILES: dict[str | None, type[Broadcast]] = {None: Broadcast, "sdot": Dot, "smmla": Matrix, "smull": Pairs}


def register_tile(isa: Isa, rows: int, panels: int) -> Broadcast:
    """The tile of an instruction-set level."""
    return TILES[isa.neon](isa, rows, panels)


def quarters(count: int) -> list[Any]:
    """`count` variables of one q register."""
    return [accumulator(lanes=WORDS) for _ in range(count)]


def quarter(vector: Any, index: int) -> Any:
    """WORDS lanes of a vector."""
    return shuffle([vector], list(range(index * WORDS, (index + 1) * WORDS)))


def joined(parts: list[Any]) -> Any:
    """One vector of the lanes of q registers."""
    return bind(shuffle(parts, list(range(len(parts) * WORDS))))


def column_sums(isa: Isa, packed: list[Any]) -> Any:
    """The sum over k of each of LANES columns, from the q registers of one packed k step of an AArch64 level."""
    if isa.neon == "smull":
        parts = packed
        for kind in ("int16x8", _Q32):
            parts = [T.call_llvm_pure_intrin(kind, "llvm.aarch64.neon.saddlp", part) for part in parts]
    else:
        ones, zero = splat(T.int8(1), Q), splat(T.int32(0), WORDS)
        parts = [T.call_llvm_pure_intrin(_Q32, "llvm.aarch64.neon.sdot", zero, part, ones) for part in packed]
    while len(parts) > QUARTERS:
        parts = [bind(_add_pairs(*pair)) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return joined(parts)


def interleaved(rows: list[Any]) -> list[Any]:
    """Vectors of Q bytes, a power of two of them -> as many whose bytes are those of lane 0 of every row, of lane 1, ..."""
    half = len(rows) // 2
    if not half:
        return rows
    for _ in range(half.bit_length()):
        rows = [zipped(rows[i], rows[i + half], end) for i in range(half) for end in (0, 1)]
    return rows


def zipped(a: Any, b: Any, end: int) -> Any:
    """zip1 (end 0) or zip2 (end 1) of bytes."""
    return bind(shuffle([a, b], [source + end * Q // 2 + e for e in range(Q // 2) for source in (0, Q)]))


def _half(vector: Any, end: int) -> Any:
    return shuffle([vector], list(range(end * (Q // 2), (end + 1) * (Q // 2))))


def _add_pairs(a: Any, b: Any) -> Any:
    """addp: sums of neighbours, of a and then of b."""
    return shuffle([a, b], list(range(0, 2 * WORDS, 2))) + shuffle([a, b], list(range(1, 2 * WORDS, 2)))


def _row(product: Product, offset: Any) -> Any:
    """16 activations of a row as s8."""
    value = product.x.vload([offset], f"{product.x.dtype}x{Q}")
    return bind(_flipped(value, Q) if product.flip else T.reinterpret(_Q8, value))


def _word(product: Product, offset: Any) -> Any:
    """Four activations of a row as s8, in every lane."""
    word = T.Broadcast(T.reinterpret("int32", product.x.vload([offset], f"{product.x.dtype}x4")), WORDS)
    if product.flip:
        word = word ^ splat(T.int32(-0x7F7F7F80), WORDS)  # 0x80808080
    return bind(T.reinterpret(_Q8, word))


def _lane(row: Any, step: int) -> Any:
    """Four of 16 activations in every lane: an operand by element."""
    return bind(T.reinterpret(_Q8, shuffle([T.reinterpret(_Q32, row)], [step] * WORDS)))


def _flipped(value: Any, lanes: int) -> Any:
    """u8 -> s8: x ^ 0x80 is x - 128."""
    return T.reinterpret(f"int8x{lanes}", value ^ splat(T.uint8(128), lanes))
