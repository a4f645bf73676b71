import torch
from graphwright.passes.quantize import operators as ops
from graphwright.passes.quantize.statistics import collect
from quantize_models import ConvNet, prepared


def test_histograms_see_the_float_values_of_every_sample():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    layers = [n for n in program.nodes if n.target is ops.CONVOLUTION]
    histograms = collect(program, layers, context.calibration, lambda *a: None)
    stem = layers[0]
    weight, bias = program.parameter(stem.args[1]), program.parameter(stem.args[2])
    values = torch.cat([torch.nn.functional.conv2d(x, weight, bias, 2, 1) for (x,) in context.calibration])
    assert set(histograms) == set(layers)
    assert histograms[stem].total == values.numel()
    assert histograms[stem].min == float(values.min()) and histograms[stem].max == float(values.max())
