"""Data movement: views cost nothing, a layout that already has the wanted order is only renamed, the rest is one copy."""

from __future__ import annotations

import operator
from math import prod

import torch
from torch import fx

from ....ir.program import shape_of
from ..kernels import layout
from ..kernels.base import LANES, padded
from ..lower import Lowering, rule
from ..values import DTYPES, Value, of_node
from .generic import fallback

aten = torch.ops.aten


@rule(operator.getitem)
def getitem(lowering: Lowering, node: fx.Node) -> None:
    source, index = node.args
    lowering.bind(node, lowering.values(source)[int(index)])  # type: ignore[arg-type,call-overload]


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def view(lowering: Lowering, node: fx.Node) -> None:
    """The same elements in the same order. A Channels value stays one where batch and channels stay in place."""
    x = node.args[0]
    value = lowering.value(x)  # type: ignore[arg-type]
    shape = shape_of(node)
    if value.channels is not None and value.dense is None and len(shape) >= 3 and shape[:2] == value.shape[:2]:
        lowering.bind(node, of_node(node, channels=value.channels))
    else:
        lowering.bind(node, of_node(node, dense=lowering.dense(x)))  # type: ignore[arg-type]


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if lowering.value(x).moved is None:
        view(lowering, node)
        return
    shape = shape_of(x)
    named = node.args[1] if len(node.args) > 1 else range(len(shape))
    dims = [int(d) % len(shape) for d in ([named] if isinstance(named, int) else named)]  # type: ignore[union-attr]
    source, strided = lowering.strided(x)
    lowering.bind_moved(node, source, strided.squeeze([d for d in dims if shape[d] == 1]))


@rule(aten.unsqueeze.default)
def unsqueeze(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if lowering.value(x).moved is None:
        view(lowering, node)
        return
    source, strided = lowering.strided(x)
    lowering.bind_moved(node, source, strided.unsqueeze(int(node.args[1]) % len(shape_of(node))))  # type: ignore[call-overload]


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.dropout.default)
def same(lowering: Lowering, node: fx.Node) -> None:
    value = lowering.value(node.args[0])  # type: ignore[arg-type]
    lowering.bind(node, of_node(node, dense=value.dense, channels=value.channels, moved=value.moved))


@rule(aten.permute.default)
def permute(lowering: Lowering, node: fx.Node) -> None:
    rank = len(shape_of(node))
    _permute(lowering, node, tuple(int(d) % rank for d in node.args[1]))  # type: ignore[union-attr]


@rule(aten.transpose.int)
def transpose(lowering: Lowering, node: fx.Node) -> None:
    rank = len(shape_of(node))
    first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload]
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    _permute(lowering, node, tuple(order))


def _permute(lowering: Lowering, node: fx.Node, order: tuple[int, ...]) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    value = lowering.value(x)
    rank = len(order)
    spatial = value.channels is not None and value.dense is None
    if spatial and rank >= 3 and order == (0, *range(2, rank), 1):
        # [N, C, spatial] -> [N, spatial, C]: the order a Channels value is stored in.
        pixels = value.shape[0] * prod(value.shape[2:])
        rows = lowering.rows_without_lanes(value.channels, pixels, value.shape[1], node)
        lowering.bind(node, of_node(node, dense=rows))
        return
    source, strided = lowering.strided(x)
    moved = lowering.moved_value(source, strided.permute(order))
    if value.dense is not None and rank >= 3 and order == (0, rank - 1, *range(1, rank - 1)) and _whole(value, x):
        moved.channels = value.dense
    lowering.bind(node, moved)


def _whole(value: Value, x: fx.Node) -> bool:
    """Whether the last axis fills whole vectors, so that dense rows are a Channels value as they stand."""
    return value.shape[-1] % LANES == 0 and x.op != "get_attr"


@rule(aten.slice.Tensor)
def slice_axis(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    dim, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    shape = shape_of(x)
    dim = int(dim) % len(shape)  # type: ignore[call-overload]
    begin, _, step = slice(start, stop, step).indices(shape[dim])
    length = shape_of(node)[dim]
    lowering.bind(node, _slice(lowering, node, x, dim, begin, length, step))


def _slice(lowering: Lowering, node: fx.Node, x: fx.Node, dim: int, begin: int, length: int, step: int = 1) -> Value:
    """`length` elements from `begin` along one axis; channels of a Channels value stay in that layout."""
    value, shape = lowering.value(x), shape_of(x)
    if length == shape[dim]:
        return value
    if dim == 1 and step == 1 and len(shape) == 4 and value.channels is not None and value.dense is None:
        n, c, h, w = shape
        spec = (n * h * w, c, begin, begin + length, value.dtype)
        out = lowering.kernel(layout.slice_channels, *spec, inputs=[lowering.channels(x)], nodes=(node,))
        return Value((n, length, h, w), value.dtype, channels=out)
    source, strided = lowering.strided(x)
    return lowering.moved_value(source, strided.slice(dim, begin, step, length))


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def split(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    dim = int(node.args[2]) if len(node.args) > 2 else int(node.kwargs.get("dim", 0))  # type: ignore[call-overload]
    dim %= len(shape_of(x))
    sizes = [part.shape[dim] for part in node.meta["val"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    lowering.bind(node, [_slice(lowering, node, x, dim, at, size) for at, size in zip(starts, sizes, strict=True)])


@rule(aten.unbind.int)
def unbind(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % len(shape_of(x))  # type: ignore[call-overload]
    source, strided = lowering.strided(x)
    count = shape_of(x)[dim]
    lowering.bind(node, [lowering.moved_value(source, strided.select(dim, i)) for i in range(count)])


@rule(aten.select.int)
def select(lowering: Lowering, node: fx.Node) -> None:
    x, dim, index = node.args
    shape = shape_of(x)  # type: ignore[arg-type]
    dim = int(dim) % len(shape)  # type: ignore[call-overload]
    source, strided = lowering.strided(x)  # type: ignore[arg-type]
    lowering.bind_moved(node, source, strided.select(dim, int(index) % shape[dim]))  # type: ignore[call-overload]


@rule(aten.expand.default)
def expand(lowering: Lowering, node: fx.Node) -> None:
    source, strided = lowering.strided(node.args[0])  # type: ignore[arg-type]
    lowering.bind_moved(node, source, strided.expand(shape_of(node)))


@rule(aten.cat.default)
def concatenate(lowering: Lowering, node: fx.Node) -> None:
    inputs = list(node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(node))
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % rank  # type: ignore[call-overload]
    if rank != 4 or dim != 1 or not any(lowering.is_channels(x) for x in inputs):  # type: ignore[arg-type]
        fallback(lowering, node)
        return
    n, _, h, w = shape_of(node)
    channels = tuple(shape_of(x)[1] for x in inputs)  # type: ignore[arg-type]
    parts = [lowering.channels(x) for x in inputs]  # type: ignore[arg-type]
    dtype = DTYPES[node.meta["val"].dtype]
    out = lowering.kernel(layout.concatenate_channels, n * h * w, channels, dtype, inputs=parts, nodes=(node,))
    lowering.bind(node, of_node(node, channels=out))


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(lowering: Lowering, node: fx.Node) -> None:
    """Frames of a spatial tensor; `aten.pad` with another mode than constant goes to the generic lowering."""
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    widths = [int(v) for v in node.args[1]]  # type: ignore[union-attr]
    constant = node.target is aten.constant_pad_nd.default or (node.args[2] if len(node.args) > 2 else "constant") == "constant"
    position = 2 if node.target is aten.constant_pad_nd.default else 3
    fill = node.args[position] if len(node.args) > position else 0
    spatial = len(shape_of(x)) == 4 and len(widths) in (2, 4) and min(widths) >= 0
    wanted = lowering.is_channels(x) or DTYPES[x.meta["val"].dtype] in ("int8", "uint8")
    if not (constant and spatial and wanted):
        fallback(lowering, node)
        return
    left, right, top, bottom = (*widths, 0, 0)[:4]
    n, c, h, w = shape_of(x)
    dtype = DTYPES[node.meta["val"].dtype]
    shape = (n, h, w, padded(c))
    value = float(fill or 0) if dtype == "float32" else int(fill or 0)  # type: ignore[arg-type]
    out = lowering.kernel(
        layout.pad_channels, shape, (top, left), (bottom, right), value, dtype, inputs=[lowering.channels(x)], nodes=(node,)
    )
    lowering.bind(node, of_node(node, channels=out))
