"""`gw::decode` of any weight into dense rows, for layers whose kernel takes no codes."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .....ir.dialect.codebook import groups_of
from ...kernels.schedule import te


def decode_rows(rows: int, count: int, bits: int, group: int, entries: int, zero: bool) -> tirx.PrimFunc:
    """(packed u8 [rows, bytes], table f32 [entries], scale f32 [rows, groups], zero u8 [rows, groups] if any,
    W f32 [rows, count]).
    """
    row_bytes, groups = -(-count * bits // 8), groups_of(count, group)
    packed = te.placeholder((rows, row_bytes), "uint8", name="packed")
    table = te.placeholder((entries,), "float32", name="table")
    scale = te.placeholder((rows, groups), "float32", name="scale")
    zeros = [te.placeholder((rows, groups), "uint8", name="zero")] if zero else []

    def value(row: Any, place: Any) -> Any:
        byte, shift = tirx.floordiv(place * bits, 8), tirx.floormod(place * bits, 8)
        code = packed(row, byte).astype("int32")
        if 8 % bits:
            # A code may end in the next byte; the last one of a row does not, and reads its own byte twice.
            after = packed(row, te.min(byte + 1, tirx.const(row_bytes - 1, "int32"))).astype("int32")
            code = code | tirx.shift_left(after, tirx.const(8, "int32"))
        if bits < 8:
            code = tirx.bitwise_and(tirx.shift_right(code, shift), tirx.const((1 << bits) - 1, "int32"))
        at = tirx.floordiv(place, group)
        entry = table(code)
        if zeros:
            entry = entry - zeros[0](row, at).astype("float32")
        return entry * scale(row, at)

    out = te.compute((rows, count), value, name="W")
    return te.create_prim_func([packed, table, scale, *zeros, out])
