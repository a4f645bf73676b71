"""merge-parallel: layers of one input whose results are added are one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .layer import Layer, layer_of, set_parameters
from .match import aten, channel_vector, is_call, same_type


@register
@dataclass(frozen=True)
class MergeParallel(Pass):
    """Adds up the weights of parallel branches, and takes in a residual connection, scaled and shifted or plain, as the identity.

        aten.add.Tensor(aten.linear(%x, W1, b1), aten.linear(%x, W2, b2))   ->   aten.linear(%x, W1 + W2, b1 + b2)
        aten.add.Tensor(conv3x3(%x, W1), conv1x1(%x, W2))                   ->   conv3x3(%x, W1 + W2 in the middle)
        aten.add.Tensor(conv3x3(%x, W1), %x * s + t)                        ->   conv3x3(%x, W1 + s I in the middle, b1 + t)

    Convolutions of one stride and one number of groups (depthwise ones, too), where the taps of the smaller kernel are taps of
    the larger one. A sum of several branches merges one by one. Nothing else may read the merged results.

    Source: Ding et al. 2021, RepVGG (arXiv:2101.03697), section 3.3, and its generalization (arXiv:2103.13425).
    """

    name = "merge-parallel"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = 0
        while (count := sum(_merge(program, node) for node in list(program.nodes))) > 0:
            merged += count
        return PassResult(program, merged > 0, {"merged": merged})


def _merge(program: Program, node: fx.Node) -> bool:
    if not is_call(node, aten.add.Tensor) or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
        return False
    for first, second in (node.args, node.args[::-1]):
        layer = layer_of(program, first)
        if layer is None or layer.transposed or single_user(layer.node) is not node or not same_type(layer.node, node):
            continue
        other = layer_of(program, second)
        affine = _affine(program, layer, second, node)
        added = shift = None
        if affine is not None:
            added, shift = _identity(layer, affine.scale), affine.shift
        elif other is not None and other.input is layer.input and single_user(other.node) is node and same_type(other.node, node):
            added, shift = _embedded(other, layer), None if other.bias is None else other.bias64()
        if added is None:
            continue
        weight, bias = layer.weight.double() + added, layer.bias
        if shift is not None:
            bias = layer.bias64() + shift
        set_parameters(program, layer, weight, bias)
        node.replace_all_uses_with(layer.node)
        program.graph.erase_node(node)
        program.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return True
    return False


@dataclass(frozen=True)
class _Affine:
    """x * scale + shift by channel, float64 (C,); shift None: zero."""

    scale: torch.Tensor
    shift: torch.Tensor | None


def _affine(program: Program, layer: Layer, value: Any, reader: fx.Node) -> _Affine | None:
    """What `value` is of the layer's input, where it is that input or a batch normalization of it that `reader` alone reads."""
    shift = None
    scale = torch.ones(layer.in_channels, dtype=torch.float64, device=layer.weight.device)
    if is_call(value, aten.add.Tensor) and not value.kwargs and single_user(value) is reader:
        shift = channel_vector(program, value.args[1], value, layer.axis)
        if shift is None:
            return None
        value, reader = value.args[0], value
    if is_call(value, aten.mul.Tensor) and single_user(value) is reader:
        found = channel_vector(program, value.args[1], value, layer.axis)
        if found is None:
            return None
        scale, value = found, value.args[0]
    return _Affine(scale, shift) if value is layer.input and same_type(layer.input, layer.node) else None


def _identity(layer: Layer, scale: torch.Tensor) -> torch.Tensor | None:
    """The weight, in float64, with which the layer would give its input times `scale`; None where it has none."""
    if layer.in_channels != layer.out_channels or any(s != 1 for s in layer.stride):
        return None
    taps = []
    for kernel, padding, dilation in zip(layer.kernel, layer.padding, layer.dilation, strict=True):
        if padding % dilation or padding // dilation >= kernel:
            return None
        taps.append(padding // dilation)
    weight = torch.zeros(layer.weight.shape, dtype=torch.float64, device=layer.weight.device)
    channels = torch.arange(layer.out_channels)
    weight[(channels, channels % layer.weight.shape[1], *taps)] = scale
    return weight


def _embedded(small: Layer, large: Layer) -> torch.Tensor | None:
    """The weight of `small`, in float64, as taps of a kernel like that of `large`; None where they do not meet.

    Tap k of a kernel reads the input at stride * position + dilation * k - padding.
    """
    if small.transposed or small.groups != large.groups or small.stride != large.stride or small.axis != large.axis:
        return None
    weight = torch.zeros(large.weight.shape, dtype=torch.float64, device=large.weight.device)
    if small.weight.shape[:2] != large.weight.shape[:2]:
        return None
    places = []
    geometry = (small.kernel, small.padding, small.dilation, large.kernel, large.padding, large.dilation)
    for k1, p1, d1, k2, p2, d2 in zip(*geometry, strict=True):
        taps = [d1 * k - p1 + p2 for k in range(k1)]
        if any(t % d2 or not 0 <= t // d2 < k2 for t in taps):
            return None
        places.append(torch.tensor([t // d2 for t in taps]))
    if not places:
        return small.weight.double()
    index = torch.meshgrid(*places, indexing="ij")
    weight[(slice(None), slice(None), *index)] = small.weight.double()
    return weight
