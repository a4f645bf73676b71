"""Channels under limits: a pipeline with one `prune-channels` in, the same pipeline with the count of every group written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..backends.base import example_inputs
from ..backends.registry import backend_for
from ..backends.target import Target
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import PassContext
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline
from ..passes.prune.prune_channels import PruneChannels
from ..search.channels import free_groups
from ..search.cost.channels import allocate_latency, latency_cost
from ..search.cost.uniform import Pricing
from ..search.planner import Surroundings
from ..search.pruning import ChannelPlan, ChannelSearch
from .ranks import runs_here

#: Limit -> metric of the search; all are relative to the program as the passes before the pruning leave it.
LIMITS = {"size": "bytes", "macs": "macs", "latency": "microseconds"}


@dataclass(frozen=True)
class PipelinePlan:
    """pipeline: replays the plan. sizes: group -> atoms it has. whole: metric -> value with every channel."""

    pipeline: Pipeline
    plan: ChannelPlan
    sizes: Mapping[str, int]
    whole: Mapping[str, float]


def plan_channels(
    program: Program,
    pipeline: Pipeline,
    limits: Mapping[str, float],
    target: str,
    around: Surroundings,
    multiple: int | None = None,
) -> PipelinePlan:
    """The counts that lose least within `limits` (see LIMITS), each a share of the whole.

    Counts are multiples of `multiple` where a group is larger than that; None: of what the target's kernels compute at a time.
    A limit on latency stands alone: it is met by the float network as timed on this machine, and a plan that is no faster than
    the network it was made from is refused.

    Raises:
        OptionError: not exactly one prune-channels in the pipeline, counts or a ratio in it already, nothing that can be cut, no
            calibration, or limits beside one on latency.
        InfeasibleError: naming each limit that no counts meet and the least value there is.
        NotFasterError: see above.
    """
    if "latency" in limits and len(limits) > 1:
        raise OptionError("a limit on latency is searched by itself; leave out size and macs, or latency")
    before, method, after = pipeline.cut_at(PruneChannels, "search for channels", "prune-channels")
    context = PassContext(calibration=around.samples, seed=around.seed, progress=around.progress)
    ready = PassManager().run(program, before, context).program
    chosen = Target.parse(target)
    backend = backend_for(chosen)
    multiple = backend.channel_multiple(chosen) if multiple is None else multiple
    if "latency" in limits:
        if not runs_here(backend, chosen):
            raise OptionError(f"a limit on latency is measured, and {chosen} does not run on this machine; limit size or macs")
        pricing = Pricing(backend, chosen, True)
        cost = latency_cost(ready, free_groups(ready, method.ignore), pricing)
        search = ChannelSearch.of(ready, method, context, multiple, (cost,))
        whole_time = 1e3 * backend.latency(backend.compile(ready, chosen), example_inputs(ready), pricing.repeats)
        plan = allocate_latency(search, ready, pricing, limits["latency"] * whole_time)
        whole = {"microseconds": whole_time}
    else:
        search = ChannelSearch.of(ready, method, context, multiple)
        whole = {}
        plan = search.solve({LIMITS[name]: share * _whole(search, LIMITS[name]) for name, share in limits.items()})
    sizes = {group.name: group.size for group in search.groups}
    whole = {cost.metric: _whole(search, cost.metric) for cost in search.costs} | whole
    return PipelinePlan(Pipeline((*before, plan.options(method), *after)), plan, sizes, whole)


def _whole(search: ChannelSearch, metric: str) -> float:
    return next(cost for cost in search.costs if cost.metric == metric).of({})
