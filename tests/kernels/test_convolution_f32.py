"""Float convolutions against torch in float64, within the bound that a float32 sum of that many products allows."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphwright.backends.tvm.kernels import convolution_f32, depthwise_f32, pooling_f32
from graphwright.backends.tvm.kernels.base import Convolution, padded
from graphwright.backends.tvm.kernels.float_base import (
    RELU,
    RELU6,
    Activation,
    FloatSpec,
    Tile,
    choose_tile,
    fits,
    level_of,
    panel_widths,
)
from graphwright.backends.tvm.kernels.half import NUMPY
from graphwright.ir.errors import OptionError, UnknownNameError
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from .float_cases import (
    AARCH64,
    ACTIVATIONS,
    AVX2,
    AVX512,
    HALF_FORMS,
    LEVELS,
    activated,
    assembly,
    assert_close,
    normal,
    run,
    to_logical,
    to_physical,
)

EXAMPLES = settings(max_examples=8, deadline=None)


def check(generator, pack, shape: Convolution, spec: FloatSpec, seed: int, **options) -> None:
    rng = np.random.default_rng(seed)
    x = normal(rng, shape.batch, shape.channels, shape.height, shape.width, dtype=spec.dtype)
    w = normal(rng, shape.filters, shape.channels // shape.groups, *shape.kernel, dtype=spec.dtype)
    bias, out = normal(rng, shape.filters), (shape.batch, shape.filters, shape.out_height, shape.out_width)
    added = normal(rng, *out, dtype=spec.dtype) if spec.residual else np.zeros(out, np.float32)
    values = [x if options.get("planar_input") else to_physical(x, rng), *([to_physical(added, rng)] if spec.residual else [])]
    inputs = (
        *(value.astype(NUMPY[spec.dtype]) for value in values),
        pack(shape, w, spec.dtype),
        convolution_f32.pack_bias(shape.filters, bias),
    )
    function = generator(shape, spec, **options)
    y = run(
        function, spec.level, inputs, (shape.batch, shape.out_height, shape.out_width, padded(shape.filters)), spec.dtype
    ).astype(np.float32)

    def reference(x, w, bias, added):
        x, w, bias, added = (torch.from_numpy(v.astype(np.float64)) for v in (x, w, bias, added))
        return (F.conv2d(x, w, bias, shape.stride, shape.padding, shape.dilation, shape.groups) + added).numpy()

    exact = activated(spec.activation, reference(x, w, bias, added))
    magnitude = reference(*(np.abs(v) for v in (x, w, bias, added)))
    depth = shape.channels // shape.groups * shape.kernel[0] * shape.kernel[1] + spec.residual
    assert_close(to_logical(y, shape.filters), exact, magnitude, depth, spec.activation, spec.dtype)


@st.composite
def convolutions(draw, groups: int = 1, depthwise: bool = False):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    if depthwise:
        channels = filters = groups = draw(st.integers(1, 40))
    else:
        channels, filters = (groups * draw(st.integers(1, most // groups)) for most in (40, 90))
    shape = Convolution(
        draw(st.integers(1, 2)), channels, draw(st.integers(1, 12)), draw(st.integers(1, 20)), filters,
        draw(st.sampled_from([(1, 1), (3, 3), (1, 5), (4, 2)])), draw(pair),
        draw(st.tuples(st.integers(0, 3), st.integers(0, 3))), draw(pair), groups,
    )  # fmt: skip
    assume(shape.out_height >= 1 and shape.out_width >= 1)
    return shape


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(shape=convolutions(), activation=ACTIVATIONS, residual=st.booleans(), seed=st.integers(0, 2**31))
def test_dense(level, shape, activation, residual, seed):
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, FloatSpec(activation, residual, level), seed)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    data=st.data(),
    groups=st.sampled_from([2, 3, 4, 8]),
    activation=ACTIVATIONS,
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_grouped(level, data, groups, activation, residual, seed):
    spec = FloatSpec(activation, residual, level)
    check(convolution_f32.convolution, convolution_f32.pack_weight, data.draw(convolutions(groups)), spec, seed)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    shape=convolutions(depthwise=True),
    activation=ACTIVATIONS,
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_depthwise(level, shape, activation, residual, seed):
    check(depthwise_f32.depthwise, depthwise_f32.pack_weight, shape, FloatSpec(activation, residual, level), seed)


@pytest.mark.parametrize(("dtype", "level", "dot"), HALF_FORMS)
@EXAMPLES
@given(
    data=st.data(), groups=st.sampled_from([1, 1, 3]), activation=ACTIVATIONS, residual=st.booleans(), seed=st.integers(0, 2**31)
)
def test_half_precision(dtype, level, dot, data, groups, activation, residual, seed):
    spec = FloatSpec(activation, residual, level, dtype=dtype, dot=dot)
    shape = data.draw(convolutions(groups))
    planar = shape.channels <= 16 and data.draw(st.booleans())
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, spec, seed, planar_input=planar)


@pytest.mark.parametrize(("dtype", "level", "dot"), [form for form in HALF_FORMS if not getattr(form, "values", form)[2]])
@EXAMPLES
@given(shape=convolutions(depthwise=True), activation=ACTIVATIONS, residual=st.booleans(), seed=st.integers(0, 2**31))
def test_half_precision_depthwise(dtype, level, dot, shape, activation, residual, seed):
    spec = FloatSpec(activation, residual, level, dtype=dtype, dot=dot)
    check(depthwise_f32.depthwise, depthwise_f32.pack_weight, shape, spec, seed)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(shape=convolutions(depthwise=True), seed=st.integers(0, 2**31))
def test_pools(level, shape, seed):
    rng = np.random.default_rng(seed)
    x = normal(rng, shape.batch, shape.channels, shape.height, shape.width)
    out = (shape.batch, shape.out_height, shape.out_width, padded(shape.channels))
    outside = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in shape.padding)), constant_values=-np.inf)
    window = {"kernel_size": shape.kernel, "stride": shape.stride, "dilation": shape.dilation}
    largest = F.max_pool2d(torch.from_numpy(outside), **window)
    y = run(pooling_f32.max_pool(shape, level), level, [to_physical(x, rng)], out)
    np.testing.assert_array_equal(to_logical(y, shape.channels), largest.numpy())
    taps, ones = shape.kernel[0] * shape.kernel[1], torch.ones(shape.channels, 1, *shape.kernel, dtype=torch.float64)

    def mean(x):
        x = torch.from_numpy(x.astype(np.float64))
        return F.conv2d(x, ones / taps, None, shape.stride, shape.padding, shape.dilation, shape.groups).numpy()

    y = run(pooling_f32.mean_pool(shape, level), level, [to_physical(x, rng)], out)
    assert_close(to_logical(y, shape.channels), mean(x), mean(np.abs(x)), taps)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "shape",
    [
        Convolution(1, 24, 14, 14, 40, (1, 1)),
        Convolution(3, 17, 1, 1, 33, (1, 1)),
        Convolution(1, 5, 1, 1, 7, (3, 3), padding=(1, 1)),
        Convolution(1, 6, 9, 9, 48, (3, 3), padding=(9, 9), dilation=(9, 9)),
        Convolution(1, 3, 8, 8, 16, (2, 2), padding=(3, 3)),
        Convolution(1, 32, 10, 10, 64, (3, 3), (1, 1), (1, 1), groups=2),
    ],
    ids=["pointwise", "pixels", "one pixel", "rows all padding", "padding above kernel", "groups of whole vectors"],
)
def test_corner_shapes(level, shape):
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, FloatSpec(RELU6, level=level), seed=1)


@pytest.mark.parametrize("tile", [Tile(6, 4), Tile(14, 2), Tile(28, 1), Tile(1, 15), Tile(5, 5)], ids=str)
def test_every_tile_gives_the_same_layer(tile):
    if not fits(level_of("avx512"), tile):
        pytest.fail(f"{tile} no longer fits")
    shape = Convolution(1, 20, 6, 29, 150, (3, 3), padding=(1, 1))
    narrow = FloatSpec(RELU, level="portable", tile=Tile(min(tile.rows, 6), 1))
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, narrow, 2)
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, FloatSpec(RELU, tile=tile), 2)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(shape=convolutions(), seed=st.integers(0, 2**31))
def test_planar_input(level, shape, seed):
    check(convolution_f32.convolution, convolution_f32.pack_weight, shape, FloatSpec(RELU6, level=level), seed, planar_input=True)


def test_depthwise_of_an_image_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(depthwise_f32, "CACHED_BYTES", 1)
    shape = Convolution(2, 40, 9, 11, 40, (3, 3), (2, 1), (1, 1), groups=40)
    check(depthwise_f32.depthwise, depthwise_f32.pack_weight, shape, FloatSpec(RELU6, level="portable"), 4)


def test_blocks_of_tiles_that_do_not_divide(monkeypatch):
    monkeypatch.setattr(convolution_f32, "BLOCK_BYTES", 4 * 4 * (20 + 80) * 4)
    spec = FloatSpec(RELU, level="portable")
    check(convolution_f32.convolution, convolution_f32.pack_weight, Convolution(1, 20, 9, 11, 70, (1, 1)), spec, 3)


@pytest.mark.parametrize(
    "level, options, register",
    [("avx512", AVX512, "zmm"), ("portable", AVX2, "ymm"), ("portable", AARCH64, "v")],
    ids=["avx512", "avx2", "aarch64"],
)
def test_accumulators_stay_in_registers(level, options, register):
    """The inner loop holds every multiply-add of the tile and touches no stack slot."""
    tile = Tile(14, 2) if level == "avx512" else Tile(6, 1)
    spec = FloatSpec(RELU6, level=level, tile=tile)
    text = assembly(convolution_f32.convolution(Convolution(1, 96, 28, 28, 64, (1, 1)), spec), options)
    multiply_add = r"\s(?:vfmadd\w+ps|fmla)\s"
    lines = text.splitlines()
    positions = [index for index, line in enumerate(lines) if re.search(multiply_add, line)]
    vectors = {"zmm": 1, "ymm": 2, "v": 4}[register]
    inner = lines[positions[0] : positions[-1] + 1]
    assert len(positions) == tile.rows * tile.groups * vectors
    assert all(register in lines[index] for index in positions)
    assert not [line for line in inner if re.search(r"%rsp|%rbp|\[sp", line)]


def test_choose_tile_fits_and_follows_the_shape():
    level = level_of("avx512")
    for columns in (1, 4, 7, 14, 49, 12544):
        for groups in (1, 2, 5, 20, 72):
            tile = choose_tile(level, 1, columns, groups, 96)
            assert fits(level, tile)
            assert tile.rows <= columns
            assert tile.groups <= groups
            assert sum(panels * width for _, panels, width in panel_widths(groups, tile.groups)) == groups
    assert choose_tile(level, 1, 1, 63, 1280).groups >= 8  # one row: many vectors hide the latency of a sum
    assert choose_tile(level, 7, 7, 32, 4608).rows == 7  # 7 outputs a line: one tile, nothing computed twice


def test_bad_arguments():
    shape = Convolution(1, 20, 8, 8, 40, (3, 3))
    with pytest.raises(OptionError, match="8 vector registers of level portable"):
        convolution_f32.convolution(shape, FloatSpec(tile=Tile(6, 3), level="portable"))
    with pytest.raises(UnknownNameError, match="avx512"):
        convolution_f32.convolution(shape, FloatSpec(level="avx51"))
    with pytest.raises(OptionError, match="expected shape"):
        convolution_f32.pack_weight(shape, np.zeros((40, 3, 3, 20), np.float32))
    with pytest.raises(OptionError, match="must be equal"):
        depthwise_f32.depthwise(shape)
    with pytest.raises(OptionError, match="above high"):
        Activation(1.0, 0.0)
