"""`gw::quantize` of a float image [N, C, H, W] straight into the physical layout [N, H, W, Cp], for few channels.

Sixteen pixels of a row at a time: each channel's plane is read and quantized as one vector, four channels are packed into one
32-bit word, and one word a pixel is stored. Lanes past the last such word are not written: they may hold anything.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import tirx

from .base import LANES, padded
from .emit import arguments, bind, build, clamp_start, loop, parallel_kind
from .isa import T

#: Pixels a microsecond of one core, for the choice between a serial and a parallel loop.
PIXELS_PER_US = 1000

#: More channels than this have whole vectors of their own.
MOST_CHANNELS = LANES


def quantize_image(
    shape: tuple[int, int, int, int], scale: float, zero_point: int, qmin: int, qmax: int, dtype: str
) -> tirx.PrimFunc:
    """X float32 [N, C, H, W], C up to MOST_CHANNELS, H * W at least LANES -> Y `dtype` [N, H, W, Cp]."""
    n, c, h, w = shape
    pixels, pitch = h * w, padded(c)
    inverse = float(np.float32(1.0) / np.float32(scale))

    def body() -> None:
        x, y = arguments(("X", shape, "float32"), ("Y", (n, h, w, pitch), dtype))
        words = T.decl_buffer((prod((n, pixels, pitch)) // 4,), "int32", data=y.data)
        blocks = -(-pixels // LANES)
        with loop(n * blocks, parallel_kind(n * pixels / PIXELS_PER_US)) as index:
            image = bind(T.floordiv(index, blocks))
            # The last block is moved back to overlap its neighbour.
            first = bind(clamp_start(T.floormod(index, blocks), LANES, pixels))
            for group in range(-(-c // 4)):
                packed: Any = None
                for place, channel in enumerate(range(4 * group, min(4 * group + 4, c))):
                    plane = x.vload([(image * c + channel) * pixels + first], f"float32x{LANES}")
                    code = _codes(plane, inverse, zero_point, qmin, qmax) & _splat(255)
                    code = code << _splat(8 * place) if place else code
                    packed = code if packed is None else packed | code
                at = (image * pixels + first) * (pitch // 4) + group
                T.buffer_store(words, packed, [T.Ramp(at, pitch // 4, LANES)])

    return build("quantize_image", body)


def _codes(x: Any, inverse: float, zero_point: int, qmin: int, qmax: int) -> Any:
    low, high = (T.Broadcast(T.float32(limit - zero_point), LANES) for limit in (qmin, qmax))
    steps = T.max(T.min(x * T.Broadcast(T.float32(inverse), LANES), high), low)
    rounded = T.Cast(f"int32x{LANES}", T.nearbyint(steps))
    return rounded + _splat(zero_point) if zero_point else rounded


def _splat(value: int) -> Any:
    return T.Broadcast(T.int32(value), LANES)
