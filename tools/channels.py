"""Channels under limits: a pipeline with one `prune-channels` in, the same pipeline with the count of every group written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..backends.registry import backend_for
from ..backends.target import Target
from ..ir.errors import OptionError
from ..ir.program import Program
from ..passes.base import PassContext
from ..passes.fold.canonicalize import Canonicalize
from ..passes.manager import PassManager
from ..passes.pipeline import Pipeline
from ..passes.prune.prune_channels import PruneChannels
from ..search.channels import free_groups
from ..search.cost.channels import allocate_latency, latency_cost
from ..search.cost.uniform import Pricing
from ..search.planner import Surroundings
from ..search.problem import InfeasibleError
from ..search.pruning import ChannelPlan, ChannelSearch
from ..search.store import Store
from .bit_search import in_users_terms
from .job import Job
from .ranks import runs_here

#: Limit -> metric of the search; all are relative to the program as the passes before the pruning leave it.
LIMITS = {"size": "bytes", "macs": "macs", "latency": "microseconds"}


@dataclass(frozen=True)
class PipelinePlan:
    """pipeline: replays the plan, by the pass `chosen` in it. sizes: group -> atoms it has. whole: what limits are shares of."""

    pipeline: Pipeline
    chosen: PruneChannels
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
    whole: Mapping[str, float] | None = None,
) -> PipelinePlan:
    """The counts that lose least within `limits` (see LIMITS), each a share of the whole.

    `whole` says what limits are shares of (metric -> value); None: the program as the passes before the pruning leave it.

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
    pricing = Pricing(backend, chosen, True) if "latency" in limits else None
    if pricing is None:
        search = ChannelSearch.of(ready, method, context, multiple, store=around.store)
        whole = {cost.metric: cost.of({}) for cost in search.costs} | dict(whole or {})
    else:
        if not runs_here(backend, chosen):
            raise OptionError(f"a limit on latency is measured, and {chosen} does not run on this machine; limit size or macs")
        cost = latency_cost(ready, free_groups(ready, method.ignore), pricing)
        search = ChannelSearch.of(ready, method, context, multiple, (cost,), around.store)
        whole = {"microseconds": cost.of({})}
    absolute = {LIMITS[name]: share * whole[LIMITS[name]] for name, share in limits.items()}
    try:
        plan = search.solve(absolute) if pricing is None else allocate_latency(search, ready, pricing, limits["latency"])
    except InfeasibleError as error:
        wide = f" (counts are multiples of {multiple} here)" if multiple > 1 else ""
        raise in_users_terms(error, {LIMITS[name]: (name, whole[LIMITS[name]]) for name in limits}, wide) from error
    sizes = {group.name: group.size for group in search.groups}
    whole = {cost.metric: cost.of({}) for cost in search.costs} | whole
    return PipelinePlan(Pipeline((*before, plan.options(method), *after)), plan.options(method), plan, sizes, whole)


def with_channels(pipeline: Pipeline, prune: PruneChannels) -> Pipeline:
    """The pipeline with `prune` where it names prune-channels, or else behind `canonicalize`, or in front.

        canonicalize, equalize, quantize, ...    ->    canonicalize, prune-channels, equalize, quantize, ...

    Whatever quantizes, or wins back, comes after it.
    """
    passes = pipeline.passes
    named = [i for i, p in enumerate(passes) if isinstance(p, PruneChannels)]
    if named:
        return Pipeline((*passes[: named[0]], prune, *passes[named[0] + 1 :]))
    place = max((i + 1 for i, p in enumerate(passes) if isinstance(p, Canonicalize)), default=0)
    return Pipeline((*passes[:place], prune, *passes[place:]))


def within_macs(job: Job, pipelines: Sequence[Pipeline], store: Store) -> list[Pipeline]:
    """The pipelines with one `prune-channels` whose counts keep the job's limit on `macs`; what was found goes to the plan.

    The counts are searched in the first one, whose own `prune-channels` says how to rank and to fit (`with_channels`), and by
    `round_to` what counts are multiples of: 1 keeps most accuracy, and kernels like what `Backend.channel_multiple` says.

    Raises:
        OptionError: several prune-channels, or counts or a ratio in it already; nothing that can be cut; no calibration.
        InfeasibleError: the limit is below what the smallest counts leave.
    """
    named = [p for p in pipelines[0] if isinstance(p, PruneChannels)]
    passes = pipelines[0] if named else with_channels(pipelines[0], PruneChannels())
    multiple = named[0].round_to if named else 1
    around = Surroundings(job.samples, store=store, seed=job.seed, progress=job.progress)
    found = plan_channels(job.source, passes, {"macs": job.limits["macs"]}, str(job.target), around, multiple, {"macs": job.macs})
    job.decided["channels"] = {
        "counts": {name: [found.sizes[name], count] for name, count in found.plan.counts.items()},
        "predicted": {metric: round(value / found.whole[metric], 4) for metric, value in found.plan.totals.items()},
        "loss": found.plan.loss,
    }
    return [with_channels(pipeline, found.chosen) for pipeline in pipelines]
