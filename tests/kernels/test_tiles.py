"""Kernels on a tile unit equal the gw:: references bit for bit: on the emulated unit everywhere, on AMX where it exists."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from graphwright.backends.host import X86_FLAGS
from graphwright.backends.target import Target
from graphwright.backends.tvm.kernels import (
    convolution_int8,
    convolution_tiles,
    gemm_tiles,
    linear_int8,
    matmul_int8,
    slices,
)
from graphwright.backends.tvm.kernels.base import Convolution, ResidualAdd, Tail, padded
from graphwright.backends.tvm.kernels.isa import isa_of
from graphwright.backends.tvm.target import missing_to_emit, tvm_target
from graphwright.ir.errors import OptionError
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tvm import tirx
from tvm_ffi import structural_map

from .kernel_cases import TILE_LEVELS, TailCase, check_matmul, random_values, run, tails
from .test_convolution_int8 import check

AMX = Target("x86", "avx512-amx")
#: The processor decides for itself which shapes pay; these tests want every shape on tiles.
SLOW_VECTORS = {"vector_ns": lambda *_: float("inf")}
DTYPES = [("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]
QUICK = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def always_tiles(monkeypatch):
    for module in (gemm_tiles, convolution_tiles):
        for name, value in SLOW_VECTORS.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("level", TILE_LEVELS)
@QUICK
@given(data=st.data())
def test_linear_equals_reference(always_tiles, level, data):
    rows, inner, outer = (data.draw(st.integers(least, most)) for least, most in ((16, 70), (1, 400), (1, 120)))
    dtype, zero_point = data.draw(st.sampled_from(DTYPES))
    case = data.draw(tails(outer))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x, weight = random_values(rng, dtype, (rows, inner)), random_values(rng, "int8", (outer, inner))
    bias = rng.integers(-(10**4), 10**4, outer).astype(np.int32)
    spec = linear_int8.LinearInt8(rows, inner, outer, dtype, zero_point)
    assert linear_int8.tiled(spec, isa_of(level))
    packed = linear_int8.pack(spec, case.tail, level, weight, bias, **case.values)
    residual = [random_values(rng, case.tail.residual.b_dtype, (rows, outer))] if case.tail.residual else []
    function = linear_int8.build(spec, case.tail, level)
    got = run(function, level, [x, *residual, *packed], np.zeros((rows, outer), case.tail.dtype))
    acc = torch.ops.gw.linear(torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias), zero_point)
    want = case.reference(acc, 1, torch.from_numpy(residual[0]) if residual else None)
    np.testing.assert_array_equal(got, want.numpy())


@pytest.mark.parametrize("level", TILE_LEVELS)
@pytest.mark.parametrize("transposed", [False, True])
@QUICK
@given(data=st.data())
def test_matmul_equals_reference(always_tiles, transposed, level, data):
    spec = check_matmul(data, level, transposed, ((1, 3), (16, 50), (1, 90), (1, 70)), DTYPES)
    assert matmul_int8.tiled(spec, isa_of(level))


@st.composite
def convolutions(draw):
    kernel, stride, dilation = ((draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (3, 3, 2))
    padding = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    height, width = (draw(st.integers(low, low + 18)) for low in smallest)
    channels, filters = draw(st.integers(1, 70)), draw(st.integers(1, 50))
    return Convolution(draw(st.integers(1, 2)), channels, height, width, filters, kernel, stride, padding, dilation)


@pytest.mark.parametrize("level", TILE_LEVELS)
@pytest.mark.parametrize("split", [True, False], ids=["flat", "lines"])
@QUICK
@given(data=st.data())
def test_both_forms_of_a_convolution_equal_the_reference(monkeypatch, split, level, data):
    shape = data.draw(convolutions())
    form = convolution_tiles.form(shape, split)
    assume(form is not None)
    monkeypatch.setattr(convolution_tiles, "tiled", lambda *_: form)
    dtype, zero_point = data.draw(st.sampled_from(DTYPES))
    check(shape, dtype, zero_point, data.draw(tails(shape.filters)), level, data.draw(st.integers(0, 10**6)))


REAL_LAYERS = [
    (Convolution(1, 3, 40, 40, 64, (7, 7), (2, 2), (3, 3)), "uint8", 114),  # ResNet's stem: a kernel row is one step
    (Convolution(1, 64, 14, 14, 64, (3, 3), (1, 1), (1, 1)), "uint8", 0),  # flat, two pixels dropped a line
    (Convolution(2, 48, 15, 15, 32, (3, 3), (2, 2), (1, 1)), "int8", -7),  # flat over four phases
    (Convolution(1, 80, 14, 14, 112, (1, 1)), "int8", 12),  # an odd number of panels
    (Convolution(1, 128, 14, 14, 32, (1, 1), (2, 2)), "uint8", 3),  # every second pixel
]


@pytest.mark.parametrize("level", TILE_LEVELS)
@pytest.mark.parametrize("layer", REAL_LAYERS, ids=lambda layer: f"{layer[0].channels}x{layer[0].height}-{layer[0].filters}")
def test_layers_of_real_networks(always_tiles, layer, level):
    shape, dtype, zero_point = layer
    spec = convolution_int8.ConvolutionInt8(shape, dtype, zero_point)
    assert convolution_int8.tiled_form(spec, isa_of(level)) is not None
    add = ResidualAdd(700_000, 1_100_000, 20, 9, 100, 60, 0, 255, "uint8")
    tail = Tail("rescale", "uint8", 9, 9, 255, add)
    check(shape, dtype, zero_point, TailCase(tail, {"scale": np.full(1, 1 / 300, np.float32)}), level, 0)


@pytest.mark.parametrize("rows_outer", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_every_blocking_gives_the_same_rows(monkeypatch, rows_outer, chunks):
    monkeypatch.setattr(gemm_tiles, "choose_blocking", lambda *_: gemm_tiles.Blocking(rows_outer, chunks))
    tail = Tail("none", "int32")
    check(Convolution(2, 40, 9, 21, 150, (1, 1)), "uint8", 9, TailCase(tail, {}), "portable-tiles", 1)


#: One layer of each kind in ResNet-50: the stem, 1x1, 3x3, 3x3 and 1x1 of stride 2, shallow and deep, lines of 56 to 7 pixels.
RESNET50 = [
    Convolution(1, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)),
    Convolution(1, 64, 56, 56, 64, (1, 1)),
    Convolution(1, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1)),
    Convolution(1, 128, 56, 56, 128, (3, 3), (2, 2), (1, 1)),
    Convolution(1, 256, 56, 56, 512, (1, 1), (2, 2)),
    Convolution(1, 1024, 14, 14, 256, (1, 1)),
    Convolution(1, 512, 7, 7, 512, (3, 3), (1, 1), (1, 1)),
]


def test_code_for_amx_holds_its_instructions():
    """The real level compiles on any machine, for u8 and for s8 activations."""
    assert not missing_to_emit(AMX)
    tail, unsigned, signed = Tail("rescale", "uint8", 3, 0, 255), {}, {}
    for number, shape in enumerate(RESNET50):
        spec = convolution_int8.ConvolutionInt8(shape, "uint8", 7)
        assert convolution_int8.tiled_form(spec, isa_of(AMX.level)), f"{shape} belongs on tiles"
        unsigned[f"convolution{number}"] = convolution_int8.build(spec, tail, AMX.level)
    linear = linear_int8.LinearInt8(128, 384, 1536, "int8", 0)  # MiniLM's
    signed["linear"] = linear_int8.build(linear, tail, AMX.level)
    signed["scores"] = matmul_int8.build(matmul_int8.MatmulInt8(12, 128, 32, 128, "int8", 0, transposed=True), tail, AMX.level)
    for group, instruction in ((unsigned, "tdpbusd"), (signed, "tdpbssd")):
        text = assembly(group)
        for wanted in (instruction, "ldtilecfg", "tileloadd", "tilestored", "tilerelease"):
            assert text.count(wanted) >= len(group), f"{wanted} is missing"


def assembly(functions: dict[str, tirx.PrimFunc]) -> str:
    module = tvm.IRModule({name: function.with_attr("global_symbol", name) for name, function in functions.items()})
    return tvm.compile(module, target=tvm_target(AMX)).mod.inspect_source("s")


def test_few_rows_stay_on_registers():
    level = isa_of(AMX.level)
    assert not linear_int8.tiled(linear_int8.LinearInt8(1, 1280, 1000, "uint8", 0), level)
    assert not linear_int8.tiled(linear_int8.LinearInt8(15, 1280, 1000, "uint8", 0), level)
    assert linear_int8.tiled(linear_int8.LinearInt8(16, 1280, 1000, "uint8", 0), level)
    shallow = convolution_int8.ConvolutionInt8(Convolution(1, 16, 112, 112, 96, (1, 1)), "uint8", 0)
    assert convolution_int8.tiled_form(shallow, level) is None, "16 channels fill a quarter of a tile"


def test_tiling_is_refused_where_tiles_run():
    spec, tail = linear_int8.LinearInt8(64, 256, 256, "uint8", 0), Tail("none", "int32")
    tiling = linear_int8.choose_tiling(linear_int8.Pixels(1, 1, 64, 0, 0, 256, 256), 256, 64, isa_of("avx512-vnni"))
    with pytest.raises(OptionError, match="on tiles"):
        linear_int8.build(spec, tail, AMX.level, tiling=tiling)


def test_other_levels_do_not_use_tiles():
    spec = convolution_int8.ConvolutionInt8(Convolution(1, 256, 14, 14, 256, (3, 3), (1, 1), (1, 1)), "uint8", 0)
    for level in ("avx512-vnni", "portable"):
        assert convolution_int8.tiled_form(spec, isa_of(level)) is None
    assert X86_FLAGS["avx512-vnni"] < X86_FLAGS["avx512-amx"]


def test_hoist_configures_once_a_slice():
    function = linear_int8.build(linear_int8.LinearInt8(256, 512, 512, "uint8", 0), Tail("none", "int32"), AMX.level)
    loops = []

    def visit(loop):
        if loop.kind == tirx.ForKind.PARALLEL:
            loops.append(loop)
        return loop

    structural_map(function.body, (tirx.For, visit))
    (loop,) = loops
    hoisted = slices.hoist(loop)
    *before, inner, after = hoisted.seq
    assert "ldtilecfg" in str(before[-1]) and "tilerelease" in str(after)
    assert isinstance(inner, tirx.For) and "ldtilecfg" not in str(inner) and "tdpbusd" in str(inner)
    assert slices.hoist(inner) is inner, "nothing is left to move"
    assert padded(5, 4) == 8
