"""An image with its border written out, as the dot instruction reads it."""

from __future__ import annotations

from typing import Any

from .base import Convolution, padded
from .emit import loop, parallel_kind, store
from .isa import Isa, T


def pad_image(shape: Convolution, x: Any, zero_point: int, pitch: int, isa: Isa) -> Any:
    """Copies the image into a scratch [N, framed height, framed width, pitch] whose border holds the zero point.

    pitch <= padded(C) drops the padding lanes; values become what the level's dot instruction reads.
    """
    pad_y, pad_x = shape.padding
    height, width = shape.framed_height, shape.framed_width
    shift = isa.shift(str(x.dtype))
    dtype = isa.operand or str(x.dtype)
    scratch = T.alloc_buffer((shape.batch * height * width * pitch,), dtype)
    source = padded(shape.channels)
    lanes = next(size for size in (64, 32, 16, 8, 4, 2, 1) if pitch % size == 0)
    fill = T.Cast(dtype, T.int32(zero_point + shift))

    def put(offset: Any, value: Any) -> None:
        if lanes == 1:
            T.buffer_store(scratch, value, [offset])
        else:
            store(scratch, offset, value, lanes)

    def blank(offset: Any, pixels: Any) -> None:
        with loop(pixels) as pixel, loop(pitch // lanes) as c:
            put(offset + pixel * pitch + c * lanes, fill if lanes == 1 else T.Broadcast(fill, lanes))

    def copy(offset: Any, row: Any) -> None:
        with loop(shape.width) as column, loop(pitch // lanes) as c:
            kind = str(x.dtype) if lanes == 1 else f"{x.dtype}x{lanes}"
            value = x.vload([(row * shape.width + column) * source + c * lanes], kind)
            if shift:
                bits = value if x.dtype == "uint8" else T.reinterpret(kind.replace("int8", "uint8"), value)
                mask = T.uint8(128) if lanes == 1 else T.Broadcast(T.uint8(128), lanes)
                value = bits ^ mask
                value = value if dtype == "uint8" else T.reinterpret(kind.replace("uint8", "int8"), value)
            put(offset + column * pitch + c * lanes, value)

    work = shape.batch * height * width * pitch / 20_000
    with loop(shape.batch * height, parallel_kind(work)) as index:
        image, y = (index // height, index % height) if shape.batch > 1 else (0, index)
        base = index * (width * pitch)
        inside = T.And(y >= pad_y, y < pad_y + shape.height) if height > shape.height else None

        def interior() -> None:
            for start, columns in ((0, pad_x), (pad_x + shape.width, width - pad_x - shape.width)):
                if columns:
                    blank(base + start * pitch, columns)
            copy(base + pad_x * pitch, image * shape.height + y - pad_y)

        if inside is None or isinstance(y, int):
            interior()
        else:
            with T.If(inside):
                with T.Then():
                    interior()
                with T.Else():
                    blank(base, width)
    return scratch
