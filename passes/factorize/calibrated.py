"""Factorizations that measure the error on data: what a layer reads, as moments."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.content import program_hash
from ...ir.errors import OptionError
from ...ir.program import Program
from ..base import PassContext
from ..fold.layer import Layer
from ..layerwise import LayerRows, Layerwise
from .base import Factorize
from .decomposition import Rank
from .matrix import Matrix

#: Options that do not change what a layer's decomposition is.
CHOICES = frozenset({"ratio", "energy", "ranks", "skip", "multiple"})


@dataclass(frozen=True)
class Calibrated(Factorize):
    """Base of the factorizations that need to see what a layer reads.

    Options of all of them, beside those of `Factorize`:
        samples: calibration samples used at most.
        rows: output positions of a layer used at most; several times its inputs (channels times taps) are wanted.
        damping: share of the mean diagonal of the inputs' second moment that is added to it, so that directions which the
            samples do not show still count a little.
    """

    needs_calibration: ClassVar = True

    samples: int = 128
    rows: int = 8192
    damping: float = 1e-6

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        for option in ("samples", "rows"):
            if getattr(self, option) < 1:
                raise OptionError(f"option '{option}' of {self.name} must be at least 1, not {getattr(self, option)}")
        if self.damping <= 0:
            raise OptionError(f"option 'damping' of {self.name} must be above 0, not {self.damping}")

    @abc.abstractmethod
    def decompose(self, layer: Layer, rows: LayerRows) -> Matrix:
        """The layer in this method's metric."""

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Matrix]:
        """One shot: from the original network, whatever is taken. Kept in `context`: many plans of one model differ in ranks."""
        options = [getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in CHOICES]
        key = f"{self.name} {options} {context.seed} {program_hash(program)}"
        missing = [layer for layer in layers if f"{key} {layer.node.name}" not in context.memo]
        for found in self._walk(program, missing, context, {}):
            context.memo[f"{key} {found.layer.node.name}"] = found
        for layer in layers:
            yield context.memo[f"{key} {layer.node.name}"].of(layer)

    def _walk(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Matrix]:
        wanted = {layer.node for layer in layers}
        if not wanted:
            return
        samples = context.require_calibration(self.name).samples[: self.samples]
        walk = Layerwise(program, samples, context.progress, self.name)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in walk.layers():
            if layer.node in wanted:
                found = self.decompose(layer, walk.rows(layer, self.rows, generator))
                yield found
                if layer.node in taken:
                    walk.rewrite(layer, *found.dense(taken[layer.node]))


@dataclass(frozen=True)
class Moments:
    """Of rows X (M, K) and Y (M, O), float64: means (K,) and (O,), X^T X / M (K, K) and Y^T X / M (O, K), centered or not."""

    mean: torch.Tensor
    mean_output: torch.Tensor
    second: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, inputs: torch.Tensor, outputs: torch.Tensor, centered: bool) -> Moments:
        x, y = inputs.to(torch.float64), outputs.to(torch.float64)
        mean, mean_output = x.mean(0), y.mean(0)
        if centered:
            x, y = x - mean, y - mean_output
        return cls(mean, mean_output, x.T @ x / len(x), y.T @ x / len(x))


def damped(second: torch.Tensor, damping: float) -> torch.Tensor:
    """`second` with `damping` times its mean diagonal added; regular."""
    diagonal = second.diagonal().mean().clamp_min(1e-30)
    return second + damping * diagonal * torch.eye(len(second), dtype=second.dtype)
