"""factorize-tucker: a k x k convolution as 1 x 1, a small k x k, 1 x 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from ...ir.program import Program, shape_of
from ..base import PassContext, register
from ..fold.layer import Layer
from .base import Factorize
from .decomposition import Decomposition, Part, Rank, pointwise, positions
from .matrix import Matrix, left_basis

#: Rounds of higher-order orthogonal iteration; it settles in a few.
ITERATIONS = 20


@register
@dataclass(frozen=True)
class FactorizeTucker(Factorize):
    """Projects the input and the output channels of convolutions (Tucker-2).

        %y = convolution(%x, W, b, k x k, ...)
     -> %u = convolution(%x, P, 1x1);  %v = convolution(%u, C, k x k, ...);  %y = convolution(%v, Q, b, 1x1)

    Kim et al. 2016 (arXiv:1511.06530): W (O, I, k, k) = sum over s, t of Q (O, s) C (s, t, k, k) P (t, I), by higher-order
    orthogonal iteration (TensorLy's `partial_tucker`). A rank is `s x t`. Where one side keeps all its channels, its 1x1
    convolution is left out. Layers without a kernel (linear, 1 x 1) go as in `factorize-svd`.

    `ratio` and `energy` choose along the path from the full ranks down on which each step gives up the side that loses the
    least of the higher-order SVD's core for the weights it saves.

    Options and stats: see `Factorize`.
    """

    name: ClassVar[str] = "factorize-tucker"

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Decomposition]:
        return (Tucker(layer) if prod(layer.kernel) > 1 else Matrix(layer) for layer in layers)


class Tucker(Decomposition):
    """W (O, I, *kernel) as Q (O, s), C (s, t, *kernel), P (t, I)."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.weight = layer.weight.detach().to(torch.float64)
        flat = self.weight.flatten(2)
        outer, _ = left_basis(flat.flatten(1))
        inner, _ = left_basis(flat.transpose(0, 1).flatten(1))
        core = torch.einsum("oik,os,it->stk", flat, outer, inner).square().sum(2)
        #: kept[s, t]: energy of the core's first s x t channels.
        self.kept = torch.nn.functional.pad(core.cumsum(0).cumsum(1), (1, 0, 1, 0))
        self.energy = float(self.kept[-1, -1])

    @property
    def full(self) -> Rank:
        return self.kept.shape[0] - 1, self.kept.shape[1] - 1

    def error(self, rank: Rank) -> float:
        """An upper bound: iteration improves on the higher-order SVD that it starts from."""
        return max(0.0, self.energy - float(self.kept[rank])) / max(self.energy, 1e-300)

    def sizes(self, rank: Rank) -> tuple[tuple[int, int], ...]:
        outputs, inputs, *kernel = self.weight.shape
        before = prod(int(d) for d in shape_of(self.layer.input)[2:])
        core = (rank[0] * rank[1] * prod(kernel), positions(self.layer))
        first = ((rank[1] * inputs, before),) if rank[1] < inputs else ()
        last = ((outputs * rank[0], positions(self.layer)),) if rank[0] < outputs else ()
        return *first, core, *last

    def saves(self, rank: Rank) -> bool:
        """Also against the layer with one side whole: otherwise two neighbours would be smaller as one."""
        outputs, inputs = self.weight.shape[:2]
        others = {(outputs, rank[1]), (rank[0], inputs)} - {rank}
        return super().saves(rank) and all(self.parameters(rank) < self.parameters(other) for other in others)

    def ranks(self, multiple: int) -> list[Rank]:
        path = [self.full]
        while (lower := self._lower(path[-1], multiple)) is not None:
            path.append(lower)
        return [rank for rank in path[::-1] if self.saves(rank) or rank == self.full]

    def _lower(self, rank: Rank, multiple: int) -> Rank | None:
        """The next rank of the path; None at its end."""
        options = []
        for side in (0, 1):
            less = (rank[side] - 1) // multiple * multiple
            if less >= 1:
                option = (less, rank[1]) if side == 0 else (rank[0], less)
                # By the core's weights: the 1x1 convolutions come and go with the first step of a side.
                saved = rank[0] * rank[1] - option[0] * option[1]
                options.append(((self.error(option) - self.error(rank)) / saved, option))
        return min(options)[1] if options else None

    def parts(self, rank: Rank) -> tuple[Part, ...]:
        from tensorly.decomposition import partial_tucker  # loads SciPy; only this method needs it

        layer, (outputs, inputs) = self.layer, self.weight.shape[:2]
        (core, (outer, inner)), _ = partial_tucker(
            self.weight.numpy(), rank=list(rank), modes=[0, 1], n_iter_max=ITERATIONS, init="svd", random_state=0
        )
        core, outer, inner = (torch.from_numpy(np.ascontiguousarray(v)) for v in (core, outer, inner))
        if rank[1] == inputs:
            core = torch.einsum("st...,it->si...", core, inner)
        if rank[0] == outputs:
            core = torch.einsum("os,st...->ot...", outer, core)
        bias = None if layer.bias is None else layer.bias64()
        ends = rank[0] < outputs
        middle = Part(core, None if ends else bias, layer.stride, layer.padding, layer.dilation)
        first = (pointwise(layer, inner.T),) if rank[1] < inputs else ()
        return *first, middle, *((pointwise(layer, outer, bias),) if ends else ())
