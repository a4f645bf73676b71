"""Float ops with a fixed order of operations, so that every backend gives the same bits.

IEEE 754 fixes add, subtract, multiply, divide and square root; what differs between libraries is the order of a reduction,
fused multiply-add and the polynomial behind exp. Here the order is part of the meaning: each operation below rounds once, in
float32, and none may be contracted, unless its product is exact. Reductions keep 16 running sums (lane i takes elements i,
i + 16, ...) and add them pairwise, 8, 4, 2, 1 apart: one vector register on the widest target.
"""

from __future__ import annotations

import torch

from ._library import define

LANES = 16

#: Split of ln 2 (Cody and Waite): 15 and 17 bits, so that their products with an n of 7 bits are exact, and a fused multiply-add
#: has the bits of two operations.
LOG2_E = 1.44269504088896341
LN2_HIGH = 22713 / 32768
LN2_LOW = 1.428605173714459e-06
#: P of exp(r) = 1 + r + r^2 P(r) on |r| <= ln2/2, highest power first: the least maximum relative error of four coefficients,
#: 1.05e-7. Two more (Cephes expf) would halve the error of the whole, and cost an eighth of an attention kernel's instructions.
EXP_POLYNOMIAL = (0.008312469348, 0.04189032316, 0.1666711569, 0.499992311)
#: exp of anything below is exp of this. A masked key scores -1e4 or less: were its power near 2^-126, dividing it by the row's
#: sum would give a denormal number, which costs x86 cores some 150 cycles in every operation that meets it. From here up they
#: stay normal.
EXP_LOWEST = -64.0


def _same(x, *_rest):
    return torch.empty_like(x)


def _f32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def lane_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis, kept as size 1, in the fixed order of this module."""
    length = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -length % LANES))
    chunks = padded.reshape(*x.shape[:-1], -1, LANES)
    lanes = chunks[..., 0, :]
    for index in range(1, chunks.shape[-2]):
        lanes = lanes + chunks[..., index, :]
    width = LANES
    while width > 1:
        width //= 2
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes


@define("square_root(Tensor x) -> Tensor", _same)
def square_root(x):
    """Correctly rounded square root of each element, float32.

    `torch.sqrt` on float32 goes to a vector library that misses the last bit of some 0.7% of values; in float64 its error is far
    below half a float32 step, and the second rounding is harmless.
    """
    return torch.sqrt(x.to(torch.float64)).to(torch.float32)


def exp_reference(x: torch.Tensor) -> torch.Tensor:
    """exp in float32 for x <= 0, exp(-64) below -64; relative error under 2e-7."""
    x = torch.clamp(x, min=EXP_LOWEST)
    n = torch.round(x * _f32(LOG2_E))
    r = x - n * _f32(LN2_HIGH)
    r = r - n * _f32(LN2_LOW)
    p = torch.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r + _f32(coefficient)
    p = p * (r * r) + r
    p = p + _f32(1.0)
    power = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return p * power


@define("softmax(Tensor x) -> Tensor", _same)
def softmax(x):
    """Softmax over the last axis: e = exp(x - max), e * (1 / lane_sum(e)). x float32 (..., N)."""
    x = x.contiguous()
    e = exp_reference(x - x.amax(-1, keepdim=True))
    return e * torch.reciprocal(lane_sum(e))


@define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _same)
def layer_norm(x, weight, bias, eps: float):
    """Layer normalization over the last axis. x float32 (..., N); weight, bias (N,).

    mean = lane_sum(x) * (1/N); d = x - mean; var = lane_sum(d * d) * (1/N); ((d * (1 / sqrt(var + eps))) * weight) + bias.
    """
    x = x.contiguous()
    inverse = torch.reciprocal(_f32(float(x.shape[-1])))
    d = x - lane_sum(x) * inverse
    variance = lane_sum(d * d) * inverse
    return d * torch.reciprocal(square_root(variance + _f32(eps))) * weight + bias


@define("reduce_sum(Tensor x, int dim, bool keepdim) -> Tensor", lambda x, dim, keepdim: torch.sum(x, dim, keepdim))
def reduce_sum(x, dim: int, keepdim: bool):
    """Float sum over one axis in the fixed order of this module."""
    total = lane_sum(x.movedim(dim, -1).contiguous()).movedim(-1, dim)
    return total if keepdim else total.squeeze(dim)
