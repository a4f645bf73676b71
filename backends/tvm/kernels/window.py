"""Which taps of a window fall inside the image, decided while the kernel is generated.

Columns are static: a line of outputs is cut into tiles, and neighbouring tiles with the same set of valid taps share one copy of
the code, so that the inner loops hold no border test and the image is never copied into a padded one. Rows are clipped at run
time by the bounds of the loop over kernel rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Convolution
from .emit import bind
from .isa import T


@dataclass(frozen=True)
class Segment:
    """Tiles first .. first + count - 1 of a line. valid[row][kx]: does tap kx of the tile's row-th output read the image?"""

    first: int
    count: int
    valid: tuple[tuple[bool, ...], ...]

    def runs(self) -> list[tuple[int, int, list[int]]]:
        """(first tap column, how many, the tile's rows for which they all read the image); taps that no row needs are left out.

        A tile away from the borders has one run of every tap column.
        """
        runs: list[tuple[int, int, list[int]]] = []
        for kx, taps in enumerate(zip(*self.valid, strict=True)):
            rows = [row for row, inside in enumerate(taps) if inside]
            if runs and runs[-1][2] == rows:
                first, count, _ = runs.pop()
                runs.append((first, count + 1, rows))
            else:
                runs.append((kx, 1, rows))
        return [run for run in runs if run[2]]


def column_segments(shape: Convolution, rows: int) -> list[Segment]:
    """Cuts a line of shape.out_width outputs into tiles of `rows`; the last one overlaps its neighbour. rows <= out_width."""

    def valid(tile: int) -> tuple[tuple[bool, ...], ...]:
        start = min(tile * rows, shape.out_width - rows)
        return tuple(
            tuple(
                0 <= column * shape.stride[1] + kx * shape.dilation[1] - shape.padding[1] < shape.width
                for kx in range(shape.kernel[1])
            )
            for column in range(start, start + rows)
        )

    segments: list[Segment] = []
    for tile in range(-(-shape.out_width // rows)):
        mask = valid(tile)
        if segments and segments[-1].valid == mask:
            last = segments.pop()
            segments.append(Segment(last.first, last.count + 1, mask))
        else:
            segments.append(Segment(tile, 1, mask))
    return segments


def kernel_rows(shape: Convolution, oy: Any) -> tuple[Any, Any]:
    """Bounds (first, stop) of the kernel rows that read the image for output row `oy`; stop > first is not promised."""
    if shape.framed_height == shape.height:
        return 0, shape.kernel[0]
    step = shape.dilation[0]
    top = bind(shape.padding[0] - oy * shape.stride[0])
    # Both quotients are rounded up; + kernel * step keeps the dividends positive.
    shift = shape.kernel[0] + (shape.out_height * shape.stride[0]) // step + 1
    first = T.floordiv(top + step - 1 + shift * step, step) - shift
    stop = T.floordiv(top + shape.height + step - 1 + shift * step, step) - shift
    first = bind(T.min(T.max(first, 0), shape.kernel[0]))
    return first, bind(T.max(T.min(stop, shape.kernel[0]), first))
