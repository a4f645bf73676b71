"""taylor: the first-order change of the loss when an atom's outputs become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .activations import differentiable, gates, leaves_of, rows_of, run, written_values
from .base import Criterion, Importance, register
from .objective import loss, probe


@register
@dataclass(frozen=True)
class Taylor(Criterion):
    """importance = E[(sum over an atom's outputs z of dL/dz z)^2] over samples, all layers that write the group together.

    Molchanov et al. 2019 (arXiv:1906.10771, equation 8): sum over a filter's weights and bias of g w equals the sum over its
    outputs of dL/dz z, the effect of a gate behind the filter. One backward pass a sample. Comparable between groups.

    Options:
        gradient: `loss`, see `objective`, a classifier's own prediction being the label; or `probe`, random projections of the
            outputs that weigh all classes, whose expected square is the Gauss-Newton estimate of the loss's second-order change.
        samples: calibration samples used at most.
    """

    name: ClassVar[str] = "taylor"
    needs_calibration: ClassVar[bool] = True

    gradient: Literal["loss", "probe"] = "loss"
    samples: int = 256

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        self.require_positive("samples")
        calibration = context.require_calibration(f"criterion {self.name}")
        written = written_values(program, groups, self.name)
        generator = torch.Generator().manual_seed(context.seed)
        leaves = leaves_of(program)
        total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        count = 0
        for count, sample in enumerate(rows_of(program, calibration.samples, self.samples), 1):
            with differentiable(program, self.name):
                values = run(program, sample, leaves)
                goal = loss(program, values) if self.gradient == "loss" else probe(program, values, generator)
                slopes = torch.autograd.grad(goal, [values[one.node] for one in written])
            for name, effect in gates(written, values, slopes).items():
                total[name] += effect.square()
            context.progress(count, self.samples, f"criterion {self.name}")
        return {name: sums / count for name, sums in total.items()}
