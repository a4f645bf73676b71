"""`gw::lookup`: a 256-entry table applied to every byte."""

from __future__ import annotations

from tvm import tirx

from . import plan_elementwise
from .family import function


def lookup(shape: tuple[int, ...], x_dtype: str, table_dtype: str, level: str) -> tirx.PrimFunc:
    """X u8 / s8 [shape], table [256] u8 / s8 -> Y [shape]."""
    return function(plan_elementwise.lookup(shape, x_dtype, table_dtype), "lookup_int8")
