"""Integer programs in ONNX: ONNX Runtime gives the reference's bits, whether it optimizes the graph or runs it as it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.errors import UnsupportedOpError
from graphwright.ir.onnx_export import export_onnx
from graphwright.ir.program import Program, Stage
from integer_graphs import codes, integers, normal, program, scales
from quantize_models import BLOCK, ConvNet, Mixed, prepared
from quantize_models import Block as QuantizedBlock
from quantize_models import run as run_passes
from torch import nn

S8, U8 = torch.int8, torch.uint8
LEVELS = (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def answers(proto: onnx.ModelProto, *inputs: torch.Tensor) -> list[list[np.ndarray]]:
    """The outputs, once as written and once optimized."""
    found = []
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = level
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        found.append(session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}))
    return found


def check(exported: Program, *inputs: torch.Tensor) -> None:
    """Same types, same bits (and so the same zeros)."""
    for outputs in answers(export_onnx(exported), *inputs):
        for actual, expected in zip(outputs, exported(*inputs), strict=True):
            assert actual.dtype == expected.numpy().dtype
            np.testing.assert_array_equal(actual.view(np.uint8), np.ascontiguousarray(expected.numpy()).view(np.uint8))


# -- float islands: fewer lanes than 16, as many, and more, even and odd ---------------------------------------------------------

WIDTHS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 49, 100, 192, 257]


@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int):
    x = normal(3, 5, width) * torch.tensor([0.01, 1.0, 300.0]).reshape(3, 1, 1) + normal(3, 5, 1)
    check(program(lambda p, x: gw.layer_norm(x, p.w, p.b, 1e-5), x, w=normal(width), b=normal(width)), x)


@pytest.mark.parametrize("width", WIDTHS)
def test_softmax(width: int):
    x = normal(2, 3, 9, width) * 10
    x[0, 0, :, 1:] = -1e4  # masked keys
    x[0, 1] = 0.5
    check(program(lambda p, x: gw.softmax(x), x), x)


@pytest.mark.parametrize("width", [1, 15, 16, 35])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_roots_and_quotients(width: int, keepdim: bool):
    x = normal(2, width, 5, 3) * 7
    for dim in (1, -1, 0):
        check(program(lambda p, x, d=dim: gw.reduce_sum(x, d, keepdim), x), x)
    check(program(lambda p, x: x / gw.square_root(gw.reduce_sum(x * x, 1, True)), x), x)


def test_elements_one_by_one():
    x, y = normal(1000) * 5, normal(1000)
    check(program(lambda p, x, y: (x * 0.3 + 1.7) / 7.0 - y / (1.0 + y.abs()), x, y), x, y)
    check(program(lambda p, x, y: torch.relu(x).clamp(max=4.0) * torch.where(x > y, x, -y), x, y), x, y)


def test_exp_over_its_whole_range():
    """Softmax of (0, x): the exponential of every x is in the result."""
    x = torch.stack([torch.zeros(20_001), -torch.linspace(0, 70, 20_001)], -1)
    check(program(lambda p, x: gw.softmax(x), x), x)


# -- integers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [U8, S8])
def test_products(dtype: torch.dtype):
    x, y, zero = codes(2, 3, 7, 33, dtype=dtype), codes(2, 3, 33, 5, dtype=S8), 5
    bias = integers(-9999, 9999, 11, dtype=torch.int32)
    check(program(lambda p, x: gw.linear(x, p.w, p.b, zero), x, w=codes(11, 33, dtype=S8), b=bias), x)
    check(program(lambda p, x: gw.linear(x, p.w, None, zero), x, w=codes(11, 33, dtype=S8)), x)
    check(program(lambda p, x, y: gw.matmul(x, y, zero, -3), x, y), x, y)
    check(program(lambda p, x, y: gw.multiply(x, y, zero, -3), x, y[..., :1, :1]), x, y[..., :1, :1])
    check(program(lambda p, x: gw.sum(x, [2, 3], False, zero), x), x)


@pytest.mark.parametrize("dtype", [U8, S8])
@pytest.mark.parametrize(("groups", "stride", "padding", "dilation"), [(1, 1, 0, 1), (1, 2, 1, 1), (2, 1, 1, 2), (6, 2, 2, 1)])
def test_convolutions_and_windows(dtype: torch.dtype, groups: int, stride: int, padding: int, dilation: int):
    x, zero = codes(2, 6, 9, 11, dtype=dtype), 17
    weight, bias = codes(12, 6 // groups, 3, 3, dtype=S8), integers(-9999, 9999, 12, dtype=torch.int32)
    geometry = [stride] * 2, [padding] * 2, [dilation] * 2
    check(program(lambda p, x: gw.convolution(x, p.w, p.b, *geometry, groups, zero), x, w=weight, b=bias), x)
    check(program(lambda p, x: gw.max_pool2d(x, [3, 3], [stride] * 2, [min(padding, 1)] * 2, [1, 1], False), x), x)
    check(program(lambda p, x: gw.sum_pool2d(x, [3, 3], [stride] * 2, [min(padding, 1)] * 2, zero), x), x)


@pytest.mark.parametrize(("dtype", "low", "high", "zero"), [(U8, 0, 255, 119), (U8, 0, 15, 7), (S8, -127, 127, 0), (S8, -7, 7, 0)])
def test_what_becomes_of_a_sum(dtype: torch.dtype, low: int, high: int, zero: int):
    acc = integers(-(1 << 24), 1 << 24, 2, 40, 6, dtype=torch.int32)
    acc[0] >>= 14
    limits = (zero, low, high, dtype)
    for count, axis in ((1, 0), (6, 2), (40, 1)):
        scale = scales(count, 2.0**-10)
        check(program(lambda p, x, a=axis: gw.rescale(x, p.s, *limits, a), acc, s=scale), acc)
        check(program(lambda p, x, a=axis: gw.scale(x, p.s, a), acc, s=scale), acc)
        multiplier, shift = integers(1 << 29, 1 << 30, count, dtype=torch.int32), integers(36, 44, count, dtype=torch.int32)
        check(program(lambda p, x, a=axis: gw.rescale_dyadic(x, p.m, p.s, *limits, a), acc, m=multiplier, s=shift), acc)


def test_halves_round_to_even():
    acc = torch.arange(-300, 301, dtype=torch.int32)
    check(program(lambda p, x: gw.rescale(x, p.s, 0, -128, 127, S8, 0), acc, s=torch.tensor([0.5])), acc)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_edges_tables_and_sums_of_codes(dtype: torch.dtype):
    every = torch.arange(-128, 128).to(S8) if dtype is S8 else torch.arange(256).to(U8)
    x, y = every.repeat_interleave(256), every.repeat(256)
    info = torch.iinfo(dtype)
    check(program(lambda p, x: gw.lookup(x, p.t), x, t=codes(256, dtype=dtype)), x)
    check(program(lambda p, x: gw.dequantize(x, 0.0123, 5), x), x)
    for shift in (4, 20):
        arguments = (3 << shift - 3, -(5 << shift - 4), shift, 5, 7, 9, info.min, info.max - 2, dtype)
        check(program(lambda p, x, y, a=arguments: gw.add(x, y, *a), x, y), x, y)
    values = normal(1000) * 3
    check(program(lambda p, x: gw.quantize(x, 0.0123, 5, info.min + 1, info.max, dtype), values), values)


# -- networks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", ["float-scale", "dyadic"])
@pytest.mark.parametrize("kind", [ConvNet, Mixed, QuantizedBlock])
def test_networks(kind: type[nn.Module], rescale: str):
    exported, context = prepared(kind, BLOCK if kind is QuantizedBlock else (1, 3, 17, 17))
    integer = run_passes(exported, f"quantize,lower-integer{{rescale={rescale}}}", context).program
    assert context.calibration is not None
    for sample in context.calibration.samples[:3]:
        check(integer, *sample)


@pytest.mark.parametrize("passes", ['quantize{weights=["*=int4"]},lower-integer', "sparsify-magnitude,quantize,lower-integer"])
def test_packed_and_sparse_weights_are_written_out(passes: str):
    exported, context = prepared(ConvNet, (1, 3, 17, 17))
    integer = run_passes(exported, passes, context).program
    assert context.calibration is not None
    check(integer, *context.calibration.samples[0])


def test_nothing_is_left_to_the_order_of_a_runtime():
    """The file of a transformer block holds no operator that rounds more than once an element."""
    exported, context = prepared(QuantizedBlock, BLOCK)
    proto = export_onnx(run_passes(exported, "quantize,lower-integer", context).program)
    kinds = {node.op_type for node in proto.graph.node}
    inexact = {"MatMul", "Gemm", "Conv", "LayerNormalization", "Softmax", "Exp", "Erf", "Gelu", "ReduceSum", "ReduceMean", "Sum"}
    assert not kinds & inexact
    assert {"MatMulInteger", "QuantizeLinear", "Gather", "Split"} <= kinds
    assert {entry.domain for entry in proto.opset_import} == {""}
    names = [i.name for i in proto.graph.initializer]
    values = {(i.data_type, tuple(i.dims), i.raw_data) for i in proto.graph.initializer if i.name.startswith("exact_")}
    assert len(values) == sum(name.startswith("exact_") for name in names), "equal constants are stored once"


def test_a_symbolic_batch_stays_symbolic():
    weight, bias = normal(20), normal(20)

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return gw.softmax(gw.layer_norm(x, self.weight, self.bias, 1e-5))

    exported = capture(Norm(), normal(2, 20), dynamic_batch=True)
    exported.stage = Stage.INTEGER
    assert export_onnx(exported).graph.input[0].type.tensor_type.shape.dim[0].dim_param
    check(exported, normal(7, 20))


# -- refusals --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [torch.nn.functional.gelu, torch.exp, lambda x: x @ x, lambda x: x.sum(-1)])
def test_floats_that_runtimes_compute_in_their_own_order_are_refused(function):
    x = normal(4, 4)
    with pytest.raises(UnsupportedOpError, match=r"aten\..*computes floats in an order that ONNX does not define; export the annot"):
        export_onnx(program(lambda p, x: function(x), x))


def test_ops_without_a_rule_are_refused():
    x = normal(1, 6, 4)
    with pytest.raises(UnsupportedOpError, match=r"gw\.keep_tokens.*has no exact form in ONNX"):
        export_onnx(program(lambda p, x: gw.keep_tokens(x, 2, 1), x))


def test_a_factor_of_an_operand_is_refused():
    x = normal(4)
    with pytest.raises(UnsupportedOpError, match=r"multiplies its second operand \(alpha\)"):
        export_onnx(program(lambda p, x: torch.add(x, x, alpha=2), x))
