"""Why no plan meets the limits: each unmet one, and the smallest value it could have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from ..problem import InfeasibleError, Limit, Problem
from .milp import Model, UnsolvedError
from .tables import Tables

#: The smallest values are those of plans found, proven smallest to this relative gap, or the best in this time.
GAP, SECONDS = 1e-6, 10.0


def why_infeasible(problem: Problem) -> InfeasibleError:
    """The error to raise for a problem that no plan solves.

    Limits that no plan meets even alone are named with the smallest value any plan reaches; when these are raised to it and the
    limits still contradict each other, or when each can be met alone, the error gives for each metric the least value with all
    other limits kept. Where raising one limit alone never helps, it names the nearest plan's values.
    """
    groups = _groups(problem)
    smallest = {key: _least(problem, limits, ()) for key, limits in groups.items()}
    unmet = {key: value for key, value in smallest.items() if value is not None and not _holds(groups[key], value)}
    if not unmet:
        text, found = _jointly(problem)
        return InfeasibleError(f"{text}. Raise the limits named or offer smaller choices", found)
    parts = [f"{metric}: limit {most:.10g}, smallest feasible {value:.10g}" for (metric, most), value in unmet.items()]
    text = f"{_subject(len(unmet), len(groups))} be met, whatever is chosen: {'; '.join(parts)}"
    found = _by_metric(unmet)
    raised = replace(problem, limits=tuple(_raised(limit, unmet) for limit in problem.limits))
    if not feasible(raised):
        joint, values = _jointly(raised)
        text, found = f"{text}. With the limits raised so far, {joint}", {**found, **values}
    return InfeasibleError(f"{text}. Raise the limits named or offer smaller choices", found)


def _subject(unmet: int, every: int) -> str:
    if unmet == every:
        return "the limit cannot" if every == 1 else f"none of the {every} limits can"
    return f"{unmet} of the {every} limits cannot"


def feasible(problem: Problem) -> bool:
    """Whether any plan meets the limits."""
    return _least(problem, (), problem.limits) is not None


def smallest_value(problem: Problem, metric: str) -> float:
    """The least value of a metric over the plans that meet the limits.

    Raises:
        InfeasibleError: there is no such plan.
    """
    value = _least(problem, tuple(limit for limit in problem.limits if limit.metric == metric), problem.limits)
    if value is None:
        raise why_infeasible(problem)
    return value


def _groups(problem: Problem) -> dict[tuple[str, float], tuple[Limit, ...]]:
    """Finite limits by (metric, bound): those of one group bound one value, the largest of their sums."""
    found: dict[tuple[str, float], tuple[Limit, ...]] = {}
    for limit in problem.limits:
        if np.isfinite(limit.most):
            key = (limit.metric, limit.most)
            found[key] = (*found.get(key, ()), limit)
    return found


def _raised(limit: Limit, unmet: dict[tuple[str, float], float]) -> Limit:
    return replace(limit, most=unmet.get((limit.metric, limit.most), limit.most))


def _holds(limits: tuple[Limit, ...], value: float) -> bool:
    return value <= limits[0].allowed


def _by_metric(values: dict[tuple[str, float], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (metric, _), value in values.items():
        found[metric] = max(found.get(metric, -np.inf), value)
    return found


def _jointly(problem: Problem) -> tuple[str, dict[str, float]]:
    """Message and smallest values where every limit can be met, but not all at once."""
    groups = _groups(problem)
    parts, found = [], {}
    for key, limits in groups.items():
        kept = [limit for other, more in groups.items() if other != key for limit in more]
        value = _least(problem, limits, kept)
        metric, most = key
        if value is None:
            parts.append(f"{metric}: limit {most:.10g}, raising it alone does not help")
        elif not _holds(limits, value):
            found[key] = value
            parts.append(f"{metric}: limit {most:.10g}, smallest feasible {value:.10g} with the others kept")
    if not parts:
        raise UnsolvedError("HiGHS found no plan within the limits, but its nearest plan meets them; solve by 'greedy'")
    text = f"each of the {len(groups)} limits can be met by itself, but not all together: {'; '.join(parts)}"
    if not found:
        found = _nearest(problem, groups)
        near = ", ".join(f"{metric} {value:.10g}" for (metric, _), value in found.items())
        text = f"{text}; the nearest plan needs {near}"
    return text, _by_metric(found)


def _least(problem: Problem, free: tuple[Limit, ...], kept: Iterable[Limit]) -> float | None:
    """The smallest value of the largest sum of `free` over the plans that meet `kept`; None where no plan does.

    With no `free` limits: 0 where a plan meets `kept`.
    """
    kept = tuple(kept)
    if len(free) == 1 and not kept:
        return free[0].least
    tables = Tables.of(replace(problem, limits=(*free, *kept), pairs={}))
    model = Model(tables, np.zeros(len(tables.item)))
    if free:
        base = max(limit.least for limit in free)
        costs = [np.concatenate(limit.cost) for limit in free]
        scale = max(float((cost - tables.floor(cost)[tables.item]).max()) for cost in costs) or 1.0
        slack = model.add_columns(np.ones(1), 0.0, np.inf)
        for limit, cost in zip(free, costs, strict=True):
            model.add_limit(cost, base - limit.fixed, scale, slack)
    for limit in kept:
        if np.isfinite(limit.most):
            model.add_limit(np.concatenate(limit.cost), limit.allowed - limit.fixed)
    chosen, _ = model.solve(GAP, SECONDS)
    return None if chosen is None else max((limit.total(chosen.tolist()) for limit in free), default=0.0)


def _nearest(problem: Problem, groups: dict[tuple[str, float], tuple[Limit, ...]]) -> dict[tuple[str, float], float]:
    """The exceeded values of the plan whose excesses, each relative to its limit, add up to the least."""
    tables = Tables.of(replace(problem, pairs={}))
    model = Model(tables, np.zeros(len(tables.item)))
    for (_, most), limits in groups.items():
        costs = [np.concatenate(limit.cost) for limit in limits]
        scale = max(float((cost - tables.floor(cost)[tables.item]).max()) for cost in costs) or 1.0
        slack = model.add_columns(np.array([scale / (abs(most) or scale)]), 0.0, np.inf)
        for limit, cost in zip(limits, costs, strict=True):
            model.add_limit(cost, limit.allowed - limit.fixed, scale, slack)
    chosen, _ = model.solve(GAP, SECONDS)
    assert chosen is not None, "every limit may be exceeded here"
    reached = {key: max(limit.total(chosen.tolist()) for limit in limits) for key, limits in groups.items()}
    return {key: value for key, value in reached.items() if not _holds(groups[key], value)}
