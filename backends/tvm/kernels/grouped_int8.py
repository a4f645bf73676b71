"""u8/s8 convolution with groups that are neither 1 nor one channel each: direct loops, output channels in lanes.

Every level runs the same code: each lane gathers its own group's channels, so no dot instruction applies.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from .base import LANES, Convolution, Tail, padded
from .emit import accumulator, bind, loop, parallel_kind, splat, store
from .isa import Isa, T
from .packed import Packing, Storage
from .tail import declare


def storage(shape: Convolution, packing: Packing | None) -> Storage:
    return Storage(prod(shape.kernel) * (shape.channels // shape.groups) * padded(shape.filters), 1, packing)


def pack_weight(shape: Convolution, weight: np.ndarray, packing: Packing | None = None) -> np.ndarray:
    """(O, C / groups, KH, KW) s8 -> flat [KH][KW][C / groups][padded(O)], packed."""
    filters = weight.shape[0]
    packed = np.zeros((*weight.shape[2:], weight.shape[1], padded(filters)), np.int8)
    packed[..., :filters] = weight.transpose(2, 3, 1, 0)
    return storage(shape, packing).pack(packed.reshape(-1))


def emit(shape: Convolution, dtype: str, zero_point: int, tail: Tail, isa: Isa, packing: Packing | None = None) -> None:
    """Emits the function's arguments and body; see `convolution_int8` for the buffers."""
    pitch, out_pitch = padded(shape.channels), padded(shape.filters)
    (kernel_height, kernel_width), depth = shape.kernel, shape.channels // shape.groups
    image = ("X", (shape.batch, shape.height, shape.width, pitch), dtype)
    out_shape = (shape.batch, shape.out_height, shape.out_width, out_pitch)
    stored = storage(shape, packing)
    packed = [stored.argument, ("B", (out_pitch,), "int32")]
    (x, weights, bias), code = declare(tail, isa, shape.filters, [image], packed, out_shape)
    weights = stored.shared(weights)
    shift = isa.shift(dtype)
    rows = shape.batch * shape.out_height

    with loop(rows, parallel_kind(shape.macs / 2_000)) as row, loop(shape.out_width) as column:
        image, out_y = row // shape.out_height, row % shape.out_height
        with loop(out_pitch // LANES) as block:
            acc = accumulator()
            store(acc, 0, bias.vload([block * LANES], f"int32x{LANES}"))
            with loop(kernel_height) as i, loop(kernel_width) as j:
                y = bind(out_y * shape.stride[0] + i * shape.dilation[0] - shape.padding[0] + T.int32(0))
                z = bind(column * shape.stride[1] + j * shape.dilation[1] - shape.padding[1] + T.int32(0))
                inside = T.And(T.And(y >= 0, y < shape.height), T.And(z >= 0, z < shape.width))
                with loop(depth) as c:
                    at = ((i * kernel_width + j) * depth + c) * out_pitch + block * LANES
                    weight = bind(T.Cast(f"int32x{LANES}", weights.vload([at], f"int8x{LANES}")))
                    gathered = accumulator()
                    with T.If(inside):
                        with T.Then():
                            base = ((image * shape.height + y) * shape.width + z) * pitch + c
                            _gather(shape, x, base, block, gathered, shift)
                        with T.Else():
                            store(gathered, 0, splat(T.int32(zero_point + shift)))
                    value = gathered.vload([0], f"int32x{LANES}")
                    store(acc, 0, acc.vload([0], f"int32x{LANES}") + value * weight)
            parameters = code.load(block * LANES)
            target = (row * shape.out_width + column) * out_pitch + block * LANES
            code.emit(bind(acc.vload([0], f"int32x{LANES}")), parameters, target)


def _gather(shape: Convolution, x: Any, base: Any, block: Any, gathered: Any, shift: int) -> None:
    """Lane l reads the channel that filter block * LANES + l's group starts at, plus the offset inside `base`."""
    per_group, depth = shape.filters // shape.groups, shape.channels // shape.groups
    with T.serial(0, LANES) as lane:
        filter_ = T.min(block * LANES + lane, shape.filters - 1)  # lanes past the last filter repeat it
        value = T.Cast("int32", x.vload([base + filter_ // per_group * depth])) + shift
        T.buffer_store(gathered, value, [lane])
