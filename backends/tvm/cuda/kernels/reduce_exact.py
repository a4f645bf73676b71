"""`gw::reduce_sum` over one axis of a dense tensor, bit-equal to its torch definition."""

from __future__ import annotations

from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.reduce_exact import reduction
from ..launch import Constant, device_function
from .rows import ROWS_OF_WARP, rows_call

#: Columns that a program sums side by side.
NEIGHBOURS = 8


def reduce_sum(shape: tuple[int, ...], axis: int, keepdim: bool = False, name: str = "reduce_sum_exact") -> tirx.PrimFunc:
    """(X [shape], Y [shape without `axis`, or with it as 1]), float32, dense. Raises as `reduction`."""
    return _sum(shape, axis, keepdim, None, name)


def weighted_sum(
    shape: tuple[int, ...], axis: int, keepdim: bool, weights: tuple[int, ...], name: str = "weighted_sum_exact"
) -> tirx.PrimFunc:
    """(X [shape], weights, Y): `gw::reduce_sum` of X * weights, which have the shape of X or one element a row of it.

    Raises:
        OptionError: as `reduction`, or weights of another shape.
    """
    if weights not in (shape, (*shape[:-1], 1)):
        raise OptionError(f"weighted_sum: weights of shape {weights} for {shape}; there is one an element, or one a row")
    return _sum(shape, axis, keepdim, weights, name)


def _sum(shape: tuple[int, ...], axis: int, keepdim: bool, weights: tuple[int, ...] | None, name: str) -> tirx.PrimFunc:
    (outer, length, inner), out = reduction(shape, axis, keepdim)
    constants: dict[str, Constant] = {"OUTPUTS": outer * inner, "LENGTH": length, "INNER": inner}
    constants |= {"weight_ptr": None, "EACH": 0} if weights is None else {"EACH": shape[-1] // weights[-1]}
    # Sums of neighbouring columns read neighbouring numbers.
    call = rows_call("reduce_sum", outer * inner, constants, NEIGHBOURS if inner > 1 else ROWS_OF_WARP)
    given: list[tuple[str, tuple[int, ...], str]] = [] if weights is None else [("weights", weights, "float32")]
    return device_function(name, [("X", shape, "float32"), *given, ("Y", out, "float32")], call)
