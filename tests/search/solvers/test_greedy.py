"""Greedy: within the limits, never better than the optimum, near it on tables like those of networks."""

import numpy as np
import pytest
from graphwright.search.problem import InfeasibleError, Limit, Problem
from graphwright.search.solvers import greedy, ilp
from graphwright.search.solvers.milp import UnsolvedError
from graphwright.search.solvers.tables import Tables, polish
from graphwright.tools.bench.solvers import network
from hypothesis import given, settings
from solver_problems import feasible_plans, least_loss, problems, spread


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_meets_the_limits_and_is_never_better_than_the_optimum(problem):
    least = least_loss(problem)
    if least is None:
        with pytest.raises(InfeasibleError):
            greedy.solve(problem)
        return
    try:
        found = greedy.solve(problem)
    except UnsolvedError:
        assert len(problem.limits) > 1, "with one limit the steps always reach it"
        return
    assert problem.meets(found.chosen) and found.bound is None
    assert found.loss >= least - 1e-9 * spread(problem)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_exchange_of_two_items_improves_a_polished_plan(problem):
    for start in feasible_plans(problem)[:3]:
        best = tuple(polish(Tables.of(problem), np.array(start)).tolist())
        assert problem.meets(best)
        near = [plan for plan in feasible_plans(problem) if sum(a != b for a, b in zip(plan, best, strict=True)) <= 2]
        assert problem.total_loss(best) <= min(map(problem.total_loss, near)) + 1e-9 * spread(problem)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_near_the_proven_bound_on_200_layers(seed):
    problem = network(seed)
    bound = ilp.solve(problem).bound
    assert bound is not None
    assert bound <= greedy.solve(problem).loss <= 1.05 * bound


def test_limits_that_pull_against_each_other_are_said_to_be_so():
    """Any single step lowers one sum by as much as it raises the other; moving both items would do."""
    first, second = np.array([4.0, 0.0, 6.0]), np.array([4.0, 6.0, 0.0])
    costs = ((first, np.array([0.0, 0.0])), (second, np.array([0.0, 0.0])))
    limits = tuple(Limit(m, cost, 3.0) for m, cost in zip("pq", costs, strict=True))
    problem = Problem(("a", "b"), (("x", "y", "z"), ("u", "v")), (np.zeros(3), np.zeros(2)), limits)
    with pytest.raises(InfeasibleError, match="with the others kept"):
        greedy.solve(problem)
    turn = (
        Limit("p", (np.array([0.0, 4.0]), np.array([4.0, 0.0])), 4.0),
        Limit("q", (np.array([4.0, 0.0]), np.array([0.0, 4.0])), 4.0),
    )
    assert greedy.solve(Problem(("a", "b"), (("x", "y"),) * 2, (np.zeros(2),) * 2, turn)).chosen in ((0, 0), (1, 1))
