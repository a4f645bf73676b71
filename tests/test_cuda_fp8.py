"""Products of 8-bit floats on a GPU: kernels within their bound, on the tensor cores' own instruction, and whole networks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.cuda.kernels import convolution_fp8, linear_fp8, plan_fp8, quantize_fp8
from graphwright.backends.tvm.cuda.kernels.blocks import Block
from graphwright.backends.tvm.cuda.kernels.plan_float import FloatTail
from graphwright.backends.tvm.cuda.kernels.plan_store import Store
from graphwright.backends.tvm.cuda.launch import triton_call
from graphwright.backends.tvm.cuda.triton_aot import compile_kernel
from graphwright.backends.tvm.kernels.base import Convolution
from graphwright.backends.tvm.kernels.float_base import FloatSpec, MatrixProduct
from graphwright.backends.tvm.tuning import TuningDatabase, TuningRow
from graphwright.backends.tvm.tuning.families import FAMILIES, tuned
from graphwright.ir.errors import OptionError
from graphwright.ir.program import Program
from graphwright.tools.bench.cuda_shapes import SHAPES
from graphwright.tools.quick import quick_program
from graphwright.tools.sources import resolve
from test_cuda_products import compiled

CASES_EACH = 4
SPEC = FloatSpec(level="sm_90", dtype="float16")
IMAGE = Convolution(2, 20, 9, 9, 24, (3, 3), padding=(1, 1))
FORMS = (Store(), Store(True, True), Store(False, True))


def worker(script: str, *arguments: str) -> list[dict]:
    """The rows that a script beside this file prints, with Triton's interpreter."""
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(folder.parent / ".link")}
    command = [sys.executable, str(folder / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    return worker("triton_fp8_worker.py", "7", str(CASES_EACH))


@pytest.mark.parametrize("group", ["fp8-linear", "fp8-convolution", "fp8-quantize"])
def test_kernels_give_what_their_ops_mean(interpreted, group):
    rows = [row for row in interpreted if row["group"] == group]
    assert len(rows) == CASES_EACH
    assert [row for row in rows if row.get("wrong") != 0] == []
    assert max(row["values"] for row in rows) > 20  # not all clamped away


def test_networks_compute_what_torch_does():
    """In float32 a code hardly ever differs; with half precision between layers, torch rounds once more before it, and some are
    neighbours: below what the format itself loses."""
    single, half = worker("fp8_network.py")
    assert max(single["off"]) < 0.01 and max(half["off"]) < 0.06
    assert 0.03 < max(single["loss"] + half["loss"]) < 0.1
    # Codes are stored by the kernel of the layer before, a float one too; a padded image has none.
    assert [nodes for _, nodes in half["kernels"] if nodes[0].startswith("quantize")] == [["quantize_fp8_default_2"]]
    covered = [nodes for _, nodes in half["kernels"] if nodes[-1].startswith("quantize")]
    assert ["convolution_4", "relu_4", "quantize_fp8_default_3"] in covered
    assert any(nodes[3:5] == ["matmul_1", "permute_3"] and nodes[-1] == "quantize_fp8_default_7" for nodes in covered)
    assert ["linear_fp8_default_1", "add_1", "quantize_fp8_default_6"] in covered and len(covered) == 9


# -- code ----------------------------------------------------------------------------------------------------------------------


def test_large_products_use_the_wide_instruction_on_hopper():
    plan = plan_fp8.linear(4096, 4096, 4096, "float16", FloatTail(), "sm_90", block=Block(128, 256, 128, 8, 3))
    text = compiled(plan, 90)
    assert re.search(r"wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3", text)
    assert "cp.async.cg.shared.global" in text and "local" not in text


def test_ada_multiplies_bytes_too():
    text = compiled(plan_fp8.convolution(IMAGE, "float16", FloatTail(), "sm_89", block=Block(64, 32, 32, 4, 3)), 89)
    assert "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32" in text and "cp.async" in text


@pytest.mark.parametrize("level", plan_fp8.LEVELS)
@pytest.mark.parametrize("store", FORMS, ids=["value", "both", "codes"])
def test_kernels_compile_ahead_of_time(level, store, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = FloatSpec(level=level, dtype="float16", residual=True)
    functions = (
        linear_fp8.linear(MatrixProduct(37, 130, 50), spec, store),
        convolution_fp8.convolution(IMAGE, spec, store),
        quantize_fp8.quantize(1000, "bfloat16"),
    )
    for function in functions:
        call = triton_call(function)
        assert call is not None
        kernel = compile_kernel(call, [str(buffer.dtype) for buffer in function.params], level)
        assert kernel.cubin.startswith(b"\x7fELF")


# -- plans ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", FORMS, ids=["value", "both", "codes"])
def test_functions_declare_the_buffers_that_pack_fills(store):
    function = convolution_fp8.convolution(IMAGE, FloatSpec(level="sm_90", dtype="float16", residual=True), store)
    declared = [(str(p.name), tuple(int(d) for d in p.shape), str(p.dtype)) for p in function.params]
    weight = plan_fp8.pack_convolution(IMAGE, np.ones((24, 20, 3, 3), np.uint8))
    vector = plan_fp8.pack_scale(24, np.ones(24, np.float32))
    out = (2, 9, 9, 32)
    assert weight.sum() == 24 * 20 * 9 and vector.sum() == 24
    wanted = [("X", (2, 9, 9, 32), "uint8"), ("R", out, "float16"), ("W", weight.shape, "uint8")]
    wanted += [("scale", vector.shape, "float32"), ("bias", (32,), "float32")]
    wanted += (
        [("inverse", (1,), "float32")] * store.codes + [("Y", out, "float16")] * store.value + [("Q", out, "uint8")] * store.codes
    )
    assert declared == wanted


@pytest.mark.parametrize(("depth", "steps"), [(64, 1), (2048, 16), (2304, 9), (4608, 12), (8192, 16)])
def test_sums_are_of_one_depth_each_and_none_of_more_products_than_stated(depth, steps):
    plan = plan_fp8.linear(256, depth, 256, "float16", FloatTail(), "sm_90", block=Block(128, 128, 128, 4, 3))
    assert plan.constants["STEPS"] == steps and steps * 128 <= max(plan_fp8.SUMMED, 128)


def test_what_no_kernel_computes_is_refused():
    with pytest.raises(OptionError, match="4 groups.*quantize-fp8's skip"):
        plan_fp8.convolution(Convolution(1, 64, 9, 9, 64, (3, 3), groups=4), "float16", FloatTail(), "sm_90")
    with pytest.raises(OptionError, match="empty output"):
        plan_fp8.convolution(Convolution(1, 64, 2, 2, 64, (3, 3)), "float16", FloatTail(), "sm_90")
    with pytest.raises(OptionError, match="value, codes of it, or both"):
        Store(False, False)
    with pytest.raises(OptionError, match="at least 1, got 0"):
        plan_fp8.quantize(0, "float32")


def test_a_database_row_decides_how_a_product_is_cut():
    spec = (MatrixProduct(128, 384, 1536), SPEC, Store(False, True))
    choice = {"rows": 64, "columns": 32, "depth": 128, "warps": 4, "stages": 3, "group": 8}
    row = TuningRow("linear_fp8 128x384 -> 128x1536", "sm_90", choice, 2.0, 3.0, 1, "a GPU", "2026-11-23")
    found, key = tuned(linear_fp8.linear, spec, TuningDatabase([row]))
    call = triton_call(linear_fp8.linear(*found))
    assert key == row.key and call is not None and call.grid == (2 * 48, 1, 1) and dict(call.constants)["BK"] == 128
    assert len(FAMILIES[linear_fp8.linear].space(spec)) > 8


def test_shapes_that_are_measured_are_named_as_lowering_looks_them_up():
    products = [product for product in SHAPES if product.fp8]
    assert len(products) > 80
    for product in products:
        if isinstance(product.shape, Convolution):
            spec, generator = product.shape, convolution_fp8.convolution
        else:
            spec, generator = MatrixProduct(*product.shape), linear_fp8.linear
        assert FAMILIES[generator].key((spec, SPEC, Store())) == product.key


# -- whole networks --------------------------------------------------------------------------------------------------------------


def network(name: str) -> Program:
    return quick_program(resolve(name), "fp8")


@pytest.mark.parametrize(("name", "layers", "own"), [("resnet20", 21, 1), ("vit-tiny", 25, 1)])
def test_networks_become_artifacts_for_hopper(name, layers, own, tmp_path):
    """own: kernels that only make codes, of what no layer of 8-bit floats computes."""
    program = network(name)
    compiled = TVMBackend().compile(program, Target("cuda", "sm_90"), lambda *_: None)
    products = [row for row in compiled.kernels if re.match("(convolution|linear)_fp8", row.name)]
    assert len(products) == layers and all(row.macs and row.dtype == "float8_e4m3fn" for row in products)
    assert sum(row.name.startswith("quantize_fp8") for row in compiled.kernels) == own
    float32 = sum(t.numel() * 4 for t in resolve(name).program.parameters().values())
    assert sum(row.weights for row in products) < 0.4 * float32
