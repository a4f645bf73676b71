"""Channel permutation: which input channels stand together decides what an N:M pattern keeps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...ir.errors import OptionError
from ...ir.program import Program, single_user
from ..base import EXACT, Pass, PassContext, PassResult, register
from ..fold.layer import Layer, layer_of, reading_layers, set_parameters
from ..quantize import operators as ops
from .base import Level

#: Rows of the readers' weights that the search looks at, drawn at random where there are more.
SEARCH_ROWS = 512


@dataclass(frozen=True)
class Site:
    """Channels that may be put in any order: made by one layer, changed element by element, read by other layers alone."""

    producer: Layer
    readers: tuple[Layer, ...]


@register
@dataclass(frozen=True)
class PermuteChannels(Pass):
    """Reorders the channels between layers, so that an N:M pattern over them keeps more of the weights' magnitude.

        %h = linear(%x, V, c)              %h = linear(%x, V[p], c[p])             rows of the producer
        %a = gelu(%h)              ->      %a = gelu(%h)
        %y = linear(%a, W)                 %y = linear(%a, W[:, p])                columns of the readers

    The network computes what it did: the producer makes its channels in the order that the readers want. Pool and Yu 2021
    ("Channel permutations for N:M sparsity", NeurIPS): in rounds, groups of M channels are paired at random, and of all swaps of
    one channel of each the pair takes the one that keeps the most magnitude in sum over the rows, if any keeps more. Run it
    before a sparsity pass with the same `pattern`. Channels of a residual stream have several producers and stay.

    Options:
        pattern: N:M.
        rounds: of the search.

    Stats: sites, and the share of the readers' magnitude that the pattern keeps before and after.
    """

    name: ClassVar[str] = "permute-channels"
    effect: ClassVar = EXACT

    pattern: str = "2:4"
    rounds: int = 60

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        if not Level.parse(self.pattern, f"option 'pattern' of {self.name}").group:
            raise OptionError(f"option 'pattern' of {self.name} must be one such as 2:4, not '{self.pattern}'")
        if self.rounds < 1:
            raise OptionError(f"option 'rounds' of {self.name} must be at least 1, not {self.rounds}")

    def run(self, program: Program, context: PassContext) -> PassResult:
        level = Level.parse(self.pattern, f"option 'pattern' of {self.name}")
        generator = torch.Generator().manual_seed(context.seed)
        before = after = whole = 0.0
        sites = [site for site in find_sites(program) if site.producer.out_channels % level.group == 0]
        moved = 0
        for index, site in enumerate(sites):
            rows = torch.cat([_rows(_current(program, reader)) for reader in site.readers])
            order = permutation(rows, level, self.rounds, generator)
            start, end = kept(rows, level), kept(rows[:, order], level)
            before, after, whole = before + start, after + max(start, end), whole + float(rows.sum())
            if end > start:
                _permute(program, site, order)
                moved += 1
            context.progress(index + 1, len(sites), self.name)
        program.sweep()
        shares = {"kept_before": round(before / max(whole, 1e-300), 4), "kept_after": round(after / max(whole, 1e-300), 4)}
        return PassResult(program, moved > 0, {"sites": moved, **shares})


def find_sites(program: Program) -> Iterator[Site]:
    """Every value between layers whose channels can be reordered, in graph order."""
    for node in program.nodes:
        producer = layer_of(program, node)
        if producer is None or not _free(producer) or not _owns(producer):
            continue
        value = node
        while (reader := single_user(value)) is not None and ops.is_unary(program, reader) and reader.args[0] is value:
            value = reader
        readers = reading_layers(program, value)
        if readers and all(_free(r) and _owns(r) and r.is_conv == producer.is_conv for r in readers):
            yield Site(producer, tuple(readers))


def _free(layer: Layer) -> bool:
    return layer.groups == 1 and not layer.transposed


def _owns(layer: Layer) -> bool:
    """Whether nobody else reads the layer's weight: a shared one would be permuted for both."""
    return len(layer.node.args[1].users) == 1  # type: ignore[union-attr]


def _current(program: Program, layer: Layer) -> Layer:
    """The layer as it is now: a site before may have permuted its rows."""
    found = layer_of(program, layer.node)
    assert found is not None
    return found


def _rows(layer: Layer) -> torch.Tensor:
    """Magnitudes by input channel, one row an output and tap: (O * taps, C)."""
    return layer.weight.detach().abs().movedim(1, -1).reshape(-1, layer.weight.shape[1])


def _permute(program: Program, site: Site, order: torch.Tensor) -> None:
    producer = _current(program, site.producer)
    bias = None if producer.bias is None else producer.bias.detach()[order]
    set_parameters(program, producer, producer.weight.detach()[order], bias)
    for reader in site.readers:
        layer = _current(program, reader)
        set_parameters(program, layer, layer.weight.detach()[:, order], layer.bias)


def kept(rows: torch.Tensor, level: Level) -> float:
    """The magnitude that a pattern keeps of (R, C)."""
    groups = rows.reshape(len(rows), -1, level.group)
    return float(groups.topk(level.kept, 2, sorted=False).values.sum(dtype=torch.float64))


def permutation(rows: torch.Tensor, level: Level, rounds: int, generator: torch.Generator) -> torch.Tensor:
    """An order (C,) of the columns of magnitudes (R, C) under which the pattern keeps no less; see `PermuteChannels`."""
    if len(rows) > SEARCH_ROWS:
        rows = rows[torch.randperm(len(rows), generator=generator)[:SEARCH_ROWS]]
    columns, size = rows.T.contiguous(), level.group
    order = torch.arange(len(columns)).reshape(-1, size)
    pairs = len(order) // 2
    for _ in range(rounds if pairs else 0):
        first, second = torch.randperm(len(order), generator=generator)[: 2 * pairs].reshape(2, pairs)
        a, b = columns[order[first]], columns[order[second]]  # (pairs, size, R)
        gain = torch.stack([_swapped(a, b, i, level.kept) for i in range(size)], 1)
        gain += torch.stack([_swapped(b, a, j, level.kept) for j in range(size)], 2)
        gain -= _best(a, level.kept)[:, None, None] + _best(b, level.kept)[:, None, None]
        best, place = gain.reshape(pairs, -1).max(1)
        for pair in (best > 1e-6 * columns.mean()).nonzero()[:, 0].tolist():
            i, j = divmod(int(place[pair]), size)
            x, y = int(first[pair]), int(second[pair])
            order[x, i], order[y, j] = order[y, j].clone(), order[x, i].clone()
    return order.reshape(-1)


def _swapped(group: torch.Tensor, other: torch.Tensor, out: int, count: int) -> torch.Tensor:
    """What each group (P, M, R) keeps with each channel of the other in the place of its channel `out`: (P, M)."""
    stays = torch.cat([group[:, :out], group[:, out + 1 :]], 1)
    # With one more channel, the `count` largest are those of before, unless the new one beats the least of them.
    largest = stays.topk(min(count, stays.shape[1]), 1).values
    if stays.shape[1] < count:
        return (largest.sum((1, 2))[:, None] + other.sum(2)).to(torch.float32)
    return largest.sum((1, 2))[:, None] + (other - largest[:, -1:]).clamp_min(0).sum(2)


def _best(group: torch.Tensor, count: int) -> torch.Tensor:
    return group.topk(count, 1, sorted=False).values.sum((1, 2))
