"""Where the time of one run goes: every kernel of a compiled program, timed in place, beside the least time it could take.

The whole program runs, kernel after kernel, so operands lie where they really lie. A kernel's floor is the larger of two times:
its operations at the rate of the unit that multiplies its type, and its bytes, each read or written once, at the rate of the
memory level that can hold them (weights: the level that holds the whole program's weights). No kernel can be faster; fusing two
can, because the bytes between them then never leave the registers.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...backends.base import Compiled, KernelRow, example_inputs
from ...backends.target import Target
from ..quick import check_precision, quick_program
from ..sources import resolve
from .peaks import Peaks, peaks

#: Runs before the first one that counts.
WARM_UP_RUNS = 20
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


def profile(
    model: str, precision: str, compiled: Compiled, inputs: Sequence[np.ndarray], rates: Peaks, runs: int = 100
) -> Profile:
    """Times `compiled` on `inputs` with the thread count of `rates`."""
    steps, total = step_times(compiled, inputs, rates.threads, runs)
    held = sum(row.weights for row in compiled.kernels)
    rows = [Step(row, spent, *floor_of(row, rates, held)) for row, spent in zip(compiled.kernels, steps, strict=True)]
    return Profile(model, precision, rates, tuple(rows), total)


def profile_model(model: str, precision: str, threads: int, rounds: int, progress: Callable[[int, int, str], None]) -> Profile:
    """Compiles the model for this machine and profiles it on random inputs; see `quick_program`."""
    from ...backends.tvm.backend import TVMBackend

    check_precision(precision)
    target = Target.parse("cpu")
    rates = peaks(target, threads)
    program = quick_program(resolve(model), precision, progress)
    compiled = TVMBackend().compile(program, target, progress)
    inputs = [x.numpy() for x in example_inputs(program)]
    return profile(program.name, precision, compiled, inputs, rates, rounds * RUNS_A_ROUND)


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


def step_times(compiled: Compiled, inputs: Sequence[np.ndarray], threads: int, runs: int) -> tuple[list[float], float]:
    """(median microseconds of each kernel row, median microseconds of a whole run without timing inside).

    Runs with and without timing take turns, so that a drift of the machine's speed hits both alike.
    """
    from ...backends.tvm.executor import load_bytes, to_tvm  # loads TVM's runtime; only where something runs

    program = load_bytes(compiled.library, threads)
    arguments, outputs = [to_tvm(x) for x in inputs], [to_tvm(y) for y in program.empty_outputs()]
    for _ in range(WARM_UP_RUNS):
        program.run(arguments, outputs)
    whole, columns = [], []
    for _ in range(runs):
        start = time.perf_counter()
        program.run(arguments, outputs)
        whole.append((time.perf_counter() - start) * 1e6)
        calls = _calls(program.step_names, program.profile(arguments, outputs))
        columns.append(_by_row(compiled.kernels, calls))
    return [statistics.median(column) for column in zip(*columns, strict=True)], statistics.median(whole)


def _calls(steps: Sequence[tuple[str, int]], microseconds: Sequence[float]) -> list[tuple[str, float]]:
    """(function, microseconds) of each kernel call: the phases of one call, `name_0`, `name_1`, ..., together."""
    calls: dict[int, list[tuple[str, float]]] = {}
    for (name, call), spent in zip(steps, microseconds, strict=True):
        calls.setdefault(call, []).append((name, spent))
    return [
        (parts[0][0] if len(parts) == 1 else parts[0][0].rpartition("_")[0], sum(spent for _, spent in parts))
        for parts in calls.values()
    ]


def _by_row(rows: Sequence[KernelRow], events: Sequence[tuple[str, float]]) -> list[float]:
    """Microseconds of each row. A designed kernel is one function of its name; an op left to TVM is one or more of other names,
    and of neighbouring ones the last takes what is left over."""
    spent, at = [], 0
    for index, row in enumerate(rows):
        count = 1
        if row.kind != "designed" and (index + 1 == len(rows) or rows[index + 1].kind == "designed"):
            following = rows[index + 1].name if index + 1 < len(rows) else None
            count = next((i for i, (name, _) in enumerate(events[at:]) if name == following), len(events) - at)
        part = events[at : at + count]
        if not part or (row.kind == "designed" and part[0][0] != row.name):
            ran = part[0][0] if part else "nothing"
            raise RuntimeError(f"where the program has kernel '{row.name}', '{ran}' ran")
        spent.append(sum(microseconds for _, microseconds in part))
        at += count
    if at != len(events):
        raise RuntimeError(f"the program ran {len(events)} functions, of which {at} belong to its kernels")
    return spent
