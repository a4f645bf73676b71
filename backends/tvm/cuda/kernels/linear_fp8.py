"""Linear layer of e4m3 bytes: X [M, K], (R [M, N]), W [N padded, K padded], scale and bias [N padded], then what `Store` names:
(inverse [1]), (Y [M, N]), (Q [M, N], codes)."""

from __future__ import annotations

from tvm import tirx

from ...kernels.float_base import FloatSpec, MatrixProduct
from . import plan_fp8
from .family import function
from .family_float import block_of, tail_of
from .plan_store import VALUE, Store


def linear(shape: MatrixProduct, spec: FloatSpec, store: Store = VALUE) -> tirx.PrimFunc:
    """spec: the types of R and Y, the tail and the level. store: whether Y, its codes for the next layer, or both are written."""
    sizes = shape.rows, shape.inner, shape.columns
    return function(plan_fp8.linear(*sizes, spec.dtype, tail_of(spec), spec.level, store, block_of(spec)))
