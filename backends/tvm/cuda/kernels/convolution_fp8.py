"""2-D convolution of e4m3 bytes as an implicit GEMM: X [N, H, W, Cp], (R), W packed, scale and bias [Op], then what
`Store` names: (inverse [1]), (Y [N, OH, OW, Op]), (Q [N, OH, OW, Op], codes)."""

from __future__ import annotations

from tvm import tirx

from ...kernels.base import Convolution
from ...kernels.float_base import FloatSpec
from . import plan_fp8
from .family import function
from .family_float import block_of, tail_of
from .plan_store import VALUE, Store


def convolution(shape: Convolution, spec: FloatSpec, store: Store = VALUE) -> tirx.PrimFunc:
    """As `linear_fp8.linear`. Raises OptionError: groups, or an empty output."""
    return function(plan_fp8.convolution(shape, spec.dtype, tail_of(spec), spec.level, store, block_of(spec)))
