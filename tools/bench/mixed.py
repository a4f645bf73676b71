"""Mixed precision, measured: accuracy against size for every scorer, rounding methods side by side, and predicted latency.

Every score is that of the compiled artifact on evaluation data that no scorer, no observer and no rounding pass has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...backends.base import example_inputs
from ...backends.registry import backend_for
from ...backends.target import Target
from ...ir.data import Calibration
from ...ir.errors import DataError
from ...passes.pipeline import Pipeline, parse
from ...passes.quantize.annotate import Quantize
from ...search.cost.bops import average_weight_bits
from ...search.cost.uniform import Pricing
from ...search.planner import Request, Surroundings, Tables, allocate, tabulate
from ...search.sensitivity import scorer_text
from ...search.sensitivity.base import Scorer
from ...search.store import Store
from ..defaults import search_pipeline
from ..job import Job
from ..predict import Predict
from ..sources import Source, resolve

Progress = Callable[[int, int, str], None]

#: Samples held out where no count is given.
HELD_OUT = 3000


@dataclass(frozen=True)
class Point:
    """One plan. bits: of a weight on average, as reached; seconds: of scoring, not of the plan."""

    model: str
    method: str
    bits: float
    score: float
    float_score: float
    seconds: float = 0.0

    @property
    def drop(self) -> float:
        """Points lost: the scores are shares, so 100 points are all."""
        return 100 * (self.float_score - self.score)


@dataclass(frozen=True)
class Bench:
    """One model with its data, ready to run plans on."""

    source: Source
    job: Job
    samples: int
    cache: Path | None

    @classmethod
    def of(
        cls, model: str, samples: int, evaluate: int | None, cache: Path | None, progress: Progress, held_out: bool = False
    ) -> Bench:
        """held_out: score on calibration samples behind the first `samples`, to choose by, instead of on evaluation samples."""
        source = resolve(model)
        batches = source.calibration(None, samples)
        calibration = None if batches is None else Calibration.for_program(source.program, batches)
        target = Target.parse("cpu")
        scored = held_out_accuracy(source, samples, evaluate) if held_out else source.evaluate(evaluate)
        job = Job(source.program, target, backend_for(target), calibration, scored, measure=False, progress=progress)
        return cls(source, job, samples, cache)

    def pipeline(self, text: str | None = None) -> Pipeline:
        """`text` parsed; by default the pipeline of a bit search."""
        return parse(search_pipeline(self.source.program) if text is None else text)

    def tables(self, pipeline: Pipeline, formats: Sequence[str], scorer: Scorer, time: bool = False) -> Tables:
        around = Surroundings(
            self.job.samples, self.source.labels(None, None, self.samples), Store(self.cache), self.job.seed, self.job.progress
        )
        pricing = Pricing(self.job.backend, self.job.target, time) if time else None
        return tabulate(self.source.program, pipeline, Request(tuple(formats), scorer), pricing, around)

    def point(self, method: str, pipeline: Pipeline, seconds: float = 0.0) -> Point:
        program, score = self.job.score(pipeline)
        return Point(
            self.source.program.name, method, average_weight_bits(program), score, self.job.float_row.score or 0.0, seconds
        )


def held_out_accuracy(source: Source, skip: int, count: int | None) -> Callable[[Predict], float]:
    """Share of right classes on the labelled calibration samples behind the first `skip`."""
    stop = skip + (count or HELD_OUT)
    labels, batches = source.labels(None, None, stop), source.calibration(None, stop)
    if labels is None or batches is None:
        raise DataError(f"'{source.program.name}' has no labelled calibration samples to hold out")
    inputs = tuple(torch.cat(column)[skip:] for column in zip(*batches, strict=True))

    def evaluate(predict: Predict) -> float:
        outputs = predict(*inputs)
        assert isinstance(outputs, torch.Tensor)
        return float((outputs.argmax(1) == labels[skip:]).float().mean())

    return evaluate


def fronts(
    bench: Bench, scorers: Sequence[Scorer], bits: Sequence[float], formats: Sequence[str], pipeline: Pipeline
) -> list[Point]:
    """For each scorer, and each limit on the average bits of a weight, the plan of least loss and its measured score."""
    points = []
    for scorer in scorers:
        tables = bench.tables(pipeline, formats, scorer)
        for limit in bits:
            solution = allocate(tables, {"average_bits": limit})
            points.append(bench.point(scorer_text(scorer), tables.pipeline(solution), tables.scores.seconds))
    return points


def with_bits(pipeline: Pipeline, bits: int) -> Pipeline:
    return Pipeline(tuple(replace(p, weight_bits=bits) if isinstance(p, Quantize) else p for p in pipeline))


@dataclass(frozen=True)
class Prediction:
    """A plan under a limit on its time: what the sum of its kernels predicts, and what a run takes. Microseconds.

    drift: what the program with the first format throughout takes among the plans, over what it took when formats were priced:
    the machine's clock, mostly.
    """

    model: str
    share: float
    limit: float
    predicted: float
    measured: float
    bits: float
    drift: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    @property
    def error_at_one_clock(self) -> float:
        return self.predicted * self.drift / self.measured - 1


def predictions(
    bench: Bench, scorer: Scorer, formats: Sequence[str], pipeline: Pipeline, shares: Sequence[float]
) -> list[Prediction]:
    """Plans for limits that lie at `shares` of the way from the fastest plan to the slowest one, timed in turns."""
    tables = bench.tables(pipeline, formats, scorer, time=True)
    free = next(limit for limit in tables.problem({}).limits if limit.metric == "microseconds")
    slowest = free.fixed + sum(float(row.max()) for row in free.cost)
    limits = [free.least + share * (slowest - free.least) for share in shares]
    solutions = [allocate(tables, {"microseconds": most}) for most in limits]
    first = {layer.origin: formats[0] for layer in tables.layers}
    timed = []
    for plan in [tables.split.with_formats(first), *(tables.pipeline(solution) for solution in solutions)]:
        program = bench.job.rewrite(plan).program
        compiled = bench.job.backend.compile(program, bench.job.target, bench.job.progress)
        timed.append((compiled, example_inputs(program)))
    reference, *measured = (1e3 * spent for spent in bench.job.backend.latencies(timed, 200))
    priced = tables.costs[formats[0]].total
    assert priced is not None
    return [
        Prediction(
            bench.source.program.name, share, most, s.totals["microseconds"], spent, s.totals["average_bits"], reference / priced
        )
        for share, most, s, spent in zip(shares, limits, solutions, measured, strict=True)
    ]
