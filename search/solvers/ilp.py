"""Integer linear program: the plan of least loss within all limits at once, with a proven bound.

    minimize  sum loss[i, c] x[i, c] + sum pair[i, a, j, b] y[i, a, j, b]
    subject to  sum over c of x[i, c] = 1 for each item i,  cost x <= most for each limit,  x binary

HAWQ-V3 (Yao et al., 2021, equation 12) and AdaQuant (Hubara et al., 2020, section 4) allocate bits so, with one limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ...ir.errors import OptionError
from ..problem import Problem, Solution
from .infeasible import why_infeasible
from .milp import Model
from .tables import Tables, polish, shrink

#: Products of choices that are linearized; a table of 40 layers with 4 choices each, all pairs, has 12480.
MOST_PRODUCTS = 20_000


def solve(problem: Problem, gap: float = 1e-3, seconds: float = 60.0, start: Sequence[int] | None = None) -> Solution:
    """The plan whose loss is proven to be at most `gap` (relative) above the least, or the best one found in `seconds`.

    Solution.bound holds what is proven. A good plan comes first (greedy, rounding of the relaxation, `start`); where the
    relaxation already proves it near enough, no tree is searched, and choices that no better plan can hold are left out.

    Raises:
        InfeasibleError: no plan meets the limits.
        OptionError: too many pairs to linearize.
        UnsolvedError: `seconds` passed without any plan.
    """
    products = sum(table.size for table in problem.pairs.values())
    if products > MOST_PRODUCTS:
        raise OptionError(
            f"{len(problem.pairs)} pairs have {products} products of choices; the integer program linearizes at most "
            f"{MOST_PRODUCTS}. Keep the largest pairs, or solve by 'greedy', which takes any number"
        )
    tables = Tables.of(problem)
    best = _better(tables, None if start is None else np.array(start), shrink(tables, tables.best(tables.loss)))
    return _search(problem, tables, best, gap, seconds)


def _search(problem: Problem, tables: Tables, best: np.ndarray | None, gap: float, seconds: float) -> Solution:
    least = tables.floor(tables.loss)
    excess = tables.loss - least[tables.item]
    floor = float(least.sum()) + sum(float(table.min()) for table in problem.pairs.values())
    reach = np.inf if best is None else tables.total(best) - floor
    if best is not None and reach <= 0:
        return Solution.of(problem, best.tolist(), bound=floor)
    # A choice that loses more than a whole known plan, or that exceeds a limit even when all others cost their least, is in no
    # better plan; without it, the numbers that HiGHS sees are of one order of magnitude.
    useful = (excess <= reach * (1 + 1e-9)) & _affordable(tables)
    if not np.logical_or.reduceat(useful, tables.start[:-1]).all():
        raise why_infeasible(problem)
    scale = float(excess[useful].max()) + sum(float(np.ptp(table)) for table in problem.pairs.values()) or 1.0
    scale = min(scale, reach)
    model = Model(tables, np.where(useful, excess, 0.0) / scale, floor / scale, useful)
    for cost, room in zip(tables.cost, tables.room, strict=True):
        model.add_limit(cost, float(room))
    _add_pairs(model, problem, scale)

    relaxed = model.relaxation()
    if relaxed is None:
        raise why_infeasible(problem)
    bound = relaxed.value * scale
    best = _better(tables, best, shrink(tables, tables.best(-relaxed.share)))
    if best is not None:
        loss = tables.total(best)
        if loss - bound <= gap * abs(loss):
            return Solution.of(problem, best.tolist(), bound)
        model.exclude(np.flatnonzero((relaxed.value + relaxed.reduced) * scale > loss + 1e-6 * scale))
    chosen, proven = model.solve(gap, seconds, best)
    if chosen is None and best is None:
        raise why_infeasible(problem)
    found = _better(tables, best, chosen)
    assert found is not None
    # What was excluded loses more than the plan it was excluded by, so the bound holds for all plans.
    return Solution.of(problem, found.tolist(), min(max(bound, proven * scale), tables.total(found)))


def _affordable(tables: Tables) -> np.ndarray:
    """(columns,) whether each limit holds where the column's item takes it and all others cost their least."""
    rows = []
    for cost, room in zip(tables.cost, tables.room, strict=True):
        least = tables.floor(cost)
        rows.append(cost - least[tables.item] <= room - least.sum())
    return np.logical_and.reduce(rows) if rows else np.ones(len(tables.item), dtype=bool)


def _better(tables: Tables, *plans: np.ndarray | None) -> np.ndarray | None:
    """The best of the plans that meet the limits, polished."""
    fitting = [polish(tables, plan) for plan in plans if plan is not None and tables.fits(plan)]
    return min(fitting, key=tables.total, default=None)


def _add_pairs(model: Model, problem: Problem, scale: float) -> None:
    """Products y[a, b] = x[a] x[b] by their sums: sum over b of y[a, b] = x[a] and sum over a of y[a, b] = x[b].

    With one choice an item this is exact for binary x, implies McCormick's y <= x[a], y <= x[b], y >= x[a] + x[b] - 1, and is
    tighter in the relaxation (Adams and Sherali, 1986).
    """
    start = model.tables.start
    for (i, j), table in problem.pairs.items():
        least = float(table.min())
        first = model.add_columns((table - least).ravel() / scale, 0.0, 1.0)
        product = first + np.arange(table.size).reshape(table.shape)
        for a in range(table.shape[0]):
            model.add_row(np.append(product[a], start[i] + a), np.append(np.ones(table.shape[1]), -1.0), 0.0, 0.0)
        for b in range(table.shape[1]):
            model.add_row(np.append(product[:, b], start[j] + b), np.append(np.ones(table.shape[0]), -1.0), 0.0, 0.0)


def with_limit(problem: Problem, metric: str, most: float) -> Problem:
    """The problem with every limit on `metric` lowered to `most` where it is looser."""
    limits = (replace(x, most=min(x.most, most)) if x.metric == metric else x for x in problem.limits)
    return replace(problem, limits=tuple(limits))
