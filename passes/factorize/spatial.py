"""factorize-spatial: a k x k convolution as k x 1, then 1 x k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from ...ir.program import Program, shape_of
from ..base import PassContext, register
from ..fold.layer import Layer
from .base import Factorize
from .decomposition import Decomposition, Part, Rank, positions
from .matrix import Matrix, left_basis


@register
@dataclass(frozen=True)
class FactorizeSpatial(Factorize):
    """Splits two-dimensional kernels along height and width.

        %y = convolution(%x, W, b, kh x kw, stride [s, t], padding [p, q])
     -> %h = convolution(%x, V, kh x 1, stride [s, 1], padding [p, 0]);  %y = convolution(%h, H, b, 1 x kw, [1, t], [0, q])

    Jaderberg, Vedaldi and Zisserman 2014 (arXiv:1405.3866, scheme 2): W (O, I, kh, kw) as a matrix (I * kh, O * kw) of rank r is
    exactly V (r, I, kh, 1) and H (O, r, 1, kw); the nearest one is its truncated singular value decomposition. Layers without
    such a kernel (linear, 1 x 1, one-dimensional) go as in `factorize-svd`.

    Options and stats: see `Factorize`.
    """

    name: ClassVar[str] = "factorize-spatial"

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Decomposition]:
        return (Spatial(x) if len(x.kernel) == 2 and min(x.kernel) > 1 else Matrix(x) for x in layers)


class Spatial(Decomposition):
    """W (O, I, kh, kw) as V (r, I, kh, 1) and H (O, r, 1, kw)."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        outputs, inputs, height, width = layer.weight.shape
        self.matrix = layer.weight.detach().to(torch.float64).permute(1, 2, 0, 3).reshape(inputs * height, outputs * width)
        self.basis, self.energies = left_basis(self.matrix)
        self.energy = float(self.energies.sum())

    @property
    def full(self) -> Rank:
        return (min(self.matrix.shape),)

    def error(self, rank: Rank) -> float:
        return float(self.energies[rank[0] :].sum()) / max(self.energy, 1e-300)

    def sizes(self, rank: Rank) -> tuple[tuple[int, int], ...]:
        between = int(shape_of(self.layer.node)[2]) * int(shape_of(self.layer.input)[3])
        tall, wide = (side * rank[0] for side in self.matrix.shape)
        return (tall, between), (wide, positions(self.layer))

    def parts(self, rank: Rank) -> tuple[Part, ...]:
        layer = self.layer
        outputs, inputs, height, width = layer.weight.shape
        first = self.basis[:, : rank[0]]
        second = first.T @ self.matrix
        balance = second.norm(dim=1).sqrt().clamp_min(1e-12)
        tall = (first * balance).T.reshape(rank[0], inputs, height, 1)
        wide = (second / balance[:, None]).reshape(rank[0], outputs, 1, width).transpose(0, 1)
        (s, t), (p, q), (d, e) = layer.stride, layer.padding, layer.dilation
        bias = None if layer.bias is None else layer.bias64()
        return Part(tall, None, (s, 1), (p, 0), (d, 1)), Part(wide, bias, (1, t), (0, q), (1, e))
