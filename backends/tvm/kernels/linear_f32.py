"""Float linear layer: Y = act(X @ W^T + bias + residual) over dense rows, with weights packed at build time."""

from __future__ import annotations

import numpy as np
from tvm import tirx

from .base import LANES, Convolution, padded
from .convolution_f32 import Product, emit_product, pack_bias
from .emit import build
from .float_base import PLAIN, FloatSpec, MatrixProduct, declare
from .half import stored_panels, weight_step
from .half_neon import scaled_panels

__all__ = ["linear", "pack_bias", "pack_weight", "packed_weight_shape"]


def packed_weight_shape(inputs: int, outputs: int, dtype: str = "float32", chained: bool = False) -> tuple[int, int, int]:
    return padded(outputs) // LANES, padded(inputs, weight_step(dtype)) + chained, LANES


def pack_weight(weight: np.ndarray, dtype: str = "float32", chained: bool = False) -> np.ndarray:
    """(N, K) -> [N / LANES, K, LANES], zeros in the padding. chained: behind one row of scales, see `half_neon.scaled_panels`."""
    outputs, inputs = weight.shape
    full = np.zeros((padded(outputs), inputs), np.float32)
    full[:outputs] = weight
    panels = np.ascontiguousarray(full.reshape(-1, LANES, inputs).transpose(0, 2, 1))
    return scaled_panels(panels) if chained else stored_panels(panels, inputs, dtype)


def linear(shape: MatrixProduct, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    """(X [M, K], W packed, bias [padded(N)], Y [M, N]), all dense; one weight for all rows, so shape.batch is 1.

    Raises:
        OptionError: a tile that does not fit the register file. UnknownNameError: unknown level.
    """
    lines = Convolution(1, shape.inner, 1, shape.rows, shape.columns, (1, 1))

    def body() -> None:
        weights = packed_weight_shape(shape.inner, shape.columns, spec.dtype, spec.chained)
        y = (shape.rows, shape.columns)
        buffers = declare(spec, (shape.rows, shape.inner), weights, padded(shape.columns), y)
        emit_product(Product(lines, shape.inner, 1, shape.columns, spec), buffers)

    return build("linear_f32", body, spec.level)
