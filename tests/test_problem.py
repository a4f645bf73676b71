"""The solvers' input: totals, limits, and refusal of tables that do not fit."""

import numpy as np
import pytest
from graphwright.search.problem import Limit, Problem, Solution


def problem(**changes):
    tables = {
        "items": ("a", "b"),
        "choices": (("int8", "int4"), ("int8", "int4", "int2")),
        "loss": (np.array([0.0, 1.0]), np.array([0.0, 2.0, 9.0])),
        "limits": (Limit("bytes", (np.array([8.0, 4.0]), np.array([80.0, 40.0, 20.0])), 60.0, fixed=5.0),),
    }
    return Problem(**{**tables, **changes})


def test_totals_count_fixed_costs_and_pairs():
    p = problem(pairs={(0, 1): np.arange(6.0).reshape(2, 3)})
    assert p.total_loss([1, 2]) == 1.0 + 9.0 + 5.0
    assert p.totals([1, 2]) == {"bytes": 29.0}
    assert p.meets([1, 1]) and not p.meets([0, 0])
    assert p.names([1, 2]) == {"a": "int4", "b": "int2"}
    assert p.limits[0].least == 29.0


def test_a_shared_metric_is_the_largest_of_its_sums():
    costs = (np.array([1.0, 2.0]), np.array([0.0, 0.0, 0.0]))
    p = problem(limits=(Limit("peak", costs, 9.0), Limit("peak", costs, 9.0, fixed=3.0)))
    assert p.totals([1, 0]) == {"peak": 5.0}


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": (np.zeros(2), np.zeros(2))},
        {"loss": (np.zeros(2), np.array([0.0, np.nan, 0.0]))},
        {"items": ("a",)},
        {"pairs": {(1, 0): np.zeros((3, 2))}},
        {"pairs": {(0, 1): np.zeros((3, 2))}},
        {"limits": (Limit("bytes", (np.zeros(2), np.zeros(4))),)},
    ],
)
def test_tables_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="must|need|not finite"):
        problem(**changes)


def test_the_gap_is_relative_to_the_loss():
    p = problem()
    assert Solution.of(p, [1, 1]).gap is None
    assert Solution.of(p, [1, 1], bound=1.5).gap == pytest.approx(0.5)
