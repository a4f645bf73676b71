"""Batched product of two activations on tensor cores: u8/s8 by s8 with zero point 0, whose column sums are taken in the loop."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.base import Tail
from ...kernels.matmul_int8 import MatmulInt8
from . import plan_int8
from .blocks import Block
from .family import function


def build(spec: MatmulInt8, tail: Tail, level: str, block: Block | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one batched product. Raises OptionError: B is not s8 with zero point 0."""
    if spec.b_dtype != "int8" or spec.b_zero_point != 0:
        raise OptionError(
            f"matmul: the second operand is {spec.b_dtype} with zero point {spec.b_zero_point}; quantize it symmetric, as int8"
        )
    sizes = spec.batch, spec.rows, spec.inner, spec.columns
    return function(plan_int8.matmul(*sizes, spec.a_dtype, spec.a_zero_point, spec.transposed, tail, level, block), name)


def pack(spec: MatmulInt8, tail: Tail, level: str, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tail's parameters, expanded; values (1,) or (N,)."""
    return plan_int8.pack_tail(tail, spec.columns, **values)
