"""l1 and l2: the size of an atom's filters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .base import Criterion, Importance, filters, register


@dataclass(frozen=True)
class _Norm(Criterion):
    order: ClassVar[int]

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        return {group.name: self._norms(program, group) for group in groups}

    def _norms(self, program: Program, group: Group) -> torch.Tensor:
        """Mean over the layers that write the group, each relative to its own mean, so that none drowns the others."""
        norms = [torch.linalg.vector_norm(values, ord=self.order, dim=1) for values in filters(program, group)]
        return torch.stack([n / n.mean().clamp_min(1e-300) for n in norms]).mean(0)


@register
@dataclass(frozen=True)
class L1(_Norm):
    """importance = sum of |w| over an atom's filters, relative to the layer's mean.

    Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv:1608.08710, section 3.1). Where several layers write a group
    (a residual stream) it is the mean over them. Comparable between groups only as a share of each group's mean.
    """

    name: ClassVar[str] = "l1"
    order: ClassVar[int] = 1


@register
@dataclass(frozen=True)
class L2(_Norm):
    """importance = Euclidean norm of an atom's filters, relative to the layer's mean; else as `l1`."""

    name: ClassVar[str] = "l2"
    order: ClassVar[int] = 2
