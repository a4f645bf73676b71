"""Calibration samples: checked once, at the door, against the inputs of the program they calibrate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .errors import CalibrationError
from .program import Program, TensorSpec, flatten_inputs

Sample = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Calibration:
    """Samples with exactly the input shapes of the program (its batch size included)."""

    samples: tuple[Sample, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):
        return iter(self.samples)

    @classmethod
    def for_program(cls, program: Program, batches: Iterable[Sequence[torch.Tensor] | torch.Tensor]) -> Calibration:
        """Checks `batches` (tensors or tuples of tensors, any batch size) and cuts them to the program's batch size.

        Raises:
            CalibrationError: nothing in it, a wrong number of inputs, a wrong shape or type, or a value that is not finite.
        """
        specs = program.input_specs
        samples: list[Sample] = []
        for index, batch in enumerate(batches):
            inputs = flatten_inputs(batch)
            if not all(isinstance(x, torch.Tensor) for x in inputs):
                kinds = ", ".join(type(x).__name__ for x in inputs)
                raise CalibrationError(f"calibration batch {index} holds {kinds}; give one tensor or a tuple of tensors")
            if len(inputs) != len(specs):
                raise CalibrationError(
                    f"calibration batch {index} has {len(inputs)} tensors, but {program.name} takes {len(specs)}: "
                    f"{', '.join(map(str, specs))} (drop the labels from the loader)"
                )
            for spec, value in zip(specs, inputs, strict=True):
                _check(spec, value, index)
            if not all(value.numel() for value in inputs):
                raise CalibrationError(f"calibration batch {index} is empty: it holds no sample; leave it out")
            samples.extend(_split(specs, inputs, index))
        if not samples:
            raise CalibrationError(f"the calibration set of {program.name} is empty; give at least one batch of real inputs")
        return cls(tuple(samples))


def _check(spec: TensorSpec, value: torch.Tensor, index: int) -> None:
    expected = spec.shape[1:]
    wrong_rank = value.dim() != len(spec.shape)
    if wrong_rank or any(e is not None and e != d for e, d in zip(expected, value.shape[1:], strict=True)):
        raise CalibrationError(
            f"calibration batch {index}: input '{spec.name}' has shape {tuple(value.shape)}, but the model takes {spec} "
            "(only the first dimension, the batch, may differ)"
        )
    if value.dtype != spec.dtype:
        raise CalibrationError(
            f"calibration batch {index}: input '{spec.name}' is {value.dtype}, but the model takes {spec.dtype}; convert it"
        )
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        where = tuple(int(i) for i in (~torch.isfinite(value)).nonzero()[0])
        raise CalibrationError(
            f"calibration batch {index}: input '{spec.name}' holds {float(value[where])} at {where}; remove the broken sample"
        )


def _split(specs: Sequence[TensorSpec], inputs: Sample, index: int) -> list[Sample]:
    batch = specs[0].shape[0] if specs and specs[0].shape else None
    if batch is None:
        return [inputs]
    sizes = {value.shape[0] for value in inputs}
    if len(sizes) != 1 or next(iter(sizes)) % batch:
        raise CalibrationError(
            f"calibration batch {index} has batch sizes {sorted(sizes)}, which do not split into the model's batch of {batch}"
        )
    return list(zip(*(value.split(batch) for value in inputs), strict=True))


def random_sample(specs: Sequence[TensorSpec], generator: torch.Generator, dynamic: int = 1) -> Sample | None:
    """One random input tuple (standard normal), or None where an input is not float: token ids have no random meaning.

    Symbolic dimensions are `dynamic`.
    """
    if not all(spec.dtype.is_floating_point for spec in specs):
        return None
    return tuple(
        torch.randn([dynamic if d is None else d for d in spec.shape], generator=generator, dtype=spec.dtype) for spec in specs
    )
