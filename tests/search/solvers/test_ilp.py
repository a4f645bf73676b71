"""The integer program: the optimum of small problems, a proven gap on large ones, and refusals."""

import time
from dataclasses import replace

import numpy as np
import pytest
from graphwright.ir.errors import OptionError
from graphwright.search.problem import InfeasibleError, Limit, Problem
from graphwright.search.solvers import ilp
from graphwright.tools.bench.solvers import network
from hypothesis import given, settings
from solver_problems import feasible_plans, least_loss, problems, spread


@settings(max_examples=150, deadline=None)
@given(problems())
def test_it_finds_the_optimum_of_small_problems(problem):
    least = least_loss(problem)
    if least is None:
        with pytest.raises(InfeasibleError):
            ilp.solve(problem, gap=0.0)
        return
    found = ilp.solve(problem, gap=0.0)
    assert problem.meets(found.chosen)
    assert found.loss == pytest.approx(problem.total_loss(found.chosen), abs=1e-12)
    assert found.loss <= least + 1e-6 * spread(problem)
    assert found.bound is not None and found.bound <= least + 1e-6 * spread(problem), "the bound is below every plan"
    assert found.bound >= least - 1e-6 * spread(problem), "and the optimum is proven"


@settings(max_examples=40, deadline=None)
@given(problems())
def test_a_start_never_makes_it_worse(problem):
    for plan in feasible_plans(problem)[-1:]:
        assert ilp.solve(problem, gap=0.0, start=plan).loss <= least_loss(problem) + 1e-6 * spread(problem)


@pytest.mark.parametrize("seed", range(3))
def test_200_layers_8_choices_and_3_limits_reach_a_proven_gap_of_a_thousandth(seed):
    problem = network(seed)
    found = ilp.solve(problem, gap=1e-3)
    assert problem.meets(found.chosen)
    assert found.gap is not None and found.gap <= 1e-3


def test_losses_of_many_orders_of_magnitude_keep_their_digits():
    """A 2-bit first layer may cost a million times what the others differ by; these must still be told apart."""
    loss = (np.array([1e-3, 1e6]), np.array([0.0, 1e-4]), np.array([0.0, 1.01e-4]))
    size = (np.array([8.0, 2.0]), np.array([8.0, 2.0]), np.array([8.0, 2.0]))
    problem = Problem(("a", "b", "c"), (("int8", "int2"),) * 3, loss, (Limit("bytes", size, 18.0),))
    assert ilp.solve(problem, gap=0.0).chosen == (0, 1, 0)


def test_pairs_change_the_plan():
    """Each layer alone is cheap to lower, both together are not."""
    size = (np.array([8.0, 4.0]),) * 3
    loss = (np.array([0.0, 1.0]), np.array([0.0, 1.1]), np.array([0.0, 1.5]))
    problem = Problem(("a", "b", "c"), (("int8", "int4"),) * 3, loss, (Limit("bytes", size, 16.0),))
    assert ilp.solve(problem).chosen == (1, 1, 0)
    coupled = replace(problem, pairs={(0, 1): np.array([[0.0, 0.0], [0.0, 3.0]])})
    found = ilp.solve(coupled, gap=0.0)
    assert found.chosen == (1, 0, 1) and found.loss == pytest.approx(2.5) and found.gap == pytest.approx(0.0, abs=1e-6)


def test_too_many_pairs_are_refused_with_the_way_out():
    problem = network(0, items=60)
    draw = np.random.default_rng(0)
    pairs = {(i, j): draw.random((8, 8)) for i in range(60) for j in range(i + 1, 60)}
    with pytest.raises(OptionError, match=r"1770 pairs have 113280 products.*greedy"):
        ilp.solve(replace(problem, pairs=pairs))


def test_out_of_time_the_best_plan_comes_with_what_is_proven():
    problem = network(1, items=120)
    draw = np.random.default_rng(0)
    pairs = {(i, i + 1): draw.random((8, 8)) * 1e-3 for i in range(119)}
    begin = time.monotonic()
    found = ilp.solve(replace(problem, pairs=pairs), gap=0.0, seconds=0.5)
    assert time.monotonic() - begin < 60, "the limit ends a search that would take hours"
    assert problem.meets(found.chosen)
    assert found.bound is not None and found.bound <= found.loss


def test_a_plan_may_spend_a_limit_to_the_last_unit_and_no_further():
    """Costs of very different size: HiGHS compares within a tolerance of the largest, a limit does not."""
    cost = (np.array([1e7, 0.0]), np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    loss = (np.array([0.0, 10.0]), np.array([0.0, 1.0]), np.array([0.0, 1.5]))
    problem = Problem(("a", "b", "c"), (("x", "y"),) * 3, loss)
    for most, best in ((1e7 + 3, (0, 0, 0)), (1e7 + 2.9, (0, 1, 0)), (1e7 + 1.9, (0, 0, 1)), (1e7, (0, 1, 1))):
        assert ilp.solve(replace(problem, limits=(Limit("bytes", cost, most),)), gap=0.0).chosen == best
