"""Weights of the trained reference models: float16 safetensors, read back as float32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from ...ir.errors import DataError
from ...ir.files import write_atomically

# The counter only serves training with a cumulative moving average; inference never reads it.
_UNSTORED_SUFFIX = "num_batches_tracked"


def half_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers rounded to float16 on the CPU, without batch-norm counters.

    Raises:
        DataError: a value is not finite in float16.
    """
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith(_UNSTORED_SUFFIX):
            continue
        rounded = value.detach().to("cpu", torch.float16).contiguous()
        if not torch.isfinite(rounded).all():
            raise DataError(f"{name} holds values that float16 cannot represent")
        state[name] = rounded
    return state


def save_weights(model: nn.Module, path: Path) -> None:
    """Write `half_state(model)` to `path`, whole or not at all."""
    write_atomically(path, save(half_state(model)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load `path` into `model` as float32.

    Raises:
        DataError: the file is missing or damaged, or its names or shapes are not the model's.
    """
    try:
        stored = load_file(path)
    except FileNotFoundError as error:
        raise DataError(f"weights {path} are missing: reinstall graphwright, or train them (docs/ZOO.md)") from error
    except SafetensorError as error:
        raise DataError(f"weights {path} are not a valid safetensors file: {error}") from error
    expected = {key: value for key, value in model.state_dict().items() if not key.endswith(_UNSTORED_SUFFIX)}
    if different := sorted(expected.keys() ^ stored.keys()):
        raise DataError(f"weights {path} do not belong to {type(model).__name__}: {different[0]} is on one side only")
    for name, value in stored.items():
        if value.shape != expected[name].shape:
            raise DataError(
                f"weights {path}: {name} has shape {tuple(value.shape)}, "
                f"{type(model).__name__} needs {tuple(expected[name].shape)}"
            )
    model.load_state_dict({name: value.float() for name, value in stored.items()}, strict=False)
