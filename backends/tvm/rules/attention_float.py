"""Recognizes attention in a float program: [scale] matmul [scale] [mask] softmax matmul [permute], lowered as one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from ....ir.program import dtype_of, shape_of, single_user
from ..kernels.attention_f32 import Attention, Rows, attention
from ..lower import Lowering, rule
from ..values import DTYPES, SUFFIXES, Expr, arguments
from .codes_fp8 import emit_end
from .generic import fallback

aten = torch.ops.aten

PRODUCTS = (aten.matmul.default, aten.bmm.default)
#: Merges heads: (batch, heads, rows, width) -> (batch, rows, heads, width).
MERGE = [0, 2, 1, 3]


@dataclass(frozen=True)
class Found:
    """The nodes of one attention, first to last, and what they compute."""

    nodes: tuple[fx.Node, ...]
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: fx.Node | None
    merged: bool


def _factor(node: fx.Node | None) -> float | None:
    """The number that `node` multiplies its first argument by; None where it does anything else."""
    if node is None or node.kwargs or node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        return None
    number = arguments(node)[1]
    if not isinstance(number, (int, float)) or number == 0:
        return None
    return float(number) if node.target in (aten.mul.Tensor, aten.mul.Scalar) else 1.0 / number


def find(lowering: Lowering, node: fx.Node) -> Found | None:
    """The attention that starts at `node`, a scaling of the queries or the product with the keys; None where there is none, or
    where a tensor that it reads depends on it."""
    scale, nodes, query = 1.0, [node], arguments(node)[0]
    product: fx.Node | None = node
    if node.target not in PRODUCTS:
        scale, product = _factor(node) or 0.0, single_user(node)
        if not scale or product is None or product.target not in PRODUCTS or arguments(product)[0] is not node:
            return None
        nodes.append(product)
    assert product is not None
    key, reader = arguments(product)[1], single_user(product)
    factor = _factor(reader)
    if reader is not None and factor is not None:
        scale, nodes, reader = scale * factor, [*nodes, reader], single_user(reader)
    mask = None
    if reader is not None and reader.target is aten.add.Tensor and not reader.kwargs:
        a, b = arguments(reader)
        mask = b if a is nodes[-1] else a
        if not isinstance(mask, fx.Node) or mask is nodes[-1]:
            return None
        nodes, reader = [*nodes, reader], single_user(reader)
    if reader is None or reader.target not in (aten.softmax.int, aten._softmax.default):
        return None
    if int(arguments(reader)[1]) % len(shape_of(reader)) != len(shape_of(reader)) - 1:
        return None
    last = single_user(reader)
    if last is None or last.target not in PRODUCTS or arguments(last)[0] is not reader:
        return None
    nodes += [reader, last]
    merge = single_user(last)
    merged = merge is not None and merge.target is aten.permute.default and list(arguments(merge)[1]) == MERGE
    if merge is not None and merged:
        nodes.append(merge)
    found = Found(tuple(nodes), query, key, arguments(last)[1], scale, mask, merged)
    return found if _fits(lowering, found) else None


def _fits(lowering: Lowering, found: Found) -> bool:
    query, key, value = (shape_of(n) for n in (found.query, found.key, found.value))
    tensors = [n for n in (found.query, found.key, found.value, found.mask) if n is not None]
    if len({dtype_of(n) for n in tensors}) != 1 or DTYPES[dtype_of(found.query)] not in SUFFIXES:
        return False
    if not 2 <= len(query) <= 4 or query[:-2] != key[:-2] or query[:-2] != value[:-2]:
        return False
    if found.mask is not None and (shape_of(found.mask)[-1:] != key[-1:] or len(shape_of(found.mask)) > 4):
        return False
    return all(lowering.lower_ahead(n, found.nodes[0]) for n in tensors)


def _rows(lowering: Lowering, node: fx.Node, row: int = -2) -> tuple[Expr, Rows] | None:
    """Where the rows of an operand lie, `row` being their axis; None where the elements of a row are not neighbours."""
    source, strided = lowering.strided(node)
    steps, element = strided.strides, -1 if row == -2 else -2
    if steps[element] != 1 and strided.shape[element] != 1:
        return None
    image, head = (0, 0, *steps[:-2])[-2:]
    return source, Rows(prod(strided.source), strided.start, image, head, steps[row])


def _mask_rows(lowering: Lowering, node: fx.Node) -> tuple[Expr, Rows]:
    """A mask of at most four axes that broadcasts to (batch, heads, queries, keys)."""
    given = (1,) * (4 - len(shape_of(node))) + shape_of(node)
    steps, step = [], 1
    for extent in reversed(given):
        steps.append(0 if extent == 1 else step)
        step *= extent
    return lowering.dense(node), Rows(step, 0, steps[3], steps[2], steps[1])


def lower_float_attention(lowering: Lowering, node: fx.Node) -> bool:
    """Lowers the attention that starts at `node`, if one does."""
    found = None if lowering.integer else find(lowering, node)
    if found is None:
        return False
    operands = [_rows(lowering, found.query), _rows(lowering, found.key, -1), _rows(lowering, found.value)]
    if any(operand is None for operand in operands):
        return False
    query, key, value = (shape_of(n) for n in (found.query, found.key, found.value))
    batch, heads = (1, 1, *query[:-2])[-2:]
    if found.mask is not None:
        operands.append(_mask_rows(lowering, found.mask))
    places: Any = [operand[1] for operand in operands if operand is not None]
    sizes = (batch, heads, query[-2], key[-1], query[-1], value[-1])
    dtype = DTYPES[dtype_of(found.query)]
    mask = places[3] if found.mask is not None else None
    shape = Attention(*sizes, found.scale, places[0], places[1], places[2], mask, found.merged, dtype)
    inputs = [lowering.with_slack(operand[0]) for operand in operands if operand is not None]
    options = {"macs": shape.macs, "label": f"attention_{SUFFIXES[dtype]}"}
    emit_end(lowering, attention, [shape, lowering.level(dtype)], found.nodes, inputs, "dense", **options)
    return True


@rule(aten.mul.Tensor)
def multiply(lowering: Lowering, node: fx.Node) -> None:
    """A product with a number may be the scaling of an attention's queries."""
    if _factor(node) is None or not lower_float_attention(lowering, node):
        fallback(lowering, node)
