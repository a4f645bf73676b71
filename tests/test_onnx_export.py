"""ONNX out: ONNX Runtime gives the program's answers, float and QDQ, and the file reads back in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.capture import capture
from graphwright.ir.dialect import gw
from graphwright.ir.errors import OutputError, PassError, UnsupportedOpError
from graphwright.ir.onnx_export import export_onnx, storage_type
from graphwright.ir.onnx_import import capture_onnx
from graphwright.ir.program import Program, Stage
from graphwright.ir.verify import verify
from quantize_models import BLOCK, ConvNet, prepared
from quantize_models import Block as QuantizedBlock
from quantize_models import run as run_passes
from torch import nn

aten = torch.ops.aten
LAYERS = (aten.convolution.default, aten.linear.default)
QUANTIZED = (*LAYERS, aten.relu.default, aten.add.Tensor, aten.gelu.default, aten.layer_norm.default, aten.matmul.default)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.stem(x))
        y = F.max_pool2d(y + F.relu(self.depthwise(y)), 2)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Block(nn.Module):
    """A transformer block with attention spelled out, as it is after expansion."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        attention = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
        x = x + self.out(attention.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def annotate(program: Program, example: torch.Tensor, weight_range: tuple[int, int] = (-127, 127)) -> Program:
    """Fake quantization on the values of QUANTIZED ops (u8, from the range seen on `example`) and on weights (per channel)."""
    program = program.clone()
    seen: dict[str, torch.Tensor] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node):
            seen[n.name] = super().run_node(n)
            return seen[n.name]

    with torch.no_grad():
        Watch(program.graph_module).run(example)
    for node in list(program.nodes):
        if node.op == "placeholder" or node.target in QUANTIZED:
            low, high = seen[node.name].min().clamp(max=0), seen[node.name].max().clamp(min=0)
            scale = (high - low) / 255
            zero = torch.round(-low / scale).to(torch.int32)
            after = node.next
            args = (program.add_parameter("scale", scale, after), program.add_parameter("zero", zero, after), 0, 255)
            quantized = program.insert(gw.fake_quantize.default, (node, *args), after)
            node.replace_all_uses_with(quantized, delete_user_cb=lambda user, q=quantized: user is not q)
        if node.target in LAYERS:
            weight = program.parameter(node.args[1])
            assert weight is not None
            scale = weight.detach().abs().flatten(1).amax(1) / weight_range[1]
            zero = torch.zeros(len(scale), dtype=torch.int32)
            args = (program.add_parameter("scale", scale, node), program.add_parameter("zero", zero, node), *weight_range, 0)
            node.update_arg(1, program.insert(gw.fake_quantize.default, (node.args[1], *args), node))
    program.sweep()
    program.stage = Stage.ANNOTATED
    return program


def final_step(program: Program) -> float:
    """The quantization step of the program's output."""
    return float(program.parameter(program.outputs[0].args[1]))  # type: ignore[arg-type]


def run(proto: onnx.ModelProto, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


@pytest.fixture(scope="module", params=["cnn", "block"])
def pair(request: pytest.FixtureRequest) -> tuple[Program, torch.Tensor]:
    torch.manual_seed(0)
    module, x = (Cnn(), torch.randn(2, 3, 12, 12)) if request.param == "cnn" else (Block(), torch.randn(2, 5, 16))
    return capture(module, x), x


def test_float_round_trip(pair: tuple[Program, torch.Tensor], tmp_path: Path):
    """torch model -> Program -> ONNX -> Program: same answers, same layers, same names."""
    program, x = pair
    proto = export_onnx(program, tmp_path / "model.onnx")
    np.testing.assert_allclose(run(proto, x), program(x)[0].numpy(), atol=1e-5)
    again = capture_onnx(tmp_path / "model.onnx")
    verify(again)
    torch.testing.assert_close(again(x)[0], program(x)[0], atol=1e-5, rtol=1e-5)
    assert again.input_specs == program.input_specs
    assert [str(s) for s in again.output_specs] == [str(s) for s in program.output_specs]

    def layers(p: Program) -> int:
        return sum(node.target in LAYERS for node in p.nodes)

    assert layers(again) == layers(program)
    assert not list(tmp_path.glob(".*")), "a temporary file is left"


def test_qdq_equals_the_annotated_program(pair: tuple[Program, torch.Tensor]):
    program, x = pair
    annotated = annotate(program, x)
    proto = export_onnx(annotated)
    ours, theirs = annotated(x)[0].numpy(), run(proto, x)
    assert np.abs(ours - theirs).max() <= final_step(annotated) * 1.001
    assert np.mean(ours == theirs) > 0.95
    quantized = [i for i in proto.graph.initializer if i.name.endswith("_quantized")]
    assert len(quantized) == sum(node.target in LAYERS for node in program.nodes)
    assert {i.data_type for i in quantized} == {onnx.TensorProto.INT8}
    zeros = {i.data_type for i in proto.graph.initializer if i.name.endswith("_zero_point")}
    assert zeros == {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    floats = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1]
    assert not floats, "a float weight is left beside its integers"


def test_qdq_file_reads_back(pair: tuple[Program, torch.Tensor]):
    program, x = pair
    annotated = annotate(program, x)
    again = capture_onnx(export_onnx(annotated))
    assert float((again(x)[0] - annotated(x)[0]).abs().max()) <= final_step(annotated) * 1.001


def test_int8_file_is_smaller():
    torch.manual_seed(0)
    x = torch.randn(1, 128)
    program = capture(nn.Linear(128, 256), x)
    assert len(export_onnx(annotate(program, x)).SerializeToString()) < 0.33 * len(export_onnx(program).SerializeToString())


def test_narrow_weights_become_int4():
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    annotated = annotate(capture(nn.Linear(32, 16), x), x, weight_range=(-7, 7))
    proto = export_onnx(annotated, opset=21)
    stored = next(i for i in proto.graph.initializer if i.name.endswith("_quantized"))
    assert stored.data_type == onnx.TensorProto.INT4
    assert np.abs(run(proto, x) - annotated(x)[0].numpy()).max() <= final_step(annotated) * 1.001
    wide = export_onnx(annotated, opset=18)
    assert next(i for i in wide.graph.initializer if i.name.endswith("_quantized")).data_type == onnx.TensorProto.INT8
    np.testing.assert_array_equal(run(wide, x), run(proto, x))


@pytest.mark.parametrize("model", ["cnn", "transformer"])
@pytest.mark.parametrize(("form", "stored"), [("int4", "INT4"), ("uint4", "UINT4"), ("int2", "INT4"), ("uint3", "INT4"),
                                              ("int5", "INT8"), ("uint7", "INT8")])  # fmt: skip
def test_weights_of_every_width_answer_alike(model: str, form: str, stored: str):
    """From `quantize` to ONNX Runtime; signed activations (of the transformer's matmuls) ask for bytes and opset 18."""
    program, context = prepared(*((ConvNet, (1, 3, 17, 17)) if model == "cnn" else (QuantizedBlock, BLOCK)))
    annotated = run_passes(program, f'quantize{{weights=["*={form}"]}},align-scales', context).program
    proto = export_onnx(annotated)
    narrow = model == "cnn" and stored != "INT8"
    kinds = {onnx.TensorProto.DataType.Name(i.data_type) for i in proto.graph.initializer if i.name.endswith("_quantized")}
    assert kinds == {stored if narrow else "INT8"} and proto.opset_import[0].version == (21 if narrow else 18)
    assert context.calibration is not None
    for sample in context.calibration.samples[:3]:
        expected = annotated(*sample)[0].numpy()
        np.testing.assert_allclose(run(proto, *sample), expected, atol=1e-5 * np.abs(expected).max())


def test_narrow_activations_take_bytes():
    program, context = prepared(ConvNet, (1, 3, 17, 17))
    annotated = run_passes(program, "quantize{activation_bits=4, weight_bits=4},align-scales", context).program
    proto = export_onnx(annotated)
    zeros = {i.data_type for i in proto.graph.initializer if i.name.endswith("_zero_point")}
    assert zeros == {onnx.TensorProto.UINT8, onnx.TensorProto.INT4}
    assert context.calibration is not None
    for sample in context.calibration.samples[:3]:
        expected = annotated(*sample)[0].numpy()
        np.testing.assert_allclose(run(proto, *sample), expected, atol=1e-5 * np.abs(expected).max())


def test_narrow_activations_are_clipped():
    torch.manual_seed(0)
    x = torch.randn(4, 8) * 3

    class Quantized(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) * 1.5

    program = capture(Quantized(), x)
    node = next(n for n in program.nodes if n.target is aten.relu.default)
    after = node.next
    scale = program.add_parameter("scale", torch.tensor(0.05), after)
    zero = program.add_parameter("zero", torch.tensor(10, dtype=torch.int32), after)
    quantized = program.insert(gw.fake_quantize.default, (node, scale, zero, 0, 100), after)
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)
    program.graph_module.recompile()
    program.stage = Stage.ANNOTATED
    proto = export_onnx(program)
    kinds = [n.op_type for n in proto.graph.node]
    assert kinds.index("Clip") + 1 == kinds.index("QuantizeLinear") == kinds.index("DequantizeLinear") - 1, "a pair side by side"
    np.testing.assert_allclose(run(proto, x), program(x)[0].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "opset", "name"),
    [(-128, 127, 18, "INT8"), (0, 255, 18, "UINT8"), (-8, 7, 21, "INT4"), (0, 15, 21, "UINT4"), (0, 65535, 21, "UINT16"),
     (-1, 1, 21, "INT4"), (-7, 7, 18, "INT8"), (-15, 15, 21, "INT8")],
)  # fmt: skip
def test_storage_types_of_weights(low: int, high: int, opset: int, name: str):
    assert storage_type(low, high, opset, "x", weight=True).dtype.name == name


def test_the_oldest_opset_that_holds_the_encodings_is_written():
    """From opset 21 on, ONNX Runtime's optimizer refuses a file with u8 and s8 activations."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 16)
    annotated = annotate(capture(Block(), x), x)
    signed = next(n for n in annotated.nodes if n.target is gw.fake_quantize.default and annotated.parameter(n.args[0]) is None)
    signed.args = (*signed.args[:3], -127, 127, *signed.args[5:])
    annotated.graph_module.recompile()
    proto = export_onnx(annotated)
    assert proto.opset_import[0].version == 18
    assert np.isfinite(run(proto, x)).all()
    x = torch.randn(2, 16)
    narrow = annotate(capture(nn.Linear(16, 4), x), x, weight_range=(-7, 7))
    assert export_onnx(narrow).opset_import[0].version == 21


def test_encodings_without_onnx_type_are_named():
    with pytest.raises(UnsupportedOpError, match=r"u16 encoding \[0, 65535\] of 'conv1' needs opset 21 for UINT16, not 18"):
        storage_type(0, 65535, 18, "conv1")
    with pytest.raises(UnsupportedOpError, match=r"u17 encoding"):
        storage_type(0, 100_000, 21, "conv1")


def test_an_operator_without_an_onnx_form_is_named():
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sort(x, dim=1, stable=True)[0]

    with pytest.raises(UnsupportedOpError, match=r"no ONNX form: ConversionError: Error when translating .*aten\.sort\.stable"):
        export_onnx(capture(Sorted(), torch.randn(1, 4)))


def test_refusals(tmp_path: Path):
    program = capture(nn.ReLU(), torch.randn(1, 4))
    with pytest.raises(PassError, match="opset 18 to"):
        export_onnx(program, opset=12)
    with pytest.raises(OutputError, match="does not exist"):
        export_onnx(program, tmp_path / "none" / "model.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        export_onnx(program, tmp_path)


def test_dynamic_batch_and_pass_through_outputs():
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.relu(x), x

    program = capture(Two(), torch.randn(2, 4), dynamic_batch=True)
    proto = export_onnx(program)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    x = torch.randn(7, 4)
    np.testing.assert_array_equal(run(proto, x), torch.relu(x).numpy())


def test_weights_stored_without_zeros_are_written_dense():
    program, context = prepared(QuantizedBlock, BLOCK)
    sparse = run_passes(program, "sparsify-magnitude,compress-sparse", context).program
    (sample,) = context.calibration.samples[0]
    np.testing.assert_allclose(run(export_onnx(sparse), sample), sparse(sample)[0].numpy(), rtol=1e-4, atol=1e-5)
