"""Bisection over a front by real evaluations: the smallest plan that meets the target, nothing evaluated twice."""

from dataclasses import replace

import numpy as np
import pytest
from graphwright.search.problem import InfeasibleError
from graphwright.search.solvers import bisection, pareto
from graphwright.search.store import Store
from graphwright.tools.bench.solvers import network
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def front():
    problem = network(7, items=20)
    return pareto.front(replace(problem, limits=problem.limits[:1]), "weight_bytes", points=16)


def accuracy(front):
    """A score that rises along the front, as accuracy does: chosen -> score."""
    loss = {plan.chosen: plan.loss for plan in front}
    return lambda chosen: 1.0 - loss[chosen] / 10


def test_it_finds_the_smallest_plan_for_any_target(front):
    scores = [accuracy(front)(plan.chosen) for plan in front]
    for target in (*scores[:: len(scores) // 10], -np.inf):
        found = bisection.solve(front, "weight_bytes", accuracy(front), target)
        assert found.solution == next(plan for plan, score in zip(front, scores, strict=True) if score >= target)
        assert found.score >= target
        assert len(found.evaluations) <= np.ceil(np.log2(len(front))) + 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(np.nan), min_size=1, max_size=40), st.floats(0, 1))
def test_noise_never_gives_a_plan_that_misses_the_target(scores, target):
    plans = [replace(PLAN, chosen=(i,), totals={"bytes": float(i)}) for i in range(len(scores))]
    try:
        found = bisection.solve(plans, "bytes", lambda chosen: scores[chosen[0]], target)
    except InfeasibleError:
        assert not scores[-1] >= target
        return
    assert scores[found.solution.chosen[0]] >= target
    below = found.solution.chosen[0] - 1
    assert below < 0 or not scores[below] >= target


PLAN = pareto.front(network(1, items=2), "weight_bytes", points=1)[0]


def test_a_target_no_plan_meets_names_the_best_score(front):
    best = accuracy(front)(front[-1].chosen)
    with pytest.raises(InfeasibleError, match="score: target 2, but") as caught:
        bisection.solve(front, "weight_bytes", accuracy(front), 2.0)
    assert caught.value.smallest == {"score": best}


def test_a_second_run_evaluates_nothing_and_a_stopped_one_goes_on(front, tmp_path):
    calls = []

    def evaluate(chosen):
        calls.append(chosen)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return accuracy(front)(chosen)

    target = accuracy(front)(front[len(front) // 3].chosen)
    with pytest.raises(KeyboardInterrupt):
        bisection.solve(front, "weight_bytes", evaluate, target, store=Store(tmp_path), key="net")
    first = bisection.solve(front, "weight_bytes", evaluate, target, store=Store(tmp_path), key="net")
    assert len(calls) == len(first.evaluations) + 1, "only the evaluation that was stopped ran twice"
    again = bisection.solve(
        front, "weight_bytes", lambda chosen: pytest.fail("evaluated"), target, store=Store(tmp_path), key="net"
    )
    assert again == first
    with pytest.raises(ZeroDivisionError):
        bisection.solve(front, "weight_bytes", lambda chosen: 1 / 0, target, store=Store(tmp_path), key="another net")
