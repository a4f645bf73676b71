"""Layers and their encodings are those that the quantize pass writes."""

import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.errors import OptionError, PassError, UnknownNameError
from graphwright.ir.program import Stage, origin_of
from graphwright.passes.quantize.annotate import Quantize
from graphwright.passes.quantize.codebooks import is_fake_codebook, read_codebook
from graphwright.passes.quantize.encoding import is_fake_quantize, read_encoding
from graphwright.search.sensitivity.layers import weight_layers
from quantize_models import ConvNet, Mixed, prepared, run, seeded
from torch import nn


def _is_fake(node):
    return is_fake_quantize(node) or is_fake_codebook(node)


@pytest.mark.parametrize("model", [ConvNet, Mixed])
@pytest.mark.parametrize("observer", ["min-max", "mse"])
def test_they_agree_with_the_pass(model, observer):
    program, context = prepared(model, (1, 3, 16, 16))
    layers = weight_layers(program, Quantize(weight_observer=observer), ("int8", "uint3", "int4g9", "fp4e2m1"))
    for choice in ("int8", "uint3", "int4g9", "fp4e2m1"):
        rules = ",".join(f'"{layer.origin}={choice}"' for layer in layers)
        annotated = run(program, f"quantize{{weight_observer={observer},weights=[{rules}]}}", context).program
        fakes = [n for n in annotated.nodes if _is_fake(n) and annotated.parameter(n.args[0]) is not None]
        written = {origin_of(next(iter(n.users))): n for n in fakes}
        assert list(written) == [layer.origin for layer in layers]
        for layer in layers:
            node = written[layer.origin]
            fake = read_encoding(annotated, node) if is_fake_quantize(node) else read_codebook(annotated, node)
            assert torch.equal(fake.scale, layer.encodings[choice].scale)
            value = annotated.parameter(written[layer.origin].args[0])
            assert torch.equal(fake.dequantize(fake.quantize(value)), layer.rounded(choice))


def test_skipped_layers_are_left_out():
    program, _ = prepared(ConvNet, (1, 3, 16, 16))
    names = [layer.origin for layer in weight_layers(program, Quantize(skip=("head", "depthwise")), ("int8",))]
    assert names == ["stem", "expand", "project"]
    with pytest.raises(UnknownNameError, match="missing"):
        weight_layers(program, Quantize(skip=("missing",)), ("int8",))


def test_a_shared_weight_is_one_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    program = capture(seeded(Tied), torch.randn(1, 4))
    program.stage = Stage.CANONICAL
    assert [layer.origin for layer in weight_layers(program, Quantize(), ("int8",))] == ["a"]


def test_nothing_to_allocate_and_layers_that_no_plan_can_tell_apart_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(torch.relu(nn.functional.linear(x, self.a)), self.b)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def forward(self, x):
            return self.inner(x)

    program = capture(Outer(), torch.randn(1, 4))
    with pytest.raises(PassError, match="several layers of origin 'inner'"):
        weight_layers(program, Quantize(), ("int8",))
    with pytest.raises(PassError, match="nothing to allocate"):
        weight_layers(capture(nn.ReLU(), torch.randn(1, 4)), Quantize(), ("int8",))
    with pytest.raises(OptionError, match="no weight format"):
        weight_layers(program, Quantize(), ("float3",))
