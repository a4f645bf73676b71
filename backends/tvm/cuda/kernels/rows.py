"""How the kernels of `triton_rows` cut their rows."""

from __future__ import annotations

from ..launch import Constant, TritonCall

#: Rows of a program where there are enough of them to give every multiprocessor several programs.
MOST_ROWS = 8

#: Rows that a warp holds, of LANES running sums each.
ROWS_OF_WARP = 2

#: Programs that fill a large chip.
PROGRAMS = 256


def rows_call(function: str, rows: int, constants: dict[str, Constant]) -> TritonCall:
    """The launch of a function of `triton_rows` over `rows` rows, whose tile's height is its constant BLOCK."""
    block = MOST_ROWS
    while block > ROWS_OF_WARP and rows < block * PROGRAMS:
        block //= 2
    grid = (-(-rows // block),)
    return TritonCall.of(f"triton_rows:{function}", {**constants, "BLOCK": block}, grid, warps=block // ROWS_OF_WARP)
