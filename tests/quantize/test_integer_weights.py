"""lower-integer: weights of fewer than 8 bits become packed parameters, asymmetric ones s8 values."""

from __future__ import annotations

import pytest
import torch
from graphwright.ir.dialect import gw
from graphwright.ir.errors import PassError
from graphwright.passes.manager import parameter_bytes
from graphwright.passes.quantize.encoding import Encoding, is_fake_quantize, read_encoding
from quantize_models import BLOCK, Block, ConvNet, prepare, prepared, run, seeded, targets
from torch import nn

MODELS = [(ConvNet, (1, 3, 9, 9)), (Block, BLOCK)]


def asymmetric(program, bits: int):
    """The annotated program with every weight's encoding asymmetric, one zero point a channel."""
    for node in [n for n in program.nodes if is_fake_quantize(n) and program.parameter(n.args[0]) is not None]:
        weight = program.parameter(node.args[0]).detach()
        rows = weight.reshape(weight.shape[0], -1)
        low, high = rows.amin(1).clamp_max(0), rows.amax(1).clamp_min(0)
        scale = ((high - low) / ((1 << bits) - 1)).clamp_min(1e-9)
        zero = torch.round(-low / scale).to(torch.int32)
        node.update_arg(1, program.add_parameter("asymmetric_scale", scale, node))
        node.update_arg(2, program.add_parameter("asymmetric_zero", zero, node))
        node.update_arg(3, 0)
        node.update_arg(4, (1 << bits) - 1)
    program.sweep()
    return program


@pytest.mark.parametrize(("model", "shape"), MODELS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_the_program_shrinks_and_means_the_same(model, shape, bits):
    program, context = prepared(model, shape)
    annotated = run(program, f"quantize{{weight_bits={bits}}}", context).program
    lowered = run(annotated, "lower-integer", context)
    layers = [n for n in annotated.nodes if is_fake_quantize(n) and annotated.parameter(n.args[0]) is not None]
    unpacks = [n for n in lowered.program.nodes if n.target is gw.unpack.default]
    assert len(unpacks) == len(layers) and all(n.args[1] == bits for n in unpacks)
    for fake, unpack in zip(layers, unpacks, strict=True):
        encoding = read_encoding(annotated, fake)
        values = gw.unpack(lowered.program.parameter(unpack.args[0]), *unpack.args[1:])
        assert torch.equal(encoding.dequantize(values), fake.target(annotated.parameter(fake.args[0]), encoding.scale,
                                                                    encoding.zero_point, *fake.args[3:]))  # fmt: skip
    assert lowered.certificate[-1].sqnr_db > 20
    whole = run(run(program, "quantize", context).program, "lower-integer", context).program
    codes = sum(t.numel() for t in whole.parameters().values() if t.dtype is torch.int8)
    rows = sum(n.args[2][0] for n in unpacks)
    saved = parameter_bytes(whole) - parameter_bytes(lowered.program)
    assert codes * (8 - bits) / 8 - rows <= saved <= codes * (8 - bits) / 8


@pytest.mark.parametrize("rescale", ["float-scale", "dyadic"])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_asymmetric_weights(bits, rescale):
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = asymmetric(run(program, f"quantize{{weight_bits={bits}}}", context).program, bits)
    lowered = run(annotated, f"lower-integer{{rescale={rescale}}}", context)
    unpacks = [n for n in lowered.program.nodes if n.target is gw.unpack.default]
    zeros = [lowered.program.parameter(n.args[3]) for n in unpacks]
    assert len(unpacks) == 5 and all(z.shape == (n.args[2][0],) for z, n in zip(zeros, unpacks, strict=True))
    assert any(len(set(z.tolist())) > 1 for z in zeros)
    assert lowered.certificate[-1].sqnr_db > 20


def test_asymmetric_weights_of_eight_bits_may_not_fit():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = asymmetric(run(program, "quantize", context).program, 8)
    with pytest.raises(PassError, match=r"weight of 'stem' lies in .* at most 7 bits"):
        run(annotated, "lower-integer", context)


def test_layers_that_share_a_weight_share_what_is_packed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    program, context = prepare(seeded(Net), (2, 6))
    lowered = run(program, "quantize{weight_bits=4},lower-integer", context).program
    assert targets(lowered).count("gw.unpack") == 1 and targets(lowered).count("gw.linear") == 2


def test_bits_of_an_encoding():
    def bits(low: int, high: int) -> int:
        dtype = torch.int8 if low < 0 else torch.uint8
        return Encoding(torch.ones(1), torch.zeros(1, dtype=torch.int32), low, high, dtype).bits

    assert [bits(*r) for r in ((-1, 1), (-3, 3), (-7, 7), (-8, 7), (0, 15), (-127, 127), (0, 255))] == [2, 3, 4, 4, 4, 8, 8]
