"""`graphwright tune`: measures how the kernels of a model are best cut, here or on a board, and keeps what it finds.

Every finished kernel is written down at once: an interrupted run continues where it stopped. Results never change, only time.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backends.base import example_inputs
from ..backends.host import host_processor
from ..backends.target import Target
from ..backends.tvm.tuning import TuningDatabase, TuningRow, user_path
from ..ir.program import Program
from .progress import silent

if TYPE_CHECKING:
    from ..backends.tvm.tuning.board import Board

Progress = Callable[[int, int, str], None]

#: Runs of each program in one round of `end_to_end`.
RUNS_A_ROUND = 10


@dataclass(frozen=True)
class Kernel:
    """One tunable kernel specification of a program."""

    key: str
    level: str
    generator: Any
    spec: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What a tuning run did. remaining: kernels the budget left for another run."""

    measured: tuple[TuningRow, ...]
    kept: int
    remaining: int


@dataclass(frozen=True)
class EndToEnd:
    """Milliseconds of whole runs, interleaved in one process: (least, median) with the guess and with tuned kernels."""

    guess: tuple[float, float]
    tuned: tuple[float, float]


def kernels_of(program: Program, target: Target) -> list[Kernel]:
    """The distinct tunable kernels of a program, in the order they first run."""
    from ..backends.tvm.parts import lower_parts
    from ..backends.tvm.tuning.families import FAMILIES

    found: dict[tuple[str, str], Kernel] = {}
    lowered, _ = lower_parts(program, target, tunings=TuningDatabase())
    for generator, spec in lowered.specs:
        family = FAMILIES.get(generator)
        key = None if family is None else family.key(spec)
        if family is not None and key is not None:
            kernel = Kernel(key, family.level(spec), generator, spec)
            found.setdefault((kernel.key, kernel.level), kernel)
    return list(found.values())


def tune(
    kernels: Sequence[Kernel],
    target: Target,
    threads: int,
    path: Path,
    budget: float = float("inf"),
    again: bool = False,
    progress: Progress = silent,
    board: Board | None = None,
) -> Outcome:
    """Measures each kernel that `path` has no row for from this processor and thread count, and adds its row.

    Args:
        path: the database that is extended. budget: minutes; a kernel that was begun is finished. again: measure all anew.
        board: what runs the kernels instead of this machine.

    Raises:
        BoardError: the board was lost; the rows of the kernels before are written.
    """
    from ..backends.tvm.cuda.measure import machine as gpu
    from ..backends.tvm.tuning.measure import measure

    database = TuningDatabase.read(path)
    machine = gpu() if target.arch == "cuda" else host_processor() if board is None else board.name
    wanted = [k for k in kernels if again or not _known(database, k, threads, machine)]
    end = time.monotonic() + 60 * budget
    rows: list[TuningRow] = []
    for index, kernel in enumerate(wanted):
        progress(index, len(wanted), "tune kernels")
        if time.monotonic() > end:
            break
        found = measure(kernel.generator, kernel.spec, target, threads, board)
        row = TuningRow(
            kernel.key, kernel.level, found.choice, round(found.microseconds, 2), round(found.guess_microseconds, 2),
            threads, machine, datetime.date.today().isoformat(),
        )  # fmt: skip
        rows.append(row)
        database = database.with_row(row)
        database.write(path)
    progress(len(rows), len(wanted), "tune kernels")
    return Outcome(tuple(rows), len(kernels) - len(wanted), len(wanted) - len(rows))


def _known(database: TuningDatabase, kernel: Kernel, threads: int, machine: str) -> bool:
    row = database.find(kernel.key, kernel.level)
    return row is not None and (row.threads, row.machine) == (threads, machine)


def end_to_end(
    program: Program, target: Target, threads: int, path: Path, rounds: int = 30, board: Board | None = None
) -> EndToEnd:
    """Runs the program built with the guesses and with the rows of `path`, in turn. Wall times: other work disturbs them."""
    from ..backends.tvm.backend import TVMBackend

    inputs = [x.numpy() for x in example_inputs(program)]
    libraries = [
        TVMBackend(tunings).compile(program, target).library for tunings in (TuningDatabase(), TuningDatabase.read(path))
    ]
    timers = [_timer(library, inputs, threads) if board is None else board.timer(library, inputs) for library in libraries]
    times: list[list[float]] = [[], []]
    for index in range(rounds + 1):
        for timer, collected in zip(timers, times, strict=True):
            found = timer(RUNS_A_ROUND)
            if index:  # the first round warms up
                collected += found
    return EndToEnd(*((min(t), statistics.median(t)) for t in times))


def _timer(library: bytes, inputs: Sequence[Any], threads: int) -> Callable[[int], list[float]]:
    """Milliseconds of so many runs in this process, after one that is not counted."""
    from ..backends.tvm.executor import load_bytes

    run = load_bytes(library, threads)

    def timer(runs: int) -> list[float]:
        times = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            run(*inputs)
            times.append((time.perf_counter() - start) * 1e3)
        return times[1:]

    return timer


def default_path(target: Target) -> Path:
    """The user's own database."""
    return user_path(target.arch)
