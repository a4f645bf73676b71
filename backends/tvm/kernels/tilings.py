"""The tilings of an int8 product: the guess, those worth measuring, and how four numbers of a database become one.

A `Cut` is the register tile of the wide panels and the order of tasks. It fits every product: what it asks for beyond the
product's size or the register file is cut down, so a database row can make a kernel slow but never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from .base import LANES
from .emit import balanced
from .gemm_int8 import L1_BYTES, Pixels, Segment, Tiling
from .isa import Isa

#: Widths of a register tile, in panels; the wide ones serve products of few rows.
PANELS = (1, 2, 3, 4, 5, 6, 8, 12, 14)

#: Longest register tile; more rows only add load pressure.
MOST_ROWS = 28

#: Cycles until a sum can be added to again, and dot instructions or loads a cycle, on the cores this is written for. They only
#: choose what is measured.
DOT_LATENCY, PORTS = 5, 2

#: Cycles that the instructions of the k loop itself take from the dot instructions in each step.
STEP_OVERHEAD = 0.75

#: Another shape than the usual one is guessed where it takes less than this share of the cycles counted.
LESS_WASTE = 0.97


@dataclass(frozen=True)
class Cut:
    """panels * LANES columns by a patch of height x width rows; rows_outer: sweep the panels of one patch before the next."""

    panels: int
    height: int
    width: int
    rows_outer: bool


def tiling(cut: Cut, pixels: Pixels, columns: int, isa: Isa) -> Tiling:
    """The whole product cut so: full tiles, then narrower ones, then the ragged last panel of a dense output."""
    ragged = pixels.valid < columns
    total = columns // LANES - ragged
    widest = max(1, min(cut.panels, isa.panels))
    segments, start = [], 0
    while start < total:
        panels = min(widest, total - start)
        tiles = (total - start) // panels
        segments.append(_segment(cut, start, tiles, panels, pixels, isa))
        start += tiles * panels
    if ragged:
        segments.append(_segment(cut, total, 1, 1, pixels, isa))
    return Tiling(tuple(segments), cut.rows_outer)


def most_rows(panels: int, isa: Isa, limit: int = MOST_ROWS) -> int:
    """Rows of a tile that leave registers for the weights of one step and one activation."""
    return max(1, min(limit, isa.most_rows(panels)))


def _segment(cut: Cut, start: int, tiles: int, panels: int, pixels: Pixels, isa: Isa) -> Segment:
    width = max(1, min(cut.width, pixels.width, most_rows(panels, isa)))
    return Segment(start, tiles, panels, max(1, min(cut.height, pixels.height, most_rows(panels, isa) // width)), width)


def choose_tiling(pixels: Pixels, columns: int, steps: int, isa: Isa) -> Tiling:
    """The analytical guess: blocking of rows x columns x (steps * isa.step).

    Four panels make the widest tile that leaves enough rows to hide the latency of the dot instruction, and with few rows as
    many streams of weights as memory serves at once. Another shape is taken where it wastes less on the borders: 28 columns are
    five tiles of 6, which compute 30, or two of 14 with two panels.
    """
    widest = 4 if isa.vnni else min(len(isa.rows) or 1, columns // LANES)
    rows = most_rows(widest, isa, 24)
    if pixels.height == 1 or pixels.width >= rows:
        usual = Cut(widest, 1, balanced(pixels.width, rows), True)
    else:
        usual = Cut(widest, balanced(pixels.height, max(1, rows // pixels.width)), pixels.width, True)
    made = _filled(usual, pixels, columns, isa)
    if isa.vnni and pixels.rows >= 4:
        limit = LESS_WASTE * _cycles(made, pixels, steps)
        others = (_filled(cut, pixels, columns, isa) for cut in _shapes(pixels, columns, isa))
        best = min(others, key=lambda other: _cycles(other, pixels, steps))
        made = best if _cycles(best, pixels, steps) < limit else made
    # Bytes moved past the first-level cache by each order: the outer operand once, the inner one once per outer tile.
    depth = steps * isa.step
    first = made.segments[0]
    source, weights = pixels.rows * depth, columns * depth
    by_rows = source + (0 if weights <= L1_BYTES else weights * pixels.rows / (first.height * first.width))
    by_panels = weights + (0 if source <= L1_BYTES else source * columns / (first.panels * LANES))
    return Tiling(made.segments, by_rows <= by_panels)


def _filled(cut: Cut, pixels: Pixels, columns: int, isa: Isa) -> Tiling:
    """As `tiling`, with taller patches where a segment is narrower than the cut."""
    segments = []
    for segment in tiling(cut, pixels, columns, isa).segments:
        if segment.panels < cut.panels:
            rows = most_rows(segment.panels, isa, 24)
            if pixels.height == 1 or pixels.width >= rows:
                segment = replace(segment, height=1, width=balanced(pixels.width, rows))
            else:
                segment = replace(segment, height=balanced(pixels.height, max(1, rows // pixels.width)), width=pixels.width)
        segments.append(segment)
    return Tiling(tuple(segments), cut.rows_outer)


def cuts(pixels: Pixels, columns: int, steps: int, isa: Isa, most: int = 12) -> list[Cut]:
    """At most `most` shapes of tile, the best ones of a simple count of cycles, each in both orders where orders differ."""
    shapes: dict[Tiling, tuple[float, Cut]] = {}
    for cut in _shapes(pixels, columns, isa):
        made = tiling(cut, pixels, columns, isa)
        shapes.setdefault(made, (_cycles(made, pixels, steps), cut))
    best = [cut for _, cut in sorted(shapes.values(), key=lambda pair: pair[0])[:most]]
    orders = (True, False) if pixels.rows > 1 and columns > LANES else (True,)
    return [Cut(cut.panels, cut.height, cut.width, rows_outer) for cut in best for rows_outer in orders]


def _shapes(pixels: Pixels, columns: int, isa: Isa) -> Iterator[Cut]:
    for panels in PANELS:
        if panels > max(1, columns // LANES) or panels > isa.panels:
            return
        rows = most_rows(panels, isa)
        for height in range(1, min(rows, pixels.height) + 1):
            most = min(rows // height, pixels.width)
            # Widths that cut the line into equal pieces; others waste more rows on the last piece.
            for width in sorted({ceil(pixels.width / pieces) for pieces in range(ceil(pixels.width / most), pixels.width + 1)}):
                if width <= most and 2 * height * width >= min(rows, pixels.height * pixels.width):
                    yield Cut(panels, height, width, True)


def _cycles(made: Tiling, pixels: Pixels, steps: int) -> float:
    total = 0.0
    for segment in made.segments:
        rows = segment.height * segment.width
        dots = rows * segment.panels
        step = max(dots / PORTS, (rows + segment.panels) / PORTS, DOT_LATENCY) + STEP_OVERHEAD
        total += segment.count(pixels) * (steps * step + 4 * dots + 30)
    return total
