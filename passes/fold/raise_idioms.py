"""raise-idioms: arithmetic that exporters write out becomes the layer or activation it means."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from ...ir.program import Program
from ..base import EXACT, Pass, PassContext, PassResult, register
from .canonicalize_activation import CLAMPS
from .idioms import activations, linear, movement, normalization, pooling, products
from .match import aten

Rule = Callable[[Program, fx.Node], fx.Node | None]

#: Rules by the op that ends their pattern; the first that matches wins.
RULES: dict[Any, tuple[Rule, ...]] = {
    aten.mul.Tensor: (
        activations.gated_activation,
        activations.hardsigmoid_of_product,
        normalization.layer_norm_of_arithmetic,
        normalization.layer_norm_weight,
        products.scale_before_matmul,
        products.merge_scalar_product,
    ),
    aten.div.Tensor: (
        activations.gated_activation,
        activations.hardsigmoid_of_product,
        normalization.layer_norm_of_arithmetic,
        products.scale_before_matmul,
        products.merge_scalar_product,
    ),
    aten.add.Tensor: (normalization.layer_norm_bias,),
    aten.matmul.default: (linear.linear_of_matmul, products.scale_before_left_operand),
    aten.mm.default: (linear.linear_of_matmul,),
    aten.addmm.default: (linear.linear_of_addmm,),
    aten.reshape.default: (linear.linear_without_flattening,),
    aten.view.default: (linear.linear_without_flattening,),
    aten.adaptive_avg_pool2d.default: (pooling.mean_of_global_pool,),
    aten._adaptive_avg_pool2d.default: (pooling.mean_of_global_pool,),
    aten.mean.dim: (pooling.positive_mean_dims,),
    aten._softmax.default: (normalization.whole_softmax,),
    operator.getitem: (normalization.whole_layer_norm, movement.slice_of_split),
    **dict.fromkeys(CLAMPS, (activations.hardsigmoid_of_clamp,)),
}


@register
@dataclass(frozen=True)
class RaiseIdioms(Pass):
    """Replaces written-out arithmetic by whole layers, so that PyTorch and ONNX models end alike and quantizers see layers.

        %e = aten.erf(aten.div(%x, 1.41421));  %y = aten.mul(aten.mul(%x, 0.5), aten.add(%e, 1))   ->  %y = aten.gelu(%x)
        %y = aten.matmul(%x, aten.permute(%W, [1, 0]))                                             ->  %y = aten.linear(%x, %W)

    Raised are silu, hardsigmoid, hardswish, gelu (both forms), mish, layer_norm, softmax, linear (from matmul, mm, addmm), slice
    (from split) and the global mean; a scalar factor of a matrix product moves to its left operand. Each rule's docstring states
    its pattern and source (`passes/fold/idioms/`). A rule fires only where nothing else reads the values inside its pattern.
    Literals match to one part in 100,000. Biases added afterwards fold with fold-scale-shift.
    """

    name = "raise-idioms"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        raised: Counter[str] = Counter()
        # Every rule leaves fewer nodes or an op that ends no rule's pattern, so this ends.
        while True:
            found = _sweep(program)
            if not found:
                return PassResult(program, bool(raised), dict(raised))
            raised.update(found)
            program.sweep()


def _sweep(program: Program) -> Counter[str]:
    """One walk from the outputs up, so that the largest pattern around a node is tried first."""
    raised: Counter[str] = Counter()
    erased: set[fx.Node] = set()
    for node in reversed(list(program.nodes)):
        if node in erased or node.op != "call_function" or not node.users:
            continue
        for rule in RULES.get(node.target, ()):
            replacement = rule(program, node)
            if replacement is not None:
                node.replace_all_uses_with(replacement)
                erased |= _erase_with_inputs(program, node)
                raised[rule.__name__] += 1
                break
    return raised


def _erase_with_inputs(program: Program, node: fx.Node) -> set[fx.Node]:
    """Erases a node and every call that only it needed; dead readers would make the next rule see several users."""
    erased: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in erased or current.users or current.op not in ("call_function", "get_attr"):
            continue
        inputs = current.all_input_nodes
        program.graph.erase_node(current)
        erased.add(current)
        waiting.extend(inputs)
    return erased
