"""Integer linear layers of the same rows in one launch, where launches cost: on CUDA."""

from __future__ import annotations

from math import prod

import numpy as np
from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..cuda.kernels import linears_int8, plan_linears
from ..cuda.kernels.plan_linears import MOST_PARTS, Part, Parts, rides
from ..kernels.linear_int8 import LinearInt8
from ..lower import Lowering
from ..values import arguments, of_node
from .tails import Finish, bounded, find


def lower_together(lowering: Lowering, node: fx.Node) -> bool:
    """Lowers a `gw::linear` with others of the same rows, such as queries, keys and values. False where it is the only one."""
    if lowering.target.arch != "cuda":
        return False
    finishes = [finish for other in _same_rows(lowering, node) if (finish := _finish(lowering, other)) is not None]
    if len(finishes) < 2 or node not in [finish.nodes[0] for finish in finishes]:
        return False
    finishes.sort(key=lambda finish: finish.nodes[0] is not node)
    _emit(lowering, *_chosen(lowering, finishes))
    return True


def _chosen(lowering: Lowering, finishes: list[Finish]) -> tuple[list[Finish], Finish | None]:
    """Of layers, most wanted first: those with tiles of their own, and one that rides along where there is a narrow one."""
    parts = [_part(lowering, finish) for finish in finishes]
    rows, outputs = prod(shape_of(finishes[0].nodes[0])[:-1]), sum(part.outer for part in parts)
    narrow = [rides(part, rows, outputs - part.outer) for part in parts]
    if not any(narrow) or all(narrow):
        return finishes[:MOST_PARTS], None
    wide = [finish for finish, is_narrow in zip(finishes, narrow, strict=True) if not is_narrow]
    return wide[:MOST_PARTS], finishes[narrow.index(True)]


def _part(lowering: Lowering, finish: Finish) -> Part:
    return Part(shape_of(arguments(finish.nodes[0])[1])[0], finish.tail)


def _same_rows(lowering: Lowering, node: fx.Node) -> list[fx.Node]:
    x, zero_point = arguments(node)[0], arguments(node)[3]
    layers = [user for user in x.users if user.target is gw.linear.default and not lowering.lowered(user)]
    return [layer for layer in layers if (arguments(layer)[0], arguments(layer)[3]) == (x, zero_point)]


def _finish(lowering: Lowering, node: fx.Node) -> Finish | None:
    """How a layer is finished that can be a part: one of plain s8 weights that is rescaled and adds nothing."""
    _, weight, bias, _ = arguments(node)
    if any(lowering.program.parameter(tensor) is None for tensor in (weight, bias) if tensor is not None):
        return None
    finish = find(lowering, node, axis=len(shape_of(node)) - 1, residual=True, lookup=True)
    finish = bounded(lowering, finish, shape_of(weight)[1], None if bias is None else _values(lowering, bias))
    return finish if plan_linears.joins(finish.tail) else None


def _emit(lowering: Lowering, wide: list[Finish], rider: Finish | None) -> None:
    finishes = [*wide, *([rider] if rider else [])]
    layers = [arguments(finish.nodes[0]) for finish in finishes]
    x, zero_point = layers[0][0], int(layers[0][3])
    weights = [_values(lowering, weight) for _, weight, _, _ in layers]
    biases = [None if bias is None else _values(lowering, bias) for _, _, bias, _ in layers]
    parts = Parts(tuple(_part(lowering, finish) for finish in wide), _part(lowering, rider) if rider else None)
    rows, inner, dtype = prod(shape_of(x)[:-1]), shape_of(x)[-1], lowering.value(x).dtype
    whole = LinearInt8(rows, inner, sum(part.outer for part in parts.own), dtype, zero_point)
    packed = plan_linears.pack(dtype, zero_point, parts, weights, biases, [finish.parameters for finish in finishes])
    results = lowering.kernel_outputs(
        linears_int8.linears,
        whole,
        parts,
        lowering.int8_level,
        inputs=[lowering.dense(x), *packed],
        nodes=[node for finish in finishes for node in finish.nodes],
        macs=rows * inner * sum(part.outer for part in parts.all),
        label="linears_int8",
        outputs=len(finishes),
    )
    for finish, result in zip(finishes, results, strict=True):
        lowering.bind_all(finish.nodes, of_node(finish.node, dense=result))


def _values(lowering: Lowering, node: fx.Node) -> np.ndarray:
    tensor = lowering.program.parameter(node)
    assert tensor is not None
    return tensor.detach().cpu().numpy()
