"""`predict` functions for evaluation: batches of any size in, outputs out, whatever batch size the program was built for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..backends.artifact import Artifact
from ..backends.loader import load
from ..ir.content import content_key
from ..ir.errors import DataError
from ..ir.program import Program, TensorSpec

Predict = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


def batched(run: Callable[..., tuple[torch.Tensor, ...]], specs: Sequence[TensorSpec]) -> Predict:
    """Wraps a function of fixed batch size: splits dimension 0 of every input, and joins the outputs.

    Raises:
        DataError: a batch that is not a multiple of the program's batch size.
    """
    size = specs[0].shape[0] if specs[0].shape else None

    def predict(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        count = inputs[0].shape[0] if inputs[0].dim() else 1
        if size is None or count == size:
            outputs = run(*inputs)
        elif count % size:
            raise DataError(f"a batch of {count} does not split into the program's batch of {size}")
        else:
            parts = [run(*piece) for piece in zip(*(x.split(size) for x in inputs), strict=True)]
            outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    return predict


def watched(predict: Predict) -> tuple[Predict, list[str]]:
    """The same function, and a list that gets a hash of the inputs of each of its calls."""
    seen: list[str] = []

    def run(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        seen.append(content_key(*inputs))
        return predict(*inputs)

    return run, seen


def single_output(predict: Predict) -> Callable[[tuple[torch.Tensor, ...]], torch.Tensor]:
    """The form reference models score: a tuple of inputs in, the only output out. Raises DataError where there are several."""

    def run(inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        output = predict(*inputs)
        if not isinstance(output, torch.Tensor):
            raise DataError(f"the metric scores one output, but the model returns {len(output)}")
        return output

    return run


def program_predict(program: Program) -> Predict:
    """Predictions of the torch reference."""
    return batched(program, program.input_specs)


def artifact_predict(artifact: Artifact) -> Predict:
    """Predictions of the compiled library, loaded the way a user would load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gw"
        artifact.save(path)
        model = load(path)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = model(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return batched(run, artifact.input_specs)
