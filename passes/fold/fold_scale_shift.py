"""fold-scale-shift: multiplication and addition of per-channel constants disappear into neighbouring layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import Layer, can_fold_before, fold_after, fold_before, layer_of, reading_layers
from .match import MOVEMENT, argument, aten, channel_vector, is_call, is_float, operands, same_type, scalar, substitute

Vector = torch.Tensor | None


@register
@dataclass(frozen=True)
class FoldScaleShift(Pass):
    """Folds x * c, x / c, x + c, x - c and c - x into the layer that makes x, or else into every layer that reads the result.

        %y = aten.mul(aten.linear(%x, %W, %b), c)           ->  %y = aten.linear(%x, W * c, b * c)
        %y = aten.convolution(aten.add(%x, c), %W, ...)     ->  %y = aten.convolution(%x, %W, b + sum W * c, ...)

    c is a number, or a parameter that varies along the channels only: (C, 1, 1) or (1, C, 1, 1) for a convolution, (C,) for a
    linear layer. A number also folds through reshapes and permutes, such as the query scale of attention. The layer must
    have no other reader; a shift folds into a reading convolution only where that has no padding. Computed in float64.
    """

    name = "fold-scale-shift"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        stats = {"into_producer": 0, "into_readers": 0}
        for node in list(program.nodes):
            if not is_call(node, *BINARY) or not is_float(node):
                continue
            x = next((a for a in operands(node) if isinstance(a, fx.Node) and program.parameter(a) is None), None)
            if x is None or not same_type(x, node):
                continue
            if _into_producer(program, node, x):
                stats["into_producer"] += 1
            elif _into_readers(program, node, x):
                stats["into_readers"] += 1
        return PassResult(program, any(stats.values()), stats)


BINARY = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor)


def _scale_and_shift(program: Program, node: fx.Node, x: fx.Node, axis: int) -> tuple[Vector, Vector] | None:
    """node as x * scale + shift along `axis`, float64 (C,) each; None for a part that is not there."""
    a, b = operands(node)
    constant = channel_vector(program, b if a is x else a, x, axis)
    alpha = argument(node, 2, "alpha", 1)
    if constant is None or not isinstance(alpha, (int, float)):
        return None
    if node.target is aten.mul.Tensor:
        return constant, None
    if node.target is aten.div.Tensor:
        # 1 / x is no scale of x, and division by zero must stay where it is.
        return (1 / constant, None) if a is x and bool((constant != 0).all()) else None
    if node.target is aten.add.Tensor:
        return (None, constant * alpha) if a is x else (_uniform(constant, alpha), constant)
    return (None, -constant * alpha) if a is x else (_uniform(constant, -alpha), constant)


def _uniform(like: torch.Tensor, value: float) -> Vector:
    return None if value == 1 else torch.full_like(like, value)


def _into_producer(program: Program, node: fx.Node, x: fx.Node) -> bool:
    layer = _producer(program, node, x)
    if layer is None:
        return False
    if layer.node is not x:
        # Movement in between: only a number means the same on both sides. Read as a constant over the layer's channels.
        constant = _number(program, node, x)
        if constant is None:
            return False
        found = _scale_and_shift_of_number(node, x, constant, layer)
    else:
        found = _scale_and_shift(program, node, x, layer.axis)
    if found is None:
        return False
    fold_after(program, layer, *found)
    substitute(program, node, x)
    return True


def _producer(program: Program, node: fx.Node, x: fx.Node) -> Layer | None:
    """The layer that makes x, looking through element movement; every value on the way has one reader."""
    reader = node
    while single_user(x) is reader:
        layer = layer_of(program, x)
        if layer is not None or not is_call(x, *MOVEMENT):
            return layer
        reader, x = x, x.args[0]  # type: ignore[assignment]
    return None


def _number(program: Program, node: fx.Node, x: fx.Node) -> float | None:
    a, b = operands(node)
    return scalar(program, b if a is x else a)


def _scale_and_shift_of_number(node: fx.Node, x: fx.Node, number: float, layer: Layer) -> tuple[Vector, Vector] | None:
    alpha: Any = argument(node, 2, "alpha", 1)
    first = node.args[0] is x
    vector = torch.full((layer.out_channels,), number, dtype=torch.float64)
    if node.target is aten.mul.Tensor:
        return vector, None
    if node.target is aten.div.Tensor:
        return (1 / vector, None) if first and number != 0 else None
    if not isinstance(alpha, (int, float)):
        return None
    sign = 1 if node.target is aten.add.Tensor else -1
    return (None, sign * alpha * vector) if first else (_uniform(vector, sign * alpha), vector)


def _into_readers(program: Program, node: fx.Node, x: fx.Node) -> bool:
    readers = reading_layers(program, node)
    if readers is None:
        return False
    folds = []
    for reader in readers:
        found = _scale_and_shift(program, node, x, reader.axis)
        if found is None or not can_fold_before(reader, found[1]):
            return False
        folds.append((reader, found))
    for reader, (scale, shift) in folds:
        fold_before(program, reader, scale, shift)
    substitute(program, node, x)
    return True
