"""The int8 batched product of two activations equals gw::matmul and its tail, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphwright.backends.tvm.kernels import matmul_int8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, random_values, run, tails


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_equals_reference(transposed, level, data):
    batch, rows, inner, columns = (data.draw(st.integers(1, most)) for most in (3, 40, 90, 90))
    inner = data.draw(st.sampled_from([inner, 4 * (inner // 4 + 1)]))  # whole dot-instruction steps pack along another path
    dtype, zero_point = data.draw(st.sampled_from([("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]))
    case = data.draw(tails(columns, with_residual=False))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    a, b = random_values(rng, dtype, (batch, rows, inner)), random_values(rng, "int8", (batch, inner, columns))
    spec = matmul_int8.MatmulInt8(batch, rows, inner, columns, dtype, zero_point, transposed=transposed)
    packed = matmul_int8.pack(spec, case.tail, level, **case.values)
    second = b.transpose(0, 2, 1) if transposed else b
    function = matmul_int8.build(spec, case.tail, level)
    got = run(function, level, [a, second, *packed], np.zeros((batch, rows, columns), case.tail.dtype))
    want = case.reference(torch.ops.gw.matmul(torch.from_numpy(a), torch.from_numpy(b), zero_point, 0), 2)
    np.testing.assert_array_equal(got, want.numpy())


def test_second_operand_with_a_zero_point_is_refused():
    with pytest.raises(OptionError, match="quantize it symmetric"):
        matmul_int8.build(matmul_int8.MatmulInt8(1, 4, 4, 4, "uint8", 0, "uint8", 3), Tail("none", "int32"), "portable")
