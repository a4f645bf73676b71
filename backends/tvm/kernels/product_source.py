"""How a product of `convolution_f32` reads its input: where it lies, or widened to float32 in a buffer of the task first.

A half-precision number would cost two or three instructions before every multiplication it takes part in; a task that widens the
pixels of its tile once pays one instruction for eight numbers, and reads them back from the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .base import LANES, padded
from .emit import bind, loop, splat, store
from .half import is_half, widened
from .isa import T

if TYPE_CHECKING:
    from .convolution_f32 import Product
    from .window import Segment

#: Floats of widened input that a task holds: half of a first-level cache of 48 KB.
SCRATCH = 6144

#: (row of the tile, channel, how many channels from there on count) -> the input, in every lane.
Value = Callable[[int, Any, int], Any]

#: Where the first row of the tile reads its first channel for a tap of the run.
Base = Callable[[Any], Any]


class Source(Protocol):
    """joins_taps: the channels of all taps of a run are one sequence, as their weights are; it is walked without a loop."""

    joins_taps: ClassVar[bool]

    def allocate(self) -> None:
        """Declares what a task holds, inside the parallel loop."""
        ...

    def chunks(self, span: int) -> Iterator[tuple[Any, int]]:
        """Ranges (first, count) of channels that are read together; emits the loop over them."""
        ...

    def read(self, base: Base, taps: int, rows: list[int], first: Any, channels: int) -> Callable[[Any], Value]:
        """Prepares the taps of a run for the tile's `rows`; gives the values of one tap."""
        ...


def source_of(product: Product, x: Any, segments: list[Segment]) -> Source:
    read = product.weights.read
    if read is not None:
        return (Direct if product.x_channel == 1 else Planes)(product, x, read)
    if not is_half(x):
        return Direct(product, x, lambda buffer, offset, channels: splat(buffer.vload([offset])))
    return Scratch.of(product, x, segments)


@dataclass(frozen=True)
class Direct:
    """Every value from memory."""

    product: Product
    x: Any
    load: Callable[[Any, Any, int], Any]

    joins_taps: ClassVar[bool] = False

    def allocate(self) -> None:
        pass

    def chunks(self, span: int) -> Iterator[tuple[Any, int]]:
        yield 0, span

    def read(self, base: Base, taps: int, rows: list[int], first: Any, channels: int) -> Callable[[Any], Value]:
        step = self.product.shape.stride[1] * self.product.x_pixel

        def values(tap: Any) -> Value:
            start = bind(base(tap))
            return lambda i, c, count: self.load(self.x, start + c * self.product.x_channel + i * step, count)

        return values


class Planes(Direct):
    """The few channels of an image in planes: a row of taps is one sequence of numbers."""

    joins_taps: ClassVar[bool] = True

    def read(self, base: Base, taps: int, rows: list[int], first: Any, channels: int) -> Callable[[Any], Value]:
        step = self.product.shape.stride[1] * self.product.x_pixel
        starts = [bind(base(tap)) for tap in range(taps)]

        def value(i: int, k: int, count: int) -> Any:
            return self.load(self.x, starts[k // channels] + (k % channels) * self.product.x_channel + i * step, count)

        return lambda _: value


@dataclass
class Scratch:
    """[pixel][channel] of the tile in float32, or [channel][pixel] of a planar image.

    chunk: most channels at a time. size: floats.
    """

    product: Product
    x: Any
    chunk: int
    size: int
    held: Any = field(default=None)

    joins_taps: ClassVar[bool] = False

    @classmethod
    def of(cls, product: Product, x: Any, segments: list[Segment]) -> Scratch:
        runs = [(taps, rows) for segment in segments for _, taps, rows in segment.runs()]
        pixels = max((cls._pixels(product, taps, rows)[1] for taps, rows in runs), default=1)
        span = product.depth // (product.shape.kernel[0] * product.shape.kernel[1])
        if product.x_channel != 1:
            return cls(product, x, span, span * padded(pixels))
        chunk = min(padded(span), max(4 * LANES, SCRATCH // pixels // LANES * LANES))
        return cls(product, x, chunk, pixels * chunk)

    @staticmethod
    def _pixels(product: Product, taps: int, rows: list[int]) -> tuple[int, int]:
        """(distance, count) of the pixels of a line that some row and tap read; of all between them where it is planar."""
        stride, dilation = product.shape.stride[1], product.shape.dilation[1]
        reach = (rows[-1] - rows[0]) * stride + (taps - 1) * dilation
        step = 1 if product.x_channel != 1 else stride if taps == 1 else gcd(stride, dilation)
        return step, reach // step + 1

    def allocate(self) -> None:
        self.held = T.alloc_buffer((self.size,), "float32")

    def chunks(self, span: int) -> Iterator[tuple[Any, int]]:
        full, rest = divmod(span, self.chunk)
        if full:
            with loop(full) as index:
                yield index * self.chunk, self.chunk
        if rest:
            yield full * self.chunk, rest

    def read(self, base: Base, taps: int, rows: list[int], first: Any, channels: int) -> Callable[[Any], Value]:
        shape, planar = self.product.shape, self.product.x_channel != 1
        step, count = self._pixels(self.product, taps, rows)
        x_channel, x_pixel = self.product.x_channel, self.product.x_pixel
        start = bind(base(0) + rows[0] * shape.stride[1] * x_pixel + first * x_channel)
        lines, length = (channels, count) if planar else (count, channels)
        # Vectors run past the last channel or pixel: into the next one, or into what every buffer has after its end.
        pitch, distance = padded(length), x_channel if planar else step * x_pixel
        with loop(lines) as line, loop(pitch // LANES) as vector:
            store(self.held, line * pitch + vector * LANES, widened(self.x, start + line * distance + vector * LANES))
        pixel, channel = (1, pitch) if planar else (pitch, 1)

        def values(tap: Any) -> Value:
            def value(i: int, c: Any, _: int) -> Any:
                at = (i - rows[0]) * (shape.stride[1] // step) + tap * (shape.dilation[1] // step)
                return splat(self.held.vload([at * pixel + c * channel]))

            return value

        return values
