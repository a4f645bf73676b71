"""Ranks under limits: a pipeline with one factorization pass in, the same pipeline with its ranks written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..backends.base import Backend
from ..backends.registry import backend_for
from ..backends.target import Target
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import PassContext
from ..passes.factorize.base import Factorize
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline
from ..search.cost.ranks import priced
from ..search.cost.uniform import Pricing
from ..search.planner import Surroundings
from ..search.problem import InfeasibleError, Solution
from ..search.ranks import RankTables, rank_tables
from .bit_search import in_users_terms

#: Limit -> metric of the tables; all are relative to the program as the passes before the factorization leave it.
LIMITS = {"size": "weight_bytes", "macs": "macs", "latency": "microseconds"}

#: Ranks of a layer to choose from; a limit on latency compiles the program once for each.
STEPS = 8


@dataclass(frozen=True)
class RankPlan:
    """pipeline: replays the plan. whole: metric -> value with every layer whole."""

    pipeline: Pipeline
    solution: Solution
    tables: RankTables
    whole: Mapping[str, float]


def plan_ranks(program: Program, pipeline: Pipeline, limits: Mapping[str, float], target: str, around: Surroundings) -> RankPlan:
    """Least loss within `limits` (see LIMITS), each a share of the whole.

    With a limit on latency, every rank is timed on this machine in programs that the whole pipeline made, and ranks that are not
    faster than their layer are not considered.

    Raises:
        OptionError: not exactly one factorization in the pipeline, or ranks in it already.
        InfeasibleError: naming each limit that no plan meets and the least value there is.
    """
    before, method, after = pipeline.cut_at(Factorize, "search for ranks", "factorization")
    if method.ranks or method.ratio is not None or method.energy is not None:
        raise OptionError(f"the pipeline says already how far {method.name} goes; leave ratio, energy and ranks out for a search")
    context = PassContext(calibration=around.samples, seed=around.seed, progress=around.progress)
    ready = PassManager().run(program, before, context).program
    chosen = Target.parse(target)
    backend = backend_for(chosen)
    tables = rank_tables(ready, method, around, backend.channel_multiple(chosen), STEPS)
    if "latency" in limits:
        tables = priced(ready, tables, after, Pricing(backend, chosen, runs_here(backend, chosen)), around)
    problem = tables.problem({})
    whole = problem.totals([len(row) - 1 for row in problem.choices])
    absolute = {LIMITS[name]: share * whole[LIMITS[name]] for name, share in limits.items()}
    try:
        solution, found = tables.allocate(absolute)
    except InfeasibleError as error:
        raise in_users_terms(error, {LIMITS[name]: (name, whole[LIMITS[name]]) for name in limits}) from error
    passes = (*before, *(() if found is None else (found,)), *after)
    return RankPlan(Pipeline(passes), solution, tables, whole)


def runs_here(backend: Backend, target: Target) -> bool:
    return any(row.target == target and row.runs for row in backend.targets())
