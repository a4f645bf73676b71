"""Times every kernel of a compiled program in place: the whole program runs, so operands lie where they really lie."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from ..base import Compiled, KernelRow, StepTimes

#: Runs before the first one that counts.
WARM_UP_RUNS = 20


def step_times(compiled: Compiled, inputs: Sequence[np.ndarray], threads: int | None, runs: int) -> StepTimes:
    """Median microseconds of each kernel row, and of a whole run without timing inside.

    Runs with and without timing take turns, so that a drift of the machine's speed hits both alike.
    """
    from .executor import load_bytes, to_tvm  # loads TVM's runtime; only where something runs

    program = load_bytes(compiled.library, threads)
    arguments, outputs = [to_tvm(x) for x in inputs], [to_tvm(y) for y in program.empty_outputs()]
    for _ in range(WARM_UP_RUNS):
        program.run(arguments, outputs)
    whole, columns = [], []
    for _ in range(runs):
        start = time.perf_counter()
        program.run(arguments, outputs)
        whole.append((time.perf_counter() - start) * 1e6)
        columns.append(row_times(compiled.kernels, program.step_names, program.profile(arguments, outputs)))
    medians = tuple(statistics.median(column) for column in zip(*columns, strict=True))
    return StepTimes(medians, statistics.median(whole))


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
