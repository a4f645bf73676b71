"""Mixed precision in `optimize`: limits a user states become a plan, and the plan is measured before it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..ir.content import content_key
from ..ir.errors import OptionError, UnknownNameError
from ..passes.pipeline import Pipeline
from ..passes.quantize.formats import parse_integer_format
from ..search.cost.bops import FLOAT_BITS
from ..search.cost.uniform import Pricing
from ..search.planner import Request, Surroundings, Tables, allocate, evolve, tabulate
from ..search.problem import InfeasibleError, Solution
from ..search.sensitivity import parse_scorers
from ..search.sensitivity.base import Scorer
from ..search.sensitivity.statistics import calibration_warning
from ..search.solvers import SOLVERS, bisection, pareto
from ..search.solvers.bisection import Evaluation
from ..search.store import Store
from .job import Job, Result
from .report import SearchEvidence

#: Limit of `optimize` -> metric of the planner.
METRICS = {"size": "artifact_bytes", "latency": "microseconds", "bops": "bops", "average_bits": "average_bits"}
#: Plans tried where a result is a little over a limit that was predicted to hold.
ATTEMPTS = 3
#: Time for each point of the front that the report draws, where it takes an integer program.
FRONT_SECONDS = 1.0


@dataclass(frozen=True)
class BitSearch:
    """How to choose a weight format for every layer.

    Attributes:
        formats: to choose from, such as int8, int4, int2.
        scorer: name of a scorer, with options as in pipeline text, such as `hessian-trace{probes=32}`.
        solver: `ilp`, `dynamic`, `greedy`, or `evolutionary`, which runs whole plans on the calibration samples.
        minimize: a limit's name: the least of it whose loss of score stays within `max_drop`; None: least loss within the limits.
        labels: integer classes, one a calibration sample, for scorers that need them.
        cache: folder for scores, prices and evaluations; None: nothing is kept.
    """

    formats: tuple[str, ...] = ("int8", "int4", "int2")
    scorer: str = "hessian-trace"
    solver: str = "ilp"
    minimize: str | None = None
    labels: torch.Tensor | None = None
    cache: Path | None = None

    def check(self) -> None:
        """Refuses names that nothing is called, and a scorer without its labels, before anything is computed.

        Raises:
            OptionError, UnknownNameError: formats, scorer, solver or metric. DataError: labels that the scorer needs are missing.
        """
        scorer = self.parsed_scorer()
        scorer.require_labels(self.labels)
        for name in Request(self.formats, scorer).formats:
            parse_integer_format(name)
        if self.solver not in (*SOLVERS, "evolutionary"):
            raise UnknownNameError("solver", self.solver, (*SOLVERS, "evolutionary"))
        if self.minimize is not None and self.minimize not in METRICS:
            raise UnknownNameError("metric to minimize", self.minimize, METRICS)

    def parsed_scorer(self) -> Scorer:
        found = parse_scorers(self.scorer)
        if len(found) != 1:
            raise OptionError(f"a bit search takes one scorer, not '{self.scorer}'")
        if found[0].of != "weights":
            raise OptionError(f"scorer {found[0].name} scores {found[0].of}, and a bit search chooses weight formats")
        return found[0]


def search_bits(job: Job, pipeline: Pipeline, options: BitSearch) -> Result:
    """Scores, prices, solves, and runs the plan.

    Raises:
        InfeasibleError: limits no plan meets. ConstraintError: the plan, measured, misses a limit.
        OptionError: no calibration, or a pipeline that cannot be searched.
    """
    around = Surroundings(job.samples, options.labels, Store(options.cache), job.seed, job.progress, job.training, job.memo)
    pricing = Pricing(job.backend, job.target, job.measure and job.runs_here)
    tables = tabulate(job.source, pipeline, Request(options.formats, options.parsed_scorer()), pricing, around)
    evaluations: tuple[Evaluation, ...] = ()
    if options.minimize is not None:
        found = _cheapest(job, tables, options, around.store)
        solution, evaluations = found.solution, found.evaluations
        result = job.run(tables.pipeline(solution), _described(options, tables, solution))
    else:
        result, solution = _within_limits(job, tables, options, around)
    result.report.require(job.limits)
    metric = METRICS[options.minimize or next(name for name in job.limits if name in METRICS)]
    evidence = _evidence(tables, metric, solution, evaluations, result.report.rows[1].score)
    warning = calibration_warning(tables.scores)
    notes = result.report.notes if warning is None else (*result.report.notes, warning)
    return replace(result, report=replace(result.report, search=evidence, notes=notes))


def _evidence(
    tables: Tables, metric: str, solution: Solution, evaluations: tuple[Evaluation, ...], score: float | None
) -> SearchEvidence:
    """What the report shows: the plan among the best plans of every value of the metric, and what was really evaluated."""
    problem = tables.problem({})
    if score is not None and all(e.solution.chosen != solution.chosen for e in evaluations):
        evaluations = (*evaluations, Evaluation(solution, score))
    front = tuple(pareto.front(problem, metric, points=16, seconds=FRONT_SECONDS))
    return SearchEvidence(tables.formats(solution.chosen), problem, metric, front, solution, evaluations, (tables.scores,))


def _within_limits(job: Job, tables: Tables, options: BitSearch, around: Surroundings) -> tuple[Result, Solution]:
    """Least predicted loss within the limits. Where the result is over a limit by what prediction missed (the certificate's
    bytes, a kernel's time beside other neighbours), the limit is tightened by that much and solved again."""
    limits = absolute_limits(job)
    for attempt in range(1, ATTEMPTS + 1):
        evolved = options.solver == "evolutionary"
        try:
            solution = evolve(tables, limits, around) if evolved else allocate(tables, limits, options.solver)
        except InfeasibleError as error:
            raise in_users_terms(error, {METRICS[name]: (name, value) for name, value in wholes(job).items()}) from error
        result = job.run(tables.pipeline(solution), _described(options, tables, solution))
        over = {name: why for name, why in result.report.unmet(job.limits).items() if name in METRICS}
        if not over or attempt == ATTEMPTS:
            return result, solution
        reached = result.report.reached()
        for name in over:
            limits[METRICS[name]] *= job.limits[name] / reached[name]
    raise AssertionError("unreachable")


def in_users_terms(error: InfeasibleError, wholes: Mapping[str, tuple[str, float]], remark: str = "") -> InfeasibleError:
    """The error with its smallest values also as shares, which is how limits are stated. wholes: metric -> (limit, whole)."""
    shares = [(*wholes[metric], value) for metric, value in error.smallest.items() if metric in wholes]
    stated = ", ".join(
        f"{name}={math.ceil(1e4 * value / whole) / 1e4:g}" for name, whole, value in shares if whole not in (0.0, 1.0)
    )
    return InfeasibleError(f"{error}; as limits: {stated}{remark}", error.smallest) if stated else error


def absolute_limits(job: Job) -> dict[str, float]:
    """The job's limits in the planner's units."""
    whole = wholes(job)
    return {METRICS[name]: limit * whole[name] for name, limit in job.limits.items() if name in METRICS}


def wholes(job: Job) -> dict[str, float]:
    """What each limit is a share of, in the planner's units."""
    base = job.float_row
    return {
        "size": float(base.size_bytes),
        "latency": (base.latency_ms or 0.0) * 1e3,
        "bops": float(job.macs * FLOAT_BITS**2),
        "average_bits": 1.0,
    }


def _cheapest(job: Job, tables: Tables, options: BitSearch, store: Store) -> bisection.Found:
    """The least of one metric whose measured score stays within `max_drop`: bisection over the front, real evaluations."""
    name = options.minimize or ""
    if options.solver != "ilp":
        raise OptionError(f"minimize={name} walks the Pareto front of integer programs: leave out solver={options.solver}")
    if "max_drop" not in job.limits:
        raise OptionError(f"minimize={name} needs the limit max_drop, and evaluate=... to hold it to")
    problem = tables.problem(absolute_limits(job))
    front = pareto.front(problem, METRICS[name])
    samples = [data.samples if data is not None else () for data in (job.samples, job.training.samples)]
    # The last passes differ between plans in the formats alone, which `chosen` stands for.
    before, after = str(tables.split.before), str(tables.split.after)
    score, scored_on = job.float_evaluation
    return bisection.solve(
        front,
        METRICS[name],
        lambda chosen: job.score(tables.split.with_formats(tables.formats(chosen)))[1],
        score - job.limits["max_drop"],
        store=store,
        key=content_key(job.source, before, tables.split.quantize, after, samples, job.seed, scored_on),
        progress=job.progress,
    )


def _described(options: BitSearch, tables: Tables, solution: Solution) -> dict[str, Any]:
    return {
        "formats": list(options.formats),
        "scorer": options.scorer,
        "solver": options.solver,
        "minimize": options.minimize,
        "predicted": {name: round(value, 4) for name, value in solution.totals.items()},
        "loss": solution.loss,
        "gap": solution.gap,
        "layers": tables.formats(solution.chosen),
    }
