"""geometric-median: filters that others can stand for go first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .base import Criterion, Importance, filters, register


@register
@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """importance = sum of the distances from an atom's filters to those of all other atoms, relative to the layer's mean.

    He et al. 2019, FPGM (arXiv:1811.00250, equation 8): filters near the geometric median of a layer are the most replaceable.
    Where several layers write a group it is the mean over them. Comparable between groups only as a share of each group's mean.
    """

    name: ClassVar[str] = "geometric-median"

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        found = {}
        for group in groups:
            sums = [torch.cdist(values, values).sum(1) for values in filters(program, group)]
            found[group.name] = torch.stack([s / s.mean().clamp_min(1e-300) for s in sums]).mean(0)
        return found
