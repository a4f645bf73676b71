"""Weight formats whose codes index a table of real values. Layers with such weights compute in float.

    int4g64, uint3g32   integers with one scale (and zero) for each group of 64 (32) inputs of an output channel
    pot4                powers of two: 0 and +-2^-k, k = 0 .. 2^(bits - 1) - 2 (Miyashita et al. 2016, arXiv:1603.01025)
    fp8e4m3, fp4e2m1    floating point of 1 sign, e exponent and m mantissa bits. fp8e4m3 and fp8e5m2 leave out the codes that
                        OCP's 8-bit formats keep for infinity and NaN (arXiv:2209.05433); all others are finite throughout
    pe4                 power exponent: sign(w) |w|^a rounded to integers, a chosen for each layer (Yvinec et al., PowerQuant,
                        arXiv:2301.09858, equation 3, and NUPES, arXiv:2308.05600); here to the entry nearest in value

All take a group (`pot4g64`); without one, a row has one scale. What a table fits better than equal steps is a bell-shaped weight:
its entries lie closer together where the weights are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.codebook import codes_of, groups_of, values_of
from ...ir.errors import PassError
from ...ir.program import Program, origin_of
from .encoding import SMALLEST_SCALE

_TEXT = re.compile(r"(u?int|pot|fp|pe)([2-8])(?:e([1-7])m([0-6]))?(?:g([1-9][0-9]*))?")

#: Clipping candidates of a search by squared error, as shares of the largest magnitude. Half of it is one octave down, where a
#: table of powers of two repeats itself.
SHARES = torch.linspace(1.0, 0.5, 26, dtype=torch.float64)

#: Candidates for the exponent of a power-exponent table; 1 is uniform.
EXPONENTS = torch.linspace(0.3, 1.0, 29, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Codebook:
    """A table with the scales of one weight: what codes (O, ...) mean, see `ir.dialect.codebook`.

    table: float32, sorted. scale: float32 (O, G). zero: u8 (O, G) or None. group: inputs of a row that share a scale.
    """

    table: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: int
    bits: int

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest codes, u8."""
        return codes_of(weight.detach(), self.table, self.scale, self.group, self.zero)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        return values_of(codes, self.table, self.scale, self.group, self.zero)


@dataclass(frozen=True)
class CodebookFormat:
    """A family of tables at a width. group: inputs that share a scale; 0: all of a row. exponent_bits: of `fp` only."""

    family: str
    bits: int
    group: int = 0
    exponent_bits: int = 0

    def __str__(self) -> str:
        detail = f"e{self.exponent_bits}m{self.bits - 1 - self.exponent_bits}" if self.family == "fp" else ""
        return f"{self.family}{self.bits}{detail}" + (f"g{self.group}" if self.group else "")

    def stored_bits(self, shape: tuple[int, ...]) -> int:
        """Bits that a weight of this shape takes in the artifact: packed rows, scales and zeros, and the table."""
        rows, count = shape[0], prod(shape[1:])
        scales = rows * groups_of(count, self.group or count)
        row = -(-count * self.bits // 8) * 8
        return rows * row + scales * (40 if self.family == "uint" else 32) + 32 * len(self.table())

    def table(self, exponent: float = 1.0) -> torch.Tensor:
        """The sorted entries, float32. exponent: a of a power-exponent table."""
        if self.family == "uint":
            return torch.arange(1 << self.bits, dtype=torch.float32)
        positive = _POSITIVE[self.family](self, exponent)
        return torch.cat([-positive.flip(0), torch.zeros(1, dtype=torch.float64), positive]).to(torch.float32)

    def fit(self, weight: torch.Tensor, search: bool = False) -> Codebook:
        """Table, scales and zeros for a weight (O, ...).

        search: choose where the outermost entries lie by the squared error of each group, instead of at its largest weight.
        """
        rows = weight.detach().reshape(weight.shape[0], -1).to(torch.float64)
        group = min(self.group or rows.shape[1], rows.shape[1])
        parts = F.pad(rows, (0, -rows.shape[1] % group)).reshape(rows.shape[0], -1, group)
        if self.family == "pe":
            table = min((self.table(float(a)) for a in EXPONENTS), key=lambda t: _error(_symmetric(parts, t, False), parts, t))
        else:
            table = self.table()
        scale, zero = _asymmetric(parts, table, search) if self.family == "uint" else (_symmetric(parts, table, search), None)
        return Codebook(table, scale.to(torch.float32), zero, group, self.bits)


def parse_codebook(text: str) -> CodebookFormat | None:
    """`int4g64`, `pot4`, `fp4e2m1g32`, ...; None where the text names no such format."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    family, width, exponent, mantissa, group = match.groups()
    bits, exponent_bits, mantissa_bits, size = (int(number or 0) for number in (width, exponent, mantissa, group))
    if family.endswith("int") and not size:
        return None
    if (family == "fp") != (exponent is not None) or (family == "fp" and 1 + exponent_bits + mantissa_bits != bits):
        return None
    return CodebookFormat(family, bits, size, exponent_bits)


def is_fake_codebook(node: fx.Node) -> bool:
    return node.target is gw.fake_codebook.default


def insert_fake_codebook(program: Program, weight: fx.Node, codebook: Codebook, before: fx.Node) -> fx.Node:
    """Adds `fake_codebook(weight)` before `before`; table, scale and zero become parameters named after the weight."""
    name = str(weight.target)
    table = program.add_parameter(f"{name}_table", codebook.table, before)
    scale = program.add_parameter(f"{name}_scale", codebook.scale, before)
    zero = None if codebook.zero is None else program.add_parameter(f"{name}_zero", codebook.zero, before)
    args = (weight, table, scale, codebook.group, zero, None)
    return program.insert(gw.fake_codebook.default, args, before, origin=origin_of(weight))


def read_codebook(program: Program, node: fx.Node) -> Codebook:
    """The codebook of a `gw.fake_codebook` node. Raises PassError where its table or scale is not a parameter."""
    _, table_node, scale_node, group, zero_node, *_ = (*node.args, None, None)
    table, scale, zero = (program.parameter(n) for n in (table_node, scale_node, zero_node))
    if table is None or scale is None or (zero is None) != (zero_node is None):
        raise PassError(f"table, scale and zero of '{node.name}' (from {origin_of(node)}) must be parameters of the program")
    bits = max((len(table) - 1).bit_length(), 2)
    return Codebook(table.detach(), scale.detach(), zero, int(group), bits)  # type: ignore[arg-type]


def read_table_codes(program: Program, node: fx.Node) -> torch.Tensor:
    """The codes, u8, of a parameter behind a table: those a rounding pass chose, or else the nearest."""
    weight, chosen = program.parameter(node.args[0]), program.parameter((*node.args, None, None)[5])
    if weight is None:
        raise PassError(f"'{node.name}' (from {origin_of(node)}) holds an activation behind a table; only parameters can be")
    return read_codebook(program, node).quantize(weight) if chosen is None else chosen


def write_table_codes(program: Program, node: fx.Node, codes: torch.Tensor) -> bool:
    """Puts chosen codes behind a table; whether they are others than before."""
    if torch.equal(read_table_codes(program, node), codes):
        return False
    args = [*node.args, *(None,) * (6 - len(node.args))]
    args[5] = program.add_parameter(f"{node.args[0]}_codes", codes, before=node, origin=origin_of(node))
    node.args = tuple(args)
    return True


def _integers(form: CodebookFormat, exponent: float) -> torch.Tensor:
    return torch.arange(1, 1 << (form.bits - 1), dtype=torch.float64)


def _powers_of_two(form: CodebookFormat, exponent: float) -> torch.Tensor:
    count = (1 << (form.bits - 1)) - 1
    return torch.pow(2.0, -torch.arange(count - 1, -1, -1, dtype=torch.float64))


def _power_exponent(form: CodebookFormat, exponent: float) -> torch.Tensor:
    steps = _integers(form, exponent)
    return (steps / steps[-1]) ** (1.0 / exponent)


def _minifloat(form: CodebookFormat, exponent: float) -> torch.Tensor:
    """Every positive value: subnormals m * 2^(1 - bias - M), then (1 + m / 2^M) * 2^(e - bias), bias = 2^(E - 1) - 1."""
    e_bits, m_bits = form.exponent_bits, form.bits - 1 - form.exponent_bits
    code = torch.arange(1, 1 << (form.bits - 1), dtype=torch.float64)
    e, m = torch.div(code, 1 << m_bits, rounding_mode="floor"), code % (1 << m_bits)
    bias = (1 << (e_bits - 1)) - 1
    values = torch.where(e == 0, m, m + (1 << m_bits)) * torch.pow(2.0, e.clamp_min(1) - bias - m_bits)
    reserved = {(8, 4): 1, (8, 5): 4}.get((form.bits, e_bits), 0)
    return values[: len(values) - reserved]


_POSITIVE = {"int": _integers, "pot": _powers_of_two, "pe": _power_exponent, "fp": _minifloat}


def _symmetric(parts: torch.Tensor, table: torch.Tensor, search: bool) -> torch.Tensor:
    """Scales (O, G) of groups (O, G, group): the largest magnitude on the outermost entry, or a share of it."""
    full = (parts.abs().amax(2) / float(table[-1])).clamp_min(SMALLEST_SCALE)
    return _best([(full * share).clamp_min(SMALLEST_SCALE) for share in SHARES], parts, table) if search else full


def _best(candidates: list[torch.Tensor], parts: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    best, least = candidates[0], torch.full_like(candidates[0], float("inf"))
    for scale in candidates:
        error = _errors(scale, None, parts, table)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _asymmetric(parts: torch.Tensor, table: torch.Tensor, search: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros (O, G) of the range of each group, or of the share of it with the least squared error."""
    low, high = parts.amin(2).clamp_max(0.0), parts.amax(2).clamp_min(0.0)
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    least = torch.full_like(low, float("inf"))
    for share in SHARES if search else SHARES[:1]:
        scale = (share * (high - low) / float(table[-1])).clamp_min(SMALLEST_SCALE)
        zero = (-share * low / scale).round().clamp(0, float(table[-1]))
        error = _errors(scale, zero, parts, table)
        if best is None:
            best = scale, zero
        best = torch.where(error < least, scale, best[0]), torch.where(error < least, zero, best[1])
        least = torch.minimum(error, least)
    assert best is not None
    return best[0], best[1].to(torch.uint8)


def _errors(scale: torch.Tensor, zero: torch.Tensor | None, parts: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Squared error of each group, (O, G)."""
    wide = table.to(torch.float64)
    offset = 0.0 if zero is None else zero[:, :, None]
    steps = parts / scale[:, :, None] + offset
    entries = wide[torch.bucketize(steps, (wide[1:] + wide[:-1]) / 2)]
    return ((entries - offset) * scale[:, :, None] - parts).square().sum(2)


def _error(scale: torch.Tensor, parts: torch.Tensor, table: torch.Tensor) -> float:
    return float(_errors(scale, None, parts, table).sum())
