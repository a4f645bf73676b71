"""Several u8/s8 linear layers of the same rows in one launch. CPUs have no such kernel: a call costs them nothing."""

from __future__ import annotations

from tvm import tirx

from ...kernels.linear_int8 import LinearInt8
from . import plan_linears
from .blocks import Block
from .family import function
from .plan_linears import Parts


def linears(spec: LinearInt8, parts: Parts, level: str, block: Block | None = None) -> tirx.PrimFunc:
    """(X, W, B, scale, tables, Y_0, Y_1, ...). spec: a layer of the outputs of all parts with tiles of their own."""
    return function(plan_linears.linears(spec.rows, spec.inner, spec.dtype, parts, level, block), "linears_int8")
