"""u8/s8 2-D convolution: dense here, depthwise in `depthwise_int8`, other groups in `grouped_int8`.

    from graphwright.backends.tvm.kernels import convolution_int8
    function = convolution_int8.build(spec, tail, level)          # PrimFunc
    packed = convolution_int8.pack(spec, tail, level, weight, bias, scale=scale)   # numpy arrays, in the function's order

Buffers of the function: X [N, H, W, Cp], (residual [N, OH, OW, Op] if the tail has one), then the arrays `pack` returns,
then Y [N, OH, OW, Op]. Cp and Op are padded to LANES; lanes past C may hold anything. With `quantize`, X is a float image
[N, C, H, W], which the kernel quantizes into the scratch it reads anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from . import convolution_tiles, depthwise_int8, grouped_int8
from .base import LANES, Convolution, Tail, padded
from .emit import Argument
from .emit import build as build_function
from .frame import pad_image
from .gemm_int8 import Pixels, Product, Tiling, fold_bias, pack_panels
from .isa import Isa, isa_of
from .packed import Packing, Storage, emit_product, emit_tiles
from .quantize_image import WORD, Quantize, framed_words, word_pitch
from .tail import declare, pack_tail
from .tilings import choose_tiling


@dataclass(frozen=True)
class ConvolutionInt8:
    """A convolution with the type ("uint8" or "int8") and zero point of its input.

    quantize: how a float input becomes that type (dense convolutions of few channels); None where it is quantized already.
    packing: how weights of fewer than 8 bits are stored (`shifted` for dense convolutions only).
    """

    shape: Convolution
    dtype: str
    zero_point: int
    quantize: Quantize | None = None
    packing: Packing | None = None

    @property
    def work(self) -> str:
        return self.shape.work


def build(spec: ConvolutionInt8, tail: Tail, level: str, tiling: Tiling | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one convolution.

    Args:
        level: one of `isa.ISAS`. tiling: overrides `choose_tiling` (dense convolutions only).

    Raises:
        UnknownNameError: unknown level. OptionError: an empty output, a float image for a convolution that is not dense, or a
            tiling for one that is not or that runs on tiles.
    """
    shape, isa = spec.shape, isa_of(level)
    if min(shape.out_height, shape.out_width) < 1:
        raise OptionError(f"convolution {shape} has an empty output; the kernel is larger than the padded image")
    form = tiled_form(spec, isa)
    if tiling is not None and form is not None:
        raise OptionError(f"tiling cuts products on registers; level '{level}' computes this one on tiles")
    if form is not None:
        return build_function(name, lambda: _tiled(spec, form, tail, isa))
    if shape.groups == 1:
        return build_function(name, lambda: _dense(spec, tail, isa, tiling))
    if spec.quantize is not None:
        raise OptionError(f"only dense convolutions quantize their input; this one has {shape.groups} groups")
    if tiling is not None:
        raise OptionError(f"tiling applies to dense convolutions; this one has {shape.groups} groups")
    emit = depthwise_int8.emit if shape.depthwise else grouped_int8.emit
    return build_function(name, lambda: emit(shape, spec.dtype, spec.zero_point, tail, isa, spec.packing))


def pack(
    spec: ConvolutionInt8, tail: Tail, level: str, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Packed parameters in buffer order: weights, bias, then the tail's vectors.

    Args:
        weight: s8 (O, C / groups, KH, KW). bias: s32 (O,) or None.
        values: what the tail reads, (1,) or (O,): scale, or multiplier and shift.
    """
    shape, isa = spec.shape, isa_of(level)
    form = tiled_form(spec, isa)
    shift = 0 if form and spec.quantize is None else isa.shift(spec.dtype)
    folded = fold_bias(weight, bias, spec.zero_point + shift)
    if shape.depthwise:
        return depthwise_int8.pack(shape, tail, isa, weight, folded, values, spec.packing)
    wide = np.zeros(padded(shape.filters), np.int32)
    wide[: shape.filters] = folded
    if form:
        packed = _storage(spec, isa, form).pack(convolution_tiles.pack(form, weight))
    elif shape.groups == 1:
        packed = _storage(spec, isa).pack(_pack_dense(weight, isa, runs_on(spec, isa)))
    else:
        packed = grouped_int8.pack_weight(shape, weight, spec.packing)
    return packed, wide, *pack_tail(tail, shape.filters, **values)


def tiled_form(spec: ConvolutionInt8, isa: Isa) -> convolution_tiles.TiledConvolution | None:
    """How the level's tile unit computes a convolution; None where it has none, or where registers serve better."""
    dense = isa.tiles is not None and spec.shape.groups == 1
    words = None if spec.quantize is None else word_pitch(spec.shape.channels)
    return convolution_tiles.tiled(spec.shape, words) if dense else None


def _storage(spec: ConvolutionInt8, isa: Isa, form: convolution_tiles.TiledConvolution | None = None) -> Storage:
    """Weights of a dense convolution."""
    panels = padded(spec.shape.filters) // LANES
    if form:
        return Storage(convolution_tiles.packed_size(form) // panels, panels, spec.packing)
    height, width, channels = _taps(spec, isa)
    return Storage(height * width * padded(channels, isa.step) * LANES, panels, spec.packing)


def runs_on(spec: ConvolutionInt8, isa: Isa) -> bool:
    """Whether a row of the kernel is one run of bytes: pixels of few channels, quantized here, then lie side by side.

    A step of the dot instruction takes several channels, and 3 fill 3 bytes of 4: seven taps of 3 channels are six steps, not 7.
    """
    (_, width), channels = spec.shape.kernel, spec.shape.channels
    if spec.quantize is None or channels > WORD or spec.shape.dilation[1] != 1:
        return False
    return ceil(width * channels / isa.step) < width * ceil(channels / isa.step)


def _taps(spec: ConvolutionInt8, isa: Isa) -> tuple[int, int, int]:
    """(rows, columns, channels) of the kernel as the product counts them."""
    (height, width), channels = spec.shape.kernel, spec.shape.channels
    return (height, 1, width * channels) if runs_on(spec, isa) else (height, width, channels)


def _pack_dense(weight: np.ndarray, isa: Isa, runs_on: bool) -> np.ndarray:
    if runs_on:
        weight = weight.transpose(0, 3, 1, 2).reshape(len(weight), -1, weight.shape[2], 1)
    filters, channels, height, width = weight.shape
    inner = ceil(channels / isa.step) * isa.step
    matrix = np.zeros((height, width, inner, filters), np.int8)
    matrix[:, :, :channels] = weight.transpose(2, 3, 1, 0)
    return pack_panels(matrix.reshape(-1, filters), isa)


def _tiled(spec: ConvolutionInt8, form: convolution_tiles.TiledConvolution, tail: Tail, isa: Isa) -> None:
    assert isa.tiles is not None
    shape, pitch = spec.shape, padded(spec.shape.filters)
    storage = _storage(spec, isa, form)
    packed = [storage.argument, ("B", (pitch,), "int32")]
    out_shape = (shape.batch, shape.out_height, shape.out_width, pitch)
    (x, weights, bias), code = declare(tail, isa, shape.filters, [_image(spec)], packed, out_shape)
    if spec.quantize is not None:
        x = framed_words(shape, x, spec.quantize, isa)
    elif form.frame.copied:
        x = convolution_tiles.fill(form.frame, x, spec.zero_point)
    emit_tiles(convolution_tiles.product(form, isa.tiles, x, weights, bias, code), storage)


def _image(spec: ConvolutionInt8) -> Argument:
    shape = spec.shape
    if spec.quantize is not None:
        return "X", (shape.batch, shape.channels, shape.height, shape.width), "float32"
    return "X", (shape.batch, shape.height, shape.width, padded(shape.channels)), spec.dtype


def _dense(spec: ConvolutionInt8, tail: Tail, isa: Isa, tiling: Tiling | None) -> None:
    shape = spec.shape
    kernel_height, kernel_width, channels = _taps(spec, isa)
    pitch, out_pitch = padded(shape.channels), padded(shape.filters)
    out_shape = (shape.batch, shape.out_height, shape.out_width, out_pitch)
    storage = _storage(spec, isa)
    packed = [storage.argument, ("B", (out_pitch,), "int32")]
    (x, weights, bias), code = declare(tail, isa, shape.filters, [_image(spec)], packed, out_shape)
    flip = bool(isa.shift(spec.dtype))
    height, width = shape.framed_height, shape.framed_width
    if spec.quantize is not None:
        pitch = shape.channels if runs_on(spec, isa) else word_pitch(shape.channels)
        x = framed_words(shape, x, spec.quantize, isa, pitch)
        flip = False
    elif shape.bordered:
        pitch = padded(shape.channels, isa.step)
        x = pad_image(shape, x, spec.zero_point, pitch, isa)
        flip = False
    if (*shape.kernel, *shape.stride) == (1, 1, 1, 1):
        pixels = Pixels(1, 1, shape.batch * height * width, 0, 0, pitch, out_pitch)
    else:
        stride_y, stride_x = shape.stride
        pixels = Pixels(
            shape.batch,
            shape.out_height,
            shape.out_width,
            height * width * pitch,
            stride_y * width * pitch,
            stride_x * pitch,
            out_pitch,
        )
    kernel = ((kernel_height, shape.dilation[0] * width * pitch), (kernel_width, shape.dilation[1] * pitch))
    product = Product(isa, pixels, kernel, channels, x, flip, weights, bias, code)
    emit_product(product, storage, tiling or choose_tiling(pixels, out_pitch, product.steps, isa))
