"""A program of a fixed batch as one of fewer samples: what a runtime may call several times to compute the whole batch.

That is the same function only where no operator looks from one sample at another. Every value either does not depend on the
inputs, or one of its axes counts (sample, row of the sample) with the sample outermost. Each operator is one of the kinds below,
which know where that axis goes, or the program is left whole.

    elementwise     operands broadcast, but not along the axis of samples                 relu, add, gw.add, ...
    rows            one operand is sampled along its first axis, others are parameters    convolution, linear, max_pool2d, ...
    along axes      any but that of the samples                                           softmax, mean, slice, cat, ...
    movements       the axis moves                                                        permute, reshape, unsqueeze, ...
    product         of matrices, sample by sample                                         matmul, gw.matmul, bmm
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import fx

from . import dialect  # noqa: F401  registers the gw ops
from .batch import resized
from .errors import VerificationError
from .program import Program, shape_of, tensors_of

aten: Any = torch.ops.aten
gw: Any = torch.ops.gw

#: Sampled node -> its axis of samples.
Axes = dict[fx.Node, int]

_ELEMENTWISE = {
    aten.add.Tensor, aten.alias.default, aten.clamp.default, aten.clone.default, aten.contiguous.default, aten.detach.default,
    aten.div.Tensor, aten.dropout.default, aten.erf.default, aten.exp.default, aten.gelu.default, aten.hardsigmoid.default,
    aten.hardswish.default, aten.hardtanh.default, aten.mul.Tensor, aten.neg.default, aten.pow.Tensor_Scalar, aten.relu.default,
    aten.relu6.default, aten.rsqrt.default, aten.sigmoid.default, aten.silu.default, aten.sqrt.default, aten.sub.Tensor,
    aten.tanh.default, aten._to_copy.default,
    gw.add.default, gw.dequantize.default, gw.multiply.default, gw.quantize.default, gw.square_root.default,
}  # fmt: skip

_CONVOLUTIONS = {aten.convolution.default, gw.convolution.default}

#: The first operand alone is sampled; what these reduce or mix lies within a row of its first axis.
_ROWS = {
    aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default, aten.linear.default, aten.max_pool2d.default, aten.mm.default,
    gw.layer_norm.default, gw.linear.default, gw.lookup.default, gw.max_pool2d.default, gw.softmax.default,
    gw.sparse_linear.default, gw.sum_pool2d.default, *_CONVOLUTIONS,
}  # fmt: skip

#: The second operand alone is sampled.
_SECOND = {aten.addmm.default, aten.embedding.default}

#: Operators that work along axes, by the parameter that names these. Their operands are all sampled.
_ALONG = {
    aten.cat.default: "dim", aten.chunk.default: "dim", aten.mean.dim: "dim", aten.softmax.int: "dim", aten.slice.Tensor: "dim",
    aten._softmax.default: "dim", aten.split.Tensor: "dim", aten.split_with_sizes.default: "dim", aten.sum.dim_IntList: "dim",
    aten.amax.default: "dim", aten.linalg_vector_norm.default: "dim", gw.reduce_sum.default: "dim", gw.sum.default: "dims",
}  # fmt: skip

#: The same for those that take the axes away.
_TAKEN = {aten.select.int: "dim", aten.squeeze.dim: "dim", aten.squeeze.dims: "dim", aten.unbind.int: "dim"}

#: A parameter of one entry an index of `axis`.
_BY_CHANNEL = {gw.rescale.default, gw.rescale_dyadic.default, gw.scale.default}

#: They are told their result's shape.
_SHAPED = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.expand.default}

_RESHAPES = {*_SHAPED, aten.flatten.using_ints, aten.unflatten.int} - {aten.expand.default}

_PRODUCTS = {aten.bmm.default, aten.matmul.default, gw.matmul.default}

#: Every operand is sampled, (N, ...).
_TOKENS = {gw.keep_tokens.default, gw.match_tokens.default, gw.sum_tokens.default}


def in_parts(program: Program, size: int) -> Program | None:
    """The program for `size` samples; None where a sample's result might depend on another one's, or on how many there are.

    Args:
        program: of static shapes. size: divides its batch, the first dimension of every input.
    """
    batch = _batch(program)
    axes = None if batch is None or size < 1 or batch % size else _sampled(program, batch)
    if batch is None or axes is None:
        return None
    part = program.clone()
    nodes = dict(zip(part.nodes, program.nodes, strict=True))
    for node, whole in nodes.items():
        if whole in axes and node.target in _SHAPED:
            (shape,) = _shapes(whole, axes[whole], batch, size)
            node.args = (node.args[0], list(shape), *node.args[2:])
    try:
        resized(part, size)
    except VerificationError:
        return None  # an argument holds the batch where no rule of this module looks
    kept = all(_shapes(node) == _shapes(whole, axes.get(whole), batch, size) for node, whole in nodes.items())
    return part if kept else None


def _batch(program: Program) -> int | None:
    """The first dimension of all inputs; None where they have none in common."""
    first = {spec.shape[0] if spec.shape else None for spec in program.input_specs}
    return first.pop() if len(first) == 1 else None


def _shapes(node: fx.Node, axis: int | None = None, batch: int = 1, size: int = 1) -> list[tuple[int, ...]]:
    """The shapes of a node's tensors, with `size` samples instead of `batch` along an axis."""
    shapes = [list(tensor.shape) for tensor in tensors_of(node)]
    for shape in shapes:
        if axis is not None:
            shape[axis] = shape[axis] // batch * size
    return [tuple(shape) for shape in shapes]


def _sampled(program: Program, batch: int) -> Axes | None:
    """The nodes that depend on the samples; None where an operator mixes these, or an output does not begin with them."""
    axes: Axes = dict.fromkeys(program.inputs, 0)
    for node in program.nodes:
        if node.op != "call_function":
            continue
        axis: int | None = None
        if node.target is aten.expand.default:
            axis = _expanded(node, axes, batch)
        elif axes.keys() & node.all_input_nodes:
            axis = _axis(node, axes, batch)
        if axis is not None:
            axes[node] = axis
        elif axes.keys() & node.all_input_nodes:
            return None
    return axes if all(axes.get(node) == 0 for node in program.outputs) else None


def _axis(node: fx.Node, axes: Axes, batch: int) -> int | None:
    """The axis of samples of what an operator makes of sampled operands; None where it has none, or nobody knows."""
    if node.target is operator.getitem:
        return axes[node.all_input_nodes[0]]
    if node.target in _RESHAPES:
        return _reshaped(node, axes, batch)
    rule = next((rule for targets, rule in _RULES if node.target in targets), None)
    axis = None if rule is None else rule(node, axes)
    counted = axis is not None and all(t.dim() > axis and t.shape[axis] % batch == 0 for t in tensors_of(node))
    return axis if counted else None


def _elementwise(node: fx.Node, axes: Axes) -> int | None:
    shape = shape_of(node)
    found = {axes[operand] for operand in node.all_input_nodes if operand in axes}
    axis = found.pop()

    def agrees(operand: fx.Node) -> bool:
        own = shape_of(operand)
        place = axis - len(shape) + len(own)
        if operand in axes:
            return place == axis and own[axis] == shape[axis]
        return place < 0 or own[place] == 1

    return axis if not found and all(map(agrees, node.all_input_nodes)) else None


def _rows(node: fx.Node, axes: Axes) -> int | None:
    ranks = [len(shape_of(operand)) for operand in node.all_input_nodes]
    whole = ranks[0] == ranks[1] if node.target in _CONVOLUTIONS else ranks[0] > 1  # an image alone has no axis of samples
    return 0 if whole and _only(node, axes, 0) else None


def _second(node: fx.Node, axes: Axes) -> int | None:
    bias = node.args[0]
    flat = node.target is not aten.addmm.default or (isinstance(bias, fx.Node) and len(shape_of(bias)) == 1)
    return 0 if flat and _only(node, axes, 1) else None


def _layer_norm(node: fx.Node, axes: Axes) -> int | None:
    inner = len(_named(node)["normalized_shape"]) < len(shape_of(node))
    return 0 if inner and _only(node, axes, 0) else None


def _pad(node: fx.Node, axes: Axes) -> int | None:
    inner = len(_named(node)["pad"]) < 2 * len(shape_of(node))
    return 0 if inner and _only(node, axes, 0) else None


def _by_channel(node: fx.Node, axes: Axes) -> int | None:
    one = all(shape_of(vector) == (1,) for vector in node.all_input_nodes[1:])
    along = _named(node)["axis"] % len(shape_of(node))
    return 0 if (one or along > 0) and _only(node, axes, 0) else None


def _along(node: fx.Node, axes: Axes) -> int | None:
    operands = node.all_input_nodes
    found, rank = {axes.get(operand) for operand in operands}, len(shape_of(operands[0]))
    axis, touched = found.pop(), _named_axes(node, _ALONG, rank)
    if found or axis is None or not touched or axis in touched:
        return None
    return axis if axis == 0 or all(len(t.shape) == rank for t in tensors_of(node)) else None


def _taken(node: fx.Node, axes: Axes) -> int | None:
    (operand,) = node.all_input_nodes
    axis, touched = axes[operand], _named_axes(node, _TAKEN, len(shape_of(operand)))
    if axis in touched:
        return None
    gone = [t for t in touched if shape_of(operand)[t] == 1 or node.target in (aten.select.int, aten.unbind.int)]
    return axis - sum(place < axis for place in gone)


def _permuted(node: fx.Node, axes: Axes) -> int | None:
    (operand,) = node.all_input_nodes
    rank = len(shape_of(operand))
    return [dim % rank for dim in _named(node)["dims"]].index(axes[operand])


def _transposed(node: fx.Node, axes: Axes) -> int | None:
    (operand,) = node.all_input_nodes
    axis, rank, named = axes[operand], len(shape_of(operand)), _named(node)
    first, second = named["dim0"] % rank, named["dim1"] % rank
    return {first: second, second: first}.get(axis, axis)


def _unsqueezed(node: fx.Node, axes: Axes) -> int | None:
    axis = axes[node.all_input_nodes[0]]
    return axis + (_named(node)["dim"] % len(shape_of(node)) <= axis)


def _reshaped(node: fx.Node, axes: Axes, batch: int) -> int | None:
    """The axis behind as many elements as before, where it holds whole samples: elements keep their order."""
    (operand,) = node.all_input_nodes
    before, shape = prod(shape_of(operand)[: axes[operand]]), shape_of(node)
    places = (i for i in range(len(shape)) if prod(shape[:i]) == before and shape[i] % batch == 0)
    return next(places, None)


def _expanded(node: fx.Node, axes: Axes, batch: int) -> int | None:
    """A sampled value keeps its axis; one that does not depend on the inputs becomes the same row for every sample."""
    operand = node.all_input_nodes[0]
    own, shape = shape_of(operand), shape_of(node)
    if operand in axes:
        axis = axes[operand]
        return axis if len(own) == len(shape) and own[axis] == shape[axis] else None
    return 0 if shape and shape[0] == batch and (len(own) < len(shape) or own[0] == 1) else None


def _product(node: fx.Node, axes: Axes) -> int | None:
    a, b = node.all_input_nodes[0], node.all_input_nodes[-1]
    ranks = len(shape_of(a)), len(shape_of(b))
    if any(axes.get(operand, 0) for operand in (a, b)):
        return None
    if a in axes and b in axes:
        return 0 if ranks[0] == ranks[1] > 2 and shape_of(a)[0] == shape_of(b)[0] else None
    if a in axes:
        return 0 if ranks[0] > 1 and (ranks[1] <= 2 or (ranks[1] == ranks[0] and shape_of(b)[0] == 1)) else None
    return 0 if ranks[1] > 2 and (ranks[0] == 2 or (ranks[0] == ranks[1] and shape_of(a)[0] == 1)) else None


def _tokens(node: fx.Node, axes: Axes) -> int | None:
    return 0 if all(axes.get(operand) == 0 for operand in node.all_input_nodes) else None


_RULES: tuple[tuple[Iterable[Any], Callable[[fx.Node, Axes], int | None]], ...] = (
    (_ELEMENTWISE, _elementwise),
    (_ROWS, _rows),
    (_SECOND, _second),
    ({aten.layer_norm.default}, _layer_norm),
    ({aten.constant_pad_nd.default, aten.pad.default}, _pad),
    (_BY_CHANNEL, _by_channel),
    (_ALONG, _along),
    (_TAKEN, _taken),
    ({aten.permute.default}, _permuted),
    ({aten.transpose.int}, _transposed),
    ({aten.unsqueeze.default}, _unsqueezed),
    (_PRODUCTS, _product),
    (_TOKENS, _tokens),
)


def _only(node: fx.Node, axes: Axes, position: int) -> bool:
    """Whether the operand at one position is the sampled one, along its first axis."""
    operand = node.args[position] if len(node.args) > position else None
    return [(n, axes[n]) for n in node.all_input_nodes if n in axes] == [(operand, 0)]


def _named_axes(node: fx.Node, names: dict[Any, str], rank: int) -> set[int]:
    """The axes of its operand that an operator's parameter names; all of them for None."""
    axes = _named(node)[names[node.target]]
    axes = range(rank) if axes is None else axes if isinstance(axes, (list, tuple)) else [axes]
    return {axis % rank for axis in axes}


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, defaults included."""
    target: Any = node.target
    schema = target._schema.arguments
    named = {a.name: a.default_value for a in schema if a.has_default_value()}
    return {**named, **dict(zip((a.name for a in schema), node.args, strict=False)), **node.kwargs}
