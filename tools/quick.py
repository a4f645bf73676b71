"""A model in a given precision, quantized as quickly as possible: right for timing, tuning and memory, wrong for accuracy.

Kernels depend on shapes and types alone, so two samples and min-max ranges give the program that a careful calibration gives,
up to the numbers in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..backends.base import example_inputs
from ..ir.data import Calibration
from ..ir.errors import UnknownNameError
from ..ir.program import Program, Stage
from ..passes.base import PassContext
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline, parse
from .defaults import default_pipeline, fp8_pipeline, half_pipeline
from .progress import silent
from .sources import Source

#: What tables compare unless they are asked for more.
PRECISIONS = ("int8", "float32")

#: Precisions that are a cast of the float program.
HALF_PRECISIONS = ("bfloat16", "float16")

#: 8-bit floats, which only GPUs of level sm_89 and sm_90 multiply.
FP8 = "fp8"

#: Precisions whose ranges are chosen on data.
CALIBRATED = ("int8", FP8)

#: Passes of the default pipeline that only move numbers.
VALUES_ONLY = ("equalize", "correct-bias")

CALIBRATION_SAMPLES = 2


def check_precision(precision: str) -> None:
    known = (*PRECISIONS, *HALF_PRECISIONS, FP8)
    if precision not in known:
        raise UnknownNameError("precision", precision, known)


def quick_pipeline(program: Program, precision: str) -> Pipeline:
    """The default pipeline without the passes that only move numbers, and with the cheapest observer."""
    check_precision(precision)
    if precision in HALF_PRECISIONS:
        return parse(half_pipeline(program, precision))
    if precision == FP8:
        return parse(fp8_pipeline(program))
    if precision == "float32":
        return parse("" if program.stage is Stage.COMPRESSED else "canonicalize")
    passes = [p for p in parse(default_pipeline(program)).passes if p.name not in VALUES_ONLY]
    cheap = [dataclasses.replace(p, activation_observer="min-max") if p.name == "quantize" else p for p in passes]  # type: ignore[call-arg]
    return Pipeline(tuple(cheap))


def quick_program(source: Source, precision: str, progress: Callable[[int, int, str], None] = silent) -> Program:
    """The program of `source` in `precision`. A model file without data is calibrated on random inputs."""
    pipeline = quick_pipeline(source.program, precision)
    data = None
    if precision in CALIBRATED:
        batches = source.calibration(None, CALIBRATION_SAMPLES) or [example_inputs(source.program)]
        data = Calibration.for_program(source.program, batches)
    return PassManager().run(source.program, pipeline, PassContext(calibration=data, progress=progress)).program
