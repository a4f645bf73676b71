"""relevance: against the rules of layer-wise relevance propagation written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from graphwright.ir.errors import OptionError
from graphwright.search.sensitivity.relevance import Relevance, RelevanceNetwork
from graphwright.search.sensitivity.sqnr import Sqnr
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, task_of
from torch import nn


class Chain(nn.Module):
    """Three linear layers without bias."""

    shape = (5,)

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 7, bias), nn.Linear(7, 6, bias), nn.Linear(6, 4, bias)

    def forward(self, x):
        return self.c(F.gelu(self.b(torch.relu(self.a(x)))))


def propagated(task, index, epsilon):
    """Sum of |R| / |y| of every layer's outputs by the epsilon rule, layer by layer backwards."""
    (x,) = task.samples.samples[index]
    weights = [layer.weight for layer in task.layers]
    biases = [task.program.parameter(layer.node.args[2]) if len(layer.node.args) > 2 else 0.0 for layer in task.layers]
    z1 = x @ weights[0].T + biases[0]
    a1 = torch.relu(z1)
    z2 = a1 @ weights[1].T + biases[1]
    a2 = F.gelu(z2)
    z3 = a2 @ weights[2].T + biases[2]
    relevance = torch.where(z3 == z3.max(), z3, 0.0)
    found = [relevance]
    for a, w, z in ((a2, weights[2], z3), (a1, weights[1], z2)):
        stabilized = z + epsilon * z.square().mean().sqrt() * z.sign()
        contributions = a[0][:, None] * w.T / stabilized[0][None]
        relevance = (contributions * relevance[0][None]).sum(1)[None]
        found.insert(0, relevance)
    return [float(r.abs().sum() / z3.max().abs()) for r in found], [float(r.sum() / z3.max()) for r in found]


@pytest.mark.parametrize("epsilon", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_it_follows_the_epsilon_rule(epsilon, bias):
    task = task_of(Chain, 8, bias=bias)
    expected = np.mean([propagated(task, i, epsilon)[0] for i in range(8)], axis=0)
    contributions, sizes = Relevance(epsilon=epsilon).contributions(task)
    assert contributions.mean(0) == pytest.approx(expected, rel=2e-3)
    assert sizes.tolist() == [1] * 8


def test_relevance_is_conserved_without_biases():
    task = task_of(Chain, 4)
    for index in range(4):
        assert propagated(task, index, 0.0)[1] == pytest.approx([1.0, 1.0, 1.0], rel=1e-3)


@pytest.mark.parametrize("model", [TinyConv, TinyBlock, TwoOutputs])
def test_values_are_those_of_the_program(model):
    task = task_of(model, 1)
    network = RelevanceNetwork(task.program, task.layers, 0.25)
    values = network.values(task.samples.samples[0])
    for node, expected in zip(task.program.outputs, task.program(*task.samples.samples[0]), strict=True):
        assert torch.allclose(values[node], expected, atol=1e-6)


def test_scores_weigh_the_noise():
    task = task_of(TinyBlock, 6)
    contributions, _ = Relevance().contributions(task)
    scores = Relevance().score(task)
    assert scores.loss == pytest.approx(contributions.mean(0)[:, None] * Sqnr().score(task).loss)
    assert (contributions > 0).all() and (scores.half_width > 0).all()


def test_a_negative_epsilon_is_refused():
    with pytest.raises(OptionError, match="epsilon"):
        Relevance(epsilon=-1.0).score(task_of(TinyConv, 1))
