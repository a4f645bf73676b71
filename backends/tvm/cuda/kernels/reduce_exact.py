"""`gw::reduce_sum` over one axis of a dense tensor, bit-equal to its torch definition."""

from __future__ import annotations

from tvm import tirx

from ...kernels.reduce_exact import reduction
from ..launch import device_function
from .rows import rows_call


def reduce_sum(shape: tuple[int, ...], axis: int, keepdim: bool = False, name: str = "reduce_sum_exact") -> tirx.PrimFunc:
    """(X [shape], Y [shape without `axis`, or with it as 1]), float32, dense. Raises as `reduction`."""
    (outer, length, inner), out = reduction(shape, axis, keepdim)
    call = rows_call("reduce_sum", outer * inner, {"OUTPUTS": outer * inner, "LENGTH": length, "INNER": inner})
    return device_function(name, [("X", shape, "float32"), ("Y", out, "float32")], call)
