"""Launches and packed parameters of the int8 kernels, from plain numbers: no TVM here.

A `Plan` names the Triton function, its constants and grid, and the buffers its pointers are, in order. The modules named after
the kernel families make PrimFuncs of plans; tests and measurements run them directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from .....ir.errors import OptionError
from ...kernels.base import Convolution, FloatAdd, Outliers, ResidualAdd, Tail, padded
from .blocks import Block, Problem, choose, power_of_two
from .plans import Buffer, Constant, Plan

#: The least inner dimension of a tensor-core instruction on 8-bit operands.
LEAST_DEPTH = 32

#: Filters of one column tile of a grouped convolution: each tile reads its own band of channels.
BAND_COLUMNS = 32


@dataclass(frozen=True)
class ImageQuantize:
    """`gw::quantize` of a float image on the way into a convolution. inverse: 1 / scale in float32."""

    inverse: float
    qmin: int
    qmax: int


#: Columns of outliers that a linear layer adds: each is an outer product without tensor cores.
MOST_OUTLIERS = 8

#: More products of two s8 values could leave s32 on the way, and mma.sync saturates there.
MOST_DEPTH = 131_071


def require_depth(depth: int) -> None:
    if depth > MOST_DEPTH:
        raise OptionError(
            f"a sum of {depth} products of 8-bit values may leave 32 bits; the int8 kernels sum {MOST_DEPTH} at most"
        )


# -- tails -------------------------------------------------------------------------------------------------------------------


def _residual_kind(tail: Tail) -> str:
    if isinstance(tail.residual, FloatAdd):
        return "tile" if tail.residual.normalized else "float"
    return "add" if tail.residual is not None else ""


def kind_of(tail: Tail) -> str:
    return "bounded" if tail.kind == "rescale" and tail.bounded else tail.kind


def tail_constants(tail: Tail) -> dict[str, Constant]:
    """The tail as `triton_tails.finish` takes it."""
    add = tail.residual if isinstance(tail.residual, ResidualAdd) else None
    return {
        "KIND": kind_of(tail),
        "ZERO_POINT": tail.zero_point,
        "QMIN": tail.qmin,
        "QMAX": tail.qmax,
        "RESIDUAL": _residual_kind(tail),
        "A_MULTIPLIER": add.a_multiplier if add else 0,
        "B_MULTIPLIER": add.b_multiplier if add else 0,
        "ADD_SHIFT": add.shift if add else 1,
        "A_ZERO_POINT": add.a_zero_point if add else 0,
        "B_ZERO_POINT": add.b_zero_point if add else 0,
        "ADD_ZERO_POINT": add.zero_point if add else 0,
        "ADD_QMIN": add.qmin if add else 0,
        "ADD_QMAX": add.qmax if add else 0,
    }


TAIL_VECTORS = {
    "rescale": (("scale", "float32"),),
    "scale": (("scale", "float32"),),
    "dyadic": (("multiplier", "int32"), ("shift", "int32")),
    "none": (),
}


def outlier_buffers(tail: Tail, rows: int, outer: int) -> tuple[list[Buffer], list[Buffer]]:
    """Of a linear layer's outliers: their activations, and what `pack_outliers` returns."""
    if tail.outliers is None:
        return [], []
    columns, channels = tail.outliers.columns, padded(outer)
    vectors = [("outlier_bias", (channels,), "int32"), ("outlier_scale", (channels,), "float32")]
    return [("O", (rows, columns), tail.outliers.dtype)], [("outlier_w", (channels, columns), "int8"), *vectors]


def outlier_constants(tail: Tail) -> dict[str, Constant]:
    """How many outliers there are; no pointers to them where there are none."""
    if tail.outliers is not None:
        return {"OUTLIERS": tail.outliers.columns}
    return {"OUTLIERS": 0, **dict.fromkeys(("outlier_x", "outlier_w", "outlier_bias", "outlier_scale"))}


def tail_buffers(tail: Tail, channels: int) -> list[Buffer]:
    vectors: list[Buffer] = [(name, (padded(channels),), dtype) for name, dtype in TAIL_VECTORS[tail.kind]]
    return [*vectors, *([("table", (256,), tail.table)] if tail.table else [])]


def missing_pointers(tail: Tail) -> dict[str, Constant]:
    """The pointers of a kernel that the tail has no buffer for."""
    vectors = len(TAIL_VECTORS[tail.kind])
    absent = {"scale": vectors > 0, "shift": vectors > 1, "table": bool(tail.table), "residual": tail.residual is not None}
    return {name: None for name, present in absent.items() if not present}


def pack_tail(tail: Tail, channels: int, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each parameter, (1,) or (channels,), as padded(channels) entries; padding lanes get 1: a shift stays inside [1, 62]."""
    packed = []
    for name, dtype in TAIL_VECTORS[tail.kind]:
        if values.get(name) is None:
            raise OptionError(f"tail '{tail.kind}' needs '{name}'; got {', '.join(sorted(values)) or 'nothing'}")
        vector = np.ones(padded(channels), dtype)
        vector[:channels] = np.asarray(values[name], dtype).reshape(-1)
        packed.append(vector)
    if tail.table:
        # Kernels look at the low byte of a code, and tables start at the lowest one.
        packed.append(np.roll(values["table"], 128 if tail.dtype == "int8" else 0))
    return tuple(packed)


def flip_of(dtype: str) -> bool:
    """Whether activations are multiplied as x - 128."""
    return dtype == "uint8"


def fold_bias(weight: np.ndarray, bias: np.ndarray | None, zero_point: int, filters: int) -> np.ndarray:
    """bias - zero_point * sum(weight) modulo 2^32, padded with zeros. weight s8 (O, ...)."""
    sums = weight.reshape(weight.shape[0], -1).astype(np.int64).sum(1)
    wide = np.zeros(padded(filters), np.int32)
    wide[:filters] = ((0 if bias is None else bias.astype(np.int64)) - zero_point * sums).astype(np.int32)
    return wide


def normalized_buffers(tail: Tail, rows: int, outer: int) -> list[Buffer]:
    """What stands behind a residual that a linear layer normalizes as it adds it."""
    if not (isinstance(tail.residual, FloatAdd) and tail.residual.normalized):
        return []
    return [("statistics", (rows, 2), "float32"), ("norm_weight", (outer,), "float32"), ("norm_bias", (outer,), "float32")]


def normalized_constants(tail: Tail) -> dict[str, Constant]:
    """No pointers to what `normalized_buffers` leaves out."""
    absent: dict[str, Constant] = dict.fromkeys(("statistics", "norm_weight", "norm_bias"))
    return {} if isinstance(tail.residual, FloatAdd) and tail.residual.normalized else absent


def residual_buffer(tail: Tail, shape: tuple[int, ...]) -> list[Buffer]:
    return [] if tail.residual is None else [("R", shape, tail.residual.b_dtype)]


def _grid(rows: int, columns: int, block: Block, images: int = 1) -> tuple[int, int, int]:
    return ceil(rows / block.rows) * ceil(columns / block.columns), images, 1


def _cut(block: Block) -> dict[str, Constant]:
    return {"BM": block.rows, "BN": block.columns, "BK": block.depth, "GROUP": block.group}


# -- rows by weights ---------------------------------------------------------------------------------------------------------


def linear_problem(rows: int, inner: int, outer: int) -> Problem:
    return Problem(rows, outer, inner)


def linear(
    rows: int, inner: int, outer: int, dtype: str, tail: Tail, level: str, block: Block | None = None, pitch: int | None = None
) -> Plan:
    """Y [rows, outer] = tail(X [rows, inner] W^T). pitch: elements from one row of X to the next."""
    require_depth(inner)
    block = block or choose(linear_problem(rows, inner, outer), level)
    pitch = pitch or inner
    w_pitch = padded(inner)
    constants = {"M": rows, "N": outer, "K": inner, "X_PITCH": pitch, "W_PITCH": w_pitch, "FLIP": flip_of(dtype)}
    activations, parameters = outlier_buffers(tail, rows, outer)
    buffers = (
        ("X", (rows, pitch), dtype),
        *activations,
        *residual_buffer(tail, (rows, outer)),
        *normalized_buffers(tail, rows, outer),
        ("W", (padded(outer), w_pitch), "int8"),
        ("B", (padded(outer),), "int32"),
        *tail_buffers(tail, outer),
        *parameters,
        ("Y", (rows, outer), tail.stored),
    )
    constants |= tail_constants(tail) | missing_pointers(tail) | outlier_constants(tail) | normalized_constants(tail)
    constants |= _cut(block)
    return Plan("triton_int8:linear", constants, _grid(rows, outer, block), buffers, block.warps, block.stages)


def pack_linear(
    dtype: str, zero_point: int, tail: Tail, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Weights [N padded, K padded] with zeros, folded bias, the tail's vectors. weight s8 (N, K)."""
    outer, inner = weight.shape
    packed = np.zeros((padded(outer), padded(inner)), np.int8)
    packed[:outer, :inner] = weight
    folded = fold_bias(weight, bias, zero_point - 128 * flip_of(dtype), outer)
    return packed, folded, *pack_tail(tail, outer, **values)


def pack_outliers(outliers: Outliers, weight: np.ndarray, bias: np.ndarray | None, scale: np.ndarray) -> list[np.ndarray]:
    """weight s8 (N, columns), padded with zeros; the bias with the zero point folded in; scale, (1,) or (N,)."""
    packed = np.zeros((padded(len(weight)), weight.shape[1]), np.int8)
    packed[: len(weight)] = weight
    (factors,) = pack_tail(Tail("scale", "float32"), len(weight), scale=scale)
    return [packed, fold_bias(weight, bias, outliers.zero_point, len(weight)), factors]


# -- convolutions ------------------------------------------------------------------------------------------------------------


def channels_read(shape: Convolution, quantized: bool = False) -> int:
    """Channels that a tap of a dense or grouped convolution reads, and that its packed weights have."""
    if quantized:
        return shape.channels
    if shape.groups > 1:
        return _band(shape)
    return next((few for few in (4, 8) if shape.channels <= few), padded(shape.channels))


def band_start(shape: Convolution, first: int) -> int:
    """First channel that the column tile whose first filter is `first` reads."""
    inputs, outputs = shape.channels // shape.groups, shape.filters // shape.groups
    return first // outputs * inputs // 16 * 16


def _band(shape: Convolution) -> int:
    """Channels that every column tile of a grouped convolution reads; a multiple of 16."""
    inputs, outputs = shape.channels // shape.groups, shape.filters // shape.groups
    widest = 0
    for first in range(0, shape.filters, BAND_COLUMNS):
        last = min(first + BAND_COLUMNS, shape.filters) - 1
        widest = max(widest, padded((last // outputs + 1) * inputs) - band_start(shape, first))
    return widest


def convolution_problem(shape: Convolution, quantized: bool = False) -> Problem:
    rows = shape.batch * shape.out_height * shape.out_width
    return Problem(rows, padded(shape.filters), prod(shape.kernel) * channels_read(shape, quantized))


def pointwise(shape: Convolution) -> bool:
    """Whether every pixel is a row of a matrix."""
    return (*shape.kernel, *shape.stride, shape.groups) == (1, 1, 1, 1, 1) and not shape.bordered


def image_constants(shape: Convolution) -> dict[str, Constant]:
    return {
        "BATCH": shape.batch,
        "HEIGHT": shape.height,
        "WIDTH": shape.width,
        "OUT_HEIGHT": shape.out_height,
        "OUT_WIDTH": shape.out_width,
        "N": padded(shape.filters),
        "KERNEL_HEIGHT": shape.kernel[0],
        "KERNEL_WIDTH": shape.kernel[1],
        "STRIDE_Y": shape.stride[0],
        "STRIDE_X": shape.stride[1],
        "PAD_Y": shape.padding[0],
        "PAD_X": shape.padding[1],
        "DILATION_Y": shape.dilation[0],
        "DILATION_X": shape.dilation[1],
    }


def fitted(block: Block, shape: Convolution, least: int = LEAST_DEPTH) -> Block:
    """The block with a depth that divides the channels, where one does, and a grouped convolution's fixed columns."""
    columns = BAND_COLUMNS if shape.groups > 1 else block.columns
    channels = channels_read(shape)
    depth = block.depth
    while channels % depth and depth > least:
        depth //= 2
    return Block(block.rows, columns, depth if channels % depth == 0 else block.depth, block.warps, block.stages, block.group)


def convolution(
    shape: Convolution,
    dtype: str,
    zero_point: int,
    tail: Tail,
    level: str,
    block: Block | None = None,
    quantize: ImageQuantize | None = None,
) -> Plan:
    """A convolution, dense, grouped or depthwise. Raises OptionError: an empty output; a float image where groups are not 1."""
    if min(shape.out_height, shape.out_width) < 1:
        raise OptionError(f"convolution {shape} has an empty output; the kernel is larger than the padded image")
    if shape.groups > 1 and quantize is not None:
        raise OptionError(f"only dense convolutions quantize their input; this one has {shape.groups} groups")
    require_depth(prod(shape.kernel) * shape.channels // shape.groups)
    filters = padded(shape.filters)
    x: Buffer = ("X", (shape.batch, shape.height, shape.width, padded(shape.channels)), dtype)
    if quantize is not None:
        x = ("X", (shape.batch, shape.channels, shape.height, shape.width), "float32")
    out_shape = (shape.batch, shape.out_height, shape.out_width, filters)
    weight = (filters, padded(prod(shape.kernel) * channels_read(shape, quantize is not None)))
    if shape.depthwise:
        weight = (prod(shape.kernel), filters)
    buffers = (
        x,
        *residual_buffer(tail, out_shape),
        ("W", weight, "int8"),
        ("B", (filters,), "int32"),
        *tail_buffers(tail, shape.filters),
        ("Y", out_shape, tail.stored),
    )
    constants = tail_constants(tail) | missing_pointers(tail)
    rows = shape.batch * shape.out_height * shape.out_width
    if shape.depthwise:
        chosen = block or depthwise_block(shape)
        constants |= image_constants(shape) | {"X_ZERO_POINT": zero_point, "BM": chosen.rows, "BN": chosen.columns}
        grid = (ceil(rows / chosen.rows), ceil(filters / chosen.columns), 1)
        return Plan("triton_int8:depthwise", constants, grid, buffers, chosen.warps, 1)
    chosen = block or choose(convolution_problem(shape, quantize is not None), level)
    if pointwise(shape) and quantize is None:
        channels = padded(shape.channels)
        sizes = {"M": rows, "N": filters, "K": channels, "X_PITCH": channels, "W_PITCH": weight[1], "FLIP": flip_of(dtype)}
        constants |= sizes | outlier_constants(tail) | normalized_constants(tail) | _cut(chosen)
        return Plan("triton_int8:linear", constants, _grid(rows, filters, chosen), buffers, chosen.warps, chosen.stages)
    chosen = chosen if quantize is not None else fitted(chosen, shape)
    constants |= image_constants(shape) | _cut(chosen)
    grouped = shape.groups > 1
    channels = channels_read(shape, quantize is not None)
    constants |= {
        "X_PITCH": padded(shape.channels),
        "CHANNELS": channels,
        "W_PITCH": weight[1],
        "BAND_FILTERS": shape.filters // shape.groups if grouped else 0,
        "BAND_CHANNELS": shape.channels // shape.groups if grouped else 0,
        "BAND_LAST": padded(shape.channels) - channels if grouped else 0,
        "FLIP": flip_of(dtype),
        "X_ZERO_POINT": zero_point,
        "INVERSE": 0.0 if quantize is None else quantize.inverse,
        "X_QMIN": 0 if quantize is None else quantize.qmin,
        "X_QMAX": 0 if quantize is None else quantize.qmax,
    }
    grid = _grid(rows, filters, chosen)
    return Plan("triton_int8:convolution", constants, grid, buffers, chosen.warps, chosen.stages)


def depthwise_block(shape: Convolution) -> Block:
    """Channels in a program as far as they go, pixels of one image row beside them."""
    columns = min(64, power_of_two(padded(shape.filters)))
    return Block(max(8, 1024 // columns), columns, 1, 4, 1)


def depthwise_space(shape: Convolution) -> list[Block]:
    """The blocks of a depthwise convolution worth measuring."""
    widest = min(128, power_of_two(padded(shape.filters)))
    return [
        Block(size // columns, columns, 1, 4, 1)
        for columns in (16, 32, 64, 128)
        for size in (512, 1024, 2048, 4096)
        if columns <= widest and size // columns >= 4
    ]


def spread(shape: Convolution, weight: np.ndarray) -> np.ndarray:
    """(O, C / groups, KH, KW) -> [O, taps, channels read], zeros where a tile reads channels of other groups."""
    filters, taps, channels = shape.filters, prod(shape.kernel), channels_read(shape)
    inputs, outputs = shape.channels // shape.groups, filters // shape.groups
    view = np.zeros((filters, taps, channels), weight.dtype)
    by_tap = weight.reshape(filters, -1, taps).transpose(0, 2, 1)
    tile = BAND_COLUMNS if shape.groups > 1 else filters
    for first in range(0, filters, tile):
        start = min(band_start(shape, first), padded(shape.channels) - channels) if shape.groups > 1 else 0
        last = min(first + tile, filters)
        for group in range(first // outputs, (last - 1) // outputs + 1):
            some = slice(max(first, group * outputs), min(last, (group + 1) * outputs))
            at = group * inputs - start
            view[some, :, at : at + inputs] = by_tap[some]
    return view


def pack_convolution(
    shape: Convolution,
    dtype: str,
    zero_point: int,
    tail: Tail,
    weight: np.ndarray,
    bias: np.ndarray | None,
    quantized: bool = False,
    **values: np.ndarray,
) -> tuple[np.ndarray, ...]:
    """Packed weights, folded bias, the tail's vectors. weight s8 (O, C / groups, KH, KW).

    Dense: [O padded, taps * channels padded], k = (tap, channel), or (channel, tap) where the image is float. Grouped: the same
    over the band of channels that a tile of BAND_COLUMNS filters reads. Depthwise: [taps, O padded].
    """
    filters, taps = shape.filters, prod(shape.kernel)
    vectors = pack_tail(tail, filters, **values)
    if shape.depthwise:
        packed = np.zeros((taps, padded(filters)), np.int8)
        packed[:, :filters] = weight.reshape(filters, taps).T
        return packed, fold_bias(weight, bias, zero_point, filters), *vectors
    channels = channels_read(shape, quantized)
    packed = np.zeros((padded(filters), padded(taps * channels)), np.int8)
    if quantized:
        packed[:filters, : taps * channels] = weight.reshape(filters, -1)
    else:
        packed[:filters, : taps * channels] = spread(shape, weight).reshape(filters, -1)
    return packed, fold_bias(weight, bias, zero_point - 128 * flip_of(dtype), filters), *vectors


# -- a product of two activations --------------------------------------------------------------------------------------------


def matmul_problem(batch: int, rows: int, inner: int, columns: int) -> Problem:
    return Problem(rows, columns, inner, images=batch)


def matmul(
    batch: int,
    rows: int,
    inner: int,
    columns: int,
    dtype: str,
    zero_point: int,
    transposed: bool,
    tail: Tail,
    level: str,
    block: Block | None = None,
) -> Plan:
    """Y [batch, rows, columns] = tail((A - zero_point) B); B is s8 with zero point 0."""
    require_depth(inner)
    block = block or choose(matmul_problem(batch, rows, inner, columns), level)
    constants: dict[str, Constant] = {"M": rows, "N": columns, "K": inner, "TRANSPOSED": transposed, "FLIP": flip_of(dtype)}
    constants["OFFSET"] = 128 * flip_of(dtype) - zero_point
    right = (batch, columns, inner) if transposed else (batch, inner, columns)
    out_shape = (batch, rows, columns)
    buffers = (
        ("A", (batch, rows, inner), dtype),
        ("Bm", right, "int8"),
        *residual_buffer(tail, out_shape),
        *tail_buffers(tail, columns),
        ("Y", out_shape, tail.stored),
    )
    constants |= tail_constants(tail) | missing_pointers(tail) | _cut(block)
    return Plan("triton_int8:matmul", constants, _grid(rows, columns, block, batch), buffers, block.warps, block.stages)
