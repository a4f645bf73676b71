"""Pooling and sums of the integer stage, with the rescale that follows fused."""

from __future__ import annotations

from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..kernels import pooling_int8 as kernels
from ..kernels.base import padded
from ..lower import Lowering, rule
from ..values import arguments, of_node
from .tails import find


def _pair(values, default=(1, 1)) -> tuple[int, int]:
    values = tuple(int(v) for v in values) or default
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def _pool(node: fx.Node, kernel, stride, padding, dilation) -> kernels.Pool:
    n, c, h, w = shape_of(arguments(node)[0])
    kernel = _pair(kernel)
    out_height, out_width = shape_of(node)[2:]
    # An empty stride means the kernel's size, as in torch.
    return kernels.Pool(n, c, h, w, kernel, _pair(stride, kernel), _pair(padding, (0, 0)), _pair(dilation), out_height, out_width)


@rule(gw.max_pool2d.default)
def max_pool2d(lowering: Lowering, node: fx.Node) -> None:
    x, kernel, stride, padding, dilation, _ = arguments(node)
    pool = _pool(node, kernel, stride, padding, dilation)
    out = lowering.kernel(
        kernels.max_pool2d,
        pool,
        lowering.value(x).dtype,
        inputs=[lowering.channels(x)],
        nodes=(node,),
    )
    lowering.bind(node, of_node(node, channels=out))


@rule(gw.sum_pool2d.default)
def sum_pool2d(lowering: Lowering, node: fx.Node) -> None:
    _, kernel, stride, padding, zero_point = arguments(node)
    _sum_windows(lowering, node, _pool(node, kernel, stride, padding, (1, 1)), zero_point)


def _sum_windows(lowering: Lowering, node: fx.Node, pool: kernels.Pool, zero_point, rank: int = 4) -> None:
    x = arguments(node)[0]
    finish = find(lowering, node, axis=1)
    spec = (pool, lowering.value(x).dtype, zero_point, finish.tail)
    inputs = [lowering.channels(x), *finish.vectors(padded(pool.channels))]
    out = lowering.kernel(kernels.sum_pool2d, *spec, inputs=inputs, nodes=finish.nodes)
    if rank == 4:
        lowering.bind_all(finish.nodes, of_node(finish.node, channels=out))
    else:
        rows = lowering.rows_without_lanes(out, pool.batch, pool.channels, finish.node)
        lowering.bind_all(finish.nodes, of_node(finish.node, dense=rows))


@rule(gw.sum.default)
def sum_dims(lowering: Lowering, node: fx.Node) -> None:
    """A global sum of a spatial tensor is one window over it; any other sum is a dense reduction."""
    x, dims, keepdim, zero_point = arguments(node)
    shape = shape_of(x)
    axes = tuple(sorted(int(d) % len(shape) for d in dims)) or tuple(range(len(shape)))
    if axes == (2, 3) and len(shape) == 4:
        n, c, h, w = shape
        pool = kernels.Pool(n, c, h, w, (h, w), (1, 1), (0, 0), (1, 1), 1, 1)
        _sum_windows(lowering, node, pool, zero_point, rank=4 if keepdim else 2)
        return
    if len(shape) == 3 and axes == (1,) and shape[2] % padded(1) == 0:
        # Rows of channels, as a pooled transformer has them: the same memory as [N, T, 1, C].
        _sum_rows(lowering, node, shape, keepdim, zero_point)
        return
    kept = [d for d in range(len(shape)) if d not in axes]
    axis = kept[-1] if kept else 0
    out_axis = axis if keepdim else max(len(kept) - 1, 0)
    finish = find(lowering, node, axis=out_axis)
    lanes = 1 if axis in axes else shape[axis]
    spec = (shape, axes, lowering.value(x).dtype, zero_point, axis, finish.tail)
    inputs = [lowering.dense(x), *finish.vectors(lanes)]
    out = lowering.kernel(kernels.dense_sum, *spec, inputs=inputs, nodes=finish.nodes)
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))


def _sum_rows(lowering: Lowering, node: fx.Node, shape, keepdim, zero_point) -> None:
    n, rows, channels = shape
    x = arguments(node)[0]
    finish = find(lowering, node, axis=2 if keepdim else 1)
    pool = kernels.Pool(n, channels, rows, 1, (rows, 1), (1, 1), (0, 0), (1, 1), 1, 1)
    spec = (pool, lowering.value(x).dtype, zero_point, finish.tail)
    inputs = [lowering.dense(x), *finish.vectors(channels)]
    out = lowering.kernel(kernels.sum_pool2d, *spec, inputs=inputs, nodes=finish.nodes)
    lowering.bind_all(finish.nodes, of_node(finish.node, dense=out))
