"""`Encoding`: how a float tensor maps to small integers and back.

real = scale * (code - zero_point). Activations: one scale and zero point a tensor, u8 asymmetric or s8 symmetric. Weights:
one scale an output channel, zero point 0 and codes in [-127, 127]: the code -128 is left out so that the grid is symmetric,
negating a weight negates its code, and pairs of products fit in 16 bits (Krishnamoorthi 2018, arXiv:1806.08342, section 2.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.fake import broadcast_along
from ...ir.errors import PassError
from ...ir.program import Program, origin_of

#: Smallest scale of an activation: keeps 1 / scale and products of two scales inside normal float32.
SMALLEST_SCALE = 1e-12


@dataclass(frozen=True, eq=False)
class Encoding:
    """Scale float32 and zero point int32, both (1,) or, along `axis`, (C,); codes in [qmin, qmax] stored as `dtype`."""

    scale: torch.Tensor
    zero_point: torch.Tensor
    qmin: int
    qmax: int
    dtype: torch.dtype
    axis: int | None = None

    def __post_init__(self) -> None:
        info = torch.iinfo(self.dtype)
        if not info.min <= self.qmin < self.qmax <= info.max:
            raise ValueError(f"codes [{self.qmin}, {self.qmax}] do not fit {self.dtype}")
        if not bool((self.scale > 0).all() and self.scale.isfinite().all()):
            raise ValueError(f"scales must be positive and finite, not {self.scale.flatten()[:4].tolist()}")

    @property
    def bits(self) -> int:
        """Bits that tell all codes apart: 4 for [-7, 7] and for [0, 15]."""
        return (self.qmax - self.qmin).bit_length()

    @property
    def per_tensor(self) -> bool:
        return self.scale.numel() == 1

    @property
    def step(self) -> float:
        """The scale of a per-tensor encoding."""
        return float(self.scale.reshape(()))

    @property
    def zero(self) -> int:
        """The zero point of a per-tensor encoding."""
        return int(self.zero_point.reshape(()))

    def same_grid(self, other: Encoding) -> bool:
        """Whether a code means the same real value under both (code limits may differ)."""
        return (
            self.dtype == other.dtype
            and self.per_tensor
            and other.per_tensor
            and self.step == other.step
            and self.zero == other.zero
        )

    def code(self, value: float) -> int:
        """The code of one real number (infinities saturate); round half even, as `gw::quantize` does."""
        if math.isinf(value):
            return self.qmin if value < 0 else self.qmax
        return min(max(round(value / self.step) + self.zero, self.qmin), self.qmax)

    def quantize(self, value: torch.Tensor) -> torch.Tensor:
        """Codes of a float tensor; the same float32 operations as `gw::fake_quantize`, so both agree on every code."""
        scale, zero = self._broadcast(value.dim())
        zero = zero.to(value.dtype)
        steps = torch.clamp(value * torch.reciprocal(scale.to(value.dtype)), self.qmin - zero, self.qmax - zero)
        return (torch.round(steps) + zero).to(self.dtype)

    def dequantize(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        scale, zero = self._broadcast(codes.dim())
        return (codes.to(torch.int32) - zero).to(dtype) * scale.to(dtype)

    def _broadcast(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return broadcast_along(self.scale, rank, self.axis), broadcast_along(self.zero_point, rank, self.axis)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Unsigned [0, 2^bits - 1]; signed [-(2^(bits-1) - 1), 2^(bits-1) - 1]."""
    return (1 - (1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def symmetric(largest: torch.Tensor, bits: int = 8, axis: int | None = None) -> Encoding:
    """Signed codes, zero point 0, from the largest magnitude, () or (C,) along `axis`."""
    qmin, qmax = code_range(bits, signed=True)
    scale = (largest.detach().to(torch.float64).reshape(-1) / qmax).clamp_min(SMALLEST_SCALE).to(torch.float32)
    return Encoding(scale, torch.zeros_like(scale, dtype=torch.int32), qmin, qmax, torch.int8, axis)


def asymmetric(low: float, high: float, bits: int = 8) -> Encoding:
    """Unsigned codes for [low, high], widened to hold 0; the zero point is rounded so that 0.0 has an exact code."""
    qmin, qmax = code_range(bits, signed=False)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = torch.tensor([max((high - low) / (qmax - qmin), SMALLEST_SCALE)], dtype=torch.float32)
    zero = min(max(round(qmin - low / float(scale)), qmin), qmax)
    return Encoding(scale, torch.tensor([zero], dtype=torch.int32), qmin, qmax, torch.uint8)


def for_range(low: float, high: float, bits: int = 8, signed: bool = False) -> Encoding:
    """The activation encoding of the range [low, high]: symmetric s8 where `signed`, else asymmetric u8."""
    return symmetric(torch.tensor(max(abs(low), abs(high))), bits) if signed else asymmetric(low, high, bits)


def is_fake_quantize(node: fx.Node) -> bool:
    return node.target is gw.fake_quantize.default


def insert_fake_quantize(program: Program, value: fx.Node, encoding: Encoding, name: str, before: fx.Node) -> fx.Node:
    """Adds `fake_quantize(value)` before `before`; its scale and zero point become parameters `<name>_scale`, `_zero_point`."""
    scale = program.add_parameter(f"{name}_scale", encoding.scale, before)
    zero = program.add_parameter(f"{name}_zero_point", encoding.zero_point, before)
    args = (value, scale, zero, encoding.qmin, encoding.qmax, encoding.axis)
    return program.insert(gw.fake_quantize.default, args, before, origin=origin_of(value))


def read_encoding(program: Program, node: fx.Node) -> Encoding:
    """The encoding of a `gw.fake_quantize` node. Raises PassError where scale or zero point is not a parameter."""
    _, scale_node, zero_node, qmin, qmax, *axis = node.args[:6]
    scale, zero = program.parameter(scale_node), program.parameter(zero_node)
    if scale is None or zero is None:
        raise PassError(f"the scale and zero point of '{node.name}' (from {origin_of(node)}) must be parameters of the program")
    dtype = torch.int8 if int(qmin) < 0 else torch.uint8  # type: ignore[arg-type]
    along = axis[0] if axis else None
    return Encoding(scale.detach(), zero.detach(), int(qmin), int(qmax), dtype, along)  # type: ignore[arg-type]


def read_codes(program: Program, node: fx.Node) -> torch.Tensor:
    """The codes of a fake-quantized parameter: those a rounding pass chose, or else the nearest.

    Every reader of a weight's codes asks here, so that lowering, export and statistics agree.
    """
    weight = program.parameter(node.args[0])
    if weight is None:
        raise PassError(f"'{node.name}' (from {origin_of(node)}) holds an activation, which has no constant codes")
    chosen = program.parameter(node.args[6]) if len(node.args) > 6 else None
    encoding = read_encoding(program, node)
    return encoding.quantize(weight.detach()) if chosen is None else chosen


def write_codes(program: Program, node: fx.Node, codes: torch.Tensor) -> bool:
    """Makes `codes`, of the weight's shape, the codes of the fake-quantized parameter `node`; whether they are others.

    The float weight stays where it is: what the codes stand for is still known, and so is the float model.
    """
    encoding, before = read_encoding(program, node), read_codes(program, node)
    codes = codes.to(encoding.dtype)
    if codes.shape != before.shape or int(codes.min()) < encoding.qmin or int(codes.max()) > encoding.qmax:
        limits = f"shape {tuple(before.shape)} and lie in [{encoding.qmin}, {encoding.qmax}]"
        raise PassError(f"codes of '{node.name}' (from {origin_of(node)}) must have {limits}")
    if torch.equal(codes, before):
        return False
    codes_node = program.add_parameter(f"{node.args[0]}_codes", codes.contiguous(), node)
    node.args = (*node.args[:5], encoding.axis, codes_node)
    return True
