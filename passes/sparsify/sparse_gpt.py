"""SparseGPT: columns lose weights one after the other, and the columns still to come make up for it."""

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


@register
@dataclass(frozen=True)
class SparsifySparseGpt(CalibratedSparsify):
    """Sweeps over the columns; what a row loses with a weight is spread over its columns that come after.

        %y = linear(%x, W)      ->      %y = linear(%x, W')             W' = 0 where pruned, moved elsewhere

    Frantar and Alistarh 2023 (arXiv:2301.00774, algorithm 1): with H = X X^T + damping and U the upper Cholesky factor of its
    inverse, the weights of a block of columns with the smallest w^2 / U_ii^2 go (in a pattern, those of every M columns when the
    sweep reaches them), and the columns j > i move by -w_i U_ij / U_ii. The same sweep as `gptq`, with 0 in the place of the
    nearest code. X (K, M) is what the layer reads after the layers before it became sparse. Convolutions are unfolded.

    Options:
        sparsity, pattern, layers: see `Sparsify`.
        damping: share of H's mean diagonal that is added to it.
        block: columns whose mask is chosen at once.
        samples, rows: calibration samples, and output positions of a layer, used at most.

    Stats: layers, shares of zeros, and each layer's squared output error relative to the variance of the original output.
    """

    name: ClassVar[str] = "sparsify-sparsegpt"
    float32_only: ClassVar = True

    damping: float = 0.01
    block: int = 128

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.damping <= 0 or self.block < 1:
            raise OptionError(f"options 'damping' and 'block' of {self.name} must be above 0: {self.damping}, {self.block}")

    def choose(self, rows: LayerRows, level: Level) -> torch.Tensor:
        inputs = rows.inputs.to(torch.float64)
        hessian = damped(inputs.transpose(1, 2) @ inputs, self.damping)
        return sparse_gpt(rows.weight.to(torch.float64), hessian, level, self.block).to(torch.float32)


def sparse_gpt(weight: torch.Tensor, hessian: torch.Tensor, level: Level, block: int) -> torch.Tensor:
    """The sparse weight (G, O, K) for a weight (G, O, K) and a positive definite X X^T (G, K, K), float64."""
    size = weight.shape[2]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    work = weight.clone()
    span = level.group or block
    removed = 0
    for start in range(0, size, span):
        end = min(start + span, size)
        scores = (work[:, :, start:end] / diagonal[:, None, start:end]).square()
        if level.group:
            mask = keep_best(scores, level)
        else:
            # What is to be gone by the end of this block, so that the whole layer has its exact count.
            due = level.removed(weight.numel()) * end // size
            order = scores.reshape(-1).sort(stable=True).indices[: due - removed]
            mask = torch.ones(scores.numel(), dtype=torch.bool)
            mask[order] = False
            mask, removed = mask.reshape(scores.shape), due
        errors = torch.zeros_like(scores)
        for i in range(start, end):
            kept = mask[:, :, i - start]
            error = torch.where(kept, 0.0, work[:, :, i] / diagonal[:, None, i])
            work[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
            work[:, :, i] = torch.where(kept, work[:, :, i], 0.0)
            errors[:, :, i - start] = error
        work[:, :, end:] -= errors @ factor[:, start:end, end:]
    return work
