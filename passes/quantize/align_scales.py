"""Scales under which no integer sum lies in the middle between two codes, so that every runtime rounds it alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import ClassVar

import torch
from torch import fx

from ...ir.program import Program, Stage, origin_of, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from . import operators as ops
from .annotate import bias_on_grid, source_of_codes
from .encoding import is_fake_quantize, read_encoding
from .side_by_side import is_quantized_layer

#: Largest relative change of a scale: half a step of the outermost 8-bit code.
TOLERANCE = 1 / 256
#: Ratios below this stay: their fractions' distance from a tie is less than float32 loses, and the weights are all but zero.
SMALLEST_RATIO = 2.0**-14
#: Denominators of sums of two operands; the margin to a tie is half of 1 / denominator.
ADD_DENOMINATORS = range(65, 1024, 2)


@register
@dataclass(frozen=True)
class AlignScales(Pass):
    """Moves scales by at most 1/256 so that rounding an integer sum never meets a tie, and puts biases on their grid.

        %y = convolution(%x', fake_quantize(w, sw, ...), b)           sx * sw / sy = m / D, D odd, for every channel
        %r = fake_quantize(relu(%y), sy, zy)                   ->     b = k * sx * sw, k integer
        %s = fake_quantize(add(%r, %t), ss, zs)                       sr / ss = m / D and st / ss = n / D, D odd

    An s32 sum a becomes the code round(a * m / D). With D odd that quotient is never k + 1/2 and keeps 1 / (2 D) away from
    it, far more than float32 loses. So integer kernels, fixed-point kernels and float emulation (QDQ, in any order of summation)
    give the same code: the annotated program, the integer program and its ONNX export agree. Without it about one code in 10^5
    differs, and the step travels through the layers behind it.

    A weight's scale follows the activations around its layer; an add moves the scale of its result and of an operand that is
    still free; a mean, a pool and a product move the scale of their result. Every weight is rounded anew, so bias correction,
    which makes up for that rounding, comes afterwards: in the other order EfficientNet-lite0 lost 3 dB.

    Stats: sums aligned, sums that could not be (with origin and reason), the smallest distance from a tie in codes, and the
    largest relative change of a scale.
    """

    name: ClassVar[str] = "align-scales"
    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.ANNOTATED,)

    def run(self, program: Program, context: PassContext) -> PassResult:
        aligner = _Aligner(program)
        aligner.align_activations()
        aligner.align_weights()
        modified = aligner.write()
        program.sweep()
        stats = {
            "aligned": aligner.aligned,
            "unaligned": aligner.unaligned,
            "margin": 0.5 / max(aligner.denominators, default=1),
            "largest_change": max(aligner.changes, default=0.0),
        }
        return PassResult(program, modified, stats)


def odd_fraction(ratio: float, tolerance: float = TOLERANCE) -> Fraction:
    """m / D within `tolerance` (relative) of `ratio`, D odd and as small as can be: the further from a tie."""
    denominator = max(1, math.floor((1 - tolerance) / ratio) | 1) if ratio < 1 else 1
    while True:
        numerator = max(1, round(ratio * denominator))
        if abs(numerator / denominator - ratio) <= tolerance * ratio:
            return Fraction(numerator, denominator)
        denominator += 2


def odd_fractions(first: float, second: float) -> tuple[Fraction, Fraction]:
    """m / D and n / D over one odd D near two ratios: the smallest D of ADD_DENOMINATORS that is near enough, or the nearest.

    Half the tolerance each: the scale of one operand follows the result's, and so moves by both.
    """

    def error(denominator: int) -> float:
        return max(abs(max(1, round(r * denominator)) / denominator - r) / r for r in (first, second))

    small = (d for d in ADD_DENOMINATORS if error(d) <= TOLERANCE / 2)
    chosen = next(small, None) or min(ADD_DENOMINATORS, key=error)
    first_part, second_part = (Fraction(max(1, round(r * chosen)), chosen) for r in (first, second))
    return first_part, second_part


@dataclass
class _Aligner:
    """Works on `scales` (float64 by fake_quantize node; weights (C,)), then writes them back as float32."""

    program: Program
    scales: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    #: Activations whose scale other scales have been chosen for.
    fixed: set[fx.Node] = field(default_factory=set)
    aligned: int = 0
    unaligned: list[str] = field(default_factory=list)
    denominators: list[int] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in self.program.nodes:
            if is_fake_quantize(node):
                self.scales[node] = read_encoding(self.program, node).scale.to(torch.float64)

    # -- activations -------------------------------------------------------------------------------------------------------

    def align_activations(self) -> None:
        """In graph order, so that the scale of a sum's operands is settled before its result's."""
        for quantized in self._activations():
            made, factor = self._made_by(quantized)
            if made.target in ops.ADD and not ops.is_unary(self.program, made):
                if factor == 1.0:
                    self._align_add(quantized, made)
            elif (scale := self._accumulated(made)) is not None:
                self._align_result(quantized, scale * factor)

    def _activations(self) -> Iterator[fx.Node]:
        return (n for n in self.scales if self.program.parameter(n.args[0]) is None)

    def _made_by(self, quantized: fx.Node) -> tuple[fx.Node, float]:
        """The op whose sum becomes these codes, and the constant factor between: clamps and factors fuse into the rescaling."""
        value, factor = quantized.args[0], 1.0
        while True:
            own = ops.positive_factor(self.program, value)  # type: ignore[arg-type]
            if own is None and ops.clamp_bounds(value) is None:  # type: ignore[arg-type]
                return value, factor  # type: ignore[return-value]
            factor, value = factor * (own or 1.0), value.all_input_nodes[0]  # type: ignore[union-attr]

    def _operands(self, node: fx.Node, count: int) -> list[tuple[fx.Node, float]] | None:
        """(fake_quantize, constant factor) of the first operands; None where one is no activation in codes."""
        found = [source_of_codes(self.program, value) for value in node.args[:count]]
        return None if any(f is None or f[0] not in self.scales for f in found) else found  # type: ignore[return-value]

    def _scale(self, operand: tuple[fx.Node, float]) -> float:
        return float(self.scales[operand[0]]) * operand[1]

    def _accumulated(self, node: fx.Node) -> float | None:
        """The scale of the s32 sum of a product, a mean or an average pool; None for other ops. Its operands are fixed by it."""
        two = node.target in ops.MATMUL or (node.target is ops.MULTIPLY and not ops.is_unary(self.program, node))
        divisor = _divisor(node)
        operands = self._operands(node, 2 if two else 1) if two or divisor else None
        if operands is None:
            return None
        self.fixed.update(quantized for quantized, _ in operands)
        return math.prod(self._scale(operand) for operand in operands) / (divisor or 1)

    def _align_result(self, quantized: fx.Node, scale: float) -> None:
        fraction = odd_fraction(scale / float(self.scales[quantized]))
        self._move(quantized, scale / fraction)
        self.fixed.add(quantized)
        self._count(fraction)

    def _align_add(self, quantized: fx.Node, node: fx.Node) -> None:
        operands = self._operands(node, 2)
        if operands is None:
            return
        free = next((o for o in reversed(operands) if o[0] not in self.fixed), None)
        if operands[0] == operands[1]:
            self._align_result(quantized, self._scale(operands[0]))
        elif free is None:
            self.unaligned.append(f"{origin_of(node)}: other sums have fixed the scales of both operands")
        else:
            anchor = operands[0] if free == operands[1] else operands[1]
            target = float(self.scales[quantized])
            kept, moved = odd_fractions(self._scale(anchor) / target, self._scale(free) / target)
            self._move(quantized, self._scale(anchor) / kept)
            self._move(free[0], float(self.scales[quantized]) * moved / free[1])
            self._count(kept, moved)
        self.fixed.update((quantized, operands[0][0], operands[1][0]))

    # -- weights and biases ------------------------------------------------------------------------------------------------

    def align_weights(self) -> None:
        made = {self._made_by(q)[0]: q for q in self._activations()}
        moved: set[fx.Node] = set()
        for layer in [n for n in self.program.nodes if is_quantized_layer(n)]:
            operands, weight = self._operands(layer, 1), layer.args[1]
            if operands is None:
                continue
            if layer in made and weight in moved:
                self.unaligned.append(f"{origin_of(layer)}: it shares its weight with a layer before")
            elif layer in made:
                self._align_weight(weight, self._scale(operands[0]), made[layer])  # type: ignore[arg-type]
                moved.add(weight)  # type: ignore[arg-type]

    def _align_weight(self, weight: fx.Node, input_scale: float, quantized: fx.Node) -> None:
        """s_w = m / D * s_y / s_x, for each output channel."""
        unit = float(self.scales[quantized]) / (input_scale * self._made_by(quantized)[1])
        ratios = (self.scales[weight] / unit).tolist()
        fractions = [odd_fraction(r) if r > SMALLEST_RATIO else Fraction(r) for r in ratios]
        self._move(weight, torch.tensor([float(f) * unit for f in fractions], dtype=torch.float64))
        self._count(*(f for f, r in zip(fractions, ratios, strict=True) if r > SMALLEST_RATIO))

    # -- results -----------------------------------------------------------------------------------------------------------

    def _move(self, quantized: fx.Node, scale: float | torch.Tensor) -> None:
        before = self.scales[quantized]
        after = torch.as_tensor(scale, dtype=torch.float64).reshape(before.shape).to(torch.float32).to(torch.float64)
        self.scales[quantized] = after
        self.changes.append(float((after / before - 1).abs().max()))

    def _count(self, *fractions: Fraction) -> None:
        """One more sum aligned. Equal fractions in lowest terms have no larger denominator than the one chosen."""
        self.aligned += 1
        self.denominators.append(max(f.denominator for f in fractions))

    def write(self) -> bool:
        """Puts the scales, then the biases on their new grid, into the program; whether anything changed."""
        changed = [self._replace(quantized, 1, scale) for quantized, scale in self.scales.items()]
        for layer in [n for n in self.program.nodes if is_quantized_layer(n)]:
            bias = self.program.parameter((*layer.args, None)[2])
            if bias is not None:
                changed.append(self._replace(layer, 2, bias_on_grid(self.program, layer, bias)))
        return any(changed)

    def _replace(self, node: fx.Node, index: int, value: torch.Tensor) -> bool:
        """Makes `value` the parameter that `node` reads as this argument; whether it is another one."""
        parameter = node.args[index]
        old = self.program.parameter(parameter).detach()  # type: ignore[union-attr]
        new = value.detach().reshape(old.shape).to(old.dtype)
        if torch.equal(old, new):
            return False
        node.update_arg(index, self.program.add_parameter(str(parameter.target), new, node))  # type: ignore[union-attr]
        return True


def _divisor(node: fx.Node) -> int | None:
    """What a mean or an average pool divides its sum by; None for other ops."""
    if (described := ops.mean_dims(node)) is not None:
        return math.prod(shape_of(node.args[0])[d] for d in described[0])  # type: ignore[arg-type]
    if node.target is ops.AVERAGE_POOL and not isinstance(pool := ops.average_pool(node), str):
        return pool[3]
    return None
