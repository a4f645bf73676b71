"""Factorizations on data: each is best in what it measures, and they lose less than the plain one on correlated inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factorize_models import Convolutions, layers_of, one_layer
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError, PassError
from graphwright.passes.base import PassContext
from graphwright.passes.factorize.afm import predicting
from graphwright.passes.factorize.fwsvd import fisher
from graphwright.passes.factorize.matrix import Matrix
from graphwright.passes.factorize.whitened_svd import FactorizeWhitenedSvd
from graphwright.passes.layerwise import LayerRows
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_models import Block, correlated, prepare, prepared, run, seeded
from torch import nn

METHODS = ["factorize-fwsvd", "factorize-whitened-svd", "factorize-lord", "factorize-afm"]
SHAPE = (2, 5, 32)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def output_error(program, changed, samples) -> float:
    pairs = [(program(*x)[0], changed(*x)[0]) for x in samples]
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs))


@settings(max_examples=4)
@given(st.integers(2, 14), st.integers(2, 14), st.booleans(), st.integers(0, 99), st.data())
def test_whitening_loses_least_of_all_methods_without_a_mean_on_its_calibration_data(inputs, outputs, convolution, seed, data):
    module = nn.Conv2d(inputs, outputs, (2, 1)) if convolution else nn.Linear(inputs, outputs)
    shape = (2, inputs, 5, 6) if convolution else (2, 15, inputs)
    program, layer = one_layer(module, shape, seed)
    context = PassContext(Calibration.for_program(program, correlated(shape, 6, seed)))
    (whitened,) = FactorizeWhitenedSvd(rows=10**6).decompositions(program, [layer], context, {})
    rank = (data.draw(st.integers(1, whitened.full[0])),)
    errors = {}
    for name, found in (("plain", Matrix(layer)), ("whitened", whitened)):
        weight = found.dense(rank)[0].reshape(layer.weight.shape).float()
        changed = program.clone()
        changed.replace_parameter(layers_of(changed)[0].node.args[1], weight)
        changed.sweep()
        errors[name] = output_error(program, changed, context.calibration.samples)
    assert errors["whitened"] <= errors["plain"] * (1 + 1e-3) + 1e-8
    if rank == whitened.full:
        assert errors["whitened"] < 1e-8


@pytest.mark.parametrize("method", METHODS[1:])
def test_better_than_plain_on_correlated_inputs(method):
    program, _ = prepared(Block, SHAPE)
    samples = correlated(SHAPE, 40, 3)
    context = PassContext(Calibration.for_program(program, samples[:32]))
    held_out = [(x,) for x in samples[32:]]

    def error(text):
        return output_error(program, run(program, text, context).program, held_out)

    assert error(f"{method}{{ratio=0.5,multiple=4}}") < error("factorize-svd{ratio=0.5,multiple=4}")


def test_fwsvd_keeps_the_inputs_that_matter():
    program, _ = prepare(seeded(Chain), (8, 32), samples=1)
    scale = torch.ones(32).index_fill(0, torch.arange(8), 8.0)
    samples = [torch.randn(8, 32, generator=torch.Generator().manual_seed(i)) * scale for i in range(40)]
    context = PassContext(Calibration.for_program(program, samples[:32]))
    errors = {
        method: output_error(
            program, run(program, f'{method}{{ranks=["first=8"]}}', context).program, [(x,) for x in samples[32:]]
        )
        for method in ("factorize-svd", "factorize-fwsvd")
    }
    assert errors["factorize-fwsvd"] < 0.5 * errors["factorize-svd"]


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_and_replay(method):
    program, context = prepared(Convolutions, (2, 3, 16, 16))
    first = run(program, f"{method}{{ratio=0.6,multiple=2}}", context)
    stats = first.certificate[-1].stats
    assert stats["layers"] == 5 and "16 groups" in stats["whole"]["depthwise"]
    rules = ",".join(f'"{origin}={rank}"' for origin, rank in stats["ranks"].items())
    again = run(program, f"{method}{{ranks=[{rules}]}}", context).program
    assert all(torch.equal(a, b) for a, b in zip(first.program.parameters().values(), again.parameters().values(), strict=True))


def test_a_shared_mean_needs_no_rank():
    """Outputs that vary along one direction around a mean of another: rank 1 and a bias give them back."""
    program, _ = prepare(nn.Linear(6, 6, bias=False), (8, 6), samples=1)
    generator = torch.Generator().manual_seed(0)
    mean, direction = torch.randn(2, 6, generator=generator)
    samples = [mean + direction * torch.randn(8, 1, generator=generator) for _ in range(8)]
    context = PassContext(Calibration.for_program(program, samples))
    held_out = [(mean + direction * torch.randn(8, 1, generator=generator),)]

    def error(method):
        return output_error(program, run(program, f'{method}{{ranks=["*=1"]}}', context).program, held_out)

    assert error("factorize-lord") < 1e-6 and error("factorize-afm") < 1e-6
    assert error("factorize-whitened-svd") > 1e-3


def test_afm_makes_up_for_the_layers_before():
    program, _ = prepare(seeded(Chain), (8, 32), samples=1)
    samples = correlated((8, 32), 160, 5)
    context = PassContext(Calibration.for_program(program, samples[:128]))
    held_out = [(x,) for x in samples[128:]]
    ranks = '{ranks=["first=2","second=8"]}'
    errors = {m: output_error(program, run(program, m + ranks, context).program, held_out) for m in METHODS[2:]}
    assert errors["factorize-afm"] < errors["factorize-lord"]


def test_fisher_information_of_a_linear_regression_is_the_second_moment_of_its_inputs():
    program, layer = one_layer(nn.Linear(5, 1), (1, 5))
    samples = [(x,) for x in correlated((1, 5), 3000, 2)]
    (found,) = fisher(program, [layer], samples, torch.Generator().manual_seed(0), lambda *_: None)
    expected = torch.cat([x for (x,) in samples]).double().square().mean(0)
    assert torch.allclose(found[0], expected, rtol=0.2)


def test_fisher_information_of_a_classifier_is_that_of_its_own_classes():
    program, layer = one_layer(nn.Linear(4, 3), (1, 4))
    samples = [(x,) for x in correlated((1, 4), 3000, 2)]
    (found,) = fisher(program, [layer], samples, torch.Generator().manual_seed(0), lambda *_: None)
    x = torch.cat([x for (x,) in samples]).double()
    p = torch.cat([program(*sample)[0] for sample in samples]).double().softmax(-1)
    expected = (p * (1 - p)).T @ x.square() / len(x)
    assert torch.allclose(found, expected, rtol=0.3, atol=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_bad_options(method):
    program, context = prepared(Block, SHAPE)
    with pytest.raises(PassError, match="needs calibration"):
        run(program, f"{method}{{ratio=0.5}}", PassContext())
    with pytest.raises(OptionError, match="'samples'"):
        run(program, f"{method}{{ratio=0.5,samples=0}}", context)
    with pytest.raises(OptionError, match="'fc1' is larger than its full rank 32"):
        run(program, f'{method}{{ranks=["fc1=40"]}}', context)


def test_damping_and_ridge_must_be_above_zero():
    program, context = prepared(Block, SHAPE)
    with pytest.raises(OptionError, match="'damping'"):
        run(program, "factorize-lord{ratio=0.5,damping=0.0}", context)
    with pytest.raises(OptionError, match="'ridge'"):
        run(program, "factorize-afm{ratio=0.5,ridge=0.0}", context)


@pytest.mark.parametrize("method", METHODS[:3])
def test_plans_of_one_model_share_what_was_seen(method):
    """A second plan under one context runs no sample again, and gives what a context of its own gives."""
    program, fresh = prepared(Block, SHAPE)
    steps = []
    context = PassContext(fresh.calibration, progress=lambda *step: steps.append(step))
    run(program, f"{method}{{ratio=0.5,multiple=4}}", context)
    assert steps
    steps.clear()
    again = run(program, f'{method}{{ranks=["fc1=6"]}}', context).program
    assert not steps
    alone = run(program, f'{method}{{ranks=["fc1=6"]}}', PassContext(fresh.calibration)).program
    x = fresh.calibration.samples[0]
    assert torch.allclose(again(*x)[0], alone(*x)[0], atol=1e-5)


@pytest.mark.parametrize(("count", "noise"), [(48, 1.0), (4000, 0.1)])
def test_afm_moves_a_weight_only_as_far_as_held_out_rows_agree(count, noise):
    """Few noisy rows: staying is better than their fit. Many: the true weight is found."""
    draw = {"generator": torch.Generator().manual_seed(0)}
    inputs, weight, change = torch.randn(count, 24, **draw), torch.randn(8, 24, **draw), 0.1 * torch.randn(8, 24, **draw)
    targets = inputs @ (weight + change).T + noise * torch.randn(count, 8, **draw)
    parts = (x[None] for x in (inputs, inputs, targets, weight, torch.zeros(1, 8)))
    rows = LayerRows(*parts, fitted=count * 3 // 4)
    found = predicting(weight.double(), rows, ridge=1e-6)
    fit = predicting(weight.double(), replace(rows, fitted=count), ridge=1e-6)
    stayed, moved, fitted = (float((w - weight - change).norm() / change.norm()) for w in (weight, found, fit))
    assert stayed == pytest.approx(1.0)
    if count == 48:
        assert fitted > 2.0 and moved < 0.75 * fitted
    else:
        assert fitted < 0.2 and moved < 0.2
