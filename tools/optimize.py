"""`optimize`: from a trained model to one deployable artifact, with evidence for every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..backends.registry import backend_for
from ..backends.target import Target
from ..ir.capture import capture
from ..ir.data import Calibration
from ..ir.errors import OptionError, UnknownNameError
from ..ir.load import load_program
from ..ir.program import Program
from ..passes.base import Training
from ..passes.manager import Instrument
from ..passes.order import check_order
from ..passes.pipeline import Pipeline, parse
from ..search.store import Store
from .bit_search import METRICS, BitSearch, search_bits
from .channels import within_macs
from .defaults import default_pipeline, search_pipeline
from .finetune import Finetune, with_distill
from .job import Job, PassProgress, Result
from .predict import Predict
from .progress import silent

__all__ = ["CONSTRAINTS", "BitSearch", "Finetune", "PassProgress", "Result", "as_program", "optimize"]

DEFAULT_SEARCH = BitSearch()

#: Limits a user may set; each names what it bounds.
CONSTRAINTS = {
    "max_drop": "largest loss of the evaluate() score, absolute",
    "size": "artifact bytes over the float model's parameter bytes",
    "latency": "latency over the float artifact's latency, measured on this machine, or as recorded for a GPU",
    "bops": "bit operations over those of the float model, 32 x 32 a multiply-accumulate",
    "average_bits": "bits of a weight on average",
    "macs": "multiply-accumulates over the float model's, or above 1 their number",
}

Model = torch.nn.Module | ExportedProgram | Program | str | Path


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
    pipeline: str | Pipeline | None = None,
    search: BitSearch | None = DEFAULT_SEARCH,
    finetune: Finetune | None = None,
    measure: bool = True,
    seed: int = 0,
    instruments: Sequence[Instrument] = (),
    progress: Callable[[int, int, str], None] = silent,
) -> Result:
    """Compresses a trained model and compiles it for a target.

    Every layer gets 8 bits where that meets the limits on size, latency, bit operations and average bits. Where it does not,
    each layer gets the format that loses least within them; with `BitSearch(minimize=...)`, the smallest, fastest or cheapest
    plan whose score stays within `max_drop`.

    A limit on `macs` cuts channels first: the counts that lose least within it (`prune-channels`, behind `canonicalize` unless
    the pipeline says where), what is left fitted to the original outputs. All else then goes on from the smaller network.

    Args:
        model: a module, an ExportedProgram, a Program, or the path of an ONNX file or .pt2 archive.
        target: `cpu` (this machine), `x86[:level]`, `arm64[:core]` or `cuda[:chip]`; see `graphwright targets`.
        example_inputs: one tensor or a tuple; needed for a module. Its batch size is the artifact's.
        calibration: batches of inputs (tensors or tuples, any batch size, no labels); needed by quantization.
        evaluate: called as evaluate(predict) -> score, higher is better; `predict(*inputs)` takes batches of any size
            and returns a tensor, or a tuple where the model has several outputs.
        constraints: limits by name, see CONSTRAINTS; an unmet limit is an error that names it and the value reached.
        pipeline: pass pipeline text; by default 8-bit post-training quantization, see `defaults`.
        search: how formats are chosen where 8 bits miss a limit; None: never.
        finetune: train what was compressed towards the float model's outputs (`finetune.with_distill` says at which place), or
            data and device for a pipeline that names `distill`.
        measure: also compile the float program and time both, where the target runs on this machine.
        seed: for everything random; a run is reproducible.
        instruments: extra hooks on the pipeline, such as Dump.
        progress: called as progress(done, total, what).

    Raises:
        GraphwrightError: every expected failure, with the culprit and the way out.
    """
    limits = _check_constraints(constraints or {}, evaluate, measure)
    if search is not None:
        search.check()
    chosen = Target.parse(target)
    backend = backend_for(chosen)
    source = as_program(model, example_inputs)
    samples = None if calibration is None else Calibration.for_program(source, calibration)
    training = Training() if finetune is None else finetune.training(source)
    job = Job(source, chosen, backend, samples, evaluate, limits, measure, seed, instruments, progress, training)
    pipelines = [_parsed(pipeline, default(source)) for default in (default_pipeline, search_pipeline)]
    for parsed in pipelines:
        check_order(source, parsed)
    if "macs" in limits:
        if limits["macs"] > 1:
            job.limits["macs"] = limits["macs"] / max(job.macs, 1)
        pipelines = within_macs(job, pipelines, Store(None if search is None else search.cache))
    passes, fewer_bits = pipelines if finetune is None else [with_distill(p, finetune.recipe) for p in pipelines]
    if search is None or (search.minimize is None and not set(limits) & set(METRICS)):
        result = job.run(passes)
        result.report.require(limits)
        return result
    if search.minimize is None and limits.get("average_bits", 8.0) >= 8.0:
        result = job.run(passes)
        missed = result.report.unmet(limits)
        if not missed:
            return result
        if not set(missed) <= set(METRICS):
            # Fewer bits are no way to a better score.
            result.report.require(limits)
    return search_bits(job, fewer_bits, search)


def _parsed(pipeline: str | Pipeline | None, default: str) -> Pipeline:
    return pipeline if isinstance(pipeline, Pipeline) else parse(default if pipeline is None else pipeline)


def _check_constraints(limits: dict[str, float], evaluate: object, measure: bool) -> dict[str, float]:
    for name, value in limits.items():
        if name not in CONSTRAINTS:
            raise UnknownNameError("constraint", name, CONSTRAINTS)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise OptionError(f"constraint '{name}' ({CONSTRAINTS[name]}) must be a number of at least 0, not {value!r}")
    if "max_drop" in limits and evaluate is None:
        raise OptionError("constraint 'max_drop' needs evaluate=..., a function that scores predictions")
    if "latency" in limits and not measure:
        raise OptionError("constraint 'latency' needs measure=True: it is a measured ratio")
    return {name: float(value) for name, value in limits.items()}
