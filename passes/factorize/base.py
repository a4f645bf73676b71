"""What all factorizations share: which layers they take, how a rank is chosen, and the rewriting."""

from __future__ import annotations

import abc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from ...ir.errors import OptionError
from ...ir.program import Program, Stage, origin_of, shape_of
from ..base import LOSSY, Pass, PassContext, PassResult
from ..fold.layer import Layer, layer_of
from ..fold.match import aten
from ..rules import matching, values_by_name
from .decomposition import Decomposition, Part, Rank, parse_rank, rank_text

_FORM = 'LAYER=RANK, such as "fc1=64", or "conv=32x16" (outputs x inputs) for Tucker'


@dataclass(frozen=True)
class Factorize(Pass):
    """Base of the factorizations. Exactly one of `ratio`, `energy` and `ranks` says how far to go.

    Options of all of them:
        ratio: weights kept of each layer, in (0, 1): the largest rank that keeps no more.
        energy: squared size of each layer kept in the method's metric, in (0, 1): the smallest rank that keeps as much.
        ranks: `ORIGIN=RANK`, RANK as 32 or, for Tucker, 32x16 (outputs x inputs); an origin may be a glob and the last match
            counts. Layers without a rule stay whole. This is what a plan writes (see search/ranks.py).
        skip: origins (or globs) of layers that stay whole.
        multiple: what `ratio` and `energy` round ranks to; kernels compute whole vectors of channels.

    Layers that a rank would not make smaller in both weights and multiply-accumulates stay whole; so do grouped and transposed
    convolutions and weights with several readers.

    Stats: layers factorized, their weights before and after, rank and relative error (in the method's metric) of each, and why
    the others stay whole.
    """

    effect: ClassVar = LOSSY
    accepts: ClassVar = (Stage.CANONICAL, Stage.COMPRESSED)
    leaves: ClassVar = Stage.COMPRESSED

    ratio: float | None = None
    energy: float | None = None
    ranks: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    multiple: int = 8

    def requires(self, program: Program, context: PassContext) -> None:
        super().requires(program, context)
        given = [option for option in ("ratio", "energy", "ranks") if getattr(self, option) not in (None, ())]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise OptionError(f"{self.name} takes exactly one of the options ratio, energy and ranks, not {found}")
        for option in ("ratio", "energy"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1:
                raise OptionError(f"option '{option}' of {self.name} must lie in (0, 1), not {value}")
        if self.multiple < 1:
            raise OptionError(f"option 'multiple' of {self.name} must be at least 1, not {self.multiple}")

    @abc.abstractmethod
    def decompositions(
        self, program: Program, layers: Sequence[Layer], context: PassContext, taken: dict[fx.Node, Rank]
    ) -> Iterator[Decomposition]:
        """Each layer in this method's metric, in graph order. Layers in `taken` were given that rank since they were yielded."""

    def run(self, program: Program, context: PassContext) -> PassResult:
        layers, whole = self.layers(program)
        option = f"'ranks' of {self.name}"
        rules = values_by_name(self.ranks, [origin_of(layer.node) for layer in layers], option, _FORM, _rank)
        if rules:
            whole |= {origin_of(x.node): "no rule in 'ranks'" for x in layers if origin_of(x.node) not in rules}
            layers = [layer for layer in layers if origin_of(layer.node) in rules]
        taken: dict[fx.Node, Rank] = {}
        made: list[tuple[Layer, tuple[Part, ...]]] = []
        stats: dict[str, Any] = {"layers": 0, "weights": 0, "weights_before": 0, "ranks": {}, "errors": {}, "whole": whole}
        for found in self.decompositions(program, layers, context, taken):
            node, origin = found.layer.node, origin_of(found.layer.node)
            chosen = self._choose(found, rules)
            if isinstance(chosen, str):
                whole[origin] = chosen
                continue
            taken[node] = chosen
            made.append((found.layer, found.parts(chosen)))
            stats["weights"] += found.parameters(chosen)
            stats["weights_before"] += found.parameters()
            stats["ranks"][origin] = rank_text(chosen)
            stats["errors"][origin] = round(found.error(chosen), 6)
        for layer, parts in made:
            replace(program, layer, parts)
        stats["layers"] = len(made)
        return PassResult(program, bool(made) or program.stage is not self.leaves, stats)

    def layers(self, program: Program) -> tuple[list[Layer], dict[str, str]]:
        """The layers that can be factorized, and for the others why not (by origin)."""
        found, whole = factorizable(program)
        origins = [*(origin_of(layer.node) for layer in found), *whole]
        skipped = set(matching(self.skip, origins, f"'skip' of {self.name}"))
        return [x for x in found if origin_of(x.node) not in skipped], whole | dict.fromkeys(skipped, "skipped")

    def _choose(self, found: Decomposition, rules: Mapping[str, Rank]) -> Rank | str:
        """A rank, or why there is none."""
        if rules:
            rank = rules[origin_of(found.layer.node)]
            found.check(rank)
        elif self.ratio is not None:
            most = self.ratio * found.parameters()
            fitting = [rank for rank in found.ranks(self.multiple) if found.parameters(rank) <= most]
            if not fitting:
                return f"no rank that is a multiple of {self.multiple} keeps {self.ratio:g} of its weights"
            rank = fitting[-1]
        else:
            lost = 1.0 - float(self.energy or 0.0)
            rank = next(rank for rank in found.ranks(self.multiple) if found.error(rank) <= lost + 1e-12)
        return rank if found.saves(rank) else f"rank {rank_text(rank)} saves no weights or no multiply-accumulates"


def _rank(text: str) -> Rank:
    rank = parse_rank(text)
    if rank is None:
        raise ValueError(text)
    return rank


def factorizable(program: Program) -> tuple[list[Layer], dict[str, str]]:
    """The layers that are one matrix, and for the others, by origin, why they are not."""
    readers = Counter(str(n.target) for n in program.nodes if n.op == "get_attr" for _ in n.users)
    found, others = [], {}
    for layer in (layer for node in program.nodes if (layer := layer_of(program, node)) is not None):
        reason = _reason(layer, readers[str(layer.node.args[1].target)])  # type: ignore[union-attr]
        if reason:
            others[origin_of(layer.node)] = reason
        else:
            found.append(layer)
    return found, others


def _reason(layer: Layer, readers: int) -> str:
    if layer.transposed:
        return "transposed convolution"
    if layer.groups > 1:
        return f"convolution with {layer.groups} groups: each is small already"
    if readers > 1:
        return f"its weight has {readers} readers"
    if layer.is_conv and not all(isinstance(d, int) for d in (*shape_of(layer.input)[2:], *shape_of(layer.node)[2:])):
        return "its spatial size is symbolic"
    return ""


def replace(program: Program, layer: Layer, parts: Sequence[Part]) -> fx.Node:
    """Puts thin layers, with origins `ORIGIN.0`, `ORIGIN.1`, ..., in a layer's place; returns the last one."""
    last = chain(program, layer, parts, origin_of(layer.node), layer.node)
    layer.node.replace_all_uses_with(last)
    program.graph.erase_node(layer.node)
    return last


def chain(program: Program, layer: Layer, parts: Sequence[Part], origin: str, before: fx.Node) -> fx.Node:
    """Adds layers one after the other, from the input of `layer` on; returns the last one."""
    name = str(layer.node.args[1].target)  # type: ignore[union-attr]
    value = layer.input
    for index, part in enumerate(parts):
        place = f"{origin}.{index}"
        weight = program.add_parameter(f"{name}_{index}", part.weight.to(layer.weight.dtype).contiguous(), before, place)
        bias = None
        if part.bias is not None:
            bias = program.add_parameter(f"{name}_bias", part.bias.to(layer.weight.dtype), before, place)
        if part.stride:
            zeros = [0] * len(part.stride)
            geometry = (list(part.stride), list(part.padding), list(part.dilation), False, zeros, 1)
            value = program.insert(aten.convolution.default, (value, weight, bias, *geometry), before, place)
        else:
            value = program.insert(aten.linear.default, (value, weight, bias), before, place)
    return value
