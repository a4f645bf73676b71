import math

import pytest
import torch
from graphwright.ir.data import Calibration
from graphwright.ir.dialect import gw
from graphwright.ir.errors import CalibrationError, OptionError, PassError, UnknownNameError
from graphwright.ir.program import Stage, origin_of
from graphwright.passes.base import PassContext
from graphwright.passes.quantize.annotate import sqnr_db
from graphwright.passes.quantize.encoding import is_fake_quantize, read_encoding, symmetric
from quantize_models import BLOCK, Block, ConvNet, Mixed, prepare, prepared, run, seeded, targets
from torch import nn

MODELS = [(ConvNet, (2, 3, 13, 11)), (Mixed, (2, 3, 8, 8)), (Block, BLOCK)]


@pytest.mark.parametrize(
    ("model", "shape", "observer"),
    [(*m, "mse") for m in MODELS] + [(*MODELS[0], o) for o in ("min-max", "percentile", "kl")],
)
def test_eight_bits_stay_close_to_float(model, shape, observer):
    program, context = prepared(model, shape)
    result = run(program, f"quantize{{activation_observer={observer}}}", context)
    row = result.certificate[0]
    assert result.program.stage is Stage.ANNOTATED and row.sqnr_db is not None and row.sqnr_db > 20


def test_fewer_bits_lose_more():
    program, context = prepared(ConvNet, (2, 3, 13, 11))
    loss = [run(program, f"quantize{{weight_bits={w},activation_bits={a}}}", context).certificate[0].sqnr_db
            for w, a in ((8, 8), (4, 8), (4, 4))]  # fmt: skip
    assert loss[0] > loss[1] > loss[2]


def test_weights_are_per_channel_and_activations_per_tensor():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize", context).program
    for node in annotated.nodes:
        if is_fake_quantize(node):
            encoding = read_encoding(annotated, node)
            weight = annotated.parameter(node.args[0])
            if weight is None:
                assert encoding.per_tensor and encoding.dtype == torch.uint8
            else:
                assert encoding.axis == 0 and encoding.scale.numel() == weight.shape[0] and not bool(encoding.zero_point.any())
                assert torch.equal(
                    encoding.quantize(weight).flatten(1).abs().amax(1), torch.full((len(weight),), 127).to(torch.int8)
                )


def test_softmax_has_the_scale_of_probabilities():
    program, context = prepared(Block, BLOCK)
    annotated = run(program, "quantize", context).program
    node = next(n for n in annotated.nodes if is_fake_quantize(n) and "softmax" in str(n.args[0].target))
    encoding = read_encoding(annotated, node)
    assert encoding.step == pytest.approx(1 / 255) and encoding.zero == 0


def test_skip_leaves_layers_float_and_takes_globs():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, 'quantize{skip=[head,"dep*"]}', context).program
    fake = {origin_of(n) for n in annotated.nodes if is_fake_quantize(n)}
    assert not {n for n in fake if n.startswith(("head", "depthwise"))} and any(n.startswith("project") for n in fake)
    layer = next(n for n in annotated.nodes if origin_of(n) == "head")
    assert annotated.parameter(layer.args[1]) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('quantize{skip=["layer9*"]}', "name in 'skip' of quantize: 'layer9\\*'"),
        ("quantize{weight_bits=9}", "weight_bits"),
        ("quantize{activation_bits=1}", "activation_bits"),
        ("quantize{activation_observer=percentile,percentile=20}", "percentile"),
        ("quantize{activation_observer=mee}", "min-max | percentile | mse | kl"),
    ],
)
def test_bad_options_are_named(text, message):
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    with pytest.raises((OptionError, UnknownNameError), match=message):
        run(program, text, context)


def test_needs_calibration_and_something_to_quantize():
    program, _ = prepared(ConvNet, (1, 3, 9, 9))
    with pytest.raises(PassError, match="needs calibration data"):
        run(program, "quantize", PassContext())
    program, context = prepare(nn.ReLU(), (1, 4))
    with pytest.raises(PassError, match="no convolution, linear or matmul"):
        run(program, "quantize", context)


def test_weights_that_overflow_on_calibration_name_the_node():
    model = seeded(ConvNet)
    model.stem.weight.data *= 1e38
    program, _ = prepare(model, (1, 3, 9, 9))
    context = PassContext(Calibration.for_program(program, [torch.randn(1, 3, 9, 9)]))
    with pytest.raises(CalibrationError, match="calibration samples; check"):
        run(program, "quantize", context)


def test_progress_counts_samples():
    program, context = prepare(seeded(ConvNet), (1, 3, 9, 9), samples=3)
    calls: list[tuple[int, int]] = []
    context.progress = lambda done, total, what: calls.append((done, total))
    run(program, "quantize", context)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_dead_channel_keeps_its_bias():
    model = seeded(ConvNet)
    model.project.weight.data[2] = 0
    model.project.bias.data[2] = 0.75
    program, context = prepare(model, (1, 3, 9, 9))
    result = run(program, "quantize,lower-integer", context)
    assert result.certificate[-1].sqnr_db > 40


def test_stats_hold_the_quality_of_every_weight():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    stats = run(program, "quantize", context).certificate[0].stats
    assert set(stats["weight_sqnr_db"]) == {"stem", "expand", "depthwise", "project", "head"}
    assert all(v > 35 for v in stats["weight_sqnr_db"].values()) and stats["layers"] == 5


def test_shared_weights_get_one_encoding():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.a(torch.relu(self.a(x)))

    program, context = prepared(Net, (1, 4, 3, 3))
    annotated = run(program, "quantize", context).program
    on_weights = [n for n in annotated.nodes if is_fake_quantize(n) and annotated.parameter(n.args[0]) is not None]
    assert len(on_weights) == 1 and len(on_weights[0].users) == 2
    assert targets(annotated).count("gw.fake_quantize") == 3


def test_sqnr_of_known_noise():
    x = torch.tensor([1.0, -1.0, 0.5])
    encoding = symmetric(torch.tensor(1.0), bits=2)  # grid -1, 0, 1: 0.5 rounds to 0
    assert sqnr_db(x, encoding) == pytest.approx(10 * math.log10(2.25 / 0.25))
    assert gw.fake_quantize(x, encoding.scale, encoding.zero_point, -1, 1).tolist() == [1.0, -1.0, 0.0]
