"""Bad ONNX input: each kind ends in a typed error that names the culprit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graphwright.ir.errors import CaptureError, UnsupportedOpError
from graphwright.ir.onnx_import import capture_onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


def value(name: str, shape: list) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, shape)


def model(nodes: list, inputs: list, outputs: list, initializers: list | None = None, opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "small", inputs, outputs, initializers or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def linear(weight: np.ndarray | None = None) -> onnx.ModelProto:
    weight = np.ones((32, 32), np.float32) if weight is None else weight
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")
    return model([node], [value("x", [1, 32])], [value("y", [1, 32])], [numpy_helper.from_array(weight, "w")])


def with_external(folder: Path, location: str, **entries: int) -> Path:
    proto = linear()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, **{k: str(v) for k, v in entries.items()}}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_missing_file(tmp_path: Path):
    with pytest.raises(CaptureError, match="no ONNX file"):
        capture_onnx(tmp_path / "none.onnx")


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.5, 0.01])
def test_truncated_file(tmp_path: Path, keep: float):
    whole = linear().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(whole[: int(len(whole) * keep)])
    with pytest.raises(CaptureError, match=r"truncated|not a complete ONNX model"):
        capture_onnx(path)


def test_every_truncation_is_an_error(tmp_path: Path):
    proto = linear(np.ones((32, 16), np.float32))
    whole = proto.SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(0, len(whole) - 1, 61):
        path.write_bytes(whole[:length])
        with pytest.raises(CaptureError):
            capture_onnx(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"\x00" * 64, bytes(range(256)) * 8, b"\x80\x04\x95pickle"])
def test_garbage(tmp_path: Path, content: bytes):
    path = tmp_path / "garbage.onnx"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=r"not an ONNX model|is empty"):
        capture_onnx(path)


@pytest.mark.parametrize(
    "location", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", ""]
)
def test_external_data_outside_the_folder(tmp_path: Path, location: str):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    with pytest.raises(CaptureError, match="leaves the folder"):
        capture_onnx(with_external(folder, location))


def test_external_data_behind_a_link(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    (folder / "w.bin").symlink_to(tmp_path / "secret.bin")
    with pytest.raises(CaptureError, match="link out of the folder"):
        capture_onnx(with_external(folder, "w.bin"))


def test_external_data_is_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "secret.bin").write_bytes(b"\0" * 4096)
    path = with_external(tmp_path / "model", "../secret.bin")

    def refuse(*_args, **_kwargs):
        raise AssertionError("a file was read")

    monkeypatch.setattr(np, "fromfile", refuse)
    with pytest.raises(CaptureError, match="leaves the folder"):
        capture_onnx(path)


def test_missing_external_file(tmp_path: Path):
    with pytest.raises(CaptureError, match=r"'weights\.bin' does not exist"):
        capture_onnx(with_external(tmp_path, "weights.bin"))


def test_truncated_external_file(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    with pytest.raises(CaptureError, match=r"needs 1024 values, but holds 100 bytes"):
        capture_onnx(with_external(tmp_path, "weights.bin"))
    with pytest.raises(CaptureError, match=r"ends at byte 4096, but the file has 100 bytes"):
        capture_onnx(with_external(tmp_path, "weights.bin", offset=0, length=4096))


def test_external_data_of_a_model_in_memory(tmp_path: Path):
    proto = onnx.load(with_external(tmp_path, "weights.bin"), load_external_data=False)
    with pytest.raises(CaptureError, match="pass the path"):
        capture_onnx(proto)


def test_damaged_initializer():
    proto = linear()
    proto.graph.initializer[0].dims[0] = 1 << 40
    with pytest.raises(CaptureError, match="tensor 'w'"):
        capture_onnx(proto)


def test_unsupported_operator_names_its_neighbours():
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="before"),
        helper.make_node("NonMaxSuppression", ["a", "a"], ["b"], name="nms"),
        helper.make_node("Neg", ["b"], ["y"], name="after"),
    ]
    with pytest.raises(UnsupportedOpError) as caught:
        capture_onnx(model(nodes, [value("x", [1, 2, 4])], [value("y", [1])]))
    text = str(caught.value)
    for part in ("'NonMaxSuppression'", "ai.onnx", "opset 17", "'nms'", "Relu node 'before'", "Neg node 'after'", "docs/ONNX.md"):
        assert part in text


def test_unknown_operator_names_the_nearest():
    nodes = [helper.make_node("HardSwishh", ["x"], ["y"], name="act")]
    with pytest.raises(UnsupportedOpError, match="nearest supported operators: HardSwish"):
        capture_onnx(model(nodes, [value("x", [1])], [value("y", [1])]))


def test_custom_domain():
    node = helper.make_node("FusedThing", ["x"], ["y"], name="fused", domain="com.example")
    with pytest.raises(UnsupportedOpError, match=r"'FusedThing' \(domain 'com.example', opset not imported\)"):
        capture_onnx(model([node], [value("x", [1])], [value("y", [1])]))


@pytest.mark.parametrize("operator", ["If", "Loop", "Scan"])
def test_control_flow(operator: str):
    node = helper.make_node(operator, ["x"], ["y"], name="branch")
    with pytest.raises(CaptureError, match=rf"{operator} node 'branch' .* control flow"):
        capture_onnx(model([node], [value("x", [1])], [value("y", [1])]))


def test_symbolic_dimension_is_named():
    node = helper.make_node("Relu", ["x"], ["y"], name="act")
    proto = model([node], [value("x", ["N", "length", 4])], [value("y", None)])
    with pytest.raises(CaptureError, match=r"symbolic dimension 'length' at axis 1; pass input_shapes"):
        capture_onnx(proto)
    assert capture_onnx(proto, input_shapes={"length": 3}).input_specs[0].shape == (1, 3, 4)
    assert capture_onnx(proto, input_shapes={"x": (2, 5, 4)}).input_specs[0].shape == (2, 5, 4)
    with pytest.raises(CaptureError, match="but the model declares"):
        capture_onnx(proto, input_shapes={"x": (2, 5, 6)})
    with pytest.raises(CaptureError, match="input_shapes names 'z'"):
        capture_onnx(proto, input_shapes={"z": (1,)})


def test_shape_that_depends_on_data():
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"], name="view")]
    shape = helper.make_tensor_value_info("s", TensorProto.INT64, [2])
    proto = model(nodes, [value("x", [4]), shape], [value("y", None)])
    with pytest.raises(CaptureError, match=r"Reshape node 'view' .*'s'.* pass constant_inputs"):
        capture_onnx(proto)
    assert capture_onnx(proto, constant_inputs={"s": np.array([2, 2])}).output_specs[0].shape == (2, 2)
    nodes = [helper.make_node("NonZero", ["x"], ["y"], name="find")]
    with pytest.raises(CaptureError, match="NonZero node 'find'"):
        capture_onnx(model(nodes, [value("x", [4])], [value("y", None)]))


def test_training_mode_is_refused():
    nodes = [helper.make_node("BatchNormalization", ["x", "s", "s", "s", "s"], ["y", "m", "v"], name="bn", training_mode=1)]
    scale = numpy_helper.from_array(np.ones(3, np.float32), "s")
    with pytest.raises(CaptureError, match=r"BatchNormalization node 'bn'.* training mode"):
        capture_onnx(model(nodes, [value("x", [1, 3, 2, 2])], [value("y", [1, 3, 2, 2]), value("m", [3])], [scale]))


@pytest.mark.parametrize("opset", [6, 999])
def test_opset_out_of_range(opset: int):
    node = helper.make_node("Relu", ["x"], ["y"])
    with pytest.raises(CaptureError, match=f"opset {opset}; this importer reads opset 7 to"):
        capture_onnx(model([node], [value("x", [1])], [value("y", [1])], opset=opset))


def test_graph_that_is_not_well_formed():
    node = helper.make_node("Add", ["x", "ghost"], ["y"], name="sum")
    with pytest.raises(CaptureError, match=r"Add node 'sum' .* reads 'ghost'"):
        capture_onnx(model([node], [value("x", [1])], [value("y", [1])]))
    node = helper.make_node("Relu", ["x"], ["z"], name="act")
    with pytest.raises(CaptureError, match="returns 'y', which no node makes"):
        capture_onnx(model([node], [value("x", [1])], [value("y", [1])]))


def test_shapes_that_do_not_fit():
    proto = linear(np.ones((16, 32), np.float32))
    with pytest.raises(CaptureError, match=r"MatMul node 'fc' .*float32\[1, 32\]"):
        capture_onnx(proto)


def test_string_input():
    text = helper.make_tensor_value_info("x", TensorProto.STRING, [1])
    with pytest.raises(CaptureError, match="element type STRING"):
        capture_onnx(model([helper.make_node("Identity", ["x"], ["y"])], [text], [value("y", [1])]))
