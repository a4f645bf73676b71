"""spqr: outliers leave exactly, the best ones first, and what is left quantizes better."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.dialect import gw
from graphwright.ir.errors import OptionError, UnknownNameError
from graphwright.passes.manager import parameter_bytes
from graphwright.passes.quantize.spqr import choose_outliers
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import prepare, run
from torch import nn


def heavy(seed: int = 0, width: int = 128, outputs: int = 64) -> nn.Sequential:
    """Two layers with a few weights far outside."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, outputs), nn.ReLU(), nn.Linear(outputs, 10))
    weight = model[0].weight.data
    weight.view(-1)[torch.randperm(weight.numel())[: weight.numel() // 150]] *= 12
    return model


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), form=st.sampled_from(["int3g16", "int4", "fp4e2m1g32"]), share=st.sampled_from([0.01, 0.05]))
def test_exact_and_within_the_share(seed, form, share):
    program, context = prepare(heavy(seed), (3, 128), samples=2)
    stats = run(program, f"spqr{{format={form},share={share}}}", context).certificate[0].stats  # the manager checks the effect
    assert stats["layers"] == 2 and 0 < stats["outliers"] <= share


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), budget=st.integers(1, 5))
def test_the_choice_is_optimal_on_the_hull_of_its_model(seed, budget):
    """No other choice of as many weights has a lower modelled error (brute force over how many each group gives)."""
    generator = torch.Generator().manual_seed(seed)
    weight, energy = torch.randn(2, 8, generator=generator) ** 3, torch.rand(8, generator=generator)
    mask = choose_outliers(weight, energy, 4, budget / 16)

    def error(given: tuple[int, ...]) -> float:
        parts = weight.abs().double().reshape(4, 4).sort(1, descending=True).values
        weights = energy.double().reshape(2, 4).sum(1).repeat(2)
        return sum(float(parts[g, n].square() * weights[g]) for g, n in enumerate(given))

    chosen = tuple(mask.reshape(4, 4).sum(1).tolist())
    assert sum(chosen) <= budget
    best = min(error(n) for n in itertools.product(range(4), repeat=4) if sum(n) == sum(chosen))
    assert error(chosen) == pytest.approx(best)


def test_what_is_left_quantizes_better():
    program, context = prepare(heavy(), (3, 128), samples=4)
    text = 'quantize{weights=["*=int3g32","2=int8g32"]}'
    plain = run(program, text, context).certificate[-1].sqnr_db
    treated = run(program, f"spqr{{format=int3g32}},{text}", context).certificate[-1].sqnr_db
    assert treated > plain + 4


def test_the_artifact_equals_the_reference_and_stays_small():
    program, context = prepare(heavy(width=512, outputs=256), (1, 512), samples=2)
    result = run(program, 'spqr,quantize{weights=["*=int3g64"]},lower-integer', context).program
    assert [n.target for n in result.nodes].count(gw.sparse_linear.default) == 2
    assert parameter_bytes(result) < 0.17 * parameter_bytes(program)
    x = torch.randn(1, 512)
    (got,) = load_bytes(TVMBackend().compile(result, Target.parse("cpu")).library)(x.numpy())
    (want,) = result(x)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5 * float(want.abs().max()))


def test_layers_are_chosen_by_origin():
    program, context = prepare(heavy(), (3, 128), samples=1)
    assert run(program, 'spqr{layers=["2"]}', context).certificate[0].stats["layers"] == 1
    with pytest.raises(UnknownNameError, match="name in 'layers' of spqr"):
        run(program, 'spqr{layers=["nothing"]}', context)


@pytest.mark.parametrize("options", ["share=0.0", "share=0.7", "samples=0", "format=int99"])
def test_options_out_of_range_are_refused(options):
    program, context = prepare(heavy(), (3, 128), samples=1)
    with pytest.raises(OptionError):
        run(program, f"spqr{{{options}}}", context)
