"""eliminate-dead-code: drops what no output depends on."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.program import Program
from ..base import EXACT, Pass, PassContext, PassResult, register


@register
@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """Drops calls and parameters that no output depends on. Inputs stay: they are the program's interface.

    %a = aten.relu(%x);  %b = aten.tanh(%x);  return [%a]   ->  %a = aten.relu(%x);  return [%a]
    """

    name = "eliminate-dead-code"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        before = len(program.graph.nodes)
        program.sweep()
        removed = before - len(program.graph.nodes)
        return PassResult(program, removed > 0, {"removed": removed})
