"""eliminate-common-subexpressions: computes each value once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.program import Program
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import is_pure, substitute


@register
@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Merges calls of one op with equal arguments, and reads of one parameter.

        %a = aten.relu(%x);  %b = aten.relu(%x);  %c = aten.add(%a, %b)   ->  %a = aten.relu(%x);  %c = aten.add(%a, %a)

    Random ops stay apart. Two parameters merge only where they share memory (tied weights): equal values (two zero biases)
    may part again in a later fine-tune.

    Source: Cocke, "Global common subexpression elimination", 1970; local value numbering on a straight-line program.
    """

    name = "eliminate-common-subexpressions"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        seen: dict[Hashable, fx.Node] = {}
        merged = 0
        for node in list(program.nodes):
            key = _key(program, node)
            if key is None:
                continue
            if key in seen:
                substitute(program, node, seen[key])
                merged += 1
            else:
                seen[key] = node
        return PassResult(program, merged > 0, {"merged": merged})


def _key(program: Program, node: fx.Node) -> Hashable | None:
    if node.op == "get_attr":
        return _memory(program.parameter(node))  # type: ignore[arg-type]
    if not is_pure(node):
        return None
    return (node.target, _hashable(node.args), _hashable(tuple(sorted(node.kwargs.items()))))


def _memory(value: torch.Tensor) -> Hashable:
    """Where a tensor lives: tied weights have two names and one memory. An empty tensor has no address of its own."""
    where = value.data_ptr() if value.numel() else id(value)
    return ("get_attr", where, tuple(value.shape), value.stride(), value.dtype, value.device)


def _hashable(value: Any) -> Hashable:
    """Value with its type: 1, 1.0 and True are equal in Python, but promote to different dtypes."""
    if isinstance(value, (tuple, list)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, (fx.Node, str)):
        return value
    return (type(value).__name__, repr(value))
