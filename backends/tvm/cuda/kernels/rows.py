"""How the kernels of `triton_rows` cut their rows."""

from __future__ import annotations

from ..launch import Constant, TritonCall

#: Rows that a warp holds, of LANES running sums each. Programs are of one warp: rows share nothing.
ROWS_OF_WARP = 2

#: Programs that fill a large chip.
PROGRAMS = 256


def rows_call(function: str, rows: int, constants: dict[str, Constant]) -> TritonCall:
    """The launch of a function of `triton_rows` over `rows` rows, whose tile's height is its constant BLOCK."""
    block = ROWS_OF_WARP if rows >= ROWS_OF_WARP * PROGRAMS else 1
    return TritonCall.of(f"triton_rows:{function}", {**constants, "BLOCK": block}, (-(-rows // block),), warps=1)
