"""CHITA: least squares with a bound on the number of weights, by projected gradient steps over a schedule of bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..layerwise import LayerRows
from ..quantize.gptq import damped
from .base import CalibratedSparsify, Level, keep_best

#: Conjugate gradient steps of the least squares on a support: between two stages, and on the last one.
BETWEEN, LAST = 10, 40

#: Steps of the power iteration that bounds the Hessian.
POWER_STEPS = 30


@register
@dataclass(frozen=True)
class SparsifyChita(CalibratedSparsify):
    """Chooses zeros and the values of all other weights together, by their effect on the layer's outputs.

        %y = linear(%x, W)      ->      %y = linear(%x, W')             W' = argmin ||X W'^T - X W^T||^2, at most k weights

    Benbaki et al. 2023 (arXiv:2302.14623): minimize the local quadratic model Q(w) = (w - w0)^T H (w - w0) / 2 subject to
    ||w||_0 <= k by iterative hard thresholding w <- P_k(w - t grad Q), then solve on the support that was found; in stages, each
    with a smaller k (section 3.3), because the model of the step before is good near where it stands. The paper's H is the Fisher
    matrix of the network's loss; here it is X X^T of each layer, of which only one block a layer is needed, so that no gradients
    and no labels are. Steps are scaled by H's diagonal, and the projection compares weights on that scale.

    Options:
        sparsity, pattern, layers: see `Sparsify`. The bound holds for a whole layer; with a pattern there is one stage.
        stages: bounds on the way, at geometric distances.
        steps: gradient steps a stage.
        damping: share of H's mean diagonal that is added to it.
        samples, rows: calibration samples, and output positions of a layer, used at most.

    Stats: layers, shares of zeros, and each layer's squared output error relative to the variance of the original output.
    """

    name: ClassVar[str] = "sparsify-chita"
    float32_only: ClassVar = True

    stages: int = 8
    steps: int = 8
    damping: float = 0.01

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.damping <= 0 or self.stages < 1 or self.steps < 1:
            values = f"{self.stages}, {self.steps}, {self.damping}"
            raise OptionError(f"options 'stages', 'steps' and 'damping' of {self.name} must be above 0: {values}")

    def choose(self, rows: LayerRows, level: Level) -> torch.Tensor:
        inputs = rows.inputs.to(torch.float64)
        hessian = damped(inputs.transpose(1, 2) @ inputs, self.damping).to(torch.float32)
        return chita(rows.weight, hessian, level, self.stages, self.steps)


def chita(weight: torch.Tensor, hessian: torch.Tensor, level: Level, stages: int, steps: int) -> torch.Tensor:
    """The sparse weight (G, O, K) for a weight (G, O, K) and a positive definite X X^T (G, K, K), float32."""
    root = hessian.diagonal(dim1=1, dim2=2).sqrt()[:, None]
    # On this scale H has a diagonal of ones, and a gradient step of 1 / its largest eigenvalue descends.
    scaled = hessian / (root * root.transpose(1, 2))
    exact = weight * root
    step = 1 / _largest_eigenvalue(scaled)
    current = exact
    for stage in range(1, stages + 1) if not level.group else (stages,):
        bound = level if level.group else Level(1 - (1 - level.sparsity) ** (stage / stages))
        for _ in range(steps):
            moved = current - step * ((current - exact) @ scaled)
            current = moved * keep_best(moved.abs(), bound)
        current = solved(current, exact, scaled, BETWEEN if stage < stages else LAST)
    return current / root


def solved(start: torch.Tensor, exact: torch.Tensor, hessian: torch.Tensor, steps: int = LAST) -> torch.Tensor:
    """argmin (w - exact) H (w - exact)^T over w (G, O, K) that are 0 where `start` is, by conjugate gradients a row."""
    support = start != 0
    result, residual = start, ((exact - start) @ hessian) * support
    direction, size = residual, residual.square().sum(2, keepdim=True)
    for _ in range(steps):
        product = (direction @ hessian) * support
        length = size / (direction * product).sum(2, keepdim=True).clamp_min(1e-30)
        result, residual = result + length * direction, residual - length * product
        after = residual.square().sum(2, keepdim=True)
        direction, size = residual + after / size.clamp_min(1e-30) * direction, after
    return result


def _largest_eigenvalue(matrix: torch.Tensor) -> torch.Tensor:
    """An upper estimate for positive definite matrices (G, K, K): (G, 1, 1), by power iteration and 5% on top.

    The start is random: a vector of ones is orthogonal to what is sought where two inputs go against each other.
    """
    vector = torch.randn(*matrix.shape[:2], 1, generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_STEPS):
        vector = matrix @ vector
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return 1.05 * (matrix @ vector).norm(dim=1, keepdim=True)
