"""Greedy: every item at its best, then the step that loses least for what it saves until all limits hold, then polishing.

MPTQ-ViT (Tsai et al., 2024) allocates bits by such steps. Any number of limits and pairs; milliseconds; proves nothing.
"""

from __future__ import annotations

from ..problem import Problem, Solution
from .infeasible import feasible, why_infeasible
from .milp import UnsolvedError
from .tables import Tables, polish, shrink


def solve(problem: Problem) -> Solution:
    """A plan that meets all limits and that no move of one item and no exchange of two improves.

    Raises:
        InfeasibleError: no plan meets the limits.
        UnsolvedError: several limits pull against each other so that no single step helps although a plan exists.
    """
    tables = Tables.of(problem)
    chosen = shrink(tables, tables.best(tables.loss))
    if chosen is None:
        if not feasible(problem):
            raise why_infeasible(problem)
        raise UnsolvedError("greedy steps end before all limits hold, yet a plan exists: solve by 'ilp'")
    return Solution.of(problem, polish(tables, chosen).tolist())
