"""factorize-afm: each layer mimics the original features from what the layers before it have left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..fold.layer import Layer
from ..layerwise import LayerRows
from .calibrated import Calibrated, Moments, damped
from .decomposition import Rank
from .matrix import Matrix, Metric


@register
@dataclass(frozen=True)
class FactorizeAfm(Calibrated):
    """Atomic feature mimicking: low-rank output features, not low-rank weights.

        %y = linear(%x, W, b)   ->   %h = linear(%x, U^T V);  %y = linear(%h, U, E[y] - U U^T V E[x])

    Yu and Wu 2023 ("Compressing Transformers: Features Are Low-Rank, but Weights Are Not!", AAAI; for click-through models Yu et
    al. 2024): the outputs y of the original network lie near an affine subspace, y = U U^T (y - E[y]) + E[y], with U the leading
    eigenvectors of their covariance. The layer reads the x that the factorized layers before it give, so y is predicted from x
    first: V is the least-squares weight for y given x as far as held-out samples agree, W beyond, and U is that of V x
    (reduced-rank regression, Izenman 1975). With nothing factorized before it, V = W.

    Options and stats: see `Factorize` and `Calibrated`; `ridge` is the share of the mean diagonal of Cov(x) that pulls V to W.
    """

    name: ClassVar[str] = "factorize-afm"

    ridge: float = 0.01

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.ridge <= 0:
            raise OptionError(f"option 'ridge' of {self.name} must be above 0, not {self.ridge}")

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Matrix]:
        return self._walk(program, layers, context, taken)

    def decompose(self, layer: Layer, rows: LayerRows) -> Matrix:
        moments = Moments.of(rows.inputs[0], rows.targets[0], centered=True)
        weight = predicting(layer.weight.detach().flatten(1).to(torch.float64), rows, self.ridge)
        root = torch.linalg.cholesky(damped(moments.second, self.damping))
        return Matrix(layer, Metric(columns=root, means=(moments.mean, moments.mean_output)), weight)


def predicting(weight: torch.Tensor, rows: LayerRows, ridge: float) -> torch.Tensor:
    """The weight (O, K) that predicts the original outputs from what the layer reads now.

    The least-squares solution is that of three quarters of the samples, and each output goes as far towards it as the others
    agree: where rows are few or alike (padding), what fits them would not fit others.
    """
    x, y = rows.inputs[0], rows.targets[0]
    seen = Moments.of(x[: rows.fitted], y[: rows.fitted], centered=True)
    move = torch.linalg.solve(damped(seen.second, ridge), (seen.cross - weight @ seen.second).T)
    if rows.fitted < len(x):
        held = x[rows.fitted :].double() - seen.mean
        step = held @ move
        missing = y[rows.fitted :].double() - seen.mean_output - held @ weight.T
        share = (step * missing).sum(0) / step.square().sum(0).clamp_min(1e-30)
        move = move * share.clamp(0.0, 1.0)
    return weight + move.T
