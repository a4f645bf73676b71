"""`gw::decode` of any weight into dense rows, in plain loops: for layers whose kernel takes no codes."""

from __future__ import annotations

from tvm import tirx

from ....ir.dialect.codebook import groups_of
from .emit import arguments, bind, build, loop, parallel_kind
from .isa import T

#: Weights a microsecond of one core, for the choice between a serial and a parallel loop.
WEIGHTS_PER_US = 500


def decode_rows(rows: int, count: int, bits: int, group: int, entries: int, zero: bool) -> tirx.PrimFunc:
    """(packed u8 [rows, bytes], table f32 [entries], scale f32 [rows, groups], zero u8 [rows, groups] if any,
    W f32 [rows, count]).

    A code that ends in the byte after its first is read with it; the last row's may lie in the slack behind the buffer.
    """
    row_bytes, groups = -(-count * bits // 8), groups_of(count, group)

    def body() -> None:
        grid = (rows, groups)
        zeros = [("zero", grid, "uint8")] if zero else []
        named = [("packed", (rows, row_bytes), "uint8"), ("table", (entries,), "float32"), ("scale", grid, "float32"), *zeros]
        packed, table, scale, *rest, out = arguments(*named, ("W", (rows, count), "float32"))
        with loop(rows, parallel_kind(rows * count / WEIGHTS_PER_US)) as row, loop(count) as place:
            bit = bind(place * bits)
            byte = bind(row * row_bytes + T.floordiv(bit, 8))
            code = T.Cast("int32", packed[byte])
            if 8 % bits:
                code = code | (T.Cast("int32", packed[byte + 1]) << T.int32(8))
            if bits < 8:
                code = (code >> T.floormod(bit, 8)) & T.int32((1 << bits) - 1)
            at = bind(row * groups + T.floordiv(place, group))
            entry = table[bind(code)]
            if rest:
                entry = entry - T.Cast("float32", rest[0][at])
            T.buffer_store(out, entry * scale[at], [row * count + place])

    return build("decode_rows", body)
