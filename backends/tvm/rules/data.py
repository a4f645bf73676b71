"""Data movement: views cost nothing, a layout that already has the wanted order is only renamed, the rest is one copy."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from ....ir.program import shape_of
from ..kernels import layout
from ..kernels.base import LANES
from ..lower import Lowering, rule
from ..values import DTYPES, Frame, Value, arguments, of_node
from . import maps
from .generic import fallback

aten = torch.ops.aten


@rule(operator.getitem)
def getitem(lowering: Lowering, node: fx.Node) -> None:
    source, index = arguments(node)
    lowering.bind(node, lowering.values(source)[int(index)])


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def view(lowering: Lowering, node: fx.Node) -> None:
    """The same elements in the same order. A Channels value stays one where batch and channels stay in place, and so does what
    was moved and not copied where only axes of size 1 come or go."""
    x = arguments(node)[0]
    value = lowering.settled(x)
    shape = shape_of(node)
    if value.moved is not None and value.dense is None:
        source, strided = value.moved
        reshaped = strided.reshape(shape)
        if reshaped is not None:
            lowering.bind_moved(node, source, reshaped)
            return
    if value.channels is not None and value.dense is None and len(shape) >= 3 and shape[:2] == value.shape[:2]:
        lowering.bind(node, of_node(node, channels=value.channels))
    else:
        lowering.bind(node, of_node(node, dense=lowering.dense(x)))


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def squeeze(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = arguments(node)[0]
    if lowering.value(x).moved is None:
        view(lowering, node)
        return
    shape = shape_of(x)
    named = arguments(node)[1] if len(arguments(node)) > 1 else range(len(shape))
    dims = [int(d) % len(shape) for d in ([named] if isinstance(named, int) else named)]
    source, strided = lowering.strided(x)
    lowering.bind_moved(node, source, strided.squeeze([d for d in dims if shape[d] == 1]))


@rule(aten.unsqueeze.default)
def unsqueeze(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = arguments(node)[0]
    if lowering.value(x).moved is None:
        view(lowering, node)
        return
    source, strided = lowering.strided(x)
    lowering.bind_moved(node, source, strided.unsqueeze(int(arguments(node)[1]) % len(shape_of(node))))


@rule(aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.dropout.default)
def same(lowering: Lowering, node: fx.Node) -> None:
    value = lowering.value(arguments(node)[0])
    places = {"dense": value.dense, "channels": value.channels, "moved": value.moved, "pending": value.pending}
    places["normalization"] = value.normalization
    lowering.bind(node, of_node(node, **places))


@rule(aten.permute.default)
def permute(lowering: Lowering, node: fx.Node) -> None:
    rank = len(shape_of(node))
    _permute(lowering, node, tuple(int(d) % rank for d in arguments(node)[1]))


@rule(aten.transpose.int)
def transpose(lowering: Lowering, node: fx.Node) -> None:
    rank = len(shape_of(node))
    first, second = (int(d) % rank for d in arguments(node)[1:3])
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    _permute(lowering, node, tuple(order))


def _permute(lowering: Lowering, node: fx.Node, order: tuple[int, ...]) -> None:
    x: fx.Node = arguments(node)[0]
    value = lowering.settled(x)
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


def _slice_arguments(dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    """The arguments of `aten.slice.Tensor` after the tensor, with the op's defaults."""
    return dim, start, stop, step


@rule(aten.slice.Tensor)
def slice_axis(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = arguments(node)[0]
    dim, start, stop, step = _slice_arguments(*arguments(node)[1:])
    shape = shape_of(x)
    dim = int(dim) % len(shape)
    begin, _, step = slice(start, stop, step).indices(shape[dim])
    length = shape_of(node)[dim]
    lowering.bind(node, _slice(lowering, node, x, dim, begin, length, step))


def _slice(lowering: Lowering, node: fx.Node, x: fx.Node, dim: int, begin: int, length: int, step: int = 1) -> Value:
    """`length` elements from `begin` along one axis; channels of a Channels value stay in that layout."""
    value, shape = lowering.settled(x), shape_of(x)
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
    x: fx.Node = arguments(node)[0]
    given: Any = arguments(node)[2] if len(arguments(node)) > 2 else node.kwargs.get("dim", 0)
    dim = int(given) % len(shape_of(x))
    sizes = [part.shape[dim] for part in node.meta["val"]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    lowering.bind(node, [_slice(lowering, node, x, dim, at, size) for at, size in zip(starts, sizes, strict=True)])


@rule(aten.unbind.int)
def unbind(lowering: Lowering, node: fx.Node) -> None:
    x: fx.Node = arguments(node)[0]
    dim = (int(arguments(node)[1]) if len(arguments(node)) > 1 else 0) % len(shape_of(x))
    source, strided = lowering.strided(x)
    count = shape_of(x)[dim]
    lowering.bind(node, [lowering.moved_value(source, strided.select(dim, i)) for i in range(count)])


@rule(aten.select.int)
def select(lowering: Lowering, node: fx.Node) -> None:
    x, dim, index = arguments(node)
    shape = shape_of(x)
    dim = int(dim) % len(shape)
    source, strided = lowering.strided(x)
    lowering.bind_moved(node, source, strided.select(dim, int(index) % shape[dim]))


@rule(aten.expand.default)
def expand(lowering: Lowering, node: fx.Node) -> None:
    if maps.take(lowering, node):
        return
    source, strided = lowering.strided(arguments(node)[0])
    lowering.bind_moved(node, source, strided.expand(shape_of(node)))


@rule(aten.cat.default)
def concatenate(lowering: Lowering, node: fx.Node) -> None:
    inputs = list(arguments(node)[0])
    rank = len(shape_of(node))
    dim = (int(arguments(node)[1]) if len(arguments(node)) > 1 else 0) % rank
    if rank != 4 or dim != 1 or not any(lowering.is_channels(x) for x in inputs):
        fallback(lowering, node)
        return
    n, _, h, w = shape_of(node)
    channels = tuple(shape_of(x)[1] for x in inputs)
    parts = [lowering.channels(x) for x in inputs]
    dtype = DTYPES[node.meta["val"].dtype]
    out = lowering.kernel(layout.concatenate_channels, n * h * w, channels, dtype, inputs=parts, nodes=(node,))
    lowering.bind(node, of_node(node, channels=out))


@rule(aten.constant_pad_nd.default)
def constant_pad(lowering: Lowering, node: fx.Node) -> None:
    x, widths, *rest = arguments(node)
    _pad(lowering, node, x, widths, rest[0] if rest else 0)


@rule(aten.pad.default)
def pad(lowering: Lowering, node: fx.Node) -> None:
    """Other modes than constant go to the generic lowering."""
    x, widths, *rest = arguments(node)
    if not rest or rest[0] == "constant":
        _pad(lowering, node, x, widths, (rest[1] if len(rest) > 1 else None) or 0)
    else:
        fallback(lowering, node)


def _pad(lowering: Lowering, node: fx.Node, x: fx.Node, widths: Sequence[int], fill: float) -> None:
    dtype = DTYPES[node.meta["val"].dtype]
    framed = len(shape_of(x)) == 4 and len(widths) in (2, 4) and min(widths) >= 0
    spatial = lowering.is_channels(x) or dtype in ("int8", "uint8")
    if not framed or not (spatial or all(user.target is aten.convolution.default for user in node.users)):
        fallback(lowering, node)
        return
    left, right, top, bottom = (*(int(v) for v in widths), 0, 0)[:4]
    fill = float(fill) if "float" in dtype else int(fill)
    lowering.bind(node, of_node(node, pending=Frame(x, (top, left), (bottom, right), fill)))
