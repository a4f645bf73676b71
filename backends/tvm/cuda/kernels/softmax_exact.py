"""`gw::softmax` over dense rows, bit-equal to its torch definition."""

from __future__ import annotations

from tvm import tirx

from .....ir.errors import OptionError
from ..launch import device_function
from .rows import rows_call


def softmax(rows: int, length: int, name: str = "softmax_exact", dtype: str = "float32") -> tirx.PrimFunc:
    """(X [rows, length], Y [rows, length]). Raises OptionError for an empty extent."""
    if min(rows, length) < 1:
        raise OptionError(f"softmax: every extent must be at least 1, got {rows} x {length}")
    call = rows_call("softmax", rows, {"ROWS": rows, "LENGTH": length})
    return device_function(name, [("X", (rows, length), dtype), ("Y", (rows, length), dtype)], call)
