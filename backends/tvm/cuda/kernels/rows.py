"""How the kernels of `triton_rows` cut their rows."""

from __future__ import annotations

from ..launch import Constant, TritonCall

#: Rows that a warp holds, of LANES running sums each.
ROWS_OF_WARP = 2

#: Programs that fill a large chip.
PROGRAMS = 256


def rows_call(function: str, rows: int, constants: dict[str, Constant], most: int = ROWS_OF_WARP) -> TritonCall:
    """The launch of a function of `triton_rows` over `rows` rows, whose tile's height is its constant BLOCK.

    most: rows of a program where there are enough of them. Rows that share nothing are best left to programs of one warp.
    """
    block = most
    while block > 1 and rows < block * PROGRAMS:
        block //= 2
    return TritonCall.of(
        f"triton_rows:{function}", {**constants, "BLOCK": block}, (-(-rows // block),), warps=max(1, block // ROWS_OF_WARP)
    )
