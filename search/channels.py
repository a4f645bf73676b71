"""What a network costs as a function of how many atoms of each group stay, and how much it loses: plain tables.

    cost(counts) = fixed + sum over terms of amount * product over the term's dimensions of the share that stays

A convolution's multiply-accumulates are proportional to its weight's elements, so that a term is a layer and its dimensions are
the weight's: the channels it reads and those it writes belong to two groups, and the cost is a product of two counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..ir.content import content_key
from ..ir.program import Program, shape_of
from ..passes.base import PassContext
from ..passes.outputs import class_scores, is_classifier
from ..passes.prune.coupling import coupled_groups
from ..passes.prune.criteria import parse_criterion
from ..passes.prune.cut import cut
from ..passes.prune.group import Group
from ..passes.prune.prune_channels import PruneChannels, kept_positions, lowest, rounded
from ..passes.prune.reconstruct import Settings, reconstruct
from ..passes.rules import matching
from .cost.bops import PRODUCTS, WEIGHTED, products
from .store import Store

Counts = Mapping[str, int]

#: Shares of a group that stay where its loss is measured; between and beyond them it follows the criterion.
MEASURED = (0.625, 0.3125)


@dataclass(frozen=True)
class Extent:
    """One dimension of a term.

    Its positions fall into blocks (the parts of a concatenation), and a block may be a product of groups (heads and their width):
    a position stays where it stays in each of them.

    Attributes:
        size: positions.
        blocks: positions of a block, and the (group, atoms) it is a product of.
    """

    size: int
    blocks: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]

    def share(self, gone: Counts) -> float:
        lost = 0.0
        for positions, factors in self.blocks:
            lost += positions * (1.0 - math.prod(1.0 - gone.get(name, 0) / atoms for name, atoms in factors))
        return 1.0 - lost / self.size


@dataclass(frozen=True)
class Term:
    """amount * product of the extents' shares; `curve` (shares ascending, values) replaces the proportion where measured."""

    amount: float
    extents: tuple[Extent, ...]
    curve: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def of(self, gone: Counts) -> float:
        share = math.prod(extent.share(gone) for extent in self.extents)
        return self.amount * share if self.curve is None else float(np.interp(share, *self.curve))


@dataclass(frozen=True)
class Cost:
    """A metric as a function of the counts that stay."""

    metric: str
    sizes: Counts
    terms: tuple[Term, ...]
    fixed: float = 0.0

    def of(self, counts: Counts) -> float:
        gone = {name: self.sizes[name] - count for name, count in counts.items() if count < self.sizes[name]}
        return self.fixed + sum(term.of(gone) for term in self.terms)


def macs_of(program: Program) -> int:
    """Multiply-accumulates of one run; a symbolic batch counts as 1."""
    return sum(_number(work.macs) for work in products(program))


def bytes_of(program: Program) -> int:
    """Bytes of all parameters."""
    return sum(p.numel() * p.element_size() for p in program.parameters().values())


def _number(value: Any) -> int:
    """A size with 1 for every symbol."""
    if isinstance(value, int):
        return value
    expression = value.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


class CostModel:
    """Builds costs of one program from the members and values of its groups."""

    def __init__(self, program: Program, groups: Sequence[Group]) -> None:
        self.program = program
        self.sizes = {group.name: group.size for group in groups}
        self._parameters: dict[tuple[str, int], list[tuple[str, set[int]]]] = {}
        self._values: dict[tuple[str, int], list[tuple[str, set[int]]]] = {}
        for group in groups:
            for member in group.members:
                taken = {i for row in member.indices for i in row}
                self._parameters.setdefault((member.parameter, member.dim), []).append((group.name, taken))
            for node, dim, indices in group.values:
                self._values.setdefault((node, dim), []).append((group.name, {i for row in indices for i in row}))

    def extents(self, node: Any, dims: Iterable[int] | None = None) -> tuple[Extent, ...]:
        """The dimensions of a parameter or value that groups stand in."""
        shape = shape_of(node)
        table, name = (self._parameters, str(node.target)) if node.op == "get_attr" else (self._values, node.name)
        found = []
        for dim in range(len(shape)) if dims is None else [d % len(shape) for d in dims]:
            if (name, dim) in table:
                found.append(Extent(_number(shape[dim]), self._blocks(table[name, dim])))
        return tuple(found)

    def _blocks(self, held: Sequence[tuple[str, set[int]]]) -> tuple[tuple[int, tuple[tuple[str, int], ...]], ...]:
        """Groups whose positions overlap are factors of one block."""
        blocks: list[tuple[set[int], list[str]]] = []
        for name, taken in held:
            apart = [block for block in blocks if block[0].isdisjoint(taken)]
            met = [block for block in blocks if not block[0].isdisjoint(taken)]
            joined = taken.union(*(positions for positions, _ in met)), [n for _, names in met for n in names] + [name]
            blocks = [*apart, joined]
        return tuple((len(positions), tuple((name, self.sizes[name]) for name in names)) for positions, names in blocks)

    def macs(self) -> Cost:
        return Cost("macs", self.sizes, tuple(self.product_terms().values()))

    def product_terms(self) -> dict[str, Term]:
        """Name of a convolution, linear layer or matmul -> its multiply-accumulates."""
        found = {}
        for work in products(self.program):
            node, extents = work.node, ()
            if node.target in WEIGHTED:
                extents = self.extents(node.args[1])
            elif node.target in PRODUCTS:
                extents = (*self.extents(node), *self.extents(node.args[0], [-1]))
            found[node.name] = Term(float(_number(work.macs)), extents)
        return found

    def bytes(self) -> Cost:
        nodes = {str(n.target): n for n in self.program.nodes if n.op == "get_attr"}
        parameters = self.program.parameters()
        terms = [Term(float(p.numel() * p.element_size()), self.extents(nodes[name])) for name, p in parameters.items()]
        return Cost("bytes", self.sizes, tuple(terms))


# -- what each count loses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """What the network loses when so many atoms of one group stay, everything else whole.

    Attributes:
        counts: group name -> counts to choose from, ascending, the last one the whole group.
        loss: group name -> array of the same length, nats for class scores, else relative squared error; the last one 0.
    """

    counts: dict[str, tuple[int, ...]]
    loss: dict[str, np.ndarray]


def losses(
    program: Program,
    groups: Sequence[Group],
    plan: PruneChannels,
    context: PassContext,
    multiple: int = 1,
    levels: int = 16,
    store: Store | None = None,
    key: str = "",
) -> Losses:
    """Losses of every group that can be cut, by measurement at two counts and the criterion's importance between them.

    At MEASURED shares of a group it alone is cut, the layers that read it are fitted as `plan` would fit them, and the outputs
    are compared with the original's on the calibration samples. Over the atoms that go, the criterion's importance adds up to
    E(n), and the loss at other counts is a * E(n)^p through the two points (cf. Xu et al. 2023, whose layer-wise pruning is
    allocated by measured output distortion, which adds up over layers).

    Args:
        multiple: counts are multiples of this (and the whole group). levels: counts of a group at most.
        store, key: what is measured of each group is kept there, under a hash of everything it depends on.
    """
    store = store or Store()
    samples = context.require_calibration("channel allocation").samples[: plan.samples]
    criterion = parse_criterion(plan.criterion)
    importance = criterion.importance(program, groups, context)
    exact = [program(*sample) for sample in samples]
    compare = distortion(program)
    found = Losses({}, {})
    for index, group in enumerate(groups):
        context.progress(index, len(groups), "measure channel groups")
        order = importance[group.name].sort().values.cumsum(0)
        counts = choices(group.size, multiple, levels)
        missing = [float(order[group.size - n - 1]) if n < group.size else 0.0 for n in counts]

        def measure(count: int, group: Group = group) -> float:
            removed = {group.name: lowest(importance[group.name], group.size - count)}
            smaller = cut(program, removed)
            readers = {name for member in group.roles("in") for name in member.layers}
            if plan.reconstruct:
                settings = Settings(plan.rows, plan.damping, context.seed)
                kept = kept_positions(program, [group], removed)
                reconstruct(program, smaller, kept, samples, settings, lambda done, total, what: None, only=readers)
            return float(np.mean([compare(smaller(*s), e) for s, e in zip(samples, exact, strict=True)]))

        points = sorted({min(max(1, round(share * group.size)), group.size - 1) for share in MEASURED})
        measured = store.remember(
            "channels",
            content_key(key, "losses", group.name),
            lambda points=points, order=order, measure=measure, size=group.size: [
                (float(order[size - n - 1]), measure(n)) for n in points
            ],
        )
        found.counts[group.name] = counts
        found.loss[group.name] = _through(measured, np.array(missing))
    context.progress(len(groups), len(groups), "measure channel groups")
    return found


def choices(size: int, multiple: int, levels: int) -> tuple[int, ...]:
    """Counts of a group to choose from, evenly spaced, multiples of `multiple`, the last one the whole group."""
    wanted = {rounded(max(1, round(size * k / levels)), multiple, size) for k in range(1, levels + 1)}
    return tuple(sorted(wanted | {size}))


def _through(points: Sequence[tuple[float, float]], at: np.ndarray) -> np.ndarray:
    """a * x^p through (x, y) points, 0 at 0; p between 1/2 and 3, and 1 where there is one point."""
    xs, ys = (np.maximum(np.array(v), 1e-12) for v in zip(*points, strict=True))
    power = 1.0
    if len(xs) > 1 and xs.max() > xs.min():
        power = float(np.clip(np.polyfit(np.log(xs), np.log(ys), 1)[0], 0.5, 3.0))
    scale = np.exp(np.mean(np.log(ys) - power * np.log(xs)))
    return np.where(at > 0, scale * np.maximum(at, 1e-300) ** power, 0.0)


def distortion(program: Program) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], float]:
    """(outputs, original outputs) -> divergence of class probabilities in nats, or relative squared error, mean over rows."""
    if is_classifier(program) and class_scores(program.outputs[0]) is program.outputs[0]:

        def divergence(outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
            log_p, log_q = exact[0].double().log_softmax(-1), outputs[0].double().log_softmax(-1)
            return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

        return divergence

    def relative(outputs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
        pairs = [(o.double(), e.double()) for o, e in zip(outputs, exact, strict=True)]
        return sum(float((o - e).square().sum() / e.square().sum().clamp_min(1e-30)) for o, e in pairs)

    return relative


def free_groups(program: Program, ignore: Sequence[str] = ()) -> tuple[Group, ...]:
    """The groups that can be cut, but those whose names (or globs) `ignore` holds. Raises UnknownNameError for a name of none."""
    groups = coupled_groups(program)
    ignored = set(matching(ignore, [group.name for group in groups], "'ignore' of prune-channels"))
    return tuple(group for group in groups if not group.pinned and group.name not in ignored)
