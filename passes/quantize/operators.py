"""What quantization knows about each ATen op: which compute, which clamp, which only move values, which are tables."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from ...ir.program import Program, shape_of

aten = torch.ops.aten

CONVOLUTION = aten.convolution.default
LINEAR = aten.linear.default
MATMUL = frozenset({aten.matmul.default, aten.bmm.default, aten.mm.default})
ADD = frozenset({aten.add.Tensor, aten.sub.Tensor})
MULTIPLY = aten.mul.Tensor
CONCAT = aten.cat.default
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
LAYER_NORM = aten.layer_norm.default
MAX_POOL = aten.max_pool2d.default
AVERAGE_POOL = aten.avg_pool2d.default
ADAPTIVE_POOL = aten.adaptive_avg_pool2d.default
MEAN = aten.mean.dim
PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})

#: Ops that move values without arithmetic: the result keeps the encoding of the first argument.
MOVES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.expand.default,
        aten.repeat.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        aten.flip.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.pixel_shuffle.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest2d.default,
        operator.getitem,
    }
)

#: Element-wise functions of one tensor (further arguments are numbers): on 8-bit values, a table of 256 entries.
UNARY = frozenset(
    {
        aten.gelu.default,
        aten.silu.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.mish.default,
        aten.elu.default,
        aten.leaky_relu.default,
        aten.softplus.default,
        aten.erf.default,
        aten.exp.default,
        aten.abs.default,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.add.Scalar,
        aten.sub.Scalar,
        aten.mul.Scalar,
        aten.div.Scalar,
        aten.rsub.Scalar,
    }
)

#: Binary ops that become unary where the other operand is a number.
_WITH_NUMBER = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor})


def clamp_bounds(node: fx.Node) -> tuple[float, float] | None:
    """(low, high) of a relu, relu6, clamp or hardtanh; None for other ops and for clamps with tensor bounds."""
    if node.target is aten.relu.default:
        return 0.0, math.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    defaults: dict[Any, tuple[float | None, float | None]] = {
        aten.clamp.default: (None, None),
        aten.clamp_min.default: (None, None),
        aten.hardtanh.default: (-1.0, 1.0),
    }
    if node.target not in defaults:
        return None
    low, high = (*node.args[1:], *defaults[node.target][len(node.args) - 1 :])[:2]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))  # type: ignore[arg-type]


def number(program: Program, value: Any) -> float | None:
    """A Python number or a parameter of one element, as a float; None for everything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    tensor = program.parameter(value)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def positive_factor(program: Program, node: fx.Node) -> float | None:
    """c where `node` multiplies its first argument by a constant c > 0 (or divides by 1 / c); None otherwise."""
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar) or node.kwargs:
        return None
    constant = number(program, node.args[1])
    if constant is None or constant <= 0 or not math.isfinite(constant) or number(program, node.args[0]) is not None:
        return None
    return constant if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / constant


def pads_with_zero(node: fx.Node) -> bool:
    """Whether `node` is a constant pad with value 0: on codes, a pad with the zero point."""
    if node.target is aten.constant_pad_nd.default:
        value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
        return bool(value == 0)
    if node.target is aten.pad.default:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return mode == "constant" and not value
    return False


def keeps_encoding(node: fx.Node) -> bool:
    """Ops through which codes pass unchanged: moves, zero pads, and max pooling (monotone, so it commutes with rounding)."""
    return node.op == "call_function" and (node.target in MOVES or node.target is MAX_POOL or pads_with_zero(node))


def is_unary(program: Program, node: fx.Node) -> bool:
    """Whether `node` is an element-wise function of its first argument alone (clamps included)."""
    if node.op != "call_function":
        return False
    if node.target in UNARY or clamp_bounds(node) is not None:
        return True
    return node.target in _WITH_NUMBER and number(program, node.args[1]) is not None and isinstance(node.args[0], fx.Node)


def mean_dims(node: fx.Node) -> tuple[list[int], bool] | None:
    """(dims, keepdim) of a mean over static dimensions or a global average pool; None for other ops."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node):
        return None
    rank = len(shape_of(x))
    if node.target is ADAPTIVE_POOL and list(node.args[1]) == [1, 1]:  # type: ignore[arg-type]
        return [rank - 2, rank - 1], True
    if node.target is MEAN and node.args[1]:
        keep = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        dims = sorted(int(d) % rank for d in node.args[1])  # type: ignore[union-attr, arg-type]
        if all(isinstance(shape_of(x)[d], int) for d in dims):
            return dims, keep
    return None


def pair(value: Any) -> list[int]:
    """A 2-D extent written as one number, one element or two."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * 2 if len(values) == 1 else values


def average_pool(node: fx.Node) -> tuple[list[int], list[int], list[int], int] | str:
    """(kernel, stride, padding, divisor) of an average pool, or the reason why it is not a sum over windows by one divisor."""
    defaults = ([], [0, 0], False, True, None)
    _, kernel, stride, padding, ceil_mode, include_pad, divisor = (*node.args, *defaults[len(node.args) - 2 :])
    kernel, padding = pair(kernel), pair(padding)
    if ceil_mode:
        return "ceil_mode average pooling has windows of different sizes"
    if any(padding) and not include_pad and divisor is None:
        return "average pooling that leaves its padding out divides by different counts"
    return kernel, pair(stride or kernel), padding, int(divisor or math.prod(kernel))  # type: ignore[arg-type]


def is_transposed(node: fx.Node) -> bool:
    return node.target is CONVOLUTION and bool(node.args[6])
