"""The int8 linear kernel equals gw::linear and its tail, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import linear_int8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.backends.tvm.kernels.gemm_int8 import Product
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, random_values, run, tails


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=6, deadline=None)
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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("rows", "blocks"), [(101, 2), (96, 2), (20, 1)])
def test_products_of_many_rows_are_cut_into_two_blocks(monkeypatch, level, rows, blocks):
    rng = np.random.default_rng(0)
    inner, outer, seen, rule = 400, 160, set(), Product._rows

    def watched(self, tiling, segment):
        found = rule(self, tiling, segment)
        seen.add(found[0])
        return found

    monkeypatch.setattr(Product, "_rows", watched)
    spec, tail = linear_int8.LinearInt8(rows, inner, outer, "uint8", 3), Tail("none", "int32")
    x, weight = random_values(rng, "uint8", (rows, inner)), random_values(rng, "int8", (outer, inner))
    function = linear_int8.build(spec, tail, level)
    assert seen <= {1, blocks} and (blocks in seen or level != "avx512-vnni")
    got = run(function, level, [x, *linear_int8.pack(spec, tail, level, weight, None)], np.zeros((rows, outer), np.int32))
    np.testing.assert_array_equal(got, (x.astype(np.int32) - 3) @ weight.astype(np.int32).T)
