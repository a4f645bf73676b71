"""u8/s8 linear layer over dense rows on tensor cores. Weights of fewer than 8 bits stand as s8."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from ...kernels.base import Tail
from ...kernels.linear_int8 import LinearInt8
from . import plan_int8
from .blocks import Block
from .family import function


def build(spec: LinearInt8, tail: Tail, level: str, block: Block | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one linear layer on a chip of `level` ("sm_90")."""
    return function(plan_int8.linear(spec.rows, spec.inner, spec.outer, spec.dtype, tail, level, block), name)


def pack(
    spec: LinearInt8, tail: Tail, level: str, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Packed parameters in buffer order; arguments as those of `kernels/linear_int8.pack`."""
    return plan_int8.pack_linear(spec.dtype, spec.zero_point, tail, weight, bias, **values)
