"""Weights of fewer than 8 bits end to end: the artifact is smaller and equals the reference in every bit, on x86 and AArch64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from graphwright.backends.artifact import Artifact
from graphwright.backends.host import host_arch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.backends.tvm.lower import lower
from graphwright.backends.tvm.target import missing_to_run
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.program import Program
from graphwright.passes.base import PassContext
from graphwright.passes.manager import parameter_bytes
from graphwright.tools import zoo
from quantize_models import Kinds, run, seeded
from runner import infer

#: Every width once, symmetric and asymmetric, on every kind of layer.
WEIGHTS = '"stem=int6","expand=uint3","depthwise=int5","grouped=uint2","project=int7","rows=uint4","head=int4"'


@functools.cache
def widths() -> tuple[Program, tuple]:
    program = capture(seeded(Kinds).eval(), torch.randn(1, 3, 17, 15))
    context = PassContext(Calibration.for_program(program, [torch.randn(1, 3, 17, 15) for _ in range(8)]))
    lowered = run(program, f"canonicalize,quantize{{weights=[{WEIGHTS}]}},lower-integer", context).program
    assert sorted(str(n.args[1]) for n in lowered.nodes if n.target is gw.unpack.default) == list("2344567")
    return lowered, context.calibration.samples  # type: ignore[union-attr]


@functools.cache
def resnet20(bits: int) -> tuple[Program, tuple]:
    model = zoo.load("resnet20")
    program = capture(model.model, model.example_inputs, name="resnet20")
    context = PassContext(Calibration.for_program(program, model.calibration(4)))
    lowered = run(program, f"canonicalize,equalize,quantize{{weight_bits={bits}}},align-scales,lower-integer", context).program
    return lowered, context.calibration.samples  # type: ignore[union-attr]


def check(program: Program, samples, library: bytes) -> None:
    execute = load_bytes(library)
    for sample in samples[:4]:
        got = execute(*(x.numpy() for x in sample))
        np.testing.assert_array_equal(np.asarray(got[0] if isinstance(got, (list, tuple)) else got), program(*sample)[0].numpy())


@pytest.mark.parametrize("level", ["avx512-vnni", "avx2"])
def test_every_width_and_kind_of_layer(level):
    target = Target("x86", level)
    if missing_to_run(target):
        pytest.skip(missing_to_run(target))
    program, samples = widths()
    check(program, samples, TVMBackend().compile(program, target).library)


@pytest.mark.parametrize("level", ["neoverse-v1", "cortex-a76", "generic"])
def test_every_width_and_kind_of_layer_on_aarch64(level, tmp_path):
    program, samples = widths()
    path = tmp_path / "model.gw"
    compiled = TVMBackend().compile(program, Target("arm64", level))
    Artifact.build(program, [compiled], certificate=[], plan={"pipeline": "lower-integer", "target": str(compiled.target)}).save(
        path
    )
    stacked = np.stack([x[0].numpy() for x in samples[:3]])
    for got, sample in zip(infer(path, [stacked], tmp_path, arch="aarch64")[0], samples, strict=False):
        np.testing.assert_array_equal(got, program(*sample)[0].numpy())


def weight_bytes(program: Program, level: str) -> int:
    """What the kernels' packed parameters take in the library: weights, biases and scales."""
    return sum(row.weights for row in lower(program, Target("x86", level)).kernels)


@pytest.mark.parametrize("level", ["avx512-vnni", "avx2"])
def test_four_bits_take_half_of_eight(level):
    eight, four = resnet20(8)[0], resnet20(4)[0]
    assert parameter_bytes(four) < 0.53 * parameter_bytes(eight)
    assert weight_bytes(four, level) < 0.56 * weight_bytes(eight, level)


@pytest.mark.skipif(host_arch() != "x86", reason="compiles for this machine")
def test_an_artifact_of_four_bits():
    target = Target.parse("cpu")
    (program, samples), (eight, _) = resnet20(4), resnet20(8)
    four = TVMBackend().compile(program, target)
    check(program, samples, four.library)
    saved = len(TVMBackend().compile(eight, target).library) - len(four.library)
    assert saved > 0.5 * (parameter_bytes(eight) - parameter_bytes(program))
