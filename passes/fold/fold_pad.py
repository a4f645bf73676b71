"""fold-pad: explicit zero padding becomes padding of the convolution that reads it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.program import Program
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import argument, aten, is_call


@register
@dataclass(frozen=True)
class FoldPad(Pass):
    """Adds a symmetric spatial zero pad to the padding of a convolution.

        %p = aten.constant_pad_nd(%x, [1, 1, 2, 2], 0);  aten.convolution(%p, ..., padding=[0, 0])
     -> aten.convolution(%x, ..., padding=[2, 1])

    A pad whose two sides differ (TensorFlow's "same" at even strides) stays a node of its own: convolution padding is
    symmetric, and backends pad explicitly anyway. Pads of channels or batch, negative pads, other values than zero, other
    modes and transposed convolutions (whose padding means something else) stay too. Readers fold one by one; the pad goes with
    its last reader.
    """

    name = "fold-pad"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        folded = 0
        for node in list(program.nodes):
            if is_call(node, aten.convolution.default) and not node.args[6]:
                while _fold(node):  # a pad may read a pad
                    folded += 1
        program.sweep()
        return PassResult(program, folded > 0, {"folded": folded})


def _fold(node: fx.Node) -> bool:
    pad: fx.Node = node.args[0]  # type: ignore[assignment]
    sides = zero_padding(pad)
    padding: list[int] = list(node.args[4])  # type: ignore[arg-type]
    if sides is None or len(sides) > len(padding) or pad in node.args[1:3]:
        return False
    if any(low != high or low < 0 for low, high in sides):
        return False
    for offset, (low, _) in enumerate(reversed(sides), start=len(padding) - len(sides)):
        padding[offset] += low
    node.update_arg(0, pad.args[0])
    node.update_arg(4, padding)
    return True


def zero_padding(node: object) -> list[tuple[int, int]] | None:
    """(low, high) of each padded dimension, the last dimension first; None where the node is no zero pad."""
    if not is_call(node, aten.constant_pad_nd.default, aten.pad.default):
        return None
    sizes: list[int] = list(node.args[1])  # type: ignore[arg-type]
    constant = node.target is aten.constant_pad_nd.default or argument(node, 2, "mode", "constant") == "constant"
    value = argument(node, 2 if node.target is aten.constant_pad_nd.default else 3, "value", 0)
    if not constant or value not in (None, 0) or not all(isinstance(s, int) for s in sizes):
        return None
    return list(zip(sizes[::2], sizes[1::2], strict=True))
