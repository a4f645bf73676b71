"""Time and proven gap of the solvers on tables of random numbers shaped like those of networks.

python -m graphwright.tools.bench.solvers --items 200 --problems 5

`network`: losses fall by a factor of four a bit, sizes, work and sensitivities of layers spread over orders of magnitude.
`uniform`: every loss and cost drawn by itself, the hardest tables there are; no network has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer

from ...search.problem import Limit, Problem, Solution
from ...search.solvers import dynamic, greedy, ilp, pareto
from .markdown import machine, markdown

BITS = np.arange(8.0, 0.0, -1.0)


def network(seed: int, items: int = 200, budget: float = 0.45) -> Problem:
    """Layers of 8 to 1 bits with limits on bytes, bit operations and latency at about `budget` of their ranges."""
    draw = np.random.default_rng(seed)
    shape = (items, len(BITS))
    size, work = np.exp(draw.normal(9, 1.2, items)), np.exp(draw.normal(9, 1.5, items))
    loss = np.exp(draw.normal(0, 1.5, items))[:, None] * 4.0**-BITS * np.exp(draw.normal(0, 0.2, shape))
    costs = {
        "weight_bytes": size[:, None] * BITS / 8,
        "bit_operations": work[:, None] * BITS * 8,
        "latency_us": np.exp(draw.normal(3, 1, items))[:, None] * (0.3 + 0.7 * BITS / 8) * np.exp(draw.normal(0, 0.15, shape)),
    }
    return _problem(loss, costs, {"weight_bytes": budget, "bit_operations": 1.05 * budget, "latency_us": 1.02 * budget})


def uniform(seed: int, items: int = 200, budget: float = 0.4) -> Problem:
    """Three limits, every number drawn by itself from 0 to 1."""
    draw = np.random.default_rng(seed)
    shape = (items, len(BITS))
    costs = {metric: draw.random(shape) for metric in ("a", "b", "c")}
    return _problem(draw.random(shape), costs, dict.fromkeys(costs, budget))


def _problem(loss: np.ndarray, costs: dict[str, np.ndarray], budgets: dict[str, float]) -> Problem:
    limits = []
    for metric, cost in costs.items():
        low, high = float(cost.min(axis=1).sum()), float(cost.max(axis=1).sum())
        limits.append(Limit(metric, tuple(cost), low + budgets[metric] * (high - low)))
    items = tuple(f"layer{i}" for i in range(len(loss)))
    return Problem(items, (tuple(f"int{bits:.0f}" for bits in BITS),) * len(loss), tuple(loss), tuple(limits))


def _timed(solve: Callable[[Problem], Solution], problem: Problem) -> tuple[Solution, float]:
    begin = time.process_time()
    return solve(problem), time.process_time() - begin


def main(
    items: Annotated[int, typer.Option(help="layers, 8 choices each")] = 200,
    problems: Annotated[int, typer.Option(help="tables of each kind; the worst is shown beside the median")] = 5,
    gap: Annotated[float, typer.Option(help="relative gap the integer program must prove")] = 1e-3,
) -> None:
    rows = []
    for kind, make in (("network", network), ("uniform", uniform)):
        tables = [make(seed, items) for seed in range(problems)]
        single = [replace(table, limits=table.limits[:1]) for table in tables]
        cases: list[tuple[str, int, Callable[[Problem], Solution], list[Problem]]] = [
            ("ilp", 3, lambda p: ilp.solve(p, gap), tables),
            ("greedy", 3, greedy.solve, tables),
            ("ilp", 1, lambda p: ilp.solve(p, gap), single),
            ("dynamic", 1, dynamic.solve, single),
            ("greedy", 1, greedy.solve, single),
        ]
        for name, limits, solve, given in cases:
            found = [_timed(solve, problem) for problem in given]
            bounds = [ilp.solve(problem, gap).bound or -np.inf for problem in given]
            above = [(s.loss - bound) / abs(s.loss) for (s, _), bound in zip(found, bounds, strict=True)]
            times = [seconds for _, seconds in found]
            rows.append(
                [kind, str(limits), name, f"{np.median(times):.2f}", f"{max(times):.2f}", f"{max(above):.3%}"]
            )  # fmt: skip
    begin = time.process_time()
    front = pareto.front(replace(network(0, items), limits=network(0, items).limits[:1]), "weight_bytes", gap=gap)
    rows.append(["network", "1", f"pareto, {len(front)} plans", *[f"{time.process_time() - begin:.2f}"] * 2, ""])
    typer.echo(f"\n{items} layers, {len(BITS)} choices, {problems} tables of each kind; {machine()}\n")
    typer.echo(markdown(["tables", "limits", "solver", "median (s)", "worst (s)", "above the proven bound"], rows))


if __name__ == "__main__":
    typer.run(main)
