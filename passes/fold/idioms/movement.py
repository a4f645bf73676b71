"""Parts of a value have one form: a slice each."""

from __future__ import annotations

from torch import fx

from ....ir.program import Program
from ..match import argument, aten, is_call


def slice_of_split(program: Program, node: fx.Node) -> fx.Node | None:
    """getitem(split_with_sizes(x, [4, 8], 1), 1) -> aten.slice(x, 1, 4, 12)"""
    split, index = node.args[0], node.args[1]
    if not is_call(split, aten.split_with_sizes.default):
        return None
    x: fx.Node = split.args[0]  # type: ignore[assignment]
    sizes: list[int] = list(split.args[1])  # type: ignore[arg-type]
    if not all(isinstance(size, int) for size in sizes):
        return None
    index = range(len(sizes))[index]  # type: ignore[index]
    start = sum(sizes[:index])
    dim = argument(split, 2, "dim", 0) % x.meta["val"].dim()
    return program.insert(aten.slice.Tensor, (x, dim, start, start + sizes[index]), node)
