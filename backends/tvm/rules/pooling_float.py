"""Float pooling of spatial values where they lie, as [N, H, W, Cp]: TVM's own loops, without a change of layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from tvm import relax

from ....ir.program import shape_of
from ..lower import Lowering, rule
from ..values import Expr, arguments, of_node
from .generic import fallback, op_name

aten = torch.ops.aten
nn: Any = relax.op.nn


def _in_place(lowering: Lowering, node: fx.Node) -> bool:
    x = arguments(node)[0]
    return len(shape_of(x)) == 4 and lowering.is_channels(x)


def _bind_pool(lowering: Lowering, node: fx.Node, pooled: Expr) -> None:
    out = lowering.builder.emit(pooled)
    lowering.record(op_name(node), (node,), "generic", [lowering.channels(arguments(node)[0]), out])
    lowering.bind(node, of_node(node, channels=out))


def _pair(values: Any) -> list[int]:
    values = [int(v) for v in ([values] if isinstance(values, int) else values)]
    return values * 2 if len(values) == 1 else values


@rule(aten.max_pool2d.default)
def max_pool2d(lowering: Lowering, node: fx.Node) -> None:
    if not _in_place(lowering, node):
        fallback(lowering, node)
        return
    x, *rest = arguments(node)
    kernel, stride, padding, dilation, ceil_mode = (*rest, *(None, [], 0, 1, False)[len(rest) :])
    window = {"strides": _pair(stride or kernel), "padding": _pair(padding), "dilation": _pair(dilation)}
    _bind_pool(lowering, node, nn.max_pool2d(lowering.channels(x), _pair(kernel), **window, ceil_mode=ceil_mode, layout="NHWC"))


@rule(aten.avg_pool2d.default)
def avg_pool2d(lowering: Lowering, node: fx.Node) -> None:
    x, *rest = arguments(node)
    kernel, stride, padding, ceil_mode, include_pad, divisor = (*rest, *(None, [], 0, False, True, None)[len(rest) :])
    if not _in_place(lowering, node) or ceil_mode or divisor is not None:
        fallback(lowering, node)
        return
    window = {"strides": _pair(stride or kernel), "padding": _pair(padding), "count_include_pad": include_pad}
    _bind_pool(lowering, node, nn.avg_pool2d(lowering.channels(x), _pair(kernel), **window, layout="NHWC"))


@rule(aten.mean.dim)
def mean(lowering: Lowering, node: fx.Node) -> None:
    """The mean over both spatial axes keeps channels in lanes; any other mean is generic."""
    x, dims, *rest = arguments(node)
    spatial = dims is not None and sorted(int(d) % len(shape_of(x)) for d in dims) == [2, 3]
    if not spatial or not _in_place(lowering, node) or node.kwargs:
        fallback(lowering, node)
        return
    n, c = shape_of(x)[:2]
    source = lowering.channels(x)
    rows = lowering.builder.emit(relax.op.mean(source, axis=[1, 2]))
    lowering.record(op_name(node), (node,), "generic", [source, rows])
    if rest and rest[0]:
        lowering.bind(node, of_node(node, channels=rows))
    else:
        lowering.bind(node, of_node(node, dense=lowering.rows_without_lanes(rows, n, c, node)))


@rule(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(lowering: Lowering, node: fx.Node) -> None:
    x, size = arguments(node)
    if _pair(size) != [1, 1] or not _in_place(lowering, node):
        fallback(lowering, node)
        return
    _bind_pool(lowering, node, relax.op.mean(lowering.channels(x), axis=[1, 2], keepdims=True))
