"""Problems for the solvers' tests: small random ones, and what brute force says of them."""

from itertools import product

import numpy as np
from graphwright.search.problem import Limit, Problem
from hypothesis import strategies as st

#: Whole numbers repeat and tie; fractions do not add up exactly.
VALUES = st.one_of(st.integers(-3, 6).map(float), st.integers(-2000, 8000).map(lambda v: v / 1000))
COSTS = st.one_of(st.integers(0, 9).map(float), st.integers(0, 90_000).map(lambda v: v / 10_000))


def plans(problem):
    return list(product(*(range(len(names)) for names in problem.choices)))


def feasible_plans(problem):
    return [plan for plan in plans(problem) if problem.meets(plan)]


def least_loss(problem):
    """The least loss of any plan within the limits, or None."""
    return min((problem.total_loss(plan) for plan in feasible_plans(problem)), default=None)


def spread(problem):
    """The scale on which losses of this problem differ."""
    return sum(np.ptp(row) for row in problem.loss) + sum(np.ptp(table) for table in problem.pairs.values()) or 1.0


@st.composite
def problems(draw, limits=(0, 3), pairs=True, whole=False, tight=False):
    """Up to five items of up to four choices. Bounds are often the total of a plan, where a limit holds with nothing to spare.

    tight: bounds at, or a little below or above, what the cheapest plan costs, so that most problems have no plan.
    """
    sizes = draw(st.lists(st.integers(2 if tight else 1, 4), min_size=1, max_size=5))

    def table(values):
        return tuple(np.array([draw(values) for _ in range(size)]) for size in sizes)

    costs = st.integers(0, 9).map(float) if whole else COSTS
    found = []
    for number in range(draw(st.integers(*limits))):
        fixed = draw(st.sampled_from([0.0, 2.5]))
        limit = Limit(draw(st.sampled_from([f"m{number}", "shared"])), table(costs), np.inf, fixed)
        plan = [draw(st.integers(0, size - 1)) for size in sizes]
        loose = st.one_of(st.just(limit.total(plan)), st.floats(0.0, 40.0), st.just(np.inf))
        bound = limit.least + draw(st.sampled_from([-1.0, 0.0, 0.0, 0.5, 2.0])) if tight else draw(loose)
        found.append(Limit(limit.metric, limit.cost, bound, fixed))
    coupled = {}
    if pairs and len(sizes) > 1:
        for _ in range(draw(st.integers(0, 3))):
            i, j = sorted(draw(st.lists(st.integers(0, len(sizes) - 1), min_size=2, max_size=2, unique=True)))
            coupled[i, j] = np.array([[draw(VALUES) for _ in range(sizes[j])] for _ in range(sizes[i])])
    names = tuple(tuple(f"c{c}" for c in range(size)) for size in sizes)
    return Problem(tuple(f"i{i}" for i in range(len(sizes))), names, table(VALUES), tuple(found), coupled)
