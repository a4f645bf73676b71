"""Bit allocation: from limits a user states to the pipeline that meets them.

    passes before quantize -> float program -> scores, costs, limits -> Problem -> solver
                                                                                     |
                  passes before quantize, quantize{weights=[layer=format, ...]}, passes after

The plan is the pipeline: the option `weights` of its `quantize` pass names every layer's format, so its text alone replays it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..ir.content import content_key
from ..ir.data import Calibration
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import Pass, PassContext, Training
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline
from ..passes.quantize.annotate import Quantize
from ..passes.quantize.formats import parse_integer_format
from ..passes.quantize.lower_integer import LowerInteger
from .cost.uniform import FormatCosts, Pricing, uniform_costs
from .plan_loss import PlanLoss
from .problem import Limit, Problem, Solution
from .sensitivity.base import Layer, Scorer, Scores, Task
from .sensitivity.layers import weight_layers
from .solvers import evolutionary, solve
from .store import Store

Progress = Callable[[int, int, str], None]

#: What a limit bounds; all are absolute here. `tools.optimize` turns ratios into these.
METRICS = {
    "average_bits": "bits of a weight, averaged over the weights of all layers searched",
    "artifact_bytes": "bytes of the compiled library",
    "bops": "bit operations: multiply-accumulates times bits of the weight times bits of the activation",
    "microseconds": "time of a run, from kernels timed in place on this machine",
}


#: Evolutionary search: generations, and plans tried in each.
GENERATIONS, OFFSPRING = 50, 32


@dataclass(frozen=True)
class Request:
    """What to search: weight formats to choose from, by name, and which score to minimize."""

    formats: tuple[str, ...]
    scorer: Scorer

    def __post_init__(self) -> None:
        if not self.formats:
            raise OptionError("a search needs at least one weight format, such as int8,int4,int2")


@dataclass(frozen=True)
class Surroundings:
    """What a search may use: data, a place to keep results, a place to report progress. samples None: no calibration."""

    samples: Calibration | None
    labels: torch.Tensor | None = None
    store: Store = field(default_factory=Store)
    seed: int = 0
    progress: Progress = lambda done, total, what: None
    training: Training = field(default_factory=Training)
    #: What passes remember, see `PassContext`; whoever runs the plan shares it, so that nothing is trained twice.
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """A pipeline cut at its one `quantize` pass."""

    before: Pipeline
    quantize: Quantize
    after: Pipeline

    @classmethod
    def of(cls, pipeline: Pipeline) -> Split:
        """Raises OptionError where there is not exactly one `quantize`, or where it names formats already."""
        before, quantize, after = pipeline.cut_at(Quantize, "bit search", "quantize pass")
        if quantize.weights:
            raise OptionError("the pipeline names weight formats already (quantize{weights=[...]}); leave them out for a search")
        return cls(before, quantize, after)

    def with_formats(self, formats: Mapping[str, str]) -> Pipeline:
        """The whole pipeline with every layer's format written into `quantize`."""
        rules = tuple(f"{origin}={name}" for origin, name in formats.items())
        return Pipeline((*self.before, dataclasses.replace(self.quantize, weights=rules), *self.after))

    def uniform(self, name: str) -> Pipeline:
        """The shortest pipeline from the float program to integers with one format throughout, for pricing."""
        lower: list[Pass] = [p for p in self.after if isinstance(p, LowerInteger)]
        if not lower:
            raise OptionError("a bit search prices integer programs, but the pipeline has no lower-integer pass")
        return Pipeline((dataclasses.replace(self.quantize, weights=(f"*={name}",)), *lower))


@dataclass(frozen=True)
class Tables:
    """Everything a solver may ask of one program: made once, solved for any limits. costs: empty where nothing was priced."""

    split: Split
    program: Program
    layers: tuple[Layer, ...]
    scores: Scores
    costs: Mapping[str, FormatCosts]

    def problem(self, limits: Mapping[str, float]) -> Problem:
        """The allocation problem under `limits`; every metric is counted, those without a limit up to infinity."""
        for metric in limits:
            if not self._counted(metric):
                raise OptionError(
                    f"a limit on {metric} needs prices; microseconds need a target that runs on this machine, or one for which "
                    "the times of all kernels are recorded"
                )
        every = {metric: limits.get(metric, math.inf) for metric in METRICS}
        return Problem(
            self.scores.layers,
            (self.scores.choices,) * len(self.layers),
            tuple(self.scores.loss),
            tuple(self._limit(metric, most) for metric, most in every.items() if self._counted(metric)),
            self.scores.pairs,
        )

    def pipeline(self, solution: Solution) -> Pipeline:
        return self.split.with_formats(self.formats(solution.chosen))

    def formats(self, chosen: Sequence[int]) -> dict[str, str]:
        return {layer: self.scores.choices[c] for layer, c in zip(self.scores.layers, chosen, strict=True)}

    def _counted(self, metric: str) -> bool:
        if metric == "average_bits":
            return True
        return bool(self.costs) and (metric != "microseconds" or all(c.total is not None for c in self.costs.values()))

    def _limit(self, metric: str, most: float) -> Limit:
        if metric == "average_bits":
            return average_bits(self.layers, self.scores.choices, most)
        if metric == "bops":
            rows = self._rows(lambda layer, name: self.costs[name].bops[layer.origin])
            return Limit(metric, rows, most, next(iter(self.costs.values())).fixed_bops)
        if metric == "artifact_bytes":
            rows = self._rows(lambda layer, name: self.costs[name].bytes[layer.origin])
            # Code differs a little between formats; the largest is on the safe side.
            return Limit(metric, rows, most, max(c.fixed_bytes for c in self.costs.values()))
        rows = self._rows(lambda layer, name: self.costs[name].microseconds[layer.origin])
        # Ops between layers are the same whatever the formats: the median of the measurements counts.
        fixed = [c.fixed_microseconds for c in self.costs.values() if c.fixed_microseconds is not None]
        return Limit(metric, rows, most, float(np.median(fixed)))

    def _rows(self, cost: Callable[[Layer, str], float]) -> tuple[np.ndarray, ...]:
        return tuple(np.array([cost(layer, name) for name in self.scores.choices], dtype=np.float64) for layer in self.layers)


def average_bits(layers: Sequence[Layer], choices: Sequence[str], most: float) -> Limit:
    """At most `most` bits a weight, on average over all weights of the layers."""
    whole = sum(layer.weight.numel() for layer in layers)
    widths = np.array([float(parse_integer_format(name).bits) for name in choices])
    return Limit("average_bits", tuple(widths * layer.weight.numel() / whole for layer in layers), most)


def prepare(program: Program, pipeline: Pipeline, around: Surroundings) -> tuple[Split, Program]:
    """The pipeline cut at `quantize`, and the float program that reaches it."""
    split = Split.of(pipeline)
    context = PassContext(
        calibration=around.samples, training=around.training, seed=around.seed, progress=around.progress, memo=around.memo
    )
    return split, PassManager().run(program, split.before, context).program


def score(program: Program, split: Split, request: Request, around: Surroundings) -> tuple[tuple[Layer, ...], Scores]:
    """Scores of every layer in every format, kept in the store."""
    layers = weight_layers(program, split.quantize, request.formats)
    samples = around.samples.samples if around.samples is not None else ()
    key = content_key(program, samples, around.labels, request.formats, split.quantize, around.seed)
    task = Task(program, layers, request.formats, around.samples, around.labels, around.store, key, around.seed, around.progress)
    name = content_key(key, request.scorer)
    return layers, Scores.from_json(around.store.remember("scores", name, lambda: request.scorer.score(task).to_json()))


def tabulate(program: Program, pipeline: Pipeline, request: Request, pricing: Pricing | None, around: Surroundings) -> Tables:
    """Scores and costs of every layer in every format: what `allocate` needs, made once and kept.

    pricing: None prices nothing; then only `average_bits` can be limited.
    """
    if around.samples is None:
        raise OptionError("a bit search needs calibration samples: pass calibration=... (CLI: --calibration FILE.npz)")
    for name in request.formats:
        parse_integer_format(name)
    split, ready = prepare(program, pipeline, around)
    layers, scores = score(ready, split, request, around)
    costs = {}
    if pricing is not None:
        costs = uniform_costs(ready, split.uniform, request.formats, pricing, around.samples, around.store, around.progress)
    return Tables(split, ready, layers, scores, costs)


def allocate(tables: Tables, limits: Mapping[str, float], solver: str = "ilp") -> Solution:
    """The plan of least loss within `limits`.

    Raises:
        InfeasibleError: naming each limit that no plan meets and the least value there is.
    """
    return solve(tables.problem(limits), solver)


def evolve(tables: Tables, limits: Mapping[str, float], around: Surroundings) -> Solution:
    """The plan within `limits` whose loss, with all its layers rounded at once, is the least that EvoPress finds.

    It starts from the integer program's plan, so that it is never worse than that on the samples.

    Raises:
        InfeasibleError: as `allocate`.
    """
    task = Task(tables.program, tables.layers, tables.scores.choices, around.samples, seed=around.seed)
    loss = PlanLoss(task)
    found = evolutionary.solve(
        tables.problem(limits),
        loss,
        generations=GENERATIONS,
        offspring=OFFSPRING,
        stages=_stages(loss.samples),
        seed=around.seed,
        store=around.store,
        key=content_key(tables.program, around.samples and around.samples.samples, tables.scores.choices, tables.split.quantize),
        progress=around.progress,
    )
    return found.solution


def _stages(samples: int) -> list[tuple[int, int]]:
    """(survivors, samples) on a sixteenth, a quarter and all of the samples; fewer where there are too few samples."""
    counts = {max(1, samples // part): survivors for survivors, part in ((8, 16), (2, 4), (1, 1))}
    return [(survivors, count) for count, survivors in counts.items()]
