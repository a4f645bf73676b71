"""Float depthwise convolution: X [N, H, W, Cp], (R), W [taps, Cp], bias [Cp], Y [N, OH, OW, Cp]."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from .....ir.errors import OptionError
from ...kernels.base import Convolution
from ...kernels.float_base import PLAIN, FloatSpec
from . import plan_float
from .family import function
from .family_float import dtype_of, tail_of
from .plan_float import pack_bias, packed_weight_shape
from .plan_store import VALUE, Store

__all__ = ["depthwise", "pack_bias", "pack_weight", "packed_weight_shape"]


def pack_weight(shape: Convolution, weight: np.ndarray, dtype: str = "float32") -> np.ndarray:
    """(C, 1, KH, KW) -> [taps, C padded]."""
    return plan_float.pack_convolution(shape, weight, np.dtype(dtype))


def depthwise(shape: Convolution, spec: FloatSpec = PLAIN, store: Store = VALUE) -> tirx.PrimFunc:
    """The kernel; `store` names its last buffers. Raises OptionError: not a depthwise shape."""
    if not shape.depthwise:
        raise OptionError(f"depthwise: groups, channels and filters must be equal, got {shape}")
    return function(plan_float.depthwise(shape, dtype_of(spec), tail_of(spec), store=store))
