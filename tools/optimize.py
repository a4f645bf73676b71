"""`optimize`: from a trained model to one deployable artifact, with evidence for every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..backends.artifact import Artifact
from ..backends.base import Backend, Compiled, example_inputs
from ..backends.registry import backend_for
from ..backends.target import Target
from ..ir.capture import capture
from ..ir.data import Calibration
from ..ir.errors import OptionError, UnknownNameError
from ..ir.load import load_program
from ..ir.program import Program, Stage
from ..passes.base import PassContext
from ..passes.manager import Instrument, PassManager, PipelineResult
from ..passes.pipeline import Pipeline, parse
from .plan import Plan
from .predict import Predict, artifact_predict, program_predict
from .progress import silent
from .report import Measurement, Report

#: What `optimize` runs where no pipeline is given: 8-bit weights and activations, integer arithmetic throughout.
DEFAULT_PIPELINE = "canonicalize,equalize,quantize,align-scales,correct-bias,lower-integer"

#: Limits a user may set; each names what it bounds.
CONSTRAINTS = {
    "max_drop": "largest loss of the evaluate() score, absolute",
    "size": "artifact bytes over the float model's parameter bytes",
    "latency": "latency over the float artifact's latency, measured on this machine",
}

Model = torch.nn.Module | ExportedProgram | Program | str | Path


@dataclass(frozen=True)
class Result:
    """What `optimize` returns: the rewritten program, the compiled artifact, the evidence, and the plan that replays it."""

    program: Program
    artifact: Artifact
    report: Report
    plan: Plan


def as_program(model: Model, example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None) -> Program:
    """Any accepted kind of model as a Program; a path is an ONNX file or a torch.export archive."""
    if isinstance(model, Program):
        return model
    if isinstance(model, (str, Path)):
        return load_program(model)
    return capture(model, example_inputs)


def optimize(
    model: Model,
    target: str = "cpu",
    *,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Predict], float] | None = None,
    constraints: dict[str, float] | None = None,
    pipeline: str | Pipeline = DEFAULT_PIPELINE,
    measure: bool = True,
    seed: int = 0,
    instruments: Sequence[Instrument] = (),
    progress: Callable[[int, int, str], None] = silent,
) -> Result:
    """Compresses a trained model and compiles it for a target.

    Args:
        model: a module, an ExportedProgram, a Program, or the path of an ONNX file or .pt2 archive.
        target: `cpu` (this machine), `x86[:level]` or `arm64[:core]`; see `graphwright targets`.
        example_inputs: one tensor or a tuple; needed for a module. Its batch size is the artifact's.
        calibration: batches of inputs (tensors or tuples, any batch size, no labels); needed by quantization.
        evaluate: called as evaluate(predict) -> score, higher is better; `predict(*inputs)` takes batches of any size
            and returns a tensor, or a tuple where the model has several outputs.
        constraints: limits by name, see CONSTRAINTS; an unmet limit is an error that names it and the value reached.
        pipeline: pass pipeline text; the default is 8-bit post-training quantization.
        measure: also compile the float program and time both, where the target runs on this machine.
        seed: for everything random; a run is reproducible.
        instruments: extra hooks on the pipeline, such as Dump.
        progress: called as progress(done, total, what).

    Raises:
        GraphwrightError: every expected failure, with the culprit and the way out.
    """
    limits = _check_constraints(constraints or {}, evaluate, measure)
    chosen = Target.parse(target)
    backend = backend_for(chosen)
    runs_here = any(info.target == chosen and info.runs for info in backend.targets())
    passes = parse(pipeline) if isinstance(pipeline, str) else pipeline
    start = time.perf_counter()
    source = as_program(model, example_inputs)
    samples = None if calibration is None else Calibration.for_program(source, calibration)
    context = PassContext(calibration=samples, seed=seed, progress=progress)
    canonical = _FirstCanonical()
    outcome = PassManager((*instruments, PassProgress(progress), canonical)).run(source, passes, context)
    compiled = backend.compile(outcome.program, chosen, progress)
    plan = Plan(str(passes), str(chosen), source.name, limits, seed)
    rows = [row.to_json() for row in outcome.certificate]
    artifact = Artifact.build(outcome.program, [compiled], certificate=rows, plan=plan.to_json())
    runs = _Runs(source, outcome.program, canonical.program, compiled, artifact)
    float_row, row = _measure(runs, backend, evaluate, measure and runs_here, progress)
    report = Report(
        name=source.name,
        target=str(chosen),
        pipeline=str(passes),
        certificate=outcome.certificate,
        kernels=compiled.kernels,
        rows=(float_row, row),
        seconds=round(time.perf_counter() - start, 2),
        notes=_notes(outcome, compiled, evaluate, runs_here),
    )
    report.require(limits)
    return Result(outcome.program, artifact, report, plan)


def _check_constraints(limits: dict[str, float], evaluate: object, measure: bool) -> dict[str, float]:
    for name, value in limits.items():
        if name not in CONSTRAINTS:
            raise UnknownNameError("constraint", name, CONSTRAINTS)
        if not isinstance(value, (int, float)) or value < 0:
            raise OptionError(f"constraint '{name}' ({CONSTRAINTS[name]}) must be a number of at least 0, not {value!r}")
    if "max_drop" in limits and evaluate is None:
        raise OptionError("constraint 'max_drop' needs evaluate=..., a function that scores predictions")
    if "latency" in limits and not measure:
        raise OptionError("constraint 'latency' needs measure=True: it is a measured ratio")
    return {name: float(value) for name, value in limits.items()}


@dataclass(frozen=True)
class _Runs:
    """What is measured: the float model (`canonical`: as the backend compiles it, None where no pass made it) and the result."""

    source: Program
    result: Program
    canonical: Program | None
    compiled: Compiled
    artifact: Artifact

    def float_program(self) -> Program:
        if self.source.stage >= Stage.CANONICAL:
            return self.source
        return self.canonical or PassManager().run(self.source, parse("canonicalize")).program


def _measure(
    runs: _Runs,
    backend: Backend,
    evaluate: Callable[[Predict], float] | None,
    run: bool,
    progress: Callable[[int, int, str], None],
) -> tuple[Measurement, Measurement]:
    """Scores, sizes and latencies of the float model and of the artifact. What cannot run here stays None."""
    float_bytes = sum(t.numel() * t.element_size() for t in runs.source.parameters().values())
    float_score = score = float_latency = latency = None
    if evaluate is not None:
        progress(0, 2, "evaluate")
        float_score = float(evaluate(program_predict(runs.source)))
        progress(1, 2, "evaluate")
        # Where the target is another machine the torch reference stands in: the artifact equals it bit for bit.
        score = float(evaluate(artifact_predict(runs.artifact) if run else program_predict(runs.result)))
        progress(2, 2, "evaluate")
    if run:
        inputs = example_inputs(runs.result)
        float_latency = backend.latency(backend.compile(runs.float_program(), runs.compiled.target, progress), inputs)
        latency = backend.latency(runs.compiled, inputs)
    return (
        Measurement("float", float_score, float_bytes, float_latency),
        Measurement(runs.result.stage.label, score, runs.artifact.size, latency),
    )


def _notes(outcome: PipelineResult, compiled: Compiled, evaluate: object, runs_here: bool) -> tuple[str, ...]:
    notes = []
    islands = [k for k in compiled.kernels if k.kind == "island"]
    if islands:
        notes.append(f"{len(islands)} float islands inside the integer program: {', '.join(k.name for k in islands[:8])}")
    if evaluate is None:
        notes.append("no accuracy: it takes evaluate=... in Python, or a reference model, to have it measured")
    if not runs_here:
        notes.append("the target does not run on this machine: no latency, and the score is the torch reference's")
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
