"""Channel allocation: from limits to the counts of `prune-channels{keep=[GROUP=COUNT, ...]}`.

The cost of a layer is a product of two groups' counts, and solvers add costs up. So the budget falls from the whole network's
cost to the limit in small steps; each step solves the problem with costs linearized at the counts of the step before it, and what
the linearization missed is taken off the budget of the last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from ..ir.content import content_key
from ..ir.data import Calibration
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import PassContext
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline
from ..passes.prune.group import Group
from ..passes.prune.prune_channels import PruneChannels
from .channels import Cost, CostModel, Counts, Losses, distortion, free_groups, losses
from .problem import InfeasibleError, Limit, Problem
from .solvers import solve
from .store import Store

#: Steps in which the budget falls, and tries to meet it exactly at the end.
STEPS, TRIES = 12, 8
#: A group that is added to (a residual stream) loses more among other cuts than alone; by how much is tried out: its
#: measured loss times each of these gives a plan, and the plan that loses least on held-out samples is taken.
STREAM_FACTORS = (1.0, 4.0, 1e3)
#: Samples behind the loss tables, at most: they only rank.
TABLE_SAMPLES = 256
#: No group moves by more than this share of its size in one step.
REACH = 0.25


@dataclass(frozen=True)
class ChannelPlan:
    """counts: group -> atoms that stay. loss: predicted, by the tables. totals: metric -> value, by the cost model."""

    counts: dict[str, int]
    loss: float
    totals: dict[str, float]
    #: Measured distortion of the outputs, where whole plans were tried.
    measured: float | None = None
    #: Microseconds of a run of the whole network and of the plan's, measured in turns, where a limit was on time.
    latency: tuple[float, float] | None = None

    def options(self, plan: PruneChannels) -> PruneChannels:
        """`plan` with every count written out: its text alone replays the plan."""
        keep = tuple(f"{name}={count}" for name, count in self.counts.items())
        return dataclasses.replace(plan, ratio=None, keep=keep, scope="group", round_to=1, ignore=())


@dataclass(frozen=True)
class ChannelSearch:
    """Everything an allocation asks of one program, made once and solved for any limits.

    Attributes:
        plan: criterion and reconstruction that the plan will use.
        context: with calibration samples, whose last quarter judges whole plans.
        store, key: where what was measured is kept, under a hash of everything it depends on: a killed search goes on.
    """

    program: Program
    plan: PruneChannels
    context: PassContext
    groups: tuple[Group, ...]
    tables: Losses
    costs: tuple[Cost, ...]
    store: Store
    key: str

    @classmethod
    def of(
        cls,
        program: Program,
        plan: PruneChannels,
        context: PassContext,
        multiple: int = 1,
        costs: Sequence[Cost] = (),
        store: Store | None = None,
    ) -> ChannelSearch:
        """program: canonical or compressed. multiple: what counts are rounded to. costs: besides `macs` and `bytes`.

        Raises:
            OptionError: a plan with counts already, or nothing that can be cut.
        """
        if plan.keep or plan.ratio is not None:
            raise OptionError("prune-channels has a ratio or counts already (keep=[...]); leave them out for an allocation")
        groups = free_groups(program, plan.ignore)
        if not groups:
            raise OptionError(f"'{program.name}' has no group of channels that can be cut (inspect --groups says what pins them)")
        samples = context.require_calibration("channel allocation").samples
        small = dataclasses.replace(context, calibration=Calibration(_first(samples, TABLE_SAMPLES)))
        model = CostModel(program, groups)
        store, key = store or Store(), content_key(program, plan, samples, context.seed)
        tables = losses(program, groups, plan, small, multiple, store=store, key=key)
        return cls(program, plan, context, groups, tables, (model.macs(), model.bytes(), *costs), store, key)

    def solve(self, limits: Mapping[str, float]) -> ChannelPlan:
        """The plan of least measured distortion among those of STREAM_FACTORS, each of least predicted loss within `limits`.

        Raises:
            InfeasibleError: no counts meet the limits. OptionError: a limit on what is not counted.
        """
        unknown = set(limits) - {cost.metric for cost in self.costs}
        if unknown:
            raise OptionError(f"channel allocation counts {', '.join(c.metric for c in self.costs)}, not {sorted(unknown)[0]}")
        plans: dict[tuple[int, ...], ChannelPlan] = {}
        for factor in STREAM_FACTORS:
            found = allocate_channels(self._weighted(factor), self.costs, limits)
            plans.setdefault(tuple(found.counts.values()), found)
        if len(plans) == 1:
            return next(iter(plans.values()))
        judged = [(self.measure(plan), index, plan) for index, plan in enumerate(plans.values())]
        least, _, best = min(judged)
        return dataclasses.replace(best, measured=least)

    def measure(self, plan: ChannelPlan) -> float:
        """Distortion of the outputs on the last quarter of the samples when the pass has run on the others."""
        return self.store.remember(
            "channels", content_key(self.key, "plan", plan.options(self.plan)), lambda: self._measure(plan)
        )

    def _measure(self, plan: ChannelPlan) -> float:
        samples = self.context.require_calibration("channel allocation").samples
        first = max(1, len(samples) * 3 // 4)
        context = dataclasses.replace(self.context, calibration=Calibration(samples[:first]), memo={})
        program = PassManager().run(self.program, Pipeline((plan.options(self.plan),)), context).program
        compare = distortion(self.program)
        return float(np.mean([compare(program(*s), self.program(*s)) for s in samples[first:] or samples]))

    def _weighted(self, factor: float) -> Losses:
        sums = {node.name for node in self.program.nodes if node.target is torch.ops.aten.add.Tensor and _of_values(node)}
        streams = {group.name for group in self.groups if any(name in sums for name, _, _ in group.values)}
        return Losses(self.tables.counts, {n: row * (factor if n in streams else 1.0) for n, row in self.tables.loss.items()})


def _of_values(node: fx.Node) -> bool:
    return sum(read.op != "get_attr" for read in node.all_input_nodes) > 1


def _first(samples: Sequence, rows: int) -> tuple:
    """The first samples that hold at most so many rows together, one at least."""
    found, count = [], 0
    for sample in samples:
        count += len(sample[0]) if sample[0].dim() else 1
        if found and count > rows:
            break
        found.append(sample)
    return tuple(found)


def uniform_ratio(cost: Cost, most: float) -> float:
    """The smallest share of every group, to 0.005, that goes so that the cost is at most `most`.

    Raises:
        InfeasibleError: no share below 1 is enough.
    """
    for step in range(200):
        ratio = step / 200
        if cost.of({name: size - math.floor(size * ratio + 1e-9) for name, size in cost.sizes.items()}) <= most:
            return ratio
    smallest = cost.of(dict.fromkeys(cost.sizes, 1))
    raise InfeasibleError(
        f"no ratio brings {cost.metric} to {most:.6g}, smallest feasible {smallest:.6g}", {cost.metric: smallest}
    )


def allocate_channels(tables: Losses, costs: Sequence[Cost], limits: Mapping[str, float], solver: str = "ilp") -> ChannelPlan:
    """The counts of least loss whose costs meet the limits.

    Args:
        costs: one for each limit at least; limits: metric -> most, in the cost's own unit.

    Raises:
        InfeasibleError: the smallest counts cost more than a limit.
    """
    bounded = [cost for cost in costs if cost.metric in limits]
    smallest = {name: counts[0] for name, counts in tables.counts.items()}
    unmet = {c.metric: c.of(smallest) for c in bounded if c.of(smallest) > limits[c.metric] * (1 + 1e-9)}
    if unmet:
        parts = [f"{metric}: limit {limits[metric]:.6g}, smallest feasible {value:.6g}" for metric, value in unmet.items()]
        raise InfeasibleError(f"no counts of channels meet {'; '.join(parts)}. Raise these limits, or ignore fewer groups", unmet)
    now = {name: counts[-1] for name, counts in tables.counts.items()}
    whole = {cost.metric: cost.of(now) for cost in bounded}
    goal = {metric: min(limits[metric], whole[metric]) for metric in whole}
    for step in range(1, STEPS + 1):
        budget = {m: whole[m] + (goal[m] - whole[m]) * step / STEPS for m in whole}
        now = _step(tables, bounded, now, budget, solver)
    now = _met(tables, bounded, now, goal, solver)
    now = _polished(tables, bounded, now, goal)
    return ChannelPlan(now, _loss(tables, now), {cost.metric: cost.of(now) for cost in costs})


def _step(tables: Losses, costs: Sequence[Cost], now: Counts, budget: Mapping[str, float], solver: str) -> dict[str, int]:
    """The best counts near `now` by costs linearized there; the cheapest ones near it where none meets the budget."""
    near = {name: _near(counts, now[name]) for name, counts in tables.counts.items()}
    rows = {
        cost.metric: tuple(np.array([cost.of({**now, name: n}) - cost.of(now) for n in counts]) for name, counts in near.items())
        for cost in costs
    }
    loss = tuple(
        np.array([tables.loss[name][tables.counts[name].index(n)] for n in counts], dtype=np.float64)
        for name, counts in near.items()
    )
    limits = tuple(Limit(cost.metric, rows[cost.metric], budget[cost.metric], cost.of(now)) for cost in costs)
    reachable = tuple(dataclasses.replace(limit, most=max(limit.most, limit.least)) for limit in limits)
    problem = Problem(tuple(near), tuple(tuple(map(str, counts)) for counts in near.values()), loss, reachable)
    chosen = solve(problem, solver).chosen
    return {name: counts[c] for (name, counts), c in zip(near.items(), chosen, strict=True)}


def _near(counts: Sequence[int], now: int) -> tuple[int, ...]:
    reach = max(REACH * counts[-1], 1)
    at = counts.index(now)
    return tuple(n for i, n in enumerate(counts) if abs(n - now) <= reach or abs(i - at) <= 1)


def _met(tables: Losses, costs: Sequence[Cost], now: Counts, goal: Mapping[str, float], solver: str) -> dict[str, int]:
    """Counts that meet the goal by the costs themselves: each excess is taken off the budget and solved again."""
    budget, best = dict(goal), None
    for _ in range(TRIES):
        now = _step(tables, costs, now, budget, solver)
        over = {c.metric: c.of(now) - goal[c.metric] for c in costs}
        if all(excess <= 1e-9 * abs(goal[m]) for m, excess in over.items()):
            if best is None or _loss(tables, now) < _loss(tables, best):
                best = dict(now)
        else:
            budget = {m: budget[m] - max(0.0, excess) for m, excess in over.items()}
    return _shrunk(tables, costs, now, goal) if best is None else best


def _shrunk(tables: Losses, costs: Sequence[Cost], now: Counts, goal: Mapping[str, float]) -> dict[str, int]:
    """One count at a time less, the one that loses least for what it saves, until the goal is met."""
    current = dict(now)
    while True:
        over = [c for c in costs if c.of(current) > goal[c.metric] * (1 + 1e-9)]
        if not over:
            return current
        moves = []
        for name, counts in tables.counts.items():
            at = counts.index(current[name])
            if at:
                less = {**current, name: counts[at - 1]}
                saved = sum((c.of(current) - c.of(less)) / goal[c.metric] for c in over)
                moves.append(((_loss(tables, less) - _loss(tables, current)) / max(saved, 1e-12), name, counts[at - 1]))
        _, name, count = min(moves)
        current[name] = count


def _polished(tables: Losses, costs: Sequence[Cost], now: Counts, goal: Mapping[str, float]) -> dict[str, int]:
    """One count more, or one more of a group for one less of another, whichever gains most within the goal, while any does."""
    current = dict(now)
    while True:
        moves = []
        for name, counts in tables.counts.items():
            at = counts.index(current[name])
            if at + 1 == len(counts):
                continue
            more = {**current, name: counts[at + 1]}
            for other, less in [(name, None), *_one_less(tables, more, name)]:
                tried = more if less is None else {**more, other: less}
                gain = _loss(tables, current) - _loss(tables, tried)
                if gain > 1e-12 and all(c.of(tried) <= goal[c.metric] * (1 + 1e-9) for c in costs):
                    moves.append((gain, name, tried))
                    break
        if not moves:
            return current
        current = max(moves, key=lambda move: move[:2])[2]


def _one_less(tables: Losses, counts: Counts, but: str) -> list[tuple[str, int]]:
    """Every other group with one count less, the least loss first."""
    found = []
    for name, row in tables.counts.items():
        at = row.index(counts[name])
        if name != but and at:
            found.append((float(tables.loss[name][at - 1] - tables.loss[name][at]), name, row[at - 1]))
    return [(name, count) for _, name, count in sorted(found)]


def _loss(tables: Losses, counts: Counts) -> float:
    return sum(float(tables.loss[name][tables.counts[name].index(n)]) for name, n in counts.items())
