"""Fine-tuning in `optimize`: which recipe, on what data, and where in the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..ir.data import Calibration
from ..ir.errors import OptionError
from ..ir.program import Program, Stage
from ..passes.base import Training
from ..passes.pipeline import Pipeline
from ..passes.quantize.annotate import Quantize
from ..passes.quantize.lower_integer import LowerInteger
from ..passes.recover.distill import Distill
from ..passes.recover.recipe import Recipe


@dataclass(frozen=True)
class Finetune(Recipe):
    """A short training run towards the float model's outputs; no labels. The options are those of the pass `distill`.

    Attributes:
        data: batches of inputs (tensors or tuples, any batch size); None: the calibration samples.
        checkpoints: a folder for the state of unfinished runs, so that a killed one goes on; None: nothing is kept.
        device: as torch names it; None: `cuda` where torch sees one, else `cpu`.
    """

    data: Iterable[Any] | None = field(default=None, repr=False)
    checkpoints: Path | None = None
    device: str | None = None

    @property
    def recipe(self) -> Distill:
        """The pass that does it."""
        return Distill(**{f.name: getattr(self, f.name) for f in fields(Recipe)})

    def training(self, program: Program) -> Training:
        """Data, checked against the program's inputs, and surroundings."""
        samples = None if self.data is None else Calibration.for_program(program, self.data)
        return Training(samples, self.checkpoints, self.device)


def with_distill(pipeline: Pipeline, recipe: Distill) -> Pipeline:
    """The pipeline with one `distill` where it wins back most.

        prune-channels, [equalize,] quantize, ..., lower-integer  ->  prune-channels, distill, [equalize,] quantize, ...
        quantize, align-scales, ..., lower-integer                ->  quantize, align-scales, ..., distill, lower-integer

    Where a pass before `quantize` leaves a compressed program, behind the last such pass: what was cut is made up for in float.
    Otherwise before `lower-integer`, or at the end: rounding is made up for, straight through, from the codes that the passes
    before chose. A pipeline that names `distill` has it where it stands.

    Raises:
        OptionError: the pipeline names `distill`, and the recipe is another; or nothing in it loses anything.
    """
    named = [p for p in pipeline if isinstance(p, Distill)]
    if named:
        if recipe not in (Distill(), *named):
            raise OptionError(f"the pipeline says '{pipeline}', and finetune other options of distill; give them in one place")
        return pipeline
    passes = pipeline.passes
    quantize = next((i for i, p in enumerate(passes) if isinstance(p, Quantize)), len(passes))
    compressing = [i for i, p in enumerate(passes[:quantize]) if p.leaves is Stage.COMPRESSED]
    if compressing:
        place = compressing[-1] + 1
    elif quantize < len(passes):
        place = next((i for i, p in enumerate(passes) if isinstance(p, LowerInteger)), len(passes))
    else:
        raise OptionError(
            f"nothing in '{pipeline}' compresses or quantizes, so fine-tuning has nothing to win back; leave it out"
        )
    return Pipeline((*passes[:place], recipe, *passes[place:]))
