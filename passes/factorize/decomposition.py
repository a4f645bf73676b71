"""What a method says about one layer: its error and its size at every rank, and the thin layers that replace it."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from math import prod

import torch

from ...ir.errors import OptionError
from ...ir.program import origin_of, shape_of
from ..fold.layer import Layer

#: One number; (of the outputs, of the inputs) for Tucker.
Rank = tuple[int, ...]


def rank_text(rank: Rank) -> str:
    """(32,) as `32`, (32, 16) as `32x16`."""
    return "x".join(str(r) for r in rank)


def parse_rank(text: str) -> Rank | None:
    """The inverse of `rank_text`; None where the text is no rank."""
    parts = text.split("x")
    return tuple(int(part) for part in parts) if all(part.isdecimal() for part in parts) else None


@dataclass(frozen=True)
class Part:
    """One layer of a replacement. weight: (O, I) of a linear layer, (O, I, *kernel) of a convolution, with its geometry."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()


def pointwise(layer: Layer, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Part:
    """(O, I) as a linear layer, or as a 1x1 convolution where `layer` is a convolution."""
    dims = len(layer.kernel)
    if not layer.is_conv:
        return Part(weight, bias)
    return Part(weight.reshape(*weight.shape, *[1] * dims), bias, (1,) * dims, (0,) * dims, (1,) * dims)


def positions(layer: Layer) -> int:
    """Output positions of a sample: pixels, or the rows of a linear layer (those of known number)."""
    shape = shape_of(layer.node)
    return prod(int(d) for d in (shape[2:] if layer.is_conv else shape[1:-1]) if isinstance(d, int))


class Decomposition(abc.ABC):
    """A layer in its method's metric, at all ranks at once.

    Attributes:
        layer: the layer.
        energy: its squared size in the metric: what is lost where all of it is dropped. Comparable between layers only where
            the metric is one of the whole network.
    """

    layer: Layer
    energy: float

    @property
    @abc.abstractmethod
    def full(self) -> Rank:
        """The rank at which nothing is lost."""

    @abc.abstractmethod
    def error(self, rank: Rank) -> float:
        """Share of `energy` that is lost, 0 to 1."""

    @abc.abstractmethod
    def sizes(self, rank: Rank) -> tuple[tuple[int, int], ...]:
        """(weights, output positions of a sample) of each thin layer."""

    @abc.abstractmethod
    def parts(self, rank: Rank) -> tuple[Part, ...]:
        """The thin layers, first to last, float64. The last one has the bias."""

    def ranks(self, multiple: int) -> list[Rank]:
        """Multiples of `multiple` below the full rank, ascending, and the full rank."""
        (full,) = self.full
        return [(r,) for r in range(multiple, full, multiple)] + [(full,)]

    def parameters(self, rank: Rank | None = None) -> int:
        """Weights at a rank; None: of the layer as it is."""
        return self.layer.weight.numel() if rank is None else sum(weights for weights, _ in self.sizes(rank))

    def macs(self, rank: Rank | None = None) -> int:
        """Multiply-accumulates of a sample at a rank; None: of the layer as it is."""
        if rank is None:
            return self.layer.weight.numel() * positions(self.layer)
        return sum(weights * places for weights, places in self.sizes(rank))

    def saves(self, rank: Rank) -> bool:
        """Whether both weights and multiply-accumulates fall."""
        return self.parameters(rank) < self.parameters() and self.macs(rank) < self.macs()

    def check(self, rank: Rank) -> None:
        """Raises OptionError where the layer has no such rank."""
        origin, full = origin_of(self.layer.node), self.full
        if len(rank) != len(full):
            raise OptionError(
                f"rank {rank_text(rank)} of '{origin}': it takes {len(full)} number(s), such as {rank_text(full)}, its full rank"
            )
        if any(r > most for r, most in zip(rank, full, strict=True)):
            raise OptionError(
                f"rank {rank_text(rank)} of '{origin}' is larger than its full rank {rank_text(full)}; leave the layer out "
                "of 'ranks' to keep it whole"
            )
        if min(rank) < 1:
            raise OptionError(f"rank {rank_text(rank)} of '{origin}' would leave it empty; the least rank is 1")
