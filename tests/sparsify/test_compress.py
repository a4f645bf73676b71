"""Stored without their zeros, weights take fewer bytes of program and artifact, and outputs stay what they were."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from graphwright.backends.loader import load
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.backends.tvm.target import missing_to_run
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.sparse import to_bitmask
from graphwright.ir.errors import PassError, UnknownNameError
from graphwright.passes.manager import parameter_bytes
from graphwright.tools.optimize import optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import BLOCK, Block, ConvNet, Kinds, prepare, prepared, run, seeded
from torch import nn

INTEGER = "quantize,lower-integer"


@functools.cache
def kinds():
    return prepare(seeded(Kinds), (1, 3, 17, 15))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.int8, torch.float32]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_the_op_gives_the_weight_back(shape, dtype, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, shape, generator=generator).to(dtype)
    weight = torch.where(torch.rand(shape, generator=generator) < share, weight, torch.zeros((), dtype=dtype))
    mask, values = to_bitmask(weight)
    assert mask.shape == (shape[0], -(-weight[0].numel() // 8)) and values.numel() == int((weight != 0).sum())
    assert torch.equal(gw.from_bitmask(mask, values, shape), weight)
    if values.numel():
        with pytest.raises(ValueError, match="values"):
            gw.from_bitmask(mask, values[:-1], shape)
    with pytest.raises(ValueError, match="stored as a mask"):
        gw.from_bitmask(mask.to(torch.int16), values, shape)


def check(program, samples, target: Target) -> None:
    """The artifact equals the reference: in every bit where the program is integer."""
    execute = load_bytes(TVMBackend().compile(program, target).library)
    for sample in samples[:3]:
        got = execute(*(x.numpy() for x in sample))
        got, want = np.asarray(got[0] if isinstance(got, (list, tuple)) else got), program(*sample)[0].numpy()
        if program.stage.label == "integer":
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["avx512-amx", "avx512-vnni", "avx2"])
@pytest.mark.parametrize("text", ["compress-sparse", f"{INTEGER},compress-sparse"])
def test_every_kind_of_layer(text, level):
    target = Target("x86", level)
    if missing_to_run(target):
        pytest.skip(missing_to_run(target))
    program, context = kinds()
    found = run(program, f"sparsify-magnitude{{sparsity=0.7}},{text}", context)
    assert found.certificate[-1].stats["layers"] == 7
    check(found.program, context.calibration.samples, target)


@pytest.mark.parametrize("rounding", ["", "gptq,", "gptq{target=float},", "adaround{iterations=20},", "gpfq,"])
@pytest.mark.parametrize("weights", ["", '{weights=["*=uint4"]}'])
def test_zeros_survive_quantization_whatever_chooses_the_codes(rounding, weights):
    program, context = prepared(Block, BLOCK)
    text = f"sparsify-wanda{{sparsity=0.6}},quantize{weights},{rounding}lower-integer"
    layers = [n for n in run(program, text, context).program.nodes if n.target is gw.linear.default]
    integer = layers[0].graph.owning_module
    for layer in layers:
        *_, values = integer_weights(integer, layer)
        zeros = (values == 0).float().mean(1)
        assert len(layers) == 5 and bool((zeros >= round(0.6 * values.shape[1]) / values.shape[1] - 1e-6).all())


def integer_weights(module, layer) -> tuple[torch.Tensor, ...]:
    """What the weight of an integer layer is stored as, then its s8 values."""
    node = layer.args[1]
    if node.op == "get_attr":
        return (getattr(module, node.target),)
    stored = [getattr(module, n.target) for n in node.all_input_nodes]
    return *stored, gw.unpack(stored[0], *node.args[1:3], *stored[1:])


def test_bytes_of_the_program_are_those_of_bits_and_values():
    program, context = prepared(Block, BLOCK)
    result = run(program, 'sparsify-magnitude{pattern="2:4"},compress-sparse', context)
    stats, row = result.certificate[-1].stats, result.certificate[-1]
    weights = sum(w.numel() for n, w in program.parameters().items() if w.dim() == 2)
    assert stats["bytes_before"] == 4 * weights and stats["bytes_after"] == 2 * weights + weights // 8
    assert row.bytes_before - row.bytes_after == stats["bytes_before"] - stats["bytes_after"]
    integer = run(program, f'sparsify-magnitude{{pattern="2:4"}},{INTEGER},compress-sparse', context).certificate[-1].stats
    # Codes of a few small weights round to 0 as well.
    assert 0.9 * (weights // 2 + weights // 8) < integer["bytes_after"] <= weights // 2 + weights // 8
    assert integer["bytes_before"] == weights


def test_what_would_grow_stays_as_it_is():
    program, context = prepared(Block, BLOCK)
    assert run(program, "compress-sparse", context).certificate[-1].modified is False
    few = run(program, 'sparsify-magnitude,quantize{weight_bits=4},lower-integer,compress-sparse{layers=["fc1"]}', context)
    assert few.certificate[-1].modified is False, "4 bits a code are fewer than 1 + 4"


def test_layers_are_named():
    program, context = prepared(ConvNet, (1, 3, 16, 16))
    result = run(program, 'sparsify-magnitude,compress-sparse{layers=["expand","pro*"]}', context)
    assert result.certificate[-1].stats["layers"] == 2
    with pytest.raises(UnknownNameError, match="did you mean 'stem'"):
        run(program, 'compress-sparse{layers=["steam"]}', context)


def test_it_comes_after_quantization():
    program, context = prepared(Block, BLOCK)
    with pytest.raises(PassError, match="compress-sparse.*last"):
        run(program, f"sparsify-magnitude,compress-sparse,{INTEGER}", context)


def test_the_file_shrinks_and_answers_the_same(tmp_path):
    """model.gw loses what the zeros took, and gives the same answers in every bit."""
    layers = [nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 64)]
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*layers).eval(), torch.randn(4, 256)
    sizes, weights, answers = {}, {}, {}
    for last in ("", ",compress-sparse"):
        text = f"canonicalize,sparsify-magnitude{{sparsity=0.8}},{INTEGER}{last}"
        result = optimize(model, example_inputs=inputs, calibration=[inputs], pipeline=text, measure=False)
        path = tmp_path / f"model{last}.gw"
        result.artifact.save(path)
        sizes[last], weights[last] = path.stat().st_size, parameter_bytes(result.program)
        answers[last] = load(path)(inputs)
    saved = weights[""] - weights[",compress-sparse"]
    assert saved > 0.65 * weights[""]
    assert sizes[""] - sizes[",compress-sparse"] > 0.9 * saved
    assert torch.equal(answers[""], answers[",compress-sparse"])
