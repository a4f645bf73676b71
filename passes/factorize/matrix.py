"""The matrix factorization that all methods on matrices share: the best rank-r weight in a metric."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch

from ..fold.layer import Layer
from .decomposition import Decomposition, Part, Rank, pointwise, positions


@dataclass(frozen=True)
class Metric:
    """|| diag(rows) (W - W') columns ||^2 is what the rank-r W' minimizes. Float64.

    Attributes:
        rows: weight of each output, (O,), above 0; None: 1.
        columns: weight of each input, (K,), above 0, or a root S (K, K) of the inputs' second moment S S^T, regular; None: 1.
        means: mean input (K,) and the output (O,) that W' shall give there, by its bias; None: the bias stays.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    means: tuple[torch.Tensor, torch.Tensor] | None = None


PLAIN = Metric()


class Matrix(Decomposition):
    """W (O, K) as B A with A (r, K) and B (O, r); a convolution is (O, channels * taps), A keeps its geometry and B is 1x1.

    With U the r leading left singular vectors of M = diag(rows) W columns, the best approximation of M is U U^T M (Eckart and
    Young 1936), so that A = U^T diag(rows) W and B = diag(rows)^-1 U: `columns` is never inverted. Row i of A and column i of B
    then get equal norms, which leaves the product alone and both quantize well.

    Args:
        weight: (O, K) to approximate; None: the layer's own.
    """

    def __init__(self, layer: Layer, metric: Metric = PLAIN, weight: torch.Tensor | None = None) -> None:
        self.layer = layer
        # `columns` has done its work once the basis is known, and may be large.
        self.metric = dataclasses.replace(metric, columns=None)
        self.weight = (layer.weight.detach().flatten(1) if weight is None else weight).to(torch.float64)
        scaled = self._weighted()
        if metric.columns is not None:
            scaled = scaled * metric.columns if metric.columns.dim() == 1 else scaled @ metric.columns
        self.basis, self.energies = left_basis(scaled)
        self.energy = float(self.energies.sum())

    def of(self, layer: Layer) -> Matrix:
        """The same of the same layer in a clone of its program."""
        mirrored = copy.copy(self)
        mirrored.layer = layer
        return mirrored

    @property
    def full(self) -> Rank:
        return (min(self.weight.shape),)

    def error(self, rank: Rank) -> float:
        return float(self.energies[rank[0] :].sum()) / max(self.energy, 1e-300)

    def sizes(self, rank: Rank) -> tuple[tuple[int, int], ...]:
        outputs, inputs = self.weight.shape
        return (rank[0] * inputs, positions(self.layer)), (outputs * rank[0], positions(self.layer))

    def factors(self, rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, K) and B (O, r)."""
        basis = self.basis[:, : rank[0]]
        first, second = basis.T @ self._weighted(), basis
        if self.metric.rows is not None:
            second = second / self.metric.rows[:, None]
        balance = (first.norm(dim=1) / second.norm(dim=0)).sqrt().clamp_min(1e-12)
        return first / balance[:, None], second * balance

    def dense(self, rank: Rank) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight (O, K) and the bias that the parts amount to."""
        first, second = self.factors(rank)
        weight = second @ first
        if self.metric.means is None:
            return weight, None if self.layer.bias is None else self.layer.bias64()
        inputs, outputs = self.metric.means
        return weight, outputs - weight @ inputs

    def parts(self, rank: Rank) -> tuple[Part, ...]:
        layer = self.layer
        first, second = self.factors(rank)
        shaped = first.reshape(rank[0], *layer.weight.shape[1:])
        return Part(shaped, None, layer.stride, layer.padding, layer.dilation), pointwise(layer, second, self.dense(rank)[1])

    def _weighted(self) -> torch.Tensor:
        """diag(rows) W."""
        return self.weight if self.metric.rows is None else self.weight * self.metric.rows[:, None]


def left_basis(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Left singular vectors (O, min(O, K)) and squared singular values, largest first. matrix: (O, K) float64."""
    if matrix.shape[0] <= matrix.shape[1]:
        energies, vectors = torch.linalg.eigh(matrix @ matrix.T)
        return vectors.flip(1), energies.flip(0).clamp_min(0.0)
    vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return vectors, values.square()
