"""random: the control that every criterion has to beat."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .base import Criterion, Importance, register


@register
@dataclass(frozen=True)
class Random(Criterion):
    """importance = uniform in [0, 1), from the run's seed and the group's name."""

    name: ClassVar[str] = "random"

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        found = {}
        for group in groups:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{context.seed}/{group.name}".encode()))
            found[group.name] = torch.rand(group.size, generator=generator, dtype=torch.float64)
        return found
