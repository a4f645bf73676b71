"""Float linear layers and batched matrix products against float64."""

from __future__ import annotations

import numpy as np
import pytest
from graphwright.backends.tvm.kernels import linear_f32, matmul_f32
from graphwright.backends.tvm.kernels.float_base import FloatSpec, MatrixProduct
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import ACTIVATIONS, LEVELS, activated, assert_close, normal, run

EXAMPLES = settings(max_examples=6, deadline=None)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    rows=st.integers(1, 60),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 150),
    activation=ACTIVATIONS,
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_linear(level, rows, inputs, outputs, activation, residual, seed):
    rng = np.random.default_rng(seed)
    x, w, bias = normal(rng, rows, inputs), normal(rng, outputs, inputs), normal(rng, outputs)
    added = normal(rng, rows, outputs) if residual else np.zeros((rows, outputs), np.float32)
    function = linear_f32.linear(MatrixProduct(rows, inputs, outputs), FloatSpec(activation, residual, level))
    operands = (x, *([added] if residual else []), linear_f32.pack_weight(w), linear_f32.pack_bias(outputs, bias))
    y = run(function, level, operands, (rows, outputs))
    wide, magnitude = (x.astype(np.float64) @ w.T.astype(np.float64) + bias + added), np.abs(x) @ np.abs(w).T + np.abs(bias)
    assert_close(y, activated(activation, wide), magnitude + np.abs(added), inputs + 1, activation)


@pytest.mark.parametrize("level", LEVELS)
@EXAMPLES
@given(
    batch=st.integers(1, 6),
    rows=st.integers(1, 40),
    inner=st.integers(1, 40),
    columns=st.integers(1, 70),
    transposed=st.booleans(),
    residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matmul(level, batch, rows, inner, columns, transposed, residual, seed):
    rng = np.random.default_rng(seed)
    a, b = normal(rng, batch, rows, inner), normal(rng, batch, inner, columns)
    added = normal(rng, batch, rows, columns) if residual else np.zeros((batch, rows, columns), np.float32)
    right = np.swapaxes(b, -1, -2) if transposed else b
    shape = MatrixProduct(rows, inner, columns, batch, transposed)
    function = matmul_f32.matmul(shape, FloatSpec(residual=residual, level=level))
    y = run(function, level, (a, *([added] if residual else []), right), (batch, rows, columns))
    assert_close(y, a.astype(np.float64) @ b.astype(np.float64) + added, np.abs(a) @ np.abs(b) + np.abs(added), inner + 1)


def test_empty_extents_are_refused():
    with pytest.raises(OptionError, match="at least 1"):
        MatrixProduct(0, 3, 4)
