"""A float tensor as e4m3 bytes: X [size] float32, float16 or bfloat16, inverse [1], Y [size]."""

from __future__ import annotations

from tvm import tirx

from . import plan_fp8
from .family import function


def quantize(size: int, dtype: str) -> tirx.PrimFunc:
    """`gw::quantize_fp8`; inverse: of its scale. Raises OptionError for an empty extent."""
    return function(plan_fp8.quantize(size, dtype))
