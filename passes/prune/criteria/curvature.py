"""fisher and hessian-trace: the second-order change of the loss when an atom's filters become zero, by curvature."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ....ir.program import Program
from ...base import PassContext
from ..group import Group
from .activations import Values, differentiable, leaves_of, rows_of, run
from .base import Criterion, Importance, register, rows_along
from .objective import loss, probe


@dataclass(frozen=True)
class _Curvature(Criterion):
    """Squared gradients of every sample, averaged: an estimate of the diagonal of the Hessian over the weights."""

    needs_calibration: ClassVar[bool] = True

    samples: int = 256

    @abc.abstractmethod
    def goal(self, program: Program, values: Values, generator: torch.Generator) -> torch.Tensor:
        """What a sample is differentiated by, ()."""

    @abc.abstractmethod
    def combined(self, squares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Importance (atoms,) from mean squared gradients and weights, both (atoms, values of an atom) float64."""

    def importance(self, program: Program, groups: Sequence[Group], context: PassContext) -> Importance:
        self.require_positive("samples")
        calibration = context.require_calibration(f"criterion {self.name}")
        generator = torch.Generator().manual_seed(context.seed)
        names = {m.parameter for group in groups for m in group.members if m.role != "in"}
        leaves = {name: leaf for name, leaf in leaves_of(program).items() if name in names}
        squares = {name: torch.zeros(leaf.shape, dtype=torch.float64) for name, leaf in leaves.items()}
        count = 0
        for count, sample in enumerate(rows_of(program, calibration.samples, self.samples), 1):
            with differentiable(program, self.name):
                values = run(program, sample, leaves)
                slopes = torch.autograd.grad(self.goal(program, values, generator), list(leaves.values()))
            for name, slope in zip(leaves, slopes, strict=True):
                squares[name] += slope.to(torch.float64).square()
            context.progress(count, self.samples, f"criterion {self.name}")
        found = {}
        for group in groups:
            own = [m for m in group.members if m.parameter in leaves and m.role != "in"]
            parts = [
                self.combined(rows_along(squares[m.parameter] / count, m), rows_along(leaves[m.parameter].detach(), m))
                for m in own
            ]
            found[group.name] = torch.stack(parts).sum(0)
        return found


@register
@dataclass(frozen=True)
class Fisher(_Curvature):
    """importance = 1/2 sum over an atom's filters and biases of E[g^2] w^2, g the gradient of one sample's loss.

    LeCun et al. 1989, Optimal Brain Damage, with the diagonal of the empirical Fisher matrix for the Hessian's (Theis et al.
    2018, arXiv:1801.05787, equation 8). Calibration has no labels, so a classifier's own prediction is the label (`objective`):
    samples it is sure of say little. Comparable between groups.

    Options:
        samples: calibration samples used at most.
    """

    name: ClassVar[str] = "fisher"

    def goal(self, program: Program, values: Values, generator: torch.Generator) -> torch.Tensor:
        return loss(program, values)

    def combined(self, squares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 0.5 * (squares * weights.square()).sum(1)


@register
@dataclass(frozen=True)
class HessianTrace(_Curvature):
    """importance = 1/2 tr(H_a)/n_a ||w_a||^2 over the n_a weights of an atom's filters, summed over the layers that write it.

    Yu et al. 2022, Hessian-Aware Pruning (arXiv:2101.08940, equation 5). The trace is Hutchinson's estimate of the Gauss-Newton
    matrix with probes in the space of outputs, one a sample: tr(J^T B B^T J) = E ||J^T B r||^2 (`objective.probe`), which needs
    neither labels nor second derivatives. Comparable between groups.

    Options:
        samples: calibration samples used at most.
    """

    name: ClassVar[str] = "hessian-trace"

    def goal(self, program: Program, values: Values, generator: torch.Generator) -> torch.Tensor:
        return probe(program, values, generator)

    def combined(self, squares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 0.5 * squares.mean(1) * weights.square().sum(1)
