"""The abstract value of the coupling analysis: for every dimension of every value, which atom takes which index with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import fx

from ...ir.program import Program, origin_of
from .atoms import KEPT, Atoms


@dataclass(frozen=True)
class Axis:
    """One dimension of a value.

    Attributes:
        labels: an atom for every index, or None where no index can go (network inputs, positions, symbolic sizes, size 1).
        vanishes: the slice of an atom is all zeros once the parameter slices of that atom are zero. Then a sum over this
            dimension does not notice the cut.
    """

    labels: np.ndarray | None = None
    vanishes: bool = False


FIXED = Axis()
#: The axes of a value, in order.
Dims = tuple[Axis, ...]


@dataclass
class Coupling:
    """State of one walk over a program. Rules read the axes of a node's inputs and return those of its output.

    Attributes:
        axes: the axes of every node; a list of them for an operator with several outputs.
        roles: (parameter name, dimension) -> the role of its first reader ("out", "in") and the nodes that read it so.
    """

    program: Program
    atoms: Atoms = field(default_factory=Atoms)
    axes: dict[fx.Node, Any] = field(default_factory=dict)
    parameters: dict[str, Dims] = field(default_factory=dict)
    roles: dict[tuple[str, int], dict[str, list[fx.Node]]] = field(default_factory=dict)

    def of(self, node: Any) -> Dims:
        return self.axes[node]

    # -- where labels come from and where they stop ------------------------------------------------------------------------

    def parameter(self, node: fx.Node) -> Dims:
        """Fresh atoms along every dimension of a parameter; the same ones for every reader, so shared weights are cut once."""
        name = str(node.target)
        if name not in self.parameters:
            shape = node.meta["val"].shape
            self.parameters[name] = tuple(Axis(self.atoms.fresh(n), True) if n > 1 else FIXED for n in shape)
        return self.parameters[name]

    def note_role(self, value: Any, dim: int, role: str, layer: fx.Node) -> None:
        if isinstance(value, fx.Node) and value.op == "get_attr":
            dim %= value.meta["val"].dim()
            self.roles.setdefault((str(value.target), dim), {}).setdefault(role, []).append(layer)

    def pin(self, axis: Axis, reason: str) -> Axis:
        """Every index of the axis stays."""
        if axis.labels is not None:
            for atom in np.unique(axis.labels).tolist():
                if atom != KEPT:
                    self.atoms.pin(atom, reason)
        return axis

    def pin_all(self, dims: Sequence[Axis], reason: str) -> None:
        for axis in dims:
            self.pin(axis, reason)

    # -- algebra of axes ---------------------------------------------------------------------------------------------------

    def join(self, a: Axis, b: Axis, reason: str) -> Axis:
        """Index by index, both axes go together. Sizes are equal. The result vanishes as `a` does."""
        if a.labels is None or b.labels is None:
            self.pin(b if a.labels is None else a, reason)
            return FIXED
        if a.labels is not b.labels and not np.array_equal(a.labels, b.labels):
            for x, y in dict.fromkeys(zip(a.labels.tolist(), b.labels.tolist(), strict=True)):
                self.atoms.join(x, y, reason)
        return a

    def contract(self, a: Axis, b: Axis, where: str) -> None:
        """A sum over the products along two axes. It must not notice that terms are missing: one of the factors vanishes."""
        self.join(a, b, f"{where} sums over a dimension that is fixed on one side")
        if not (a.vanishes or b.vanishes):
            self.pin(a, f"{where} sums over channels that are not zero when their weights are")

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """The dimension that a reshape makes of several, outermost first."""
        varying = [(k, a) for k, a in enumerate(axes) if a.labels is not None]
        if not varying:
            return FIXED
        vanishes = all(a.vanishes for _, a in varying)
        spread = []
        for k, axis in varying:
            shape = [1] * len(sizes)
            shape[k] = sizes[k]
            spread.append(np.broadcast_to(axis.labels.reshape(shape), sizes).reshape(-1))  # type: ignore[union-attr]
        if len(spread) == 1:
            return Axis(spread[0], vanishes)
        return Axis(np.array([self.atoms.product(parts) for parts in zip(*(s.tolist() for s in spread), strict=True)]), vanishes)

    def split(self, axis: Axis, sizes: Sequence[int], reason: str) -> list[Axis]:
        """The dimensions that a reshape makes of one, outermost first.

        What goes must be whole slices of the new dimensions, so each index becomes the product of its coordinates; coordinates
        along which the labels do not change take no part.
        """
        if axis.labels is None:
            return [FIXED] * len(sizes)
        grid = self.atoms.roots(axis.labels).reshape(sizes)
        varying = [k for k in range(len(sizes)) if bool((grid != grid.take([0], axis=k)).any())]
        if not varying:
            self.pin(axis, reason)
            return [FIXED] * len(sizes)
        result = [FIXED] * len(sizes)
        if len(varying) == 1:
            k = varying[0]
            line = np.moveaxis(grid, k, -1).reshape(-1, sizes[k])[0]
            result[k] = replace(axis, labels=line)
            return result
        for k in varying:
            result[k] = Axis(self.atoms.fresh(sizes[k]), axis.vanishes)
        coordinates = self.merge(result, sizes)
        self.join(axis, coordinates, reason)
        return result

    def take(self, axis: Axis, index: Any, reason: str) -> Axis:
        """The axis of a slice or a gather; an index taken alone stays."""
        if axis.labels is None:
            return FIXED
        taken = replace(axis, labels=axis.labels[index])
        if taken.labels.size == 1:  # type: ignore[union-attr]
            self.pin(taken, f"{reason} takes it alone")
            return FIXED
        return taken

    def broadcast(self, operands: Sequence[Dims], shapes: Sequence[Sequence[Any]], rank: int, reason: str) -> list[Axis]:
        """The joint axes of an element-wise operator's operands, aligned at the last dimension. Vanishing is the caller's."""
        result = []
        for k in range(rank):
            present = []
            for dims, shape in zip(operands, shapes, strict=True):
                at = k - (rank - len(shape))
                if at >= 0 and not (isinstance(shape[at], int) and shape[at] == 1):
                    present.append(dims[at])
            joint = present[0] if present else FIXED
            for other in present[1:]:
                joint = self.join(joint, other, reason)
            result.append(joint)
        return result


def where(node: fx.Node) -> str:
    """An operator and the place it came from, for reasons: "aten.layer_norm at 'blocks.0.norm1'"."""
    return f"{str(node.target).removesuffix('.default')} at '{origin_of(node)}'"


def shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def is_static(sizes: Sequence[Any]) -> bool:
    return all(isinstance(s, int) for s in sizes)


#: A rule computes the axes of a node's value: one tuple, or a list of them for an operator with several outputs.
Rule = Callable[[Coupling, fx.Node], Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Registers a rule for operators; a second rule for one is an error."""

    def add(function: Rule) -> Rule:
        for target in targets:
            if target in RULES:
                raise ValueError(f"{target} has two coupling rules: {RULES[target].__name__} and {function.__name__}")
            RULES[target] = function
        return function

    return add
