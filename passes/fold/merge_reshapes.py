"""merge-reshapes: chains of reshapes or permutes become one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import aten, is_call, reshape_arguments, same_type, substitute

RESHAPES = (
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)


@register
@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Merges neighbours that only rename dimensions.

        %b = aten.unsqueeze(%a, 0);  %c = aten.reshape(%b, [4, 6])             ->  %c = aten.reshape(%a, [4, 6])
        %b = aten.permute(%a, [0, 2, 1]);  %c = aten.permute(%b, [0, 2, 1])    ->  %a

    Reshapes are free, so the inner one may keep other readers; a permute moves data and merges only as the single reader.
    """

    name = "merge-reshapes"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = sum(_merge_reshape(program, node) or _merge_permute(program, node) for node in list(program.nodes))
        return PassResult(program, merged > 0, {"merged": merged})


def _merge_reshape(program: Program, node: fx.Node) -> bool:
    if not is_call(node, *RESHAPES) or not is_call(node.args[0], *RESHAPES):
        return False
    source: fx.Node = node.args[0].args[0]  # type: ignore[union-attr, assignment]
    if same_type(source, node):
        substitute(program, node, source)
        return True
    # The arguments of an outer reshape may name symbolic sizes; those of squeeze and unsqueeze do not say the shape.
    shape = node.args[1] if node.target is aten.reshape.default else reshape_arguments(node)
    if shape is None:
        return False
    substitute(program, node, program.insert(aten.reshape.default, (source, shape), node))
    return True


def _merge_permute(program: Program, node: fx.Node) -> bool:
    if not is_call(node, aten.permute.default) or not is_call(node.args[0], aten.permute.default):
        return False
    inner: fx.Node = node.args[0]  # type: ignore[assignment]
    if single_user(inner) is not node:
        return False
    rank = node.meta["val"].dim()
    first, second = ([d % rank for d in n.args[1]] for n in (inner, node))  # type: ignore[union-attr]
    dims = [first[d] for d in second]
    source = inner.args[0]
    if dims != list(range(rank)):
        source = program.insert(aten.permute.default, (source, dims), node)
    substitute(program, node, source)  # type: ignore[arg-type]
    return True
