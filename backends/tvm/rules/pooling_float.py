"""Float pooling of spatial values where they lie, as [N, H, W, Cp]: windows by designed kernels, whole images by TVM's loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from tvm import relax

from ....ir.program import shape_of
from ..kernels import pooling_f32
from ..kernels.base import Convolution
from ..lower import Lowering, rule
from ..values import SUFFIXES, arguments, dtype_of_var, of_node
from .floating import label
from .generic import fallback, op_name

aten = torch.ops.aten


def _in_place(lowering: Lowering, node: fx.Node) -> bool:
    x = arguments(node)[0]
    return len(shape_of(x)) == 4 and lowering.is_channels(x)


def _designed(lowering: Lowering, node: fx.Node) -> bool:
    return _in_place(lowering, node) and not lowering.integer and lowering.value(arguments(node)[0]).dtype in SUFFIXES


def _pair(values: Any) -> list[int]:
    values = [int(v) for v in ([values] if isinstance(values, int) else values)]
    return values * 2 if len(values) == 1 else values


def _window(node: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Convolution:
    n, c, h, w = shape_of(arguments(node)[0])
    pairs = [tuple(_pair(v)) for v in (kernel, stride or kernel, padding, dilation)]
    return Convolution(n, c, h, w, c, *pairs, groups=c)  # type: ignore[arg-type]


def _pool(lowering: Lowering, node: fx.Node, generator: Any, shape: Convolution) -> None:
    source = lowering.channels(arguments(node)[0])
    dtype = dtype_of_var(source)
    spec = (shape, lowering.level(dtype)) if dtype == "float32" else (shape, lowering.level(dtype), dtype)
    out = lowering.kernel(generator, *spec, inputs=[source], nodes=(node,), label=label(generator.__name__, dtype))
    lowering.bind(node, of_node(node, channels=out))


@rule(aten.max_pool2d.default)
def max_pool2d(lowering: Lowering, node: fx.Node) -> None:
    _, *rest = arguments(node)
    kernel, stride, padding, dilation, ceil_mode = (*rest, *(None, [], 0, 1, False)[len(rest) :])
    if not _designed(lowering, node) or ceil_mode:
        fallback(lowering, node)
        return
    _pool(lowering, node, pooling_f32.max_pool, _window(node, kernel, stride, padding, dilation))


@rule(aten.avg_pool2d.default)
def avg_pool2d(lowering: Lowering, node: fx.Node) -> None:
    _, *rest = arguments(node)
    kernel, stride, padding, ceil_mode, include_pad, divisor = (*rest, *(None, [], 0, False, True, None)[len(rest) :])
    padded = any(_pair(padding))
    if not _designed(lowering, node) or ceil_mode or divisor is not None or (padded and not include_pad):
        fallback(lowering, node)
        return
    _pool(lowering, node, pooling_f32.mean_pool, _window(node, kernel, stride, padding, 1))


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
    pooled = lowering.builder.emit(relax.op.mean(lowering.channels(x), axis=[1, 2], keepdims=True))
    lowering.record(op_name(node), (node,), "generic", [lowering.channels(x), pooled])
    lowering.bind(node, of_node(node, channels=pooled))
