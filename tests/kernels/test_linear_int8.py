"""The int8 linear kernel equals gw::linear and its tail, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import linear_int8
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, random_values, run, tails


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_equals_reference(level, data):
    rows, inner, outer = (data.draw(st.integers(1, most)) for most in (40, 150, 150))
    dtype, zero_point = data.draw(st.sampled_from([("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]))
    case = data.draw(tails(outer))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x, weight = random_values(rng, dtype, (rows, inner)), random_values(rng, "int8", (outer, inner))
    bias = rng.integers(-(10**4), 10**4, outer).astype(np.int32) if data.draw(st.booleans()) else None
    spec = linear_int8.LinearInt8(rows, inner, outer, dtype, zero_point)
    packed = linear_int8.pack(spec, case.tail, level, weight, bias, **case.values)
    residual = [random_values(rng, case.tail.residual.b_dtype, (rows, outer))] if case.tail.residual else []
    function = linear_int8.build(spec, case.tail, level)
    got = run(function, level, [x, *residual, *packed], np.zeros((rows, outer), case.tail.dtype))
    acc = torch.ops.gw.linear(
        torch.from_numpy(x), torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias), zero_point
    )
    want = case.reference(acc, 1, torch.from_numpy(residual[0]) if residual else None)
    np.testing.assert_array_equal(got, want.numpy())
