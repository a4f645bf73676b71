"""What a layer costs at each rank, read off programs compiled with every layer at one rung of its ranks.

One compilation a rung gives the time of every layer in place, as `uniform` does for formats: what is fused with a layer, and
the caches its operands come from, count as they will. The unfactorized program is one more rung.
"""

from __future__ import annotations

import dataclasses
import platform

from ...backends.base import example_inputs
from ...ir.content import content_key
from ...ir.data import Calibration
from ...ir.errors import TargetError
from ...ir.program import Program
from ...passes.base import PassContext
from ...passes.manager import PassManager
from ...passes.pipeline import Pipeline
from ..planner import Surroundings
from ..ranks import WHOLE, LayerRanks, RankTables
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
    rungs = max((len(layer.ranks) - 1 for layer in tables.layers), default=0)
    machine = (platform.processor() or platform.machine(), platform.node())
    times: dict[str, dict[str, float]] = {layer.origin: {} for layer in tables.layers}
    fixed = 0.0
    for rung in range(rungs + 1):
        around.progress(rung, rungs + 1, "price ranks")
        chosen = {layer.origin: rank for layer in tables.layers if (rank := _on_rung(layer, rung)) is not None}
        rules = tuple(f"{origin}={rank}" for origin, rank in chosen.items() if rank != WHOLE)
        head = (dataclasses.replace(tables.method, ranks=rules),) if rules else ()
        passes = Pipeline((*head, *tail))
        key = content_key(program, str(passes), str(pricing.target), pricing.repeats, machine)
        kept = around.store.remember("rank-prices", key, lambda p=passes: _times(program, p, pricing, around))
        for origin, rank in chosen.items():
            own = [t for name, t in kept["layers"].items() if name == origin or _is_part(name, origin)]
            times[origin].setdefault(rank, sum(own))
        if rung == 0:
            fixed = kept["total"] - sum(row[WHOLE] for row in times.values())
    around.progress(rungs + 1, rungs + 1, "price ranks")
    return tables.priced(times, fixed)


def _on_rung(layer: LayerRanks, rung: int) -> str | None:
    """Its rank on a rung: whole on rung 0, then ascending; past its last the last one again, None where it has none."""
    ranks = layer.ranks[:-1]
    return WHOLE if rung == 0 else ranks[min(rung, len(ranks)) - 1] if ranks else None


def _is_part(name: str, origin: str) -> bool:
    """Whether `name` is one of the thin layers that a factorization of `origin` left."""
    head, _, index = name.rpartition(".")
    return head == origin and index in ("0", "1", "2")


def _times(program: Program, pipeline: Pipeline, pricing: Pricing, around: Surroundings) -> dict[str, object]:
    # The values of weights and ranges do not matter here, their shapes do.
    few = None if around.samples is None else Calibration(around.samples.samples[:SAMPLES])
    context = PassContext(calibration=few, seed=around.seed)
    lowered = PassManager().run(program, pipeline, context).program
    compiled = pricing.backend.compile(lowered, pricing.target)
    times = pricing.backend.profile(compiled, example_inputs(lowered), pricing.repeats)
    return {"layers": layer_times(lowered, compiled, times, WEIGHTED), "total": times.total}
