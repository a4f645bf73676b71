"""Where the time of one run goes: every kernel of a compiled program, timed in place, beside the least time it could take.

The whole program runs, kernel after kernel, so operands lie where they really lie. A kernel's floor is the larger of two times:
its operations at the rate of the unit that multiplies its type, and its bytes, each read or written once, at the rate of the
memory level that can hold them (weights: the level that holds the whole program's weights). No kernel can be faster; fusing two
can, because the bytes between them then never leave the registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...backends.base import KernelRow, StepTimes, example_inputs
from ...backends.target import Target
from ...ir.data import Calibration
from ..quick import check_precision, quick_program
from ..sources import resolve
from .peaks import Peaks, peaks

#: Timed runs of the whole program in what the command line calls a round.
RUNS_A_ROUND = 10


@dataclass(frozen=True)
class Step:
    """One kernel of a run. microseconds: median over the runs. bound: `int8`, `float32`, ... or `memory`, what sets the floor."""

    row: KernelRow
    microseconds: float
    floor: float
    bound: str

    @property
    def kind(self) -> str:
        """The kernel's name without the number that tells two specifications apart."""
        match = re.fullmatch(r"(.*?(?:_int8|_f32|_bf16|2d)?)\d*", self.row.name)
        return match.group(1) if match is not None and self.row.kind == "designed" else self.row.name


@dataclass(frozen=True)
class Profile:
    """A program's steps in order. total: median microseconds of a whole run with no timing inside."""

    model: str
    precision: str
    peaks: Peaks
    steps: tuple[Step, ...]
    total: float

    @property
    def inside(self) -> float:
        return sum(step.microseconds for step in self.steps)

    @property
    def floor(self) -> float:
        return sum(step.floor for step in self.steps)

    @property
    def outside(self) -> float:
        """Microseconds of a run that no kernel accounts for: the fork and join, the call. Reading the clock may cost more."""
        return self.total - self.inside

    def by_kind(self) -> list[tuple[str, int, float, float]]:
        """(kind, kernels, microseconds, floor), the most expensive first."""
        kinds: dict[str, tuple[int, float, float]] = {}
        for step in self.steps:
            count, spent, floor = kinds.get(step.kind, (0, 0.0, 0.0))
            kinds[step.kind] = (count + 1, spent + step.microseconds, floor + step.floor)
        return sorted(((kind, *sums) for kind, sums in kinds.items()), key=lambda row: -row[2])

    def to_json(self) -> dict[str, Any]:
        steps = [
            {**asdict(s.row), "microseconds": round(s.microseconds, 2), "floor": round(s.floor, 2), "bound": s.bound}
            for s in self.steps
        ]
        return {
            "model": self.model, "precision": self.precision, "peaks": asdict(self.peaks), "total": round(self.total, 2),
            "inside": round(self.inside, 2), "floor": round(self.floor, 2), "steps": steps,
        }  # fmt: skip


def profile(model: str, precision: str, kernels: Sequence[KernelRow], times: StepTimes, rates: Peaks) -> Profile:
    """Puts what a backend timed, with the thread count of `rates`, beside the floors."""
    held = sum(row.weights for row in kernels)
    rows = [Step(row, spent, *floor_of(row, rates, held)) for row, spent in zip(kernels, times.microseconds, strict=True)]
    return Profile(model, precision, rates, tuple(rows), times.total)


def profile_model(model: str, precision: str, threads: int, rounds: int, progress: Callable[[int, int, str], None]) -> Profile:
    """Compiles the model for this machine (see `quick_program`) and profiles it on a sample of its own, where it has some: masks
    and images decide how often kernels meet zeros and denormal numbers. Otherwise on random inputs."""
    from ...backends.tvm.backend import TVMBackend

    check_precision(precision)
    target = Target.parse("cpu")
    rates = peaks(target, threads)
    source = resolve(model)
    program = quick_program(source, precision, progress)
    backend = TVMBackend()
    compiled = backend.compile(program, target, progress)
    own = source.calibration(None, 1)
    sample = Calibration.for_program(program, own).samples[0] if own else example_inputs(program)
    times = backend.profile(compiled, sample, rounds * RUNS_A_ROUND, threads)
    return profile(program.name, precision, compiled.kernels, times, rates)


def floor_of(row: KernelRow, rates: Peaks, held: int) -> tuple[float, str]:
    """(microseconds, what bounds them). held: bytes of all weights of the program, which every run reads once."""
    compute = rates.microseconds(row.macs, row.dtype)
    moved = row.bytes - row.weights
    memory = rates.transfer(row.weights, held) + rates.transfer(moved, moved)
    return (compute, rates.unit(row.dtype)) if compute > memory else (memory, "memory")


#: Columns of the table of steps, and of the table of kinds.
STEP_COLUMNS = ("kernel", "work", "us", "share", "floor (us)", "bound by", "time/floor")
KIND_COLUMNS = ("kind", "kernels", "us", "share", "floor (us)", "time/floor")


def step_rows(found: Profile) -> list[list[str]]:
    return [
        [
            step.kind, step.row.shape, f"{step.microseconds:.1f}", f"{step.microseconds / found.inside:.1%}",
            f"{step.floor:.2f}", step.bound, _ratio(step.microseconds, step.floor),
        ]
        for step in found.steps
    ]  # fmt: skip


def kind_rows(found: Profile) -> list[list[str]]:
    """The kinds, their sum, and what of a run is in no kernel."""
    rows = [
        [kind, str(count), f"{spent:.1f}", f"{spent / found.inside:.1%}", f"{floor:.1f}", _ratio(spent, floor)]
        for kind, count, spent, floor in found.by_kind()
    ]
    whole = [str(len(found.steps)), f"{found.inside:.1f}", "100.0%", f"{found.floor:.1f}", _ratio(found.inside, found.floor)]
    return [*rows, ["all kernels", *whole], ["outside kernels", "", f"{found.outside:.1f}", "", "", ""]]


def _ratio(spent: float, floor: float) -> str:
    return f"{spent / floor:.1f}" if floor > 0.005 else "-"
