"""cast-float: a float program in half precision, with float32 at its edges."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.program import Program, dtype_of, infer_node, tensors_of
from ..base import LOSSY, Pass, PassContext, PassResult, register
from ..fold.match import aten

#: Products of a value and a parameter, or of two values, and table look-ups: always in half precision.
PRODUCTS = frozenset(
    {
        aten.convolution.default, aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default,
        aten.matmul.default, aten.embedding.default,
    }
)  # fmt: skip

#: Products of 8-bit floats name the type of their result, in the last place; scale and bias are float32 whatever it is.
FP8_PRODUCTS = frozenset({gw.linear_fp8.default, gw.convolution_fp8.default})

#: Ops that take any float type.
CASTS = frozenset({aten._to_copy.default, gw.quantize_fp8.default})

#: In half precision where a value that they read is: torch computes each in float32 and rounds its result once.
FOLLOWERS = frozenset(
    {
        aten.relu.default, aten.relu6.default, aten.hardtanh.default, aten.clamp.default, aten.sigmoid.default,
        aten.silu.default, aten.gelu.default, aten.tanh.default, aten.hardswish.default, aten.hardsigmoid.default,
        aten.leaky_relu.default, aten.elu.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
        aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.maximum.default, aten.minimum.default,
        aten.neg.default, aten.abs.default, aten.layer_norm.default, aten.softmax.int, aten._softmax.default,
        aten.max_pool2d.default, aten.avg_pool2d.default,
    }
)  # fmt: skip

#: The same values at other places.
MOVES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int,
        aten.permute.default, aten.transpose.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.constant_pad_nd.default,
        aten.pad.default, aten.roll.default, aten.flip.default, aten.repeat.default, aten.index_select.default,
        operator.getitem,
    }
)  # fmt: skip


@register
@dataclass(frozen=True)
class CastFloat(Pass):
    """Stores the parameters of products and the values between layers in 16 bits; inputs and outputs keep their types.

        %h = convolution(%x, W, b);  %y = relu(%h);  %m = mean(%y);  output %m
        ->
        %c = _to_copy(%x, bfloat16);  %h = convolution(%c, W', b');  %y = relu(%h)
        %s = _to_copy(%y, float32);   %m = mean(%s);  output %m                          W', b': rounded to nearest even

    The program means what torch computes: every op on half-precision tensors computes in float32 (products accumulate there;
    softmax, layer normalization and windows keep their inside there) and rounds its result once. Values stay float32 in
    reductions (means and sums round twice or overflow in half precision), in ops that no layer feeds, such as the arithmetic
    of a mask, in layers whose weight is stored as codes or without its zeros, and in every op not named in this file. Layers that
    multiply 8-bit floats (`quantize-fp8`) only round their result to the type.

    A backend may keep float32 between ops that one kernel computes (a layer with its addition and activation, an attention): it
    rounds less often than torch. Where a target's full rate is that of products summed in 16 bits, a backend may add a few of a
    layer's there, within a bound that it states. A parameter beyond the type's range becomes its largest number (`saturated` in
    the stats); a value beyond it becomes infinite, as in torch.

    Args:
        dtype: bfloat16 (8 bits of exponent, unit roundoff 2^-8) or float16 (5 bits, largest 65504, unit roundoff 2^-11).

    Source: Kalamkar et al. 2019 (arXiv:1905.12322); Micikevicius et al. 2018 (arXiv:1710.03740) on what stays in float32.
    """

    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    name = "cast-float"
    effect = LOSSY
    leaves_half = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        cast = _Cast(program, getattr(torch, self.dtype))
        for node in list(program.nodes):
            if node.op == "call_function":
                cast.visit(node)
        cast.finish()
        stats = {"layers": cast.layers, "casts": cast.casts, "parameters": len(cast.parameters), "saturated": cast.saturated}
        return PassResult(program, bool(cast.casts or cast.parameters or cast.retyped), stats)


class _Cast:
    """One walk over the graph in order: each node's operands are brought into the type that it computes in."""

    def __init__(self, program: Program, half: torch.dtype) -> None:
        self.program, self.half = program, half
        self.layers = self.casts = self.retyped = self.saturated = 0
        self.parameters: dict[fx.Node, fx.Node] = {}
        self._values: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        if node.target in FP8_PRODUCTS:
            self.layers += 1
            self.retyped += node.args[-1] is not self.half
            node.update_arg(len(node.args) - 1, self.half)
            infer_node(self.program, node)
            return
        operands = [n for n in node.all_input_nodes if self._is(n, torch.float32, self.half)]
        if not operands or node.target in CASTS:
            return
        wanted = self.half if self._in_half(node) else torch.float32
        self.layers += wanted is self.half and node.target in PRODUCTS
        for operand in operands:
            if node.target is not operator.getitem and dtype_of(operand) is not wanted:
                node.replace_input_with(operand, self._as(operand, wanted, node))
        infer_node(self.program, node)

    def finish(self) -> None:
        output = self.program.output
        for value in dict.fromkeys(self.program.outputs):
            if self._is(value, self.half):
                output.replace_input_with(value, self._as(value, torch.float32, output))

    def _is(self, node: Any, *dtypes: torch.dtype) -> bool:
        values = tensors_of(node)
        return bool(values) and all(v.dtype in dtypes for v in values)

    def _in_half(self, node: fx.Node) -> bool:
        if any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values())):
            return False  # it names the type of its result
        if node.target in PRODUCTS:
            return all(n.op == "get_attr" or not _compressed(n) for n in node.all_input_nodes)
        values = [n for n in node.all_input_nodes if n.op != "get_attr"]
        return node.target in FOLLOWERS | MOVES and any(self._is(n, self.half) for n in values)

    def _as(self, operand: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
        """The operand in another type: a parameter in it, what a cast was made from, or a cast behind the operand."""
        if operand.op == "get_attr" and dtype is self.half:
            return self._parameter(operand)
        if (operand, dtype) not in self._values:
            with self.program.graph.inserting_after(operand):
                made = self.program.graph.call_function(aten._to_copy.default, (operand,), {"dtype": dtype})
            made.meta["origin"] = operand.meta.get("origin", "") or before.meta.get("origin", "")
            infer_node(self.program, made)
            self._values[operand, dtype] = made
            self.casts += 1
        return self._values[operand, dtype]

    def _parameter(self, node: fx.Node) -> fx.Node:
        if node not in self.parameters:
            value = self.program.parameter(node)
            assert value is not None
            most = torch.finfo(self.half).max
            beyond = (value.abs() > most) & value.isfinite()
            self.saturated += int(beyond.sum())
            cast = torch.where(beyond, value.clamp(-most, most), value).detach().to(self.half)
            self.parameters[node] = self.program.add_parameter(str(node.target), cast, before=node)
        return self.parameters[node]


def _compressed(node: fx.Node) -> bool:
    """Whether a layer's operand is a weight that is stored as codes or without its zeros: its layer computes in float32."""
    return getattr(node.target, "namespace", "") == "gw" and node.target not in FP8_PRODUCTS
