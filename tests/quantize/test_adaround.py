"""AdaRound: one step at most, the best of all roundings on problems small enough to try them all."""

import itertools

import torch
from graphwright.passes.quantize.adaround import AdaRound, annealed, rectified_sigmoid, start
from graphwright.passes.quantize.encoding import is_fake_quantize, read_codes, read_encoding
from graphwright.passes.quantize.rounding import Rows, Steps
from quantize_models import ConvNet, prepared, run


def test_codes_are_the_floor_or_one_more():
    program, context = prepared(ConvNet, (1, 3, 9, 9))
    annotated = run(program, "quantize{weight_bits=4}", context).program
    after = run(annotated, "adaround{iterations=100}", context).program
    moved = 0
    for node in [n for n in after.nodes if is_fake_quantize(n) and after.parameter(n.args[0]) is not None]:
        encoding, weight = read_encoding(after, node), after.parameter(node.args[0])
        floor = torch.floor(weight / encoding.scale.reshape(-1, *[1] * (weight.dim() - 1)))
        codes = read_codes(after, node)
        step = codes - floor.clamp(encoding.qmin, encoding.qmax)
        assert set(step.unique().tolist()) <= {0.0, 1.0}
        assert int((codes.int() - encoding.quantize(weight).int()).abs().max()) <= 1
        moved += int((codes != encoding.quantize(weight)).sum())
    assert moved > 0


def test_v_starts_at_the_float_weight():
    weight = torch.tensor([[[0.31, -0.49, 1.0, -0.02]]])
    steps = Steps(torch.full((1, 1, 1), 0.1), torch.full((1, 1, 1), -7.0), torch.full((1, 1, 1), 7.0))
    floor, v = start(weight, steps)
    assert torch.allclose((floor + rectified_sigmoid(v)) * 0.1, weight, atol=1e-6)
    assert annealed(0.1) is None and annealed(0.2) == 20.0 and annealed(1.0) == 2.0


def test_finds_a_rounding_near_the_best_of_all():
    gaps = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(1, 200, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
        weight = torch.randn(1, 1, 8, generator=generator)
        steps = Steps(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), -7.0), torch.full((1, 1, 1), 7.0))
        rows = Rows(inputs, inputs, inputs @ weight.transpose(1, 2), weight, torch.zeros(1, 1, 1), 150, steps.nearest(weight))
        chosen = AdaRound(iterations=600).choose(rows, steps, None, generator).steps
        floor = torch.floor(weight / 0.5)
        all_ways = [floor + torch.tensor(w, dtype=torch.float32) for w in itertools.product((0, 1), repeat=8)]
        ordered = sorted(rows.error(w * 0.5) for w in all_ways)
        error = rows.error(chosen * 0.5)
        assert error <= rows.error(steps.nearest(weight) * 0.5) + 1e-9
        gaps.append(error <= ordered[12])
    assert sum(gaps) >= 3, "among the best 13 of 256 roundings"
