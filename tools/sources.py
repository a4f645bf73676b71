"""What a MODEL argument means: a reference model's name (data and metric come along) or a model file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..ir.capture import capture
from ..ir.errors import CalibrationError, OptionError
from ..ir.load import load_program
from ..ir.program import Program
from . import zoo
from .predict import Predict, single_output


@dataclass(frozen=True)
class Source:
    """A captured model with what is known about it. `evaluate` and `calibration` come with reference models only."""

    program: Program
    reference: zoo.ReferenceModel | None = None

    def calibration(self, path: Path | None, samples: int) -> list[tuple[torch.Tensor, ...]] | None:
        """Batches from `path`, or the reference model's own; None where there are none."""
        if path is not None:
            return read_samples(path, self.program)
        return self.reference.calibration(samples) if self.reference is not None else None

    def evaluate(self, count: int | None) -> Callable[[Predict], float] | None:
        reference = self.reference
        if reference is None:
            return None
        return lambda predict: reference.evaluate(single_output(predict), count)


def resolve(model: str, input_shapes: dict[str, tuple[int, ...]] | None = None, dynamic_batch: bool = False) -> Source:
    """A reference model by name, or a file. A word without a suffix that names nothing is an error with the nearest name.

    dynamic_batch: leave the batch of a reference model symbolic. A file has the batch it was exported with.
    """
    if model in zoo.names() or (not Path(model).exists() and not Path(model).suffix):
        reference = zoo.load(model)
        return Source(capture(reference.model, reference.example_inputs, dynamic_batch=dynamic_batch, name=model), reference)
    if dynamic_batch:
        raise OptionError(f"'{model}' is a file, whose batch is fixed; name a reference model: {', '.join(zoo.names())}")
    return Source(load_program(model, input_shapes))


def read_samples(path: Path, program: Program) -> list[tuple[torch.Tensor, ...]]:
    """Reads inputs from .npz (arrays named after the inputs, or positional `arr_0`, ...) or .npy (one input).

    Each array holds samples along its first axis.

    Raises:
        CalibrationError: an unreadable file, a pickle inside, or names that do not match the program's inputs.
    """
    specs = program.input_specs
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {specs[0].name: loaded}
    except (OSError, ValueError, EOFError) as error:
        raise CalibrationError(
            f"cannot read samples from '{path}': {error}; write them with numpy.savez(path, {specs[0].name}=array)"
        ) from error
    names = [spec.name for spec in specs]
    if set(arrays) != set(names):
        positional = [f"arr_{i}" for i in range(len(names))]
        if set(arrays) != set(positional):
            raise CalibrationError(
                f"'{path}' holds {', '.join(sorted(arrays)) or 'nothing'}, but {program.name} takes {', '.join(names)}"
            )
        arrays = {name: arrays[key] for name, key in zip(names, positional, strict=True)}
    tensors = [torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in names]
    if any(t.dim() != len(s.shape) for t, s in zip(tensors, specs, strict=True)):
        found = ", ".join(f"{n}{tuple(t.shape)}" for n, t in zip(names, tensors, strict=True))
        raise CalibrationError(f"'{path}' holds {found}, but {program.name} takes {', '.join(map(str, specs))}, samples first")
    return [tuple(tensors)]


def parse_shapes(items: list[str]) -> dict[str, tuple[int, ...]]:
    """`name=1x3x224x224` items as a mapping."""
    shapes = {}
    for item in items:
        name, _, dims = item.partition("=")
        if not dims or not all(part.isdigit() for part in dims.split("x")):
            raise OptionError(f"--input-shape takes NAME=1x3x224x224, not '{item}'")
        shapes[name] = tuple(int(part) for part in dims.split("x"))
    return shapes
