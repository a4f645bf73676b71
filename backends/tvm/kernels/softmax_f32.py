"""Softmax over dense rows: e = exp(x - max), e / sum(e). Rows must hold a finite element.

Relative error at most (N / 16 + 8 + max - x) * 2^-23: a difference of d is rounded by d * 2^-24, which exp makes relative. Terms
below exp(-64) of the largest count as exp(-64), so an element of -inf gives at most 2e-28 and not 0.
"""

from __future__ import annotations

from tvm import tirx

from ....ir.errors import OptionError
from .emit import arguments, build
from .softmax_exact import softmax_rows
from .vector_math import exp_negative


def softmax(rows: int, length: int, dtype: str = "float32", level: str = "") -> tirx.PrimFunc:
    """(X [rows, length], Y [rows, length]) of `dtype`; half precision is rounded once, at the end.

    Raises OptionError for an empty extent.
    """
    if min(rows, length) < 1:
        raise OptionError(f"softmax: every extent must be at least 1, got {rows} x {length}")

    def body() -> None:
        x, y = arguments(("X", (rows, length), dtype), ("Y", (rows, length), dtype))
        softmax_rows(x, y, rows, length, lambda vectors: [exp_negative(vector) for vector in vectors], level)

    return build("softmax_f32", body, level)
