"""The products of the zoo's networks, as keys of the tuning database name them: what `cuda_kernels tune` measures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ...backends.tvm.kernels.base import Convolution
from ...passes.quantize.quantize_fp8 import FEWEST_CHANNELS


@dataclass(frozen=True)
class Product:
    """shape: a convolution, or (rows, inner, outer) of a linear layer. image: the convolution quantizes a float
    image; of half precision, it reads a planar one. dtype: of what is multiplied; "fp8" is e4m3."""

    shape: Convolution | tuple[int, int, int]
    dtype: str = "int8"
    zero_point: int = 0
    image: bool = False

    @property
    def half(self) -> bool:
        return self.dtype == "float16"

    @property
    def fp8(self) -> bool:
        return self.dtype == "fp8"

    @property
    def key(self) -> str:
        if self.fp8:
            if isinstance(self.shape, Convolution):
                return f"convolution_fp8 {self.shape.work}"
            rows, inner, outer = self.shape
            return f"linear_fp8 {rows}x{inner} -> {rows}x{outer}"
        if self.half:
            if isinstance(self.shape, Convolution):
                return f"convolution_f32 {self.dtype} {self.shape.work}{', planar' if self.image else ''}"
            rows, inner, outer = self.shape
            return f"linear_f32 {self.dtype} {rows}x{inner} -> {rows}x{outer}"
        if isinstance(self.shape, Convolution):
            return f"convolution_int8 {'image ' if self.image else ''}{self.shape.work}"
        rows, inner, outer = self.shape
        return f"linear_int8 {rows}x{inner} -> {rows}x{outer}"


def resnet50(batch: int) -> Iterator[Product]:
    yield Product(Convolution(batch, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)), zero_point=-14, image=True)
    inputs, size = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            step = stride if block == 0 else 1
            yield Product(Convolution(batch, inputs, size, size, width, (1, 1)))
            yield Product(Convolution(batch, width, size, size, width, (3, 3), (step, step), (1, 1)))
            if block == 0:
                yield Product(Convolution(batch, inputs, size, size, 4 * width, (1, 1), (step, step)))
            size //= step
            yield Product(Convolution(batch, width, size, size, 4 * width, (1, 1)))
            inputs = 4 * width
    yield Product((batch, 2048, 1000))


def efficientnet_lite0(batch: int) -> Iterator[Product]:
    """Padding as TensorFlow's "same": the odd row of a stride of 2 is below and to the right."""
    stem = Convolution(batch, 3, 224, 224, 32, (3, 3), (2, 2), (0, 0), padding_end=(1, 1))
    yield Product(stem, zero_point=-14, image=True)
    inputs, size = 32, 112
    settings = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    )
    for expansion, outputs, blocks, stride, kernel in settings:
        for block in range(blocks):
            step, width = (stride if block == 0 else 1), inputs * expansion
            if expansion > 1:
                yield Product(Convolution(batch, inputs, size, size, width, (1, 1)))
            before = (kernel - step) // 2
            after = kernel - step - before
            window = Convolution(batch, width, size, size, width, (kernel, kernel), (step, step), (before, before), groups=width)
            yield Product(replace(window, padding_end=(after, after)))
            size //= step
            yield Product(Convolution(batch, width, size, size, outputs, (1, 1)))
            inputs = outputs
    yield Product(Convolution(batch, 320, 7, 7, 1280, (1, 1)))
    yield Product((batch, 1280, 1000))


def transformer(rows: int, width: int, hidden: int) -> Iterator[Product]:
    for inner, outer in ((width, width), (width, 3 * width), (width, hidden), (hidden, width)):
        yield Product((rows, inner, outer))


def _all() -> Iterator[Product]:
    for batch in (32, 1, 128, 8):
        yield from resnet50(batch)
    for batch in (1, 32):
        yield from transformer(128 * batch, 384, 1536)
    for batch in (1, 32):
        yield from efficientnet_lite0(batch)
    for batch in (32, 1, 128):
        yield from (replace(product, dtype="float16") for product in resnet50(batch))
    for batch in (32, 1):
        yield from _fp8(resnet50(batch))
        yield from _fp8(transformer(128 * batch, 384, 1536))
        yield from _fp8(efficientnet_lite0(batch))


def _fp8(products: Iterator[Product]) -> Iterator[Product]:
    """Those that `quantize-fp8` makes layers of 8-bit floats."""
    for product in products:
        shape = product.shape
        if not isinstance(shape, Convolution) or (shape.groups == 1 and shape.channels >= FEWEST_CHANNELS):
            yield replace(product, dtype="fp8", zero_point=0)


SHAPES: tuple[Product, ...] = tuple({product.key: product for product in _all()}.values())
