"""merge-reshapes: chains of reshapes or permutes become one; squeeze and unsqueeze are reshapes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from .match import aten, is_call, reshape_arguments, same_dim, same_type, substitute

SQUEEZES = (
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
RESHAPES = (aten.reshape.default, *SQUEEZES)


@register
@dataclass(frozen=True)
class MergeReshapes(Pass):
    """Merges neighbours that only rename dimensions.

        %b = aten.unsqueeze(%a, 0);  %c = aten.reshape(%b, [4, 6])            ->  %c = aten.reshape(%a, [4, 6])
        %b = aten.permute(%a, [0, 2, 1]);  %c = aten.permute(%b, [0, 2, 1])   ->  %a
        %b = aten.squeeze(%a, [0])                                            ->  %b = aten.reshape(%a, [4, 6])

    and, as exporters transpose keys,

        reshape(permute(reshape(%k, [B*H, S, E]), [0, 2, 1]), [B, H, E, S])
     -> permute(reshape(%k, [B, H, S, E]), [0, 1, 3, 2])

    Squeezes with several symbolic dimensions stay. Reshapes are free, so the inner one may keep other readers; a permute moves
    data and merges only as the single reader.
    """

    name = "merge-reshapes"
    effect = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        merged = sum(any(rule(program, node) for rule in RULES) for node in list(program.nodes))
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


def _squeeze_to_reshape(program: Program, node: fx.Node) -> bool:
    shape = reshape_arguments(node) if is_call(node, *SQUEEZES) else None
    if shape is None:
        return False
    substitute(program, node, program.insert(aten.reshape.default, (node.args[0], shape), node))
    return True


def _unmerge_batch(program: Program, node: fx.Node) -> bool:
    """Moves a reshape that takes the batch apart from behind a transposition of the last two dimensions to before it."""
    moved = node.args[0] if node.args else None
    if not is_call(node, aten.reshape.default) or not is_call(moved, aten.permute.default) or single_user(moved) is not node:
        return False
    merged, dims = moved.args[0], moved.args[1]
    shape, old = node.meta["val"].shape, moved.meta["val"].shape
    if list(dims) != [0, 2, 1] or not is_call(merged, aten.reshape.default) or len(shape) <= 3:  # type: ignore[arg-type]
        return False
    if not all(same_dim(a, b) for a, b in zip(shape[-2:], old[-2:], strict=True)):
        return False
    sizes: list = list(node.args[1])  # type: ignore[arg-type]
    apart = program.insert(aten.reshape.default, (merged.args[0], [*sizes[:-2], sizes[-1], sizes[-2]]), node)
    rank = len(shape)
    substitute(program, node, program.insert(aten.permute.default, (apart, [*range(rank - 2), rank - 1, rank - 2]), node))
    return True


#: The first that applies to a node rewrites it.
RULES = (_merge_reshape, _squeeze_to_reshape, _merge_permute, _unmerge_batch)
