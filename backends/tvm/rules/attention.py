"""Recognizes attention around a `gw::matmul` of scores, and emits it as one kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of, single_user
from ..kernels import attention_int8
from ..kernels.quantize_image import Quantize
from ..lower import Lowering
from ..strided import Strided
from ..values import DTYPES, arguments, of_node
from .tails import Finish, find, tail_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """The nodes from the scores' product to the weighted sum's, with the second operands and what the kernel must know."""

    nodes: tuple[fx.Node, ...]
    mask: fx.Node | None
    values: fx.Node
    scale: float
    quantize: Quantize


def lower_attention(lowering: Lowering, node: fx.Node) -> bool:
    """Emits the attention whose scores `node` is; False where it is none, or one that the kernel cannot do."""
    found = _match(lowering, node)
    if found is None:
        return False
    q, k, q_zero_point, _ = arguments(node)
    finish = find(lowering, found.nodes[-1], axis=len(shape_of(node)) - 1)
    operands = [lowering.strided(q), lowering.strided(k), lowering.strided(found.values)]
    if found.mask is not None:
        source, strided = lowering.strided(found.mask)
        operands.append((source, strided.expand(shape_of(node))))
    spec = attention_int8.AttentionInt8(
        q=operands[0][1],
        k=operands[1][1],
        v=operands[2][1],
        mask=None if found.mask is None else operands[3][1],
        q_dtype=lowering.value(q).dtype,
        q_zero_point=int(q_zero_point),
        scale=found.scale,
        quantize=found.quantize,
        swapped=_swapped_by_reader(finish.node),
    )
    level = lowering.int8_level
    family = lowering.family(attention_int8)
    if not family.fits(spec, level):
        return False
    packed = family.pack(spec, finish.tail, level, **finish.parameters)
    out = lowering.kernel(
        attention_int8.build,
        spec,
        finish.tail,
        level,
        inputs=[*(source for source, _ in operands), *packed],
        nodes=(*found.nodes[:-1], *finish.nodes),
        macs=spec.macs,
        label="attention_int8",
    )
    _bind(lowering, found, finish, spec, out)
    return True


def _bind(lowering: Lowering, found: Attention, finish: Finish, spec: attention_int8.AttentionInt8, out) -> None:
    shape = shape_of(finish.node)
    value = of_node(finish.node, dense=out)
    if spec.swapped:
        rank = len(shape)
        order = (*range(rank - 3), rank - 2, rank - 3, rank - 1)
        value = lowering.moved_value(out, Strided.whole(spec.out_shape).permute(order))
    lowering.bind_all((*found.nodes[:-1], *finish.nodes), value)


def _match(lowering: Lowering, node: fx.Node) -> Attention | None:
    """matmul -> scale -> (add mask) -> softmax -> quantize -> matmul, each the only reader of the one before."""
    shape, (_, k, _, k_zero_point) = shape_of(node), arguments(node)
    scale = single_user(node)
    if not _is_codes(k, int(k_zero_point)) or scale is None or scale.target is not gw.scale.default:
        return None
    tail = tail_of(lowering, scale)
    if tail is None or tail[1]["scale"].size != 1:
        return None
    nodes, mask = [node, scale], None
    reader = single_user(scale)
    if reader is not None and reader.target is aten.add.Tensor and not reader.kwargs:
        a, b = arguments(reader)
        mask = b if a is scale else a
        if not _is_mask(mask, shape):
            return None
        nodes.append(reader)
        reader = single_user(reader)
    for target in (gw.softmax.default, gw.quantize.default, gw.matmul.default):
        if reader is None or reader.target is not target or arguments(reader)[0] is not nodes[-1]:
            return None
        nodes.append(reader)
        reader = single_user(reader)
    values, values_zero_point = arguments(nodes[-1])[1], arguments(nodes[-1])[3]
    if {shape_of(n)[:-2] for n in (arguments(node)[0], k, values)} != {shape[:-2]} or len(shape) < 3:
        return None
    if not _is_codes(values, int(values_zero_point)) or not lowering.lower_ahead(values, node):
        return None
    if mask is not None and not (lowering.lower_ahead(mask, node) and lowering.strided(mask)[1].strides[-1] == 1):
        return None
    _, step, zero_point, qmin, qmax, dtype = arguments(nodes[-2])
    quantize = Quantize(float(step), zero_point, qmin, qmax, DTYPES[dtype])
    return Attention(tuple(nodes), mask, values, float(tail[1]["scale"][0]), quantize)


def _is_codes(node: fx.Node, zero_point: int) -> bool:
    """Whether a second operand is s8 and symmetric, as the dot instruction wants it."""
    return node.meta["val"].dtype is torch.int8 and zero_point == 0


def _is_mask(mask: object, shape: tuple[int, ...]) -> bool:
    """Float rows of whole length; they may be shared by query rows, heads and batch."""
    if not isinstance(mask, fx.Node) or mask.meta["val"].dtype is not torch.float32:
        return False
    given = shape_of(mask)
    broadcasts = all(a in (1, b) for a, b in zip(reversed(given), reversed(shape), strict=False))
    return bool(given) and len(given) <= len(shape) and given[-1] == shape[-1] and broadcasts


def _swapped_by_reader(node: fx.Node) -> bool:
    """Whether the only reader exchanges the last batch axis with the rows, as attention does to put its heads side by side."""
    reader, rank = single_user(node), len(shape_of(node))
    if reader is None or rank < 3:
        return False
    if reader.target is aten.permute.default:
        order = [int(d) % rank for d in arguments(reader)[1]]
    elif reader.target is aten.transpose.int:
        order = list(range(rank))
        first, second = (int(d) % rank for d in arguments(reader)[1:3])
        order[first], order[second] = order[second], order[first]
    else:
        return False
    return order == [*range(rank - 3), rank - 2, rank - 3, rank - 1]
