"""Integer programs in ONNX: ONNX Runtime gives the reference's bits, whether it optimizes the graph or runs it as it is."""

from __future__ import annotations

from collections.abc import Iterator

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


def test_layer_norms():
    x = [normal(3, 5, n) * torch.tensor([0.01, 1.0, 300.0]).reshape(3, 1, 1) + normal(3, 5, 1) for n in WIDTHS]
    vectors = {f"{kind}{n}": normal(n) for n in WIDTHS for kind in ("w", "b")}

    def norms(p, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(gw.layer_norm(v, getattr(p, f"w{v.shape[-1]}"), getattr(p, f"b{v.shape[-1]}"), 1e-5) for v in x)

    check(program(norms, *x, **vectors), *x)


def test_softmaxes():
    x = [normal(2, 3, 9, n) * 10 for n in WIDTHS]
    for value in x:
        value[0, 0, :, 1:] = -1e4  # masked keys
        value[0, 1] = 0.5
    check(program(lambda p, *x: tuple(gw.softmax(v) for v in x), *x), *x)


def test_sums_roots_and_quotients():
    x = [normal(2, n, 5, 3) * 7 for n in (1, 15, 16, 35)]

    def sums(p, *x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        plain = [gw.reduce_sum(v, dim, keep) for v in x for dim in (0, 1, -1) for keep in (False, True)]
        return *plain, *(v / gw.square_root(gw.reduce_sum(v * v, 1, True)) for v in x)

    check(program(sums, *x), *x)


def test_elements_one_by_one():
    x, y = normal(1000) * 5, normal(1000)

    def results(p, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * 0.3 + 1.7) / 7.0 - y / (1.0 + y.abs()), torch.relu(x).clamp(max=4.0) * torch.where(x > y, x, -y)

    check(program(results, x, y), x, y)


def test_exp_over_its_whole_range():
    """Softmax of (0, x): the exponential of every x is in the result."""
    x = torch.stack([torch.zeros(20_001), -torch.linspace(0, 70, 20_001)], -1)
    check(program(lambda p, x: gw.softmax(x), x), x)


# -- integers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [U8, S8])
def test_products(dtype: torch.dtype):
    x, y, zero = codes(2, 3, 7, 33, dtype=dtype), codes(2, 3, 33, 5, dtype=S8), 5
    bias = integers(-9999, 9999, 11, dtype=torch.int32)

    def products(p, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layers = gw.linear(x, p.w, p.b, zero), gw.linear(x, p.w, None, zero)
        return *layers, gw.matmul(x, y, zero, -3), gw.multiply(x, y[..., :1, :1], zero, -3), gw.sum(x, [2, 3], False, zero)

    check(program(products, x, y, w=codes(11, 33, dtype=S8), b=bias), x, y)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_convolutions_and_windows(dtype: torch.dtype):
    x, zero = codes(2, 6, 9, 11, dtype=dtype), 17
    weights = {f"w{g}": codes(12, 6 // g, 3, 3, dtype=S8) for g in (1, 2, 6)}

    def windows(p, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for groups, stride, padding, dilation in ((1, 1, 0, 1), (1, 2, 1, 1), (2, 1, 1, 2), (6, 2, 2, 1)):
            weight, pads = getattr(p, f"w{groups}"), [min(padding, 1)] * 2
            yield gw.convolution(x, weight, p.b, [stride] * 2, [padding] * 2, [dilation] * 2, groups, zero)
            yield gw.max_pool2d(x, [3, 3], [stride] * 2, pads, [1, 1], False)
            yield gw.sum_pool2d(x, [3, 3], [stride] * 2, pads, zero)

    bias = integers(-9999, 9999, 12, dtype=torch.int32)
    check(program(lambda p, x: tuple(windows(p, x)), x, b=bias, **weights), x)


@pytest.mark.parametrize(
    ("dtype", "low", "high", "zero"), [(U8, 0, 255, 119), (U8, 0, 15, 7), (S8, -127, 127, 0), (S8, -7, 7, 0)]
)
def test_what_becomes_of_a_sum(dtype: torch.dtype, low: int, high: int, zero: int):
    acc = integers(-(1 << 24), 1 << 24, 2, 40, 6, dtype=torch.int32)
    acc[0] >>= 14
    axes = {1: 0, 6: 2, 40: 1}  # values -> axis
    factors = {f"s{n}": scales(n, 2.0**-10) for n in axes}
    fixed = {f"m{n}": integers(1 << 29, 1 << 30, n, dtype=torch.int32) for n in axes}
    shifts = {f"k{n}": integers(36, 44, n, dtype=torch.int32) for n in axes}

    def results(p, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for n, axis in axes.items():
            scale, multiplier, shift = (getattr(p, f"{kind}{n}") for kind in "smk")
            yield gw.rescale(x, scale, zero, low, high, dtype, axis)
            yield gw.scale(x, scale, axis)
            yield gw.rescale_dyadic(x, multiplier, shift, zero, low, high, dtype, axis)

    check(program(lambda p, x: tuple(results(p, x)), acc, **factors, **fixed, **shifts), acc)


def test_halves_round_to_even():
    acc = torch.arange(-300, 301, dtype=torch.int32)
    check(program(lambda p, x: gw.rescale(x, p.s, 0, -128, 127, S8, 0), acc, s=torch.tensor([0.5])), acc)


@pytest.mark.parametrize("dtype", [U8, S8])
def test_edges_tables_and_sums_of_codes(dtype: torch.dtype):
    every = torch.arange(-128, 128).to(S8) if dtype is S8 else torch.arange(256).to(U8)
    x, y, values = every.repeat_interleave(256), every.repeat(256), normal(1000) * 3
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max

    def results(p, x: torch.Tensor, y: torch.Tensor, values: torch.Tensor) -> Iterator[torch.Tensor]:
        yield gw.lookup(x, p.t)
        yield gw.dequantize(x, 0.0123, 5)
        yield gw.quantize(values, 0.0123, 5, low + 1, high, dtype)
        for shift in (4, 20):
            yield gw.add(x, y, 3 << shift - 3, -(5 << shift - 4), shift, 5, 7, 9, low, high - 2, dtype)

    check(program(lambda p, *x: tuple(results(p, *x)), x, y, values, t=codes(256, dtype=dtype)), x, y, values)


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
    with pytest.raises(UnsupportedOpError, match=r"aten\..*computes floats in an order that ONNX does not define; export"):
        export_onnx(program(lambda p, x: function(x), x))


def test_ops_without_a_rule_are_refused():
    x = normal(1, 6)
    with pytest.raises(UnsupportedOpError, match=r"gw\.quantize_fp8.*has no exact form in ONNX"):
        export_onnx(program(lambda p, x: gw.quantize_fp8(x, 0.1), x))


def test_a_factor_of_an_operand_is_refused():
    x = normal(4)
    with pytest.raises(UnsupportedOpError, match=r"multiplies its second operand \(alpha\)"):
        export_onnx(program(lambda p, x: torch.add(x, x, alpha=2), x))
