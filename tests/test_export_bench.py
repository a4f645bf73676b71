"""The bench of the QDQ export counts classes and steps."""

import numpy as np
import pytest
from graphwright.ir.errors import DataError
from graphwright.tools.bench.export import Agreement, measure, output_step
from quantize_models import ConvNet, prepared, run


def test_it_counts_classes_and_steps():
    row = Agreement("toy", "annotated", "as written", step=0.5)
    expected = np.array([[1.0, 2.0], [3.0, 1.0], [0.0, 1.0]])
    row.add(expected, expected + np.array([[0.0, 0.25], [0.0, -0.75], [1.5, 0.0]]))
    assert (row.inputs, row.same, row.within, row.largest) == (3, 2, 1, 1.5)


def test_a_step_is_one_code_of_the_last_layers_input_through_its_largest_weight():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize", context).program
    mean = next(n for n in annotated.nodes if "mean" in str(n.target))
    (quantized,) = mean.users
    scale = float(annotated.parameter(quantized.args[1]))
    largest = max(float(t.abs().max()) for n, t in annotated.parameters().items() if tuple(t.shape) == (10, 8))
    assert output_step(annotated) == pytest.approx(scale * largest)


def test_a_model_without_data_is_refused(tmp_path):
    from graphwright.ir.onnx_export import export_onnx

    export_onnx(prepared(ConvNet, (1, 3, 9, 9))[0], tmp_path / "model.onnx")
    with pytest.raises(DataError, match="brings no inputs along; name a reference model"):
        measure(str(tmp_path / "model.onnx"), 1, lambda *_: None)
