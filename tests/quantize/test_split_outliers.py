"""split-outliers: exact moves of massive hidden channels, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.target import Target
from graphwright.backends.tvm.backend import TVMBackend
from graphwright.backends.tvm.executor import load_bytes
from graphwright.ir.errors import OptionError
from graphwright.passes.quantize import operators as ops
from graphwright.passes.quantize.split_outliers import outlying
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import prepare, run
from torch import nn

MASSIVE = (3, 20)


def feed_forward(seed: int = 0, function: nn.Module | None = None, bias: bool = True, boost: float = 40.0) -> nn.Sequential:
    """Two linear layers whose hidden channels 3 and 20 reach `boost` times the others, and are read by small weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 48, bias=bias), function or nn.GELU(), nn.Linear(48, 10, bias=bias))
    model[0].weight.data[list(MASSIVE)] *= boost
    model[2].weight.data[:, list(MASSIVE)] /= boost
    return model


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6), function=st.sampled_from([nn.GELU(), nn.SiLU(), nn.ReLU(), nn.GELU("tanh")]), bias=st.booleans()
)
def test_exact_and_only_massive_channels_move(seed, function, bias):
    program, context = prepare(feed_forward(seed, function, bias), (3, 5, 12), samples=2)
    result = run(program, "split-outliers{ratio=4.0,most=8}", context)  # the manager checks the effect
    assert (result.certificate[0].stats["layers"], result.certificate[0].stats["channels"]) == (1, 2)
    wide, narrow = sorted((n for n in result.program.nodes if n.target is ops.LINEAR), key=lambda n: -n.meta["val"].shape[-1])[
        0:4:3
    ]
    shapes = [tuple(result.program.parameter(n.args[1]).shape) for n in (wide, narrow)]
    assert shapes == [(48, 12), (2, 12)]
    assert not result.program.parameter(wide.args[1])[list(MASSIVE)].any()


def test_the_layer_quantizes_better():
    program, context = prepare(feed_forward(), (3, 5, 12), samples=4)
    text = "quantize{activation_observer=min-max}"
    plain = run(program, text, context).certificate[-1].sqnr_db
    split = run(program, f"split-outliers,{text}", context).certificate[-1].sqnr_db
    assert split > plain + 10


def test_even_channels_stay_together():
    program, context = prepare(feed_forward(boost=1.0), (3, 5, 12), samples=2)
    result = run(program, "split-outliers{ratio=4.0}", context)
    assert not result.certificate[0].modified


def test_a_hidden_value_that_others_read_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = feed_forward()

        def forward(self, x):
            hidden = self.layers[1](self.layers[0](x))
            return self.layers[2](hidden), hidden

    program, context = prepare(Both(), (3, 12), samples=2)
    assert not run(program, "split-outliers", context).certificate[0].modified


def test_what_counts_as_outlying():
    largest = torch.tensor([1.0, 9.0, 1.2, 30.0, 0.0, 1.1])
    indices, ratio = outlying(largest, 2.0, 2)
    assert indices.tolist() == [1, 3] and ratio == pytest.approx(25.0)
    assert outlying(largest, 2.0, 1)[0].tolist() == [3]
    assert outlying(torch.zeros(4), 2.0, 1)[0].tolist() == []


@pytest.mark.parametrize("options", ["ratio=1.0", "most=0", "samples=0"])
def test_options_out_of_range_are_refused(options):
    program, context = prepare(feed_forward(), (3, 12), samples=1)
    with pytest.raises(OptionError):
        run(program, f"split-outliers{{{options}}}", context)


def test_the_artifact_equals_the_reference():
    program, context = prepare(feed_forward(), (3, 5, 12), samples=4)
    text = "split-outliers,smooth-quant,quantize{activation_observer=min-max},align-scales,lower-integer"
    result = run(program, text, context).program
    x = context.require_calibration("test").samples[0][0]
    (got,) = load_bytes(TVMBackend().compile(result, Target.parse("cpu")).library)(x.numpy())
    np.testing.assert_array_equal(got, result(x)[0].numpy())
