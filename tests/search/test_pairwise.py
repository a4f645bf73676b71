"""pairwise: interaction terms against double backward and against networks with two rounded layers."""

import itertools

import numpy as np
import pytest
import torch
from graphwright.ir.errors import OptionError
from graphwright.search.sensitivity.base import Scores
from graphwright.search.sensitivity.pairwise import Pairwise
from sensitivity_cases import TinyBlock, TinyConv, TwoOutputs, mean_loss, mean_loss_of, task_of


def exact_term(task, kind, first, second, a, b):
    """d_first^T H d_second by differentiating twice."""
    weights = [(x, x.weight.clone().requires_grad_()) for x in ([first] if first is second else [first, second])]
    gradients = torch.autograd.grad(mean_loss_of(task, kind, weights), [w for _, w in weights], create_graph=True)
    along = (gradients[0] * (first.rounded(a) - first.weight)).sum()
    (product,) = torch.autograd.grad(along, weights[-1][1])
    return float((product * (second.rounded(b) - second.weight)).sum())


@pytest.mark.parametrize(("model", "kind"), [(TinyConv, "self"), (TinyBlock, "self"), (TwoOutputs, "squared")])
def test_terms_are_those_of_the_exact_hessian(model, kind):
    task = task_of(model, 6)
    scores = Pairwise().score(task)
    for i, layer in enumerate(task.layers):
        exact = [0.5 * exact_term(task, kind, layer, layer, c, c) for c in task.choices]
        assert scores.loss[i] == pytest.approx(np.array(exact), rel=2e-3, abs=1e-8)
    assert scores.pairs
    for (i, j), table in scores.pairs.items():
        exact = [
            [exact_term(task, kind, task.layers[i], task.layers[j], a, b) for b in ("int8", "int2")] for a in ("int8", "int2")
        ]
        assert table[::2, ::2] == pytest.approx(np.array(exact), rel=5e-3, abs=1e-3 * np.abs(table).max() + 1e-8)


def test_measured_terms_are_what_two_rounded_layers_lose_together():
    task = task_of(TinyConv, 6)
    scores = Pairwise(by="measurement").score(task)

    def loss(*chosen):
        return float(mean_loss_of(task, "self", [(task.layers[i], task.layers[i].rounded(c)) for i, c in chosen]))

    assert scores.loss[1, 2] == pytest.approx(
        float(mean_loss(task, "self", task.layers[1], task.layers[1].rounded("int2"))), rel=1e-3
    )
    for i, j in scores.pairs:
        for a, b in itertools.product(("int4", "int2"), repeat=2):
            expected = loss((i, a), (j, b)) - loss((i, a)) - loss((j, b))
            found = scores.pairs[i, j][task.choices.index(a), task.choices.index(b)]
            assert found == pytest.approx(expected, rel=1e-2, abs=1e-6)


def test_the_second_order_loss_of_all_layers_is_close_to_the_measured_one_where_errors_are_small():
    task = task_of(TinyBlock, 24)
    scores = Pairwise(strongest=1000).score(task)
    total = scores.loss[:, 0].sum() + sum(table[0, 0] for table in scores.pairs.values())
    measured = float(mean_loss_of(task, "self", [(layer, layer.rounded("int8")) for layer in task.layers]))
    assert total == pytest.approx(measured, rel=0.2)


def test_only_the_strongest_pairs_are_kept():
    task = task_of(TinyConv, 12)
    everything = Pairwise().score(task)
    few = Pairwise(strongest=1).score(task)
    ((pair, table),) = few.pairs.items()
    assert np.abs(table).max() == max(np.abs(t).max() for t in everything.pairs.values())
    assert (everything.pairs[pair] == table).all() and (few.loss == everything.loss).all()
    assert Pairwise(strongest=0).score(task).pairs == {}
    again = Scores.from_json(few.to_json())
    assert list(again.pairs) == [pair] and (again.pairs[pair] == table).all()


def test_options_are_checked():
    with pytest.raises(OptionError, match="samples"):
        Pairwise(samples=0).score(task_of(TinyConv, 1))
