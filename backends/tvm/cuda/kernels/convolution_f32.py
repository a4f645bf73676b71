"""Float 2-D convolution, dense or grouped, as an implicit GEMM with bias, residual and activation fused.

Buffers are those of `kernels/convolution_f32`: X [N, H, W, Cp] or planar [N, C, H, W], (R), W packed, bias, Y [N, OH, OW, Op].
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from ...kernels.base import Convolution
from ...kernels.float_base import PLAIN, FloatSpec
from . import plan_float
from .family import function
from .family_float import PRECISION, block_of, dtype_of, tail_of
from .plan_float import pack_bias, packed_weight_shape
from .plan_store import VALUE, Store

__all__ = ["convolution", "pack_bias", "pack_weight", "packed_weight_shape"]


def pack_weight(shape: Convolution, weight: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """(O, C / groups, KH, KW) -> [O padded, taps * channels padded], k = (tap, channel), zeros elsewhere."""
    return plan_float.pack_convolution(shape, weight, np.dtype(dtype))


def convolution(shape: Convolution, spec: FloatSpec = PLAIN, planar_input: bool = False, store: Store = VALUE) -> tirx.PrimFunc:
    """The kernel; `store` names its last buffers. Raises OptionError: a planar image with groups."""
    options = spec.level, planar_input, block_of(spec), PRECISION, store
    return function(plan_float.convolution(shape, dtype_of(spec), tail_of(spec), *options))
