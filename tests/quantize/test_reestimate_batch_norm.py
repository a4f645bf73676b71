"""Batch-norm re-estimation: moments return to their float values, codes stay, and harm is taken back."""

import torch
from graphwright.ir.data import Calibration
from graphwright.passes.base import PassContext
from graphwright.passes.quantize import reestimate_batch_norm
from graphwright.passes.quantize.encoding import is_fake_quantize, read_codes
from graphwright.passes.quantize.side_by_side import SideBySide
from quantize_models import ConvNet, correlated, prepared, run, weights_of

SHAPE = (2, 3, 9, 9)


def coarse():
    program, _ = prepared(ConvNet, SHAPE)
    context = PassContext(Calibration.for_program(program, correlated(SHAPE, 24, seed=0)))
    return run(program, "quantize{weight_bits=2}", context).program, context


def moments(program, context):
    """(mean gap, ratio of deviations) of each layer's channels, against the float model."""
    both = SideBySide(program, context.calibration.samples, lambda *_: None, "test")
    for layer in both.layers():
        actual, exact = (torch.cat(v[layer]).movedim(1, -1).flatten(0, -2) for v in (both.values, both.exact))
        yield (actual.mean(0) - exact.mean(0)).abs().max(), (actual.std(0) / exact.std(0)).log().abs().max()


def test_outputs_come_nearer_and_codes_stay():
    annotated, context = coarse()
    result = run(annotated, "reestimate-batch-norm{rows=1000000}", context)
    assert result.certificate[0].stats["error_after"] < result.certificate[0].stats["error_before"]
    for old, new in zip(weights_of(annotated), weights_of(result.program), strict=True):
        assert torch.equal(read_codes(annotated, old), read_codes(result.program, new))
    lowered = run(result.program, "align-scales,lower-integer", context).program
    assert not any(is_fake_quantize(n) for n in lowered.nodes)


def test_the_first_layer_matches_exactly():
    annotated, context = coarse()
    gap, ratio = next(moments(annotated, context))
    after = run(annotated, "reestimate-batch-norm{rows=1000000}", context).program
    both = SideBySide(after, context.calibration.samples, lambda *_: None, "test")
    layer = next(both.layers())
    float_layer = SideBySide(annotated, context.calibration.samples, lambda *_: None, "test")
    exact = torch.cat(float_layer.exact[next(float_layer.layers())]).movedim(1, -1).flatten(0, -2)
    actual = torch.cat(both.values[layer]).movedim(1, -1).flatten(0, -2)
    # The bias is rounded to the accumulator's grid, which is coarse with weights of 2 bits.
    assert float((actual.mean(0) - exact.mean(0)).abs().max()) < float(gap)
    assert float((actual.std(0) / exact.std(0)).log().abs().max()) < 0.1 * float(ratio)


def test_harm_is_taken_back(monkeypatch):
    annotated, context = coarse()
    monkeypatch.setattr(reestimate_batch_norm, "output_errors", lambda *_: (0.1, 0.2))
    result = run(annotated, "reestimate-batch-norm", context)
    assert not result.certificate[0].modified and result.certificate[0].stats["layers"] == 0
    sample = context.calibration.samples[0]
    assert torch.equal(result.program(*sample)[0], annotated(*sample)[0])
