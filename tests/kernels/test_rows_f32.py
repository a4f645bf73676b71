"""Softmax and layer normalization of float programs against float64, within the bounds their modules state."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels.layer_norm_f32 import layer_norm
from graphwright.backends.tvm.kernels.softmax_f32 import softmax
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import EPS, LEVELS, normal, run

EXAMPLES = settings(max_examples=6, deadline=None)
LENGTHS = st.one_of(st.integers(1, 70), st.sampled_from([128, 197, 384, 1000]))


def wide_softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    rows=st.integers(1, 9),
    length=LENGTHS,
    spread=st.sampled_from([1e-30, 1.0, 30.0, 1e6]),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_softmax(level, rows, length, spread, masked, seed):
    x = normal(np.random.default_rng(seed), rows, length) * np.float32(spread)
    if masked:
        x[:, length // 2 + 1 :] = -np.inf
    y = run(softmax(rows, length), level, [x], x.shape)
    exact = wide_softmax(x)
    below = np.minimum(x.max(-1, keepdims=True) - x, 64)
    assert (np.abs(y - exact) <= (length / 16 + 8 + below) * EPS * exact + 2e-28).all()


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    rows=st.integers(1, 9),
    length=LENGTHS,
    spread=st.sampled_from([1e-20, 1.0, 1e6]),
    around=st.sampled_from([0.0, 1000.0]),
    eps=st.sampled_from([1e-5, 1e-12]),
    seed=st.integers(0, 2**31),
)
def test_layer_norm(level, rows, length, spread, around, eps, seed):
    rng = np.random.default_rng(seed)
    x = normal(rng, rows, length) * np.float32(spread) + np.float32(around * spread)
    weight, bias = normal(rng, length), normal(rng, length)
    y = run(layer_norm(rows, length, eps), level, [x, weight, bias], x.shape)
    wide = x.astype(np.float64)
    deviation = np.sqrt(wide.var(-1, keepdims=True) + eps)
    normalized = (wide - wide.mean(-1, keepdims=True)) / deviation
    most = np.abs(wide).max(-1, keepdims=True) / deviation
    # The variance is a sum of squares of differences, each off by as much as the mean and x are.
    limit = (length / 64 + 16) * EPS * (np.abs(weight) * (np.abs(normalized) + 1) * (1 + most) + np.abs(bias))
    error = np.abs(y - (normalized * weight + bias))
    assert (error <= limit).all(), f"{np.max(error / limit):.3g} times the bound"


def test_bad_arguments():
    with pytest.raises(OptionError, match="at least 1"):
        softmax(0, 4)
    with pytest.raises(OptionError, match="at least 1"):
        layer_norm(4, 0, 1e-5)
