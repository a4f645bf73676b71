"""Evolutionary search by real evaluations: EvoPress (Sieberling et al., 2024).

Losses of single layers need not add up: plans with a lower sum can be worse. So every candidate is really evaluated, and cheaply:
most of them on few samples. One generation, from one parent:

    offspring:  copies of the parent with one to three items a level up (dearer), then as many random items a level down as it
                takes to meet the limits again
    selection:  for each stage (survivors, samples): evaluate on so many samples, keep the best; in the last stage the parent
                competes too, and the one survivor is the next parent
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ...ir.content import content_key
from ...ir.errors import OptionError
from ..problem import Problem, Solution
from ..store import Store
from . import ilp
from .tables import Tables

#: Level changes a mutation may take, and the share of what was spent that must remain of what was given up for it.
MOST_CHANGES, LEAST_KEPT = 10, 0.8
#: Mutations tried for each offspring wanted; small problems have fewer neighbours than offspring.
TRIES = 50


@dataclass(frozen=True)
class Evolved:
    """fitness: the loss of the solution on the samples of the last stage; history: that of the parent after each generation."""

    solution: Solution
    fitness: float
    history: tuple[float, ...]
    evaluations: int


def solve(
    problem: Problem,
    evaluate: Callable[[tuple[int, ...], int], float],
    *,
    generations: int = 50,
    offspring: int = 32,
    stages: Sequence[tuple[int, int]] = ((8, 32), (2, 128), (1, 512)),
    seed: int = 0,
    start: Sequence[int] | None = None,
    store: Store | None = None,
    key: str = "",
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Evolved:
    """The fittest plan within the limits after `generations`, from `start` (the integer program's plan where None).

    The search is a function of the seed and of the losses, each of which is evaluated once and kept in `store`: a run that was
    killed replays what it had from there and ends in the plan that it would have found undisturbed.

    Args:
        evaluate: (chosen, samples) -> loss on the first `samples` samples, lower is better; one that is not a number ranks last.
        stages: (survivors, samples) of each selection; the first is out of `offspring`.
        key: names all that a loss depends on besides plan and samples: program, data, quantizer.

    Raises:
        InfeasibleError: no plan meets the limits.
        OptionError: stages that do not narrow down to one survivor on growing samples, or a start that exceeds a limit.
    """
    _check_stages(stages, offspring)
    tables = Tables.of(problem)
    parent = tuple(ilp.solve(problem).chosen if start is None else start)
    if not tables.fits(np.array(parent)):
        raise OptionError(f"the plan to start from exceeds a limit: it has {problem.totals(parent)}")
    kept, seen, history = store or Store(), {}, []

    def fitness(chosen: tuple[int, ...], samples: int) -> float:
        if (chosen, samples) not in seen:
            compute = lambda: float(evaluate(chosen, samples))  # noqa: E731
            value = float(kept.remember("evaluation", content_key(key, chosen, samples), compute))
            seen[chosen, samples] = value if value == value else np.inf
        return seen[chosen, samples]

    levels = _levels(problem, tables)
    best = fitness(parent, stages[-1][1])
    for generation in range(generations):
        draw = np.random.default_rng([seed, generation])
        candidates = _offspring(tables, levels, parent, offspring, draw)
        for number, (survivors, samples) in enumerate(stages):
            if number == len(stages) - 1:
                candidates.append(parent)
            values = [fitness(chosen, samples) for chosen in candidates]
            order = sorted(range(len(candidates)), key=values.__getitem__)
            candidates = [candidates[i] for i in order[:survivors]]
        parent, best = candidates[0], fitness(candidates[0], stages[-1][1])
        history.append(best)
        progress(generation + 1, generations, f"loss {best:.6g} after {len(seen)} evaluations")
    return Evolved(Solution.of(problem, parent), best, tuple(history), len(seen))


def _check_stages(stages: Sequence[tuple[int, int]], offspring: int) -> None:
    survivors = [offspring + 1, *(count for count, _ in stages)]
    samples = [0, *(count for _, count in stages)]
    falls = all(a > b for a, b in pairwise(survivors))
    grows = all(a < b for a, b in pairwise(samples))
    if not (len(stages) and falls and grows and survivors[-1] == 1):
        raise OptionError(
            f"stages {tuple(stages)} of (survivors, samples) must narrow {offspring} offspring down to 1 on growing samples"
        )


def _levels(problem: Problem, tables: Tables) -> list[np.ndarray]:
    """For each item its choices from the cheapest to the dearest by the first limit, by falling loss where nothing is limited."""
    rows = tables.limits[0].cost if tables.limits else [-row for row in problem.loss]
    return [np.argsort(row, kind="stable") for row in rows]


def _offspring(
    tables: Tables, levels: list[np.ndarray], parent: tuple[int, ...], wanted: int, draw: np.random.Generator
) -> list[tuple[int, ...]]:
    """Distinct plans within the limits, none the parent; fewer than wanted where the tries do not find as many."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(TRIES * wanted):
        mutant = _mutant(tables, levels, parent, draw)
        if mutant is not None and mutant != parent:
            found[mutant] = None
        if len(found) == wanted:
            break
    return list(found)


def _mutant(
    tables: Tables, levels: list[np.ndarray], parent: tuple[int, ...], draw: np.random.Generator
) -> tuple[int, ...] | None:
    """None where the limits do not hold after the most changes, or far more was given up than spent."""
    rank = np.array([int(np.flatnonzero(order == c)[0]) for order, c in zip(levels, parent, strict=True)])
    top = np.array([len(order) - 1 for order in levels])

    def plan() -> np.ndarray:
        return np.array([order[r] for order, r in zip(levels, rank, strict=True)])

    flips = min(draw.integers(1, 4, size=2).tolist())
    before = tables.over(np.array(parent))
    for _ in range(flips):
        able = np.flatnonzero(rank < top)
        if able.size:
            rank[draw.choice(able)] += 1
    raised = tables.over(plan())
    changes = flips
    while not tables.fits(plan()):
        able = np.flatnonzero(rank > 0)
        if changes == MOST_CHANGES or not able.size:
            return None
        rank[draw.choice(able)] -= 1
        changes += 1
    after = tables.over(plan())
    if tables.limits and raised[0] > after[0] and (raised[0] - before[0]) < LEAST_KEPT * (raised[0] - after[0]):
        return None
    return tuple(plan().tolist())
