"""How a product of the float family multiplies: one unit a way to read packed weights and to add to a tile's sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from .base import LANES, VECTOR
from .emit import accumulator, store
from .half import widened
from .isa import T


class Sums(Protocol):
    """LANES float32 sums of a register tile."""

    def start(self, first: Any) -> None:
        """Begins with a vector of LANES floats."""
        ...

    def value(self) -> Any:
        """The sums, as one vector."""
        ...


class Whole:
    """One vector of LANES."""

    def __init__(self) -> None:
        self.place = accumulator("float32")

    def start(self, first: Any) -> None:
        store(self.place, 0, first)

    def value(self) -> Any:
        return self.place.vload([0], VECTOR)


class Weights(Protocol):
    """How a product's packed weights are read and multiplied."""

    @property
    def step(self) -> int:
        """Channels of one vector in memory."""
        ...

    @property
    def turn(self) -> int:
        """Most channels that `multiply` takes at once."""
        ...

    @property
    def factors(self) -> int:
        """Vectors in registers that one vector in memory becomes."""
        ...

    @property
    def read(self) -> Callable[[Any, Any, int], Any] | None:
        """(X, offset, channels that count) -> what it multiplies, from memory; None: float32 numbers, in every lane."""
        ...

    def sums(self) -> Any:
        """What `multiply` adds to: `Sums`."""
        ...

    def multiply(self, sums: dict[int, list[Any]], buffer: Any, vectors: list[Any], value: Any, channels: int) -> None:
        """sums[row][j] += value(row, channel) * the weights from vectors[j] on, for `channels` channels."""
        ...


@dataclass(frozen=True)
class Widened:
    """Any type; each channel is multiplied in float32."""

    step: int = 1

    @property
    def turn(self) -> int:
        return self.step

    @property
    def factors(self) -> int:
        return self.step

    @property
    def read(self) -> Callable[[Any, Any, int], Any] | None:
        return None

    def sums(self) -> Whole:
        return Whole()

    def multiply(self, sums: dict[int, list[Any]], buffer: Any, vectors: list[Any], value: Any, channels: int) -> None:
        weights = [self.load(buffer, vector, channels) for vector in vectors]
        for factor in range(len(weights[0])):
            for row, totals in sums.items():
                x = value(row, factor)
                for total, weight in zip(totals, weights, strict=True):
                    total.start(self.add(total.value(), x, weight[factor]))

    def load(self, buffer: Any, offset: Any, channels: int) -> list[Any]:
        """The vector at `offset`, as one factor a multiplication: of the first `channels` channels that it holds."""
        if self.step == 1:
            return [T.Bind(widened(buffer, offset))]
        words = T.Bind(T.reinterpret(f"uint32x{LANES}", buffer.vload([offset], f"uint16x{2 * LANES}")))
        first = T.shift_left(words, T.Broadcast(T.uint32(16), LANES))
        second = T.bitwise_and(words, T.Broadcast(T.uint32(0xFFFF0000), LANES))
        return [T.Bind(T.reinterpret(VECTOR, bits)) for bits in (first, second)[:channels]]

    def add(self, total: Any, value: Any, weight: Any) -> Any:
        return total + value * weight


@dataclass(frozen=True)
class Dotted(Widened):
    """bfloat16 pairs, by vdpbf16ps: `value` holds a pair in every lane."""

    step: int = 2

    @property
    def factors(self) -> int:
        return 1

    @property
    def read(self) -> Callable[[Any, Any, int], Any]:
        return channel_pair

    def load(self, buffer: Any, offset: Any, channels: int) -> list[Any]:
        return [T.Bind(T.reinterpret(f"int32x{LANES}", buffer.vload([offset], f"uint16x{2 * LANES}")))]

    def add(self, total: Any, value: Any, weight: Any) -> Any:
        return T.call_extern(VECTOR, "gw_dot_bfloat16", total, value, weight)


def channel_pair(buffer: Any, offset: Any, channels: int) -> Any:
    """Two neighbouring bfloat16 numbers in every lane, or one and a zero."""
    if channels == 1:
        return T.Broadcast(T.Cast("int32", buffer.vload([offset])), LANES)
    return T.Broadcast(T.reinterpret("int32", buffer.vload([offset], "uint16x2")), LANES)
