"""The front: non-dominated, complete up to its step, exact on the convex hull."""

from dataclasses import replace

import numpy as np
import pytest
from graphwright.ir.errors import UnknownNameError
from graphwright.search.problem import InfeasibleError, Limit, Problem
from graphwright.search.solvers import pareto
from graphwright.tools.bench.solvers import network
from hypothesis import assume, given, settings
from solver_problems import feasible_plans, problems, spread


@settings(max_examples=80, deadline=None)
@given(problems(limits=(1, 3)))
def test_it_is_the_front_of_all_plans_up_to_its_step(problem):
    metric = problem.limits[0].metric
    every = feasible_plans(problem)
    if not every:
        with pytest.raises(InfeasibleError):
            pareto.front(problem, metric)
        return
    found = pareto.front(problem, metric, points=8, gap=0.0)
    values, losses = [x.totals[metric] for x in found], [x.loss for x in found]
    assert values == sorted(set(values)) and losses == sorted(set(losses), reverse=True), "sorted, none dominated"
    assert all(problem.meets(x.chosen) for x in found)
    noise, step = 2e-6 * spread(problem), (values[-1] - values[0]) / 8
    for plan in every:
        value, loss = problem.totals(plan)[metric], problem.total_loss(plan)
        assert any(x.loss <= loss + noise and x.totals[metric] <= value + step * (1 + 1e-6) + 1e-6 for x in found), plan
        if value > values[0] - 1e-9:
            # None of the front is beaten by a plan.
            assert not any(loss < x.loss - noise and value <= x.totals[metric] for x in found), plan


def test_separate_layers_have_their_whole_hull():
    """At every exchange rate of loss for bytes the best plan of the front is the best of all plans, item by item."""
    bytes_ = replace(network(3, items=12).limits[0], most=np.inf)
    problem = replace(network(3, items=12), limits=(bytes_,))
    found = pareto.front(problem, "weight_bytes", points=1)
    assert sum(x.bound == x.loss for x in found) > 40, "corners of the hull are proven optimal"
    for rate in np.geomspace(1e-9, 1e-3, 50):
        least = sum(float((row + rate * cost).min()) for row, cost in zip(problem.loss, bytes_.cost, strict=True))
        assert min(x.loss + rate * x.totals["weight_bytes"] for x in found) == pytest.approx(least, rel=1e-9)


def test_other_limits_hold_along_the_front():
    problem = network(5, items=30)
    found = pareto.front(problem, "weight_bytes", points=12)
    assert len(found) >= 12 and all(problem.meets(x.chosen) for x in found)
    assert found[0].totals["weight_bytes"] < 0.7 * found[-1].totals["weight_bytes"]
    steps = np.diff([x.totals["weight_bytes"] for x in found])
    assert steps.max() < 0.3 * steps.sum(), "points all along the range"


def test_a_metric_that_is_the_largest_of_sums_has_a_front():
    early, late = (np.array([5.0, 1.0]),) * 2, (np.array([1.0, 4.0]),) * 2
    limits = (Limit("peak", early), Limit("peak", late))
    problem = Problem(("a", "b"), (("x", "y"),) * 2, (np.array([0.0, 1.0]), np.array([0.0, 3.0])), limits)
    found = pareto.front(problem, "peak")
    assert [(x.chosen, x.totals["peak"]) for x in found] == [((1, 0), 6.0), ((0, 0), 10.0)]


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(UnknownNameError, match="did you mean 'weight_bytes'"):
        pareto.front(network(0, items=3), "weight_byte")


@settings(max_examples=30, deadline=None)
@given(problems(limits=(1, 1), pairs=False))
def test_corners_of_the_hull_are_optimal_at_their_metric(problem):
    metric = problem.limits[0].metric
    every = feasible_plans(problem)
    assume(every)
    for x in pareto.front(problem, metric, points=1, gap=0.0):
        best = min(problem.total_loss(p) for p in every if problem.totals(p)[metric] <= x.totals[metric] * (1 + 1e-9))
        assert x.loss <= best + 2e-6 * spread(problem)
