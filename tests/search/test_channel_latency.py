"""Latency budgets on a backend whose times are known: plans that meet them, and the refusal of plans that gain nothing."""

import dataclasses
import itertools
import math

import pytest
import torch
from graphwright.backends.base import Backend, Compiled, KernelRow, StepTimes
from graphwright.backends.target import Target
from graphwright.ir.capture import capture
from graphwright.ir.data import Calibration
from graphwright.passes.base import PassContext
from graphwright.passes.manager import PassManager
from graphwright.passes.pipeline import parse
from graphwright.passes.prune.prune_channels import PruneChannels
from graphwright.search.channels import free_groups
from graphwright.search.cost.bops import multiplications, products
from graphwright.search.cost.channels import NotFasterError, allocate_latency, latency_cost, shaped
from graphwright.search.cost.uniform import Pricing
from graphwright.search.problem import InfeasibleError
from graphwright.search.pruning import ChannelSearch
from torch import nn


class FakeBackend(Backend):
    """Times by formula: a product takes `slope` microseconds a multiply-accumulate, its channels padded to `multiple`.

    surprise: microseconds of a run that no kernel accounts for. Each call of `profiles` or `latencies` meets a machine of another
    speed."""

    name = "fake"

    def __init__(self, slope=1e-3, multiple=4, overhead=2.0, surprise=0.0):
        self.slope, self.multiple, self.overhead, self.surprise = slope, multiple, overhead, surprise
        self.clocks = itertools.cycle([1.0])

    def targets(self):
        return []

    def channel_multiple(self, target):
        return self.multiple

    def compile(self, program, target, progress=None):
        rows, times = [], []
        for work in products(program):
            outputs, inputs = work.node.args[1].meta["val"].shape[:2]
            padded = [math.ceil(c / self.multiple) * self.multiple / c for c in (outputs, inputs)]
            rows.append(KernelRow(work.node.name, (work.node.name,), "designed", multiplications(work.node)))
            times.append(self.slope * work.macs * math.prod(padded))
        return Compiled(target, b"", tuple(rows), {"times": times})

    def profiles(self, programs, repeats=100, threads=None):
        clock = next(self.clocks)
        columns = [tuple(clock * spent for spent in compiled.options["times"]) for compiled, _ in programs]
        return [StepTimes(times, sum(times) + clock * self.overhead) for times in columns]

    def latencies(self, programs, repeats=50):
        return [(times.total + self.surprise) / 1e3 for times in self.profiles(programs)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(4, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def program():
    return PassManager().run(capture(Net().eval(), (torch.zeros(1, 4, 6, 6),)), parse("canonicalize")).program


def searched(program, backend):
    pricing = Pricing(backend, Target("x86", "avx2"), True)
    x = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    context = PassContext(calibration=Calibration.for_program(program, [x]))
    cost = latency_cost(program, free_groups(program), pricing)
    plan = PruneChannels(samples=8, rows=256)
    return ChannelSearch.of(program, plan, context, backend.channel_multiple(pricing.target), [cost]), pricing


def time_of(program, search, backend, counts):
    return backend.profile(backend.compile(shaped(program, search.groups, counts), Target("x86", "avx2")), ()).total


def test_predicted_times_are_those_of_the_kernels(program):
    backend = FakeBackend()
    search, _ = searched(program, backend)
    cost = next(c for c in search.costs if c.metric == "microseconds")
    for counts in ({"one": 16, "two": 24}, {"one": 8, "two": 12}, {"one": 12, "two": 20}):
        assert cost.of(counts) == pytest.approx(time_of(program, search, backend, counts), rel=0.05)


def test_a_latency_budget_is_met_by_counts_that_kernels_like(program):
    backend = FakeBackend()
    search, pricing = searched(program, backend)
    whole = time_of(program, search, backend, {"one": 16, "two": 24})
    plan = allocate_latency(search, program, pricing, 0.6)
    assert time_of(program, search, backend, plan.counts) <= 0.6 * whole
    assert all(count % 4 == 0 for count in plan.counts.values())
    assert plan.latency == pytest.approx((whole, time_of(program, search, backend, plan.counts)))


def test_a_machine_of_changing_speed_changes_no_plan(program):
    """Prices at one clock, the whole network at another, a plan at a third: only times of the same turns are compared."""
    steady, moving = FakeBackend(), FakeBackend()
    moving.clocks = itertools.cycle([2.0, 0.7, 1.3])
    plans = []
    for backend in (steady, moving):
        search, pricing = searched(program, backend)
        plans.append(allocate_latency(search, program, pricing, 0.6).counts)
    assert plans[0] == plans[1]


def test_a_plan_that_is_not_faster_is_not_made(program):
    backend = FakeBackend()
    search, pricing = searched(program, backend)
    whole = time_of(program, search, backend, {"one": 16, "two": 24})

    class Stuck(FakeBackend):
        def latencies(self, programs, repeats=50):
            return [whole / 1e3 for _ in programs]  # whatever the channels

    with pytest.raises(NotFasterError, match=r"'Net' takes .* as it is: no plan is made"):
        allocate_latency(search, program, dataclasses.replace(pricing, backend=Stuck()), 0.6)


def test_a_network_slower_than_its_kernels_tightens_the_plan_or_says_how_far_it_came(program):
    backend = FakeBackend()
    search, pricing = searched(program, backend)
    whole = time_of(program, search, backend, {"one": 16, "two": 24})
    slow = FakeBackend(surprise=0.1 * whole)
    plan = allocate_latency(search, program, dataclasses.replace(pricing, backend=slow), 0.7)
    assert time_of(program, search, backend, plan.counts) + 0.1 * whole <= 0.7 * 1.1 * whole
    assert plan.totals["microseconds"] < 0.67 * whole, "tighter than what was asked for"
    with pytest.raises(InfeasibleError, match="smallest feasible") as caught:
        allocate_latency(search, program, pricing, 0.01)
    assert caught.value.smallest["microseconds"] > 0.01 * whole
