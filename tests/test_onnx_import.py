"""ONNX in: names, origins, folding, linear layers, memory, external data."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import torch
from graphwright.ir.onnx_import import capture_onnx
from graphwright.ir.onnx_import.reader import load
from graphwright.ir.verify import verify
from onnx import TensorProto, helper, numpy_helper

aten = torch.ops.aten


def build(
    nodes: list, inputs: dict[str, list], outputs: list[str], weights: dict[str, np.ndarray], opset: int = 17
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def transformer_like() -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Linear layer, then a reshape whose target is computed from the shape of the input."""
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.standard_normal((8, 12)).astype(np.float32),
        "layer/bias:0": generator.standard_normal(12).astype(np.float32),
        "zero": np.array(0, np.int64),
        "tail": np.array([3, 4], np.int64),
        "axes": np.array([0], np.int64),
    }
    nodes = [
        helper.make_node("MatMul", ["in.put", "w"], ["product"], name="/fc/MatMul"),
        helper.make_node("Add", ["layer/bias:0", "product"], ["sum"], name="/fc/Add"),
        helper.make_node("Shape", ["in.put"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axes"], ["batch1"]),
        helper.make_node("Concat", ["batch1", "tail"], ["target"], axis=0),
        helper.make_node("Reshape", ["sum", "target"], ["heads"], name="/view"),
        helper.make_node("Relu", ["heads"], ["out.put"]),
    ]
    return build(nodes, {"in.put": ["N", 8]}, ["out.put"], weights), weights


def test_linear_layer_names_origins_and_folded_shapes():
    proto, weights = transformer_like()
    before = proto.SerializeToString()
    program = capture_onnx(proto, input_shapes={"N": 5})
    verify(program)
    assert proto.SerializeToString() == before, "the caller's model was changed"
    calls = {str(n.target): n.meta["origin"] for n in program.nodes if n.op == "call_function"}
    assert calls == {"aten.linear.default": "/fc/MatMul", "aten.view.default": "/view", "aten.relu.default": "out.put"}
    assert [(s.name, s.shape) for s in program.input_specs] == [("in_put", (5, 8))]
    assert [(s.name, s.shape) for s in program.output_specs] == [("out.put", (5, 3, 4))]
    origins = {n.meta["origin"] for n in program.nodes if n.op == "get_attr"}
    assert origins == {"w.transposed", "layer/bias:0"}
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32)
    expected = np.maximum(x @ weights["w"] + weights["layer/bias:0"], 0).reshape(5, 3, 4)
    np.testing.assert_allclose(program(torch.from_numpy(x))[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_that_is_read_twice_stays():
    weights = {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Mul", ["s", "p"], ["y"]),
    ]
    program = capture_onnx(build(nodes, {"x": [1, 4]}, ["y"], weights))
    x = torch.randn(1, 4)
    torch.testing.assert_close(program(x)[0], (x + 1) * x)
    assert any(node.target is aten.add.Tensor for node in program.nodes)


def test_large_constant_results_stay_nodes():
    weights = {"w": np.ones((1024, 512), np.int8), "s": np.array(0.5, np.float32), "k": np.ones((4, 4), np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["large"], name="large"),
        helper.make_node("DequantizeLinear", ["k", "s"], ["small"], name="small"),
        helper.make_node("MatMul", ["x", "large"], ["y"]),
        helper.make_node("MatMul", ["z", "small"], ["v"]),
    ]
    program = capture_onnx(build(nodes, {"x": [1, 1024], "z": [1, 4]}, ["y", "v"], weights))
    origins = {node.meta["origin"] for node in program.nodes if node.op == "call_function"}
    assert "large" in origins
    assert "small" not in origins
    x, z = torch.ones(1, 1024), torch.ones(1, 4)
    assert [float(v[0, 0]) for v in program(x, z)] == [512.0, 2.0]


def test_weights_are_read_once(tmp_path: Path):
    weight = np.ones((2048, 2048), np.float32)
    proto = build([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"x": [1, 2048]}, ["y"], {"w": weight})
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    tracemalloc.start()
    model = load(path, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * weight.nbytes
    assert torch.equal(model.initializers["w"], torch.from_numpy(weight))
    path.write_bytes(b"")  # the program owns its weights
    assert float(model.initializers["w"].sum()) == weight.size


def test_external_data(tmp_path: Path):
    proto, _ = transformer_like()
    expected = capture_onnx(proto, input_shapes={"N": 2})
    (tmp_path / "sub").mkdir()
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="sub/weights.bin", size_threshold=0)
    program = capture_onnx(tmp_path / "model.onnx", input_shapes={"N": 2})
    x = torch.randn(2, 8)
    assert torch.equal(program(x)[0], expected(x)[0])
    assert program.name == "model"


def test_softmax_before_opset_13_takes_all_trailing_axes():
    x = torch.randn(2, 3, 4)
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    old = capture_onnx(build(nodes, {"x": [2, 3, 4]}, ["y"], {}, opset=11))
    new = capture_onnx(build(nodes, {"x": [2, 3, 4]}, ["y"], {}, opset=13))
    torch.testing.assert_close(old(x)[0], torch.softmax(x.reshape(2, 12), -1).reshape(2, 3, 4))
    torch.testing.assert_close(new(x)[0], torch.softmax(x, 1))
