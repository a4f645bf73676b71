"""Batched product of two activations: u8/s8 [B, M, K] by s8/u8 [B, K, N], or [B, N, K] with `transposed` (Q K^T of attention).

Buffers: A, Bm, then the tail's parameters (`pack`), then Y [B, M, N].

The second operand is packed into panels at run time, together with the terms that its columns and the zero points
contribute: sum (a - za)(b - zb) = sum a b - za sum b - zb sum a + K za zb. The first three are exact modulo 2^32 like the
accumulator; the row term needs sum a, and is paid only where zb is not zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Tail, padded
from .emit import accumulator, bind, loop, parallel_kind, shuffle, splat, store
from .emit import build as build_function
from .gemm_int8 import Pixels, Product, Tiling
from .gemm_tiles import Lines, Run, TileProduct, tiles_pay
from .isa import Isa, T, isa_of
from .linear_int8 import pad_rows
from .register_tile import Q, column_sums, interleaved
from .tail import TailCode, declare, pack_tail
from .tile_unit import DEPTH
from .tilings import choose_tiling


@dataclass(frozen=True)
class MatmulInt8:
    """A [batch, rows, inner] by B [batch, inner, columns] ([batch, columns, inner] if transposed). B is s8 with zero point 0."""

    batch: int
    rows: int
    inner: int
    columns: int
    a_dtype: str
    a_zero_point: int
    b_dtype: str = "int8"
    b_zero_point: int = 0
    transposed: bool = False

    @property
    def work(self) -> str:
        batch = f"{self.batch}x" if self.batch > 1 else ""
        return f"{batch}{self.rows}x{self.inner} by {self.inner}x{self.columns}{' transposed' if self.transposed else ''}"


def build(spec: MatmulInt8, tail: Tail, level: str, tiling: Tiling | None = None, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel for one batched product.

    Raises:
        OptionError: B is not s8 with zero point 0 (its values would not fit the signed operand of the dot instruction).
        UnknownNameError: unknown level.
    """
    isa = isa_of(level)
    if spec.b_dtype != "int8" or spec.b_zero_point != 0:
        raise OptionError(
            f"matmul: the second operand is {spec.b_dtype} with zero point {spec.b_zero_point}; quantize it symmetric, as int8"
        )
    if not tiled(spec, isa):
        return build_function(name, lambda: _emit(spec, tail, isa, tiling))
    if tiling is not None:
        raise OptionError(f"tiling cuts products on registers; level '{level}' computes this one on tiles")
    return build_function(name, lambda: _emit_tiled(spec, tail, isa))


def pack(spec: MatmulInt8, tail: Tail, level: str, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tail's parameters, expanded; values (1,) or (N,)."""
    isa_of(level)
    return pack_tail(tail, spec.columns, **values)


def tiled(spec: MatmulInt8, isa: Isa) -> bool:
    """Whether the level's tile unit computes the product."""
    return isa.tiles is not None and tiles_pay(Lines.matrix(spec.rows, spec.inner, spec.batch), spec.inner, padded(spec.columns))


def _declare(spec: MatmulInt8, tail: Tail, isa: Isa) -> tuple[Any, Any, TailCode]:
    b_shape = (spec.batch, *((spec.columns, spec.inner) if spec.transposed else (spec.inner, spec.columns)))
    inputs = [("A", (spec.batch, spec.rows, spec.inner), spec.a_dtype), ("Bm", b_shape, spec.b_dtype)]
    (a, b), code = declare(tail, isa, spec.columns, inputs, [], (spec.batch, spec.rows, spec.columns))
    return a, b, code


def _pack(spec: MatmulInt8, b: Any, shift: int, isa: Isa, whole: int) -> tuple[Any, Any]:
    along = (1, spec.inner) if spec.transposed else (spec.columns, 1)
    second = Second(spec.batch, spec.inner, spec.columns, *along, spec.a_zero_point + shift, whole)
    return pack_second(second, b, lambda image: image * (spec.inner * spec.columns), isa)


def _emit_tiled(spec: MatmulInt8, tail: Tail, isa: Isa) -> None:
    assert isa.tiles is not None
    a, b, code = _declare(spec, tail, isa)
    weights, bias = _pack(spec, b, 0, replace(isa, step=4), DEPTH // 4)  # a tile's rows hold four k of each column
    columns, depth = padded(spec.columns), padded(spec.inner, DEPTH)
    lines = Lines.matrix(spec.rows, spec.inner, spec.batch, columns * depth, columns)
    TileProduct(isa.tiles, lines, (Run(0, depth // DEPTH),), columns, spec.columns, a, weights, bias, code).emit()


def _emit(spec: MatmulInt8, tail: Tail, isa: Isa, tiling: Tiling | None) -> None:
    a, b, code = _declare(spec, tail, isa)
    columns, pitch = padded(spec.columns), ceil(spec.inner / isa.step) * isa.step
    weights, bias = _pack(spec, b, isa.shift(spec.a_dtype), isa, 1)
    if pitch != spec.inner:
        a = pad_rows(a, spec.batch * spec.rows, spec.inner, pitch)
    pixels = Pixels(spec.batch, 1, spec.rows, spec.rows * pitch, 0, pitch, spec.columns, columns * pitch, columns)
    product = Product(isa, pixels, ((1, 0), (1, 0)), spec.inner, a, bool(isa.shift(spec.a_dtype)), weights, bias, code)
    product.emit(tiling or choose_tiling(pixels, columns, product.steps, isa))


@dataclass(frozen=True)
class Second:
    """A second operand [batch, inner, columns] s8 with element strides along inner and columns.

    zero_point: of the first operand as the dot instruction sees it. whole: packed steps are a multiple of this.
    """

    batch: int
    inner: int
    columns: int
    along_k: int
    along_n: int
    zero_point: int
    whole: int = 1

    def steps(self, isa: Isa) -> int:
        return padded(ceil(self.inner / isa.step), self.whole)

    def weight_size(self, isa: Isa) -> int:
        """Packed bytes of one image."""
        return padded(self.columns) * self.steps(isa) * isa.step


def pack_second(second: Second, b: Any, start: Callable[[Any], Any], isa: Isa) -> tuple[Any, Any]:
    """Packs B into [B][N / LANES][K / step][LANES][step] and computes the bias -za * sum(b) of each column.

    start: image -> its first element in `b`.
    """
    panels, steps = padded(second.columns) // LANES, second.steps(isa)
    size = isa.step * LANES
    weights = T.alloc_buffer((second.batch * second.weight_size(isa),), "int8")
    bias = T.alloc_buffer((second.batch * panels * LANES,), "int32")
    whole_words = second.along_k == 1 and second.inner % isa.step == 0
    whole_rows = second.along_n == 1 and second.columns % LANES == 0
    vectors = isa.vnni or isa.neon
    pack = _pack_words if vectors and whole_words else _pack_rows if vectors and whole_rows else _pack_bytes
    speed = 2_000 if pack is _pack_bytes else 10_000
    with loop(second.batch * panels, parallel_kind(second.batch * second.weight_size(isa) / speed)) as task:
        image, panel = task // panels, task % panels
        sums = accumulator()
        store(sums, 0, splat(T.int32(0)))
        base, target = bind(start(image) + T.int32(0)), bind(task * (steps * size) + T.int32(0))
        pack(second, b, base, panel, weights, target, sums, isa)
        used = steps if pack is _pack_bytes else ceil(second.inner / isa.step)
        if used < steps:
            with loop(steps - used) as k:
                store(weights, target + (used + k) * size, splat(T.int8(0), size), size)
        store(bias, task * LANES, sums.vload([0], f"int32x{LANES}") * splat(T.int32(-second.zero_point)))
    return weights, bias


def _pack_bytes(second: Second, b: Any, base: Any, panel: Any, weights: Any, target: Any, sums: Any, isa: Isa) -> None:
    """One panel, byte by byte: any shape and stride."""
    with loop(second.steps(isa)) as k, T.serial(0, LANES) as lane:
        column = bind(T.min(panel * LANES + lane, second.columns - 1))  # padding lanes repeat the last column
        for s in range(isa.step):
            depth = k * isa.step + s
            at = base + T.min(depth, second.inner - 1) * second.along_k + column * second.along_n
            value = bind(T.Select(depth < second.inner, b.vload([at]), T.int8(0)))
            T.buffer_store(weights, value, [target + (k * LANES + lane) * isa.step + s])
            T.buffer_store(sums, sums.vload([lane]) + T.Cast("int32", value), [lane])


def _add_up(weights: Any, at: Any, sums: Any, isa: Isa) -> None:
    """Adds one packed k step to the columns' sums: the dot instruction with ones."""
    if isa.neon:
        parts = [bind(weights.vload([at + q * Q], f"int8x{Q}")) for q in range(isa.step * LANES // Q)]
        store(sums, 0, sums.vload([0], f"int32x{LANES}") + column_sums(isa, parts))
        return
    ones = T.reinterpret(f"int8x{isa.step * LANES}", T.Broadcast(T.uint8(1), isa.step * LANES))
    packed = weights.vload([at], f"int8x{isa.step * LANES}")
    store(sums, 0, isa.dot(sums.vload([0], f"int32x{LANES}"), ones, packed))


def _pack_words(second: Second, b: Any, base: Any, panel: Any, weights: Any, target: Any, sums: Any, isa: Isa) -> None:
    """One panel of a B whose K is contiguous and a multiple of the step: whole words move."""
    columns = [bind(base + T.min(panel * LANES + lane, second.columns - 1) * second.along_n) for lane in range(LANES)]
    with loop(second.inner // isa.step) as k:
        at = bind(target + k * (isa.step * LANES))
        for lane, column in enumerate(columns):
            store(weights, at + lane * isa.step, b.vload([column + k * isa.step], f"int8x{isa.step}"), isa.step)
        _add_up(weights, at, sums, isa)


def _pack_rows(second: Second, b: Any, base: Any, panel: Any, weights: Any, target: Any, sums: Any, isa: Isa) -> None:
    """One panel of a B whose columns are contiguous and fill it: `step` rows of LANES bytes are interleaved in registers."""

    def interleave(k: Any, rows: int) -> None:
        first = base + k * (isa.step * second.along_k) + panel * LANES
        pieces = [bind(b.vload([first + s * second.along_k], f"int8x{LANES}")) for s in range(rows)]
        pieces += [splat(T.int8(0))] * (isa.step - rows)
        at = bind(target + k * (isa.step * LANES))
        if isa.neon:
            for q, part in enumerate(interleaved(pieces)):
                store(weights, at + q * Q, part, Q)
        else:
            order = [s * LANES + lane for lane in range(LANES) for s in range(isa.step)]
            store(weights, at, shuffle(pieces, order), isa.step * LANES)
        _add_up(weights, at, sums, isa)

    whole, rest = divmod(second.inner, isa.step)
    if whole:
        with loop(whole) as k:
            interleave(k, isa.step)
    if rest:
        interleave(whole, rest)
