"""Taking the zeros out of a program's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.dialect import gw
from ...ir.dialect.sparse import to_bitmask
from ...ir.program import Program, Stage, origin_of
from ..base import EXACT, Pass, PassContext, PassResult, register
from ..rules import matching

aten = torch.ops.aten

#: Layers whose weight, argument 1, kernels decode.
LAYERS = frozenset({aten.convolution.default, aten.linear.default, gw.convolution.default, gw.linear.default})


@register
@dataclass(frozen=True)
class CompressSparse(Pass):
    """Stores weights as a bit for each value and the values that are not zero, where that is smaller.

        %y = linear(%x, weight)                 %w = gw.from_bitmask(mask, values, shape)       mask: u8 (O, inputs / 8)
                                        ->      %y = linear(%x, %w)                             values: float32 or s8 (entries,)

    A float weight with a share s of zeros takes 1 - s + 1/32 of its bytes, an s8 weight 1 - s + 1/8; weights packed below 8
    bits stay packed unless bits and s8 values are smaller. A pattern such as 2:4 needs no format of its own: the two
    bits that name the position of each of its values are a bit for each weight. The artifact holds the same bits and values,
    and decodes a layer's weight into the memory of a run right before the layer, so that outputs are the same, bit for bit in
    integer layers. That costs time wherever weights are not what a run waits for; `layers` leaves layers out.

    It is the last pass of a pipeline: after `lower-integer` where the program is quantized, since what comes in between reads
    weights as parameters.

    Options:
        layers: origins (or globs) of the layers whose weights may be stored so.

    Stats: layers, and the bytes of their weights before and after.
    """

    name: ClassVar[str] = "compress-sparse"
    effect: ClassVar = EXACT
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED, Stage.INTEGER)

    layers: tuple[str, ...] = ("*",)

    def run(self, program: Program, context: PassContext) -> PassResult:
        before = after = count = 0
        for weight, layer in self._weights(program):
            values = _values(program, weight)
            parts = None if values is None else to_bitmask(values)
            old, new = sum(map(_bytes, _tensors(program, weight))), sum(map(_bytes, parts or ()))
            if parts is None or new >= old:
                continue
            _store(program, weight, layer, parts)
            before, after, count = before + old, after + new, count + 1
        program.sweep()
        return PassResult(program, count > 0, {"layers": count, "bytes_before": before, "bytes_after": after})

    def _weights(self, program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Each weight that only layers asked for read, and the first of them."""
        layers = [n for n in program.nodes if n.target in LAYERS]
        names = set(matching(self.layers, [origin_of(n) for n in layers], f"'layers' of {self.name}")) if layers else ()
        asked = {n for n in layers if origin_of(n) in names}
        seen: set[fx.Node] = set()
        for layer in layers:
            weight: fx.Node = layer.args[1]  # type: ignore[assignment]
            if weight not in seen and all(_reads(n, weight) and n in asked for n in weight.users):
                yield weight, layer
            seen.add(weight)


def _reads(layer: fx.Node, weight: fx.Node) -> bool:
    return layer.target in LAYERS and layer.args[1] is weight and layer.all_input_nodes.count(weight) == 1


def _tensors(program: Program, weight: fx.Node) -> list[torch.Tensor]:
    nodes = [weight] if weight.op == "get_attr" else weight.all_input_nodes
    return [value for node in nodes if (value := program.parameter(node)) is not None]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _values(program: Program, weight: fx.Node) -> torch.Tensor | None:
    """The float32 or s8 values of a weight; None where it is computed or of another type."""
    if weight.target is gw.unpack.default:
        packed, bits, shape, *zero = weight.args
        return gw.unpack(program.parameter(packed), bits, shape, *map(program.parameter, zero))
    value = program.parameter(weight)
    return value.detach() if value is not None and value.dtype in (torch.float32, torch.int8) else None


def _store(program: Program, weight: fx.Node, layer: fx.Node, parts: tuple[torch.Tensor, torch.Tensor]) -> None:
    source = weight if weight.op == "get_attr" else weight.all_input_nodes[0]
    shape = list(weight.meta["val"].shape)
    nodes = [
        program.add_parameter(f"{source.target}_{what}", tensor, layer, origin_of(weight))
        for what, tensor in zip(("mask", "values"), parts, strict=True)
    ]
    weight.replace_all_uses_with(program.insert(gw.from_bitmask.default, (*nodes, shape), layer, origin_of(weight)))
