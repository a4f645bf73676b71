"""Chains of element-wise float32 ops on a GPU: an op whose only reader is another one is computed there.

A value that waits for its reader is `Value.expression`; whoever else asks for it gets it computed (`Lowering.dense`). What is no
chain is left to the other rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.program import dtype_of, shape_of
from ..chains import Deferred, Source
from ..cuda.kernels.maps import Apply
from ..values import DTYPES, arguments, of_node

aten = torch.ops.aten

_BINARY: dict[Any, str] = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul", aten.div.Tensor: "div"}
_UNARY: dict[Any, str] = {aten.neg.default: "neg", gw.square_root.default: "sqrt"}

#: Operations and operands of one kernel, at most: what is used twice is computed twice.
MOST_PARTS = 32


def take(lowering: Any, node: fx.Node) -> bool:
    """Lowers `node` as part of a chain; False where it is none, or stands alone."""
    if lowering.target.arch != "cuda" or not is_map(node) or any(map(lowering.is_channels, node.all_input_nodes)):
        return False
    waits = _waits(lowering, node)
    continues = any(lowering.value(operand).expression is not None for operand in node.all_input_nodes)
    if not waits and (not continues or node.target is aten.expand.default):
        return False
    expression = _apply(lowering, node)
    if _parts(expression) > MOST_PARTS:
        return False
    covered = [n for operand in node.all_input_nodes for n in getattr(lowering.value(operand).expression, "nodes", ())]
    lowering.bind(node, of_node(node, expression=Deferred(expression, (*dict.fromkeys(covered), node))))
    if not waits:
        lowering.dense(node)
    return True


def is_map(node: fx.Node) -> bool:
    """Whether a node is an operation that chains know, on types that they know."""
    if node.op != "call_function" or "val" not in node.meta or not isinstance(node.meta["val"], torch.Tensor):
        return False
    dtypes = {dtype_of(operand) for operand in node.all_input_nodes}
    if node.target is aten._to_copy.default:
        known = dtypes <= {torch.bool, torch.int32, torch.int64, torch.float32} and set(node.kwargs) == {"dtype"}
        return known and dtype_of(node) in (torch.float32, torch.int32)
    if node.target is aten.embedding.default:
        table, indices = arguments(node)[:2]
        return dtype_of(table) == torch.float32 and dtype_of(indices) in (torch.int32, torch.int64)
    if dtype_of(node) != torch.float32 or dtypes != {torch.float32} or node.kwargs:
        return False
    if node.target in (aten.clamp.default, aten.clamp_min.default, aten.expand.default):
        return True
    return node.target in _UNARY or (node.target in _BINARY and len(arguments(node)) == 2)


def _waits(lowering: Any, node: fx.Node) -> bool:
    """Whether the only reader of a node computes it."""
    if len(node.users) != 1:
        return False
    (reader,) = node.users
    if reader.target is gw.reduce_sum.default:
        return weighted(node) is not None
    return reader.target is not aten.embedding.default and is_map(reader) and not lowering.lowered(reader)


def weighted(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, weights) of a product whose sum one kernel computes: weights have the shape of x, or one element a row of it."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != len(set(node.args)):
        return None
    shape = shape_of(node)
    for x, weights in (arguments(node), reversed(arguments(node))):
        if shape_of(x) == shape and shape_of(weights) in (shape, (*shape[:-1], 1)):
            return x, weights
    return None


def _apply(lowering: Any, node: fx.Node) -> Apply:
    shape, dtype = shape_of(node), DTYPES[dtype_of(node)]

    def read(operand: Any) -> Any:
        if not isinstance(operand, fx.Node):
            return float(operand)
        waiting = lowering.value(operand).expression
        if waiting is not None:
            return waiting.expression
        return Source(lowering.dense(operand), shape_of(operand), DTYPES[dtype_of(operand)])

    if node.target is aten._to_copy.default:
        return Apply("cast", (read(arguments(node)[0]),), shape, dtype)
    if node.target is aten.embedding.default:
        return Apply("gather", tuple(map(read, arguments(node)[:2])), shape, dtype)
    if node.target is aten.expand.default:
        return Apply("expand", (read(arguments(node)[0]),), shape, dtype)
    if node.target in (aten.clamp.default, aten.clamp_min.default):
        x, low, high = (*arguments(node), None)[:3]
        value = read(x)
        value = value if high is None else Apply("most", (value, float(high)), shape, dtype)
        return value if low is None else Apply("least", (value, float(low)), shape, dtype)
    operation = _UNARY.get(node.target) or _BINARY[node.target]
    return Apply(operation, tuple(map(read, arguments(node))), shape, dtype)


def _parts(expression: Any) -> int:
    return 1 + sum(map(_parts, expression.operands)) if isinstance(expression, Apply) else 1
