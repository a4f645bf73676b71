"""The int8 batched product of two activations equals gw::matmul and its tail, bit for bit."""

from __future__ import annotations

import pytest
from graphwright.backends.tvm.kernels import matmul_int8
from graphwright.backends.tvm.kernels.base import Tail
from graphwright.ir.errors import OptionError
from hypothesis import given, settings
from hypothesis import strategies as st

from .kernel_cases import LEVELS, check_matmul


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("transposed", [False, True])
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_equals_reference(transposed, level, data):
    dtypes = [("uint8", 0), ("uint8", 131), ("int8", 0), ("int8", -128), ("int8", 5)]
    check_matmul(data, level, transposed, ((1, 3), (1, 40), (1, 90), (1, 90)), dtypes)


def test_second_operand_with_a_zero_point_is_refused():
    with pytest.raises(OptionError, match="quantize it symmetric"):
        matmul_int8.build(matmul_int8.MatmulInt8(1, 4, 4, 4, "uint8", 0, "uint8", 3), Tail("none", "int32"), "portable")
