"""Global average pooling has one form: a mean over the spatial dimensions."""

from __future__ import annotations

from torch import fx

from ....ir.program import Program
from ..match import argument, aten, normalized_dims


def mean_of_global_pool(program: Program, node: fx.Node) -> fx.Node | None:
    """adaptive_avg_pool2d(x, [1, 1]) -> aten.mean(x, [2, 3], keepdim=True). x (N, C, H, W)."""
    size = node.args[1]
    size = [size] if isinstance(size, int) else list(size)  # type: ignore[arg-type]
    x: fx.Node = node.args[0]  # type: ignore[assignment]
    if any(s != 1 for s in size) or x.meta["val"].dim() != 4:
        return None
    return program.insert(aten.mean.dim, (x, [2, 3], True), node)


def positive_mean_dims(program: Program, node: fx.Node) -> fx.Node | None:
    """mean(x, [-1, -2], True) -> mean(x, [2, 3], True): dimensions counted from the front, in order."""
    x, dims = node.args[0], argument(node, 1, "dim")
    if not dims or node.kwargs.get("dtype") is not None:
        return None
    positive = normalized_dims(dims, x.meta["val"].dim())  # type: ignore[union-attr]
    keep = bool(argument(node, 2, "keepdim", False))
    if list(node.args[1:]) == [positive, keep] and not node.kwargs:
        return None
    return program.insert(aten.mean.dim, (x, positive, keep), node)
