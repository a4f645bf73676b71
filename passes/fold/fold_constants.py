"""fold-constants: computes at compile time what depends on parameters only."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import is_pure, tensor_bytes


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates calls whose inputs are all parameters or literals, and stores the results that something else reads.

        %t = aten.permute(%weight, [1, 0]);  %y = aten.matmul(%x, %t)   ->  %y = aten.matmul(%x, %t_folded)

    A result is only stored while it is small beside what it came from, so that a broadcast never turns into memory.

    Args:
        max_growth: largest size of a result, as a multiple of the parameters it is computed from.
        free_bytes: results up to this many bytes are stored whatever they came from (masks, position ids).
    """

    max_growth: float = 1.0
    free_bytes: int = 1 << 20

    name = "fold-constants"
    effect = EXACT

    def __post_init__(self) -> None:
        if self.max_growth < 0 or self.free_bytes < 0:
            raise OptionError("fold-constants: max_growth and free_bytes must be zero or more")

    def run(self, program: Program, context: PassContext) -> PassResult:
        values, kept = self._evaluate(program)
        stored = 0
        for node, value in values.items():
            outside = [user for user in node.users if user not in values]
            if node.op == "call_function" and isinstance(value, torch.Tensor) and outside:
                fresh = program.add_parameter(f"{node.name}_folded", _owned(value), node, node.meta.get("origin", ""))
                node.replace_all_uses_with(fresh)
                stored += 1
        return PassResult(program, stored > 0, {"folded": stored, "too_large": kept})

    def _evaluate(self, program: Program) -> tuple[dict[fx.Node, Any], int]:
        """Values of all constant nodes, and how many were too large to store."""
        values: dict[fx.Node, Any] = {}
        sources: dict[fx.Node, set[fx.Node]] = {}
        too_large = 0
        for node in program.nodes:
            if node.op == "get_attr":
                values[node], sources[node] = program.parameter(node), {node}
            elif is_pure(node) and all(n in values for n in node.all_input_nodes):
                origin = set().union(*(sources[n] for n in node.all_input_nodes))
                limit = max(self.free_bytes, self.max_growth * tensor_bytes(values[n] for n in origin))
                if not _fits(node, limit):
                    too_large += 1
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[misc]
                with torch.no_grad():
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                sources[node] = origin
        return values, too_large


def _fits(node: fx.Node, limit: float) -> bool:
    """Whether the result is static tensors of at most `limit` bytes."""
    results = node.meta["val"]
    results = results if isinstance(results, (tuple, list)) else [results]
    if not all(isinstance(r, torch.Tensor) and all(isinstance(d, int) for d in r.shape) for r in results):
        return False
    return node.target is operator.getitem or tensor_bytes(results) <= limit


def _owned(value: torch.Tensor) -> torch.Tensor:
    """Contiguous, and not a window into a larger storage, which would be kept alive and saved whole."""
    value = value.detach().contiguous()
    return value if value.untyped_storage().nbytes() == tensor_bytes([value]) else value.clone()
