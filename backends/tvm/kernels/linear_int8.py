"""u8/s8 linear layer over dense rows.

Buffers: X [M, K], (residual [M, N]), then what `pack` returns, then Y [M, N]. K and N are any positive numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Tail, padded
from .emit import build as build_function
from .emit import loop, parallel_kind
from .gemm_int8 import Pixels, Product, Tiling, fold_bias, pack_panels
from .gemm_tiles import Lines, Run, TileProduct, pack_runs, tiles_pay
from .isa import Isa, T, isa_of
from .packed import Packing, Storage, emit_product, emit_tiles
from .tail import declare, pack_tail
from .tile_unit import DEPTH
from .tilings import choose_tiling


@dataclass(frozen=True)
class LinearInt8:
    """X [rows, inner] of `dtype` ("uint8" or "int8") with a zero point, times weights [outer, inner]^T.

    packing: how weights of fewer than 8 bits are stored.
    """

    rows: int
    inner: int
    outer: int
    dtype: str
    zero_point: int
    packing: Packing | None = None

    @property
    def work(self) -> str:
        return f"{self.rows}x{self.inner} -> {self.rows}x{self.outer}"


def build(spec: LinearInt8, tail: Tail, level: str, tiling: Tiling | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one linear layer. Raises UnknownNameError: unknown level. OptionError: a tiling where it runs on tiles."""
    isa = isa_of(level)
    if tiled(spec, isa):
        if tiling is not None:
            raise OptionError(f"tiling cuts products on registers; level '{level}' computes this one on tiles")
        return build_function(name, lambda: _emit_tiled(spec, tail, isa))
    return build_function(name, lambda: _emit(spec, tail, isa, tiling))


def pack(
    spec: LinearInt8, tail: Tail, level: str, weight: np.ndarray, bias: np.ndarray | None, **values: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Packed parameters in buffer order. weight s8 (N, K), bias s32 (N,) or None, values as the tail reads them, (1,) or (N,)."""
    isa = isa_of(level)
    wide = np.zeros(padded(spec.outer), np.int32)
    tiles = tiled(spec, isa)
    wide[: spec.outer] = fold_bias(weight, bias, spec.zero_point + (0 if tiles else isa.shift(spec.dtype)))
    packed = pack_runs([weight.T], spec.outer) if tiles else pack_panels(weight.T, isa)
    return _storage(spec, isa).pack(packed), wide, *pack_tail(tail, spec.outer, **values)


def tiled(spec: LinearInt8, isa: Isa) -> bool:
    """Whether the level's tile unit computes the layer."""
    return isa.tiles is not None and tiles_pay(_lines(spec), spec.inner, padded(spec.outer))


def _storage(spec: LinearInt8, isa: Isa) -> Storage:
    depth = padded(spec.inner, DEPTH if tiled(spec, isa) else isa.step)
    return Storage(depth * LANES, ceil(spec.outer / LANES), spec.packing)


def _lines(spec: LinearInt8) -> Lines:
    return Lines.matrix(spec.rows, spec.inner)


def _emit_tiled(spec: LinearInt8, tail: Tail, isa: Isa) -> None:
    columns, steps = padded(spec.outer), ceil(spec.inner / DEPTH)
    storage = _storage(spec, isa)
    packed = [storage.argument, ("B", (columns,), "int32")]
    rows, shape = ("X", (spec.rows, spec.inner), spec.dtype), (spec.rows, spec.outer)
    (x, weights, bias), code = declare(tail, isa, spec.outer, [rows], packed, shape)
    assert isa.tiles is not None
    product = TileProduct(isa.tiles, _lines(spec), (Run(0, steps),), columns, spec.outer, x, weights, bias, code)
    emit_tiles(product, storage)


def _emit(spec: LinearInt8, tail: Tail, isa: Isa, tiling: Tiling | None) -> None:
    columns, pitch = padded(spec.outer), ceil(spec.inner / isa.step) * isa.step
    storage = _storage(spec, isa)
    packed = [storage.argument, ("B", (columns,), "int32")]
    shape = (spec.rows, spec.outer)
    (x, weights, bias), code = declare(tail, isa, spec.outer, [("X", (spec.rows, spec.inner), spec.dtype)], packed, shape)
    if pitch != spec.inner:
        x = pad_rows(x, spec.rows, spec.inner, pitch)
    pixels = Pixels(1, 1, spec.rows, 0, 0, pitch, spec.outer)
    product = Product(isa, pixels, ((1, 0), (1, 0)), spec.inner, x, bool(isa.shift(spec.dtype)), weights, bias, code)
    emit_product(product, storage, tiling or choose_tiling(pixels, columns, product.steps, isa))


def pad_rows(x: Any, rows: int, inner: int, pitch: int) -> Any:
    """Copies rows to a scratch of a longer pitch, so that the last k step of the last row stays inside the buffer.

    The extra bytes meet zero weights; they hold zeros.
    """
    scratch = T.alloc_buffer((rows * pitch,), str(x.dtype))
    with loop(rows, parallel_kind(rows * pitch / 20_000)) as row:
        with T.serial(0, inner) as k:
            T.buffer_store(scratch, x.vload([row * inner + k]), [row * pitch + k])
        with T.serial(0, pitch - inner) as k:
            T.buffer_store(scratch, T.Cast(str(x.dtype), T.int32(0)), [row * pitch + inner + k])
    return scratch
