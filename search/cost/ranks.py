"""What a layer costs at each rank, read off programs compiled with every layer at one rung of its ranks.

One compilation a rung gives the time of every layer in place, as `uniform` does for formats: what is fused with a layer, and
the caches its operands come from, count as they will. The unfactorized program is one more rung. The rungs are timed in turns:
whether a rank is faster than its layer is a difference between them.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from ...backends.base import example_inputs
from ...ir.content import content_key
from ...ir.data import Calibration
from ...ir.errors import TargetError
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline
from ..planner import Surroundings
from ..ranks import WHOLE, RankTables
from .bops import WEIGHTED
from .uniform import SAMPLES, Pricing, layer_times


def priced(program: Program, tables: RankTables, tail: Pipeline, pricing: Pricing, around: Surroundings) -> RankTables:
    """`tables` with measured microseconds; see `RankTables.priced` for what is dropped.

    Args:
        program: the float program of the tables.
        tail: passes after the factorization, such as quantize and lower-integer; empty: float kernels are timed.

    Raises:
        TargetError: the target does not run on this machine.
    """
    if not pricing.time:
        raise TargetError(f"ranks by measured time need a target that runs here, and {pricing.target} does not")
    rungs = [_on_rung(tables, rung) for rung in range(max((len(layer.ranks) for layer in tables.layers), default=1))]
    pipelines = [_pipeline(tables, ranks, tail) for ranks in rungs]
    machine = (platform.processor() or platform.machine(), platform.node())
    key = content_key(program, [str(p) for p in pipelines], str(pricing.target), pricing.repeats, machine)
    kept = around.store.remember("rank-prices", key, lambda: _price(program, pipelines, pricing, around))
    times: dict[str, dict[str, float]] = {layer.origin: {} for layer in tables.layers}
    for ranks, found in zip(rungs, kept, strict=True):
        for origin, rank in ranks.items():
            own = [t for name, t in found["layers"].items() if name == origin or _is_part(name, origin)]
            times[origin].setdefault(rank, sum(own))
    return tables.priced(times, kept[0]["total"] - sum(row[WHOLE] for row in times.values()))


def _on_rung(tables: RankTables, rung: int) -> dict[str, str]:
    """Each layer's rank on a rung: whole on rung 0, then ascending; past its last the last one again, none where it has none."""
    if rung == 0:
        return {layer.origin: WHOLE for layer in tables.layers}
    return {x.origin: x.ranks[min(rung, len(x.ranks) - 1) - 1] for x in tables.layers if len(x.ranks) > 1}


def _pipeline(tables: RankTables, ranks: Mapping[str, str], tail: Pipeline) -> Pipeline:
    rules = tuple(f"{origin}={rank}" for origin, rank in ranks.items() if rank != WHOLE)
    return Pipeline((*((dataclasses.replace(tables.method, ranks=rules),) if rules else ()), *tail))


def _is_part(name: str, origin: str) -> bool:
    """Whether `name` is one of the thin layers that a factorization of `origin` left."""
    head, _, index = name.rpartition(".")
    return head == origin and index in ("0", "1", "2")


def _price(program: Program, pipelines: Sequence[Pipeline], pricing: Pricing, around: Surroundings) -> list[dict[str, Any]]:
    """Microseconds of every layer, and of a run, of what each pipeline makes."""
    # The values of weights and ranges do not matter here, their shapes do.
    few = None if around.samples is None else Calibration(around.samples.samples[:SAMPLES])
    context = PassContext(calibration=few, seed=around.seed)
    lowered, timed = [], []
    for index, pipeline in enumerate(pipelines):
        around.progress(index, len(pipelines), "price ranks")
        lowered.append(PassManager().run(program, pipeline, context).program)
        timed.append((pricing.backend.compile(lowered[-1], pricing.target), example_inputs(lowered[-1])))
    found = pricing.backend.profiles(timed, pricing.repeats)
    around.progress(len(pipelines), len(pipelines), "price ranks")
    return [
        {"layers": layer_times(smaller, compiled, times, WEIGHTED), "total": times.total}
        for smaller, (compiled, _), times in zip(lowered, timed, found, strict=True)
    ]
