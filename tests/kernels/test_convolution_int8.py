"""Every int8 convolution kernel equals gw::convolution and its tail, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import convolution_int8
from graphwright.backends.tvm.kernels.base import Convolution, padded
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, random_integers, run, tails, to_physical


def check(shape: Convolution, dtype: str, zero_point: int, case, level: str, seed: int, with_bias: bool = True) -> None:
    rng = np.random.default_rng(seed)
    x = random_integers(rng, dtype, (shape.batch, shape.channels, shape.height, shape.width))
    weight = rng.integers(-128, 128, (shape.filters, shape.channels // shape.groups, *shape.kernel)).astype(np.int8)
    bias = rng.integers(-(10**4), 10**4, shape.filters).astype(np.int32) if with_bias else None
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point)
    function = convolution_int8.build(spec, case.tail, level)
    packed = convolution_int8.pack(spec, case.tail, level, weight, bias, **case.values)
    out_shape = (shape.batch, shape.filters, shape.out_height, shape.out_width)
    residual = random_integers(rng, case.tail.residual.b_dtype, out_shape) if case.tail.residual else None
    inputs = [to_physical(x, rng)] + ([to_physical(residual, rng)] if residual is not None else [])
    output = np.zeros((shape.batch, shape.out_height, shape.out_width, padded(shape.filters)), case.tail.dtype)
    got = run(function, level, [*inputs, *packed], output)[..., : shape.filters].transpose(0, 3, 1, 2)
    acc = torch.ops.gw.convolution(
        torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias),
        shape.stride, shape.padding, shape.dilation, shape.groups, zero_point,
    )  # fmt: skip
    want = case.reference(acc, 1, None if residual is None else torch.from_numpy(residual))
    np.testing.assert_array_equal(got, want.numpy())


@st.composite
def convolutions(draw, kind: str):
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    if draw(st.booleans()):
        kernel = (kernel[0], kernel[0])
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (draw(st.integers(low, low + 16)) for low in smallest)
    if kind == "depthwise":
        channels = filters = groups = draw(st.integers(2, 140))
    elif kind == "grouped":
        groups = draw(st.integers(2, 4))
        channels, filters = groups * draw(st.integers(1, 9)), groups * draw(st.integers(2, 9))
    else:
        groups, channels, filters = 1, draw(st.integers(1, 70)), draw(st.integers(1, 150))
    return Convolution(draw(st.integers(1, 2)), channels, height, width, filters, kernel, stride, padding, dilation, groups)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["dense", "pointwise", "depthwise", "grouped"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_reference(kind, level, data):
    shape = data.draw(convolutions(kind))
    if kind == "pointwise":
        shape = Convolution(shape.batch, shape.channels, shape.height, shape.width, shape.filters, (1, 1), shape.stride)
    dtype, zero_point = data.draw(st.sampled_from([("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]))
    case = data.draw(tails(shape.filters))
    check(shape, dtype, zero_point, case, level, data.draw(st.integers(0, 10**6)), data.draw(st.booleans()))
