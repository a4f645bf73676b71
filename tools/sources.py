"""What a MODEL argument means: a reference model's name (data and metric come along) or a model file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from ..ir.capture import capture
from ..ir.errors import CalibrationError, DataError, OptionError
from ..ir.load import load_program
from ..ir.program import Program
from ..search.sensitivity.distilled import distil
from . import zoo
from .predict import Predict, single_output

#: Where a calibration file is expected: make the samples from what the model remembers of its training data.
DISTILLED = "distilled"


@dataclass(frozen=True)
class Source:
    """A captured model with what is known about it. `evaluate` and `calibration` come with reference models only."""

    program: Program
    reference: zoo.ReferenceModel | None = None

    def calibration(self, path: Path | None, samples: int) -> list[tuple[torch.Tensor, ...]] | None:
        """Batches from `path`, or the reference model's own; None where there are none.

        The word `distilled` for a path makes `samples` of them from the model's batch norms (`search.sensitivity.distilled`).
        """
        if path is not None and str(path) == DISTILLED:
            return list(distil(self.program, samples).calibration)
        if path is not None:
            return read_samples(path, self.program)
        return self.reference.calibration(samples) if self.reference is not None else None

    def training(self, path: Path | None, samples: int | None) -> list[tuple[torch.Tensor, ...]] | None:
        """Inputs to fine-tune on, from `path` or the reference model's own (None: all); None where there are none."""
        if path is not None:
            return read_samples(path, self.program)
        return self.reference.training(samples) if self.reference is not None else None

    def labels(self, path: Path | None, calibration: Path | None, samples: int) -> torch.Tensor | None:
        """Classes of the samples that `calibration` gives: those in `path` (.npy), or the reference model's own.

        None where there are none: samples of a file bring no labels.
        """
        if path is None:
            return self.reference.calibration_labels(samples) if self.reference is not None and calibration is None else None
        way_out = "write it with numpy.save(path, labels), one integer a sample"
        try:
            found: Any = np.load(path, allow_pickle=False)
        except OSError as error:
            raise DataError(f"cannot read labels '{path}': {error.strerror or error}; {way_out}") from error
        except (ValueError, EOFError, BadZipFile) as error:
            raise DataError(f"labels '{path}' are damaged, no .npy file, or hold Python objects; {way_out}") from error
        if not isinstance(found, np.ndarray):
            raise DataError(f"labels '{path}' are an archive of arrays; {way_out}")
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise DataError(f"labels '{path}' must be one integer a sample, not {found.dtype} {found.shape}")
        return torch.from_numpy(found.astype(np.int64))

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
    """Reads calibration samples from .npz or .npy, see `read_arrays`; each array holds samples along its first axis.

    Raises:
        CalibrationError: what `read_arrays` cannot read, or arrays of another rank than the program's inputs.
    """
    specs = program.input_specs
    try:
        arrays = read_arrays(path, [spec.name for spec in specs], program.name)
    except DataError as error:
        raise CalibrationError(f"calibration: {error}") from error
    if any(a.ndim != len(s.shape) for a, s in zip(arrays, specs, strict=True)):
        found = ", ".join(f"{s.name}{a.shape}" for a, s in zip(arrays, specs, strict=True))
        raise CalibrationError(f"'{path}' holds {found}, but {program.name} takes {', '.join(map(str, specs))}, samples first")
    return [tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)]


def read_arrays(path: Path, names: list[str], model: str) -> list[np.ndarray]:
    """One array an input, in the order of `names`, from .npz (named after the inputs, or `arr_0`, ...) or .npy (one input).

    Raises:
        DataError: no such file, an unreadable one, a pickle inside, or names that are not the inputs'.
    """
    way_out = f"write it with numpy.savez(path, {', '.join(f'{name}=array' for name in names)})"
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror or error}; {way_out}") from error
    except (ValueError, EOFError, BadZipFile) as error:
        # numpy's own messages advise to load pickles, which run code.
        raise DataError(
            f"'{path}' is damaged, no .npy or .npz file, or holds Python objects instead of numbers; {way_out}"
        ) from error
    if list(arrays) == [""] and len(names) == 1:
        return [arrays[""]]
    if set(arrays) == {f"arr_{i}" for i in range(len(names))}:
        return [arrays[f"arr_{i}"] for i in range(len(names))]
    if set(arrays) != set(names):
        found = ", ".join(repr(name) for name in sorted(arrays)) if "" not in arrays else "one array without a name"
        raise DataError(f"'{path}' holds {found or 'nothing'}, but {model} takes {', '.join(map(repr, names))}; {way_out}")
    return [arrays[name] for name in names]


def parse_shapes(items: list[str]) -> dict[str, tuple[int, ...]]:
    """`name=1x3x224x224` items as a mapping."""
    shapes = {}
    for item in items:
        name, _, dims = item.partition("=")
        if not dims or not all(part.isdigit() for part in dims.split("x")):
            raise OptionError(f"--input-shape takes NAME=1x3x224x224, not '{item}'")
        shapes[name] = tuple(int(part) for part in dims.split("x"))
    return shapes
