"""What the rounding passes share: layers as matrix products, and what every pass keeps to."""

import math

import pytest
import torch
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import origin_of
from graphwright.passes.base import PassContext
from graphwright.passes.quantize.encoding import read_codes, read_encoding
from graphwright.passes.quantize.rounding import Steps, following, gather
from graphwright.passes.quantize.side_by_side import SideBySide
from quantize_models import BLOCK, Block, ConvNet, correlated, prepare, prepared, run, weights_of
from torch import nn

COARSE = "quantize{weight_bits=3,weight_observer=mse},align-scales"
PASSES = ("adaround{iterations=200}", "adaquant{iterations=200}", "gptq{target=float}", "gpfq")
MODELS = [(ConvNet, (2, 3, 9, 9)), (Block, BLOCK)]


def rows_of(program, context, count):
    both = SideBySide(program, context.calibration.samples, lambda *_: None, "test")
    for layer in both.layers():
        yield layer, gather(program, layer, both, count, torch.Generator().manual_seed(0)), both


@pytest.mark.parametrize(
    ("groups", "kernel", "stride", "padding", "dilation", "bias"),
    [(1, (3, 3), 2, 1, 1, True), (6, (3, 3), 1, 2, 2, False), (2, (2, 3), 1, 0, 1, True), (1, (1, 1), 2, 0, 1, False)],
)
def test_rows_of_convolutions_make_its_outputs(groups, kernel, stride, padding, dilation, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, bias)
    program, context = prepare(nn.Sequential(layer, nn.ReLU()), (2, 6, 7, 8), samples=2)
    annotated = run(program, "quantize", context).program
    (node, rows, both) = next(rows_of(annotated, context, 24))
    assert rows.inputs.shape == (groups, 24, 6 // groups * kernel[0] * kernel[1])
    assert following(annotated, node) is not None
    exact = torch.baddbmm(rows.bias, rows.exact_inputs, rows.weight.transpose(1, 2))
    assert torch.allclose(exact, rows.targets, atol=1e-4)
    found = {tuple(r) for r in rows.targets.transpose(0, 1).reshape(24, -1).tolist()}
    outputs = torch.cat(both.exact[node]).movedim(1, -1).reshape(-1, 12)
    assert found <= {tuple(r) for r in outputs.tolist()} and len(found) == 24


def test_rows_of_one_dimensional_and_linear_layers():
    for model, shape in ((nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)), (nn.Linear(5, 3), (2, 7, 5))):
        program, context = prepare(nn.Sequential(model, nn.GELU()), shape, samples=3)
        (_, rows, _) = next(rows_of(run(program, "quantize", context).program, context, 12))
        exact = torch.baddbmm(rows.bias, rows.exact_inputs, rows.weight.transpose(1, 2))
        assert rows.inputs.shape[1] == 12 and torch.allclose(exact, rows.targets, atol=1e-4)


def held_out(program, shape):
    """Mean squared error of every layer's output against the float model's on inputs that no pass has seen."""
    both = SideBySide(program, tuple((x,) for x in correlated(shape, 12, seed=99)), lambda *_: None, "test")
    return {origin_of(n): float((torch.cat(both.values[n]) - torch.cat(both.exact[n])).square().mean()) for n in both.layers()}


@pytest.fixture(scope="module", params=MODELS, ids=lambda m: m[0].__name__)
def coarse(request):
    """(annotated program, context with 48 samples, input shape)."""
    model, shape = request.param
    program, _ = prepared(model, shape)
    context = PassContext(Calibration.for_program(program, correlated(shape, 48, seed=0)))
    return run(program, COARSE, context).program, context, shape


@pytest.mark.parametrize("text", PASSES)
def test_outputs_on_held_out_inputs_come_nearer_to_the_float_ones(coarse, text):
    annotated, context, shape = coarse
    result = run(annotated, text, context)
    before, after = held_out(annotated, shape), held_out(result.program, shape)
    ratios = [after[name] / before[name] for name in before]
    assert math.prod(ratios) ** (1 / len(ratios)) < 0.9 and max(ratios) < 1.3
    stats = result.certificate[0].stats
    assert stats["layers"] == len(before) and 0 < stats["changed"] < 1


@pytest.mark.parametrize("text", PASSES)
def test_codes_stay_on_the_grid_and_the_float_weights_where_they_are(coarse, text):
    annotated, context, _ = coarse
    after = run(annotated, text, context).program
    for old, new in zip(weights_of(annotated), weights_of(after), strict=True):
        encoding = read_encoding(after, new)
        codes = read_codes(after, new)
        assert encoding.qmin <= int(codes.min()) and int(codes.max()) <= encoding.qmax
        assert torch.equal(annotated.parameter(old.args[0]), after.parameter(new.args[0]))


@pytest.mark.parametrize("text", PASSES)
def test_a_seed_gives_the_same_codes_again(coarse, text):
    annotated, context, _ = coarse
    short = text.replace("200", "20")
    first, second = (run(annotated, short, PassContext(context.calibration, seed=5)).program for _ in range(2))
    for a, b in zip(weights_of(first), weights_of(second), strict=True):
        assert torch.equal(read_codes(first, a), read_codes(second, b))


@pytest.mark.parametrize("text", PASSES)
def test_integers_mean_what_the_annotated_program_means(coarse, text):
    annotated, context, _ = coarse
    rounded = run(annotated, f"{text.replace('200', '20')},align-scales", context).program
    lowered = run(rounded, "lower-integer", context).program
    for sample in context.calibration.samples[:4]:
        expected = rounded(*sample)[0]
        assert float((lowered(*sample)[0] - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def test_weights_of_two_layers_are_chosen_once_and_asymmetric_ones_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    program, context = prepare(Twice(), (4, 16), samples=8)
    result = run(program, 'quantize{weights=["layer=uint3"]},gptq', context)
    assert result.certificate[1].stats["layers"] == 1
    (node,) = weights_of(result.program)
    encoding = read_encoding(result.program, node)
    steps = Steps.of(encoding, torch.zeros(1, 16, 16))
    assert torch.equal(steps.low.flatten(), -encoding.zero_point.float()) and bool((steps.high - steps.low == 7).all())
    before, after = result.certificate[1].stats["errors"]["layer"]
    assert after < before


def test_options_and_stage_are_checked():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize", context).program
    for text in ("gptq{rows=0}", "gptq{samples=0}", "gptq{damping=0.0}", "adaround{iterations=0}", "adaquant{rate=0.0}"):
        with pytest.raises(OptionError, match=r"at least 1|above 0"):
            run(annotated, text, context)
    with pytest.raises(PassError, match="takes a program in stage annotated"):
        run(program, "gpfq", context)
    with pytest.raises(PassError, match="needs calibration data"):
        run(annotated, "adaround", PassContext())
