"""`gw::softmax` over dense rows, bit-equal to its torch definition on every target."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ....ir.errors import OptionError
from .emit import arguments, bind, build, loop, parallel_kind
from .exact_float import exp_each
from .float_base import load_lanes, store_lanes
from .half import is_half
from .isa import T
from .softmax_block import Block, Powers

#: Elements a microsecond that one core handles, for the choice between a serial and a parallel loop.
ELEMENTS_PER_US = 1500

#: Bytes of one block of rows: a part of the first-level cache, small enough to leave every core some blocks.
BLOCK_BYTES = 8 * 1024


def softmax(rows: int, length: int, name: str = "softmax_exact") -> tirx.PrimFunc:
    """(X [rows, length], Y [rows, length]), float32. Raises OptionError for an empty extent."""
    if min(rows, length) < 1:
        raise OptionError(f"softmax: every extent must be at least 1, got {rows} x {length}")

    def body() -> None:
        x, y = arguments(("X", (rows, length), "float32"), ("Y", (rows, length), "float32"))
        softmax_rows(x, y, rows, length, exp_each)

    return build(name, body)


def softmax_rows(x: Any, y: Any, rows: int, length: int, powers: Powers, level: str = "") -> None:
    """Emits the softmax of all rows of x [rows, length] into y; powers: exp of vectors whose lanes are at most 0. Powers are kept
    in y, or beside it where y holds half precision, which level `level` rounds."""
    block = min(rows, max(1, BLOCK_BYTES // (4 * length)))
    full, rest = divmod(rows, block)
    # The last block is shorter instead of overlapping: no task may read rows that another has half done.
    with loop(full + (rest > 0), parallel_kind(rows * length / ELEMENTS_PER_US)) as index:
        first = bind(index * block + T.int32(0))
        kept = T.alloc_buffer((block * length,), "float32") if is_half(y) else None
        if not rest:
            _block((x, y, kept), first, block, length, powers, level).emit()
            return
        with T.If(index < full):
            with T.Then():
                _block((x, y, kept), first, block, length, powers, level).emit()
            with T.Else():
                _block((x, y, kept), first, rest, length, powers, level).emit()


def _block(buffers: tuple[Any, Any, Any], first: Any, rows: int, length: int, powers: Powers, level: str) -> Block:
    x, y, kept = buffers

    def at(row: Any, start: Any) -> Any:
        return (first + row) * length + start

    def finish(row: Any, places: list[tuple[Any, int]], values: list[Any]) -> None:
        for (start, valid), value in zip(places, values, strict=True):
            store_lanes(y, at(row, start), value, valid, level=level)

    def place(row: Any, start: Any) -> Any:
        return at(row, start) if kept is None else row * length + start

    powers_at = y if kept is None else kept
    return Block(
        rows,
        length,
        load=lambda row, start, valid: load_lanes(x, at(row, start), valid),
        keep=lambda row, start, value, valid: store_lanes(powers_at, place(row, start), value, valid),
        kept=lambda row, start, valid: load_lanes(powers_at, place(row, start), valid),
        finish=finish,
        exponentials=powers,
    )
