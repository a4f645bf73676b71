"""Times every kernel of a compiled program in place: the whole program runs, so operands lie where they really lie."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..base import KernelRow, StepTimes, Timed

if TYPE_CHECKING:
    from .executor import Executor

T = TypeVar("T")

#: Runs before the first one that counts.
WARM_UP_RUNS = 20

#: Runs of a turn that count, and those before them that do not.
BURST, LOST = 10, 2


def run_times(programs: Sequence[Timed], runs: int) -> list[list[float]]:
    """Microseconds of `runs` runs of each program, the copies in and out included; see `in_turns`."""
    return in_turns([_run(load(program, None)) for program in programs], runs)


def step_times(programs: Sequence[Timed], threads: int | None, runs: int) -> list[StepTimes]:
    """Median microseconds of each kernel row of each program, and of a whole run; see `in_turns`. Runs with and without timing
    inside take turns, too."""
    columns = in_turns([_steps(program, load(program, threads)) for program in programs], runs)
    return [
        StepTimes(
            tuple(statistics.median(row) for row in zip(*(steps for _, steps in column), strict=True)),
            statistics.median(whole for whole, _ in column),
        )
        for column in columns
    ]


def in_turns(calls: Sequence[Callable[[], T]], count: int) -> list[list[T]]:
    """`count` results of each call. The calls take turns of BURST, so that a drift of the machine's speed hits all alike; the
    first of a turn, which find the caches full of what another left, do not count."""
    found: list[list[T]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARM_UP_RUNS):
            call()
    for done in range(0, count, BURST):
        for call, results in zip(calls, found, strict=True):
            for _ in range(LOST if len(calls) > 1 else 0):
                call()
            results.extend(call() for _ in range(min(BURST, count - done)))
    return found


def load(program: Timed, threads: int | None) -> tuple[Executor, list[np.ndarray]]:
    from .executor import load_bytes  # loads TVM's runtime; only where something runs

    compiled, inputs = program
    return load_bytes(compiled.library, threads), [x.numpy() for x in inputs]


def _run(loaded: tuple[Executor, list[np.ndarray]]) -> Callable[[], float]:
    """A timed run. Microseconds."""
    run, inputs = loaded

    def call() -> float:
        start = time.perf_counter()
        run(*inputs)
        return (time.perf_counter() - start) * 1e6

    return call


def _steps(program: Timed, loaded: tuple[Executor, list[np.ndarray]]) -> Callable[[], tuple[float, list[float]]]:
    """A timed run, then one whose kernel rows are timed. Microseconds."""
    from .executor import to_tvm

    (compiled, _), (executor, inputs), whole = program, loaded, _run(loaded)
    arguments, outputs = [to_tvm(x) for x in inputs], [to_tvm(y) for y in executor.empty_outputs()]

    def call() -> tuple[float, list[float]]:
        return whole(), row_times(compiled.kernels, executor.step_names, executor.profile(arguments, outputs))

    return call


def row_times(rows: Sequence[KernelRow], steps: Sequence[tuple[str, int]], microseconds: Sequence[float]) -> list[float]:
    """Microseconds of each kernel row, from those of each step that `Executor.profile` gives."""
    return _by_row(rows, _calls(steps, microseconds))


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
