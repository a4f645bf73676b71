"""merge-pointwise-conv: a 1x1 convolution merges with the convolution before or after it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Program, shape_of, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import Layer, layer_of, set_parameters
from .match import aten, is_call


@register
@dataclass(frozen=True)
class MergePointwiseConv(Pass):
    """Merges conv1x1 -> conv and conv -> conv1x1 where nothing else reads the value between.

        1x1 first:   W[o, i, k] = sum_m W2[o, m, k] W1[m, i],   b = b2 + sum_{m, k} W2[o, m, k] b1[m]
        1x1 second:  W[o, i, k] = sum_m W2[o, m] W1[m, i, k],   b = b2 + sum_m W2[o, m] b1[m],   strides multiply

    Any number of spatial dimensions; groups and transposed convolutions are left alone. With the 1x1 first, padding of the second
    pads its output, so b1 must be zero or there must be no padding. Only where multiply-accumulates do not grow and the two
    layers hold no fewer parameters.

    Args:
        force: merge where that makes the layer larger, too.

    Source: Ding et al. 2021 (arXiv:2103.13425), transform III.
    """

    force: bool = False

    name = "merge-pointwise-conv"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = sum(self._merge(program, node) for node in list(program.nodes))
        return PassResult(program, merged > 0, {"merged": merged})

    def _merge(self, program: Program, node: fx.Node) -> bool:
        if not is_call(node, aten.convolution.default) or not is_call(node.args[0], aten.convolution.default):
            return False
        second, first = layer_of(program, node), layer_of(program, node.args[0])
        if first is None or second is None or single_user(first.node) is not node:
            return False
        if any(layer.transposed or layer.groups != 1 for layer in (first, second)):
            return False
        merge = _pointwise_first(first, second) or _pointwise_second(first, second)
        if merge is None or not (self.force or _is_smaller(merge[0], first, second)):
            return False
        weight, stride, padding, dilation = merge
        bias = None
        if first.bias is not None or second.bias is not None:
            bias = second.bias64() + second.weight.double().flatten(2).sum(2) @ first.bias64()
        set_parameters(program, second, weight, bias)
        node.update_arg(0, first.input)
        for index, value in ((3, stride), (4, padding), (5, dilation)):
            node.update_arg(index, list(value))
        program.graph.erase_node(first.node)
        return True


Merged = tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _is_pointwise(layer: Layer) -> bool:
    return set(layer.kernel) == {1} and set(layer.padding) == {0}


def _pointwise_first(first: Layer, second: Layer) -> Merged | None:
    """Weight, stride, padding and dilation of conv(conv1x1(x)); None where that is no convolution of x."""
    if not _is_pointwise(first) or set(first.stride) != {1}:
        return None
    if any(second.padding) and first.bias is not None and bool(first.bias.any()):
        return None
    weight = torch.einsum("om...,mi->oi...", second.weight.double(), first.weight.double().flatten(1))
    return weight, second.stride, second.padding, second.dilation


def _pointwise_second(first: Layer, second: Layer) -> Merged | None:
    """The same of conv1x1(conv(x)). Strides multiply: ((n - 1) // s1) // s2 = (n - 1) // (s1 * s2)."""
    if not _is_pointwise(second):
        return None
    weight = torch.einsum("om,mi...->oi...", second.weight.double().flatten(1), first.weight.double())
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    return weight, stride, first.padding, first.dilation


def _is_smaller(weight: torch.Tensor, first: Layer, second: Layer) -> bool:
    """Neither multiply-accumulates nor parameters grow. False where a spatial size is symbolic."""
    middle, final = shape_of(first.node)[2:], shape_of(second.node)[2:]
    if not all(isinstance(d, int) for d in (*middle, *final)):
        return False
    before = math.prod(middle) * first.weight.numel() + math.prod(final) * second.weight.numel()
    parameters = first.weight.numel() + second.weight.numel()
    return math.prod(final) * weight.numel() <= before and weight.numel() <= parameters
