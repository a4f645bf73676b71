"""Float linear layer: Y = act(X @ W^T + bias) over dense rows, with weights packed at build time."""

from __future__ import annotations

from math import prod

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Convolution, padded
from .convolution_f32 import Product, emit_product, pack_bias
from .emit import arguments, build
from .float_base import NO_ACTIVATION, Activation, Tile, level_of

__all__ = ["linear", "pack_bias", "pack_weight", "packed_weight_shape"]


def packed_weight_shape(inputs: int, outputs: int) -> tuple[int, int, int]:
    return padded(outputs) // LANES, inputs, LANES


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """(N, K) -> [N / LANES, K, LANES], zeros in the padding."""
    outputs, inputs = weight.shape
    full = np.zeros((padded(outputs), inputs), np.float32)
    full[:outputs] = weight
    return np.ascontiguousarray(full.reshape(-1, LANES, inputs).transpose(0, 2, 1))


def linear(
    lead: tuple[int, ...],
    inputs: int,
    outputs: int,
    activation: Activation = NO_ACTIVATION,
    level: str = "avx512",
    tile: Tile | None = None,
    name: str = "linear_f32",
) -> tirx.PrimFunc:
    """(X [*lead, K], W packed, bias [padded(N)], Y [*lead, N]), all dense.

    Raises:
        OptionError: an empty extent, or a tile that does not fit the register file. UnknownNameError: unknown level.
    """
    if min((*lead, inputs, outputs)) < 1:
        raise OptionError(f"linear: every extent must be at least 1, got {lead}, {inputs} -> {outputs}")
    lines = Convolution(1, inputs, 1, prod(lead), outputs, (1, 1))

    def body() -> None:
        x, w, bias, y = arguments(
            ("X", (*lead, inputs), "float32"),
            ("W", packed_weight_shape(inputs, outputs), "float32"),
            ("bias", (padded(outputs),), "float32"),
            ("Y", (*lead, outputs), "float32"),
        )
        emit_product(Product(lines, inputs, outputs, activation), level_of(level), tile, x, w, bias, y)

    return build(name, body)
