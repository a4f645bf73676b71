"""How channels go through operators that move, take, put together and reshape."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import sympy
import torch
from torch import fx

from ...ir.program import single_user
from ..fold.match import argument, aten, is_call, same_dim
from .atoms import KEPT
from .axes import FIXED, Axis, Coupling, Dims, is_static, rule, shape, where


@rule(aten.permute.default)
def permute(c: Coupling, node: fx.Node) -> Dims:
    dims = c.of(node.args[0])
    return tuple(dims[d] for d in node.args[1])  # type: ignore[union-attr]


@rule(aten.transpose.int)
def transpose(c: Coupling, node: fx.Node) -> Dims:
    dims = list(c.of(node.args[0]))
    first, second = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


@rule(aten.t.default)
def t(c: Coupling, node: fx.Node) -> Dims:
    return tuple(reversed(c.of(node.args[0])))


#: Reshapes that spell sizes out.
SIZED = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


@rule(
    *SIZED,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def reshape(c: Coupling, node: fx.Node) -> Dims:
    shuffle = shuffle_at(node)
    if shuffle is not None:
        axis = c.of(shuffle.x)[shuffle.dim]
        return replaced(c.of(shuffle.x), shuffle.dim, c.take(axis, shuffle.order(), where(node)))
    if opens_shuffle(node):
        return (FIXED,) * len(shape(node))  # what is inside has no other reader, and is written anew with the end
    return regroup(c, c.of(node.args[0]), shape(node.args[0]), shape(node), where(node))


@dataclass(frozen=True)
class Shuffle:
    """A reshape, a transposition and a reshape back that together only change the order of channels.

        reshape(transpose(reshape(%x, [N, a, b, ...]), 1, 2), [N, a b, ...])

    As one operator it ties nothing together; as three, it would keep the channels in rows and columns.
    """

    x: fx.Node
    opens: fx.Node
    moves: fx.Node
    dim: int
    rows: int
    columns: int

    def order(self) -> np.ndarray:
        """The channels of `x` in the order of the result."""
        return np.arange(self.rows * self.columns).reshape(self.rows, self.columns).T.reshape(-1)


def shuffle_at(node: fx.Node) -> Shuffle | None:
    """The shuffle that ends in a reshape."""
    moves = node.args[0] if is_call(node, *SIZED) else None
    if not is_call(moves, aten.permute.default, aten.transpose.int) or single_user(moves) is not node:
        return None
    opens = moves.args[0]
    if not is_call(opens, *SIZED) or single_user(opens) is not moves:
        return None
    x: fx.Node = opens.args[0]  # type: ignore[assignment]
    old, apart = shape(x), shape(opens)
    if len(apart) != len(old) + 1 or not same_sizes(old, shape(node)):
        return None
    order = list(range(len(apart)))
    if moves.target is aten.transpose.int:
        a, b = (int(d) % len(order) for d in moves.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [d % len(order) for d in moves.args[1]]  # type: ignore[union-attr, operator]
    dim = next((k for k, d in enumerate(order) if k != d), len(old))
    if dim >= len(old) or order != [*range(dim), dim + 1, dim, *range(dim + 2, len(apart))]:
        return None
    if not same_sizes((*old[:dim], *old[dim + 1 :]), (*apart[:dim], *apart[dim + 2 :])) or not is_static(
        (old[dim], *apart[dim : dim + 2])
    ):
        return None
    return Shuffle(x, opens, moves, dim, apart[dim], apart[dim + 1])


def opens_shuffle(node: fx.Node) -> bool:
    moves = single_user(node)
    ends = None if moves is None else single_user(moves)
    shuffle = None if ends is None else shuffle_at(ends)
    return shuffle is not None and shuffle.opens is node


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_dim(x, y) for x, y in zip(a, b, strict=True))


def regroup(c: Coupling, dims: Dims, old: Sequence[Any], new: Sequence[Any], at: str) -> Dims:
    """The axes of a reshape from `old` to `new` sizes: in each least run of dimensions that holds the same elements on both
    sides, the old dimensions are merged into one and that is split into the new ones."""
    result = [FIXED] * len(new)
    for before, after in _blocks(old, new):
        axes, sizes = [dims[k] for k in before], [old[k] for k in before]
        if len(before) == len(after) == 1:
            result[after[0]] = axes[0]
        elif not is_static(sizes) or not is_static([new[k] for k in after]):
            c.pin_all(axes, f"{at} mixes it with a dimension of unknown size")
        else:
            merged = c.merge(axes, sizes)
            parts = [merged] if len(after) == 1 else c.split(merged, [new[k] for k in after], f"{at} takes it apart")
            for k, part in zip(after, parts, strict=True):
                result[k] = part
    return tuple(result)


def _blocks(old: Sequence[Any], new: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions between which the products of the sizes so far are equal; dimensions of size 1 stand in none.

    Where sizes are unknown and do not add up symbolically, the last run holds what is left.
    """

    def steps(sizes: Sequence[Any]) -> dict[Any, int]:
        total, ends = sympy.Integer(1), {}
        for k, size in enumerate(sizes):
            if not (isinstance(size, int) and size == 1):
                total = total * (sympy.Integer(size) if isinstance(size, int) else size.node.expr)
                ends[total] = k
        return ends

    before, after = steps(old), steps(new)
    blocks, i, j = [], 0, 0
    for total in before:
        if total in after:
            run = [k for k in range(i, before[total] + 1) if not _is_one(old[k])]
            blocks.append((run, [k for k in range(j, after[total] + 1) if not _is_one(new[k])]))
            i, j = before[total] + 1, after[total] + 1
    rest = [k for k in range(i, len(old)) if not _is_one(old[k])], [k for k in range(j, len(new)) if not _is_one(new[k])]
    return [*blocks, rest] if rest[0] else blocks


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(c: Coupling, node: fx.Node) -> Dims:
    """(..., C r r, H, W) -> (..., C, H r, W r): a channel of the output is r r channels of the input."""
    x, factor = node.args
    dims = c.of(x)
    reason = f"{where(node)} spreads it over positions"
    count = shape(x)[-3] // factor**2  # type: ignore[operator]
    channels, *offsets = c.split(dims[-3], (count, factor, factor), reason)  # type: ignore[list-item]
    c.pin_all((*offsets, *dims[-2:]), reason)
    return (*dims[:-3], channels, FIXED, FIXED)


@rule(aten.expand.default)
def expand(c: Coupling, node: fx.Node) -> Dims:
    """Copies can be made fewer (the repeats of grouped-query attention), so they have atoms of their own."""
    dims, old, new = c.of(node.args[0]), shape(node.args[0]), shape(node)
    lead = len(new) - len(old)
    result = []
    for k, size in enumerate(new):
        grown = k < lead or (_is_one(old[k - lead]) and not _is_one(size))
        if not grown:
            result.append(dims[k - lead])
        else:
            result.append(Axis(c.atoms.fresh(size)) if isinstance(size, int) and size > 1 else FIXED)
    return tuple(result)


@rule(aten.repeat.default)
def repeat(c: Coupling, node: fx.Node) -> Dims:
    x, times = node.args
    lead = len(times) - len(shape(x))  # type: ignore[arg-type]
    result = [FIXED] * lead
    for axis, count in zip(c.of(x), times[lead:], strict=True):  # type: ignore[index]
        if axis.labels is not None and isinstance(count, int):
            axis = replace(axis, labels=np.tile(axis.labels, count))
        result.append(axis)
    return tuple(result)


# -- taking ------------------------------------------------------------------------------------------------------------------


def replaced(dims: Dims, dim: int, axis: Axis) -> Dims:
    result = list(dims)
    result[dim] = axis
    return tuple(result)


@rule(aten.slice.Tensor)
def slice_(c: Coupling, node: fx.Node) -> Dims:
    x, dims = node.args[0], c.of(node.args[0])
    dim, step = argument(node, 1, "dim", 0) % len(dims), argument(node, 4, "step", 1)
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    axis = dims[dim]
    if axis.labels is None:
        return dims
    size = len(axis.labels)
    first, last, _ = slice(start, end, step).indices(size)
    if step != 1:
        # Every step-th channel is a column of (size / step, step): whole rows can go.
        if size % step or first >= step or last != size:
            c.pin(axis, f"{where(node)} takes every {step}th of a part of it")
        else:
            c.split(axis, (size // step, step), where(node))
    return replaced(dims, dim, c.take(axis, slice(first, last, step), f"{where(node)} of '{x}'"))


@rule(aten.select.int)
def select(c: Coupling, node: fx.Node) -> Dims:
    dims = c.of(node.args[0])
    dim: int = node.args[1] % len(dims)  # type: ignore[operator, assignment]
    c.take(dims[dim], [node.args[2]], where(node))
    return (*dims[:dim], *dims[dim + 1 :])


@rule(aten.index_select.default)
def index_select(c: Coupling, node: fx.Node) -> Dims:
    x, dim, index = node.args
    return _gather(c, node, dim % len(c.of(x)), index)  # type: ignore[operator]


@rule(aten.index.Tensor)
def index_tensor(c: Coupling, node: fx.Node) -> Dims:
    x, indices = node.args
    given = [(k, index) for k, index in enumerate(indices) if index is not None]  # type: ignore[arg-type]
    if len(given) == 1 and len(shape(given[0][1])) == 1:
        return _gather(c, node, *given[0])
    c.pin_all([a for value in (x, *(i for _, i in given)) for a in c.of(value)], f"{where(node)} gathers with several indices")
    return (FIXED,) * len(shape(node))


def _gather(c: Coupling, node: fx.Node, dim: int, index: Any) -> Dims:
    """Constant numbers are written anew by the cut; any others need all that they may point at."""
    dims, numbers = c.of(node.args[0]), c.program.parameter(index)
    c.pin_all(c.of(index), f"they are the numbers that {where(node)} gathers")
    if numbers is not None and numbers.dtype != torch.bool:
        return replaced(dims, dim, c.take(dims[dim], numbers.cpu().numpy(), where(node)))
    c.pin(dims[dim], f"{where(node)} gathers from it")
    return replaced(dims, dim, FIXED)


@rule(aten.flip.default)
def flip(c: Coupling, node: fx.Node) -> Dims:
    dims = c.of(node.args[0])
    for d in node.args[1]:  # type: ignore[union-attr]
        if dims[d].labels is not None:  # type: ignore[index]
            dims = replaced(dims, d, replace(dims[d], labels=dims[d].labels[::-1]))  # type: ignore[index, arg-type]
    return dims


@rule(aten.roll.default)
def roll(c: Coupling, node: fx.Node) -> Dims:
    dims = c.of(node.args[0])
    over = argument(node, 2, "dims", []) or range(len(dims))
    c.pin_all([dims[d] for d in over], f"{where(node)} moves it around")
    return dims


# -- several values ----------------------------------------------------------------------------------------------------------


def pieces(node: fx.Node) -> list[int]:
    """The sizes of what a split gives, along its dimension."""
    dim = argument(node, 2, "dim", 0)
    return [value.shape[dim] for value in node.meta["val"]]


@rule(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
def split(c: Coupling, node: fx.Node) -> list[Dims]:
    dims = c.of(node.args[0])
    dim = argument(node, 2, "dim", 0) % len(dims)
    result, start = [], 0
    for size in pieces(node):
        taken = c.take(dims[dim], slice(start, start + size), where(node)) if isinstance(size, int) else FIXED
        result.append(replaced(dims, dim, taken))
        start = start + size
    return result


@rule(aten.unbind.int)
def unbind(c: Coupling, node: fx.Node) -> list[Dims]:
    dims = c.of(node.args[0])
    dim = argument(node, 1, "dim", 0) % len(dims)
    c.pin(dims[dim], f"{where(node)} takes each alone")
    return [(*dims[:dim], *dims[dim + 1 :])] * len(node.meta["val"])


@rule(operator.getitem)
def getitem(c: Coupling, node: fx.Node) -> Dims:
    return c.axes[node.args[0]][node.args[1]]  # type: ignore[index]


@rule(aten.cat.default)
def cat(c: Coupling, node: fx.Node) -> Dims:
    values: Any = node.args[0]
    rank = len(shape(node))
    dim = argument(node, 1, "dim", 0) % rank
    values = [v for v in values if len(shape(v)) == rank]  # torch takes empty vectors for nothing
    result = list(c.of(values[0]))
    for value in values[1:]:
        for k in range(rank):
            if k != dim and not _is_one(shape(value)[k]):
                reason = f"{where(node)} puts it beside a fixed dimension"
                vanishes = result[k].vanishes and c.of(value)[k].vanishes
                result[k] = replace(c.join(result[k], c.of(value)[k], reason), vanishes=vanishes)
    result[dim] = put_together(c, node, [(c.of(v)[dim], shape(v)[dim]) for v in values])
    return tuple(result)


def put_together(c: Coupling, node: fx.Node, parts: Sequence[tuple[Axis, Any]]) -> Axis:
    """Axes one behind the other, with their sizes."""
    if not is_static([size for _, size in parts]):
        c.pin_all([axis for axis, _ in parts], f"{where(node)} puts it beside a dimension of unknown size")
        return FIXED
    if all(axis.labels is None for axis, _ in parts):
        return FIXED
    labels = [np.full(size, KEPT) if axis.labels is None else axis.labels for axis, size in parts]
    return Axis(np.concatenate(labels), all(axis.vanishes for axis, _ in parts if axis.labels is not None))


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(c: Coupling, node: fx.Node) -> Dims:
    amounts: Any = node.args[1]
    constant = node.target is aten.constant_pad_nd.default or argument(node, 2, "mode", "constant") == "constant"
    value = argument(node, 2 if node.target is aten.constant_pad_nd.default else 3, "value", 0)
    dims, sizes = list(c.of(node.args[0])), shape(node.args[0])
    for k in range(len(amounts) // 2):
        dim = len(dims) - 1 - k
        before, after = amounts[2 * k : 2 * k + 2]
        if before == after == 0:
            continue
        if not constant or before < 0 or after < 0:
            c.pin(dims[dim], f"{where(node)} pads or crops it")
            dims[dim] = FIXED
        else:
            dims[dim] = put_together(c, node, [(FIXED, before), (dims[dim], sizes[dim]), (FIXED, after)])
    return tuple(dims) if constant and not value else tuple(replace(a, vanishes=False) for a in dims)
