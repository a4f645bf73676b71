"""Why no plan meets the limits: the values named are the smallest, each reachable; checked against all plans."""

from dataclasses import replace

import numpy as np
import pytest
from graphwright.search.problem import InfeasibleError, Limit, Problem
from graphwright.search.solvers import dynamic, greedy, ilp, pareto
from graphwright.search.solvers.infeasible import why_infeasible
from hypothesis import assume, given, settings
from solver_problems import feasible_plans, plans, problems

SIZE, TIME = (np.array([8.0, 4.0]),) * 2, (np.array([1.0, 3.0]),) * 2


def problem(*limits):
    return Problem(("a", "b"), (("int8", "int4"),) * 2, (np.array([0.0, 1.0]),) * 2, limits)


@pytest.mark.parametrize("solve", [ilp.solve, greedy.solve, dynamic.solve, lambda p: pareto.front(p, "bytes")])
def test_every_solver_names_the_unmet_limit_and_the_smallest_value(solve):
    with pytest.raises(InfeasibleError, match="bytes: limit 9, smallest feasible 11") as caught:
        solve(problem(Limit("bytes", SIZE, 9.0, fixed=3.0)))
    assert caught.value.smallest == {"bytes": 11.0}


def test_every_limit_unmet_alone_is_named_and_the_others_are_not():
    with pytest.raises(InfeasibleError) as caught:
        ilp.solve(problem(Limit("bytes", SIZE, 7.0), Limit("us", TIME, 1.0), Limit("free", SIZE, 16.0)))
    # Smallest bytes and smallest time contradict each other, and the message says so at once.
    text = str(caught.value)
    assert text.startswith("2 of the 3 limits cannot be met, whatever is chosen: bytes: limit 7, smallest feasible 8; us:")
    assert "us: limit 1, smallest feasible 2. With the limits raised so far, each of the 3 limits can be met by itself" in text
    assert set(caught.value.smallest) == {"bytes", "us"}


def test_contradictory_limits_name_what_each_needs_while_the_other_is_kept():
    with pytest.raises(InfeasibleError, match="each of the 2 limits can be met by itself, but not all together") as caught:
        ilp.solve(problem(Limit("bytes", SIZE, 8.0), Limit("us", TIME, 4.0)))
    assert caught.value.smallest == {"bytes": 12.0, "us": 6.0}
    parts = "bytes: limit 8, smallest feasible 12 with the others kept; us: limit 4, smallest feasible 6 with the others kept"
    assert str(caught.value).endswith(f"{parts}. Raise the limits named or offer smaller choices")


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ([Limit("bytes", SIZE, 7.0)], "the limit cannot be met, whatever is chosen: bytes: limit 7, smallest feasible 8. Raise"),
        (
            [Limit("bytes", SIZE, 7.0), Limit("us", TIME, 6.0)],
            "1 of the 2 limits cannot be met, whatever is chosen: bytes: limit",
        ),
        ([Limit("bytes", SIZE, 7.0), Limit("us", TIME, 1.0)], "none of the 2 limits can be met, whatever is chosen:"),
    ],
)
def test_the_message_counts_the_limits_that_cannot_be_met(limits, text):
    with pytest.raises(InfeasibleError) as caught:
        ilp.solve(problem(*limits))
    assert str(caught.value).startswith(text)


def test_where_no_limit_alone_can_give_way_the_nearest_plan_is_named():
    """Three costs, one choice each that keeps it low: every two limits contradict each other."""
    rows = np.eye(3) * -1 + 2
    p = Problem(
        ("a",), (("x", "y", "z"),), (np.zeros(3),), tuple(Limit(m, (row,), 1.0) for m, row in zip("pqr", rows, strict=True))
    )
    with pytest.raises(InfeasibleError, match="raising it alone does not help.*nearest plan") as caught:
        ilp.solve(p)
    assert len(caught.value.smallest) == 2 and set(caught.value.smallest.values()) == {2.0}


def test_a_shared_metric_is_one_value_the_largest_of_its_sums():
    early, late = (np.array([5.0, 1.0]),) * 2, (np.array([1.0, 5.0]),) * 2
    with pytest.raises(InfeasibleError) as caught:
        ilp.solve(problem(Limit("peak", early, 4.0), Limit("peak", late, 4.0, fixed=1.0)))
    assert caught.value.smallest == {"peak": 7.0}


@settings(max_examples=150, deadline=None)
@given(problems(limits=(2, 3), pairs=False, tight=True))
def test_the_values_named_are_the_smallest_of_all_plans(problem):
    assume(not feasible_plans(problem))
    error = why_infeasible(problem)
    assert error.smallest, str(error)
    every = plans(problem)
    bound = {}
    for limit in problem.limits:
        assert limit.metric in str(error) or limit.metric not in error.smallest
        bound[limit.metric] = min(bound.get(limit.metric, np.inf), limit.most)
    assume(len({(x.metric, x.most) for x in problem.limits}) == len({x.metric for x in problem.limits}))
    alone = {m: min(problem.totals(plan)[m] for plan in every) for m in bound}
    unmet = {m for m, value in alone.items() if value > bound[m] * (1 + 1e-9)}
    if unmet:
        assert unmet <= set(error.smallest)
        for metric in unmet:
            assert error.smallest[metric] >= alone[metric] - 1e-9
            if "With the limits raised" not in str(error):
                assert error.smallest[metric] == pytest.approx(alone[metric], rel=1e-5)
        return
    for metric, value in error.smallest.items():
        others = tuple(x for x in problem.limits if x.metric != metric)
        kept = [problem.totals(plan)[metric] for plan in every if replace(problem, limits=others).meets(plan)]
        if kept:
            assert value == pytest.approx(min(kept), rel=1e-5, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(problems(limits=(2, 3), pairs=False, tight=True))
def test_raising_one_named_limit_to_its_value_makes_room(problem):
    assume(not feasible_plans(problem))
    error = why_infeasible(problem)
    assume("with the others kept" in str(error) and "raised so far" not in str(error))
    metric, value = next(iter(error.smallest.items()))
    limits = tuple(replace(x, most=max(x.most, value)) if x.metric == metric else x for x in problem.limits)
    assert feasible_plans(replace(problem, limits=limits))
