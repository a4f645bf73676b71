"""Whether the passes of a pipeline can follow each other: read off their contracts, before any of them runs."""

from __future__ import annotations

from collections.abc import Iterable

from ..ir.errors import PassError
from ..ir.program import Program, Stage
from .base import Pass, registry


def check_order(program: Program, pipeline: Iterable[Pass]) -> None:
    """Follows the stage and the width of floats through the pipeline.

    Raises:
        PassError: a pass that does not take what those before it leave. Names both, and where the pass may stand.
    """
    stage = program.stage
    maker = caster = None
    for index, instance in enumerate(pipeline, 1):
        if stage not in instance.accepts:
            raise PassError(f"pass {index} {_wrong_stage(program, instance, stage, maker)}")
        if instance.leaves is not None and instance.leaves is not stage:
            stage, maker = instance.leaves, instance
        if caster is not None and instance.float32_only:
            raise PassError(f"pass {index} {_wrong_width(instance, caster, stage)}")
        caster = instance if instance.leaves_half else caster


def _wrong_stage(program: Program, instance: Pass, stage: Stage, maker: Pass | None) -> str:
    accepts = ", ".join(s.label for s in instance.accepts)
    found = f"'{program.name}' is {stage.label}"
    if maker is not None:
        found = f"'{maker.name}' before it leaves '{program.name}' {stage.label}"
    ways = []
    later = [s for s in instance.accepts if s > stage]
    if later:
        makers = [name for name, cls in registry().items() if cls.leaves is min(later)]
        ways.append(f"put {' or '.join(makers)} before {instance.name}")
    if min(instance.accepts) < stage:
        ways.append(f"put {instance.name} before {maker.name}" if maker else "begin with the model as it was captured")
    return f"'{instance.name}' takes a program in stage {accepts}, but {found}; {', or '.join(ways)}"


def _wrong_width(instance: Pass, caster: Pass, stage: Stage) -> str:
    way = f"put {caster.name} behind {instance.name}"
    if stage not in caster.accepts:
        way = (
            f"keep one of the two: {caster.name} is for programs that stay float, and {instance.name} leaves an {stage.label} one"
        )
    return f"'{instance.name}' computes in float32, but '{caster.name}' before it leaves values and parameters of 16 bits; {way}"
