"""u8/s8 2-D convolution on tensor cores (dense: implicit GEMM; grouped: over bands of channels) and depthwise, with fused tails.

Specifications and buffers are those of `kernels/convolution_int8`. Weights of fewer than 8 bits stand as s8: tensor cores read
bytes, and these layers are not bound by their weights.
"""

from __future__ import annotations

import numpy as np
from tvm import tirx

from ...kernels.base import Tail
from ...kernels.convolution_int8 import ConvolutionInt8
from . import plan_image, plan_int8
from .blocks import Block
from .family import function


def plan(spec: ConvolutionInt8, tail: Tail, level: str, block: Block | None = None) -> plan_int8.Plan:
    given = spec.quantize
    if given is None:
        return plan_int8.convolution(spec.shape, spec.dtype, spec.zero_point, tail, level, block)
    quantize = plan_int8.ImageQuantize(given.inverse, given.qmin, given.qmax)
    return plan_image.convolution(spec.shape, spec.dtype, spec.zero_point, tail, level, quantize, block)


def build(spec: ConvolutionInt8, tail: Tail, level: str, block: Block | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one convolution on a chip of `level` ("sm_90"). Raises OptionError as `plan_int8.convolution`."""
    return function(plan(spec, tail, level, block), name)


def pack(
    spec: ConvolutionInt8, tail: Tail, level: str, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Packed parameters in buffer order; arguments as those of `kernels/convolution_int8.pack`."""
    layer = (spec.shape, spec.dtype, spec.zero_point, tail, weight, bias)
    if spec.quantize is None:
        return plan_int8.pack_convolution(*layer, quantized=False, **values)
    return plan_image.pack(*layer, **values)
