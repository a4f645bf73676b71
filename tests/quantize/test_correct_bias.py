import pytest
import torch
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import origin_of
from graphwright.passes.quantize import correct_bias
from graphwright.passes.quantize.annotate import source_of_codes
from graphwright.passes.quantize.correct_bias import Correction
from graphwright.passes.quantize.encoding import is_fake_quantize, read_encoding
from graphwright.passes.quantize.operators import CONVOLUTION, LINEAR
from graphwright.passes.quantize.side_by_side import is_quantized_layer
from quantize_models import BLOCK, Block, ConvNet, prepare, prepared, run, seeded
from torch import nn

COARSE = "quantize{weight_bits=4}"


def mean_outputs(program, samples):
    return torch.cat([program(*s)[0].flatten(0, -2) for s in samples]).mean(0)


def half_step(program, nodes):
    """Half a step of the accumulator of the last quantized layer in `nodes`, by channel."""
    layer = [n for n in nodes if is_quantized_layer(n)][-1]
    source, factor = source_of_codes(program, layer.args[0])
    return read_encoding(program, source).step * factor * read_encoding(program, layer.args[1]).scale / 2


@pytest.mark.parametrize(("model", "shape"), [(ConvNet, (2, 3, 9, 9)), (Block, BLOCK)])
def test_the_mean_output_returns_to_its_float_value(model, shape):
    program, context = prepared(model, shape)
    before = run(program, COARSE, context).program
    after = run(before, "correct-bias", context).program
    expected = mean_outputs(program, context.calibration)
    assert (mean_outputs(before, context.calibration) - expected).abs().max() > 1e-3, "4 bits shift the mean"
    gap = (mean_outputs(after, context.calibration) - expected).abs()
    assert bool((gap <= half_step(after, list(after.nodes)) + 1e-4).all()), "the bias is rounded to its accumulator's grid"


def test_layers_without_a_bias_get_one():
    program, context = prepare(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False)), (1, 3, 6, 6)
    )
    result = run(program, f"{COARSE},correct-bias,lower-integer", context)
    assert result.certificate[1].stats["layers"] == 2 and result.certificate[1].modified
    assert sum(t.dtype == torch.int32 and t.dim() == 1 for t in result.program.parameters().values()) == 2


def test_float_values_are_those_with_fake_quantization_bypassed():
    program, context = prepare(seeded(ConvNet), (1, 3, 9, 9), samples=2)
    annotated = run(program, COARSE, context).program
    bypassed = annotated.clone()
    for node in list(bypassed.nodes):
        if is_fake_quantize(node):
            node.replace_all_uses_with(node.args[0])
    bypassed.sweep()
    sample = context.calibration.samples[0]
    assert torch.equal(bypassed(*sample)[0], program(*sample)[0])


def layer_means(program, context) -> dict[str, torch.Tensor]:
    """Mean output of every convolution and linear layer over the calibration samples, per channel."""
    sums: dict[str, list[torch.Tensor]] = {}

    class Spy(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n.target in (CONVOLUTION, LINEAR):
                axis = 1 if n.target is CONVOLUTION else -1
                sums.setdefault(origin_of(n), []).append(value.movedim(axis, -1).flatten(0, -2))
            return value

    for sample in context.calibration:
        Spy(program.graph_module).run(*sample)
    return {name: torch.cat(rows).mean(0) for name, rows in sums.items()}


def test_every_layer_is_corrected_on_inputs_that_are_corrected_already():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    corrected = run(program, f"{COARSE},correct-bias", context).program
    expected, actual = layer_means(program, context), layer_means(corrected, context)
    assert set(expected) == set(actual) == {"stem", "expand", "depthwise", "project", "head"}
    for name, mean in expected.items():
        (layer,) = [n for n in corrected.nodes if is_quantized_layer(n) and origin_of(n) == name]
        assert bool(((actual[name] - mean).abs() <= half_step(corrected, [layer]) + 1e-4).all()), name


def test_samples_option_bounds_the_work():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    one = run(program, f"{COARSE},correct-bias{{samples=1}}", context).program
    all_samples = run(program, f"{COARSE},correct-bias", context).program
    assert not torch.equal(one(*context.calibration.samples[0])[0], all_samples(*context.calibration.samples[0])[0])
    with pytest.raises(OptionError, match="at least 1"):
        run(program, f"{COARSE},correct-bias{{samples=0}}", context)


def test_takes_annotated_programs_only():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    with pytest.raises(PassError, match="takes a program in stage annotated"):
        run(program, "correct-bias", context)


def test_corrections_that_move_the_outputs_away_are_dropped(monkeypatch):
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, COARSE, context).program

    def harmful(program, *rest):
        return [Correction(n, torch.ones(n.meta["val"].shape[1]), 1.0) for n in program.nodes if is_quantized_layer(n)]

    monkeypatch.setattr(correct_bias, "measure", harmful)
    result = run(annotated, "correct-bias", context)
    row = result.certificate[0]
    assert not row.modified and row.stats["layers"] == 0 and row.stats["error_after"] > row.stats["error_before"]
    sample = context.calibration.samples[0]
    assert torch.equal(result.program(*sample)[0], annotated(*sample)[0])
