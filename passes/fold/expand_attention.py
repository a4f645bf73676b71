"""expand-attention: scaled dot-product attention becomes the matrix products it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.errors import PassError
from ...ir.program import Program, dtype_of, origin_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import argument, aten, is_call, reshape_arguments, substitute


@register
@dataclass(frozen=True)
class ExpandAttention(Pass):
    """Writes attention out, with the scale on the query side, where it can fold into the query projection.

        %y = aten.scaled_dot_product_attention(%q, %k, %v, mask)
     -> %s = aten.matmul(aten.mul(%q, scale), aten.permute(%k, [0, 1, 3, 2]))
        %w = aten.softmax(%s + mask, -1)
        %y = aten.matmul(%w, %v)

    q is (..., L, E), k (..., S, E), v (..., S, Ev), the mask broadcasts to (..., L, S); scale is 1 / sqrt(E) by default. Masked
    scores are the lowest finite number rather than minus infinity, so that no later range estimate meets an infinity; the
    softmax of both is zero. Rows that a boolean mask hides altogether are zero, as in torch. A float mask is added as it is: a
    row of it that is minus infinity everywhere gives NaN here, zeros in torch.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), equation 1; grouped queries: Ainslie et al. 2023 (arXiv:2305.13245).

    Raises:
        PassError: attention dropout, a causal mask over symbolic lengths, or grouped queries of other than four dimensions.
    """

    name = "expand-attention"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        nodes = [n for n in program.nodes if is_call(n, aten.scaled_dot_product_attention.default)]
        for node in nodes:
            substitute(program, node, _expand(program, node))
        return PassResult(program, bool(nodes), {"expanded": len(nodes)})


def _expand(program: Program, node: fx.Node) -> fx.Node:
    query, key, value = node.args[:3]
    if argument(node, 4, "dropout_p", 0.0):
        raise PassError(f"{_where(node)} drops attention weights at random; set dropout_p to 0 at inference and capture again")
    if node.kwargs.get("enable_gqa", False):
        key, value = (_repeat_heads(program, node, query, x) for x in (key, value))
    scale = node.kwargs.get("scale")
    scale = 1 / math.sqrt(query.meta["val"].shape[-1]) if scale is None else scale  # type: ignore[union-attr]
    rank = key.meta["val"].dim()  # type: ignore[union-attr]

    def add(target: Any, *args: Any) -> fx.Node:
        return program.insert(target, args, before=node)

    transposed = add(aten.permute.default, key, [*range(rank - 2), rank - 1, rank - 2])
    scores = add(aten.matmul.default, add(aten.mul.Tensor, query, scale), transposed)
    mask = _causal(program, node, scores) if argument(node, 5, "is_causal", False) else argument(node, 3, "attn_mask")
    hidden = None
    if mask is not None:
        scores, hidden = _masked(program, node, scores, mask)
    weights = add(aten.softmax.int, scores, -1)
    if hidden is not None:
        weights = add(aten.where.self, hidden, weights, _number(program, node, 0.0, scores))
    return add(aten.matmul.default, weights, value)


def _where(node: fx.Node) -> str:
    return f"attention at '{node.name}' (from {origin_of(node)})"


def _repeat_heads(program: Program, node: fx.Node, query: Any, x: Any) -> fx.Node:
    """(B, H/n, S, E) to (B, H, S, E), each head n times in a row."""
    shape, heads = x.meta["val"].shape, query.meta["val"].shape[1]
    if len(shape) != 4 or not isinstance(heads, int):
        raise PassError(f"{_where(node)} has grouped queries of {len(shape)} dimensions; give (batch, heads, length, width)")
    repeats = heads // shape[1]
    if repeats == 1:
        return x
    spread = program.insert(aten.unsqueeze.default, (x, 2), node)
    spread = program.insert(aten.expand.default, (spread, [-1, -1, repeats, -1, -1]), node)
    merged = reshape_arguments(x)
    if merged is None:
        raise PassError(f"{_where(node)} has grouped queries and several symbolic dimensions; capture it with fixed lengths")
    return program.insert(aten.reshape.default, (spread, [merged[0], heads, *merged[2:]]), node)


def _causal(program: Program, node: fx.Node, scores: fx.Node) -> fx.Node:
    """The lower triangle, diagonal included, as a boolean parameter (L, S)."""
    length, width = scores.meta["val"].shape[-2:]
    if not (isinstance(length, int) and isinstance(width, int)):
        raise PassError(f"{_where(node)} is causal over a symbolic length; capture it with a fixed length, or pass attn_mask")
    return program.add_parameter("causal_mask", torch.ones(length, width, dtype=torch.bool).tril(), node)


def _masked(program: Program, node: fx.Node, scores: fx.Node, mask: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Masked scores, and the boolean mask where some of its rows may hide everything."""
    if dtype_of(mask) != torch.bool:
        return program.insert(aten.add.Tensor, (scores, mask), node), None
    lowest = torch.finfo(dtype_of(scores)).min
    constant = program.parameter(mask)
    if constant is not None and bool(constant.any(-1).all()):
        bias = torch.zeros(constant.shape, dtype=dtype_of(scores)).masked_fill_(~constant, lowest)
        fresh = program.add_parameter(f"{mask.target}_bias", bias, node)
        return program.insert(aten.add.Tensor, (scores, fresh), node), None
    return program.insert(aten.where.self, (mask, scores, _number(program, node, lowest, scores)), node), mask


def _number(program: Program, node: fx.Node, value: float, like: fx.Node) -> fx.Node:
    return program.add_parameter("mask_value", torch.tensor(value, dtype=dtype_of(like)), node)
