"""factorize-svd: a layer as two, nearest in its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from ...ir.program import Program
from ..base import PassContext, register
from ..fold.layer import Layer
from .base import Factorize
from .decomposition import Rank
from .matrix import Matrix


@register
@dataclass(frozen=True)
class FactorizeSvd(Factorize):
    """Truncates the singular value decomposition of every weight.

        %y = linear(%x, W, b)                   ->   %h = linear(%x, A);  %y = linear(%h, B, b)
        %y = convolution(%x, W, b, 3x3, ...)    ->   %h = convolution(%x, A, 3x3, ...);  %y = convolution(%h, B, b, 1x1)

    W (O, K) is nearest to B A, A (r, K) and B (O, r), in the Frobenius norm (Eckart and Young 1936; Denton et al. 2014,
    arXiv:1404.0736, for networks). A convolution is unfolded to (O, channels * taps): r filters, then a 1x1 convolution (Zhang et
    al. 2016, arXiv:1505.06798, without its data). Needs no data; `factorize-whitened-svd` and `factorize-afm` lose less.

    Options and stats: see `Factorize`.
    """

    name: ClassVar[str] = "factorize-svd"

    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Matrix]:
        return (Matrix(layer) for layer in layers)
