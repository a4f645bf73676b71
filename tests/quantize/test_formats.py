"""Weight formats: their text, their encodings, and which layer gets which."""

import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.passes.quantize.formats import IntegerFormat, parse_format
from graphwright.passes.quantize.observers import weight_observer


@pytest.mark.parametrize("text", [f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)])
def test_a_format_prints_as_it_was_written(text):
    assert str(parse_format(text)) == text


@pytest.mark.parametrize("text", ["int1", "int9", "int", "float4", "int4 ", ""])
def test_an_unknown_format_is_refused_with_the_known_ones(text):
    with pytest.raises(OptionError, match="int2 to int8"):
        parse_format(text)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("asymmetric", [False, True])
def test_rounding_stays_within_half_a_step(bits, asymmetric):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(bits))
    encoding = IntegerFormat(bits, asymmetric).encoding(weight, weight_observer("min-max"))
    codes = encoding.quantize(weight)
    assert int(codes.to(torch.int32).min()) >= encoding.qmin and int(codes.to(torch.int32).max()) <= encoding.qmax
    error = (encoding.dequantize(codes) - weight).abs().amax((1, 2, 3))
    # The zero point is rounded too, which may cost the outermost value another half step.
    assert bool((error <= encoding.scale * (1.0 if asymmetric else 0.5) * 1.001).all())


def test_asymmetric_codes_use_the_whole_range_of_a_one_sided_weight():
    weight = torch.rand(4, 16, generator=torch.Generator().manual_seed(0)) + 0.01
    steps = {a: IntegerFormat(4, a).encoding(weight, weight_observer("min-max")).scale for a in (False, True)}
    assert bool((steps[True] < 0.6 * steps[False]).all())
