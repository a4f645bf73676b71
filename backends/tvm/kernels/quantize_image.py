"""`gw::quantize` of a float image [N, C, H, W] of few channels, straight into a layout with channels last.

Sixteen pixels of a row at a time: each channel's plane is read and quantized as one vector, and four channels are packed into one
32-bit word a pixel. `quantize_image` stores the words with the stride of the physical layout [N, H, W, Cp] (lanes past the last
word are not written: they may hold anything). `framed_words` stores them side by side, inside the border that a first
convolution asks for: that kernel then reads a quarter of the bytes, and nothing is copied again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import tirx

from .base import LANES, Convolution, padded
from .emit import arguments, bind, build, clamp_start, loop, parallel_kind, shuffle, store
from .float_base import load_lanes
from .isa import Isa, T, isa_of
from .tail import rounded

#: Pixels a microsecond of one core, for the choice between a serial and a parallel loop.
PIXELS_PER_US = 1000

#: More channels than this have whole vectors of their own.
MOST_CHANNELS = LANES

#: Bytes that a kernel may read past the end of what it was given.
SLACK = 64

#: Channels of one 32-bit word.
WORD = 4


@dataclass(frozen=True)
class Quantize:
    """The parameters of `gw::quantize`; dtype is "uint8" or "int8"."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: str

    @property
    def inverse(self) -> float:
        """1 / scale, rounded to float32 as the reference rounds it."""
        return float(np.float32(1.0) / np.float32(self.scale))

    def codes(self, x: Any, isa: Isa) -> Any:
        """A vector of floats -> s32 steps from the zero point: round_half_even(clamp(x / scale, qmin - z, qmax - z))."""
        low, high = (T.Broadcast(T.float32(limit - self.zero_point), LANES) for limit in (self.qmin, self.qmax))
        return rounded(isa, T.max(T.min(x * T.Broadcast(T.float32(self.inverse), LANES), high), low))


def quantize_image(shape: tuple[int, int, int, int], quantize: Quantize, level: str) -> tirx.PrimFunc:
    """X float32 [N, C, H, W], C up to MOST_CHANNELS, H * W at least LANES -> Y [N, H, W, Cp] of the quantized type."""
    n, c, h, w = shape
    isa = isa_of(level)
    pixels, pitch = h * w, padded(c)

    def body() -> None:
        x, y = arguments(("X", shape, "float32"), ("Y", (n, h, w, pitch), quantize.dtype))
        words = T.decl_buffer((prod((n, pixels, pitch)) // WORD,), "int32", data=y.data)
        blocks = -(-pixels // LANES)
        with loop(n * blocks, parallel_kind(n * pixels / PIXELS_PER_US)) as index:
            image = bind(T.floordiv(index, blocks))
            # The last block is moved back to overlap its neighbour.
            first = bind(clamp_start(T.floormod(index, blocks), LANES, pixels))
            for group in range(-(-c // WORD)):
                planes = [(image * c + channel) * pixels + first for channel in range(WORD * group, min(WORD * (group + 1), c))]
                packed = _word([x.vload([at], f"float32x{LANES}") for at in planes], quantize, 0, isa)
                at = (image * pixels + first) * (pitch // WORD) + group
                T.buffer_store(words, packed, [T.Ramp(at, pitch // WORD, LANES)])

    return build("quantize_image", body)


def word_pitch(channels: int) -> int:
    """Bytes a pixel of `framed_words`."""
    return -(-channels // WORD) * WORD


def framed_words(shape: Convolution, x: Any, quantize: Quantize, isa: Isa, pitch: int = 0) -> Any:
    """Quantizes X [N, C, H, W] into a scratch [N, framed height, framed width, pitch] whose border holds the zero point.

    pitch: `word_pitch(C)` (0), or C where that is less than a word. Channels past C hold anything that meets zero weights; on
    levels whose dot instruction reads u8, s8 values become x + 128.
    """
    shift = isa.shift(quantize.dtype)
    pitch, height, width = pitch or word_pitch(shape.channels), shape.framed_height, shape.framed_width
    scratch = T.alloc_buffer((shape.batch * height * width * pitch + SLACK,), isa.operand or quantize.dtype)
    pixels = shape.height * shape.width
    most = min(pitch, WORD)  # bytes that are kept of a word

    def blank(offset: Any, columns: int) -> None:
        fill = T.Cast(str(scratch.dtype), T.int32(quantize.zero_point + shift))
        with loop(columns * (pitch // most)) as piece:
            _keep(scratch, offset + piece * most, T.Broadcast(fill, WORD), most)

    def block(image: Any, row: Any, first: Any, valid: int, offset: Any) -> None:
        for group in range(-(-pitch // WORD)):
            channels = range(WORD * group, min(WORD * (group + 1), shape.channels))
            starts = [(image * shape.channels + c) * pixels + row * shape.width + first for c in channels]
            packed = bind(_word([load_lanes(x, at, valid) for at in starts], quantize, shift, isa))
            if pitch <= WORD and valid == LANES:
                codes = T.reinterpret(f"{scratch.dtype}x{LANES * WORD}", packed)
                if pitch < WORD:
                    codes = shuffle([codes], [WORD * pixel + byte for pixel in range(LANES) for byte in range(pitch)])
                store(scratch, offset + first * pitch, codes, LANES * pitch)
                continue
            words = T.alloc_buffer((LANES,), "int32")
            store(words, 0, packed)
            with loop(valid) as pixel:
                code = T.reinterpret(f"{scratch.dtype}x{WORD}", words.vload([pixel]))
                _keep(scratch, offset + (first + pixel) * pitch + group * WORD, code, most)

    def interior(image: Any, row: Any, offset: Any) -> None:
        if shape.width < LANES:
            block(image, row, 0, shape.width, offset)
            return
        with loop(-(-shape.width // LANES)) as index:
            block(image, row, bind(clamp_start(index, LANES, shape.width) + T.int32(0)), LANES, offset)

    (top, left), right = shape.padding, width - shape.padding[1] - shape.width
    with loop(shape.batch * height, parallel_kind(shape.batch * pixels / PIXELS_PER_US)) as index:
        image, y = (index // height, index % height) if shape.batch > 1 else (0, index)
        base = bind(index * (width * pitch) + T.int32(0))

        def framed(y: Any = y, image: Any = image, base: Any = base) -> None:
            for start, columns in ((0, left), (left + shape.width, right)):
                if columns:
                    blank(base + start * pitch, columns)
            interior(image, y - top, base + left * pitch)

        if height == shape.height:
            framed()
        else:
            with T.If(T.And(y >= top, y < top + shape.height)):
                with T.Then():
                    framed()
                with T.Else():
                    blank(base, width)
    return scratch


def _keep(buffer: Any, offset: Any, word: Any, count: int) -> None:
    """Stores the first `count` of WORD bytes."""
    if count == WORD:
        store(buffer, offset, word, WORD)
        return
    for byte in range(count):
        T.buffer_store(buffer, shuffle([word], [byte]), [offset + byte])


def _word(planes: list[Any], quantize: Quantize, shift: int, isa: Isa) -> Any:
    """Up to four vectors of floats -> one s32 vector, a byte for each; `shift` is added to every code."""
    packed: Any = None
    for place, plane in enumerate(planes):
        code = (quantize.codes(plane, isa) + _splat(quantize.zero_point + shift)) & _splat(255)
        code = code << _splat(8 * place) if place else code
        packed = code if packed is None else packed | code
    return packed


def _splat(value: int) -> Any:
    return T.Broadcast(T.int32(value), LANES)
