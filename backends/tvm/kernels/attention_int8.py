"""Attention of the integer stage in one kernel: scores, mask, softmax, quantize, weighted sum and its tail.

    S = scale(matmul(Q, K^T, zq, 0)) + mask        float32 [B, M, N], never stored as a whole
    P = quantize(softmax(S))                       8-bit
    Y = tail(matmul(P, V, zp, 0))                  [B, M, D]

A task takes a block of rows of one head; its scores and probabilities stay in the first-level cache (the idea of Dao et al.,
"FlashAttention", arXiv:2205.14135, without the running maximum: the block holds whole rows, because the order of operations of
`gw::softmax` is part of its meaning). K and V are packed into panels first, once a head. Q, K, V and the mask are read through
strides wherever their layer left them, and Y is written where the next layer wants it, so that no head is ever split or merged
by a copy.

Buffers: Q, K, V, (mask), the tail's parameters, Y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from tvm import tirx

from ....ir.errors import OptionError
from ..strided import Strided
from .base import LANES, VECTOR, Tail, padded
from .emit import balanced, bind, clamp_start, loop, parallel_kind, shuffle, splat, store
from .emit import build as build_function
from .exact_float import product
from .float_base import load_lanes
from .gemm_int8 import Pixels, Product
from .isa import Isa, T, isa_of
from .matmul_int8 import Second, pack_second
from .quantize_image import Quantize
from .softmax_block import Block
from .tail import declare, pack_tail, rounded, x86_pack
from .tilings import choose_tiling

#: Bytes of scores that a task keeps: half of a first-level cache.
SCORE_BYTES = 16 * 1024

#: Longer rows of scores leave the first-level cache, one row at a time.
MOST_KEYS = 4096

#: Rows of scores of LANES keys that one core finishes in a microsecond, for the choice between a serial and a parallel loop.
VECTORS_PER_US = 150


@dataclass(frozen=True)
class AttentionInt8:
    """q [*batch, M, K] of q_dtype, k [*batch, K, N] and v [*batch, N, D] s8 with zero point 0, mask float32 [*batch, M, N].

    Each is an index map over the tensor that holds it. scale: of the scores' accumulator. quantize: of the probabilities.
    swapped: Y is [*outer, M, last batch axis, D] instead of [*batch, M, D].
    """

    q: Strided
    k: Strided
    v: Strided
    mask: Strided | None
    q_dtype: str
    q_zero_point: int
    scale: float
    quantize: Quantize
    swapped: bool = False

    @property
    def batch(self) -> tuple[int, ...]:
        return self.q.shape[:-2]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """(M, K, N, D)."""
        return self.q.shape[-2], self.q.shape[-1], self.k.shape[-1], self.v.shape[-1]

    @property
    def macs(self) -> int:
        rows, inner, keys, columns = self.sizes
        return prod(self.batch) * rows * keys * (inner + columns)

    @property
    def out_shape(self) -> tuple[int, ...]:
        rows, _, _, columns = self.sizes
        if self.swapped:
            return (*self.batch[:-1], rows, self.batch[-1], columns)
        return (*self.batch, rows, columns)

    @property
    def work(self) -> str:
        rows, inner, keys, columns = self.sizes
        return f"{prod(self.batch)} heads, {rows}x{inner} by {keys} keys, {columns} values"


def fits(spec: AttentionInt8, level: str) -> bool:
    """Whether the kernel can run: whole dot-instruction steps along K, neighbours in memory along it, rows that fit the cache."""
    _, inner, keys, _ = spec.sizes
    return inner % isa_of(level).step == 0 and spec.q.strides[-1] == 1 and keys <= MOST_KEYS


def build(spec: AttentionInt8, tail: Tail, level: str, *, name: str = "main") -> tirx.PrimFunc:
    """The kernel. Raises OptionError where `fits` says no, UnknownNameError for an unknown level."""
    if not fits(spec, level):
        raise OptionError(
            f"attention kernel: {spec.sizes} (rows, inner, keys, columns) with strides {spec.q.strides} does not fit"
        )
    return build_function(name, lambda: _emit(spec, tail, isa_of(level)))


def pack(spec: AttentionInt8, tail: Tail, level: str, **values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The tail's parameters, expanded; values (1,) or (D,)."""
    isa_of(level)
    return pack_tail(tail, spec.sizes[-1], **values)


@dataclass
class ScoreTail:
    """Stores acc * scale as a row of floats whose pitch holds whole vectors."""

    scale: float
    scratch: Any
    narrow: bool = False
    bytes: int = 4

    def load(self, lane: Any) -> tuple[()]:
        return ()

    def emit(self, acc: Any, _parameters: tuple[()], offset: Any, _valid: int = LANES) -> None:
        store(self.scratch, offset, product(T.Cast(VECTOR, acc), splat(T.float32(self.scale))))


def _emit(spec: AttentionInt8, tail: Tail, isa: Isa) -> None:
    rows, inner, keys, columns = spec.sizes
    inputs = [("Q", spec.q.source, spec.q_dtype), ("K", spec.k.source, "int8"), ("V", spec.v.source, "int8")]
    if spec.mask is not None:
        inputs.append(("mask", spec.mask.source, "float32"))
    (q, k, v, *mask), code = declare(tail, isa, columns, inputs, [], spec.out_shape)
    heads = prod(spec.batch)
    (k_inner, k_column), (v_inner, v_column) = spec.k.strides[-2:], spec.v.strides[-2:]
    first = Second(heads, inner, keys, k_inner, k_column, spec.q_zero_point + isa.shift(spec.q_dtype))
    probability = spec.quantize.zero_point + isa.shift(spec.quantize.dtype)
    second = Second(heads, keys, columns, v_inner, v_column, probability)
    scores_weights = pack_second(first, k, lambda head: _start(spec, spec.k, head), isa)
    values_weights = pack_second(second, v, lambda head: _start(spec, spec.v, head), isa)
    block = balanced(rows, max(1, SCORE_BYTES // (4 * padded(keys))))
    blocks = ceil(rows / block)
    work = heads * rows * padded(keys) / LANES / VECTORS_PER_US + spec.macs / isa.macs_per_us
    with loop(heads * blocks, parallel_kind(work)) as task:
        head = bind(task // blocks + T.int32(0))
        top = bind(clamp_start(task % blocks, block, rows) + T.int32(0))
        scores = T.alloc_buffer((block * padded(keys),), "float32")
        codes = T.alloc_buffer((block * padded(keys),), spec.quantize.dtype)
        pixels = Pixels(1, 1, block, 0, 0, spec.q.strides[-2], padded(keys))
        at = _start(spec, spec.q, head) + top * spec.q.strides[-2]
        _product(first, isa, pixels, q, at, spec.q_dtype, scores_weights, head, ScoreTail(spec.scale, scores), 0)
        masked = None
        if spec.mask is not None:
            above = bind(_start(spec, spec.mask, head) + top * spec.mask.strides[-2])
            step = spec.mask.strides[-2]
            masked = lambda row, start, valid: load_lanes(mask[0], above + row * step + start, valid)  # noqa: E731
        _probabilities(block, keys, scores, codes, masked, spec.quantize, isa)
        pitch = columns * (spec.batch[-1] if spec.swapped else 1)
        pixels = Pixels(1, 1, block, 0, 0, padded(keys), pitch, columns=columns)
        target = _target(spec, head) + top * pitch
        _product(second, isa, pixels, codes, 0, spec.quantize.dtype, values_weights, head, code, target)


def _product(
    second: Second, isa: Isa, pixels: Pixels, x: Any, start: Any, dtype: str, packed: Any, head: Any, tail: Any, target: Any
) -> None:
    """One block of rows times one head's packed operand."""
    weights, bias = packed
    origin = (start, head * second.weight_size(isa), head * padded(second.columns), target)
    flip = bool(isa.shift(dtype))
    block = Product(isa, pixels, ((1, 0), (1, 0)), second.inner, x, flip, weights, bias, tail, origin)
    block.emit(choose_tiling(pixels, padded(second.columns), block.steps, isa), "serial")


def _start(spec: AttentionInt8, operand: Strided, head: Any) -> Any:
    """Element of the operand's tensor where a head starts."""
    at, rest = T.int32(operand.start), head
    for size, stride in zip(reversed(spec.batch), reversed(operand.strides[:-2]), strict=True):
        at, rest = at + rest % size * stride, rest // size
    return at


def _target(spec: AttentionInt8, head: Any) -> Any:
    """Element of Y where a head starts."""
    rows, _, _, columns = spec.sizes
    if not spec.swapped:
        return head * (rows * columns)
    last = spec.batch[-1]
    return head // last * (rows * last * columns) + head % last * columns


def _probabilities(
    rows: int, keys: int, scores: Any, codes: Any, mask: Callable[[Any, Any, int], Any] | None, quantize: Quantize, isa: Isa
) -> None:
    """`gw::softmax` and `gw::quantize` of a block of scores (and the mask on them); both pitches hold whole vectors."""
    pitch = padded(keys)

    def load(row: Any, start: Any, valid: int) -> Any:
        value = scores.vload([row * pitch + start], VECTOR)
        return value if mask is None else value + mask(row, start, valid)

    def finish(row: Any, places: list[tuple[Any, int]], values: list[Any]) -> None:
        put = _put_packed if isa.vnni and len(values) == 4 else _put_each
        put(quantize, isa, codes, bind(row * pitch + places[0][0]), values)

    Block(
        rows,
        keys,
        load=load,
        keep=lambda row, start, value, _valid: store(scores, row * pitch + start, value),
        kept=lambda row, start, _valid: scores.vload([row * pitch + start], VECTOR),
        finish=finish,
    ).emit()


def _put_each(quantize: Quantize, isa: Isa, codes: Any, at: Any, values: list[Any]) -> None:
    for index, value in enumerate(values):
        code = quantize.codes(value, isa) + splat(T.int32(quantize.zero_point))
        store(codes, at + index * LANES, T.Cast(f"{quantize.dtype}x{LANES}", code))


def _put_packed(quantize: Quantize, isa: Isa, codes: Any, at: Any, values: list[Any]) -> None:
    """Four vectors at once: saturating packs narrow them, and are the clamp where the limits are those of the type."""
    unsigned = quantize.dtype == "uint8"
    saturates = quantize.zero_point == 0 and (quantize.qmin, quantize.qmax) == ((0, 255) if unsigned else (-128, 127))
    inverse = splat(T.float32(quantize.inverse))
    steps = [bind(rounded(isa, v * inverse) if saturates else quantize.codes(v, isa)) for v in values]
    if quantize.zero_point:
        steps = [step + splat(T.int32(quantize.zero_point)) for step in steps]
    halves = [x86_pack("packssdw", "int16x32", *pair) for pair in (steps[:2], steps[2:])]
    packed = bind(x86_pack("packuswb" if unsigned else "packsswb", f"{quantize.dtype}x64", *halves))
    # In each 128-bit lane the packs leave four codes of each vector.
    order = [16 * lane + 4 * vector + e for vector in range(4) for lane in range(4) for e in range(4)]
    store(codes, at, shuffle([packed], order), 4 * LANES)
