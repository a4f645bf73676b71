"""The forms a value can take while an annotated program is lowered to integers.

Each value of the annotated program becomes a `Form`: codes, an s32 accumulator, a pending add, concat or table, or plain float. A
form writes nodes only when a reader asks for it as codes (`quantized`) or as float (`real`), so rescaling, clamping and
quantizing fuse into one op and quantize / dequantize appear at region edges only.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.errors import PassError
from ...ir.program import Program, dtype_of, origin_of
from .encoding import Encoding
from .fixed_point import add_multipliers, dyadic
from .operators import clamp_bounds, keeps_encoding

if TYPE_CHECKING:
    from .integer_weights import IntegerWeight

aten = torch.ops.aten


@dataclass
class Island:
    """A float op inside the integer program: what it is, where it came from, why it stayed float."""

    op: str
    origin: str
    why: str


@dataclass
class Builder:
    """Writes integer nodes into `program` before the annotated node that is being lowered (`at`)."""

    program: Program
    dyadic: bool
    at: fx.Node
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    islands: list[Island] = field(default_factory=list)

    def emit(self, target: Any, *args: Any, origin: str = "", **kwargs: Any) -> fx.Node:
        return self.program.insert(target, args, self.at, origin or origin_of(self.at), **kwargs)

    def parameter(self, name: str, value: torch.Tensor, origin: str = "") -> fx.Node:
        return self.program.add_parameter(name, value.contiguous(), self.at, origin or origin_of(self.at))

    def form(self, value: Any) -> Form | None:
        """The form of an argument; None for an argument that is not a node."""
        return self.forms[value] if isinstance(value, fx.Node) else None

    def real(self, value: Any) -> Any:
        """An argument structure with every node replaced by its float form."""
        return fx.map_arg(value, lambda n: self.forms[n].real(self))

    def island(self, node: fx.Node, why: str) -> None:
        """Records a float op, once a node."""
        entry = Island(str(node.target), origin_of(node), why)
        if not keeps_encoding(node):
            self.islands.append(entry)


class Form(abc.ABC):
    """A value on its way into the integer program."""

    @abc.abstractmethod
    def real(self, b: Builder) -> fx.Node:
        """A float32 node with this value; written once."""

    @abc.abstractmethod
    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        """This value's codes under `encoding` (per tensor)."""

    def clamped(self, node: fx.Node) -> Form | None:
        """This form with the clamp `node` fused into it; None where it cannot be."""
        return None

    def scaled(self, node: fx.Node, factor: float) -> Form | None:
        """This form multiplied by a constant > 0 without a new op; None where it cannot be."""
        return None


@dataclass(eq=False)
class Real(Form):
    """A value that is float (or an index) in the integer program: inputs, float parameters, island results."""

    node: fx.Node
    origin: str = ""

    def real(self, b: Builder) -> fx.Node:
        return self.node

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        value = b.program.parameter(self.node)
        if value is not None:
            name = str(self.node.target)
            return Codes(b.parameter(f"{name}_codes", encoding.quantize(value.detach()), origin_of(self.node)), encoding)
        args = (self.node, encoding.step, encoding.zero, encoding.qmin, encoding.qmax, encoding.dtype)
        return Codes(b.emit(gw.quantize.default, *args), encoding)


@dataclass(eq=False)
class Codes(Form):
    """8-bit codes under an encoding. Weights are the only codes with an encoding per channel.

    integer: the weight of an integer layer that was made of them (`integer_weights`).
    """

    node: fx.Node
    encoding: Encoding
    _real: fx.Node | None = None
    integer: IntegerWeight | None = None

    def real(self, b: Builder) -> fx.Node:
        if self._real is None:
            self._real = b.emit(gw.dequantize.default, self.node, self.encoding.step, self.encoding.zero)
        return self._real

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        same_limits = (encoding.qmin, encoding.qmax) == (self.encoding.qmin, self.encoding.qmax)
        if encoding.same_grid(self.encoding) and same_limits:
            return self
        return Table(self, None).quantized(b, encoding)

    def scaled(self, node: fx.Node, factor: float) -> Form | None:
        if not self.encoding.per_tensor:
            return None
        scale = (self.encoding.scale.to(torch.float64) * factor).to(torch.float32)
        return Codes(self.node, replace(self.encoding, scale=scale))


@dataclass(eq=False)
class Accumulator(Form):
    """An s32 sum with its real scale, (1,) or (C,) float64 along `axis`, and the clamp that follows it."""

    node: fx.Node
    scale: torch.Tensor
    axis: int = 0
    low: float = -math.inf
    high: float = math.inf
    _real: fx.Node | None = None

    def real(self, b: Builder) -> fx.Node:
        if self._real is None:
            scale = b.parameter(f"{origin_of(self.node)}_scale", self.scale.to(torch.float32), origin_of(self.node))
            self._real = b.emit(gw.scale.default, self.node, scale, self.axis, origin=origin_of(self.node))
            self._real = emit_clamp(b, self._real, self.low, self.high)
        return self._real

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        factor = self.scale / encoding.step
        limits = (encoding.zero, encoding.code(self.low), encoding.code(self.high), encoding.dtype, self.axis)
        origin = origin_of(self.node)
        if b.dyadic:
            try:
                multiplier, shift = dyadic(factor)
            except ValueError as error:
                raise PassError(f"'{origin}' cannot be rescaled: {error}; use rescale=float-scale") from error
            operands = (b.parameter(f"{origin}_multiplier", multiplier, origin), b.parameter(f"{origin}_shift", shift, origin))
            node = b.emit(gw.rescale_dyadic.default, self.node, *operands, *limits, origin=origin)
        else:
            scale = b.parameter(f"{origin}_rescale", factor.to(torch.float32), origin)
            node = b.emit(gw.rescale.default, self.node, scale, *limits, origin=origin)
        return Codes(node, encoding)

    def clamped(self, node: fx.Node) -> Form | None:
        low, high = clamp_bounds(node)  # type: ignore[misc]
        return replace(self, low=min(max(self.low, low), high), high=min(max(self.high, low), high), _real=None)

    def scaled(self, node: fx.Node, factor: float) -> Form | None:
        return replace(self, scale=self.scale * factor, low=self.low * factor, high=self.high * factor, _real=None)


@dataclass(eq=False)
class Sum(Form):
    """a + sign * b of two values in codes, and the clamp that follows: one `gw.add` when read as codes."""

    source: fx.Node
    a: Codes
    b: Codes
    sign: float
    low: float = -math.inf
    high: float = math.inf
    _real: fx.Node | None = None

    def real(self, b: Builder) -> fx.Node:
        if self._real is None:
            b.island(self.source, "its result is read as float")
            total = b.emit(self.source.target, self.a.real(b), self.b.real(b), origin=origin_of(self.source))
            self._real = emit_clamp(b, total, self.low, self.high)
        return self._real

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        first, second = self.a.encoding, self.b.encoding
        fixed = add_multipliers(first.step / encoding.step, self.sign * second.step / encoding.step)
        if fixed is None:
            b.island(self.source, "the scales of its operands and result differ by more than a fixed-point sum can hold")
            return Real(self.real(b)).quantized(b, encoding)
        limits = (encoding.zero, encoding.code(self.low), encoding.code(self.high), encoding.dtype)
        args = (self.a.node, self.b.node, *fixed, first.zero, second.zero, *limits)
        return Codes(b.emit(gw.add.default, *args, origin=origin_of(self.source)), encoding)

    def clamped(self, node: fx.Node) -> Form | None:
        low, high = clamp_bounds(node)  # type: ignore[misc]
        return replace(self, low=min(max(self.low, low), high), high=min(max(self.high, low), high), _real=None)


@dataclass(eq=False)
class Table(Form):
    """An element-wise function of codes: one `gw.lookup` when read as codes. `source` None is the identity (a change of grid)."""

    previous: Codes | Table
    source: fx.Node | None
    _real: fx.Node | None = None

    def real(self, b: Builder) -> fx.Node:
        if self.source is None:
            return self.previous.real(b)
        if self._real is None:
            b.island(self.source, "its result is read as float")
            rest = b.real(self.source.args[1:])
            kwargs = b.real(self.source.kwargs)
            self._real = b.emit(self.source.target, self.previous.real(b), *rest, origin=origin_of(self.source), **kwargs)
        return self._real

    @property
    def codes(self) -> Codes:
        return self.previous if isinstance(self.previous, Codes) else self.previous.codes

    def evaluate(self, program: Program) -> torch.Tensor:
        """The function on every code of the input type, lowest first, in float64."""
        if isinstance(self.previous, Codes):
            info = torch.iinfo(self.previous.encoding.dtype)
            values = self.previous.encoding.dequantize(torch.arange(info.min, info.max + 1), torch.float64)
        else:
            values = self.previous.evaluate(program)
        if self.source is None:
            return values
        rest = fx.map_arg(self.source.args[1:], lambda n: float(program.parameter(n)))  # type: ignore[arg-type]
        return self.source.target(values, *rest, **self.source.kwargs)  # type: ignore[operator]

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        origin = origin_of(self.source) if self.source is not None else origin_of(self.codes.node)
        table = b.parameter(f"{origin}_table", encoding.quantize(self.evaluate(b.program)), origin)
        node = b.emit(gw.lookup.default, self.codes.node, table, origin=origin)
        return Codes(node, encoding)

    def clamped(self, node: fx.Node) -> Form | None:
        return Table(self, node)


@dataclass(eq=False)
class Concat(Form):
    """A concatenation: each part is brought to the encoding the reader asks for, then the codes are joined."""

    source: fx.Node
    parts: list[Form]
    dim: int
    _real: fx.Node | None = None

    def real(self, b: Builder) -> fx.Node:
        if self._real is None:
            self._real = b.emit(aten.cat.default, [p.real(b) for p in self.parts], self.dim, origin=origin_of(self.source))
        return self._real

    def quantized(self, b: Builder, encoding: Encoding) -> Codes:
        codes = [p.quantized(b, encoding).node for p in self.parts]
        return Codes(b.emit(aten.cat.default, codes, self.dim, origin=origin_of(self.source)), encoding)


def emit_clamp(b: Builder, node: fx.Node, low: float, high: float) -> fx.Node:
    if low == -math.inf and high == math.inf:
        return node
    if (low, high) == (0.0, math.inf):
        return b.emit(aten.relu.default, node, origin=origin_of(node))
    bounds = [None if math.isinf(v) else v for v in (low, high)]
    return b.emit(aten.clamp.default, node, *bounds, origin=origin_of(node))


def require_integer(b: Builder, bound: int, node: fx.Node) -> None:
    """Raises PassError where an s32 accumulator could overflow on some input."""
    limit = torch.iinfo(torch.int32).max
    if bound > limit:
        raise PassError(
            f"'{origin_of(node)}' ({node.target}) can reach {bound} in its 32-bit accumulator (limit {limit}): "
            "keep it float (quantize{skip=[...]}), quantize it to fewer bits, or split it along its input channels"
        )


def is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and dtype_of(node).is_floating_point
