"""Wanda: magnitude times the size of what is multiplied with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..base import register
from ..layerwise import LayerRows
from .base import CalibratedSparsify, Level, keep_best


@register
@dataclass(frozen=True)
class SparsifyWanda(CalibratedSparsify):
    """Zeroes in every output row the weights of smallest |W_ij| * ||X_j||_2; the others stay as they are.

        %y = linear(%x, W)      ->      %y = linear(%x, W * mask)               the same count in every row

    Sun et al. 2023 (arXiv:2306.11695, equation 1). X (M, K) is what the layer reads after the layers before it became sparse, and
    scores are compared within a row, as in the paper: that is the diagonal of SparseGPT's Hessian, without its updates.

    Options:
        sparsity, pattern, layers: see `Sparsify`.
        samples, rows: calibration samples, and output positions of a layer, used at most.

    Stats: layers, shares of zeros, and each layer's squared output error relative to the variance of the original output.
    """

    name: ClassVar[str] = "sparsify-wanda"

    def choose(self, rows: LayerRows, level: Level) -> torch.Tensor:
        return rows.weight * keep_best(wanda_scores(rows), level, by_row=True)


def wanda_scores(rows: LayerRows) -> torch.Tensor:
    """|W| * ||X||_2, (G, O, K)."""
    return rows.weight.abs() * rows.inputs.square().sum(1, keepdim=True).sqrt()
