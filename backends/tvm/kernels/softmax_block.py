"""`gw::softmax` over a block of rows, for kernels that hold the block in the first-level cache.

One row is a chain: its largest element, then the powers and their sum, then the division; each waits for the one before. A block
takes every step for all of its rows before the next step, and `GROUP` vectors of a row at a time, so that the chains of
neighbours overlap. Neither changes the order of operations inside a row, which is part of the op's meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import LANES, VECTOR
from .emit import accumulator, bind, loop, splat, store
from .exact_float import across, exp_each, reciprocal, zero_past
from .isa import T

#: Vectors of a row whose powers are computed side by side: with their temporaries they fill the register file.
GROUP = 4

#: (row, first element, how many of LANES belong to the row) -> vector; lanes past those hold anything.
Load = Callable[[Any, Any, int], Any]

#: exp of several vectors, each lane at most 0.
Powers = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Block:
    """Rows of one block, all of one length. load: scores, called twice; keep and kept: store and load of the powers, after which
    the scores of that row are not read again; finish: takes the probabilities of up to GROUP neighbouring vectors.
    exponentials: the exact ones by default."""

    rows: int
    length: int
    load: Load
    keep: Callable[[Any, Any, Any, int], None]
    kept: Load
    finish: Callable[[Any, list[tuple[Any, int]], list[Any]], None]
    exponentials: Powers = exp_each

    def emit(self) -> None:
        highest, inverse = T.alloc_buffer((self.rows,), "float32"), T.alloc_buffer((self.rows,), "float32")
        with loop(self.rows) as row:
            T.buffer_store(highest, self._largest(row), [row])
        with loop(self.rows) as row:
            T.buffer_store(inverse, bind(reciprocal(self._powers(row, bind(highest.vload([row]))))), [row])
        with loop(self.rows) as row:
            factor = splat(bind(inverse.vload([row])))
            for_groups(
                self.length,
                lambda places, row=row, factor=factor: self.finish(
                    row, places, [bind(self.kept(row, start, valid) * factor) for start, valid in places]
                ),
            )

    def _largest(self, row: Any) -> Any:
        lanes = accumulator("float32")
        store(lanes, 0, splat(T.float32(float("-inf"))))

        def take(places: list[tuple[Any, int]]) -> None:
            for start, valid in places:
                value = past(bind(self.load(row, start, valid)), valid, float("-inf"))
                store(lanes, 0, T.max(lanes.vload([0], VECTOR), value))

        for_groups(self.length, take)
        return across(lanes, T.max)

    def _powers(self, row: Any, highest: Any) -> Any:
        sums = accumulator("float32")
        # Powers are positive: 0 + e is e, so the sum still starts with the first vector.
        store(sums, 0, splat(T.float32(0.0)))

        def take(places: list[tuple[Any, int]]) -> None:
            powers = self.exponentials([bind(self.load(row, start, valid) - splat(highest)) for start, valid in places])
            for (start, valid), power in zip(places, powers, strict=True):
                self.keep(row, start, power, valid)
                store(sums, 0, sums.vload([0], VECTOR) + zero_past(power, valid))

        for_groups(self.length, take)
        return across(sums, lambda a, b: a + b)


def for_groups(length: int, take: Callable[[list[tuple[Any, int]]], None]) -> None:
    """Calls take([(start, valid), ...]) for GROUP neighbouring vectors at a time, then for what is left."""
    groups = length // (GROUP * LANES)
    if groups:
        with loop(groups) as index:
            base = bind(index * (GROUP * LANES) + T.int32(0))
            take([(base + place * LANES, LANES) for place in range(GROUP)])
    rest = range(groups * GROUP * LANES, length, LANES)
    if rest:
        take([(start, min(LANES, length - start)) for start in rest])


def past(value: Any, valid: int, fill: float) -> Any:
    """`value` with `fill` in the lanes past `valid`."""
    if valid == LANES:
        return value
    return bind(T.Select(T.Ramp(T.int32(0), 1, LANES) < splat(T.int32(valid)), value, splat(T.float32(fill))))
