"""`gw::quantize` of a float image [N, C, H, W] of few channels into [N, H, W, Cp]: on a GPU a plain map is all it takes."""

from __future__ import annotations

from tvm import tirx

from ...kernels import layout
from ...kernels.quantize_image import Quantize


def quantize_image(shape: tuple[int, int, int, int], quantize: Quantize, level: str) -> tirx.PrimFunc:
    """X float32 [N, C, H, W] -> Y [N, H, W, Cp] of the quantized type; the zero point in the lanes past C."""
    return layout.quantize_to_channels(shape, quantize.scale, quantize.zero_point, quantize.qmin, quantize.qmax, quantize.dtype)
