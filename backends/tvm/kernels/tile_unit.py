"""A unit that multiplies tiles: what the tiled product asks of it, AMX, and an emulation in plain loops.

A tile is 16 rows of 64 bytes. Operand A holds 16 rows of 64 consecutive k, operand B 64 k x 16 columns as [k / 4][16][4] (the
order of `pack_panels` on a level of step 4), the accumulator 16 rows x 16 columns of s32:

    acc[m][n] += sum over k of A[m][k] * B[k / 4][n][k % 4]

Rows are read where they lie, any distance apart, so an operand needs no copy; what lies past the last k is read too, and must
meet zero weights. The emulation runs on every processor: tests prove the generator with it where the unit is missing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from tvm.tirx.script.builder import ir

from .slices import once_a_slice

#: TVM's builder functions, untyped: see `isa`.
T: Any = ir

#: Rows of a tile, and columns of an accumulator.
ROWS = 16
#: Bytes of a row: the k that one dot instruction sums.
DEPTH = 64
#: Tiles of the unit.
TILES = 8

#: `ldtilecfg`'s 64 bytes as little-endian words: palette 1, and ROWS rows of DEPTH bytes for each of the TILES tiles.
_CONFIGURATION = (1, 0, 0x0040004000400040, 0x0040004000400040, 0, 0, 0x1010101010101010, 0)


class Tiles(Protocol):
    """Tiles 0 .. TILES - 1 of a unit that is ready; `TileUnit.task` gives them. Offsets and strides count elements."""

    def load(self, tile: int, buffer: Any, offset: Any, stride: int) -> None:
        """Reads an operand (8-bit buffer) or an accumulator (s32 buffer), one row every `stride` elements; 0 repeats one row."""
        ...

    def dot(self, acc: int, a: int, b: int, signed: bool) -> None:
        """acc += a b; b is s8, a is s8 where `signed`, else u8."""
        ...

    def store(self, tile: int, buffer: Any, offset: Any) -> None:
        """Writes an accumulator as a dense s32 [ROWS][ROWS]."""
        ...


class TileUnit(Protocol):
    @contextmanager
    def task(self) -> Iterator[Tiles]:
        """Emits what the body of a parallel loop needs before and after it uses tiles; `slices` moves it out of the loop."""
        ...


class Amx:
    """Intel's Advanced Matrix Extensions (Intel 64 architecture manual, volume 1, chapter 18), by LLVM's intrinsics.

    The process must hold the kernel's permission for the tile state (`backends.tvm.tiles`) or the first instruction faults.
    One configuration serves every product: ragged edges overlap instead of asking for smaller tiles.
    """

    @contextmanager
    def task(self) -> Iterator[Tiles]:
        with once_a_slice("before"):
            configuration = T.alloc_buffer((len(_CONFIGURATION),), "int64")
            for index, word in enumerate(_CONFIGURATION):
                T.buffer_store(configuration, T.int64(word), [index])
            _emit("ldtilecfg", T.address_of(configuration.vload([0])))
        yield self
        with once_a_slice("after"):
            _emit("tilerelease")  # idle tiles cost every context switch 8 KB and keep the core from its deeper sleep

    def load(self, tile: int, buffer: Any, offset: Any, stride: int) -> None:
        size = 4 if str(buffer.dtype) == "int32" else 1
        _emit("tileloadd64", T.uint8(tile), T.address_of(buffer.vload([offset])), T.int64(stride * size))

    def dot(self, acc: int, a: int, b: int, signed: bool) -> None:
        _emit("tdpbssd" if signed else "tdpbusd", T.uint8(acc), T.uint8(a), T.uint8(b))

    def store(self, tile: int, buffer: Any, offset: Any) -> None:
        _emit("tilestored64", T.uint8(tile), T.address_of(buffer.vload([offset])), T.int64(4 * ROWS))


def _emit(name: str, *arguments: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))


class Emulation:
    """The same tiles as arrays and loops."""

    @contextmanager
    def task(self) -> Iterator[Tiles]:
        yield _EmulatedTiles(
            [T.alloc_buffer((ROWS * DEPTH,), "uint8") for _ in range(TILES)],
            [T.alloc_buffer((ROWS * ROWS,), "int32") for _ in range(TILES)],
        )


class _EmulatedTiles:
    def __init__(self, operands: list[Any], accumulators: list[Any]) -> None:
        self._operands, self._accumulators = operands, accumulators

    def load(self, tile: int, buffer: Any, offset: Any, stride: int) -> None:
        if str(buffer.dtype) == "int32":
            with T.serial(0, ROWS) as m, T.serial(0, ROWS) as n:
                T.buffer_store(self._accumulators[tile], buffer.vload([offset + m * stride + n]), [m * ROWS + n])
            return
        with T.serial(0, ROWS) as m, T.serial(0, DEPTH) as k:
            value = buffer.vload([offset + m * stride + k])
            value = value if str(buffer.dtype) == "uint8" else T.reinterpret("uint8", value)
            T.buffer_store(self._operands[tile], value, [m * DEPTH + k])

    def dot(self, acc: int, a: int, b: int, signed: bool) -> None:
        target = self._accumulators[acc]
        with T.serial(0, ROWS) as m, T.serial(0, DEPTH // 4) as k, T.serial(0, ROWS) as n, T.serial(0, 4) as s:
            left = self._operands[a].vload([m * DEPTH + 4 * k + s])
            left = T.Cast("int32", T.reinterpret("int8", left) if signed else left)
            right = T.Cast("int32", T.reinterpret("int8", self._operands[b].vload([k * DEPTH + 4 * n + s])))
            T.buffer_store(target, target.vload([m * ROWS + n]) + left * right, [m * ROWS + n])

    def store(self, tile: int, buffer: Any, offset: Any) -> None:
        with T.serial(0, ROWS * ROWS) as index:
            T.buffer_store(buffer, self._accumulators[tile].vload([index]), [offset + index])
