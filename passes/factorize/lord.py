"""factorize-lord: the principal components of every layer's outputs, all at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import register
from ..fold.layer import Layer
from ..layerwise import LayerRows
from .calibrated import Calibrated, Moments, damped
from .matrix import Matrix, Metric


@register
@dataclass(frozen=True)
class FactorizeLord(Calibrated):
    """Projects the outputs of every layer, as the original network has them, on their principal components.

        %y = linear(%x, W, b)   ->   %h = linear(%x, U^T W);  %y = linear(%h, U, U U^T b + (I - U U^T) E[y])

    Kaushal, Vaidhya and Rish 2023, LoRD (arXiv:2309.14021): one shot, no training, every layer from the features of the original
    network. U are the leading eigenvectors of the outputs' covariance, as in `factorize-afm`. It differs from
    `factorize-whitened-svd` in the mean: what all outputs share needs no rank here, the bias has it.

    Options and stats: see `Factorize` and `Calibrated`.
    """

    name: ClassVar[str] = "factorize-lord"

    def decompose(self, layer: Layer, rows: LayerRows) -> Matrix:
        moments = Moments.of(rows.exact_inputs[0], rows.targets[0], centered=True)
        root = torch.linalg.cholesky(damped(moments.second, self.damping))
        return Matrix(layer, Metric(columns=root, means=(moments.mean, moments.mean_output)))
