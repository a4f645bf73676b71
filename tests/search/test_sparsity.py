"""Allocation of zeros by measured distortion."""

import itertools

import numpy as np
import pytest
import torch
from graphwright.ir.errors import OptionError, PassError
from graphwright.ir.program import origin_of
from graphwright.passes.sparsify.base import sparse_layers
from graphwright.search.solvers import solve
from graphwright.search.sparsity import Distortion, allocate, measure
from quantize_models import BLOCK, Block, ConvNet, prepared, run


def test_distortion_is_that_of_the_pruned_program():
    program, context = prepared(ConvNet, (1, 3, 16, 16))
    samples = context.calibration.samples[:4]
    found = measure(program, samples, (0.0, 0.6))
    assert found.loss[:, 0].max() == 0
    for layer, loss in zip(found.layers, found.loss, strict=True):
        pruned = run(program, f'sparsify-magnitude{{sparsity=0,layers=["{layer}=0.6"]}}', context).program
        expected = [(pruned(*s)[0] - program(*s)[0]).square().sum() / program(*s)[0].square().sum() for s in samples]
        assert loss[1] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)


def test_the_plan_is_the_best_of_all():
    rng = np.random.default_rng(0)
    levels = (0.0, 0.5, 0.9)
    found = Distortion(("a", "b", "c"), (100, 400, 50), levels, np.sort(rng.random((3, 3)), 1) * [0, 1, 1])
    solution = solve(found.problem(0.6), "dynamic")
    plans = [
        (sum(found.loss[i, c] for i, c in enumerate(plan)), plan)
        for plan in itertools.product(range(3), repeat=3)
        if sum(levels[c] * n for c, n in zip(plan, found.weights, strict=True)) >= 0.6 * 550
    ]
    assert solution.chosen == min(plans)[1]
    assert found.rules(solution) == tuple(f"{n}={levels[c]:g}" for n, c in zip("abc", solution.chosen, strict=True))


def test_rules_replay_in_every_pass_and_reach_the_sparsity():
    program, context = prepared(Block, BLOCK)
    rules = allocate(program, context.calibration, 0.7)
    for name in ("sparsify-magnitude", "sparsify-wanda"):
        text = ",".join(f'"{rule}"' for rule in rules)
        layers = sparse_layers(run(program, f"{name}{{layers=[{text}]}}", context).program)
        total = sum(layer.weight.numel() for layer in layers)
        assert 0.69 <= sum(int((layer.weight == 0).sum()) for layer in layers) / total < 0.75
        assert {origin_of(layer.node) for layer in layers} == {rule.rpartition("=")[0] for rule in rules}


def test_bad_input_is_refused():
    program, context = prepared(Block, BLOCK)
    with pytest.raises(OptionError, match="the most that a layer may have"):
        allocate(program, context.calibration, 0.99)
    with pytest.raises(OptionError, match=r"\[0, 1\)"):
        measure(program, context.calibration.samples, (0.5, 1.5))
    empty, given = prepared(torch.nn.ReLU, (2, 4))
    with pytest.raises(PassError, match="no layers"):
        allocate(empty, given.calibration, 0.5)
