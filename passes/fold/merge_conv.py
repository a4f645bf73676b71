"""merge-conv: two convolutions without an activation between are one with a larger kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Program, shape_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import Layer, layer_of, set_parameters
from .match import aten, is_call


@register
@dataclass(frozen=True)
class MergeConv(Pass):
    """Merges conv -> conv where the second has no padding and the merged kernel costs no more.

        %h = conv(%x, W1, stride s1, padding p1);  conv(%h, W2, stride s2)  ->  conv(%x, W, stride s1 s2, padding p1)
        W[o, i, s1 k2 + k1] = sum_m W2[o, m, k2] W1[m, i, k1],   b = b2 + sum_{m, k2} W2[o, m, k2] b1[m]

    The kernel is k1 + s1 (k2 - 1) wide. Groups become dense, but for two depthwise ones. Padding of the second would pad with
    zeros what the merged kernel computes from zeros: `linearize-activations` accepts that loss, this pass does not.

    Args:
        force: merge where multiply-accumulates or parameters grow, too.

    Source: Ding et al. 2021 (arXiv:2103.13425); depth compression by merging, Kim et al. 2023 (arXiv:2301.12187).
    """

    force: bool = False

    name = "merge-conv"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = 0
        for node in list(program.nodes):
            pair = conv_pair(program, node)
            if pair is None or any(pair[1].padding):
                continue
            grows = any(after > before for before, after in (macs(*pair), parameters(*pair)))
            if self.force or not grows:
                merge(program, *pair)
                merged += 1
        return PassResult(program, merged > 0, {"merged": merged})


def conv_pair(program: Program, node: fx.Node) -> tuple[Layer, Layer] | None:
    """(first, second) where `node` is a convolution that alone reads another one and both could be one: no dilation, static."""
    if not is_call(node, aten.convolution.default) or not is_call(node.args[0], aten.convolution.default):
        return None
    first, second = layer_of(program, node.args[0]), layer_of(program, node)
    return (first, second) if first is not None and second is not None and mergeable(first, second) else None


def mergeable(first: Layer, second: Layer) -> bool:
    """Whether second(first(x)) is a layer of x: two linear ones, or two plain convolutions without dilation; sizes static."""
    if len(first.node.users) != 1 or first.is_conv != second.is_conv:
        return False
    plain = not first.transposed and not second.transposed and {*first.dilation, *second.dilation} <= {1}
    return plain and all(isinstance(d, int) for n in (first.node, second.node) for d in shape_of(n))


def _depthwise(layer: Layer) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels


def _dense(layer: Layer) -> torch.Tensor:
    """The weight of one group, (O, I, *kernel), in float64."""
    weight = layer.weight.double()
    out, each = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    dense = weight.new_zeros((layer.out_channels, layer.in_channels, *layer.kernel))
    for group in range(layer.groups):
        rows = slice(group * out, (group + 1) * out)
        dense[rows, group * each : (group + 1) * each] = weight[rows]
    return dense


def _kernel(first: Layer, second: Layer) -> list[int]:
    sizes = zip(first.kernel, second.kernel, first.stride, strict=True)
    return [k1 + s1 * (k2 - 1) for k1, k2, s1 in sizes]


def _merged_shape(first: Layer, second: Layer) -> tuple[int, ...]:
    inputs = 1 if _depthwise(first) and _depthwise(second) else first.in_channels
    return (second.out_channels, inputs, *_kernel(first, second))


def macs(first: Layer, second: Layer) -> tuple[int, int]:
    """Multiply-accumulates of both layers, and of the one that they would be."""

    def places(layer: Layer) -> int:
        return math.prod(shape_of(layer.node)) // layer.out_channels

    before = sum(places(layer) * layer.weight.numel() for layer in (first, second))
    return before, places(second) * math.prod(_merged_shape(first, second))


def parameters(first: Layer, second: Layer) -> tuple[int, int]:
    """Weights of both layers, and of the one that they would be."""
    return first.weight.numel() + second.weight.numel(), math.prod(_merged_shape(first, second))


def merge(program: Program, first: Layer, second: Layer) -> None:
    """The second layer computes both; away from borders that the second pads, exactly."""
    bias = None
    if not first.is_conv:
        weight = second.weight.double() @ first.weight.double()
        total = second.weight.double()
    else:
        weight = _convolved(first, second)
        total = _dense(second).flatten(2).sum(2)
    if first.bias is not None or second.bias is not None:
        bias = second.bias64() + total @ first.bias64()
    set_parameters(program, second, weight, bias)
    node = second.node
    node.update_arg(0, first.input)
    if first.is_conv:
        stride = [a * b for a, b in zip(first.stride, second.stride, strict=True)]
        padding = [p1 + s1 * p2 for p1, s1, p2 in zip(first.padding, first.stride, second.padding, strict=True)]
        for index, value in ((3, stride), (4, padding), (8, second.groups if _depthwise(first) and _depthwise(second) else 1)):
            node.update_arg(index, value)
    program.graph.erase_node(first.node)


def _convolved(first: Layer, second: Layer) -> torch.Tensor:
    weight = first.weight.new_zeros(_merged_shape(first, second), dtype=torch.float64)
    both_depthwise = _depthwise(first) and _depthwise(second)
    w1, w2 = (layer.weight.double() if both_depthwise else _dense(layer) for layer in (first, second))
    for taps in torch.cartesian_prod(*map(torch.arange, second.kernel)).reshape(-1, len(second.kernel)).tolist():
        place = tuple(slice(s * t, s * t + k) for s, t, k in zip(first.stride, taps, first.kernel, strict=True))
        tap = w2[(slice(None), slice(None), *taps)]
        part = w1 * tap.reshape(-1, *[1] * (w1.dim() - 1)) if both_depthwise else torch.einsum("om,mi...->oi...", tap, w1)
        weight[(slice(None), slice(None), *place)] += part
    return weight
