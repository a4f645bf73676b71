"""Convolution, transposed convolution and linear seen alike: a weight over channels, so that scales and shifts fold one way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ...ir.program import Program
from .match import argument, aten, is_call


@dataclass(frozen=True)
class Layer:
    """One layer with constant parameters.

    Attributes:
        weight: (O, I/groups, *kernel); (I, O/groups, *kernel) where transposed; (O, I) for linear.
        bias: (O,) or None.
        axis: the channel dimension of the layer's input and output.
    """

    node: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    axis: int
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def is_conv(self) -> bool:
        return bool(self.stride)

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def input(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    def bias64(self) -> torch.Tensor:
        """The bias in float64, zeros where there is none. (O,)"""
        if self.bias is None:
            return torch.zeros(self.out_channels, dtype=torch.float64, device=self.weight.device)
        return self.bias.to(torch.float64)


def layer_of(program: Program, node: object) -> Layer | None:
    """The layer at a node; None where it is no layer, or where its parameters are not constants."""
    if not is_call(node, aten.convolution.default, aten.linear.default):
        return None
    weight, bias_node = program.parameter(node.args[1]), argument(node, 2, "bias")
    bias = program.parameter(bias_node)
    if weight is None or not weight.is_floating_point() or (bias_node is not None and bias is None):
        return None
    rank = node.meta["val"].dim()
    if node.target is aten.linear.default:
        return Layer(node, weight, bias, axis=rank - 1) if weight.dim() == 2 and rank >= 2 else None
    if rank != weight.dim():
        return None
    stride, padding, dilation, transposed, _, groups = node.args[3:9]
    return Layer(
        node, weight, bias, 1, groups, transposed, tuple(stride), tuple(padding), tuple(dilation)  # type: ignore[arg-type]
    )  # fmt: skip


def scaled(layer: Layer, scale: torch.Tensor, side: str) -> torch.Tensor:
    """The weight in float64 with its output (`side="out"`) or input (`side="in"`) channels multiplied by `scale`."""
    weight = layer.weight.to(torch.float64)
    grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
    outer = (side == "out") != layer.transposed  # outputs are the first weight dimension, unless transposed
    spread = (layer.groups, -1, 1) if outer else (layer.groups, 1, -1)
    return (grouped * scale.reshape(*spread, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def set_parameters(program: Program, layer: Layer, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
    """Gives this layer parameters of its own; other readers of the old ones, and other clones, keep them.

    `weight` None keeps the weight that is there (and shares it still); `bias` None means that the layer has none.
    """
    name = str(layer.node.args[1].target)  # type: ignore[union-attr]
    origin = layer.node.meta.get("origin", "")
    dtype = layer.weight.dtype
    weight_node = layer.node.args[1]
    if weight is not None:
        weight_node = program.add_parameter(name, weight.to(dtype), layer.node, origin)
    fresh_bias = None
    if bias is not None:
        old = argument(layer.node, 2, "bias")
        bias_name = str(old.target) if old is not None else f"{name.removesuffix('_weight')}_bias"
        fresh_bias = program.add_parameter(bias_name, bias.to(dtype), layer.node, origin)
    layer.node.args = (layer.node.args[0], weight_node, fresh_bias, *layer.node.args[3:])
    layer.node.kwargs = {}


def fold_after(program: Program, layer: Layer, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """layer(x) * scale + shift becomes layer'(x). `scale` and `shift` are float64 (O,) or None. Exact."""
    weight, bias = None, layer.bias
    if scale is not None:
        weight = scaled(layer, scale, "out")
        bias = None if layer.bias is None else layer.bias64() * scale
    if shift is not None:
        bias = shift + (0 if bias is None else bias.to(torch.float64))
    set_parameters(program, layer, weight, bias)


def can_fold_before(layer: Layer, shift: torch.Tensor | None) -> bool:
    """Whether layer(x * scale + shift) is one layer: padding adds zeros, not shifts, so a shift needs that there be none.

    A transposed convolution spreads each input over some of the outputs, so a shift never gives the same sum everywhere.
    """
    if shift is None or not bool(shift.any()):
        return True
    return not layer.transposed and not any(layer.padding)


def fold_before(program: Program, layer: Layer, scale: torch.Tensor | None, shift: torch.Tensor | None) -> None:
    """layer(x * scale + shift) becomes layer'(x). `scale` and `shift` are float64 (I,) or None; see `can_fold_before`."""
    weight, bias = None, layer.bias
    if shift is not None and bool(shift.any()):
        pushed = scaled(layer, shift, "in")
        bias = layer.bias64() + pushed.flatten(1).sum(1)
    if scale is not None:
        weight = scaled(layer, scale, "in")
    set_parameters(program, layer, weight, bias)


def reading_layers(program: Program, node: fx.Node) -> list[Layer] | None:
    """The layers that read a value as their input; None where any reader is something else."""
    layers = [layer_of(program, user) for user in node.users]
    if not layers or any(layer is None or layer.input is not node for layer in layers):
        return None
    found = [layer for layer in layers if layer is not None]
    return found if all(node not in layer.node.args[1:] for layer in found) else None
