"""Float batched product of two activations: A [B, M, K], (R), B [B, K, N] or, transposed, [B, N, K], Y [B, M, N]."""

from __future__ import annotations

from tvm import tirx

from ...kernels.float_base import PLAIN, FloatSpec, MatrixProduct
from . import plan_float
from .family import function
from .family_float import PRECISION, block_of, dtype_of, tail_of


def matmul(shape: MatrixProduct, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    sizes = shape.batch, shape.rows, shape.inner, shape.columns
    given = dtype_of(spec), tail_of(spec), spec.level, block_of(spec), PRECISION
    return function(plan_float.matmul(*sizes, shape.transposed, *given))
