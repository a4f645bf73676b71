"""Batched product of two activations: u8/s8 [B, M, K] by s8/u8 [B, K, N], or [B, N, K] with `transposed` (Q K^T of attention).

Buffers: A, Bm, then the tail's parameters (`pack`), then Y [B, M, N].

The second operand is packed into panels at run time, together with the terms that its columns and the zero points
contribute: sum (a - za)(b - zb) = sum a b - za sum b - zb sum a + K za zb. The first three are exact modulo 2^32 like the
accumulator; the row term needs sum a, and is paid only where zb is not zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from .base import LANES, Tail, padded
from .emit import accumulator, bind, loop, parallel_kind, splat, store
from .emit import build as build_function
from .gemm_int8 import Pixels, Product, Tiling, choose_tiling
from .isa import Isa, T, isa_of
from .linear_int8 import pad_rows
from .tail import declare, pack_tail


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
    return build_function(name, lambda: _emit(spec, tail, isa, tiling))


def pack(spec: MatmulInt8, tail: Tail, level: str, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tail's parameters, expanded; values (1,) or (N,)."""
    isa_of(level)
    return pack_tail(tail, spec.columns, **values)


def _emit(spec: MatmulInt8, tail: Tail, isa: Isa, tiling: Tiling | None) -> None:
    b_shape = (spec.batch, *((spec.columns, spec.inner) if spec.transposed else (spec.inner, spec.columns)))
    inputs = [("A", (spec.batch, spec.rows, spec.inner), spec.a_dtype), ("Bm", b_shape, spec.b_dtype)]
    (a, b), code = declare(tail, isa, spec.columns, inputs, [], (spec.batch, spec.rows, spec.columns))
    columns, pitch = padded(spec.columns), ceil(spec.inner / isa.step) * isa.step
    weights, bias = _pack_second(spec, b, isa, pitch)
    if pitch != spec.inner:
        a = pad_rows(a, spec.batch * spec.rows, spec.inner, pitch)
    pixels = Pixels(spec.batch, 1, spec.rows, spec.rows * pitch, 0, pitch, spec.columns, columns * pitch, columns)
    product = Product(isa, pixels, ((1, 0), (1, 0)), spec.inner, a, bool(isa.shift(spec.a_dtype)), weights, bias, code)
    product.emit(tiling or choose_tiling(pixels, columns, product.steps, isa))


def _pack_second(spec: MatmulInt8, b: Any, isa: Isa, pitch: int) -> tuple[Any, Any]:
    """Packs B into [B][N / LANES][K / step][LANES][step] and computes the bias -za * sum(b) of each column."""
    panels, steps = padded(spec.columns) // LANES, pitch // isa.step
    weights = T.alloc_buffer((spec.batch * panels * LANES * pitch,), "int8")
    bias = T.alloc_buffer((spec.batch * panels * LANES,), "int32")
    zero_point = spec.a_zero_point + isa.shift(spec.a_dtype)
    along_k, along_n = (1, spec.inner) if spec.transposed else (spec.columns, 1)
    work = spec.batch * panels * LANES * pitch / 2_000
    with loop(spec.batch * panels, parallel_kind(work)) as task:
        image, panel = task // panels, task % panels
        sums = accumulator()
        store(sums, 0, splat(T.int32(0)))
        base = bind(image * (spec.inner * spec.columns) + T.int32(0))
        if isa.vnni and spec.transposed and spec.inner == pitch:
            _pack_words(spec, b, base, panel, weights, task * (LANES * pitch), sums, isa)
            store(bias, task * LANES, sums.vload([0], f"int32x{LANES}") * splat(T.int32(-zero_point)))
            return weights, bias
        with loop(steps) as k, T.serial(0, LANES) as lane:
            column = bind(T.min(panel * LANES + lane, spec.columns - 1))  # padding lanes repeat the last column
            for s in range(isa.step):
                depth = k * isa.step + s
                at = base + T.min(depth, spec.inner - 1) * along_k + column * along_n
                value = bind(T.Select(depth < spec.inner, b.vload([at]), T.int8(0)))
                T.buffer_store(weights, value, [((task * steps + k) * LANES + lane) * isa.step + s])
                T.buffer_store(sums, sums.vload([lane]) + T.Cast("int32", value), [lane])
        store(bias, task * LANES, sums.vload([0], f"int32x{LANES}") * splat(T.int32(-zero_point)))
    return weights, bias


def _pack_words(spec: MatmulInt8, b: Any, base: Any, panel: Any, weights: Any, target: Any, sums: Any, isa: Isa) -> None:
    """One panel of a transposed B whose K is a multiple of the step: whole words move, and the dot instruction adds them up."""
    size = isa.step * LANES
    ones = T.reinterpret(f"int8x{size}", T.Broadcast(T.uint8(1), size))
    columns = [bind(base + T.min(panel * LANES + lane, spec.columns - 1) * spec.inner) for lane in range(LANES)]
    with loop(spec.inner // isa.step) as k:
        for lane, column in enumerate(columns):
            word = b.vload([column + k * isa.step], f"int8x{isa.step}")
            store(weights, target + k * size + lane * isa.step, word, isa.step)
        packed = weights.vload([target + k * size], f"int8x{size}")
        store(sums, 0, isa.dot(sums.vload([0], f"int32x{LANES}"), ones, packed))
