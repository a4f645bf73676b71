"""Products of float16 numbers on AArch64 cores that compute in float16: X and W are multiplied as they lie, nothing is widened.

Long     FEAT_FHM (Neoverse V1): fmlal and fmlal2 multiply halves exactly and add to float32 sums with one rounding, as a float32
         fmla does to widened numbers: the bound of `float_base` holds.
Chained  FEAT_FP16 alone (Cortex-A76, X1, Neoverse N1): fmla multiplies and adds eight halves, rounding to float16; every CHAIN
         products of a tap, or of a row of taps of a planar image, the chain is widened and added to float32 sums. Constant
         weights alone: products of two tensors stay in float32.

instructions for 16 products of 16 channels      float32 fmla 64      Long 64      Chained 32 + 4 fcvtl + 4 fadd
(4 fcvtl more a channel and tile where float16 is widened: on a Neoverse N1 fcvtl starts every other cycle, fmla two a cycle)

A chain rounds at most CHAIN times, each time by half a unit in the last place of a partial sum, u = 2^-11 of it. Of a sum
whose products are x w, the error is at most

    (K + 2) eps M + CHAIN u M + 2^-25 s (K + sum |x|),      M = sum |x| |w| + |bias|

beside the rounding of the result. With signs at random that is about 1.2 u of the result's own size, whatever K is (a sum in
float16 throughout: 0.3 u sqrt(K)). s is a power of two for each output channel: weights are stored as w / s so that the
magnitudes of the weights of any chain add up to less than 1, and no partial sum exceeds the largest |x|. So a chain of finite
inputs does not overflow (where the magnitudes of w add up to 2^15 at most), and small products keep as many bits as they can. s
stands before each panel of weights, and multiplies the sums at last.

A depthwise window is one chain: CHAIN is the number of its taps there, at most WINDOW (larger ones are widened).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .base import LANES, VECTOR
from .emit import accumulator, bind, shuffle, splat, store
from .isa import T
from .register_tile import QUARTERS, WORDS, joined, quarter

#: Levels of the two.
LONG, CHAINED = "fp16fml", "fullfp16"

#: Halves of a q register.
EIGHT = 8

#: Most products that are summed in float16.
CHAIN = 16

#: Rows of the largest tile of one group where chains read an image in planes: every number takes a register there.
PLANAR_ROWS = (2,)

#: Most taps of a depthwise window in one chain.
WINDOW = 32

_Q16, _Q32 = f"float16x{EIGHT}", f"float32x{WORDS}"


class LongSums:
    """Four q registers of float32."""

    def __init__(self) -> None:
        self.places = [accumulator("float32", WORDS) for _ in range(QUARTERS)]

    def start(self, first: Any) -> None:
        first = bind(first)
        for q, place in enumerate(self.places):
            store(place, 0, quarter(first, q), WORDS)

    def value(self) -> Any:
        return joined([place.vload([0], _Q32) for place in self.places])

    def add(self, halves: list[Any], x: list[Any]) -> None:
        """Adds the products of the weights of LANES channels and of what they multiply, in two q registers each."""
        for q, place in enumerate(self.places):
            name = "llvm.aarch64.neon.fmlal2" if q % 2 else "llvm.aarch64.neon.fmlal"
            total = place.vload([0], _Q32)
            store(place, 0, T.call_llvm_pure_intrin(_Q32, name, total, halves[q // 2], x[q // 2]), WORDS)

    def flush(self) -> None:
        pass


class ChainedSums(LongSums):
    """As many again, and a chain of float16 in two q registers."""

    def __init__(self) -> None:
        super().__init__()
        self.chain: list[Any] = []

    def add(self, halves: list[Any], x: list[Any]) -> None:
        products = [half * value for half, value in zip(halves, x, strict=True)]
        self.chain = [bind(a + b) for a, b in zip(self.chain, products, strict=True)] if self.chain else list(map(bind, products))

    def flush(self) -> None:
        for q, place in enumerate(self.places):
            wide = T.Cast(_Q32, shuffle([self.chain[q // 2]], list(range(q % 2 * WORDS, q % 2 * WORDS + WORDS))))
            store(place, 0, place.vload([0], _Q32) + wide, WORDS)
        self.chain = []


class HalfSums:
    """One chain in two q registers, for a window of few taps."""

    def __init__(self) -> None:
        self.places = [accumulator("float16", EIGHT) for _ in range(2)]

    def start(self, first: Any) -> None:
        """At zero: what comes first is added when the chain ends."""
        for place in self.places:
            store(place, 0, splat(T.float16(0.0), EIGHT), EIGHT)

    def value(self) -> Any:
        return T.Cast(VECTOR, shuffle([place.vload([0], _Q16) for place in self.places], list(range(LANES))))

    def add(self, halves: list[Any], x: list[Any]) -> None:
        for place, half, value in zip(self.places, halves, x, strict=True):
            store(place, 0, place.vload([0], _Q16) + half * value, EIGHT)


@dataclass(frozen=True)
class Halves:
    """A unit of `multiply`. chained: sum up to CHAIN products in float16. planar: X is read number by number, for neighbouring
    channels are not neighbours in memory."""

    chained: bool
    planar: bool = False

    step: int = 1
    factors: int = 1

    @property
    def turn(self) -> int:
        return CHAIN if self.chained else EIGHT

    @property
    def read(self) -> Callable[[Any, Any, int], Any]:
        return one if self.planar else eight

    def sums(self) -> LongSums:
        return ChainedSums() if self.chained else LongSums()

    def multiply(self, sums: dict[int, list[Any]], buffer: Any, vectors: list[Any], value: Any, channels: int) -> None:
        inputs: dict[int, Any] = {}
        for channel in range(channels):
            if self.planar or channel % EIGHT == 0:
                inputs = {row: value(row, channel) for row in sums}
            weights = [pair(buffer, vector + channel * LANES) for vector in vectors]
            for row, totals in sums.items():
                x = inputs[row] if self.planar else bind(shuffle([inputs[row]], [channel % EIGHT] * EIGHT))
                for total, halves in zip(totals, weights, strict=True):
                    total.add(halves, [x, x])
        for totals in sums.values():
            for total in totals:
                total.flush()


def eight(buffer: Any, offset: Any, channels: int) -> Any:
    """Eight neighbouring halves; those past the last channel are not used."""
    return bind(buffer.vload([offset], _Q16))


def one(buffer: Any, offset: Any, channels: int) -> Any:
    """A half in every lane."""
    return bind(splat(buffer.vload([offset]), EIGHT))


def pair(buffer: Any, offset: Any) -> list[Any]:
    """LANES halves in two q registers."""
    return [bind(buffer.vload([offset + end], _Q16)) for end in (0, EIGHT)]


def scaled_panels(panels: np.ndarray, chain: int = CHAIN) -> np.ndarray:
    """Packed float32 weights [panels, depth, LANES] -> float16 [panels, 1 + depth, LANES]: s, then w / s.

    chain: products that are summed in float16; any so many neighbours may be.
    """
    sums = np.cumsum(np.pad(np.abs(panels.astype(np.float64)), ((0, 0), (chain, 0), (0, 0))), 1)
    chains = (sums[:, chain:] - sums[:, :-chain]).max(1)
    scale = powers_above(chains * (1 + 2.0**-6))  # leaves room for the chain's roundings
    return np.concatenate([scale, panels / scale], 1).astype(np.float16)


def powers_above(sums: np.ndarray) -> np.ndarray:
    """[panels, LANES] -> [panels, 1, LANES]: the least power of two not below each, among float16's normal numbers."""
    fraction, exponent = np.frexp(sums)
    exponent = np.clip(exponent - (fraction == 0.5), -14, 15)
    return np.ldexp(np.float32(1), exponent.astype(np.int32))[:, None, :].astype(np.float32)


def scale_of(buffer: Any, panel: Any) -> Any:
    """s of the LANES channels of a panel, as float32."""
    return T.Cast(VECTOR, buffer.vload([panel], f"float16x{LANES}"))
