"""`gw::reduce_sum` over one axis of a dense tensor, bit-equal to its torch definition."""

from __future__ import annotations

from tvm import tirx

from ...kernels.reduce_exact import reduction
from ..launch import Constant, device_function
from .rows import ROWS_OF_WARP, rows_call

#: Columns that a program sums side by side.
NEIGHBOURS = 8


def reduce_sum(shape: tuple[int, ...], axis: int, keepdim: bool = False, name: str = "reduce_sum_exact") -> tirx.PrimFunc:
    """(X [shape], Y [shape without `axis`, or with it as 1]), float32, dense. Raises as `reduction`."""
    (outer, length, inner), out = reduction(shape, axis, keepdim)
    constants: dict[str, Constant] = {"OUTPUTS": outer * inner, "LENGTH": length, "INNER": inner}
    # Sums of neighbouring columns read neighbouring numbers.
    call = rows_call("reduce_sum", outer * inner, constants, NEIGHBOURS if inner > 1 else ROWS_OF_WARP)
    return device_function(name, [("X", shape, "float32"), ("Y", out, "float32")], call)
