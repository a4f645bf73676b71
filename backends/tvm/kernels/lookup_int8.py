"""`gw::lookup`: a 256-entry table applied to every byte.

On AVX-512 the table is four registers of 32 words (two entries each); two `vpermi2w` fetch, for 32 bytes at once, the word that
holds each byte's entry from the lower and the upper half, and a shift picks the entry out of the word. That is some three
bytes a cycle on every AVX-512 BW processor, where a scalar loop does one. Other levels run the scalar loop.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import tirx

from . import elementwise_int8
from .emit import arguments, bind, build, clamp_start, loop, parallel_kind
from .isa import T

#: Bytes of one step: a register of words.
STEP = 32

#: Bytes a microsecond of one core, for the choice between a serial and a parallel loop.
BYTES_PER_US = 5000

WORDS = f"uint16x{STEP}"


def lookup(shape: tuple[int, ...], x_dtype: str, table_dtype: str, level: str) -> tirx.PrimFunc:
    """X u8 / s8 [shape], table [256] u8 / s8 -> Y [shape]. level: "avx512" or "portable"."""
    size = prod(shape)
    if level != "avx512" or size < STEP:
        return elementwise_int8.lookup(shape, x_dtype, table_dtype)

    def body() -> None:
        x, table, y = arguments(("X", shape, x_dtype), ("table", (256,), table_dtype), ("Y", shape, table_dtype))
        steps = -(-size // STEP)
        with loop(steps, parallel_kind(size / BYTES_PER_US)) as index:
            quarters = [bind(_words(table.vload([64 * i], f"{table_dtype}x64"))) for i in range(4)]
            # The last step is moved back to overlap its neighbour, so that no byte outside is touched.
            start = bind(clamp_start(index, STEP, size))
            code = T.Cast(WORDS, T.reinterpret(f"uint8x{STEP}", x.vload([start], f"{x_dtype}x{STEP}")))
            if x_dtype == "int8":
                code = code ^ _splat(128)  # the table starts at the lowest value, -128
            code = bind(code)
            entry = T.Cast(f"uint8x{STEP}", _fetch(quarters, code))
            T.buffer_store(y, T.reinterpret(f"{table_dtype}x{STEP}", entry), [T.Ramp(start, 1, STEP)])

    return build("lookup_int8", body)


def _fetch(quarters: list[Any], code: Any) -> Any:
    """The table entry of each code in the low byte of each word."""
    word = bind(code >> _splat(1))
    lower, upper = (_permute(quarters[i], word, quarters[i + 1]) for i in (0, 2))
    pair = bind(T.Select(code < _splat(128), lower, upper))
    return (pair >> ((code & _splat(1)) << _splat(3))) & _splat(255)


def _permute(low: Any, index: Any, high: Any) -> Any:
    """Word index & 63 of the 64 words low ++ high."""
    return T.call_llvm_pure_intrin(WORDS, "llvm.x86.avx512.vpermi2var.hi.512", low, index, high)


def _words(value: Any) -> Any:
    return T.reinterpret(WORDS, value)


def _splat(value: int) -> Any:
    return T.Broadcast(T.uint16(value), STEP)
