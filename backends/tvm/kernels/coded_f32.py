"""Weights stored as codes of a table: decoded into float32 panels for the float kernels, or inside a linear layer of few rows.

The stream of a row (`ir/dialect/packed`), its weights in the order the kernel reads them, is cut into bytes, and the bytes of
LANES rows lie side by side: [panel][byte][LANES]. Eight codes of every lane come from `bits` vectors of bytes by shifts. Scales
and zeros lie as [panel][group][LANES]. A table of at most LANES entries stays in one register of AVX-512, of twice as many in
two. Longer ones, and all on other levels, are computed where they follow a rule: consecutive integers, or floating point. What
is left (power exponents of 6 bits and more) is read entry by entry, slower than float32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tvm import tirx

from ....ir.dialect.codebook import groups_of, pack
from .base import LANES, VECTOR, padded
from .emit import accumulator, arguments, bind, build, loop, parallel_kind, splat, store
from .float_base import PLAIN, Buffers, FloatSpec, MatrixProduct
from .isa import T

#: Codes that fill whole bytes at any width.
BLOCK = 8

#: Weights a microsecond of one core, for the choice between a serial and a parallel loop.
WEIGHTS_PER_US = {"avx512": 16_000, "portable": 1_000}

#: Rows of a linear layer up to which it decodes in its inner loop; from there on decoding once and multiplying is faster.
FUSED_ROWS = 4

#: Sums that a row keeps, so that no multiply-add waits for the one before it.
CHAINS = 4

WORDS = f"int32x{LANES}"


def _int(value: int) -> Any:
    return T.Broadcast(T.int32(value), LANES)


@dataclass(frozen=True)
class Integers:
    """The entries first, first + 1, ..."""

    first: int

    @classmethod
    def of(cls, table: np.ndarray) -> Integers | None:
        first = float(table[0])
        return cls(int(first)) if first.is_integer() and np.array_equal(table, first + np.arange(len(table))) else None

    def emit(self, code: Any) -> Any:
        return T.Cast(VECTOR, code + _int(self.first))


@dataclass(frozen=True)
class Minifloat:
    """Entry `origin` is 0; the n-th on either side of it is the floating-point number whose exponent and mantissa bits are n, the
    smallest 2^lowest. No mantissa bits: powers of two."""

    origin: int
    mantissa_bits: int
    lowest: int

    @classmethod
    def of(cls, table: np.ndarray) -> Minifloat | None:
        origin = len(table) // 2
        positive = table[origin + 1 :].astype(np.float64)
        if len(table) % 2 == 0 or table[origin] != 0 or not np.array_equal(-positive[::-1], table[:origin]):
            return None
        lowest = int(np.log2(positive[0]))
        codes = np.arange(1, len(positive) + 1)
        for bits in range(7):
            exponent, mantissa = codes >> bits, codes & ((1 << bits) - 1)
            values = np.where(exponent > 0, mantissa + (1 << bits), mantissa) * 2.0 ** (np.maximum(exponent, 1) - 1 + lowest)
            if np.array_equal(values, positive):
                return cls(origin, bits, lowest)
        return None

    def emit(self, code: Any) -> Any:
        """mantissa * 2^exponent, both exact; the sign is the difference's."""
        signed = bind(code - _int(self.origin))
        size = bind(T.max(signed, _int(0) - signed))
        exponent = bind(size >> _int(self.mantissa_bits))
        mantissa = size & _int((1 << self.mantissa_bits) - 1)
        whole = mantissa | (T.min(exponent, _int(1)) << _int(self.mantissa_bits))
        power = (T.max(exponent, _int(1)) + _int(126 + self.lowest)) << _int(23)
        value = T.Cast(VECTOR, whole) * T.reinterpret(VECTOR, power)
        return T.reinterpret(VECTOR, T.reinterpret(WORDS, value) | (signed & _int(-(1 << 31))))


@dataclass(frozen=True)
class Coded:
    """A weight (rows, count) as codes of a table.

    group: weights of a row that share a scale. entries: of the table. rule: how they are computed; None: looked up. zero: whether
    groups have one.
    taps: where above 1, a row is (count / taps, taps) and the kernel reads it tap by tap, as a convolution does.
    """

    rows: int
    count: int
    bits: int
    group: int
    entries: int
    rule: Integers | Minifloat | None = None
    zero: bool = False
    taps: int = 1

    @property
    def groups(self) -> int:
        return groups_of(self.count, self.group)

    @property
    def row_bytes(self) -> int:
        return -(-self.count * self.bits // 8)

    @property
    def work(self) -> str:
        return f"{self.rows}x{self.count}, {self.bits} bits, groups of {self.group}"

    @property
    def panels(self) -> int:
        return padded(self.rows) // LANES

    @property
    def order(self) -> np.ndarray:
        """Which weight of a row the kernel reads when."""
        return np.arange(self.count).reshape(-1, self.taps).T.reshape(-1)

    def pack_codes(self, codes: np.ndarray) -> np.ndarray:
        """u8 (rows, count) -> [panels, row_bytes, LANES], code 0 in the padding."""
        full = np.zeros((padded(self.rows), self.count), np.uint8)
        full[: self.rows] = codes[:, self.order]
        stream = pack(torch.from_numpy(full), self.bits).numpy()
        return np.ascontiguousarray(stream.reshape(self.panels, LANES, -1).transpose(0, 2, 1))

    def pack_groups(self, values: np.ndarray) -> np.ndarray:
        """Scales or zeros (rows, groups) -> float32 [panels, groups, LANES], zeros in the padding."""
        full = np.zeros((padded(self.rows), self.groups), np.float32)
        full[: self.rows] = values
        return np.ascontiguousarray(full.reshape(self.panels, LANES, -1).transpose(0, 2, 1))

    def arguments(self) -> list[tuple[str, tuple[int, ...], str]]:
        """codes, scale, zero where there is one, table unless its entries are computed."""
        grid = (self.panels, self.groups, LANES)
        zero = [("zero", grid, "float32")] if self.zero else []
        table = [] if self.rule is not None else [("table", (padded(self.entries),), "float32")]
        return [("codes", (self.panels, self.row_bytes, LANES), "uint8"), ("scale", grid, "float32"), *zero, *table]

    def pack_table(self, table: np.ndarray) -> np.ndarray:
        """Whole vectors, zeros in the padding."""
        full = np.zeros(padded(self.entries), np.float32)
        full[: self.entries] = table
        return full


def rule_of(table: np.ndarray, level: str) -> Integers | Minifloat | None:
    """How a kernel of `level` computes the entries of a table; None where it looks them up."""
    if level == "avx512" and len(table) <= 2 * LANES:
        return None
    return Integers.of(table) or Minifloat.of(table)


class _Decoder:
    """Emits the entries of one panel's weights. flat: the buffers of `Coded.arguments`."""

    def __init__(self, coded: Coded, level: str, flat: list[Any]) -> None:
        self.coded, self.level = coded, level
        self.codes, self.scales, *rest = flat
        self.zeros = rest.pop(0) if coded.zero else None
        self.table = rest.pop(0) if rest else None
        self.vectors: list[Any] = []
        if self.table is not None and level == "avx512" and coded.entries <= 2 * LANES:
            self.vectors = [bind(self.table.vload([at], VECTOR)) for at in range(0, padded(coded.entries), LANES)]

    def block(self, panel: Any, block: Any, count: int) -> list[Any]:
        """The codes of `count` weights, int32 vectors, from weight block * BLOCK on."""
        bits = self.coded.bits
        start = (panel * self.coded.row_bytes + block * bits) * LANES
        loaded = range(-(-count * bits // 8))
        bytes_ = [bind(T.Cast(WORDS, self.codes.vload([start + i * LANES], f"uint8x{LANES}"))) for i in loaded]
        codes = []
        for place in range(count):
            byte, shift = divmod(place * bits, 8)
            code = bytes_[byte] if shift == 0 else bytes_[byte] >> _int(shift)
            if shift + bits > 8:
                code = code | (bytes_[byte + 1] << _int(8 - shift))
            # A permutation reads the low bits of an index only.
            masked = bits == 8 or shift + bits == 8 or (len(self.vectors) << 4) == 1 << bits
            codes.append(code if masked else code & _int((1 << bits) - 1))
        return codes

    def entry(self, code: Any, zero: Any | None) -> Any:
        """Entry of each code, minus the zero; exact where entries are integers."""
        if self.coded.rule is not None:
            value = self.coded.rule.emit(code)
        elif len(self.vectors) == 1:
            value = T.call_llvm_pure_intrin(VECTOR, "llvm.x86.avx512.permvar.sf.512", self.vectors[0], code)
        elif self.vectors:
            low, high = self.vectors
            value = T.call_llvm_pure_intrin(VECTOR, "llvm.x86.avx512.vpermi2var.ps.512", low, code, high)
        else:
            value = self.table[code]  # type: ignore[index]
        return value if zero is None else value - zero

    def scale(self, panel: Any, group: Any) -> Any:
        return bind(self.scales.vload([(panel * self.coded.groups + group) * LANES], VECTOR))

    def zero(self, panel: Any, group: Any) -> Any | None:
        if self.zeros is None:
            return None
        return bind(self.zeros.vload([(panel * self.coded.groups + group) * LANES], VECTOR))

    def group_of(self, position: Any) -> Any:
        """The group of the weight that is read at `position`."""
        coded = self.coded
        if coded.groups == 1:
            return 0
        if coded.taps > 1:
            channels = coded.count // coded.taps
            position = T.floormod(position, channels) * coded.taps + T.floordiv(position, channels)
        return T.floordiv(position, coded.group)


def decode(coded: Coded, level: str = "avx512") -> tirx.PrimFunc:
    """(the buffers of `Coded.arguments`, W float32 [panels, count, LANES]): the weight as the float kernels read it, every
    product rounded once. Lanes past the last row hold anything finite."""

    def body() -> None:
        *flat, out = arguments(*coded.arguments(), ("W", (coded.panels, coded.count, LANES), "float32"))
        decoder = _Decoder(coded, level, flat)
        full, rest = divmod(coded.count, BLOCK)
        whole = coded.groups == 1 or (coded.taps == 1 and coded.group % BLOCK == 0)

        def emit(panel: Any, block: Any, count: int) -> None:
            shared = decoder.group_of(block * BLOCK) if whole else None
            common = None if shared is None else (decoder.scale(panel, shared), decoder.zero(panel, shared))
            for place, code in enumerate(decoder.block(panel, block, count)):
                position = block * BLOCK + place
                if common is None:
                    group = bind(decoder.group_of(position))
                    scale, zero = decoder.scale(panel, group), decoder.zero(panel, group)
                else:
                    scale, zero = common
                store(out, (panel * coded.count + position) * LANES, decoder.entry(bind(code), zero) * scale)

        with loop(coded.panels, parallel_kind(coded.panels * LANES * coded.count / WEIGHTS_PER_US[level])) as panel:
            if full:
                with loop(full) as block:
                    emit(panel, block, BLOCK)
            if rest:
                emit(panel, full, rest)

    return build("decode_f32", body)


def fuses(rows: int, coded: Coded) -> bool:
    """Whether `linear` takes the layer: few rows, and groups that begin where a block of codes does."""
    return rows <= FUSED_ROWS and (coded.groups == 1 or coded.group % BLOCK == 0)


def linear(shape: MatrixProduct, coded: Coded, spec: FloatSpec = PLAIN) -> tirx.PrimFunc:
    """(X [M, K], R [M, N] if the spec has a residual, the buffers of `Coded.arguments`, bias [padded(N)], Y [M, N]), all dense:
    a linear layer that decodes its weights as it multiplies. Sums of x * entry are scaled once a group, so that a result differs
    from the exact one by at most (K + 4) * eps * (sum |x| |w| + |bias|)."""
    rows, level = shape.rows, spec.level
    last = coded.rows - (coded.panels - 1) * LANES

    def body() -> None:
        residual = [("R", (rows, coded.rows), "float32")] if spec.residual else []
        bias = ("bias", (coded.panels * LANES,), "float32")
        inputs = ("X", (rows, coded.count), "float32")
        x, *flat = arguments(inputs, *residual, *coded.arguments(), bias, ("Y", (rows, coded.rows), "float32"))
        added = flat.pop(0) if residual else None
        *weights, offsets, y = flat
        decoder = _Decoder(coded, level, weights)
        buffers = Buffers(x, added, weights[0], offsets, y)
        with loop(coded.panels, parallel_kind(rows * coded.panels * LANES * coded.count / WEIGHTS_PER_US[level])) as panel:
            totals = [accumulator("float32") for _ in range(rows)]
            for total in totals:
                store(total, 0, offsets.vload([panel * LANES], VECTOR))
            sums = [[accumulator("float32") for _ in range(CHAINS)] for _ in range(rows)]
            for first, count, length in _group_runs(coded):
                with loop(count) as index:
                    _group(decoder, x, (sums, totals), panel, first + index, length)

            def finish(valid: int) -> None:
                for row, total in enumerate(totals):
                    buffers.finish(spec, total.vload([0], VECTOR), row * coded.rows + panel * LANES, valid)

            if last == LANES or coded.panels == 1:
                finish(last)
            else:
                with T.If(panel < coded.panels - 1):
                    with T.Then():
                        finish(LANES)
                    with T.Else():
                        finish(last)

    return build("linear_coded_f32", body)


def _group_runs(coded: Coded) -> list[tuple[int, int, int]]:
    """(first group, groups, weights of each): the last group of a row may be shorter."""
    full, rest = divmod(coded.count, coded.group)
    return ([(0, full, coded.group)] if full else []) + ([(full, 1, rest)] if rest else [])


def _group(decoder: _Decoder, x: Any, into: tuple[list[list[Any]], list[Any]], panel: Any, group: Any, length: int) -> None:
    """Adds the products of one group to the totals of every row."""
    (sums, totals), coded = into, decoder.coded
    for row in sums:
        for part in row:
            store(part, 0, splat(T.float32(0.0)))
    start, zero = bind(group * coded.group), decoder.zero(panel, group)
    first_block = bind(T.floordiv(start, BLOCK))

    def emit(block: Any, count: int) -> None:
        for place, code in enumerate(decoder.block(panel, first_block + block, count)):
            entry = bind(decoder.entry(bind(code), zero))
            for row, parts in enumerate(sums):
                part = parts[place % CHAINS]
                value = splat(x.vload([row * coded.count + start + block * BLOCK + place]))
                store(part, 0, part.vload([0], VECTOR) + value * entry)

    full, rest = divmod(length, BLOCK)
    if full:
        with loop(full) as block:
            emit(block, BLOCK)
    if rest:
        emit(full, rest)
    scale = decoder.scale(panel, group)
    for parts, total in zip(sums, totals, strict=True):
        a, b, c, d = (part.vload([0], VECTOR) for part in parts)
        store(total, 0, total.vload([0], VECTOR) + ((a + b) + (c + d)) * scale)
