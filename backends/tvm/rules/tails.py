"""Looks ahead from an s32 result for the rescale (and residual addition) that a kernel can do before it stores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of, single_user
from ..kernels.base import FloatAdd, Outliers, ResidualAdd, Tail
from ..lower import Lowering
from ..values import DTYPES, arguments

aten = torch.ops.aten

TAIL_OPS = (gw.rescale.default, gw.rescale_dyadic.default, gw.scale.default)

#: Floats below it are rounded to integers by adding 1.5 * 2^23.
BOUND = 2.0**22

#: The s32 accumulator is stored as it is.
NO_TAIL = Tail("none", "int32")


@dataclass(frozen=True)
class Finish:
    """How a kernel finishes: its tail, the tail's parameters ((1,) or (C,) each), and the nodes the kernel covers.

    nodes: the accumulating node first; the last one's value is what the kernel stores.
    residual: the node whose value a fused addition reads. outliers: the node that a second product reads, whose weight, bias and
    scale are in `outlier_values`.
    """

    tail: Tail
    parameters: dict[str, np.ndarray]
    nodes: tuple[fx.Node, ...]
    residual: fx.Node | None = None
    outliers: fx.Node | None = None
    outlier_values: dict[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> fx.Node:
        return self.nodes[-1]

    def vectors(self, lanes: int) -> list[np.ndarray]:
        """The parameters, each expanded to `lanes` entries. Entries nobody reads are 1, which every tail accepts."""
        return [expanded(value, lanes) for value in self.parameters.values()]


def expanded(value: np.ndarray, lanes: int) -> np.ndarray:
    vector = np.ones(lanes, value.dtype)
    vector[: lanes if value.size == 1 else value.size] = value
    return vector


def tail_of(lowering: Lowering, node: fx.Node) -> tuple[Tail, dict[str, np.ndarray], int] | None:
    """Tail, parameters and channel axis of a rescale node; None where a parameter is not a constant."""
    if node.target is gw.scale.default:
        acc, scale, axis = arguments(node)
        tensors, tail = {"scale": scale}, Tail("scale", "float32")
    elif node.target is gw.rescale.default:
        acc, scale, zero_point, qmin, qmax, dtype, axis = arguments(node)
        tensors, tail = {"scale": scale}, Tail("rescale", DTYPES[dtype], zero_point, qmin, qmax)
    else:
        acc, multiplier, shift, zero_point, qmin, qmax, dtype, axis = arguments(node)
        tensors = {"multiplier": multiplier, "shift": shift}
        tail = Tail("dyadic", DTYPES[dtype], zero_point, qmin, qmax)
    arrays: dict[str, np.ndarray] = {}
    for name, argument in tensors.items():
        parameter = lowering.program.parameter(argument)
        if parameter is None:
            return None
        arrays[name] = parameter.detach().cpu().numpy().reshape(-1)
    if tail.kind == "rescale":
        tail = replace(tail, shrinks=bool(arrays["scale"].max() < 1))
    rank = len(shape_of(acc))
    return tail, arrays, int(axis) % rank if rank else 0


def find(
    lowering: Lowering,
    node: fx.Node,
    axis: int,
    residual: bool = False,
    lookup: bool = False,
    outliers: int = 0,
    normalized: bool = False,
) -> Finish:
    """The tail that the only reader of `node` asks for, or no tail.

    axis: the output axis along which the kernel's tail parameters run. residual: the kernel can also add a second tensor.
    lookup: the kernel can also replace the codes by entries of a table. outliers: columns of a second product it can add.
    normalized: the second tensor may be one to normalize.
    """
    reader = single_user(node)
    if reader is None or reader.target not in TAIL_OPS or arguments(reader)[0] is not node:
        return Finish(NO_TAIL, {}, (node,))
    found = tail_of(lowering, reader)
    if found is None or (found[2] != axis and any(p.size > 1 for p in found[1].values())):
        return Finish(NO_TAIL, {}, (node,))
    finish = Finish(found[0], found[1], (node, reader))
    finish = _with_outliers(lowering, finish, outliers) if outliers else finish
    finish = _with_residual(lowering, finish, normalized) if residual else finish
    return _with_lookup(lowering, finish) if lookup else finish


def bounded(lowering: Lowering, finish: Finish, inner: int, bias: np.ndarray | None = None) -> Finish:
    """The same, with what is known of a product of `inner` codes by s8 weights: |x - zero point| <= 255, |w| <= 128."""
    if lowering.target.arch != "cuda" or finish.tail.kind != "rescale":
        return finish
    most = inner * 255 * 128 + (0 if bias is None else int(np.abs(bias.astype(np.int64)).max(initial=0)))
    is_bounded = bool(most * float(finish.parameters["scale"].max()) < BOUND)
    return replace(finish, tail=replace(finish.tail, bounded=is_bounded))


def looks_up(lowering: Lowering) -> bool:
    """Whether the target's products look their results up. CPUs have lookups of 64 bytes an instruction, but not in tails."""
    return lowering.target.arch == "cuda"


def _with_outliers(lowering: Lowering, finish: Finish, most: int) -> Finish:
    """Takes in the scaled product of at most `most` columns that is added to the finished value: see `split-outliers`."""
    add = single_user(finish.node)
    if finish.tail.kind != "scale" or add is None or add.target is not aten.add.Tensor or add.kwargs:
        return finish
    a, b = arguments(add)
    scaled = b if a is finish.node else a
    if a is b or not isinstance(scaled, fx.Node) or scaled.target is not gw.scale.default or single_user(scaled) is not add:
        return finish
    found, product = tail_of(lowering, scaled), arguments(scaled)[0]
    if found is None or product.target is not gw.linear.default or single_user(product) is not scaled:
        return finish
    x, *parameters, zero_point = arguments(product)
    weight, bias = (None if p is None else lowering.program.parameter(p) for p in parameters)
    if weight is None or (parameters[1] is not None and bias is None) or weight.shape[1] > most or not lowering.lowered(x):
        return finish
    if shape_of(scaled) != shape_of(finish.node) or lowering.lowered(product):
        return finish
    if found[2] != len(shape_of(scaled)) - 1 and found[1]["scale"].size > 1:
        return finish
    values = {"weight": weight.numpy(), "bias": None if bias is None else bias.numpy(), "scale": found[1]["scale"]}
    tail = replace(finish.tail, outliers=Outliers(weight.shape[1], lowering.value(x).dtype, int(zero_point)))
    return replace(finish, tail=tail, nodes=(*finish.nodes, product, scaled, add), outliers=x, outlier_values=values)


def _with_lookup(lowering: Lowering, finish: Finish) -> Finish:
    """Takes in the table that alone reads the finished codes."""
    reader = single_user(finish.node)
    if reader is None or reader.target is not gw.lookup.default or finish.tail.dtype not in ("uint8", "int8"):
        return finish
    table = lowering.program.parameter(arguments(reader)[1])
    if table is None:
        return finish
    tail = replace(finish.tail, table=DTYPES[table.dtype])
    parameters = finish.parameters | {"table": table.detach().cpu().numpy()}
    return replace(finish, tail=tail, parameters=parameters, nodes=(*finish.nodes, reader))


def _with_residual(lowering: Lowering, finish: Finish, normalized: bool) -> Finish:
    """Takes in the addition that reads the finished value and a tensor of the same shape that exists already.

    normalized: the kernel can carry out the layer normalization that the tensor is.
    """
    add = single_user(finish.node)
    if add is not None and add.target is aten.add.Tensor and finish.tail.kind == "scale":
        return _with_float_add(lowering, finish, add, normalized)
    if add is None or add.target is not gw.add.default or finish.tail.kind == "scale":
        return finish
    a, b, ma, mb, shift, za, zb, zero_point, qmin, qmax, dtype = arguments(add)
    if a is b:
        return finish
    if b is finish.node:
        a, b, ma, mb, za, zb = b, a, mb, ma, zb, za
    if shape_of(b) != shape_of(a) or not lowering.lowered(b) or b.op == "get_attr" or DTYPES[dtype] != finish.tail.dtype:
        return finish
    fused = ResidualAdd(ma, mb, shift, za, zb, zero_point, qmin, qmax, DTYPES[b.meta["val"].dtype])
    return replace(finish, tail=replace(finish.tail, residual=fused), nodes=(*finish.nodes, add), residual=b)


def _with_float_add(lowering: Lowering, finish: Finish, add: fx.Node, normalized: bool) -> Finish:
    a, b = arguments(add)
    other = b if a is finish.node else a
    if add.kwargs or a is b or not isinstance(other, fx.Node) or not lowering.lowered(other):
        return finish
    if shape_of(other) != shape_of(finish.node) or DTYPES[other.meta["val"].dtype] != "float32":
        return finish
    value = lowering.value(other)
    addition = FloatAdd(normalized=normalized and value.dense is None and value.normalization is not None)
    return replace(finish, tail=replace(finish.tail, residual=addition), nodes=(*finish.nodes, add), residual=other)
