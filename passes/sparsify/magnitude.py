"""Magnitude: the smallest weights become zero; LAMP decides how many of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext, register
from ..fold.layer import Layer
from .base import Level, Sparsify, channels_last, keep_best


@register
@dataclass(frozen=True)
class SparsifyMagnitude(Sparsify):
    """Zeroes the weights of smallest magnitude; the others stay as they are. Needs no data.

        %y = linear(%x, W)      ->      %y = linear(%x, W * (|W| among the largest))

    Han et al. 2015 (arXiv:1506.02626). With `allocation=lamp`, layers share one threshold on the score of LAMP (Lee et al. 2021,
    arXiv:2010.07611, equation 4): score(w) = w^2 / sum of u^2 over the weights u of its layer that are not smaller. That is the
    relative squared error a layer takes when w is the next to go, so that no layer is emptied: the largest weight of each has
    score 1. Allocation by measured output distortion and dynamic programming: `search.sparsity`, which writes `layers`.

    Options:
        sparsity, pattern, layers: see `Sparsify`.
        allocation: `uniform`, the same sparsity in every layer, or `lamp`, `sparsity` of all weights together. Layers
            that a rule of `layers` names keep what the rule says and are not counted.

    Stats: layers, share of zeros over all layers, and that of each layer.
    """

    name: ClassVar[str] = "sparsify-magnitude"

    allocation: Literal["uniform", "lamp"] = "uniform"

    def requires(self, program: Program, context: PassContext) -> None:
        if self.allocation == "lamp" and self.pattern:
            raise OptionError(
                f"{self.name}: a pattern fixes the sparsity of every layer, so allocation=lamp has nothing to choose"
            )
        super().requires(program, context)

    def levels(self, layers: Sequence[Layer]) -> dict[fx.Node, Level]:
        found = super().levels(layers)
        if self.allocation == "uniform":
            return found
        default = Level(self.sparsity)
        free = [layer for layer in layers if found[layer.node] == default]
        shares = lamp([layer.weight.detach() for layer in free], self.sparsity)
        return found | {layer.node: Level(share) for layer, share in zip(free, shares, strict=True)}

    def pruned(
        self, program: Program, layers: Sequence[Layer], levels: dict[fx.Node, Level], context: PassContext
    ) -> tuple[dict[fx.Node, torch.Tensor], dict[str, float]]:
        return {layer.node: pruned(layer, levels[layer.node]) for layer in layers if levels[layer.node].sparsity}, {}


def pruned(layer: Layer, level: Level) -> torch.Tensor:
    """The weight of a layer without its smallest magnitudes."""
    order = channels_last(layer)
    scores = layer.weight.detach().reshape(1, len(layer.weight), -1).abs()
    mask = keep_best(scores[:, :, order], level)[:, :, order.argsort()]
    return torch.where(mask.reshape(layer.weight.shape), layer.weight.detach(), 0.0)


def lamp(weights: Sequence[torch.Tensor], sparsity: float) -> list[float]:
    """The sparsity of each weight under one threshold on LAMP scores that removes `sparsity` of all weights."""
    scores = [lamp_scores(weight) for weight in weights]
    flat = torch.cat([torch.zeros(0), *scores])
    removed = round(sparsity * len(flat))
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[flat.sort(stable=True).indices[:removed]] = True
    return [float(part.sum()) / len(part) for part in gone.split([len(s) for s in scores])]


def lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    """LAMP's score of every weight, flat, float64; the largest one has 1."""
    squares, order = weight.reshape(-1).to(torch.float64).square().sort(descending=True, stable=True)
    larger = squares.cumsum(0)
    return torch.empty_like(squares).scatter(0, order, squares / larger.clamp_min(1e-300))
