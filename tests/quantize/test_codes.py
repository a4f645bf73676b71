"""Codes that a pass chose: what fake quantization, lowering, export and alignment make of them."""

import onnxruntime as ort
import pytest
import torch
from graphwright.ir.dialect import gw
from graphwright.ir.errors import PassError
from graphwright.ir.onnx_export import export_onnx
from graphwright.passes.quantize.encoding import is_fake_quantize, read_codes, read_encoding, write_codes
from quantize_models import ConvNet, prepared, run, weights_of


def moved(program):
    """The program with every code of every weight one step away from the nearest, where there is room."""
    program = program.clone()
    for node in weights_of(program):
        encoding, codes = read_encoding(program, node), read_codes(program, node)
        signs = torch.where(torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -1, 1)
        assert write_codes(program, node, (codes + signs).clamp(encoding.qmin, encoding.qmax))
    program.sweep()
    return program


def test_the_value_is_that_of_the_codes_and_the_gradient_goes_straight_through():
    x = torch.tensor([[-0.4, 0.26, 9.0]], requires_grad=True)
    codes = torch.tensor([[3, 4, 7]], dtype=torch.uint8)
    y = gw.fake_quantize(x, torch.tensor([0.1]), torch.tensor([2], dtype=torch.int32), 0, 7, None, codes)
    assert torch.equal(y, (codes.float() - 2) * torch.tensor(0.1))
    y.backward(torch.tensor([[1.0, 2.0, 3.0]]))
    assert x.grad is not None and x.grad.tolist() == [[0.0, 2.0, 0.0]], "-0.4 and 9 saturate"


def test_nearest_where_none_are_given():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize{weight_bits=4}", context).program
    for node in weights_of(annotated):
        nearest = read_encoding(annotated, node).quantize(annotated.parameter(node.args[0]))
        assert torch.equal(read_codes(annotated, node), nearest)
        assert not write_codes(annotated, node, nearest) and len(node.args) == 6


@pytest.mark.parametrize("bits", [8, 4])
def test_lowering_and_export_use_them(bits):
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = moved(run(program, f"quantize{{weight_bits={bits}}},align-scales", context).program)
    lowered = run(annotated, "lower-integer", context).program
    sample = context.calibration.samples[0]
    step = 1e-5 * float(annotated(*sample)[0].abs().max())
    assert float((lowered(*sample)[0] - annotated(*sample)[0]).abs().max()) <= step
    model = export_onnx(annotated)
    session = ort.InferenceSession(model.SerializeToString())
    result = session.run(None, {session.get_inputs()[0].name: sample[0].numpy()})[0]
    assert float((torch.from_numpy(result) - annotated(*sample)[0]).abs().max()) <= step
    stored = [i for i in model.graph.initializer if i.name.endswith("_quantized")]
    assert len(stored) == len(weights_of(annotated)), "integers, not floats, are in the file"


def test_aligning_scales_keeps_them():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = moved(run(program, "quantize{weight_bits=4}", context).program)
    aligned = run(annotated, "align-scales", context).program
    for before, after in zip(weights_of(annotated), weights_of(aligned), strict=True):
        assert torch.equal(read_codes(annotated, before), read_codes(aligned, after))
        assert torch.equal(annotated.parameter(before.args[0]), aligned.parameter(after.args[0]))


def test_codes_outside_the_grid_and_codes_of_activations_are_refused():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize{weight_bits=4}", context).program
    node = weights_of(annotated)[0]
    with pytest.raises(PassError, match=r"lie in \[-7, 7\]"):
        write_codes(annotated, node, read_codes(annotated, node) + 15)
    activation = next(n for n in annotated.nodes if is_fake_quantize(n) and n not in weights_of(annotated))
    with pytest.raises(PassError, match="holds an activation"):
        read_codes(annotated, activation)
