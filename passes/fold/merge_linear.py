"""merge-linear: two linear layers without an activation between are one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import layer_of, set_parameters
from .match import aten, is_call


@register
@dataclass(frozen=True)
class MergeLinear(Pass):
    """Multiplies the weights of consecutive linear layers.

        %h = aten.linear(%x, W1, b1);  %y = aten.linear(%h, W2, b2)   ->  %y = aten.linear(%x, W2 W1, W2 b1 + b2)

    W1 is (H, I), W2 (O, H). Only where nothing else reads %h and O * I <= H * (I + O), so that multiply-accumulates and
    parameters never grow: a low-rank factorization stays factorized.

    Args:
        force: merge where that makes the layer larger, too.
    """

    force: bool = False

    name = "merge-linear"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = sum(self._merge(program, node) for node in list(program.nodes))
        return PassResult(program, merged > 0, {"merged": merged})

    def _merge(self, program: Program, node: fx.Node) -> bool:
        if not is_call(node, aten.linear.default) or not is_call(node.args[0], aten.linear.default):
            return False
        second, first = layer_of(program, node), layer_of(program, node.args[0])
        if first is None or second is None or single_user(first.node) is not node:
            return False
        if not self.force and second.out_channels * first.in_channels > first.out_channels * (
            first.in_channels + second.out_channels
        ):
            return False
        w1, w2 = first.weight.double(), second.weight.double()
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = w2 @ first.bias64() + second.bias64()
        set_parameters(program, second, w2 @ w1, bias)
        node.update_arg(0, first.input)
        program.graph.erase_node(first.node)
        return True
