"""Solvers: a `Problem` in, a `Solution` out. One file each.

`solve` has those that see tables alone. `bisection` and `evolutionary` also take a callback that really evaluates a plan.
"""

from __future__ import annotations

from ...ir.errors import UnknownNameError
from ..problem import Problem, Solution
from . import dynamic, greedy, ilp

SOLVERS = {"ilp": ilp.solve, "dynamic": dynamic.solve, "greedy": greedy.solve}


def solve(problem: Problem, name: str = "ilp") -> Solution:
    """The plan one solver finds.

    Raises:
        UnknownNameError: no such solver. InfeasibleError: no plan meets the limits.
    """
    if name not in SOLVERS:
        raise UnknownNameError("solver", name, (*SOLVERS, "evolutionary"))
    return SOLVERS[name](problem)
