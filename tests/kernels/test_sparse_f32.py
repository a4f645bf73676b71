"""Linear layers stored by rows against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import sparse_f32
from graphwright.ir.dialect import gw
from graphwright.ir.dialect.sparse import compressed, dense
from hypothesis import given, settings
from hypothesis import strategies as st

from .float_cases import LEVELS, assert_close, normal, run


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(1, 9),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 40),
    share=st.sampled_from([0.02, 0.3, 1.0]),
    half=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_sparse_linear(level, rows, inputs, outputs, share, half, seed):
    rng = np.random.default_rng(seed)
    matrix, mask = torch.from_numpy(normal(rng, outputs, inputs)), torch.from_numpy(rng.random((outputs, inputs)) < share)
    mask[0, 0] = True
    start, columns, values = compressed(matrix, mask, torch.float16 if half else torch.float32)
    x, kinds = normal(rng, rows, inputs), ("int16", "float16" if half else "float32")
    function = sparse_f32.sparse_linear(rows, inputs, outputs, len(values), *kinds)
    y = run(function, level, [x, start.numpy(), columns.numpy(), values.numpy()], (rows, outputs))
    stored = dense(start, columns, values, inputs)
    assert torch.equal(stored != 0, mask & (values.new_zeros(()) != matrix.to(values.dtype)))
    wide, magnitude = x.astype(np.float64) @ stored.numpy().T.astype(np.float64), np.abs(x) @ stored.abs().numpy().T
    assert_close(y, wide, magnitude, inputs + 1)
    np.testing.assert_allclose(gw.sparse_linear(torch.from_numpy(x), start, columns, values).numpy(), wide, atol=1e-4)
