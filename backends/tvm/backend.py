"""The TVM backend: a Program in, one shared library out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import tvm

from ...ir.errors import TargetError
from ...ir.program import Program, Stage
from ...ir.verify import verify
from ..base import Backend, Compiled, Progress, StepTimes, Timed
from ..interrupt import deferred_interrupt
from ..target import Target, TargetInfo
from .cuda.build import build as build_cuda
from .cuda.link import link as link_cuda
from .kernels.base import LANES
from .link import link
from .parts import lower_parts, whole_rows
from .pipeline import build
from .profile import run_times, step_times
from .target import require_emit, require_run, target_rows, tvm_target
from .tuning import TuningDatabase, latency

#: Stages that have a meaning in machine code.
STAGES = (Stage.CANONICAL, Stage.COMPRESSED, Stage.INTEGER)


class TVMBackend(Backend):
    """Compiles through Relax and TIR: designed kernels where there are some, TVM's own lowering for the rest."""

    name = "tvm"

    def __init__(self, tunings: TuningDatabase | None = None) -> None:
        """tunings: measured kernels; by default those that ship with the package and the user's own, read at each compile."""
        self._tunings = tunings

    def targets(self) -> list[TargetInfo]:
        return target_rows()

    def channel_multiple(self, target: Target) -> int:
        return LANES

    def compile(self, program: Program, target: Target, progress: Progress | None = None) -> Compiled:
        """Compiles a canonical, compressed or integer program to one shared library whose entry is `main`.

        Raises:
            TargetError: the target cannot be emitted here, a shape is symbolic, or the stage has no machine code.
            UnsupportedOpError: an op has no lowering. VerificationError: the program is not valid.
        """
        if program.stage not in STAGES:
            raise TargetError(
                f"'{program.name}' is a {program.stage.label} program; the TVM backend compiles "
                f"{', '.join(s.label for s in STAGES)} programs: run the canonicalizing passes (or lower-integer) first"
            )
        require_emit(target)
        verify(program)
        compiler_target = tvm_target(target)
        lowered, parts = lower_parts(program, target, progress, self._tunings)
        if progress is not None:
            progress(1, 2, "generate machine code")
        with deferred_interrupt():
            library = _library(lowered.module, compiler_target, target, parts)
        if progress is not None:
            progress(2, 2, "generate machine code")
        options = {"tvm_target": str(compiler_target), "tuned": list(lowered.tuned), "parts": parts}
        return Compiled(target, library, whole_rows(lowered.kernels, parts), options)

    def latencies(self, programs: Sequence[Timed], repeats: int = 50) -> list[float]:
        for compiled, _ in programs:
            require_run(compiled.target)
        return [statistics.median(column) / 1e3 for column in run_times(programs, repeats)]

    def profiles(self, programs: Sequence[Timed], repeats: int = 100, threads: int | None = None) -> list[StepTimes]:
        for compiled, _ in programs:
            require_run(compiled.target)
        return step_times(programs, threads, repeats)

    def recorded(self, compiled: Compiled) -> StepTimes | None:
        return latency.recorded(compiled)

    def records(self, target: Target) -> str:
        return latency.version(target.arch)


def _library(module: tvm.IRModule, compiler_target: tvm.target.Target, target: Target, parts: int) -> bytes:
    if target.arch == "cuda":
        return link_cuda(build_cuda(module, compiler_target), target)
    region, kernels = build(module, compiler_target, parts)
    return link(region, kernels, target)
