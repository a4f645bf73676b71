"""One model to compress: runs a pipeline over it, compiles and measures the result, and keeps the float baseline for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..backends.artifact import Artifact
from ..backends.base import Backend, Compiled, example_inputs
from ..backends.target import Target
from ..ir.content import content_key, program_hash
from ..ir.data import Calibration
from ..ir.program import Program, Stage
from ..passes.base import PassContext, Training
from ..passes.manager import Instrument, PassManager, PipelineResult
from ..passes.pipeline import Pipeline, parse
from ..search.channels import macs_of
from ..search.cost.bops import FLOAT_BITS, average_weight_bits, bit_operations
from .plan import Plan
from .predict import Predict, artifact_predict, program_predict, watched
from .progress import silent
from .report import Measurement, Report


@dataclass(frozen=True)
class Result:
    """What `optimize` returns: the rewritten program, the compiled artifact, the evidence, and the plan that replays it."""

    program: Program
    artifact: Artifact
    report: Report
    plan: Plan


@dataclass
class Job:
    """What stays the same over all pipelines tried on one model.

    Attributes:
        limits: constraints by name, as the user stated them.
        measure: time float model and result (the target must run on this machine).
        decided: what was chosen before any pipeline runs, by name; it goes to every plan.
    """

    source: Program
    target: Target
    backend: Backend
    samples: Calibration | None = None
    evaluate: Callable[[Predict], float] | None = None
    limits: dict[str, float] = field(default_factory=dict)
    measure: bool = True
    seed: int = 0
    instruments: Sequence[Instrument] = ()
    progress: Callable[[int, int, str], None] = silent
    training: Training = field(default_factory=Training)
    _canonical: Program | None = None
    memo: dict[str, Any] = field(default_factory=dict)
    decided: dict[str, Any] = field(default_factory=dict)

    def rewrite(self, pipeline: Pipeline) -> PipelineResult:
        """Runs the passes only."""
        context = PassContext(
            calibration=self.samples, training=self.training, seed=self.seed, progress=self.progress, memo=self.memo
        )
        first = _FirstCanonical()
        outcome = PassManager((*self.instruments, PassProgress(self.progress), first)).run(self.source, pipeline, context)
        self._canonical = self._canonical or first.program
        return outcome

    def run(self, pipeline: Pipeline, search: dict[str, Any] | None = None) -> Result:
        """Runs the passes, compiles and measures. search: how the pipeline's formats were chosen, for the plan."""
        start = time.perf_counter()
        outcome = self.rewrite(pipeline)
        compiled = self.backend.compile(outcome.program, self.target, self.progress)
        chosen = {**self.decided, **(search or {})}
        plan = Plan(str(pipeline), str(self.target), self.source.name, program_hash(self.source), self.limits, self.seed, chosen)
        rows = [row.to_json() for row in outcome.certificate]
        artifact = Artifact.build(outcome.program, [compiled], certificate=rows, plan=plan.to_json())
        integer = outcome.program.stage is Stage.INTEGER
        measured = self.float_row, self._row(outcome.program, compiled, artifact)
        report = Report(
            name=self.source.name,
            target=str(self.target),
            pipeline=str(pipeline),
            certificate=outcome.certificate,
            kernels=compiled.kernels,
            rows=measured,
            seconds=round(time.perf_counter() - start, 2),
            notes=self._notes(outcome, compiled, measured[1]),
            average_bits=average_weight_bits(outcome.program) if integer else None,
            bops=bit_operations(outcome.program) / max(self.macs * FLOAT_BITS**2, 1) if integer else None,
            macs=macs_of(outcome.program) / max(self.macs, 1),
        )
        return Result(outcome.program, artifact, report, plan)

    def score(self, pipeline: Pipeline) -> tuple[Program, float]:
        """The program a pipeline makes and its score, on the compiled artifact where that runs here: it is faster than torch."""
        assert self.evaluate is not None
        program = self.rewrite(pipeline).program
        if not self.runs_here:
            return program, float(self.evaluate(program_predict(program)))
        compiled = self.backend.compile(program, self.target, self.progress)
        return program, float(self.evaluate(artifact_predict(Artifact.build(program, [compiled]))))

    @cached_property
    def runs_here(self) -> bool:
        return any(info.target == self.target and info.runs for info in self.backend.targets())

    @cached_property
    def float_row(self) -> Measurement:
        """Score, parameter bytes and latency of the float model, the latter in the form a backend compiles."""
        size = sum(t.numel() * t.element_size() for t in self.source.parameters().values())
        score = None if self.evaluate is None else self.float_evaluation[0]
        latency = None
        if self.measure and (self.runs_here or "latency" in self.limits):
            compiled = self.backend.compile(self.float_program(), self.target, self.progress)
            latency = self._latency(compiled, self.source)
        return Measurement("float", score, size, latency)

    @cached_property
    def float_evaluation(self) -> tuple[float, str]:
        """Score of the float model, and a key of what it was scored on: the samples that `evaluate` shows, and that score."""
        assert self.evaluate is not None
        self.progress(0, 1, "evaluate float")
        predict, seen = watched(program_predict(self.source))
        score = float(self.evaluate(predict))
        self.progress(1, 1, "evaluate float")
        return score, content_key(seen, score)

    def _latency(self, compiled: Compiled, program: Program) -> float | None:
        """Milliseconds of a run, measured here, or the sum of what its kernels took on the target elsewhere; None: neither."""
        if self.runs_here:
            return self.backend.latency(compiled, example_inputs(program))
        recorded = self.backend.recorded(compiled)
        return None if recorded is None else recorded.total / 1e3

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the float model."""
        return macs_of(self.float_program())

    def float_program(self) -> Program:
        if self.source.stage >= Stage.CANONICAL:
            return self.source
        self._canonical = self._canonical or PassManager().run(self.source, parse("canonicalize")).program
        return self._canonical

    def _row(self, program: Program, compiled: Compiled, artifact: Artifact) -> Measurement:
        """The result, measured. What cannot run here stays None."""
        run = self.measure and self.runs_here
        score = latency = None
        if self.evaluate is not None:
            self.progress(0, 1, "evaluate result")
            # Where the target is another machine the torch reference stands in: the artifact equals it bit for bit.
            score = float(self.evaluate(artifact_predict(artifact) if run else program_predict(program)))
            self.progress(1, 1, "evaluate result")
        if self.measure:
            latency = self._latency(compiled, program)
        return Measurement(program.stage.label, score, artifact.size, latency)

    def _notes(self, outcome: PipelineResult, compiled: Compiled, row: Measurement) -> tuple[str, ...]:
        notes = []
        islands = [k for k in compiled.kernels if k.kind == "island"]
        if islands:
            notes.append(f"{len(islands)} float islands inside the integer program: {', '.join(k.name for k in islands[:8])}")
        if self.evaluate is None:
            notes.append("no accuracy: it takes evaluate=... in Python, or a reference model, to have it measured")
        if not self.runs_here:
            known = row.latency_ms is not None
            latency = "latency is the sum of its kernels' times on such a GPU elsewhere" if known else "no latency"
            notes.append(f"the target does not run on this machine: {latency}, and the score is the torch reference's")
        if outcome.program.stage is not Stage.INTEGER:
            notes.append(f"the program is in stage {outcome.program.stage.label}: not integer arithmetic")
        return tuple(notes)


class _FirstCanonical(Instrument):
    """Keeps the first canonical program of a run: the float model in the form a backend compiles."""

    program: Program | None = None

    def after(self, row, total, program):
        if self.program is None and program.stage is Stage.CANONICAL:
            self.program = program


class PassProgress(Instrument):
    """Reports each pass to a `progress` callable."""

    def __init__(self, progress: Callable[[int, int, str], None]) -> None:
        self._progress = progress

    def before(self, index, total, instance, program):
        self._progress(index - 1, total, "passes")

    def after(self, row, total, program):
        self._progress(row.index, total, "passes")
