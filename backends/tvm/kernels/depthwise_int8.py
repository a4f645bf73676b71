"""u8/s8 depthwise convolution, channels in lanes."""

from __future__ import annotations

import numpy as np

from .base import LANES, Convolution, Tail, padded
from .emit import accumulator, bind, loop, parallel_kind, splat, store
from .isa import Isa, T
from .tail import declare


def pack_weight(shape: Convolution, weight: np.ndarray, isa: Isa) -> np.ndarray:
    """(C, 1, KH, KW) s8 -> flat [KH][KW][padded(C)]."""
    channels = weight.shape[0]
    packed = np.zeros((*weight.shape[2:], padded(channels)), np.int8)
    packed[..., :channels] = weight[:, 0].transpose(1, 2, 0)
    return packed.reshape(-1)


def emit(shape: Convolution, dtype: str, zero_point: int, tail: Tail, isa: Isa) -> None:
    """Emits the function's arguments and body; see `convolution_int8` for the buffers."""
    pitch = padded(shape.channels)
    kernel_height, kernel_width = shape.kernel
    image = ("X", (shape.batch, shape.height, shape.width, pitch), dtype)
    out_shape = (shape.batch, shape.out_height, shape.out_width, pitch)
    packed = [("W", (kernel_height * kernel_width * pitch,), "int8"), ("B", (pitch,), "int32")]
    (x, weights, bias), code = declare(tail, isa, shape.filters, [image], packed, out_shape)
    shift = isa.shift(dtype)
    rows = shape.batch * shape.out_height
    lanes = f"int32x{LANES}"
    with loop(rows, parallel_kind(shape.macs / 20_000)) as row, loop(shape.out_width) as column:
        image, out_y = row // shape.out_height, row % shape.out_height
        with loop(pitch // LANES) as block:
            acc = accumulator()
            store(acc, 0, bias.vload([block * LANES], lanes))
            with loop(kernel_height) as i, loop(kernel_width) as j:
                y = bind(out_y * shape.stride[0] + i * shape.dilation[0] - shape.padding[0] + T.int32(0))
                z = bind(column * shape.stride[1] + j * shape.dilation[1] - shape.padding[1] + T.int32(0))
                inside = T.And(T.And(y >= 0, y < shape.height), T.And(z >= 0, z < shape.width))
                weight = bind(T.Cast(lanes, weights.vload([(i * kernel_width + j) * pitch + block * LANES], f"int8x{LANES}")))
                old = acc.vload([0], lanes)
                with T.If(inside):
                    with T.Then():
                        at = ((image * shape.height + y) * shape.width + z) * pitch + block * LANES
                        value = T.Cast(lanes, x.vload([at], f"{dtype}x{LANES}")) + splat(T.int32(shift))
                        store(acc, 0, old + value * weight)
                    with T.Else():
                        store(acc, 0, old + splat(T.int32(zero_point + shift)) * weight)
            target = (row * shape.out_width + column) * pitch + block * LANES
            code.emit(bind(acc.vload([0], lanes)), code.load(block * LANES), target)
