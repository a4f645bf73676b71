"""The ONNX exports of a quantized program in ONNX Runtime beside our own artifact: same class, and how far apart outputs are."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ...backends.loader import load
from ...ir.data import Calibration
from ...ir.errors import DataError
from ...ir.onnx_export import export_onnx
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline, parse
from ...passes.quantize.annotate import source_of_codes
from ...passes.quantize.encoding import read_encoding
from ...passes.quantize.side_by_side import is_quantized_layer
from ..defaults import default_pipeline
from ..optimize import optimize
from ..sources import Source, resolve
from .systems import Arrays, ort_session

CALIBRATION_SAMPLES = 512
#: What is exported: the annotated program as QDQ, or the integer one as operators with one result.
EXPORTS = ("annotated", "integer")
#: How ONNX Runtime runs the file: each node as it is written, or with its own integer kernels in place of the QDQ pairs.
MODES = ("as written", "optimized")
#: What float arithmetic in another order does by itself: ONNX Runtime's two modes beside each other.
BETWEEN = "optimized against as written"


@dataclass
class Agreement:
    """Outputs of an exported file in one mode of ONNX Runtime against the artifact's, or against the other mode's.

    Attributes:
        export: the stage that was exported, one of EXPORTS.
        step: what one code of the last layer's input is worth in an output: s_x * max |w|.
        same: inputs with the same largest output. within: inputs whose outputs all lie within one step.
        largest: the largest difference of an output.
        seconds: of each run of ONNX Runtime.
    """

    model: str
    export: str
    mode: str
    step: float
    inputs: int = 0
    same: int = 0
    within: int = 0
    largest: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Compares outputs (N, classes)."""
        distance = np.abs(expected - actual).max(1)
        self.inputs += len(expected)
        self.same += int((expected.argmax(1) == actual.argmax(1)).sum())
        self.within += int((distance <= self.step).sum())
        self.largest = max(self.largest, float(distance.max()))


def measure(model: str, inputs: int | None, progress: Callable[[int, int, str], None]) -> list[Agreement]:
    """Quantizes `model` once, exports the annotated and the integer program, and compares both with the compiled integer one.

    Args:
        inputs: evaluation inputs; None takes all.

    Raises:
        DataError: the model brings no data along.
    """
    source = resolve(model)
    if source.reference is None:
        raise DataError(f"'{model}' brings no inputs along; name a reference model")
    annotated, integer = quantized(source, progress)
    batches = list(source.reference.evaluation(inputs))
    step = output_step(annotated)
    rows = {(e, mode): Agreement(model, e, mode, step) for e in EXPORTS for mode in (*MODES, BETWEEN)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        optimize(integer, pipeline="", measure=False, progress=progress).artifact.save(folder / "int8.gw")
        artifact = load(folder / "int8.gw")
        sessions = _sessions({"annotated": annotated, "integer": integer}, folder)
        for index, (batch, _) in enumerate(batches):
            progress(index, len(batches), f"compare {model}")
            samples = list(_samples(batch, source.program.input_specs[0].shape[0] or 1))
            expected = np.concatenate([artifact(*sample) for sample in samples])
            found = {key: np.concatenate(_timed(run, samples, rows[key].seconds)) for key, run in sessions.items()}
            for key, actual in found.items():
                rows[key].add(expected, actual)
            for e in EXPORTS:
                rows[e, BETWEEN].add(*(found[e, mode] for mode in MODES))
        progress(len(batches), len(batches), f"compare {model}")
    return list(rows.values())


def _sessions(programs: dict[str, Program], folder: Path) -> dict[tuple[str, str], Callable[[Arrays], Arrays]]:
    """Each export in each mode."""
    for name, program in programs.items():
        export_onnx(program, folder / f"{name}.onnx")
    return {
        (name, mode): ort_session(folder / f"{name}.onnx", threads=1, optimize=mode == "optimized")
        for name in programs
        for mode in MODES
    }


def _timed(run: Callable[[Arrays], Arrays], samples: list[Arrays], seconds: list[float]) -> list[np.ndarray]:
    """The first output for each sample; its time goes to `seconds`."""
    outputs = []
    for sample in samples:
        start = time.perf_counter()
        outputs.append(run(sample)[0])
        seconds.append(time.perf_counter() - start)
    return outputs


def _samples(batch: tuple[torch.Tensor, ...], size: int) -> Iterator[list[np.ndarray]]:
    return ([x.numpy() for x in pieces] for pieces in zip(*(x.split(size) for x in batch), strict=True))


def quantized(source: Source, progress: Callable[[int, int, str], None]) -> tuple[Program, Program]:
    """(annotated, integer) by the default pipeline: all its passes but the last, and that one."""
    passes = parse(default_pipeline(source.program))
    calibration = Calibration.for_program(source.program, source.calibration(None, CALIBRATION_SAMPLES) or [])
    context = PassContext(calibration=calibration, progress=progress)
    annotated = PassManager().run(source.program, Pipeline(passes.passes[:-1]), context).program
    return annotated, PassManager().run(annotated, Pipeline(passes.passes[-1:]), context).program


def output_step(annotated: Program) -> float:
    """s_x * max |w| of the last quantized layer."""
    last = [n for n in annotated.nodes if is_quantized_layer(n)][-1]
    found = source_of_codes(annotated, last.args[0])
    if found is None:
        raise DataError(f"the last layer of '{annotated.name}' does not read codes")
    weight = annotated.parameter(last.args[1].args[0])  # type: ignore[union-attr]
    return read_encoding(annotated, found[0]).step * found[1] * float(weight.abs().max())  # type: ignore[union-attr]
