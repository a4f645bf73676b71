import math
from fractions import Fraction

import pytest
import torch
from graphwright.ir.errors import PassError
from graphwright.passes.quantize.align_scales import TOLERANCE, odd_fraction, odd_fractions
from graphwright.passes.quantize.annotate import source_of_codes
from graphwright.passes.quantize.encoding import is_fake_quantize, read_encoding
from graphwright.passes.quantize.side_by_side import is_quantized_layer
from hypothesis import given
from hypothesis import strategies as st
from quantize_models import BLOCK, Block, ConvNet, prepare, prepared, run
from torch import nn

ALIGNED = "quantize,align-scales,correct-bias"


def nearest_odd(ratio):
    """The fraction with an odd denominator below 2^16 that `ratio` is, but for float32 rounding."""
    fraction = Fraction(ratio).limit_denominator(1 << 12)
    assert abs(float(fraction) / ratio - 1) < 1e-6
    return fraction


def reader(node):
    """The fake_quantize after a layer and its clamp."""
    (user,) = node.users
    return user if is_fake_quantize(user) else reader(user)


@given(st.floats(1e-5, 64.0))
def test_fractions_are_near_and_never_tie(ratio):
    fraction = odd_fraction(ratio)
    assert fraction.denominator % 2 and abs(float(fraction) / ratio - 1) <= TOLERANCE * (1 + 1e-9)
    # An integer times the fraction is at least 1 / (2 D) from k + 1/2.
    for total in range(-700, 700, 7):
        code = total * fraction
        assert abs(code - math.floor(code) - Fraction(1, 2)) >= Fraction(1, 2 * fraction.denominator)


@given(st.floats(0.05, 8.0), st.floats(0.05, 8.0))
def test_pairs_of_fractions_share_an_odd_denominator(first, second):
    pair = odd_fractions(first, second)
    common = math.lcm(*(f.denominator for f in pair))
    assert common % 2 and common < 1024
    assert all(abs(float(f) / r - 1) <= TOLERANCE for f, r in zip(pair, (first, second), strict=True))


def test_codes_survive_lowering():
    """What the pass is for: the integer program gives the annotated program's answers, to float rounding of the last layer."""
    program, context = prepared(ConvNet, (8, 3, 61, 67))
    plain = run(program, "quantize,lower-integer", context).certificate[-1]
    aligned = run(program, f"{ALIGNED},lower-integer", context).certificate[-1]
    assert plain.sqnr_db < 110 and aligned.sqnr_db > 120


@pytest.mark.parametrize("mode", ["float-scale", "dyadic"])
def test_both_rescaling_modes_agree(mode):
    program, context = prepared(ConvNet, (2, 3, 13, 11))
    row = run(program, f"{ALIGNED},lower-integer{{rescale={mode}}}", context).certificate[-1]
    assert row.sqnr_db > 120


def test_every_ratio_has_an_odd_denominator():
    program, context = prepared(ConvNet, (2, 3, 13, 11))
    result = run(program, ALIGNED, context)
    aligned, stats = result.program, result.certificate[1].stats
    # Four convolutions, the residual sum and the mean; the head's sum stays a sum.
    assert stats["aligned"] == 6 and stats["unaligned"] == [] and 0 < stats["margin"] < 0.5
    for layer in [n for n in aligned.nodes if is_quantized_layer(n)][:-1]:
        source, _ = source_of_codes(aligned, layer.args[0])
        unit = read_encoding(aligned, source).step / read_encoding(aligned, reader(layer)).step
        scales = read_encoding(aligned, layer.args[1]).scale.double() * unit
        assert all(nearest_odd(float(s)).denominator % 2 for s in scales)
    (add,) = [n for n in aligned.nodes if n.target is torch.ops.aten.add.Tensor]
    result_step = read_encoding(aligned, next(iter(add.users))).step
    for operand in add.args:
        assert nearest_odd(read_encoding(aligned, operand).step / result_step).denominator % 2


def test_scales_move_little_and_biases_lie_on_their_grid():
    program, context = prepared(ConvNet, (2, 3, 13, 11))
    before, after = run(program, "quantize", context).program, run(program, "quantize,align-scales", context)
    assert 0 < after.certificate[-1].stats["largest_change"] <= TOLERANCE * 1.01
    for old, new in zip(*([n for n in p.nodes if is_fake_quantize(n)] for p in (before, after.program)), strict=True):
        ratio = read_encoding(after.program, new).scale / read_encoding(before, old).scale
        assert float((ratio - 1).abs().max()) <= TOLERANCE * 1.01
    for layer in (n for n in after.program.nodes if is_quantized_layer(n)):
        source, factor = source_of_codes(after.program, layer.args[0])
        step = read_encoding(after.program, layer.args[1]).scale.double() * read_encoding(after.program, source).step * factor
        codes = after.program.parameter(layer.args[2]).double() / step
        assert float((codes - codes.round()).abs().max()) < 0.01


def test_a_transformer_keeps_its_float_islands():
    program, context = prepared(Block, BLOCK)
    result = run(program, f"{ALIGNED},lower-integer", context)
    assert result.certificate[-1].sqnr_db > 40 and result.certificate[1].stats["aligned"] == 3


def test_a_sum_between_fixed_scales_is_reported():
    """x + y and x - y fix the scales of x and y; a product of both results fixes theirs, so their own sum has nothing to move."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x, y = self.a(x), self.b(x)
            return self.head((x + y) + (x - y))

    program, context = prepare(Net().eval(), (1, 3, 4, 4))
    stats = run(program, ALIGNED, context).certificate[1].stats
    assert len(stats["unaligned"]) == 2 and "other sums have fixed the scales of both operands" in stats["unaligned"][0]


def test_a_weight_of_two_layers_is_aligned_to_the_first():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))

    program, context = prepare(Net().eval(), (2, 8))
    result = run(program, "quantize,align-scales", context)
    assert [text.split(": ")[1] for text in result.certificate[-1].stats["unaligned"]] == [
        "it shares its weight with a layer before"
    ]


def test_a_program_with_nothing_to_align_is_left_alone():
    """A layer without bias whose sums are the output: nothing is rounded."""
    program, context = prepare(nn.Linear(8, 4, bias=False), (2, 8))
    row = run(program, "quantize,align-scales", context).certificate[-1]
    assert row.modified is False and row.stats["aligned"] == 0


def test_the_pass_needs_an_annotated_program():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    with pytest.raises(PassError, match="align-scales.*annotated"):
        run(program, "align-scales", context)
