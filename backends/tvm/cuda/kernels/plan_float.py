"""Launches and packed parameters of the float kernels, from plain numbers: no TVM here. See `plan_int8`.

dtype: "float32", "float16" or "bfloat16", of inputs, weights, residual and output; sums and bias are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from .....ir.errors import OptionError
from ...kernels.base import Convolution, padded
from . import blocks
from .blocks import Block, Problem, choose, power_of_two
from .plan_attention import Heads, mask_and_output
from .plan_int8 import channels_read, fitted, image_constants, pointwise, spread
from .plan_store import VALUE, Store
from .plans import Buffer, Constant, Plan

UNITS = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class FloatTail:
    """What follows a sum: the residual's addition, a function by name, a clamp."""

    residual: bool = False
    function: str | None = None
    low: float | None = None
    high: float | None = None

    @property
    def constants(self) -> dict[str, Constant]:
        numbers: dict[str, Constant] = {"RESIDUAL": self.residual, "FUNCTION": self.function or ""}
        numbers |= {"LOW": self.low, "HIGH": self.high}
        return numbers | ({} if self.residual else {"residual": None})


def choose_block(problem: Problem, level: str, tensor_cores: bool) -> Block:
    """As `blocks.choose`; on the plain units a program's tile must fit its threads' registers."""
    if tensor_cores:
        return choose(problem, level)
    rows, columns = min(64, max(16, power_of_two(problem.rows))), min(64, max(16, power_of_two(problem.columns)))
    while rows * columns > 32 * 32 and ceil(problem.rows / rows) * ceil(problem.columns / columns) * problem.images < 132:
        rows, columns = (rows // 2, columns) if rows >= columns else (rows, columns // 2)
    return Block(rows, columns, 16, 4, 3)


def space(problem: Problem, level: str, dtype: str) -> list[Block]:
    """The blocks worth measuring."""
    if dtype != "float32":
        return blocks.space(problem, level)
    return [
        Block(rows, columns, depth, 4, 3)
        for rows in (16, 32, 64, 128)
        for columns in (16, 32, 64, 128)
        for depth in (16, 32)
        if 512 <= rows * columns <= 64 * 128
        and rows <= max(16, power_of_two(problem.rows))
        and columns <= max(16, power_of_two(problem.columns))
    ]


def convolution_problem(shape: Convolution, dtype: str) -> Problem:
    rows = shape.batch * shape.out_height * shape.out_width
    return Problem(rows, padded(shape.filters), packed_weight_shape(shape)[1], UNITS[dtype])


def _block(problem: Problem, level: str, dtype: str, precision: str, block: Block | None) -> Block:
    return block or choose_block(problem, level, dtype != "float32" or precision == "tf32")


def _cut(block: Block, precision: str) -> dict[str, Constant]:
    return {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": block.group, "PRECISION": precision}


def _grid(rows: int, columns: int, block: Block, images: int = 1) -> tuple[int, int, int]:
    return ceil(rows / block.rows) * ceil(columns / block.columns), images, 1


def _residual(tail: FloatTail, shape: tuple[int, ...], dtype: str) -> list[Buffer]:
    return [("R", shape, dtype)] if tail.residual else []


def linear(
    rows: int,
    inner: int,
    outer: int,
    dtype: str,
    tail: FloatTail,
    level: str,
    block: Block | None = None,
    precision: str = "ieee",
) -> Plan:
    """Y [rows, outer] = act(X [rows, inner] W^T + bias + residual)."""
    block = _block(Problem(rows, outer, inner, UNITS[dtype]), level, dtype, precision, block)
    constants: dict[str, Constant] = {"M": rows, "N": outer, "K": inner, "X_PITCH": inner, "W_PITCH": padded(inner)}
    buffers = (
        ("X", (rows, inner), dtype),
        *_residual(tail, (rows, outer), dtype),
        ("W", (padded(outer), padded(inner)), dtype),
        ("bias", (padded(outer),), "float32"),
        ("Y", (rows, outer), dtype),
    )
    constants |= tail.constants | _cut(block, precision)
    return Plan("triton_float:linear", constants, _grid(rows, outer, block), buffers, block.warps, block.stages)


def pack_linear(weight: np.ndarray, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """(N, K) -> [N padded, K padded], zeros in the padding."""
    outer, inner = weight.shape
    packed = np.zeros((padded(outer), padded(inner)), dtype)
    packed[:outer, :inner] = weight
    return packed


def convolution(
    shape: Convolution,
    dtype: str,
    tail: FloatTail,
    level: str,
    planar: bool = False,
    block: Block | None = None,
    precision: str = "ieee",
    store: Store = VALUE,
) -> Plan:
    """Dense or grouped; planar: X is [N, C, H, W]. Raises OptionError: planar with groups."""
    if planar and shape.groups > 1:
        raise OptionError(f"only dense convolutions read a planar image; this one has {shape.groups} groups")
    filters, pitch = padded(shape.filters), padded(shape.channels)
    rows = shape.batch * shape.out_height * shape.out_width
    x = (shape.batch, shape.channels, shape.height, shape.width) if planar else (shape.batch, shape.height, shape.width, pitch)
    out_shape = (shape.batch, shape.out_height, shape.out_width, filters)
    weight = packed_weight_shape(shape)
    buffers = (
        ("X", x, dtype),
        *_residual(tail, out_shape, dtype),
        ("W", weight, dtype),
        ("bias", (filters,), "float32"),
        *store.buffers(out_shape, dtype),
    )
    chosen = _block(convolution_problem(shape, dtype), level, dtype, precision, block)
    if pointwise(shape) and not planar and shape.channels == pitch and store == VALUE:
        constants: dict[str, Constant] = {"M": rows, "N": filters, "K": pitch, "X_PITCH": pitch, "W_PITCH": weight[1]}
        constants |= tail.constants | _cut(chosen, precision)
        return Plan("triton_float:linear", constants, _grid(rows, filters, chosen), buffers, chosen.warps, chosen.stages)
    chosen = chosen if planar else fitted(chosen, shape, 16)
    grouped, channels = shape.groups > 1, channels_read(shape)
    constants = image_constants(shape) | tail.constants | store.constants | _cut(chosen, precision)
    constants |= {
        "X_PITCH": pitch,
        "PLANAR": planar,
        "CHANNELS": shape.channels,
        "BLOCK_CHANNELS": channels,
        "W_PITCH": weight[1],
        "BAND_FILTERS": shape.filters // shape.groups if grouped else 0,
        "BAND_CHANNELS": shape.channels // shape.groups if grouped else 0,
        "BAND_LAST": pitch - channels if grouped else 0,
    }
    grid = _grid(rows, filters, chosen)
    return Plan("triton_float:convolution", constants, grid, buffers, chosen.warps, chosen.stages)


def packed_weight_shape(shape: Convolution) -> tuple[int, int]:
    if shape.depthwise:
        return prod(shape.kernel), padded(shape.filters)
    return padded(shape.filters), padded(prod(shape.kernel) * channels_read(shape))


def pack_convolution(shape: Convolution, weight: np.ndarray, dtype: np.dtype | type = np.float32) -> np.ndarray:
    """(O, C / groups, KH, KW) as `plan_int8.pack_convolution` orders it."""
    packed = np.zeros(packed_weight_shape(shape), dtype)
    if shape.depthwise:
        packed[:, : shape.filters] = weight.reshape(shape.filters, -1).T
    else:
        rows = spread(shape, weight).reshape(shape.filters, -1)
        packed[: shape.filters, : rows.shape[1]] = rows
    return packed


def pack_bias(filters: int, bias: np.ndarray | None) -> np.ndarray:
    packed = np.zeros(padded(filters), np.float32)
    if bias is not None:
        packed[:filters] = bias
    return packed


def depthwise(shape: Convolution, dtype: str, tail: FloatTail, block: Block | None = None, store: Store = VALUE) -> Plan:
    filters = padded(shape.filters)
    chosen = block or Block(max(8, 512 // min(64, power_of_two(filters))), min(64, power_of_two(filters)), 1, 4, 1)
    out_shape = (shape.batch, shape.out_height, shape.out_width, filters)
    buffers = (
        ("X", (shape.batch, shape.height, shape.width, filters), dtype),
        *_residual(tail, out_shape, dtype),
        ("W", (prod(shape.kernel), filters), dtype),
        ("bias", (filters,), "float32"),
        *store.buffers(out_shape, dtype),
    )
    constants = image_constants(shape) | tail.constants | store.constants | {"BM": chosen.rows, "BN": chosen.columns}
    rows = shape.batch * shape.out_height * shape.out_width
    grid = (ceil(rows / chosen.rows), ceil(filters / chosen.columns), 1)
    return Plan("triton_float:depthwise", constants, grid, buffers, chosen.warps, 1)


def matmul(
    batch: int,
    rows: int,
    inner: int,
    columns: int,
    transposed: bool,
    dtype: str,
    tail: FloatTail,
    level: str,
    block: Block | None = None,
    precision: str = "ieee",
) -> Plan:
    """Y [batch, rows, columns] = act(A B + residual); B [batch, inner, columns], or [batch, columns, inner] where transposed."""
    block = _block(Problem(rows, columns, inner, UNITS[dtype], batch), level, dtype, precision, block)
    right = (batch, columns, inner) if transposed else (batch, inner, columns)
    out_shape = (batch, rows, columns)
    buffers = (
        ("A", (batch, rows, inner), dtype),
        *_residual(tail, out_shape, dtype),
        ("B", right, dtype),
        ("Y", out_shape, dtype),
    )
    constants: dict[str, Constant] = {"M": rows, "N": columns, "K": inner, "TRANSPOSED": transposed}
    constants |= tail.constants | _cut(block, precision)
    return Plan("triton_float:matmul", constants, _grid(rows, columns, block, batch), buffers, block.warps, block.stages)


@dataclass(frozen=True)
class FloatAttention:
    """Sizes and places (elements of a row are neighbours; rows of k and v are keys)."""

    outer: int
    heads: int
    rows: int
    width: int
    keys: int
    values: int
    scale: float
    q: Heads
    k: Heads
    v: Heads
    mask: Heads | None
    y: Heads


def attention(
    shape: FloatAttention,
    sizes: Sequence[int],
    out: tuple[int, ...],
    dtype: str,
    precision: str = "ieee",
    store: Store = VALUE,
) -> Plan:
    """sizes: elements of the buffers of Q, K, V and the mask, if there is one; out: shape of Y."""
    wide = power_of_two(max(shape.width, shape.values, 16))
    narrow = dtype == "float32" and precision == "ieee"
    rows = 16 if narrow or shape.outer * shape.heads * ceil(shape.rows / 64) < 132 else 64
    keys = min(32 if narrow else 64, power_of_two(max(16, shape.keys)))
    constants: dict[str, Constant] = {
        "ROWS": shape.rows,
        "WIDTH": shape.width,
        "KEYS": shape.keys,
        "VALUES": shape.values,
        "HEADS": shape.heads,
        "SCALE": shape.scale,
        "PRECISION": precision,
        "BM": rows,
        "BN": keys,
        "BD": max(16, power_of_two(shape.width)),
        "BV": max(16, power_of_two(shape.values)),
    }
    for name, place, step in (("Q", shape.q, "ROW"), ("K", shape.k, "KEY"), ("V", shape.v, "KEY")):
        constants |= {f"{name}_START": place.start, f"{name}_OUTER": place.outer, f"{name}_HEAD": place.head}
        constants[f"{name}_{step}"] = place.row
    constants |= mask_and_output(shape.mask, shape.y) | store.constants
    buffers: list[Buffer] = [(name, (size,), dtype) for name, size in zip(("Q", "K", "V", "M"), sizes, strict=False)]
    grid = (ceil(shape.rows / rows), shape.outer * shape.heads, 1)
    return Plan("triton_float:attention", constants, grid, (*buffers, *store.buffers(out, dtype)), 4 if wide <= 128 else 8, 2)
