"""batch-norm: the scale that training gave a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .activations import rows_of, run, written_values
from .base import Criterion, Importance, register


@register
@dataclass(frozen=True)
class BatchNorm(Criterion):
    """importance = standard deviation of a layer's output channel, mean over the layers that write the group.

    Liu et al. 2017, Network Slimming (arXiv:1708.06519, section 3), rank channels by the scale |gamma| of the batch normalization
    behind the layer. A canonical program has it folded into the layer; but normalized values have deviation 1, so |gamma| is the
    deviation of what the folded layer writes: exactly so on the statistics that the normalization holds, and measured here on
    calibration samples. Networks without batch normalization get the same meaning. Comparable between groups.

    Options:
        samples: calibration samples used at most.
    """

    name: ClassVar[str] = "batch-norm"
    needs_calibration: ClassVar[bool] = True

    samples: int = 256

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        self.require_positive("samples")
        calibration = context.require_calibration(f"criterion {self.name}")
        written = written_values(program, groups, self.name)
        # Of each value: count, sums and sums of squares, one an atom.
        moments = [torch.zeros(3, len(w.indices), dtype=torch.float64) for w in written]
        for sample in rows_of(program, calibration.samples, self.samples):
            with torch.no_grad():
                values = run(program, sample)
            for total, one in zip(moments, written, strict=True):
                value = one.by_atom(values[one.node])
                total += torch.stack([torch.full((len(value),), float(value.shape[1])), value.sum(1), value.square().sum(1)])
        found: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
        for (count, total, squares), one in zip(moments, written, strict=True):
            found[one.group].append((squares / count - (total / count).square()).clamp_min(0).sqrt())
        return {name: torch.stack(deviations).mean(0) for name, deviations in found.items()}
