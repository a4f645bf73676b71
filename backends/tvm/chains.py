"""Element-wise expressions that wait for their reader: `rules/maps.py` makes them, `cuda/kernels/maps.py` has the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .cuda.kernels.maps import Apply, Leaf


@dataclass(frozen=True)
class Source:
    """A variable that an expression reads as a tensor of this shape."""

    var: Any
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Deferred:
    """An expression of `Apply` over sources. nodes: what it stands for."""

    expression: Any
    nodes: tuple[fx.Node, ...]


def numbered(expression: Any, sources: list[Source]) -> Any:
    """The expression with the number of each source in its stead; sources that are new are added to the list."""
    if isinstance(expression, Apply):
        operands = tuple(numbered(operand, sources) for operand in expression.operands)
        return Apply(expression.op, operands, expression.shape, expression.dtype)
    if not isinstance(expression, Source):
        return expression
    same = (i for i, s in enumerate(sources) if s.var.same_as(expression.var) and s.shape == expression.shape)
    number = next(same, len(sources))
    if number == len(sources):
        sources.append(expression)
    return Leaf(number, expression.shape, expression.dtype)
