"""Launches of a first int8 convolution, which quantizes its float image; no TVM here. See `plan_int8`.

Few taps are gathered from the image, quantized in registers and multiplied in one launch: every pixel is quantized again for each
tap that reads it, which is cheaper than a second launch. Many taps are not: the image is quantized once, into a frame of words
(`triton_image`), and the product reads that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np

from ...kernels.base import Convolution, Tail, padded
from . import plan_int8
from .blocks import Block, Problem, choose, power_of_two
from .plan_int8 import LEAST_DEPTH, ImageQuantize, fold_bias, pack_tail
from .plans import Buffer, Plan

#: Codes of one word: the channels of a pixel.
WORD = 4

#: Products of one output up to which a convolution gathers them itself.
GATHERED = 2 * LEAST_DEPTH

#: Words of a program that quantizes.
FRAME_WORDS = 1024

#: Constants of a gathering convolution that the product over a frame does not have: the border, and how codes are made.
GATHER = {"HEIGHT", "WIDTH", "KERNEL_WIDTH", "PAD_Y", "PAD_X", "DILATION_X", "CHANNELS", "BAND_FILTERS", "BAND_CHANNELS"}
GATHER |= {"BAND_LAST", "FLIP", "X_ZERO_POINT", "INVERSE", "X_QMIN", "X_QMAX"}


def framed(shape: Convolution) -> bool:
    """Whether the image is quantized into a frame of words first."""
    depth = shape.channels * prod(shape.kernel)
    return shape.channels <= WORD and shape.groups == 1 and shape.dilation[1] == 1 and depth > GATHERED


@dataclass(frozen=True)
class Frame:
    """The words that a convolution reads. row: bytes that the product takes of each kernel row, its taps among them."""

    height: int
    width: int
    row: int

    @classmethod
    def of(cls, shape: Convolution) -> Frame:
        row = ceil(shape.kernel[1] * WORD / LEAST_DEPTH) * LEAST_DEPTH
        height = (shape.out_height - 1) * shape.stride[0] + (shape.kernel[0] - 1) * shape.dilation[0] + 1
        # Rows of the frame start at multiples of 16 bytes.
        width = padded((shape.out_width - 1) * shape.stride[1] * WORD + row) // WORD
        return cls(height, width, row)


def problem(shape: Convolution) -> Problem:
    if not framed(shape):
        return plan_int8.convolution_problem(shape, True)
    depth = shape.kernel[0] * Frame.of(shape).row
    return Problem(shape.batch * shape.out_height * shape.out_width, padded(shape.filters), depth)


def guess(shape: Convolution, level: str) -> Block:
    """A gather is one stage deep: asynchronous copies would be of four bytes each, and its numbers are quantized in registers
    anyway. Rows of a frame are as deep as a step of the tensor cores takes, so that none is multiplied in vain."""
    chosen = choose(problem(shape), level)
    rows, columns = min(chosen.rows, 128), min(chosen.columns, 64)
    return Block(rows, columns, LEAST_DEPTH, 4, 4 if framed(shape) else 1, chosen.group)


def space(shape: Convolution) -> list[Block]:
    """The blocks worth measuring."""
    columns = min(64, power_of_two(padded(shape.filters)))
    sizes = dict.fromkeys(((32, columns), (64, columns), (128, columns), (256, columns), (128, 32)))
    if not framed(shape):
        return [Block(rows, wide, depth, 4, 1) for rows, wide in sizes for depth in (32, 64)]
    deep = [depth for depth in (32, 64) if Frame.of(shape).row % depth == 0]
    warps = {256: (4, 8)}
    return [
        Block(rows, wide, depth, count, stages)
        for rows, wide in sizes
        for depth in deep
        for count in warps.get(rows, (4,))
        for stages in (2, 4, 6)
    ]


def convolution(
    shape: Convolution,
    dtype: str,
    zero_point: int,
    tail: Tail,
    level: str,
    quantize: ImageQuantize,
    block: Block | None = None,
) -> Plan:
    """X float32 [N, C, H, W]. Raises OptionError as `plan_int8.convolution`."""
    chosen = block or guess(shape, level)
    direct = plan_int8.convolution(shape, dtype, zero_point, tail, level, chosen, quantize)
    if not framed(shape):
        return direct
    frame = Frame.of(shape)
    words: Buffer = ("frame", (shape.batch, frame.height, frame.width * WORD), "int8")
    weight = packed_weight_shape(shape)
    first = _frame_plan(shape, frame, words, direct.buffers[0], flip=dtype == "uint8", zero_point=zero_point, quantize=quantize)
    # The same product, of another image and of weights in another order.
    _, *rest = direct.buffers
    buffers = (words, *((name, weight if name == "W" else size, kind) for name, size, kind in rest))
    constants = {name: value for name, value in direct.constants.items() if name not in GATHER} | {
        "FRAME_HEIGHT": frame.height,
        "X_PITCH": frame.width * WORD,
        "ROW": frame.row,
        "W_PITCH": weight[1],
        "BK": chosen.depth if frame.row % chosen.depth == 0 else LEAST_DEPTH,
    }
    return replace(direct, function="triton_image:convolution", constants=constants, buffers=buffers, first=first)


def _frame_plan(
    shape: Convolution, frame: Frame, words: Buffer, image: Buffer, *, flip: bool, zero_point: int, quantize: ImageQuantize
) -> Plan:
    constants = {
        "BATCH": shape.batch,
        "CHANNELS": shape.channels,
        "HEIGHT": shape.height,
        "WIDTH": shape.width,
        "TOP": shape.padding[0],
        "LEFT": shape.padding[1],
        "FRAME_HEIGHT": frame.height,
        "FRAME_WIDTH": frame.width,
        "FLIP": flip,
        "INVERSE": quantize.inverse,
        "ZERO_POINT": zero_point,
        "QMIN": quantize.qmin,
        "QMAX": quantize.qmax,
        "BLOCK": FRAME_WORDS,
    }
    count = ceil(shape.batch * frame.height * frame.width / FRAME_WORDS)
    return Plan("triton_image:frame", constants, (count, 1, 1), (image, words), 4, 1)


def packed_weight_shape(shape: Convolution) -> tuple[int, int]:
    if not framed(shape):
        return padded(shape.filters), padded(prod(shape.kernel) * shape.channels)
    return padded(shape.filters), shape.kernel[0] * Frame.of(shape).row


def pack(
    shape: Convolution, dtype: str, zero_point: int, tail: Tail, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Packed weights, folded bias, the tail's vectors; see `plan_int8.pack_convolution`. Of a frame: k = (kernel row, tap,
    channel), each row padded to `Frame.row` bytes with zeros."""
    if not framed(shape):
        return plan_int8.pack_convolution(shape, dtype, zero_point, tail, weight, bias, True, **values)
    (down, along), filters = shape.kernel, shape.filters
    packed = np.zeros((padded(filters), down, Frame.of(shape).row // WORD, WORD), np.int8)
    packed[:filters, :, :along, : shape.channels] = weight.transpose(0, 2, 3, 1)
    folded = fold_bias(weight, bias, zero_point - 128 * (dtype == "uint8"), filters)
    return packed.reshape(packed_weight_shape(shape)), folded, *pack_tail(tail, filters, **values)
