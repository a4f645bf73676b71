"""What a program's outputs are: class scores, or values with a meaning of their own."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.program import Program, shape_of
from ..ir.verify import FAKE
from .quantize import operators as ops

aten = torch.ops.aten
_SOFTMAX = ops.SOFTMAX | {aten.log_softmax.int, aten._log_softmax.default}
_RESHAPES = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.flatten.using_ints,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    }
)


def class_scores(output: fx.Node) -> fx.Node:
    """The logits behind a softmax over the last axis; the output itself where there is none (log_softmax ignores shifts)."""
    node = _annotated(output)
    if node.target in _SOFTMAX and int(node.args[1]) % len(shape_of(node)) == len(shape_of(node)) - 1:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return output


def is_classifier(program: Program) -> bool:
    """Whether the one output is made by a linear layer of two or more outputs; a softmax or moves behind it are part of it."""
    outputs = program.outputs
    if len(outputs) != 1 or shape_of(outputs[0])[-1:] in ((), (1,)):
        return False
    node = _annotated(class_scores(outputs[0]))
    while node.target in _RESHAPES and shape_of(node)[-1] == shape_of(node.all_input_nodes[0])[-1:][0]:
        node = _annotated(node.all_input_nodes[0])
    return node.target is ops.LINEAR


def _annotated(node: fx.Node) -> fx.Node:
    """The value that a fake quantization holds on its grid; any other node itself."""
    return node.args[0] if node.target in FAKE else node  # type: ignore[return-value]
