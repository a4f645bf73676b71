"""Launches and packed parameters of the kernels that multiply 8-bit floats, from plain numbers: no TVM here. See `plan_int8`.

Buffers of e4m3 numbers are uint8: their bytes. dtype: "float32", "float16" or "bfloat16", of the residual and the output.
"""

from __future__ import annotations

from math import ceil, prod

import numpy as np

from .....ir.errors import OptionError
from ...kernels.base import Convolution, padded
from . import plan_float
from .blocks import Block, Problem, choose
from .plan_float import FloatTail
from .plan_int8 import fitted, image_constants, pointwise
from .plan_store import INVERSE, VALUE, Store
from .plans import Buffer, Constant, Plan

#: Levels whose tensor cores multiply e4m3 numbers.
LEVELS = ("sm_89", "sm_90")

#: Products that one sum of the tensor cores takes, at most; see `triton_fp8` for what they do to its last bits.
SUMMED = 2048

#: Elements of a program of `quantize`.
QUANTIZED = 1024


def linear_problem(rows: int, inner: int, outer: int) -> Problem:
    return Problem(rows, outer, inner)


def convolution_problem(shape: Convolution) -> Problem:
    return Problem(shape.batch * shape.out_height * shape.out_width, *packed_weight_shape(shape))


def linear(
    rows: int,
    inner: int,
    outer: int,
    dtype: str,
    tail: FloatTail,
    level: str,
    store: Store = VALUE,
    block: Block | None = None,
    summed: int = SUMMED,
) -> Plan:
    """Y [rows, outer] = act(X [rows, inner] W^T * scale + bias + residual)."""
    buffers = (
        ("X", (rows, inner), "uint8"),
        *_residual(tail, (rows, outer), dtype),
        ("W", (padded(outer), padded(inner)), "uint8"),
        ("scale", (padded(outer),), "float32"),
        ("bias", (padded(outer),), "float32"),
        *store.buffers((rows, outer), dtype),
    )
    chosen = block or choose(linear_problem(rows, inner, outer), level)
    return _product(rows, inner, outer, (inner, padded(inner)), tail, store, chosen, buffers, summed)


def convolution(
    shape: Convolution,
    dtype: str,
    tail: FloatTail,
    level: str,
    store: Store = VALUE,
    block: Block | None = None,
    summed: int = SUMMED,
) -> Plan:
    """Dense, X [N, H, W, Cp]. Raises OptionError: groups, or an empty output."""
    if shape.groups != 1:
        raise OptionError(f"no kernel multiplies 8-bit floats of {shape.groups} groups; leave the layer to quantize-fp8's skip")
    if min(shape.out_height, shape.out_width) < 1:
        raise OptionError(f"convolution {shape} has an empty output; the kernel is larger than the padded image")
    filters, pitch = padded(shape.filters), padded(shape.channels)
    rows = shape.batch * shape.out_height * shape.out_width
    out_shape = (shape.batch, shape.out_height, shape.out_width, filters)
    weight = packed_weight_shape(shape)
    buffers = (
        ("X", (shape.batch, shape.height, shape.width, pitch), "uint8"),
        *_residual(tail, out_shape, dtype),
        ("W", weight, "uint8"),
        ("scale", (filters,), "float32"),
        ("bias", (filters,), "float32"),
        *store.buffers(out_shape, dtype),
    )
    chosen = block or choose(convolution_problem(shape), level)
    if pointwise(shape) and shape.channels == pitch:
        return _product(rows, pitch, filters, (pitch, weight[1]), tail, store, chosen, buffers, summed)
    chosen = fitted(chosen, shape)
    constants = image_constants(shape) | tail.constants | store.constants | _cut(chosen, weight[1], summed)
    constants |= {"X_PITCH": pitch, "CHANNELS": shape.channels, "W_PITCH": weight[1]}
    grid = _grid(rows, filters, chosen)
    return Plan("triton_fp8:convolution", constants, grid, buffers, chosen.warps, chosen.stages)


def _product(
    rows: int,
    inner: int,
    outer: int,
    pitches: tuple[int, int],
    tail: FloatTail,
    store: Store,
    block: Block,
    buffers: tuple[Buffer, ...],
    summed: int,
) -> Plan:
    """A product of matrices; pitches: bytes between rows of X and of W."""
    constants: dict[str, Constant] = {"M": rows, "N": outer, "K": inner, "X_PITCH": pitches[0], "W_PITCH": pitches[1]}
    constants |= tail.constants | store.constants | _cut(block, inner, summed)
    return Plan("triton_fp8:linear", constants, _grid(rows, outer, block), buffers, block.warps, block.stages)


def _cut(block: Block, depth: int, summed: int) -> dict[str, Constant]:
    """Sums of one depth each, so that no loop is left with a few steps."""
    steps = ceil(depth / block.depth)
    sums = ceil(steps / max(1, summed // block.depth))
    return {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": block.group, "STEPS": ceil(steps / sums)}


def _grid(rows: int, columns: int, block: Block) -> tuple[int, int, int]:
    return ceil(rows / block.rows) * ceil(columns / block.columns), 1, 1


def _residual(tail: FloatTail, shape: tuple[int, ...], dtype: str) -> list[Buffer]:
    return [("R", shape, dtype)] if tail.residual else []


def quantize(size: int, dtype: str) -> Plan:
    """Y [size] = e4m3(X [size] * inverse). Raises OptionError for an empty extent."""
    if size < 1:
        raise OptionError(f"quantize: the size must be at least 1, got {size}")
    buffers = (("X", (size,), dtype), INVERSE, ("Y", (size,), "uint8"))
    constants: dict[str, Constant] = {"SIZE": size, "BLOCK": QUANTIZED}
    return Plan("triton_fp8:quantize", constants, (ceil(size / QUANTIZED), 1, 1), buffers, 4, 1)


def packed_weight_shape(shape: Convolution) -> tuple[int, int]:
    return padded(shape.filters), prod(shape.kernel) * padded(shape.channels)


def pack_linear(weight: np.ndarray) -> np.ndarray:
    """Bytes (N, K) -> [N padded, K padded], zeros in the padding."""
    return plan_float.pack_linear(weight, np.uint8)


def pack_convolution(shape: Convolution, weight: np.ndarray) -> np.ndarray:
    """Bytes (O, C, KH, KW) -> [O padded, taps * C padded], k = (tap, channel), zeros elsewhere."""
    packed = np.zeros((padded(shape.filters), prod(shape.kernel), padded(shape.channels)), np.uint8)
    packed[: shape.filters, :, : shape.channels] = weight.reshape(shape.filters, shape.channels, -1).transpose(0, 2, 1)
    return packed.reshape(packed_weight_shape(shape))


def pack_scale(filters: int, scale: np.ndarray) -> np.ndarray:
    """Float32 (O,) -> [O padded], zeros in the padding."""
    return plan_float.pack_bias(filters, scale)
