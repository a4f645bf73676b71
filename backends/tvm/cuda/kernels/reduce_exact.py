"""`gw::reduce_sum` over one axis of a dense tensor, bit-equal to its torch definition."""

from __future__ import annotations

from math import prod

from tvm import tirx

from .....ir.errors import OptionError
from ..launch import device_function
from .rows import rows_call


def reduce_sum(shape: tuple[int, ...], axis: int, keepdim: bool = False, name: str = "reduce_sum_exact") -> tirx.PrimFunc:
    """(X [shape], Y [shape without `axis`, or with it as 1]), float32, dense.

    Raises:
        OptionError: an empty extent, or an axis the shape does not have.
    """
    if not -len(shape) <= axis < len(shape) or min(shape) < 1:
        raise OptionError(f"reduce_sum: axis {axis} of shape {shape}; extents must be at least 1")
    axis %= len(shape)
    inner = prod(shape[axis + 1 :])
    outputs = prod(shape[:axis]) * inner
    out = (*shape[:axis], *((1,) if keepdim else ()), *shape[axis + 1 :])
    call = rows_call("reduce_sum", outputs, {"OUTPUTS": outputs, "LENGTH": shape[axis], "INNER": inner})
    return device_function(name, [("X", shape, "float32"), ("Y", out, "float32")], call)
