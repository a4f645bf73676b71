"""Dynamic programming over a discretized budget: the multiple-choice knapsack with one limit.

Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning" (2023), allocate pruning ratios so: losses add up,
best(i, b) = min over choices c of best(i - 1, b - cost[i, c]) + loss[i, c], in time linear in items, choices and steps.
"""

from __future__ import annotations

import numpy as np

from ...ir.errors import OptionError
from ..problem import Problem, Solution
from .infeasible import why_infeasible
from .tables import Tables, polish


def solve(problem: Problem, steps: int = 10_000) -> Solution:
    """The plan of least loss among those whose costs, each rounded up to a step of the budget, meet the limit; then polished.

    Rounding up is the safe side: the plan meets the limit whatever `steps`, the number of steps of the budget above the cheapest
    plan. Where all costs are whole multiples of a unit of which the budget holds no more than `steps`, nothing is rounded and the
    plan is optimal. Solution.bound comes from the same recurrence with costs rounded down.

    Raises:
        InfeasibleError: no plan meets the limit.
        OptionError: more than one finite limit, or pairs: their losses are not additive.
    """
    tables = Tables.of(problem)
    if len(tables.limits) > 1 or problem.pairs:
        reason = "pairs" if problem.pairs else f"{len(tables.limits)} limits: " + ", ".join(x.metric for x in tables.limits)
        raise OptionError(f"dynamic programming takes one limit and additive losses, not {reason}; solve by 'ilp'")
    if not tables.limits:
        chosen = tables.best(tables.loss)
        return Solution.of(problem, chosen.tolist(), bound=tables.total(chosen))
    least = tables.floor(tables.cost[0])
    capacity = float(tables.room[0] - least.sum())
    if capacity < 0:
        raise why_infeasible(problem)
    spread = tables.cost[0] - least[tables.item]
    # A choice above the whole budget never fits, and a budget above the dearest plan is no limit.
    capacity = min(capacity, float(np.maximum.reduceat(spread, tables.start[:-1]).sum()))
    up, down, cells = _steps(spread, capacity, steps)
    chosen, loss = _best(tables, up, cells)
    bound = loss if up is down else _best(tables, down, cells)[1]
    # What rounding up left unspent is spent by the exact costs.
    return Solution.of(problem, polish(tables, chosen).tolist(), bound)


def _steps(spread: np.ndarray, capacity: float, steps: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Costs in steps rounded up and rounded down (the same array where nothing is rounded), and the steps of the budget."""
    if capacity == 0:
        whole = (spread > 0).astype(np.int64)
        return whole, whole, 0
    if (spread == np.round(spread)).all() and spread.max() < 2**53:
        unit = int(np.gcd.reduce(spread.astype(np.int64)))
        if capacity // unit <= steps:
            whole = spread.astype(np.int64) // unit
            return whole, whole, int(capacity // unit)
    scaled = np.minimum(spread / capacity, 2.0) * steps
    return np.ceil(scaled).astype(np.int64), np.floor(scaled * (1 - 1e-12)).astype(np.int64), steps


def _best(tables: Tables, cost: np.ndarray, cells: int) -> tuple[np.ndarray, float]:
    """(chosen, loss): least loss with costs (columns,) in whole steps adding up to at most `cells`."""
    best = np.zeros(cells + 1)
    taken = np.zeros((tables.items, cells + 1), dtype=np.int64)
    for item, (first, end) in enumerate(zip(tables.start[:-1], tables.start[1:], strict=True)):
        after = np.full(cells + 1, np.inf)
        for column in range(first, end):
            spent = int(cost[column])
            if spent > cells:
                continue
            loss = best[: cells + 1 - spent] + tables.loss[column]
            better = np.flatnonzero(loss < after[spent:]) + spent
            after[better] = loss[better - spent]
            taken[item, better] = column
        best = after
    columns = np.zeros(tables.items, dtype=np.int64)
    left = cells
    for item in reversed(range(tables.items)):
        columns[item] = taken[item, left]
        left -= int(cost[columns[item]])
    return columns - tables.start[:-1], float(best[cells])
