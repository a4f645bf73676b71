"""fisher: against gradients written out sample by sample."""

import numpy as np
import pytest
import torch
from graphwright.ir.errors import DataError
from graphwright.search.sensitivity.fisher import Fisher
from sensitivity_cases import TinyBlock, TinyConv, mean_loss, task_of


@pytest.mark.parametrize("model", [TinyConv, TinyBlock])
def test_it_is_the_mean_of_squared_gradients_times_squared_errors(model):
    task = task_of(model, 6)
    expected = np.zeros((len(task.layers), len(task.choices)))
    for index in range(6):
        one = type(task)(
            task.program,
            task.layers,
            task.choices,
            type(task.samples)(task.samples.samples[index : index + 1]),
            task.labels[index:],
        )
        for i, layer in enumerate(task.layers):
            weight = layer.weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(mean_loss(one, "labels", layer, weight), weight)
            for j, choice in enumerate(task.choices):
                error = layer.rounded(choice) - layer.weight
                expected[i, j] += 0.5 * float((gradient.square() * error.square()).sum()) / 6
    scores = Fisher().score(task)
    assert scores.loss == pytest.approx(expected, rel=1e-3)
    assert scores.count == 6 and (scores.half_width > 0).all()


def test_it_needs_labels():
    task = task_of(TinyConv, 2)
    with pytest.raises(DataError, match=r"scorer fisher needs a label .*needed by fisher and .*; not by .*hessian-trace.*sqnr"):
        Fisher().score(type(task)(task.program, task.layers, task.choices, task.samples))
