"""The main job on a reference model: accuracy kept, the artifact equal to the torch reference in every bit, QDQ export.

Shared by `test_reference_cnns.py` and `test_reference_transformers.py`, two files so that two test processes take them.
"""

import functools
import itertools

import numpy as np
import torch
from graphwright import load, optimize
from graphwright.backends.artifact import Artifact
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.onnx_export import export_onnx
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.tools import zoo
from graphwright.tools.bench.systems import ort_session
from runner import infer

#: Model -> inputs compared here, and under the emulator (a hundred times slower).
INPUTS = {
    "resnet20": (40, 3),
    "mobilenetv2": (40, 3),
    "vit-tiny": (20, 2),
    "efficientnet-lite0": (4, 1),
    "minilm-l6": (3, 1),
    "gpt-small": (3, 1),
}
#: Largest loss of top-1 on the first 1,000 test images, in points (one image is 0.1); docs/BENCHMARKS.md has all 10,000.
LOSS = {"resnet20": 0.4, "mobilenetv2": 0.4, "vit-tiny": 0.6}


@functools.cache
def reference(name):
    return zoo.load(name)


@functools.cache
def result(name):
    model = reference(name)
    samples = model.calibration(32 if name in ("efficientnet-lite0", "minilm-l6", "gpt-small") else 128)
    return optimize(model.model, example_inputs=model.example_inputs, calibration=samples, measure=False)


def single_samples(name, count):
    """The first `count` evaluation inputs, batch size 1."""
    batches = (zip(*(x.split(1) for x in inputs), strict=True) for inputs, _ in reference(name).evaluation(count))
    return list(itertools.islice(itertools.chain.from_iterable(batches), count))


def check_the_artifact_equals_the_reference_here(name, tmp_path):
    path = tmp_path / "model.gw"
    result(name).artifact.save(path)
    model = load(path)
    for sample in single_samples(name, INPUTS[name][0]):
        assert torch.equal(model(*sample), result(name).program(*sample)[0])


def check_the_artifact_equals_the_reference_on_aarch64(name, tmp_path):
    program = result(name).program
    samples = single_samples(name, INPUTS[name][1])
    path = tmp_path / "model.gw"
    Artifact.build(program, [TVMBackend().compile(program, Target.parse("arm64:cortex-a76"))]).save(path)
    columns = [torch.stack(column).numpy() for column in zip(*samples, strict=True)]
    (outputs,) = infer(path, columns, tmp_path, arch="aarch64")
    for index, sample in enumerate(samples):
        assert np.array_equal(outputs[index], program(*sample)[0].numpy())


def check_int8_keeps_the_accuracy(model, tmp_path):
    path = tmp_path / "model.gw"
    result(model).artifact.save(path)
    loaded, data = load(path), reference(model)

    def predict(inputs):
        return torch.cat([loaded(x) for x in inputs[0].split(1)])

    with torch.inference_mode():
        before = data.evaluate(lambda inputs: data.model(*inputs), 1000)
    assert data.evaluate(predict, 1000) >= before - LOSS[model] / 100


def check_the_qdq_export_answers_alike_in_onnx_runtime(model, optimized, tmp_path):
    """Same class on every image, whether ONNX Runtime runs the nodes as written or its own integer kernels.

    All sums of the CNNs are integer and their scales aligned, so the codes are the same and only the classifier's float product
    rounds apart. In the transformer, layer normalization and softmax are float: their results can round to another code.
    """
    annotated, _, expected_outputs = quantized(model)
    export_onnx(annotated, tmp_path / "qdq.onnx")
    run = ort_session(tmp_path / "qdq.onnx", threads=1, optimize=optimized)
    differences = []
    for (sample,), expected in zip(single_samples(model, 60), expected_outputs, strict=True):
        (actual,) = run([sample.numpy()])
        assert actual.argmax() == expected.argmax()
        differences.append(np.abs(actual - expected).max() / np.abs(expected).max())
    if model == "vit-tiny":
        assert max(differences) < 0.03 and np.mean(np.array(differences) < 1e-5) > 0.5
    else:
        assert max(differences) < 1e-6


def check_the_integer_export_equals_the_reference_in_onnx_runtime(model, optimized, tmp_path):
    """The integer program exported: every bit, float islands included."""
    _, integer, expected_outputs = quantized(model)
    export_onnx(integer, tmp_path / "integer.onnx")
    run = ort_session(tmp_path / "integer.onnx", threads=1, optimize=optimized)
    for (sample,), expected in zip(single_samples(model, 60), expected_outputs, strict=True):
        assert np.array_equal(run([sample.numpy()])[0], expected)


@functools.cache
def quantized(name):
    """The annotated program, the integer one, and what that answers to the first 60 samples."""
    model = reference(name)
    program = capture(model.model, model.example_inputs, name=name)
    context = PassContext(calibration=Calibration.for_program(program, model.calibration(64)))
    annotated = PassManager().run(program, parse("canonicalize,equalize,quantize,align-scales"), context).program
    integer = PassManager().run(annotated, parse("lower-integer"), context).program
    return annotated, integer, [integer(*sample)[0].numpy() for sample in single_samples(name, 60)]
