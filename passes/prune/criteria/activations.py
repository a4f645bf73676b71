"""What layers write into the channels of a group, atom by atom, and its gradients: what data-driven criteria read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....ir.data import Sample
from ....ir.errors import PassError
from ....ir.program import Program
from ...relevance import RelevanceRules
from ..group import Group

Values = dict[fx.Node, torch.Tensor]


@dataclass(frozen=True)
class Written:
    """The value of a layer that writes a group. indices: (atoms, width) positions along `dim`."""

    group: str
    node: fx.Node
    dim: int
    indices: torch.Tensor

    def by_atom(self, value: torch.Tensor) -> torch.Tensor:
        """A value of the node's shape as (atoms, everything else) float64."""
        rows = value.detach().movedim(self.dim, 0)[self.indices]
        return rows.reshape(len(self.indices), -1).to(torch.float64)


def written_values(program: Program, groups: Sequence[Group], who: str) -> list[Written]:
    """The values that layers write into each group.

    Raises:
        PassError: no layer writes a group.
    """
    nodes = {node.name: node for node in program.nodes}
    found = []
    for group in groups:
        layers = {name for member in group.roles("out") for name in member.layers}
        own = [Written(group.name, nodes[n], d, torch.tensor(i)) for n, d, i in group.values if n in layers]
        if not own:
            raise PassError(
                f"criterion {who} looks at what layers write, and none writes the channels of '{group.name}': ignore the group"
            )
        found += own
    return found


def rows_of(program: Program, samples: Iterable[Sample], most: int) -> Iterator[Sample]:
    """Samples of one row each where the batch is symbolic, `most` of them at most: gradients of a sample are its own."""
    batch = program.input_specs[0].shape[:1]
    count = 0
    for sample in samples:
        rows = zip(*(value.split(1) for value in sample), strict=True) if batch == (None,) else [sample]
        for row in rows:
            if count == most:
                return
            yield row
            count += 1


def run(
    program: Program, sample: Sample, leaves: dict[str, torch.Tensor] | None = None, rules: RelevanceRules | None = None
) -> Values:
    """The value of every node; `leaves` stand in for the parameters they are named after, and gradients reach them.

    rules: give the values other gradients.
    """
    values: Values = dict(zip(program.inputs, sample, strict=True))
    leaves = leaves or {}
    for node in program.nodes:
        if node.op == "get_attr":
            parameter = leaves.get(str(node.target))
            values[node] = program.parameter(node).detach() if parameter is None else parameter  # type: ignore[union-attr]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])  # type: ignore[misc]
            function: Callable[..., Any] = node.target  # type: ignore[assignment]
            value = function(*args, **kwargs)
            values[node] = value if rules is None else rules.apply(node, value, values)
    return values


def leaves_of(program: Program) -> dict[str, torch.Tensor]:
    """Every float parameter as a leaf that gradients reach."""
    return {n: p.detach().clone().requires_grad_() for n, p in program.parameters().items() if p.is_floating_point()}


def gates(written: Sequence[Written], values: Values, slopes: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Group name -> sum over an atom's outputs z, in all layers that write it, of slope times z: (atoms,) float64."""
    found: dict[str, torch.Tensor] = {}
    for one, slope in zip(written, slopes, strict=True):
        effect = one.by_atom(values[one.node].detach() * slope).sum(1)
        found[one.group] = found[one.group] + effect if one.group in found else effect
    return found


@contextlib.contextmanager
def differentiable(program: Program, who: str) -> Iterator[None]:
    """Turns torch's refusal to differentiate an op into PassError."""
    try:
        with torch.enable_grad():
            yield
    except (RuntimeError, NotImplementedError) as error:
        if not re.search(r"derivative|does not require grad|not implemented|autograd", str(error)):
            raise
        raise PassError(
            f"criterion {who} cannot differentiate '{program.name}': {str(error).splitlines()[0]}; l2 and thinet need none"
        ) from error
