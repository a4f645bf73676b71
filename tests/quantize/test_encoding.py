import pytest
import torch
from graphwright.ir.dialect import gw
from graphwright.passes.quantize.encoding import Encoding, asymmetric, code_range, for_range, symmetric
from hypothesis import given
from hypothesis import strategies as st

FINITE = st.floats(-1e6, 1e6, width=32)


@given(low=FINITE, high=FINITE, bits=st.integers(2, 8))
def test_zero_has_an_exact_code_and_the_range_is_covered(low, high, bits):
    low, high = min(low, high), max(low, high)
    encoding = asymmetric(low, high, bits)
    zero = encoding.quantize(torch.zeros(1))
    assert float(encoding.dequantize(zero)) == 0.0
    reached = encoding.dequantize(torch.tensor([encoding.qmin, encoding.qmax], dtype=torch.uint8))
    slack = encoding.step * 0.51 + 1e-6 * max(abs(low), abs(high))
    assert float(reached[0]) <= min(low, 0.0) + slack and float(reached[1]) >= max(high, 0.0) - slack


@given(seed=st.integers(0, 10**6), low=st.floats(-100, -0.01), high=st.floats(0.01, 100), bits=st.integers(2, 8))
def test_inside_the_range_the_error_is_at_most_half_a_step(seed, low, high, bits):
    encoding = asymmetric(low, high, bits)
    edges = encoding.dequantize(torch.tensor([encoding.qmin, encoding.qmax], dtype=torch.uint8))
    x = torch.rand(50, generator=torch.Generator().manual_seed(seed)) * (edges[1] - edges[0]) + edges[0]
    error = (encoding.dequantize(encoding.quantize(x)) - x).abs().max()
    assert float(error) <= encoding.step * (0.5 + 1e-4)


@given(seed=st.integers(0, 10**6), axis=st.sampled_from([0, 1]))
def test_codes_agree_with_fake_quantize(seed, axis):
    w = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))
    encoding = symmetric(w.abs().amax(1 - axis), axis=axis)
    fake = gw.fake_quantize(w, encoding.scale, encoding.zero_point, encoding.qmin, encoding.qmax, axis)
    codes = encoding.quantize(w)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 127
    assert torch.equal(encoding.dequantize(codes), fake)


def test_negating_weights_negates_codes():
    w = torch.tensor([[-1.0, 0.25, 0.9]])
    encoding = symmetric(w.abs().amax(1), axis=0)
    assert torch.equal(encoding.quantize(-w), -encoding.quantize(w))


def test_code_of_bounds_saturates():
    encoding = asymmetric(-1.0, 1.0)
    assert encoding.code(float("inf")) == 255 and encoding.code(float("-inf")) == 0
    assert encoding.code(0.0) == encoding.zero and encoding.code(50.0) == 255


def test_ranges_and_storage():
    assert code_range(8, signed=True) == (-127, 127) and code_range(4, signed=False) == (0, 15)
    assert for_range(-3.0, 1.0, signed=True).dtype == torch.int8
    assert for_range(-3.0, 1.0, signed=True).step == pytest.approx(3.0 / 127)
    assert for_range(0.0, 0.0).step > 0, "a value that is always zero still has a grid"


@pytest.mark.parametrize(("qmin", "qmax", "scale"), [(0, 256, 1.0), (5, 5, 1.0), (0, 255, 0.0), (0, 255, float("nan"))])
def test_impossible_encodings_are_refused(qmin, qmax, scale):
    with pytest.raises(ValueError, match=r"codes|scales"):
        Encoding(torch.tensor([scale]), torch.tensor([0], dtype=torch.int32), qmin, qmax, torch.uint8)
