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
    first: V is the least-squares weight for y given x, drawn to W where the data say little, and U is that of V x (reduced-rank
    regression, Izenman 1975). With nothing factorized before it, V = W.

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
        weight = layer.weight.detach().flatten(1).to(torch.float64)
        missing = moments.cross - weight @ moments.second
        moved = torch.linalg.solve(damped(moments.second, self.ridge), missing.T).T
        root = torch.linalg.cholesky(damped(moments.second, self.damping))
        return Matrix(layer, Metric(columns=root, means=(moments.mean, moments.mean_output)), weight + moved)
