"""Products of 8-bit floats: `gw::quantize_fp8`, `gw::linear_fp8` and `gw::convolution_fp8`.

    x ~ scale * x8,     x8 in e4m3: 1 sign, 4 exponent and 3 mantissa bits, no infinity, largest 448, smallest 2^-9

One scale a tensor for activations, one an output channel for weights; the format is OCP's E4M3 (Micikevicius et al. 2022,
arXiv:2209.05433; `torch.float8_e4m3fn`). A product of two such numbers is a float32, and so it is summed; what a backend may do
otherwise is the order of the sum, and its bits that tensor cores keep (`backends/tvm/cuda/kernels/triton_fp8.py`). These ops have
no gradient, and say so where one is asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import PassError
from ._library import LIBRARY, define
from .fake import broadcast_along

E4M3 = torch.float8_e4m3fn

#: The largest magnitude of e4m3.
LARGEST = 448.0


def inverse_of(scale: float) -> torch.Tensor:
    """float32(1 / float32(scale)): what a value is multiplied with."""
    return torch.reciprocal(torch.tensor(scale, dtype=torch.float32))


@define("quantize_fp8(Tensor x, float scale) -> Tensor", lambda x, scale: torch.empty_like(x, dtype=E4M3))
def quantize_fp8(x, scale: float):
    """e4m3(clamp(x * float32(1 / scale), -448, 448)), rounded to nearest, half to even. x of any float type and shape."""
    return (x.to(torch.float32) * inverse_of(scale)).clamp(-LARGEST, LARGEST).to(E4M3)


def quantize_rows(weight: torch.Tensor, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 codes, float32 scales (O,)) of a weight (O, ...): the largest magnitude of an output channel becomes 448.

    smallest: the scale of a channel of zeros.
    """
    rows = weight.detach().to(torch.float32).reshape(weight.shape[0], -1)
    scale = (rows.abs().amax(1) / LARGEST).clamp_min(smallest)
    codes = (rows / scale[:, None]).clamp(-LARGEST, LARGEST).to(E4M3)
    return codes.reshape(weight.shape), scale


def _linear_shape(x, weight, scale, bias, dtype):
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=dtype, device=x.device)


@define("linear_fp8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor", _linear_shape)
def linear_fp8(x, weight, scale, bias, dtype: torch.dtype):
    """(x @ weight^T) * scale + bias in float32, rounded to `dtype`. x (..., K), weight (N, K) e4m3; scale, bias (N,) float32."""
    out = F.linear(x.to(torch.float32), weight.to(torch.float32)) * scale
    return (out if bias is None else out + bias).to(dtype)


def _convolution_shape(x, weight, scale, bias, stride, padding, dilation, dtype):
    conv = {3: F.conv1d, 4: F.conv2d}[x.dim()]
    return conv(x.to(torch.float32), weight.to(torch.float32), None, stride, padding, dilation).to(dtype)


@define(
    "convolution_fp8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, ScalarType dtype) -> Tensor",
    _convolution_shape,
)
def convolution_fp8(x, weight, scale, bias, stride, padding, dilation, dtype: torch.dtype):
    """convolution(x, weight) * scale + bias in float32, rounded to `dtype`.

    x (N, C, *spatial) and weight (O, C, *kernel) e4m3, 1-D or 2-D, of one group; scale, bias (O,) float32.
    """
    conv = {3: F.conv1d, 4: F.conv2d}[x.dim()]
    out = conv(x.to(torch.float32), weight.to(torch.float32), None, stride, padding, dilation)
    out = out * broadcast_along(scale, x.dim(), 1)
    return (out if bias is None else out + broadcast_along(bias, x.dim(), 1)).to(dtype)


def _no_gradient(ctx, *gradients):
    raise PassError("layers of 8-bit floats have no gradient; put quantize-fp8 behind every pass that trains")


for _name in ("quantize_fp8", "linear_fp8", "convolution_fp8"):
    torch.library.register_autograd(f"gw::{_name}", _no_gradient, lib=LIBRARY)
