"""Merging and dropping of tokens: float ops of fixed counts, bit-exact in float and in integer programs."""

from __future__ import annotations

from torch import fx

from ....ir.dialect import gw
from ....ir.program import shape_of
from ..kernels import tokens
from ..lower import Lowering, rule
from ..values import arguments, of_node


@rule(gw.match_tokens.default)
def match_tokens(lowering: Lowering, node: fx.Node) -> None:
    keys, merged, protected = arguments(node)
    spec = (*shape_of(keys), int(merged), int(protected))
    out = lowering.kernel(tokens.match_tokens, *spec, inputs=[lowering.dense(keys)], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.keep_tokens.default)
def keep_tokens(lowering: Lowering, node: fx.Node) -> None:
    score, kept, protected = arguments(node)
    spec = (*shape_of(score), int(kept), int(protected))
    out = lowering.kernel(tokens.keep_tokens, *spec, inputs=[lowering.dense(score)], nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))


@rule(gw.sum_tokens.default)
def sum_tokens(lowering: Lowering, node: fx.Node) -> None:
    x, place, kept = arguments(node)
    inputs = [lowering.dense(x), lowering.dense(place)]
    out = lowering.kernel(tokens.sum_tokens, *shape_of(x), int(kept), inputs=inputs, nodes=(node,))
    lowering.bind(node, of_node(node, dense=out))
