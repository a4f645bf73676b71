"""Channel allocation: costs against real cut programs, plans against brute force, and what no plan meets."""

import itertools

import numpy as np
import pytest
import torch
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.ir.errors import OptionError
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import Pipeline, parse
from graphwright.passes.prune.cut import cut
from graphwright.passes.prune.prune_channels import PruneChannels
from graphwright.search.channels import Cost, CostModel, Extent, Losses, Term, bytes_of, choices, free_groups, losses, macs_of
from graphwright.search.problem import InfeasibleError
from graphwright.search.pruning import ChannelSearch, allocate_channels, uniform_ratio
from models import small_cnn, small_inputs
from torch import nn


class Joined(nn.Module):
    """A concatenation, grouped and depthwise convolutions, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 6, 1)
        self.mix = nn.Conv2d(14, 12, 3, padding=1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.grouped = nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.mix(torch.cat([self.left(x), self.right(x)], 1)))
        x = torch.relu(self.grouped(self.depth(x)))
        return self.head(x.mean((2, 3)))


def prepared(module, batch=1):
    return PassManager().run(capture(module.eval(), (small_inputs(batch),)), parse("canonicalize")).program


def context(program, count=16):
    return PassContext(calibration=Calibration.for_program(program, [small_inputs(count, seed=5)]))


@pytest.mark.parametrize("module", [Joined, small_cnn])
def test_costs_are_those_of_the_cut_program(module):
    program = prepared(module())
    groups = free_groups(program)
    model = CostModel(program, groups)
    assert groups
    for seed in range(6):
        generator = np.random.default_rng(seed)
        counts = {g.name: int(generator.integers(1, g.size + 1)) for g in groups}
        smaller = cut(program, {g.name: range(g.size - counts[g.name]) for g in groups})
        assert model.macs().of(counts) == pytest.approx(macs_of(smaller), rel=1e-12)
        assert model.bytes().of(counts) == pytest.approx(bytes_of(smaller), rel=1e-12)


def chain(sizes, losses_of, macs=True):
    """Tables of a chain of layers: each layer's cost is the product of its neighbours' shares."""
    names = [f"g{i}" for i in range(len(sizes))]
    tables = Losses({n: tuple(range(1, s + 1)) for n, s in zip(names, sizes, strict=True)}, {})
    for n, s, scale in zip(names, sizes, losses_of, strict=True):
        tables.loss[n] = scale * (np.arange(s - 1, -1, -1) / s) ** 2
    extents = [Extent(s, ((s, ((n, s),)),)) for n, s in zip(names, sizes, strict=True)]
    terms = [Term(50.0, (extents[0],)), Term(50.0, (extents[-1],))]
    terms += [Term(100.0 * (i + 1), pair) for i, pair in enumerate(itertools.pairwise(extents))]
    return tables, Cost("macs", dict(zip(names, sizes, strict=True)), tuple(terms))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("scales", [(1, 1, 1), (1, 10, 0.1), (5, 0.2, 3)])
def test_plans_meet_the_limit_and_come_near_the_best(share, scales):
    tables, cost = chain((12, 16, 10), scales)
    limit = share * cost.of({})
    plan = allocate_channels(tables, [cost], {"macs": limit})
    assert cost.of(plan.counts) <= limit * (1 + 1e-9) and plan.totals["macs"] == cost.of(plan.counts)
    names = list(tables.counts)
    best = min(
        sum(tables.loss[n][c - 1] for n, c in zip(names, counts, strict=True))
        for counts in itertools.product(*tables.counts.values())
        if cost.of(dict(zip(names, counts, strict=True))) <= limit
    )
    assert plan.loss <= 1.1 * best + 1e-12


def test_no_limit_cuts_nothing():
    tables, cost = chain((6, 8, 5), (1, 1, 1))
    assert allocate_channels(tables, [cost], {"macs": 2 * cost.of({})}).counts == cost.sizes


def test_a_budget_below_the_floor_names_the_smallest():
    tables, cost = chain((6, 8, 5), (1, 1, 1))
    floor = cost.of(dict.fromkeys(cost.sizes, 1))
    with pytest.raises(InfeasibleError, match="smallest feasible") as caught:
        allocate_channels(tables, [cost], {"macs": 0.5 * floor})
    assert caught.value.smallest == {"macs": floor}
    with pytest.raises(InfeasibleError, match="no ratio brings macs"):
        uniform_ratio(cost, 0.5 * floor)


def test_two_limits_hold_together():
    tables, cost = chain((6, 8, 5), (1, 1, 1))
    other = Cost("bytes", cost.sizes, tuple(reversed(cost.terms)), fixed=3.0)
    limits = {"macs": 0.6 * cost.of({}), "bytes": 0.5 * other.of({})}
    plan = allocate_channels(tables, [cost, other], limits)
    assert all(plan.totals[m] <= limits[m] * (1 + 1e-9) for m in limits)


def test_the_least_ratio_that_is_enough():
    _, cost = chain((10, 10, 10), (1, 1, 1))
    ratio = uniform_ratio(cost, 0.5 * cost.of({}))

    def at(r):
        return cost.of({n: s - int(s * r + 1e-9) for n, s in cost.sizes.items()})

    assert at(ratio) <= 0.5 * cost.of({}) < at(ratio - 0.005)


def test_counts_are_multiples_or_the_whole_group():
    assert choices(24, 16, 8) == (16, 24)
    assert choices(6, 1, 16) == (1, 2, 3, 4, 5, 6)
    assert choices(64, 8, 16) == (8, 16, 24, 32, 40, 48, 56, 64)


def test_losses_fall_as_more_stays():
    program = prepared(small_cnn())
    groups = free_groups(program)
    found = losses(program, groups, PruneChannels(samples=8, rows=512), context(program))
    for group in groups:
        row = found.loss[group.name]
        assert found.counts[group.name][-1] == group.size and row[-1] == 0
        assert (np.diff(row) <= 0).all() and row[0] > 0


def test_a_searched_plan_is_a_pipeline_that_meets_its_budget():
    program = prepared(Joined())
    plan = PruneChannels(samples=8, rows=512)
    search = ChannelSearch.of(program, plan, context(program))
    whole = macs_of(program)
    found = search.solve({"macs": 0.5 * whole})
    text = str(Pipeline((found.options(plan),)))
    smaller = PassManager().run(program, parse(text), context(program)).program
    assert macs_of(smaller) == pytest.approx(found.totals["macs"]) and macs_of(smaller) <= 0.5 * whole
    with pytest.raises(OptionError, match="counts macs, bytes, not watts"):
        search.solve({"watts": 1.0})
    with pytest.raises(OptionError, match="leave them out"):
        ChannelSearch.of(program, PruneChannels(ratio=0.5), context(program))
