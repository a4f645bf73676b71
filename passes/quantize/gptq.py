"""GPTQ: rounding one column after the other, each error made up for by the columns that are still free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..layerwise import LayerRows
from .rounding import Chosen, Entries, Following, Rounding, Rows, Steps

Nearest = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@register
@dataclass(frozen=True)
class Gptq(Rounding):
    """Chooses codes column by column; what a column loses is spread over the columns after it.

        fake_quantize(w, s, z, qmin, qmax, 0)      ->      fake_quantize(w, s, z, qmin, qmax, 0, codes)

    Frantar et al. 2022 (arXiv:2210.17323, algorithm 1): with H = 2 X X^T + damping and U the upper Cholesky factor of its
    inverse, column i becomes q and the columns j > i move by -(w_i - q) U_ij / U_ii. X (K, M) are the inputs that the layer reads
    in the annotated program, so activations and the layers before it are quantized already. Convolutions are unfolded, K =
    channels a group times taps; grouped and depthwise ones have one H a group.

    Weights behind a table (int4g64, pot4, ...) are rounded in the same way, in whatever order; their groups of inputs keep the
    scales that the float weight gave them.

    Options:
        damping: share of H's mean diagonal that is added to it.
        order: quantize the columns with the largest H_ii first (the paper's code: act-order).
        target: `annotated` keeps W X for the X above, as the paper does; `float` first moves W to the least-squares solution of
            W' X = W X_float, so that a layer also makes up for what the layers before it lost: on nine layers of ResNet-20 and
            MobileNetV2 at 4 bits it left 0.32 of nearest rounding's error (geometric mean), `annotated` 0.91, AdaRound 0.39. The
            solution is that of three quarters of the samples, and each channel goes as far towards it as the others agree. It
            wants many independent rows: MiniLM at 4 bits with 32 sentences, mostly padding, had a Spearman correlation of 0.959
            rounded to nearest, 0.974 with `annotated` and 0.868 with `float`.
        block: columns between two updates of all columns behind them.
        samples: calibration samples used at most.
        rows: output positions of a layer used at most.

    Stats: layers, share of codes that are not the nearest, and each layer's squared output error before and after, relative to
    the variance of the float output.
    """

    name: ClassVar[str] = "gptq"
    tables: ClassVar = True

    damping: float = 0.02
    order: bool = True
    target: Literal["annotated", "float"] = "annotated"
    block: int = 128
    samples: int = 256
    rows: int = 8192

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if self.damping <= 0 or self.block < 1:
            raise OptionError(f"options 'damping' and 'block' of {self.name} must be above 0: {self.damping}, {self.block}")

    def choose(self, rows: Rows, steps: Steps, following: Following | None, generator: torch.Generator) -> Chosen:
        inputs = rows.inputs.to(torch.float64)
        hessian = inputs.transpose(1, 2) @ inputs
        weight = rows.weight.to(torch.float64)
        if self.target == "float":
            weight = weight + self._shift(rows, weight)
        found = gptq(weight, hessian, on_grid(steps), self.damping, self.order, self.block, rows.weight != 0)
        return Chosen(found.to(torch.float32))

    def choose_entries(self, rows: LayerRows, entries: Entries) -> torch.Tensor:
        inputs = rows.inputs.to(torch.float64)
        weight = rows.weight.to(torch.float64)
        if self.target == "float":
            weight = weight + self._shift(rows, weight)
        hessian = inputs.transpose(1, 2) @ inputs
        return gptq(weight, hessian, entries.nearest, self.damping, self.order, self.block, rows.weight != 0)

    def _shift(self, rows: LayerRows, weight: torch.Tensor) -> torch.Tensor:
        """From W towards the least-squares solution on the fitted rows, each channel as far as the other rows agree."""
        fit, check = slice(None, rows.fitted), slice(rows.fitted, None)
        inputs, exact = (v.to(torch.float64) for v in (rows.inputs, rows.exact_inputs))
        gram = damped(inputs[:, fit].transpose(1, 2) @ inputs[:, fit], self.damping)
        shift = torch.linalg.solve(gram, inputs[:, fit].transpose(1, 2) @ (exact - inputs)[:, fit] @ weight.transpose(1, 2))
        gap = (exact - inputs)[:, check] @ weight.transpose(1, 2)
        made = inputs[:, check] @ shift
        share = ((gap * made).sum(1) / made.square().sum(1).clamp_min(1e-300)).clamp(0, 1)
        return (shift * share[:, None]).transpose(1, 2)


def on_grid(steps: Steps) -> Nearest:
    """The steps of a uniform grid are its codes."""

    def nearest(column: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = steps.nearest(column[:, :, None])[:, :, 0]
        return found, found * steps.scale[:, :, 0]

    return nearest


def damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H (G, K, K) plus a share of its mean diagonal, so that it has an inverse."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    return hessian + torch.diag_embed((damping * mean)[:, None].expand(hessian.shape[:2]))


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    nearest: Nearest,
    damping: float,
    order: bool,
    block: int,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Codes (G, O, K) for a weight (G, O, K) and X X^T (G, K, K), all float64; algorithm 1 with all groups at once.

    Args:
        nearest: codes and values of one column, (G, O), whose places among the inputs are (G,).
        kept: which weights may have another value than 0; None: all.
    """
    groups, outputs, size = weight.shape
    hessian = damped(hessian, damping)
    work, kept = weight, torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
    places = torch.arange(size).expand(groups, size)
    if order:
        places = torch.argsort(hessian.diagonal(dim1=1, dim2=2), dim=1, descending=True, stable=True)
        hessian = hessian.gather(1, places[:, :, None].expand_as(hessian)).gather(2, places[:, None, :].expand_as(hessian))
        work, kept = (v.gather(2, places[:, None, :].expand_as(v)) for v in (work, kept))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    work = work.clone()
    chosen = torch.empty_like(work)
    for start in range(0, size, block):
        end = min(start + block, size)
        errors = torch.zeros(groups, outputs, end - start, dtype=torch.float64)
        for i in range(start, end):
            chosen[:, :, i], value = nearest(work[:, :, i] * kept[:, :, i], places[:, i])
            error = (work[:, :, i] - value) / factor[:, None, i, i]
            work[:, :, i:end] -= error[:, :, None] * factor[:, None, i, i:end]
            errors[:, :, i - start] = error
        work[:, :, end:] -= errors @ factor[:, start:end, end:]
    result = torch.empty_like(chosen)
    result.scatter_(2, places[:, None, :].expand_as(chosen), chosen)
    return result
