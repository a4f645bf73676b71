"""Microseconds of a network as a function of channel counts: every layer's kernel timed in place at a few uniform widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...backends.base import example_inputs
from ...ir.errors import GraphwrightError
from ...ir.program import Program, origin_of
from ...passes.prune.cut import cut
from ...passes.prune.group import Group
from ...passes.prune.prune_channels import rounded
from ..channels import Cost, CostModel, Counts, Extent, Term
from ..problem import InfeasibleError
from ..pruning import ChannelPlan, ChannelSearch
from .bops import PRODUCTS, WEIGHTED, multiplications
from .uniform import Pricing, layer_times

#: Shares of every group at which the network is compiled and timed.
WIDTHS = (1.0, 0.75, 0.5, 0.25)
#: Plans tried where a measured time is over a limit that the sum of kernels met.
ATTEMPTS = 3
#: A limit is tightened by this much more than a plan was over it: two measurements differ by as much.
MARGIN = 0.01


class NotFasterError(GraphwrightError):
    """A plan made for its latency does not run faster than the network it was made from."""


def latency_cost(program: Program, groups: Sequence[Group], pricing: Pricing) -> Cost:
    """The metric `microseconds`: each layer by the share of its multiplications that stays, between its times at WIDTHS.

    What runs outside the layers goes by the share of all atoms that stay. program: with the batch of the artifact.
    """
    model = CostModel(program, groups)
    multiple = pricing.backend.channel_multiple(pricing.target)
    widths = [{g.name: rounded(max(1, round(w * g.size)), multiple, g.size) for g in groups} for w in WIDTHS]
    whole = Extent(sum(g.size for g in groups), tuple((g.size, ((g.name, g.size),)) for g in groups))
    terms = {name: Term(0.0, term.extents) for name, term in model.product_terms().items()}
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in terms}
    rest: list[tuple[float, float]] = []
    made = [shaped(program, groups, counts) for counts in widths]
    timed = [(pricing.backend.compile(smaller, pricing.target), example_inputs(smaller)) for smaller in made]
    found_times = pricing.backend.profiles(timed, pricing.repeats)
    for counts, smaller, (compiled, _), times in zip(widths, made, timed, found_times, strict=True):
        by_origin = layer_times(smaller, compiled, times, (*WEIGHTED, *PRODUCTS))
        gone = {g.name: g.size - counts[g.name] for g in groups}
        layers = [n for n in smaller.nodes if n.name in terms]
        work: dict[str, int] = {}
        for node in layers:
            work[origin_of(node)] = work.get(origin_of(node), 0) + multiplications(node)
        for node in layers:
            spent = by_origin[origin_of(node)] * multiplications(node) / max(work[origin_of(node)], 1)
            points[node.name].append((float(np.prod([e.share(gone) for e in terms[node.name].extents])), spent))
        rest.append((whole.share(gone), times.total - sum(by_origin.values())))
    found = [Term(0.0, term.extents, _curve(points[name])) for name, term in terms.items()]
    return Cost("microseconds", model.sizes, (*found, Term(0.0, (whole,), _curve(rest))))


def _curve(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(shares, times), both ascending: less work never counts as slower, whatever a measurement says."""
    least: dict[float, float] = {}
    for share, time in points:
        least[share] = min(time, least.get(share, np.inf))
    shares = sorted(least)
    return tuple(shares), tuple(np.maximum.accumulate([least[s] for s in shares]).tolist())


def shaped(program: Program, groups: Sequence[Group], counts: Counts) -> Program:
    """A program with so many atoms of each group, whichever: times depend on shapes alone."""
    return cut(program, {g.name: range(counts[g.name], g.size) for g in groups if counts[g.name] < g.size})


def allocate_latency(search: ChannelSearch, program: Program, pricing: Pricing, share: float) -> ChannelPlan:
    """The plan of least loss whose run takes at most `share` of the whole network's, as both are measured in turns.

    Times are only compared with times of the same turns: the tables' with the whole network's there, a plan's with the whole
    network's beside it. A machine's clock moves by more between them than a plan saves. Where a plan saves less of a run than
    the sum of its kernels foresaw, the limit is tightened by that much and solved again.

    Args:
        search: its costs hold `microseconds` (`latency_cost`), and its counts are multiples of what the backend likes.
        program: the search's program with the batch of the artifact.

    Raises:
        InfeasibleError: no counts are fast enough, by prediction or as measured; its values are microseconds of the tables.
        NotFasterError: the plan that was found is no faster than the whole network.
    """
    backend, target = pricing.backend, pricing.target
    inputs = example_inputs(program)
    original = backend.compile(program, target)
    whole = next(cost for cost in search.costs if cost.metric == "microseconds").of({})
    aim, tried = share, []
    for _ in range(ATTEMPTS):
        plan = search.solve({"microseconds": aim * whole})
        compiled = backend.compile(shaped(program, search.groups, plan.counts), target)
        before, after = (1e3 * spent for spent in backend.latencies([(original, inputs), (compiled, inputs)], pricing.repeats))
        uncut = all(count == search.tables.counts[name][-1] for name, count in plan.counts.items())
        if after >= before and not uncut:
            raise NotFasterError(
                f"pruned to {100 * search.costs[0].of(plan.counts) / search.costs[0].of({}):.0f}% of its multiply-accumulates, "
                f"'{program.name}' takes {after:.1f} us on {target}, and {before:.1f} us as it is: no plan is made. Its kernels "
                "are too small for fewer channels to matter there; ask for bytes or macs instead"
            )
        if after <= share * before or uncut:
            return dataclasses.replace(plan, latency=(before, after))
        tried.append(after / before)
        aim *= (1 - MARGIN) * share * before / after
    raise InfeasibleError(
        f"no counts of channels meet microseconds: limit {share * whole:.6g}, measured {min(tried) * whole:.6g} at best after "
        f"{ATTEMPTS} plans",
        {"microseconds": min(tried) * whole},
    )
