"""The main job on the reference models that are transformers."""

import pytest
import reference_cases as cases
import torch
from graphwright import load
from graphwright.tools import zoo

MODELS = ["vit-tiny", "minilm-l6", "gpt-small"]


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


def test_the_artifact_equals_the_reference_here(name, tmp_path):
    cases.check_the_artifact_equals_the_reference_here(name, tmp_path)


def test_the_artifact_equals_the_reference_on_aarch64(name, tmp_path):
    cases.check_the_artifact_equals_the_reference_on_aarch64(name, tmp_path)


def test_int8_keeps_the_accuracy(tmp_path):
    cases.check_int8_keeps_the_accuracy("vit-tiny", tmp_path)


def test_int8_keeps_the_perplexity(tmp_path):
    path = tmp_path / "model.gw"
    cases.result("gpt-small").artifact.save(path)
    loaded, data = load(path), cases.reference("gpt-small")
    with torch.inference_mode():
        before = data.evaluate(lambda inputs: data.model(*inputs), 32)
    after = data.evaluate(lambda inputs: torch.cat([loaded(x) for x in inputs[0].split(1)]), 32)
    assert zoo.perplexity(after) <= 1.05 * zoo.perplexity(before)


@pytest.mark.parametrize("optimized", [False, True])
def test_the_qdq_export_answers_alike_in_onnx_runtime(optimized, tmp_path):
    cases.check_the_qdq_export_answers_alike_in_onnx_runtime("vit-tiny", optimized, tmp_path)


@pytest.mark.parametrize("optimized", [False, True])
def test_the_integer_export_equals_the_reference_in_onnx_runtime(optimized, tmp_path):
    cases.check_the_integer_export_equals_the_reference_in_onnx_runtime("vit-tiny", optimized, tmp_path)
