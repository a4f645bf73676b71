"""Float code that gives the same bits on every target: the building blocks of the `gw::` float ops (ir/dialect/exact.py).

LLVM may contract a * b + c into one fused multiply-add, which rounds once where the definition rounds twice. `product` puts each
product that feeds an addition behind `llvm.arithmetic.fence`, which LLVM never looks through. Reductions keep one vector of LANES
running sums and add its lanes pairwise. Everything else (+, -, /, square root, rounding to even) IEEE 754 fixes already.
Inputs are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....ir.dialect.exact import EXP_LOWEST, EXP_POLYNOMIAL, LN2_HIGH, LN2_LOW, LOG2_E
from .base import LANES, VECTOR
from .emit import accumulator, bind, dtype_of, fence, loop, ramp, splat, store
from .isa import T

#: Builds the vector of elements start .. start + valid - 1 of a row; lanes past `valid` hold whatever the reduction needs there.
Chunk = Callable[[Any, int], Any]


def product(a: Any, b: Any) -> Any:
    """a * b, rounded by itself."""
    return fence(a * b)


def constant(value: float) -> Any:
    return splat(T.float32(value))


def reciprocal(x: Any) -> Any:
    """1 / x, correctly rounded."""
    return (T.float32(1.0) if dtype_of(x) == "float32" else constant(1.0)) / x


def square_root(x: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype_of(x), "llvm.sqrt", x)


def round_even(x: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype_of(x), "llvm.roundeven", x)


#: 1.5 * 2^23: a float of up to 2^22 added to it is rounded to an integer, half to even, and stands in its low bits.
INTEGER = 12582912.0


def exp(x: Any) -> Any:
    """exp of a vector with every lane <= 0; the bits of `exp_reference`."""
    return exp_each([x])[0]


def exp_each(xs: list[Any]) -> list[Any]:
    """exp of vectors with every lane <= 0, step by step side by side: one alone is a chain of some ninety cycles.

    The bits of `exp_reference`, by shorter means: n is rounded by adding `INTEGER`, and p * 2^n is an addition to the exponent of
    p. That is exact because the result is a normal number: at the lowest x, n is -92.
    """

    def each(step: Callable[..., Any], *operands: list[Any]) -> list[Any]:
        return [bind(step(*one)) for one in zip(*operands, strict=True)]

    xs = each(lambda x: T.max(x, constant(EXP_LOWEST)), xs)
    shifted = each(lambda x: fence(product(x, constant(LOG2_E)) + constant(INTEGER)), xs)
    ns = each(lambda t: t - constant(INTEGER), shifted)
    # These products are exact: LLVM may fuse them.
    rs = each(lambda x, n: x - n * constant(LN2_HIGH), xs, ns)
    rs = each(lambda r, n: r - n * constant(LN2_LOW), rs, ns)
    ps = [constant(EXP_POLYNOMIAL[0])] * len(xs)
    for coefficient in EXP_POLYNOMIAL[1:]:
        ps = each(product, ps, rs)
        ps = each(lambda p, c=coefficient: p + constant(c), ps)
    squares = each(product, rs, rs)
    ps = each(lambda p, square, r: product(p, square) + r, ps, squares, rs)
    ps = each(lambda p: p + constant(1.0), ps)
    return each(_times_power, ps, shifted)


def _times_power(p: Any, shifted: Any) -> Any:
    """p * 2^n, n in the low bits of `shifted`."""
    word = f"int32x{LANES}"
    exponent = T.shift_left(T.reinterpret(word, shifted), splat(T.int32(23)))
    return T.reinterpret(VECTOR, T.reinterpret(word, p) + exponent)


def for_chunks(length: int, emit: Callable[[Any, int], None], first: int = 0) -> None:
    """Calls emit(start, valid) for the vectors of a row from number `first` on: a loop over the full ones, then the rest."""
    full, rest = divmod(length, LANES)
    if full > first:
        with loop(full - first) as index:
            emit((index + first) * LANES, LANES)
    if rest and full >= first:
        emit(full * LANES, rest)


def fold(length: int, chunk: Chunk, combine: Callable[[Any, Any], Any]) -> Any:
    """Combines the vectors of a row in order, then the lanes pairwise, 8, 4, 2, 1 apart. Returns a scalar."""
    lanes = accumulator("float32")
    store(lanes, 0, chunk(0, min(length, LANES)))
    for_chunks(length, lambda start, valid: store(lanes, 0, combine(lanes.vload([0], VECTOR), chunk(start, valid))), first=1)
    return across(lanes, combine)


def across(lanes: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combines the lanes of an accumulator pairwise, 8, 4, 2, 1 apart. Returns a scalar."""
    width = LANES
    while width > 2:
        width //= 2
        halves = (lanes.vload([0], f"float32x{width}"), lanes.vload([width], f"float32x{width}"))
        store(lanes, 0, combine(*halves), width)
    return bind(combine(lanes.vload([0]), lanes.vload([1])))


def lane_sum(length: int, chunk: Chunk) -> Any:
    """Sum in the fixed order of `lane_sum` in ir/dialect/exact.py; `chunk` must put zeros in the lanes past `valid`."""
    return fold(length, chunk, lambda a, b: a + b)


def zero_past(value: Any, valid: int) -> Any:
    """`value` with zeros in the lanes past `valid`."""
    if valid == LANES:
        return value
    lane = ramp(T.int32(0))
    return bind(T.Select(lane < splat(T.int32(valid)), value, constant(0.0)))
