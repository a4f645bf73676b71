"""entropy: bits of what a layer hands on."""

import numpy as np
import pytest
import torch
from graphwright.search.sensitivity.entropy import Entropy, bits
from graphwright.search.sensitivity.sqnr import Sqnr
from sensitivity_cases import TinyConv, task_of


def test_entropy_of_known_distributions():
    assert bits(torch.full((100,), 3.0)) == 0.0
    assert bits(torch.tensor([0.0, 1.0]).repeat(50)) == pytest.approx(1.0)
    assert bits(torch.arange(256.0).repeat(3)) == pytest.approx(8.0)
    skewed = torch.cat([torch.zeros(3), torch.ones(1)])
    assert bits(skewed) == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)


def test_the_score_is_the_entropy_behind_the_relu_times_the_noise():
    task = task_of(TinyConv, 1)
    (x,) = task.samples.samples[0]
    stem = task.layers[0]
    bias = task.program.parameter(stem.node.args[2])
    activation = torch.relu(torch.nn.functional.conv2d(x, stem.weight, bias, 2, 1))
    scores = Entropy().score(task)
    expected = bits(activation) * Sqnr().score(task).loss[0]
    assert scores.loss[0] == pytest.approx(expected, rel=1e-6)


def test_it_has_an_interval_over_samples():
    scores = Entropy().score(task_of(TinyConv, 32))
    assert (scores.half_width > 0).all() and scores.uncertain() == [] and scores.count == 32
