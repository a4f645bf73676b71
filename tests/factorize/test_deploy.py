"""Factorized layers flow on: through quantization to integers, and through the compiler, bit for bit."""

from __future__ import annotations

import pytest
import torch
from factorize_models import Convolutions
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.program import Stage
from quantize_models import Block, prepared, run, targets

INTEGER = "equalize,quantize,align-scales,correct-bias,lower-integer"


def compiled_outputs(program, x):
    return load_bytes(TVMBackend().compile(program, Target.parse("cpu")).library)(x.numpy())


@pytest.mark.parametrize(
    ("method", "model", "shape"),
    [
        ("factorize-whitened-svd", Block, (2, 5, 32)),
        ("factorize-tucker", Convolutions, (2, 3, 16, 16)),
        ("factorize-spatial", Convolutions, (2, 3, 16, 16)),
    ],
)
def test_integer_artifacts_equal_the_reference(method, model, shape):
    program, context = prepared(model, shape)
    factorized = run(program, f"{method}{{ratio=0.7,multiple=4}}", context)
    assert factorized.certificate[-1].stats["layers"] >= 4
    lowered = run(factorized.program, INTEGER, context).program
    assert lowered.stage is Stage.INTEGER
    count = sum(name in ("gw.linear", "gw.convolution") for name in targets(lowered))
    plain = sum(name in ("aten.linear", "aten.convolution") for name in targets(factorized.program))
    # A transposed convolution stays float.
    assert count == plain - (model is Convolutions)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    (expected,), actual = lowered(x), compiled_outputs(lowered, x)
    assert torch.equal(expected, torch.as_tensor(actual[0]))


def test_float_artifacts_are_near_the_reference():
    program, context = prepared(Block, (2, 5, 32))
    factorized = run(program, "factorize-lord{ratio=0.6,multiple=4}", context).program
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    (expected,), actual = factorized(x), compiled_outputs(factorized, x)
    assert torch.allclose(expected, torch.as_tensor(actual[0]), atol=1e-5)
