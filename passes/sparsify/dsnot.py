"""DSnoT: pruned weights come back and others go in their place, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..layerwise import LayerRows
from .base import CalibratedSparsify, Level, keep_best
from .wanda import wanda_scores


@register
@dataclass(frozen=True)
class SparsifyDsnot(CalibratedSparsify):
    """Starts from the mask of Wanda or of magnitudes, and swaps weights in and out as long as a row's expected error shrinks.

        %y = linear(%x, W)      ->      %y = linear(%x, W * mask)               the same count in every row

    Zhang et al. 2024 (arXiv:2310.08915, equations 4 to 6). The expected error of a row is e = sum of W_j E[X_j] over its pruned
    weights. Each cycle grows the pruned weight that lowers |e| most for the variance it brings, sign(e) W_j E[X_j] / Var(X_j);
    and of the kept weights whose loss moves e towards 0 as well, it prunes the one of least |W_j| * ||X_j||_2. With a pattern,
    both lie in one group. The paper swaps until |e| is below 0.1, which depends on a layer's scale; here a row rests once a swap
    would not lower e^2 + sum of W_j^2 Var(X_j) over the pruned weights, the squared error of independent inputs. On the small
    GPT that is better throughout (perplexity 10.23 for 10.32 at 50%, 16.25 for 17.04 at 2:4 after Wanda).

    The pass chooses the first mask itself, because the values of the pruned weights are needed to bring them back.

    Options:
        sparsity, pattern, layers: see `Sparsify`.
        start: the first mask, `wanda` or `magnitude` (compared within a row, as in the paper's code).
        cycles: swaps of a row at most.
        samples, rows: calibration samples, and output positions of a layer, used at most.

    Stats: layers, shares of zeros, and each layer's squared output error relative to the variance of the original output.
    """

    name: ClassVar[str] = "sparsify-dsnot"

    start: Literal["wanda", "magnitude"] = "wanda"
    cycles: int = 50

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.cycles < 1:
            raise OptionError(f"option 'cycles' of {self.name} must be at least 1, not {self.cycles}")

    def choose(self, rows: LayerRows, level: Level) -> torch.Tensor:
        scores = wanda_scores(rows) if self.start == "wanda" else rows.weight.abs()
        mask = keep_best(scores, level, by_row=True)
        return rows.weight * swapped(mask, rows, self.cycles, level.group)


def swapped(mask: torch.Tensor, rows: LayerRows, cycles: int, group: int = 0) -> torch.Tensor:
    """The mask (G, O, K) after at most `cycles` swaps a row; counts of rows, and of groups of columns if any, stay."""
    inputs = rows.inputs.to(torch.float64)
    mean, variance = inputs.mean(1, keepdim=True), inputs.var(1, keepdim=True, correction=0)
    # What a pruned weight adds to the mean, and to the variance, of its row's error.
    effect = rows.weight.to(torch.float64) * mean
    gain = effect / variance.clamp_min(1e-30)
    cost = wanda_scores(rows).to(torch.float64)
    spread = rows.weight.to(torch.float64).square() * variance
    mask = mask.clone()
    error = (effect * ~mask).sum(2, keepdim=True)
    for _ in range(cycles):
        sign = error.sign()
        grown = torch.where(mask, -torch.inf, sign * gain).argmax(2, keepdim=True)
        allowed = mask & (sign * effect < 0)
        if group:
            allowed &= torch.arange(mask.shape[2]) // group == grown // group
        gone = torch.where(allowed, cost, torch.inf).argmin(2, keepdim=True)
        after = error - effect.gather(2, grown) + effect.gather(2, gone)
        change = after.square() - error.square() + spread.gather(2, gone) - spread.gather(2, grown)
        swap = allowed.gather(2, gone) & ~mask.gather(2, grown) & (change < 0)
        if not bool(swap.any()):
            break
        mask.scatter_(2, grown, mask.gather(2, grown) | swap)
        mask.scatter_(2, gone, mask.gather(2, gone) & ~swap)
        error = torch.where(swap, after, error)
    return mask
