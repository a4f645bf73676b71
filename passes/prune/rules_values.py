"""How channels go through element-wise operators, reductions, pooling and everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ..fold.match import argument, aten
from .axes import FIXED, RULES, Coupling, Dims, rule, shape, where

#: Element-wise operators that do not carry torch's own tag `pointwise`. What has neither is never taken for one.
POINTWISE = frozenset({aten.hardswish.default, aten._to_copy.default, aten.alias.default, aten.detach.default})

#: Values for the operands that do not vanish, when we ask whether the result does.
PROBES = (-2.75, -0.5, 0.3, 1.0, 3.5)


def is_pointwise(node: fx.Node) -> bool:
    tagged = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return (tagged or node.target in POINTWISE) and isinstance(node.meta["val"], torch.Tensor)


def transfer(c: Coupling, node: fx.Node) -> Any:
    """The axes of a call's value: by its rule, as an element-wise operator, or as something unknown."""
    known: Callable[[Coupling, fx.Node], Any] | None = RULES.get(node.target)
    if known is not None:
        return known(c, node)
    return pointwise(c, node) if is_pointwise(node) else unknown(c, node)


def unknown(c: Coupling, node: fx.Node) -> Any:
    """Nothing that reaches an operator without a rule can be cut."""
    for source in node.all_input_nodes:
        for dims in c.axes[source] if isinstance(c.axes[source], list) else [c.axes[source]]:
            c.pin_all(dims, f"{where(node)} is an operator that the coupling analysis does not know")
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [_all_fixed(v) for v in value]
    return _all_fixed(value)


def _all_fixed(value: Any) -> Dims:
    return (FIXED,) * value.dim() if isinstance(value, torch.Tensor) else ()


def pointwise(c: Coupling, node: fx.Node) -> Dims:
    operands = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    rank, shapes = len(shape(node)), [shape(n) for n in operands]
    joint = c.broadcast([c.of(n) for n in operands], shapes, rank, f"{where(node)} joins it with a fixed dimension")
    verdicts: dict[tuple[bool, ...], bool] = {}
    result = []
    for k, axis in enumerate(joint):
        zero = tuple(_vanishes(c.of(n), s, k - rank) for n, s in zip(operands, shapes, strict=True))
        if axis.labels is not None and zero not in verdicts:
            verdicts[zero] = gives_zero(node, dict(zip(operands, zero, strict=True)))
        result.append(axis if axis.labels is None else replace(axis, vanishes=verdicts[zero]))
    return tuple(result)


def _vanishes(dims: Dims, sizes: Sequence[Any], k: int) -> bool:
    """Whether an operand has the dimension (counted from the back) and is zero where its channels were zeroed."""
    return -k <= len(dims) and sizes[k] != 1 and dims[k].vanishes


def gives_zero(node: fx.Node, zero: dict[fx.Node, bool]) -> bool:
    """Whether an element-wise operator gives 0 where these operands are 0, whatever the others: asked of the operator itself."""

    def probe(operand: fx.Node) -> Any:
        value = operand.meta["val"]
        if not isinstance(value, torch.Tensor):
            return 1
        numbers = torch.zeros(len(PROBES)) if zero[operand] else torch.tensor(PROBES)
        return numbers.to(value.dtype)

    args, kwargs = fx.map_arg((node.args, node.kwargs), probe)  # type: ignore[misc]
    return bool((node.target(*args, **kwargs) == 0).all())  # type: ignore[operator]


@rule(aten.prelu.default)
def prelu(c: Coupling, node: fx.Node) -> Dims:
    dims, slopes = c.of(node.args[0]), c.of(node.args[1])
    if shape(node.args[1])[0] == 1 or len(dims) < 2:
        return dims
    return (dims[0], c.join(dims[1], slopes[0], f"{where(node)} scales it by fixed numbers"), *dims[2:])


@rule(aten.clone.default, aten.contiguous.default, aten.dropout.default)
def same(c: Coupling, node: fx.Node) -> Dims:
    return c.of(node.args[0])


@rule(aten.sym_size.int)
def size_of(c: Coupling, node: fx.Node) -> Dims:
    c.pin(c.of(node.args[0])[node.args[1]], f"{where(node)} reads its size")  # type: ignore[index]
    return ()


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(c: Coupling, node: fx.Node) -> Dims:
    dims, dim = c.of(node.args[0]), node.args[1]
    c.pin(dims[dim], f"{where(node)} normalizes over it: without some, the rest change")  # type: ignore[index]
    return tuple(replace(a, vanishes=False) for a in dims)


@rule(aten.cumsum.default)
def cumsum(c: Coupling, node: fx.Node) -> Dims:
    dims, dim = c.of(node.args[0]), node.args[1]
    c.pin(dims[dim], f"{where(node)} adds it up in order")  # type: ignore[index]
    return dims


# -- reductions --------------------------------------------------------------------------------------------------------------

#: Reductions that zeros do not change, so that channels which vanish may leave. A norm is one where its order is above 0.
SUMS = (aten.sum.dim_IntList, aten.sum.default, aten.any.dim, aten.linalg_vector_norm.default)

REDUCTIONS = (
    *SUMS,
    aten.mean.dim,
    aten.mean.default,
    aten.amax.default,
    aten.amin.default,
    aten.var.correction,
    aten.std.correction,
    aten.prod.dim_int,
    aten.argmax.default,
    aten.argmin.default,
)


@rule(*REDUCTIONS)
def reduction(c: Coupling, node: fx.Node) -> Dims:
    dims, at = c.of(node.args[0]), where(node)
    given = _named(node, "dim")
    over = {d % len(dims) for d in ([given] if isinstance(given, int) else given or range(len(dims)))}
    keep = bool(_named(node, "keepdim"))
    order = argument(node, 1, "ord", 2) if node.target is aten.linalg_vector_norm.default else 1
    adds = node.target in SUMS and 0 < order < math.inf
    result = []
    for k, axis in enumerate(dims):
        if k in over:
            if not adds:
                c.pin(axis, f"{at} is over it: without some, the result changes")
            elif not axis.vanishes:
                c.pin(axis, f"{at} sums over channels that are not zero when their weights are")
            result += [FIXED] if keep else []
        else:
            result.append(axis)
    zero = _zero_of_zeros(node) if any(a.vanishes for a in result) else False
    return tuple(replace(a, vanishes=a.vanishes and zero) for a in result)


def _named(node: fx.Node, name: str) -> Any:
    """An argument by the name that the operator's schema gives it; None where it has no such argument or leaves it out."""
    for k, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            return argument(node, k, name, None)
    return None


def _zero_of_zeros(node: fx.Node) -> bool:
    x: Any = node.args[0]
    zeros = torch.zeros([2] * x.meta["val"].dim(), dtype=x.meta["val"].dtype)
    return bool((node.target(zeros, *node.args[1:], **node.kwargs) == 0).all())  # type: ignore[operator]


# -- windows over positions --------------------------------------------------------------------------------------------------


def _positional(names: dict[int, str]) -> list[Any]:
    """The overloads of operators that this build of torch has, by number of trailing dimensions they work on."""
    found = []
    for rank, text in names.items():
        for name in text.split():
            packet = getattr(aten, name, None)
            overloads = [] if packet is None else [getattr(packet, o) for o in ("default", "vec") if o in packet.overloads()]
            for overload in overloads:
                POSITIONS[overload] = rank
            found += overloads
    return found


#: Operator -> how many trailing dimensions are positions.
POSITIONS: dict[Any, int] = {}

WINDOWS = _positional(
    {
        1: "avg_pool1d max_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d",
        2: "avg_pool2d max_pool2d max_pool2d_with_indices adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d upsample_bicubic2d reflection_pad2d replication_pad2d",
        3: "avg_pool3d max_pool3d max_pool3d_with_indices adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
        "upsample_nearest3d upsample_trilinear3d reflection_pad3d replication_pad3d",
    }
)


@rule(*WINDOWS)
def window(c: Coupling, node: fx.Node) -> Any:
    dims, rank = c.of(node.args[0]), POSITIONS[node.target]
    c.pin_all(dims[-rank:], f"{where(node)} works across it")
    result: Dims = (*dims[:-rank], *[FIXED] * rank)
    return [result] * len(node.meta["val"]) if isinstance(node.meta["val"], (tuple, list)) else result
