"""relevance: how much an atom contributes to the class that the network names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.errors import OptionError
from ....ir.program import Program
from ...base import PassContext
from ...outputs import class_scores, is_classifier
from ...relevance import RelevanceRules
from ..group import Group
from .activations import Values, differentiable, gates, leaves_of, rows_of, run, written_values
from .base import Criterion, Importance, register


@register
@dataclass(frozen=True)
class Relevance(Criterion):
    """importance = E[|sum of the relevance of an atom's outputs|] over samples, in shares of the score explained.

    Yeom et al. 2021, Pruning by Explaining (arXiv:1912.08881): filters are ranked by layer-wise relevance propagation from the
    class score (`passes.relevance`), here the highest one. Outputs that are no class scores are explained through half their
    squared length. Comparable between groups: relevance is conserved from layer to layer.

    Options:
        epsilon: see `passes.relevance`.
        samples: calibration samples used at most.
    """

    name: ClassVar[str] = "relevance"
    needs_calibration: ClassVar[bool] = True

    epsilon: float = 0.25
    samples: int = 256

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        self.require_positive("samples")
        if self.epsilon < 0:
            raise OptionError(f"option 'epsilon' of {self.name} must be at least 0, not {self.epsilon}")
        calibration = context.require_calibration(f"criterion {self.name}")
        written = written_values(program, groups, self.name)
        rules, leaves = RelevanceRules(program, self.epsilon), leaves_of(program)
        total = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        count = 0
        for count, sample in enumerate(rows_of(program, calibration.samples, self.samples), 1):
            with differentiable(program, self.name):
                values = run(program, sample, leaves, rules)
                explained = _explained(program, values)
                slopes = torch.autograd.grad(explained, [values[one.node] for one in written])
            for name, relevance in gates(written, values, slopes).items():
                total[name] += relevance.abs() / explained.detach().abs().clamp_min(1e-9)
            context.progress(count, self.samples, f"criterion {self.name}")
        return {name: sums / count for name, sums in total.items()}


def _explained(program: Program, values: Values) -> torch.Tensor:
    """The score whose parts are sought, ()."""
    if is_classifier(program):
        return values[class_scores(program.outputs[0])].amax(-1).sum()
    return torch.stack([0.5 * values[node].square().sum() for node in program.outputs]).sum()
