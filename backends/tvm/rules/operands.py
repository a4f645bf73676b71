"""Shapes and operands that integer and float layers read the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import fx

from ....ir.program import shape_of
from ..kernels.base import Convolution
from ..lower import Lowering
from ..values import Frame, arguments

aten = torch.ops.aten


def planar(
    x: Sequence[int], weight: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Convolution | None:
    """The 2-D convolution of an ATen call; a 1-D one is an image of one row. None for 3-D."""
    axes = len(x) - 2
    if axes not in (1, 2):
        return None

    def pair(values: Sequence[int], default: int) -> tuple[int, int]:
        values = [int(v) for v in values]
        values = values * axes if len(values) == 1 else values
        return (default, values[0]) if axes == 1 else (values[0], values[1])

    return Convolution(
        batch=x[0],
        channels=x[1],
        height=x[2] if axes == 2 else 1,
        width=x[-1],
        filters=weight[0],
        kernel=pair(weight[2:], 1),
        stride=pair(stride, 1),
        padding=pair(padding, 0),
        dilation=pair(dilation, 1),
        groups=int(groups),
    )


def without_frame(lowering: Lowering, x: fx.Node, shape: Convolution, fill: float) -> tuple[fx.Node, Convolution]:
    """The tensor under the explicit pads that `x` is, and the convolution that pads it itself; `fill` is what it pads with."""
    while x.op != "get_attr" and isinstance(frame := lowering.value(x).pending, Frame) and frame.fill == fill:
        height, width = shape_of(frame.source)[2:]
        before = (shape.padding[0] + frame.before[0], shape.padding[1] + frame.before[1])
        ends = (shape.framed_height - height - before[0], shape.framed_width - width - before[1])
        x, shape = frame.source, replace(shape, height=height, width=width, padding=before, padding_end=ends)
    return x, shape


def matmul_operands(a: fx.Node, b: fx.Node) -> tuple[int, int, int, int, fx.Node, bool] | None:
    """(batch, rows, inner, columns, second operand, transposed) of a batched product; None where batch axes broadcast.

    A second operand that is a transposition of its last two axes is read where it lies: [batch, columns, inner].
    """
    left, right = shape_of(a), shape_of(b)
    if len(left) < 2 or len(right) < 2 or left[:-2] != right[:-2]:
        return None
    source = transposed_source(b)
    sizes = prod(left[:-2]), left[-2], left[-1], right[-1]
    return (*sizes, b, False) if source is None else (*sizes, source, True)


def transposed_source(node: fx.Node) -> fx.Node | None:
    """The node whose last two axes `node` swaps; None where it does anything else."""
    rank = len(shape_of(node))
    if node.target is aten.transpose.int:
        swapped = {int(d) % rank for d in arguments(node)[1:3]}
        return arguments(node)[0] if swapped == {rank - 1, rank - 2} else None
    if node.target is aten.permute.default:
        order = [int(d) % rank for d in arguments(node)[1]]
        return arguments(node)[0] if order == [*range(rank - 2), rank - 1, rank - 2] else None
    return None
