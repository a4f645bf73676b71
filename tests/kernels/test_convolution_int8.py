"""Every int8 convolution kernel equals gw::convolution and its tail, bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import convolution_int8
from graphwright.backends.tvm.kernels.base import Convolution, ResidualAdd, Tail, padded
from graphwright.backends.tvm.kernels.isa import isa_of
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.backends.tvm.kernels.tail import _early_zero_point
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, TORCH, TailCase, random_values, random_weight, run, tails, to_physical


def check(
    shape: Convolution, dtype: str, zero_point: int, case, level: str, seed: int, with_bias: bool = True, packing=None
) -> None:
    rng = np.random.default_rng(seed)
    x = random_values(rng, dtype, (shape.batch, shape.channels, shape.height, shape.width))
    weight = random_weight(rng, (shape.filters, shape.channels // shape.groups, *shape.kernel), packing)
    bias = rng.integers(-(10**4), 10**4, shape.filters).astype(np.int32) if with_bias else None
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point, packing=packing)
    function = convolution_int8.build(spec, case.tail, level)
    packed = convolution_int8.pack(spec, case.tail, level, weight, bias, **case.values)
    out_shape = (shape.batch, shape.filters, shape.out_height, shape.out_width)
    residual = random_values(rng, case.tail.residual.b_dtype, out_shape) if case.tail.residual else None
    inputs = [to_physical(x, rng)] + ([to_physical(residual, rng)] if residual is not None else [])
    output = np.zeros((shape.batch, shape.out_height, shape.out_width, padded(shape.filters)), case.tail.dtype)
    got = run(function, level, [*inputs, *packed], output)[..., : shape.filters].transpose(0, 3, 1, 2)
    acc = accumulated(shape, x, weight, bias, zero_point)
    want = case.reference(acc, 1, None if residual is None else torch.from_numpy(residual))
    np.testing.assert_array_equal(got, want.numpy())


def accumulated(shape: Convolution, x, weight, bias, zero_point: int) -> torch.Tensor:
    """`gw::convolution` of the image with its border written out."""
    (top, left), (height, width) = shape.padding, (shape.framed_height, shape.framed_width)
    frame = (left, width - left - shape.width, top, height - top - shape.height)
    return torch.ops.gw.convolution(
        torch.nn.functional.pad(torch.from_numpy(x), frame, value=zero_point), torch.from_numpy(weight),
        None if bias is None else torch.from_numpy(bias), shape.stride, (0, 0), shape.dilation, shape.groups, zero_point,
    )  # fmt: skip


@st.composite
def convolutions(draw, kind: str):
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    if draw(st.booleans()):
        kernel = (kernel[0], kernel[0])
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    end = draw(st.none() | st.tuples(st.integers(0, 3), st.integers(0, 3)))
    ends = end or padding
    smallest = [max(1, d * (k - 1) + 1 - p - q) for d, k, p, q in zip(dilation, kernel, padding, ends, strict=True)]
    height, width = (draw(st.integers(low, low + 16)) for low in smallest)
    if kind == "depthwise":
        channels = filters = groups = draw(st.integers(2, 140))
    elif kind == "grouped":
        groups = draw(st.integers(2, 4))
        channels, filters = groups * draw(st.integers(1, 9)), groups * draw(st.integers(2, 9))
    else:
        groups, channels, filters = 1, draw(st.integers(1, 70)), draw(st.integers(1, 150))
    batch = draw(st.integers(1, 2))
    return Convolution(batch, channels, height, width, filters, kernel, stride, padding, dilation, groups, end)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["dense", "pointwise", "depthwise", "grouped"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_equals_reference(kind, level, data):
    shape = data.draw(convolutions(kind))
    if kind == "pointwise":
        shape = Convolution(shape.batch, shape.channels, shape.height, shape.width, shape.filters, (1, 1), shape.stride)
    dtype, zero_point = data.draw(st.sampled_from([("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]))
    case = data.draw(tails(shape.filters))
    check(shape, dtype, zero_point, case, level, data.draw(st.integers(0, 10**6)), data.draw(st.booleans()))


REAL_LAYERS = [
    (Convolution(1, 32, 20, 20, 32, (3, 3), (1, 1), (1, 1), groups=32), "uint8", 7),  # two pixels a register, in place
    (Convolution(2, 96, 22, 22, 96, (3, 3), (2, 2), (1, 1), groups=96), "int8", -5),  # overlapping blocks, in place
    (Convolution(2, 144, 14, 14, 144, (5, 5), (2, 2), (2, 2), groups=144), "uint8", 255),  # two row groups
    (Convolution(1, 128, 7, 7, 128, (5, 5), (1, 1), (2, 2), groups=128), "int8", 3),  # copied band
    (Convolution(1, 48, 9, 30, 48, (3, 3), (2, 2), (1, 1), groups=48), "uint8", 1),  # stores in pieces
    (Convolution(1, 3, 32, 32, 32, (3, 3), (2, 2), (1, 1)), "uint8", 114),  # first layer: three channels
    (Convolution(1, 80, 14, 14, 112, (1, 1)), "int8", 12),  # 4 + 3 panels
    (Convolution(1, 144, 21, 21, 144, (5, 5), (2, 2), (1, 1), groups=144, padding_end=(2, 2)), "uint8", 0),  # "same" of TF
    (Convolution(1, 32, 17, 17, 32, (3, 3), (2, 2), (0, 0), groups=32, padding_end=(1, 1)), "uint8", 9),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layer", REAL_LAYERS, ids=lambda layer: f"{layer[0].channels}x{layer[0].height}-{layer[0].filters}")
def test_shapes_of_real_networks(layer, residual, level):
    shape, dtype, zero_point = layer
    add = ResidualAdd(700_000, 1_100_000, 20, 9, 100, 60, 0, 255, "uint8") if residual else None
    tail = Tail("rescale", "uint8", 9, 9, 255, add)
    check(shape, dtype, zero_point, TailCase(tail, {"scale": np.full(1, 1 / 300, np.float32)}), level, 0)


#: (type, zero points of both operands, zero point of the sum, shift): sums far outside the type, and one whose zero point has
#: no room in s32 before the shift.
SUMS = [("uint8", (0, 0), 0, 18), ("uint8", (131, 90), 117, 19), ("int8", (-5, -128), 12, 8), ("uint8", (255, 255), 200, 23)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("limits", [(0, 0), (3, 0), (0, 7)])
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums_outside_the_type_meet_its_limits_whoever_clamps(case, limits, level):
    dtype, (a, b), zero_point, shift = case
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    low, high = low + limits[0], high - limits[1]
    add = ResidualAdd(2**21 - 1, 2**21 - 9, shift, a, b, zero_point, low, high, dtype)
    tail = Tail("rescale", dtype, a, low, high, add)
    shape = Convolution(1, 24, 5, 6, 80, (1, 1))  # 4 panels and 1
    check(shape, "uint8", 7, TailCase(tail, {"scale": np.full(1, 1 / 90, np.float32)}), level, 1)


@pytest.mark.parametrize(
    "dtype, zero_point, shift, early", [("uint8", 0, 22, True), ("uint8", 200, 23, False), ("int8", -100, 20, True)]
)
def test_a_zero_point_is_added_before_the_shift_where_s32_has_room(dtype, zero_point, shift, early):
    limits = np.iinfo(dtype)
    add = ResidualAdd(2**21, 2**21, shift, 0, 0, zero_point, int(limits.min), int(limits.max), dtype)
    assert _early_zero_point(add, dtype) is early


def check_image(shape, dtype, zero_point, limits, level, rng):
    """A float image that the kernel quantizes, against the codes' convolution."""
    image = rng.normal(0, 8, (shape.batch, shape.channels, shape.height, shape.width)).astype(np.float32)
    weight = rng.integers(-128, 128, (shape.filters, shape.channels, *shape.kernel)).astype(np.int8)
    quantize = Quantize(0.07, zero_point, *limits, dtype)
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point, quantize)
    packed = convolution_int8.pack(spec, Tail("none", "int32"), level, weight, None)
    function = convolution_int8.build(spec, Tail("none", "int32"), level)
    output = np.zeros((shape.batch, shape.out_height, shape.out_width, padded(shape.filters)), np.int32)
    got = run(function, level, [image, *packed], output)[..., : shape.filters].transpose(0, 3, 1, 2)
    codes = torch.ops.gw.quantize(torch.from_numpy(image), 0.07, zero_point, *limits, TORCH[dtype])
    np.testing.assert_array_equal(got, accumulated(shape, codes.numpy(), weight, None, zero_point).numpy())


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_quantizes_a_float_image(level, data):
    shape = data.draw(convolutions("dense"))
    shape = dataclasses.replace(shape, channels=data.draw(st.integers(1, 9)), width=shape.width + data.draw(st.integers(0, 30)))
    dtype, zero_point = data.draw(st.sampled_from([("uint8", 0), ("uint8", 131), ("int8", -128), ("int8", 5)]))
    limits = data.draw(st.sampled_from([(0, 255), (3, 200)] if dtype == "uint8" else [(-128, 127), (-127, 100)]))
    check_image(shape, dtype, zero_point, limits, level, np.random.default_rng(data.draw(st.integers(0, 10**6))))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("dtype", "zero_point"), [("uint8", 131), ("int8", 5)])
@pytest.mark.parametrize("width", [9, 16, 37])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "dilation", "merged"),
    [(3, 7, 2, 1, True), (1, 3, 1, 1, True), (2, 3, 1, 1, True), (3, 3, 2, 1, False), (3, 7, 1, 2, False), (5, 3, 1, 1, False)],
)
def test_a_row_of_taps_is_one_run_of_bytes(channels, kernel, stride, dilation, merged, width, dtype, zero_point, level):
    pad = (kernel // 2 * dilation,) * 2
    shape = Convolution(2, channels, 8, width, 20, (kernel, kernel), (stride, stride), pad, dilation=(dilation, dilation))
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point, Quantize(0.07, zero_point, -128, 127, dtype))
    if isa_of(level).step == 4:
        assert convolution_int8.runs_on(spec, isa_of(level)) is merged
    limits = (0, 255) if dtype == "uint8" else (-128, 127)
    check_image(shape, dtype, zero_point, limits, level, np.random.default_rng(0))
