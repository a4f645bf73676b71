"""What a kernel generator asks of an instruction set: how many k steps one dot instruction takes, and how to write it in TIR.

Every level keeps LANES s32 accumulators a vector and reads weights packed as [panel][k / step][LANES][step], so one generator
serves them all:

    avx512-amx   avx512-vnni, and a tile unit that dense products use where it pays (`gemm_tiles`).
    avx512-vnni  step 4: vpdpbusd, u8 x s8 -> s32. s8 activations are read as u8 (x ^ 0x80, that is, x + 128).
    portable     step 1: widen and multiply; LLVM chooses the instructions (AVX2, AVX-512, NEON).

avx512-tiles and portable-tiles emulate the tile unit in plain loops: slow, for tests of the tiled kernels on any processor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tvm.tirx.script.builder import ir

from ....ir.errors import UnknownNameError
from .base import LANES
from .tile_unit import Amx, Emulation, TileUnit

#: TVM's builder functions; they take Python numbers where their annotations say Expr, so they are used untyped.
T: Any = ir


@dataclass(frozen=True)
class Isa:
    """One instruction-set level.

    step: k steps of a dot instruction. registers: vectors of LANES s32 that a register tile may use. avx512: kernels may call
    its intrinsics by name (saturating packs, conversions). tiles: a unit that multiplies tiles, for products it suits.
    """

    name: str
    step: int
    registers: int
    macs_per_us: int
    avx512: bool = False
    tiles: TileUnit | None = None

    @property
    def vnni(self) -> bool:
        """The dot instruction is vpdpbusd: four products a lane, and its activations are unsigned."""
        return self.avx512 and self.step == 4

    def shift(self, dtype: str) -> int:
        """What is added to a stored activation before the dot instruction sees it."""
        return 128 if self.vnni and dtype == "int8" else 0

    def activation(self, buffer: Any, offset: Any, flip: bool) -> Any:
        """`step` neighbouring bytes of one row, in every lane. flip: turn s8 into u8 on the way."""
        if not self.vnni:
            return T.Broadcast(T.Cast("int32", buffer.vload([offset])), LANES)
        word = T.reinterpret("int32", buffer.vload([offset], f"{buffer.dtype}x4"))
        lanes = T.Broadcast(word, LANES)
        if flip:
            lanes = lanes ^ T.Broadcast(T.int32(-0x7F7F7F80), LANES)  # 0x80808080
        return T.reinterpret(f"int8x{4 * LANES}", lanes)

    def weight(self, buffer: Any, offset: Any) -> Any:
        """One packed k step of one panel."""
        if self.vnni:
            return buffer.vload([offset], f"int8x{4 * LANES}")
        return T.Cast(f"int32x{LANES}", buffer.vload([offset], f"int8x{LANES}"))

    def dot(self, acc: Any, activation: Any, weight: Any) -> Any:
        if self.vnni:
            return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", acc, activation, weight)
        return acc + activation * weight


# 31 of 32 zmm registers: accumulators, the weights of one step and one broadcast activation.
_VNNI = Isa("avx512-vnni", step=4, registers=31, macs_per_us=200_000, avx512=True)
# 16 lanes are two ymm registers or four NEON q registers.
_PORTABLE = Isa("portable", step=1, registers=6, macs_per_us=20_000)

ISAS = {
    isa.name: isa
    for isa in (
        replace(_VNNI, name="avx512-amx", tiles=Amx()),
        _VNNI,
        _PORTABLE,
        replace(_VNNI, name="avx512-tiles", tiles=Emulation()),
        replace(_PORTABLE, name="portable-tiles", tiles=Emulation()),
    )
}


def isa_of(level: str) -> Isa:
    if level not in ISAS:
        raise UnknownNameError("kernel level", level, ISAS)
    return ISAS[level]
