"""Kernels over packed weights equal the gw:: references bit for bit, whichever way they unpack."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import convolution_int8, convolution_tiles, depthwise_int8, gemm_tiles, linear_int8, packed
from graphwright.backends.tvm.kernels.base import Convolution, ResidualAdd, Tail
from graphwright.backends.tvm.kernels.isa import isa_of
from graphwright.backends.tvm.kernels.packed import VECTOR, Packing, Storage, packing_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, TILE_LEVELS, TailCase, random_values, random_weight, run, tails
from .test_convolution_int8 import check, convolutions

ANY = 1 << 40
#: Each way of unpacking, whatever the shape: what its choice depends on, as far as it would go.
WAYS = {
    "registers": {"FEW_PATCHES": ANY},
    "once a task": {"FEW_PATCHES": 0, "L1_BYTES": ANY},
    "tiles": {"FEW_PATCHES": 0, "L1_BYTES": 0, "LEAST_PATCHES": 1},
    "shared": {"FEW_PATCHES": 0, "L1_BYTES": 0, "MOST_SCRATCH": 0},
}
DTYPES = [("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]
PACKINGS = st.builds(Packing, st.integers(2, 7), st.booleans())
QUICK = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def way(monkeypatch, request):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(packed, name, value)
    monkeypatch.setattr(packed, "parallel_kind", lambda microseconds: "parallel")
    return request.param


@pytest.fixture
def always_tiles(monkeypatch):
    for module in (gemm_tiles, convolution_tiles):
        monkeypatch.setattr(module, "vector_ns", lambda *_: float("inf"))


def check_linear(data, level: str, sizes) -> linear_int8.LinearInt8:
    rows, inner, outer = (data.draw(st.integers(least, most)) for least, most in sizes)
    dtype, zero_point = data.draw(st.sampled_from(DTYPES))
    case, packing = data.draw(tails(outer)), data.draw(PACKINGS)
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x, weight = random_values(rng, dtype, (rows, inner)), random_weight(rng, (outer, inner), packing)
    spec = linear_int8.LinearInt8(rows, inner, outer, dtype, zero_point, packing)
    arrays = linear_int8.pack(spec, case.tail, level, weight, None, **case.values)
    assert arrays[0].dtype == np.uint8
    residual = [random_values(rng, case.tail.residual.b_dtype, (rows, outer))] if case.tail.residual else []
    function = linear_int8.build(spec, case.tail, level)
    got = run(function, level, [x, *residual, *arrays], np.zeros((rows, outer), case.tail.dtype))
    acc = torch.ops.gw.linear(torch.from_numpy(x), torch.from_numpy(weight), None, zero_point)
    want = case.reference(acc, 1, torch.from_numpy(residual[0]) if residual else None)
    np.testing.assert_array_equal(got, want.numpy())
    return spec


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@QUICK
@given(data=st.data())
def test_linear(way, level, data):
    check_linear(data, level, ((1, 40), (1, 150), (1, 150)))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_few_rows(level, data):
    check_linear(data, level, ((1, 3), (1, 700), (1, 300)))


@pytest.mark.parametrize("level", TILE_LEVELS)
@pytest.mark.parametrize("way", ["once a task", "tiles", "shared"], indirect=True)
@settings(QUICK, max_examples=1)
@given(data=st.data())
def test_linear_on_tiles(always_tiles, way, level, data):
    spec = check_linear(data, level, ((16, 40), (1, 200), (1, 60)))
    assert linear_int8.tiled(spec, isa_of(level))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@settings(QUICK, max_examples=3)
@given(data=st.data())
def test_dense_convolution(way, level, data):
    shape = data.draw(convolutions("dense"))
    dtype, zero_point = data.draw(st.sampled_from(DTYPES))
    check(shape, dtype, zero_point, data.draw(tails(shape.filters)), level, 0, packing=data.draw(PACKINGS))


@pytest.mark.parametrize("level", TILE_LEVELS)
@pytest.mark.parametrize(("way", "bits"), [("once a task", 3), ("tiles", 4), ("tiles", 7)], indirect=["way"])
def test_convolution_on_tiles(always_tiles, way, level, bits):
    shape = Convolution(1, 20, 5, 17, 40, (2, 2), (1, 1), (0, 1))
    case = TailCase(Tail("rescale", "uint8", 9, 9, 255), {"scale": np.full(40, 1 / 300, np.float32)})
    check(shape, "uint8", 7, case, level, 0, packing=Packing(bits, shifted=bits == 7))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["depthwise", "grouped"])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_groups(kind, level, data):
    shape = data.draw(convolutions(kind))
    if data.draw(st.booleans()):
        shape = dataclasses.replace(shape, dilation=(1, 1))
    dtype, zero_point = data.draw(st.sampled_from(DTYPES))
    packing = Packing(data.draw(st.integers(2, 7)))
    check(shape, dtype, zero_point, data.draw(tails(shape.filters)), level, 0, packing=packing)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 8))
def test_depthwise_of_real_networks(bits, level):
    shape = Convolution(1, 144, 21, 21, 144, (5, 5), (2, 2), (1, 1), groups=144, padding_end=(2, 2))
    tail = Tail("rescale", "uint8", 9, 9, 255)
    if level == "avx512-vnni":
        assert depthwise_int8.choose_plan(shape, tail, isa_of(level)) is not None
    check(shape, "uint8", 7, TailCase(tail, {"scale": np.full(1, 1 / 300, np.float32)}), level, 0, packing=Packing(bits))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", range(2, 8))
def test_layers_of_real_networks(bits, level):
    """Every width on the way that the shape itself chooses: 3x3 of a residual block, and 1x1 over few positions."""
    add = ResidualAdd(700_000, 1_100_000, 20, 9, 100, 60, 0, 255, "uint8")
    case = TailCase(Tail("rescale", "uint8", 9, 9, 255, add), {"scale": np.full(1, 1 / 300, np.float32)})
    check(Convolution(1, 32, 14, 14, 32, (3, 3), (1, 1), (1, 1)), "uint8", 114, case, level, bits, packing=Packing(bits))
    check(Convolution(1, 112, 7, 7, 200, (1, 1)), "int8", 3, case, level, bits, packing=Packing(bits, shifted=True))


@settings(max_examples=40, deadline=None)
@given(PACKINGS, st.integers(1, 1500), st.integers(1, 3), st.integers(0, 10**6))
def test_stored_bytes(packing, unit, count, seed):
    """Pieces of neighbouring vectors share their bytes: `bits` of 8 of the plain size, up to what is left of the last group."""
    storage = Storage(unit, count, packing)
    codes = np.random.default_rng(seed).integers(0, 1 << packing.bits, (count, unit))
    stored = storage.pack((codes - (1 << packing.bits - 1)).astype(np.int8).reshape(-1))
    assert stored.dtype == np.uint8 and stored.shape == storage.argument[1]
    vectors = -(-unit // VECTOR)
    assert stored.nbytes // count - packing.shifted * VECTOR < (vectors * packing.bits / 8 + len(packing.widths)) * VECTOR
    if vectors % packing.group == 0:
        assert stored.nbytes // count - packing.shifted * VECTOR == vectors * packing.bits * VECTOR // 8


def test_values_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Storage(4, 1, Packing(2)).pack(np.array([0, 1, 2, -2], np.int8))


@pytest.mark.parametrize(
    ("values", "bits", "by_channel", "level", "expected"),
    [
        ([-7, 7], 4, True, "avx512-vnni", Packing(4)),
        ([-8, 7], 4, False, "avx512-vnni", Packing(4)),
        ([-3, 12], 4, True, "avx512-vnni", Packing(4, shifted=True)),
        ([-3, 12], 4, True, "dotprod", Packing(4, shifted=True)),
        ([-3, 12], 4, True, "i8mm", Packing(5)),
        ([-3, 12], 4, True, "neon", Packing(5)),
        ([-3, 12], 4, False, "avx512-vnni", Packing(5)),
        ([-3, 124], 7, False, "portable", None),
        ([-3, 124], 7, True, "portable", Packing(7, shifted=True)),
        ([-63, 63], 7, False, "portable", Packing(7)),
    ],
)
def test_how_a_weight_is_stored(values, bits, by_channel, level, expected):
    assert packing_of(np.array(values, np.int8), bits, by_channel, level) == expected


def test_plain_weights_are_stored_as_they_were():
    spec = convolution_int8.ConvolutionInt8(Convolution(1, 8, 6, 6, 16, (3, 3)), "uint8", 0)
    arrays = convolution_int8.pack(
        spec, Tail("none", "int32"), "portable", random_weight(np.random.default_rng(0), (16, 8, 3, 3)), None
    )
    assert arrays[0].dtype == np.int8 and arrays[0].size == 16 * 8 * 9
