"""Float linear layer: X [M, K], (R [M, N]), W [N padded, K padded], bias [N padded], Y [M, N]."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from ...kernels.base import padded
from ...kernels.float_base import PLAIN, FloatSpec, MatrixProduct
from . import plan_float
from .family import function
from .family_float import PRECISION, block_of, dtype_of, tail_of
from .plan_float import pack_bias

__all__ = ["linear", "pack_bias", "pack_weight", "packed_weight_shape"]


def packed_weight_shape(inputs: int, outputs: int) -> tuple[int, int]:
    return padded(outputs), padded(inputs)


def pack_weight(weight: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """(N, K) -> [N padded, K padded], zeros in the padding."""
    return plan_float.pack_linear(weight, np.dtype(dtype))


def linear(shape: MatrixProduct, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    sizes = shape.rows, shape.inner, shape.columns
    return function(plan_float.linear(*sizes, dtype_of(spec), tail_of(spec), spec.level, block_of(spec), PRECISION))
