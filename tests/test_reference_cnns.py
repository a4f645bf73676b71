"""The main job on the convolutional reference models."""

import pytest
import reference_cases as cases

MODELS = ["resnet20", "mobilenetv2", "efficientnet-lite0"]


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


def test_the_artifact_equals_the_reference_here(name, tmp_path):
    cases.check_the_artifact_equals_the_reference_here(name, tmp_path)


def test_the_artifact_equals_the_reference_on_aarch64(name, tmp_path):
    cases.check_the_artifact_equals_the_reference_on_aarch64(name, tmp_path)


@pytest.mark.parametrize("model", ["resnet20", "mobilenetv2"])
def test_int8_keeps_the_accuracy(model, tmp_path):
    cases.check_int8_keeps_the_accuracy(model, tmp_path)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("model", ["resnet20", "mobilenetv2"])
def test_the_qdq_export_answers_alike_in_onnx_runtime(model, optimized, tmp_path):
    cases.check_the_qdq_export_answers_alike_in_onnx_runtime(model, optimized, tmp_path)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("model", ["resnet20", "mobilenetv2"])
def test_the_integer_export_equals_the_reference_in_onnx_runtime(model, optimized, tmp_path):
    cases.check_the_integer_export_equals_the_reference_in_onnx_runtime(model, optimized, tmp_path)
