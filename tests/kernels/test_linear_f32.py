"""Float linear layers and batched matrix products against float64."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels import linear_f32, matmul_f32
from graphwright.backends.tvm.kernels.float_base import NO_ACTIVATION, RELU, RELU6, Activation
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import LEVELS, assert_close, normal, run

EXAMPLES = settings(max_examples=15, deadline=None)
LEADS = st.one_of(st.just(()), st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 3), st.integers(1, 20)))


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    lead=LEADS,
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 150),
    activation=st.sampled_from([NO_ACTIVATION, RELU, RELU6, Activation(-1.0, 2.0)]),
    seed=st.integers(0, 2**31),
)
def test_linear(level, lead, inputs, outputs, activation, seed):
    rng = np.random.default_rng(seed)
    x, w, bias = normal(rng, *lead, inputs), normal(rng, outputs, inputs), normal(rng, outputs)
    function = linear_f32.linear(lead, inputs, outputs, activation, level)
    y = run(function, level, (x, linear_f32.pack_weight(w), linear_f32.pack_bias(outputs, bias)), (*lead, outputs))
    wide, magnitude = (x.astype(np.float64) @ w.T.astype(np.float64) + bias), np.abs(x) @ np.abs(w).T + np.abs(bias)
    low, high = (-np.inf if activation.low is None else activation.low), (np.inf if activation.high is None else activation.high)
    assert_close(y, np.clip(wide, low, high), magnitude, inputs)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    lead=LEADS,
    rows=st.integers(1, 40),
    inner=st.integers(1, 40),
    columns=st.integers(1, 70),
    transposed=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matmul(level, lead, rows, inner, columns, transposed, seed):
    rng = np.random.default_rng(seed)
    a, b = normal(rng, *lead, rows, inner), normal(rng, *lead, inner, columns)
    right = np.swapaxes(b, -1, -2) if transposed else b
    function = matmul_f32.matmul(lead, rows, inner, columns, transposed, level)
    y = run(function, level, (a, right), (*lead, rows, columns))
    assert_close(y, a.astype(np.float64) @ b.astype(np.float64), np.abs(a) @ np.abs(b), inner)


def test_empty_extents_are_refused():
    with pytest.raises(OptionError, match="at least 1"):
        linear_f32.linear((0,), 3, 4)
    with pytest.raises(OptionError, match="at least 1"):
        matmul_f32.matmul((), 3, 0, 4)
