"""eora: the branch gives back what rounding lost, best where the outputs need it, and quantizes and compiles with its layer."""

from __future__ import annotations

import pytest
import torch
from factorize_models import Convolutions, layers_of, one_layer
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.ir.program import origin_of
from graphwright.passes.base import PassContext
from graphwright.passes.factorize.matrix import Matrix
from graphwright.passes.quantize.encoding import is_fake_quantize, read_encoding
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import Block, correlated, prepared, run
from torch import nn

SHAPE = (2, 5, 32)


@settings(max_examples=4)
@given(st.integers(4, 12), st.integers(4, 12), st.sampled_from(["int3", "int2g4"]), st.integers(0, 99), st.data())
def test_better_on_its_inputs_than_truncating_the_error_itself(inputs, outputs, form, seed, data):
    program, layer = one_layer(nn.Linear(inputs, outputs), (2, 20, inputs), seed)
    samples = correlated((2, 20, inputs), 6, seed)
    context = PassContext(Calibration.for_program(program, samples))
    rank = data.draw(st.integers(1, min(inputs, outputs) - 1))
    result = run(program, f"eora{{format={form},rank={rank},rows=1000000}}", context)
    rounded = layers_of(result.program)[0].weight
    lost = (layer.weight - rounded).double()
    naive = program.clone()
    weight = rounded + Matrix(layer, weight=lost).dense((rank,))[0].float()
    naive.replace_parameter(layers_of(naive)[0].node.args[1], weight)
    naive.sweep()

    def error(changed):
        return float(sum((program(x)[0] - changed(x)[0]).square().sum() for x in samples))

    alone, ours = result.certificate[-1].stats["errors"][origin_of(layer.node)]
    assert error(result.program) <= error(naive) * (1 + 1e-3) + 1e-6
    assert ours <= alone


def test_at_full_rank_nothing_is_lost():
    program, context = prepared(Block, SHAPE)
    result = run(program, 'eora{format=int2,rank=32,layers=["fc1","proj"]}', context)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(program(x)[0], result.program(x)[0], atol=1e-4)
    assert set(result.certificate[-1].stats["errors"]) == {"fc1", "proj"}


@pytest.mark.parametrize("form", ["int4", "int3g8"])
def test_quantize_finds_the_grid_again(form):
    """The codes of the wide layer are exact: only the branch is rounded anew."""
    program, context = prepared(Block, SHAPE)
    branched = run(program, f"eora{{format={form},rank=4}}", context).program
    rules = f'weights=["*={form}","*.eora.*=int8"]' if form == "int4" else f'weights=["*={form}","*.eora.*=int8g8"]'
    annotated = run(branched, f"quantize{{{rules}}}", context)
    quality = annotated.certificate[-1].stats["weight_sqnr_db"]
    wide = [value for origin, value in quality.items() if ".eora." not in origin]
    branch = [value for origin, value in quality.items() if ".eora." in origin]
    assert len(wide) == 5 and min(wide) > 100
    assert len(branch) == 10 and 25 < min(branch) < 80


def test_the_whole_network_loses_less():
    program, _ = prepared(Block, SHAPE)
    samples = correlated(SHAPE, 40, 3)
    context = PassContext(Calibration.for_program(program, samples[:32]))

    def error(text):
        changed = run(program, text, context).program
        return float(sum((program(x)[0] - changed(x)[0]).square().sum() for x in samples[32:]))

    plain = error('quantize{weights=["*=int3g16"]}')
    assert error('eora{format=int3g16,rank=8},quantize{weights=["*=int3g16","*.eora.*=int8g16"]}') < 0.6 * plain


@pytest.mark.parametrize(("model", "shape"), [(Block, SHAPE), (Convolutions, (2, 3, 16, 16))])
def test_the_integer_artifact_equals_the_reference(model, shape):
    program, context = prepared(model, shape)
    text = 'eora{format=int4,rank=2},quantize{weights=["*=int4","*.eora.*=int8"]},lower-integer'
    result = run(program, text, context)
    stats = result.certificate[0].stats
    assert stats["layers"] == 5
    if model is Convolutions:
        assert "16 groups" in stats["whole"]["depthwise"] and stats["whole"]["up"] == "transposed convolution"
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    (expected,) = result.program(x)
    actual = load_bytes(TVMBackend().compile(result.program, Target.parse("cpu")).library)(x.numpy())
    assert torch.equal(expected, torch.as_tensor(actual[0]))


def test_branches_are_quantized_to_a_format_of_their_own():
    program, context = prepared(Block, SHAPE)
    text = 'eora{format=int4,rank=4},quantize{weights=["*=int4","*.eora.*=int8"]}'
    annotated = run(program, text, context).program
    bits = {
        origin_of(n): read_encoding(annotated, n.args[1]).bits
        for n in annotated.nodes
        if n.target is torch.ops.aten.linear.default and is_fake_quantize(n.args[1])
    }
    assert bits["fc1"] == 4 and bits["fc1.eora.0"] == bits["fc1.eora.1"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eora{rank=11}", "larger than the full rank 10 of 'head'"),
        ("eora{rank=0}", "'rank'"),
        ("eora{damping=0.0}", "'damping'"),
        ("eora{format=int9}", "no weight format"),
        ('eora{layers=["fc9"]}', "name in 'layers' of eora: 'fc9'"),
    ],
)
def test_bad_options(text, message):
    program, context = prepared(Block, SHAPE)
    with pytest.raises((OptionError, UnknownNameError), match=message):
        run(program, text, context)
