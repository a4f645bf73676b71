"""The whole front of loss against one metric, in one call: its convex hull exactly, the holes in it by integer programs."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ...ir.errors import UnknownNameError
from ..problem import Problem, Solution
from . import ilp
from .infeasible import smallest_value


def front(problem: Problem, metric: str, points: int = 32, gap: float = 1e-3, seconds: float = 10.0) -> list[Solution]:
    """Plans of which none is better than another in both loss and `metric`, by ascending metric.

    The front reaches from the smallest value of the metric to that of the least loss, under all limits; a step is this range
    over `points`. For every plan within the limits the front has one whose loss is no larger, up to `gap` (relative), and whose
    metric is larger by at most a step. Where no other limit binds and there are no pairs, the corners of the convex hull are
    found exactly, by one walk over Lagrange multipliers. Each hole wider than a step is then cut by an integer program under the
    budget in its middle, started from the plan at its lower end and given `seconds`.

    Raises:
        InfeasibleError: no plan meets the limits.
        UnknownNameError: no limit of the problem counts `metric`.
    """
    if metric not in (known := {limit.metric for limit in problem.limits}):
        raise UnknownNameError("metric", metric, known)
    last = ilp.solve(problem, gap, seconds)
    first = ilp.solve(ilp.with_limit(problem, metric, smallest_value(problem, metric)), gap, seconds)
    found = [*_hull(problem, metric), first, last]
    known_values = sorted({plan.totals[metric]: plan for plan in found}.items())
    step = (last.totals[metric] - first.totals[metric]) / points
    holes = [(low, high, plan) for (low, plan), (high, _) in pairwise(known_values)]
    while holes:
        low, high, plan = holes.pop()
        if high - low <= step:
            continue
        budget = (low + high) / 2
        best = ilp.solve(ilp.with_limit(problem, metric, budget), gap, seconds, start=plan.chosen)
        found.append(best)
        # From the value of `best` to the budget nothing loses less than `best`: only the two sides remain.
        holes += [(low, best.totals[metric], plan), (budget, high, best)]
    return undominated(found, metric)


def undominated(plans: list[Solution], metric: str) -> list[Solution]:
    """Those of which no other has at most their loss and at most their metric, by ascending metric."""
    kept: list[Solution] = []
    for plan in sorted(plans, key=lambda plan: (plan.totals[metric], plan.loss)):
        if not kept or plan.loss < kept[-1].loss:
            kept.append(plan)
    return kept


def _hull(problem: Problem, metric: str) -> list[Solution]:
    """The corners of the lower convex hull of (metric, loss), each optimal at its metric; none where the choices are coupled.

    From the cheapest plan, the steps along the hulls of the single items are taken in the order of loss saved for each unit
    spent: after each, the plan minimizes loss + multiplier * metric for all multipliers between this step's rate and the next's.
    """
    counting = [limit for limit in problem.limits if limit.metric == metric]
    others = [limit for limit in problem.limits if limit.metric != metric and np.isfinite(limit.most)]
    if len(counting) > 1 or others or problem.pairs:
        return []
    steps: list[tuple[float, int, int]] = []
    chosen = []
    for item, (loss, cost) in enumerate(zip(problem.loss, counting[0].cost, strict=True)):
        corners = _corners(cost, loss)
        chosen.append(corners[0])
        steps += [((loss[a] - loss[b]) / (cost[b] - cost[a]), item, b) for a, b in pairwise(corners)]
    plans = [Solution.of(problem, chosen)]
    for _, item, choice in sorted(steps, key=lambda step: -step[0]):
        chosen[item] = choice
        plans.append(Solution.of(problem, chosen))
    return [Solution.of(problem, plan.chosen, bound=plan.loss) for plan in plans if problem.meets(plan.chosen)]


def _corners(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """Choices on the lower convex hull, from the cheapest to the one of least loss; rates of loss saved fall along it."""
    corners: list[int] = []
    for c in np.lexsort((loss, cost)).tolist():
        if corners and loss[c] >= loss[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2:]
            if (loss[a] - loss[b]) * (cost[c] - cost[b]) > (loss[b] - loss[c]) * (cost[b] - cost[a]):
                break
            corners.pop()
        corners.append(c)
    return corners
