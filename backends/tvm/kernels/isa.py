"""What a kernel generator asks of an instruction set: how many k steps one dot instruction takes, and how to write it in TIR.

Every level computes panels of LANES columns and reads weights packed as [panel][k / step][LANES][step], so one generator serves
them all; `register_tile` says how a tile of them lies in registers:

    avx512-amx   avx512-vnni, and a tile unit that dense products use where it pays (`gemm_tiles`).
    avx512-vnni  step 4: vpdpbusd, u8 x s8 -> s32. s8 activations are read as u8 (x ^ 0x80, that is, x + 128).
    i8mm         step 8: smmla and usmmla, two rows by two columns by eight k: AArch64 with FEAT_I8MM.
    dotprod      step 4: sdot by element, s8 x s8 -> s32: FEAT_DotProd. u8 activations are read as s8 (x ^ 0x80, or x - 128).
    neon         step 16: smull and sadalp, sums of neighbouring products, s8 x s8: every AArch64 core.
    portable     step 1: widen and multiply; LLVM chooses the instructions (AVX2, AVX-512, NEON).

avx512-tiles and portable-tiles emulate the tile unit in plain loops: slow, for tests of the tiled kernels on any processor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

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
    rows: of a register tile of one panel, of two, ...; empty where `registers` tells. operand: the only type of activations
    that the dot instruction reads. neon: the instruction of an AArch64 level.
    """

    name: str
    step: int
    registers: int
    macs_per_us: int
    avx512: bool = False
    tiles: TileUnit | None = None
    rows: tuple[int, ...] = ()
    operand: str | None = None
    neon: Literal["smull", "sdot", "smmla"] | None = None

    @property
    def vnni(self) -> bool:
        """The dot instruction is vpdpbusd: four products a lane, and its activations are unsigned."""
        return self.avx512 and self.step == 4

    @property
    def panels(self) -> int:
        """Of the widest register tile."""
        return len(self.rows) or self.registers - 2

    def most_rows(self, panels: int) -> int:
        """Rows of a register tile that leave registers for the weights of one step and one activation."""
        return self.rows[panels - 1] if self.rows else (self.registers - 1 - panels) // panels

    def shift(self, dtype: str) -> int:
        """What is added to a stored activation before the dot instruction sees it."""
        if self.operand in (None, dtype):
            return 0
        return 128 if self.operand == "uint8" else -128

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
_VNNI = Isa("avx512-vnni", step=4, registers=31, macs_per_us=200_000, avx512=True, operand="uint8")
# 16 lanes are two ymm registers or four NEON q registers.
_PORTABLE = Isa("portable", step=1, registers=6, macs_per_us=20_000)
# 32 q registers of 4 lanes. A tile also holds 16 k of each row, so that one load and one flip serve 4 steps of sdot (2 of smmla,
# whose two rows are zipped together, 1 of smull).
_NEON = {
    "i8mm": Isa("i8mm", step=8, registers=8, macs_per_us=150_000, rows=(6,), neon="smmla"),
    "dotprod": Isa("dotprod", step=4, registers=8, macs_per_us=50_000, rows=(5,), operand="int8", neon="sdot"),
    "neon": Isa("neon", step=16, registers=8, macs_per_us=12_000, rows=(2,), operand="int8", neon="smull"),
}

ISAS = {
    isa.name: isa
    for isa in (
        replace(_VNNI, name="avx512-amx", tiles=Amx()),
        _VNNI,
        *_NEON.values(),
        _PORTABLE,
        replace(_VNNI, name="avx512-tiles", tiles=Emulation()),
        replace(_PORTABLE, name="portable-tiles", tiles=Emulation()),
    )
}


def isa_of(level: str) -> Isa:
    if level not in ISAS:
        raise UnknownNameError("kernel level", level, ISAS)
    return ISAS[level]
