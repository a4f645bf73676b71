"""`gw::match_tokens`, `gw::keep_tokens` and `gw::sum_tokens`, bit-equal to their torch definitions on every target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from ....ir.dialect.tokens import LEAST_SQUARE
from .base import LANES, VECTOR
from .emit import arguments, bind, build, loop, parallel_kind, splat, store
from .exact_float import for_chunks, lane_sum, product, reciprocal, square_root
from .float_base import load_lanes, store_lanes
from .isa import T

#: Products, and moved elements, a microsecond of one core, for the choice between a serial and a parallel loop.
PRODUCTS_PER_US, ELEMENTS_PER_US = 4000, 2000

LOWEST = -3.4028234663852886e38


def match_tokens(batch: int, heads: int, tokens: int, depth: int, merged: int, protected: int) -> tirx.PrimFunc:
    """(keys f32 [batch, heads, tokens, depth], place s32 [batch, tokens])."""
    evens, odds, width = (tokens + 1) // 2, tokens // 2, -(-depth // LANES) * LANES

    def body() -> None:
        keys, place = arguments(("keys", (batch, heads, tokens, depth), "float32"), ("place", (batch, tokens), "int32"))
        with loop(batch, parallel_kind(batch * evens * odds * depth / PRODUCTS_PER_US) if batch > 1 else "serial") as image:
            unit = T.alloc_buffer((tokens * width,), "float32")
            best, partner = T.alloc_buffer((evens,), "float32"), T.alloc_buffer((evens,), "int32")
            position = T.alloc_buffer((tokens,), "int32")
            with loop(tokens) as token:
                _metric(keys, unit, bind(image * (heads * tokens) + token), token, heads, tokens, depth, width)
            with loop(evens) as even:
                _most_similar(unit, best, partner, even, odds, width, protected)
            _places(place, best, partner, position, bind(image * tokens), tokens, merged)

    return build("match_tokens", body)


def _metric(keys: Any, unit: Any, row: Any, token: Any, heads: int, tokens: int, depth: int, width: int) -> None:
    """unit[token] = the token's keys summed over heads, at length 1, with zeros up to `width`."""

    def summed(start: Any, valid: int) -> None:
        total = load_lanes(keys, row * depth + start, valid)
        for head in range(1, heads):
            total = total + load_lanes(keys, (row + head * tokens) * depth + start, valid)
        store(unit, token * width + start, total)

    def square(start: Any, _valid: int) -> Any:
        vector = bind(unit.vload([token * width + start], VECTOR))
        return product(vector, vector)

    for_chunks(depth, summed)
    length = square_root(T.max(lane_sum(width, square), T.float32(LEAST_SQUARE)))
    inverse = bind(reciprocal(length))
    for_chunks(
        width,
        lambda start, _: store(unit, token * width + start, unit.vload([token * width + start], VECTOR) * splat(inverse)),
    )


def _most_similar(unit: Any, best: Any, partner: Any, even: Any, odds: int, width: int, protected: int) -> None:
    """The largest similarity of a token at an even place with one at an odd place, and the first that has it."""
    T.buffer_store(best, T.float32(LOWEST), [even])
    T.buffer_store(partner, T.int32(0), [even])
    with T.If(even >= (protected + 1) // 2), T.Then(), loop(odds - protected // 2) as index:
        odd = bind(index + protected // 2 + T.int32(0))

        def both(start: Any, _valid: int) -> Any:
            left = unit.vload([2 * even * width + start], VECTOR)
            return product(left, unit.vload([(2 * odd + 1) * width + start], VECTOR))

        score = lane_sum(width, both)
        with T.If(score > best[even]), T.Then():
            T.buffer_store(best, score, [even])
            T.buffer_store(partner, odd, [even])


def _rank(score: Any, at: Any, count: int, first: Any = 0) -> Any:
    """A cell that holds how many of `count` scores from `first` on are larger than that of `at`, or equal and earlier."""
    rank = T.alloc_buffer((1,), "int32")
    T.buffer_store(rank, T.int32(0), [0])
    own = bind(score[first + at])
    with T.serial(0, count) as other:
        value = bind(score[first + other])
        with T.If(tirx.any(value > own, tirx.all(value == own, other < at))), T.Then():
            T.buffer_store(rank, rank[0] + 1, [0])
    return rank


def _places(place: Any, best: Any, partner: Any, position: Any, first: Any, tokens: int, merged: int) -> None:
    evens = (tokens + 1) // 2
    running = T.alloc_buffer((1,), "int32")
    gone = T.alloc_buffer((evens,), "int32")
    with T.serial(0, evens) as even:
        T.buffer_store(gone, T.Cast("int32", _rank(best, even, evens)[0] < merged), [even])
    T.buffer_store(running, T.int32(0), [0])
    with T.serial(0, tokens) as token:
        T.buffer_store(position, running[0], [token])
        stays = tirx.any(T.floormod(token, 2) == 1, gone[T.floordiv(token, 2)] == 0)
        T.buffer_store(running, running[0] + T.Cast("int32", stays), [0])
    with T.serial(0, tokens) as token:
        half = bind(T.floordiv(token, 2))
        leaves = tirx.all(T.floormod(token, 2) == 0, gone[half] == 1)
        target = bind(T.Select(leaves, 2 * partner[half] + 1, token))
        T.buffer_store(place, position[target], [first + token])


def keep_tokens(batch: int, tokens: int, kept: int, protected: int) -> tirx.PrimFunc:
    """(score f32 [batch, tokens], place s32 [batch, tokens])."""

    def body() -> None:
        score, place = arguments(("score", (batch, tokens), "float32"), ("place", (batch, tokens), "int32"))
        with loop(batch) as image:
            first = bind(image * tokens + T.int32(0))
            running = T.alloc_buffer((1,), "int32")
            T.buffer_store(running, T.int32(0), [0])
            with T.serial(0, tokens) as token:
                rank = _rank(score, token, tokens, first)
                # A protected token comes before all others: it is one of those kept, and takes one place from the rest.
                ahead = T.alloc_buffer((1,), "int32")
                T.buffer_store(ahead, T.int32(0), [0])
                for guarded in range(protected):
                    lower = score[first + guarded] < score[first + token]
                    T.buffer_store(ahead, ahead[0] + T.Cast("int32", lower), [0])
                stays = bind(tirx.any(token < protected, rank[0] + ahead[0] < kept))
                T.buffer_store(place, T.Select(stays, running[0], T.int32(-1)), [first + token])
                T.buffer_store(running, running[0] + T.Cast("int32", stays), [0])

    return build("keep_tokens", body)


def sum_tokens(batch: int, tokens: int, width: int, kept: int) -> tirx.PrimFunc:
    """(X f32 [batch, tokens, width], place s32 [batch, tokens], Y f32 [batch, kept, width])."""

    def body() -> None:
        given = [("X", (batch, tokens, width), "float32"), ("place", (batch, tokens), "int32")]
        x, place, y = arguments(*given, ("Y", (batch, kept, width), "float32"))
        with loop(batch, parallel_kind(batch * tokens * width / ELEMENTS_PER_US) if batch > 1 else "serial") as image:
            _clear(y, image, kept * width)
            with T.serial(0, tokens) as token:
                row = bind(image * tokens + token)
                target = bind(place[row])
                with T.If(target >= 0), T.Then():
                    base = bind((image * kept + target) * width)

                    def add(start: Any, valid: int, row: Any = row, base: Any = base) -> None:
                        total = load_lanes(y, base + start, valid) + load_lanes(x, row * width + start, valid)
                        store_lanes(y, base + start, total, valid)

                    for_chunks(width, add)

    return build("sum_tokens", body)


def _clear(y: Any, image: Any, count: int) -> None:
    emit: Callable[[Any, int], None] = lambda start, valid: store_lanes(  # noqa: E731
        y, image * count + start, splat(T.float32(0.0)), valid
    )
    for_chunks(count, emit)
