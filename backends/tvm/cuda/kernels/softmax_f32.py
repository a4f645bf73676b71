"""Softmax over dense rows: the exact kernel, whose bits are within the bound of `kernels/softmax_f32.py`."""

from __future__ import annotations

from tvm import tirx

from . import softmax_exact


def softmax(rows: int, length: int, dtype: str = "float32", level: str = "") -> tirx.PrimFunc:
    """(X [rows, length], Y [rows, length]) of `dtype`. Raises OptionError for an empty extent."""
    return softmax_exact.softmax(rows, length, name="softmax_f32", dtype=dtype)
