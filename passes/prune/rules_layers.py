"""How channels go through layers: convolutions, products, embeddings and normalizations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from ..fold.match import argument, aten
from .axes import FIXED, Axis, Coupling, Dims, rule, shape, where


def without_bias(dims: Sequence[Axis], bias: Any) -> Dims:
    """Dimensions that pass through a layer: a bias fills the place of what was cut, so nothing vanishes there any more."""
    return tuple(dims) if bias is None else tuple(replace(a, vanishes=False) for a in dims)


def add_bias(c: Coupling, node: fx.Node, out: Axis, bias: Any) -> Axis:
    if bias is None:
        return out
    dims = c.of(bias)
    if not dims:  # a number for all channels
        return replace(out, vanishes=False)
    own = dims[len(dims) - 1]
    joint = c.join(out, own, f"the bias of {where(node)} is fixed") if shape(bias)[-1] != 1 else out
    return replace(joint, vanishes=out.vanishes and own.vanishes)


@rule(aten.convolution.default)
def convolution(c: Coupling, node: fx.Node) -> Dims:
    x, weight, bias, _, _, _, transposed, _, groups = node.args
    inputs, weights = c.of(x), c.of(weight)
    channel = len(inputs) - len(weights) + 1  # 0 without a batch dimension
    at = where(node)
    c.pin_all(inputs[channel + 1 :], f"{at} slides a window over it")
    c.pin_all(weights[2:], f"it is the window of {at}")
    c.note_role(weight, 0, "in" if transposed else "out", node)
    c.note_role(weight, 1, "out" if transposed else "in", node)
    if groups == 1:
        source, out = (weights[0], weights[1]) if transposed else (weights[1], weights[0])
        c.contract(inputs[channel], source, at)
    else:
        out = _grouped(c, node, inputs[channel], weights)
    out = add_bias(c, node, out, bias)
    return (*without_bias(inputs[:channel], bias), out, *[FIXED] * (len(weights) - 2))


def _grouped(c: Coupling, node: fx.Node, source: Axis, weights: Dims) -> Axis:
    """Channels are (group, position) on both sides: what goes is a whole group, or one position in every group.

    So the groups that stay are of one size. Depthwise: each channel is a group.
    """
    at, x, weight = where(node), node.args[0], node.args[1]
    groups: int = node.args[8]  # type: ignore[assignment]
    channel = len(shape(x)) - len(weights) + 1
    first, second = shape(weight)[:2]
    reason = f"{at} has {groups} groups of equal size"
    group, position = c.split(weights[0], (groups, first // groups), reason)
    fed, inside = c.split(source, (groups, shape(x)[channel] // groups), reason)
    group = c.join(group, fed, reason)
    if not node.args[6]:
        c.contract(inside, weights[1], at)
        return weights[0]
    c.contract(inside, position, at)
    return c.merge((group, weights[1]), (groups, second))


@rule(aten.linear.default)
def linear(c: Coupling, node: fx.Node) -> Dims:
    x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
    inputs, weights = c.of(x), c.of(weight)
    c.note_role(weight, 0, "out", node)
    c.note_role(weight, 1, "in", node)
    c.contract(inputs[-1], weights[-1], where(node))
    if len(weights) == 1:
        return without_bias(inputs[:-1], bias)
    return (*without_bias(inputs[:-1], bias), add_bias(c, node, weights[0], bias))


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(c: Coupling, node: fx.Node) -> Dims:
    return _product(c, node, node.args[0], node.args[1])


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(c: Coupling, node: fx.Node) -> Dims:
    bias, a, b = node.args[:3]
    dims = _product(c, node, a, b)
    added = c.broadcast([dims, c.of(bias)], [shape(node), shape(bias)], len(dims), where(node))
    return tuple(replace(axis, vanishes=False) for axis in added)


def _product(c: Coupling, node: fx.Node, a: Any, b: Any) -> Dims:
    """(..., M, K) x (..., K, N); a vector has no M, or no N."""
    at = where(node)
    left, right = c.of(a), c.of(b)
    c.note_role(a, -1, "in", node)
    c.note_role(b, -2 if len(right) > 1 else -1, "in", node)
    if len(left) > 1:
        c.note_role(a, -2, "out", node)
    if len(right) > 1:
        c.note_role(b, -1, "out", node)
    inner, columns = (right[-2], right[-1:]) if len(right) > 1 else (right[len(right) - 1], ())
    c.contract(left[len(left) - 1], inner, at)
    rows = left[-2:-1]
    rank = max(len(left), len(right)) - 2
    batch = []
    shapes = (shape(a)[:-2], shape(b)[:-2])
    joint = c.broadcast([left[:-2], right[:-2]], shapes, max(rank, 0), f"{at} multiplies it with a fixed dimension")
    for k, axis in enumerate(joint):
        # A product of a zero matrix is zero, whatever the other.
        at_k = [dims[k - rank] for dims in (left[:-2], right[:-2]) if len(dims) >= rank - k]
        batch.append(replace(axis, vanishes=any(o.vanishes for o in at_k)))
    return (*batch, *rows, *columns)


@rule(aten.embedding.default)
def embedding(c: Coupling, node: fx.Node) -> Dims:
    rows, features = c.of(node.args[0])
    c.note_role(node.args[0], 1, "out", node)
    c.pin(rows, f"{where(node)} looks rows up by number")
    return (*(replace(a, vanishes=False) for a in c.of(node.args[1])), features)


def _normalized(c: Coupling, node: fx.Node, axes: Sequence[Axis]) -> None:
    c.pin_all(axes, f"{where(node)} normalizes over it: without some, the statistics of the rest change")


@rule(aten.layer_norm.default)
def layer_norm(c: Coupling, node: fx.Node) -> Dims:
    x, normalized = node.args[:2]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    dims = c.of(x)
    first = len(dims) - len(normalized)  # type: ignore[arg-type]
    last = dims[first:]
    for parameter in (weight, bias):
        if parameter is not None:
            last = [c.join(a, b, f"{where(node)} scales it by fixed numbers") for a, b in zip(last, c.of(parameter), strict=True)]
    _normalized(c, node, last)
    return (*without_bias(dims[:first], bias), *without_bias(last, bias))


@rule(aten.native_group_norm.default)
def group_norm(c: Coupling, node: fx.Node) -> list[Dims]:
    """Whole norm groups can go."""
    x, weight, bias, _, channels, _, groups = node.args[:7]
    dims = c.of(x)
    _normalized(c, node, dims[2:])
    group = FIXED
    if groups == 1:
        _normalized(c, node, dims[1:2])
    else:
        group, inside = c.split(dims[1], (groups, channels // groups), f"{where(node)} has {groups} groups")  # type: ignore[operator]
        _normalized(c, node, [inside])
    out = _scaled(c, node, dims[1], weight, bias)
    return [(*without_bias(dims[:1], bias), out, *[FIXED] * (len(dims) - 2)), (dims[0], group), (dims[0], group)]


@rule(aten._native_batch_norm_legit.no_stats)
def instance_norm(c: Coupling, node: fx.Node) -> list[Dims]:
    """Each channel has its own statistics."""
    x, weight, bias = node.args[:3]
    dims = c.of(x)
    _normalized(c, node, (*dims[:1], *dims[2:]))
    out = _scaled(c, node, dims[1], weight, bias)
    return [(FIXED, out, *[FIXED] * (len(dims) - 2)), (dims[1],), (dims[1],)]


def _scaled(c: Coupling, node: fx.Node, axis: Axis, weight: Any, bias: Any) -> Axis:
    """A normalized value times a weight plus a bias a channel: zero where both are, or where it was zero and there is no bias."""
    vanishes = axis.vanishes or weight is not None
    if weight is not None:
        axis = c.join(axis, c.of(weight)[0], f"{where(node)} scales it by fixed numbers")
    return add_bias(c, node, replace(axis, vanishes=vanishes), bias)
