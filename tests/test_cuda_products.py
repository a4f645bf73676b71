"""Triton kernels in the interpreter (int8: equal to the dialect bit for bit; float: within the stated bound), and compiled ahead
of time for the tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
from graphwright.backends.target import Target
from graphwright.backends.tvm.cuda.build import triton_kernel
from graphwright.backends.tvm.cuda.kernels import (
    blocks,
    coded_f32,
    convolution_f32,
    convolution_int8,
    depthwise_f32,
    linear_int8,
    plan_float,
    plan_int8,
)
from graphwright.backends.tvm.cuda.kernels.blocks import Block, Problem
from graphwright.backends.tvm.cuda.kernels.plan_float import FloatTail
from graphwright.backends.tvm.cuda.kernels.plans import Plan, function_of
from graphwright.backends.tvm.cuda.launch import TritonCall, triton_call
from graphwright.backends.tvm.cuda.measure import plan_of
from graphwright.backends.tvm.cuda.triton_aot import compile_kernel
from graphwright.backends.tvm.kernels.base import Convolution, Tail
from graphwright.backends.tvm.kernels.coded_f32 import Coded, Minifloat
from graphwright.backends.tvm.kernels.convolution_int8 import ConvolutionInt8
from graphwright.backends.tvm.kernels.float_base import FloatSpec, MatrixProduct
from graphwright.backends.tvm.kernels.linear_int8 import LinearInt8
from graphwright.backends.tvm.kernels.quantize_image import Quantize
from graphwright.backends.tvm.lower import lower
from graphwright.backends.tvm.tuning import TuningDatabase, TuningRow
from graphwright.backends.tvm.tuning.families import FAMILIES, tuned
from graphwright.ir.dialect import gw
from graphwright.ir.errors import OptionError, TargetError
from graphwright.tools.bench.cuda_shapes import SHAPES
from integer_graphs import codes, integers, program, scales
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTEGER = ("linear", "matmul", "dense", "grouped", "depthwise", "image", "framed", "attention", "linears", "lookup", "outliers")
FLOAT = tuple(f"float-{name}" for name in ("linear", "matmul", "dense", "grouped", "depthwise", "planar", "attention"))
CODED = ("coded-linear", "coded-decode")
CASES_EACH = 3
TYPES = {"uint8": "*u8", "int8": "*i8", "int32": "*i32", "float32": "*fp32", "float16": "*fp16"}
TAIL = Tail("rescale", "uint8", 0, 0, 255)


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    worker = Path(__file__).parent / "triton_worker.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent / ".link")}
    command = [sys.executable, str(worker), "7", str(CASES_EACH)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("group", (*INTEGER, *FLOAT, *CODED))
def test_kernels_give_what_their_ops_mean(interpreted, group):
    rows = [row for row in interpreted if row["group"] == group]
    assert len(rows) == CASES_EACH
    assert [row for row in rows if row.get("wrong") != 0] == []
    assert max(row["values"] for row in rows) > 20  # not all clamped away


def test_every_group_of_the_worker_is_compared(interpreted):
    assert {row["group"] for row in interpreted} == {*INTEGER, *FLOAT, *CODED}


def compiled(plan: Plan, capability: int) -> str:
    function = function_of(plan)
    pointers = [name for name in function.arg_names if name not in plan.constants]
    signature = dict.fromkeys(function.arg_names, "constexpr")
    signature |= {name: TYPES[dtype] for name, (_, _, dtype) in zip(pointers, plan.buffers, strict=True)}
    place = function.arg_names.index
    constants = {(place(name),): value for name, value in plan.constants.items()}
    aligned = {(place(name),): [["tt.divisibility", 16]] for name in pointers}
    options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": False}
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def test_large_products_use_wgmma_on_hopper():
    text = compiled(plan_int8.linear(4096, 4096, 4096, "int8", TAIL, "sm_90", Block(128, 256, 128, 8, 3)), 90)
    assert re.search(r"wgmma.mma_async.sync.aligned.m64n\d+k32.s32.s8.s8", text)
    assert "cp.async.cg.shared.global" in text and "fma.rn" not in text


def test_convolutions_copy_whole_vectors_ahead_of_the_tensor_cores():
    shape = Convolution(1, 64, 14, 14, 64, (3, 3), padding=(1, 1))
    text = compiled(plan_int8.convolution(shape, "uint8", 0, TAIL, "sm_80"), 80)
    assert "mma.sync.aligned.m16n8k32" in text
    assert "cp.async.cg.shared.global" in text and "fma.rn" not in text


def test_half_precision_goes_to_the_tensor_cores_and_float32_does_not():
    sizes = 1024, 384, 384
    half = compiled(plan_float.linear(*sizes, "float16", FloatTail(), "sm_90"), 90)
    single = compiled(plan_float.linear(*sizes, "float32", FloatTail(), "sm_90"), 90)
    assert "wgmma" in half and "wgmma" not in single and "mma.sync" not in single


@pytest.mark.parametrize("kernel", ["convolution", "planar", "depthwise"])
def test_float_functions_declare_the_buffers_that_their_packers_fill(kernel):
    shape = Convolution(1, 20, 9, 9, 20, (3, 3), padding=(1, 1), groups=20 if kernel == "depthwise" else 1)
    spec = FloatSpec(level="sm_90", residual=True)
    family = depthwise_f32 if kernel == "depthwise" else convolution_f32
    function = (
        depthwise_f32.depthwise(shape, spec)
        if kernel == "depthwise"
        else convolution_f32.convolution(shape, spec, kernel == "planar")
    )
    x, residual, weight, bias, y = [tuple(int(d) for d in p.shape) for p in function.params]
    packed = family.pack_weight(shape, np.ones((20, 20 // shape.groups, 3, 3), np.float32))
    assert (x, residual, y) == ((1, 20, 9, 9) if kernel == "planar" else (1, 9, 9, 32), (1, 9, 9, 32), (1, 9, 9, 32))
    assert (weight, bias) == (packed.shape, (32,)) and packed.sum() == 20 * 9 * (20 // shape.groups)


def test_coded_functions_declare_the_buffers_that_every_target_packs():
    coded = Coded(24, 36, 4, 12, 16, None, zero=True, taps=9)
    decoded = [(tuple(int(d) for d in p.shape), str(p.dtype)) for p in coded_f32.decode(coded, "sm_90").params]
    assert decoded[:-1] == [(shape, dtype) for _, shape, dtype in coded.arguments()]
    assert decoded[-1][0] == convolution_f32.packed_weight_shape(Convolution(1, 4, 9, 9, 24, (3, 3)))
    flat = Coded(24, 64, 4, 16, 15, Minifloat(7, 1, -3))
    function = coded_f32.linear(MatrixProduct(2, 64, 24), flat, FloatSpec(level="sm_90"))
    assert [tuple(int(d) for d in p.shape) for p in function.params] == [(2, 64), (2, 32, 16), (2, 4, 16), (32,), (2, 24)]


def test_functions_declare_the_buffers_that_pack_fills():
    shape = Convolution(2, 20, 9, 9, 24, (3, 3), padding=(1, 1))
    spec, rng = ConvolutionInt8(shape, "uint8", 3), np.random.default_rng(0)
    weight = rng.integers(-128, 128, (24, 20, 3, 3), np.int8)
    function = convolution_int8.build(spec, TAIL, "sm_90")
    packed = convolution_int8.pack(spec, TAIL, "sm_90", weight, None, scale=np.ones(1, np.float32))
    declared = [(tuple(int(d) for d in p.shape), str(p.dtype)) for p in function.params]
    assert declared[1:-1] == [(array.shape, str(array.dtype)) for array in packed]
    assert declared[0] == ((2, 9, 9, 32), "uint8") and declared[-1] == ((2, 9, 9, 32), "uint8")
    call = triton_call(function)
    assert call is not None and call.function == "triton_int8:convolution" and dict(call.constants)["BATCH"] == 2


def test_a_first_layer_of_many_taps_quantizes_its_image_in_a_launch_of_its_own():
    shape = Convolution(2, 3, 20, 20, 24, (7, 7), (2, 2), (3, 3))
    spec = ConvolutionInt8(shape, "uint8", 3, Quantize(0.02, 3, 0, 255, "uint8"))
    function = convolution_int8.build(spec, TAIL, "sm_90")
    packed = convolution_int8.pack(spec, TAIL, "sm_90", np.ones((24, 3, 7, 7), np.int8), None, scale=np.ones(1, np.float32))
    declared = [(tuple(int(d) for d in p.shape), str(p.dtype)) for p in function.params]
    assert declared[0] == ((2, 3, 20, 20), "float32") and declared[1:-1] == [(a.shape, str(a.dtype)) for a in packed]
    assert plan_of(function) == convolution_int8.plan(spec, TAIL, "sm_90")
    call = triton_call(function)
    assert call is not None
    kernel = triton_kernel("first", function, call, "sm_90")
    # The scratch stands behind the five buffers of the function: written by the first launch, read by the second in X's place.
    assert [launch.pointers for launch in kernel.phases] == [(0, 5), (5, 1, 2, 3, 4)]
    assert [launch.name for launch in kernel.phases] == ["first_frame", "first"]
    assert kernel.scratch == (2 * 25 * 28 * 4,)


def test_products_look_their_results_up():
    """A lookup that alone reads the codes of a product is part of its kernel; the table then lies as the kernel wants it."""

    def graph(p, x, y):
        hidden = gw.lookup(gw.rescale(gw.linear(x, p.w, None, 3), p.s, 5, 0, 255, torch.uint8, 1), p.table)
        shared = gw.rescale(gw.linear(hidden, p.w, None, 0), p.s, 0, -128, 127, torch.int8, 1)
        image = gw.rescale(gw.convolution(y, p.v, None, [1, 1], [1, 1], [1, 1], 1, 0), p.s, 0, -128, 127, torch.int8, 1)
        return gw.lookup(shared, p.table), shared, gw.lookup(image, p.table)

    parameters = {"w": integers(-127, 128, 37, 37), "v": integers(-127, 128, 37, 3, 3, 3), "s": scales(37, 1e-3)}
    traced = program(graph, codes(9, 37), codes(1, 3, 5, 5), **parameters, table=codes(256))
    rows = lower(traced, Target("cuda", "sm_90")).kernels
    assert sum(row.name.startswith("lookup") for row in rows) == 1
    assert [sum("lookup" in node for node in row.nodes) for row in rows if row.macs] == [1, 0, 1]
    tail = Tail("rescale", "int8", 0, -128, 127, table="uint8")
    _, table = plan_int8.pack_tail(tail, 3, scale=np.ones(3), table=np.arange(256))
    assert table[[0, 127, 128, 255]].tolist() == [128, 255, 0, 127]


def test_layers_of_the_same_rows_and_their_outliers_are_two_launches():
    """What `split-outliers` makes of a layer of two linear ones: hidden outliers run beside the hidden channels, and are added
    with the residual by the layer behind them. A layer that is read twice is no outlier's."""

    def graph(p, x, stream):
        hidden = gw.lookup(gw.rescale(gw.linear(x, p.w, p.b, 3), p.s, 5, 0, 255, torch.uint8, 1), p.table)
        few = gw.lookup(gw.rescale(gw.linear(x, p.few, None, 3), p.s, 5, 0, 255, torch.uint8, 1), p.table)
        whole = gw.scale(gw.linear(hidden, p.v, None, 4), p.s, 1)
        total = whole + gw.scale(gw.linear(few, p.columns, None, 2), p.s, 1) + stream
        shared = gw.scale(gw.linear(few, p.columns, None, 2), p.t, 1)
        return total, gw.scale(gw.linear(hidden, p.v, None, 4), p.s, 1) + shared, shared

    parameters = {"w": integers(-127, 128, 64, 37), "v": integers(-127, 128, 37, 64), "few": integers(-127, 128, 2, 37)}
    parameters |= {"columns": integers(-127, 128, 37, 2), "b": integers(-9, 9, 64).to(torch.int32), "s": scales(1, 1e-3)}
    parameters |= {"t": scales(1, 2e-3), "table": codes(256)}
    traced = program(graph, codes(9, 37), torch.randn(9, 37), **parameters)
    rows = [row for row in lower(traced, Target("cuda", "sm_90")).kernels if row.macs]
    assert [row.name.rstrip("0123456789") for row in rows] == ["linears_int", "linear_int", "linear_int", "linear_int"]
    assert [sum("linear" in node for node in row.nodes) for row in rows] == [2, 2, 1, 1]


def test_an_addition_normalizes_what_it_reads():
    """A normalization whose codes one layer reads, and whose value another layer adds, leaves codes and two numbers a row."""

    def graph(p, x):
        q = gw.quantize(gw.layer_norm(x, p.g, p.c, 1e-5), 0.02, 117, 0, 255, torch.uint8)
        return gw.scale(gw.linear(q, p.w, None, 117), p.s, 2) + gw.layer_norm(x, p.g, p.b, 1e-5)

    def read_twice(p, x):
        value = gw.layer_norm(x, p.g, p.b, 1e-5)
        q = gw.quantize(value, 0.02, 117, 0, 255, torch.uint8)
        return gw.scale(gw.linear(q, p.w, None, 117), p.s, 2) + value, value * 2.0

    parameters = {name: torch.randn(37) for name in "gbc"} | {"w": integers(-127, 128, 37, 37), "s": scales(37, 1e-4)}
    names = []
    for function in (graph, read_twice):
        rows = lower(program(function, torch.randn(2, 9, 37), **parameters), Target("cuda", "sm_90")).kernels
        names.append([row.name.rstrip("0123456789") for row in rows if "linear" in row.name or "norm" in row.name])
    assert names == [["layer_norm_statistics", "linear_int"], ["layer_norm", "linear_int"]]


def test_a_narrow_layer_rides_along_where_the_others_fill_the_chip():
    """A tile column of its own would be a wave of programs more; where multiprocessors are idle it costs nothing."""

    def graph(p, x):
        return [gw.rescale(gw.linear(x, w, None, 3), p.s, 5, 0, 255, torch.uint8, 1) for w in (p.few, p.w, p.v)]

    parameters = {"w": integers(-127, 128, 1024, 37), "v": integers(-127, 128, 48, 37), "few": integers(-127, 128, 2, 37)}
    for rows, columns in ((4096, [1024, 48, 2]), (9, [2, 1024, 48])):
        traced = program(graph, codes(rows, 37), s=scales(1, 1e-3), **parameters)
        module = lower(traced, Target("cuda", "sm_90"))
        (row,) = [row for row in module.kernels if row.macs]
        assert row.macs == rows * 37 * 1074
        function = next(f for v, f in module.module.functions_items() if v.name_hint == row.name)
        assert [int(b.shape[1]) for b in function.params if str(b.dtype) == "uint8"][1:] == columns


def test_a_linear_layer_of_odd_sizes_is_padded_only_in_its_weights():
    spec = LinearInt8(5, 37, 10, "int8", 0)
    function = linear_int8.build(spec, TAIL, "sm_90")
    packed = linear_int8.pack(spec, TAIL, "sm_90", np.ones((10, 37), np.int8), None, scale=np.ones(1, np.float32))
    assert [a.shape for a in packed] == [(16, 48), (16,), (16,)]
    assert [tuple(int(d) for d in p.shape) for p in function.params][-1] == (5, 10)


def test_every_guess_fits_its_chip_and_small_products_fill_it():
    for level in blocks.SHARED_BYTES:
        for problem in (Problem(1, 1000, 2048), Problem(49, 512, 4608), Problem(4096, 4096, 4096), Problem(7, 5, 3, unit=4)):
            block = blocks.choose(problem, level)
            assert blocks.shared_bytes(block, problem.unit) <= blocks.SHARED_BYTES[level]
    assert blocks.programs(blocks.choose(Problem(49, 512, 4608), "sm_90"), Problem(49, 512, 4608)) >= 100


def test_a_block_that_does_not_fit_the_chip_is_refused_where_it_is_compiled():
    plan = plan_int8.linear(4096, 4096, 4096, "int8", TAIL, "sm_86", Block(128, 256, 128, 8, 4))
    call = TritonCall.of(plan.function, plan.constants, plan.grid, plan.warps, plan.stages)
    with pytest.raises(TargetError, match=r"triton_int8:linear.*bytes of shared memory.*sm_86.*BK=128, BM=128, BN=256, 4 stages"):
        compile_kernel(call, [dtype for _, _, dtype in plan.buffers], "sm_86")


def test_sums_that_could_leave_s32_are_refused():
    with pytest.raises(OptionError, match="131072 products"):
        plan_int8.linear(1, 131_072, 16, "int8", TAIL, "sm_90")


def test_an_empty_output_and_a_float_image_with_groups_are_refused():
    with pytest.raises(OptionError, match="empty output"):
        plan_int8.convolution(Convolution(1, 8, 2, 2, 8, (3, 3)), "int8", 0, TAIL, "sm_90")
    quantize = plan_int8.ImageQuantize(1.0, 0, 255)
    with pytest.raises(OptionError, match="only dense"):
        plan_int8.convolution(Convolution(1, 8, 9, 9, 8, (3, 3), groups=2), "uint8", 0, TAIL, "sm_90", None, quantize)


def test_a_database_row_decides_how_a_product_is_cut():
    spec = (LinearInt8(128, 384, 1536, "uint8", 0), TAIL, "sm_90")
    choice = {"rows": 64, "columns": 32, "depth": 128, "warps": 4, "stages": 3, "group": 8}
    row = TuningRow("linear_int8 128x384 -> 128x1536", "sm_90", choice, 2.0, 3.0, 1, "a GPU", "2026-11-23")
    found, key = tuned(linear_int8.build, spec, TuningDatabase([row]))
    assert key == row.key and found[3] == Block(64, 32, 128, 4, 3, 8)
    call = triton_call(linear_int8.build(*found))
    assert call is not None and call.grid == (2 * 48, 1, 1) and dict(call.constants)["BK"] == 128
    assert len(FAMILIES[linear_int8.build].space(spec)) > 8


@pytest.mark.parametrize("index", [0, 2, 24, 120])
def test_shapes_that_are_measured_are_named_as_lowering_looks_them_up(index):
    product = SHAPES[index]
    quantize = Quantize(0.02, 114, 0, 255, "uint8") if product.image else None
    if isinstance(product.shape, Convolution):
        spec, build = ConvolutionInt8(product.shape, product.dtype, 0, quantize), convolution_int8.build
    else:
        rows, inner, outer = product.shape
        spec, build = LinearInt8(rows, inner, outer, product.dtype, 0), linear_int8.build
    assert FAMILIES[build].key((spec, TAIL, "sm_90")) == product.key
