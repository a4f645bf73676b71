"""Dynamic programming: optimal where nothing is rounded, on the safe side where something is."""

from dataclasses import replace

import numpy as np
import pytest
from graphwright.ir.errors import OptionError
from graphwright.search.problem import InfeasibleError, Limit, Problem
from graphwright.search.solvers import dynamic, ilp
from graphwright.tools.bench.solvers import network
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import feasible_plans, least_loss, problems, spread


@settings(max_examples=150, deadline=None)
@given(problems(limits=(0, 1), pairs=False, whole=True))
def test_whole_costs_give_the_optimum(problem):
    least = least_loss(problem)
    if least is None:
        with pytest.raises(InfeasibleError):
            dynamic.solve(problem)
        return
    found = dynamic.solve(problem)
    assert problem.meets(found.chosen)
    assert found.loss == pytest.approx(least, abs=1e-9 * spread(problem)) and found.bound == pytest.approx(found.loss)


@settings(max_examples=150, deadline=None)
@given(problems(limits=(1, 1), pairs=False), st.integers(1, 40))
def test_rounding_is_on_the_safe_side_and_the_bound_holds(problem, steps):
    if least_loss(problem) is None:
        with pytest.raises(InfeasibleError):
            dynamic.solve(problem, steps)
        return
    found = dynamic.solve(problem, steps)
    assert problem.meets(found.chosen)
    assert found.bound is not None and found.bound <= least_loss(problem) + 1e-9 * spread(problem)
    # Rounding up wastes less than one step an item: no plan that leaves so much unspent is better.
    limit = problem.limits[0]
    if np.isfinite(limit.most):
        wasted = len(problem.items) * max(limit.most - limit.least, 0.0) / steps
        spare = replace(problem, limits=(replace(limit, most=max(limit.most - wasted, limit.least)),))
        if wasted <= limit.most - limit.least and feasible_plans(spare):
            assert found.loss <= least_loss(spare) + 1e-9 * spread(problem)


def test_200_layers_come_out_near_the_integer_program():
    problem = network(0)
    one = replace(problem, limits=problem.limits[:1])
    found, best = dynamic.solve(one), ilp.solve(one, gap=1e-4)
    assert best.bound is not None and best.bound <= found.loss <= 1.01 * best.loss
    assert found.bound is not None and found.bound <= best.loss


def test_limits_that_only_count_are_no_limits():
    problem = network(0, items=20)
    counted = replace(problem, limits=(problem.limits[0], *(replace(x, most=np.inf) for x in problem.limits[1:])))
    assert set(dynamic.solve(counted).totals) == {"weight_bytes", "bit_operations", "latency_us"}


@pytest.mark.parametrize("change", [{}, {"pairs": {(0, 1): np.zeros((8, 8))}, "limits": ()}])
def test_what_it_cannot_take_is_refused(change):
    with pytest.raises(OptionError, match="pairs|3 limits: weight_bytes, bit_operations, latency_us"):
        dynamic.solve(replace(network(0, items=5), **change))


def test_a_budget_of_exactly_the_cheapest_plan_leaves_that_plan():
    cost = (np.array([0.3, 0.1]), np.array([0.2, 0.7]))
    problem = Problem(("a", "b"), (("x", "y"),) * 2, (np.array([0.0, 1.0]),) * 2, (Limit("bytes", cost, 0.1 + 0.2),))
    assert dynamic.solve(problem).chosen == (1, 0)
