from fractions import Fraction

import pytest
import torch
from graphwright.passes.quantize.fixed_point import add_multipliers, dyadic
from hypothesis import given
from hypothesis import strategies as st


@given(st.floats(2.0**-31, 2.0**28))
def test_dyadic_is_accurate_to_31_bits(factor):
    multiplier, shift = dyadic(torch.tensor([factor], dtype=torch.float64))
    m, s = int(multiplier), int(shift)
    assert 2**30 <= m < 2**31 and 1 <= s <= 62
    assert abs(Fraction(m, 1 << s) / Fraction(factor) - 1) <= Fraction(1, 2**31)


def test_tiny_factors_keep_the_largest_shift():
    multiplier, shift = dyadic(torch.tensor([2.0**-40, 2.0**-70], dtype=torch.float64))
    assert shift.tolist() == [62, 62] and multiplier.tolist() == [2**22, 0]


def test_a_factor_just_below_a_power_of_two_carries_over():
    multiplier, shift = dyadic(torch.tensor([1 - 2.0**-40], dtype=torch.float64))
    assert (int(multiplier), int(shift)) == (2**30, 30)


@pytest.mark.parametrize("factor", [0.0, -1.0, 2.0**29, float("nan")])
def test_factors_without_a_dyadic_form_are_refused(factor):
    with pytest.raises(ValueError, match="rescaling factor"):
        dyadic(torch.tensor([factor], dtype=torch.float64))


@given(a=st.floats(2.0**-9, 2.0**18), ratio=st.floats(0, 1), negative=st.booleans())
def test_add_multipliers_use_21_bits(a, ratio, negative):
    b = a * ratio * (-1 if negative else 1)
    found = add_multipliers(a, b)
    assert found is not None
    ma, mb, shift = found
    assert 2**20 <= max(abs(ma), abs(mb)) < 2**21 and 1 <= shift <= 30
    assert abs(ma / 2**shift - a) <= a * 2**-20 and abs(mb / 2**shift - b) <= a * 2**-20


def test_add_multipliers_refuse_factors_out_of_reach():
    assert add_multipliers(2.0**-12, 2.0**-13) is None and add_multipliers(2.0**25, 1.0) is None
