"""Weights whose zeros are not stored: decoded, in the order a layer's kernel reads them, right before the layer.

The array that the kernel reads is cut into steps of LANES elements. A step has one bit an element, 2 bytes, and its elements that
are not zero lie behind those of the steps before:

    bits 1 0 0 1 1 0 ...      values a b c ...      ->      a 0 0 b c 0 ...

Steps come in chunks, which are decoded in parallel; `starts` says where the values of each chunk begin. With AVX-512 a step is
one vpexpandd (s8 values are widened on the way); elsewhere a loop without branches reads the next value at every element.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx

from .base import LANES
from .emit import arguments, bind, build, loop, parallel_kind, shuffle, splat, store
from .isa import T

#: Elements of a chunk.
CHUNK = 4096

#: The buffer of values is filled up to a multiple of the array's size over this: layers of one shape that are about as sparse
#: share their decoder, whose code is 2 KB.
GRAINS = 64

#: Elements a microsecond of one core, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = {"avx512": 4000, "portable": 700}


@dataclass(frozen=True)
class Stored:
    """An array of `shape` and `dtype` (int8 or float32), of which at most `entries` elements are not zero."""

    shape: tuple[int, ...]
    dtype: str
    entries: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def steps(self) -> int:
        return -(-self.size // LANES)

    @property
    def chunks(self) -> int:
        return -(-self.size // CHUNK)

    @property
    def work(self) -> str:
        return f"{self.entries} of {self.size}"


def pack(array: np.ndarray) -> tuple[Stored, list[np.ndarray]]:
    """What is stored of an array: its description, and starts, bits and values as `expand` reads them."""
    flat = array.reshape(-1)
    kept = np.zeros(-(-len(flat) // LANES) * LANES, bool)
    kept[: len(flat)] = flat != 0
    counts = np.add.reduceat(kept, np.arange(0, len(kept), CHUNK), dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    values = flat[flat != 0]
    bits = np.packbits(kept, bitorder="little").view(np.uint16)
    entries = max(-(-len(values) // (grain := -(-len(flat) // GRAINS))), 1) * grain
    return Stored(array.shape, str(array.dtype), entries), [starts, bits, np.pad(values, (0, entries - len(values)))]


def expand(stored: Stored, level: str) -> tirx.PrimFunc:
    """(starts s32 [chunks], bits u16 [steps], values [entries], Y of the stored shape and type), for a float level."""

    def body() -> None:
        named = [("starts", (stored.chunks,), "int32"), ("bits", (stored.steps,), "uint16")]
        named += [("values", (stored.entries,), stored.dtype), ("Y", stored.shape, stored.dtype)]
        starts, *buffers = arguments(*named)
        step = _Step(*buffers)
        full, rest = divmod(stored.size, LANES)
        with loop(stored.chunks, parallel_kind(stored.size / ELEMENTS_PER_US[level])) as chunk:
            step.begin(starts[chunk])
            first = bind(chunk * (CHUNK // LANES) + T.int32(0))
            count = full if stored.chunks == 1 else T.min(T.int32(CHUNK // LANES), T.int32(full) - first)
            with T.serial(0, count) as index:
                (step.vector if level == "avx512" else step.elements)(bind(first + index))
            if rest and stored.chunks == 1:
                step.elements(T.int32(full), rest)
            elif rest:
                with T.If(first + (CHUNK // LANES) > full), T.Then():
                    step.elements(T.int32(full), rest)

    return build("expand", body)


class _Step:
    """Decodes step after step of one chunk; `position` is where the next value lies."""

    def __init__(self, bits: Any, values: Any, y: Any) -> None:
        self.bits, self.values, self.y, self.dtype = bits, values, y, str(y.dtype)

    def begin(self, start: Any) -> None:
        self.position = T.alloc_buffer((1,), "int32")
        T.buffer_store(self.position, start, [0])

    def vector(self, step: Any) -> None:
        """By AVX-512's expansion. The values of a whole step are read: the last ones may lie in the slack behind the buffer."""
        position, word = bind(self.position[0]), bind(T.Cast("int32", self.bits[step]))
        lanes = splat(word) & shuffle([T.int32(1 << lane) for lane in range(LANES)], list(range(LANES)))
        mask = lanes > splat(T.int32(0))
        loaded = self.values.vload([position], f"{self.dtype}x{LANES}")
        wide = "float32" if self.dtype == "float32" else "int32"
        source = bind(loaded if wide == self.dtype else T.Cast(f"{wide}x{LANES}", loaded))
        zero = splat(T.float32(0.0) if wide == "float32" else T.int32(0))
        found = T.call_llvm_pure_intrin(f"{wide}x{LANES}", "llvm.x86.avx512.mask.expand", source, zero, mask)
        store(self.y, step * LANES, found if wide == self.dtype else T.Cast(f"{self.dtype}x{LANES}", found))
        T.buffer_store(self.position, position + T.popcount(word), [0])

    def elements(self, step: Any, count: int = LANES) -> None:
        """One value after the other, read whether it is stored or not."""
        word = bind(T.Cast("int32", self.bits[step]))
        integer = "int8" if self.dtype == "int8" else "int32"
        for lane in range(count):
            position, bit = bind(self.position[0]), bind((word >> T.int32(lane)) & T.int32(1))
            value = T.reinterpret(integer, self.values[position]) & T.Cast(integer, -bit)
            T.buffer_store(self.y, T.reinterpret(self.dtype, value), [step * LANES + lane])
            T.buffer_store(self.position, position + bit, [0])
