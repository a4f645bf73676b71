"""factorize-whitened-svd: a layer as two, nearest in its outputs on calibration data."""

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
class FactorizeWhitenedSvd(Calibrated):
    """Truncates the singular values of W S, with S S^T = X X^T: each is the output error that its loss costs.

        %y = linear(%x, W, b)   ->   %h = linear(%x, A);  %y = linear(%h, B, b)             B A X nearest to W X

    Wang et al. 2024, SVD-LLM (arXiv:2403.07378, section 3.1): S is the Cholesky factor of X X^T, so S^-1 X is white and
    || W X - W' X ||_F^2 is the sum of the squared singular values left out. X (K, M) are the layer's inputs in the original
    network, unfolded for convolutions. S is not inverted here: with U the leading left singular vectors of W S, truncation and
    multiplication by S^-1 give U U^T W, so A = U^T W and B = U.

    Options and stats: see `Factorize` and `Calibrated`.
    """

    name: ClassVar[str] = "factorize-whitened-svd"

    def decompose(self, layer: Layer, rows: LayerRows) -> Matrix:
        moments = Moments.of(rows.exact_inputs[0], rows.targets[0], centered=False)
        return Matrix(layer, Metric(columns=torch.linalg.cholesky(damped(moments.second, self.damping))))
