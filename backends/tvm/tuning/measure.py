"""Times every choice of a kernel, here or on a board, and says whether one beats the analytical guess.

All candidates are compiled into one module and timed in turn, so that a drift of the machine's speed hits all alike. Weights
rotate over copies that together exceed the second-level cache: in a program they were last read one whole run ago. A board
flushes them (and the output) from its caches before each call instead, which needs no code of ours there. The winner must beat
the guess by more than NOISE both in its least time and in its median.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from tvm.support import cc

from ...interrupt import deferred_interrupt
from ...target import Target
from ..cuda import measure as cuda_measure
from ..executor import aligned_copy, set_threads
from ..kernels.half import NUMPY
from ..memory import SLACK
from ..pipeline import import_llvm
from ..target import linker, require_run, tvm_target
from . import Choice
from .board import FLUSH, Board
from .families import FAMILIES, Specification

#: A choice replaces the guess where it takes less than this share of the guess's time.
NOISE = 0.97

#: Bytes over which weights rotate, and most copies of them.
ROTATION_BYTES, MOST_COPIES = 8 << 20, 32

#: Rounds of the first pass; what is slower than the best by more than KEEP after it is dropped, the rest runs FINAL_ROUNDS more.
FIRST_ROUNDS, KEEP, FINAL_ROUNDS = 3, 1.15, 15

#: Length of one timed batch, seconds.
BATCH_SECONDS = 0.0015

#: Least and most calls of one kernel in one round on a board.
LEAST_CALLS, MOST_CALLS = 3, 50


@dataclass(frozen=True)
class Measured:
    """choice: None where the guess stays. Least and median microseconds of the winner and of the guess; candidates: how many."""

    choice: Choice | None
    microseconds: float
    guess_microseconds: float
    median: float
    guess_median: float
    candidates: int


@dataclass
class _Candidate:
    choice: Choice | None
    name: str
    times: list[float]


#: One round of a kernel, by its name in the library: microseconds a call.
Timer = Callable[[str], float]


def measure(generator: Any, spec: Specification, target: Target, threads: int, board: Board | None = None) -> Measured:
    """Times the guess and every choice of one kernel specification.

    Args:
        board: where the kernels run instead of here, on its own threads.

    Raises:
        TargetError: the target does not run here. OptionError: this process cannot have that many threads. TuningError: no GPU.
        BoardError: the board was lost.
    """
    family = FAMILIES[generator]
    if target.arch == "cuda":
        build = lambda choice: generator(*(spec if choice is None else family.chosen(spec, choice)))  # noqa: E731
        found = cuda_measure.measure(family.space(spec), build)
        least, guess = found.microseconds, found.guess_microseconds
        return Measured(found.choice, least, guess, least, guess, found.candidates)
    if board is None:
        require_run(target)
        set_threads(threads)
    choices: list[Choice | None] = [None, *family.space(spec)]
    functions = [generator(*(spec if choice is None else family.chosen(spec, choice))) for choice in choices]
    named = {f"kernel{i}": f.with_attr("global_symbol", f"kernel{i}") for i, f in enumerate(functions)}
    with deferred_interrupt():
        library = tvm.compile(tvm.transform.Sequential([import_llvm])(tvm.IRModule(named)), target=tvm_target(target))
    arrays = _arrays(functions[0])
    timer = _timer(library, arrays) if board is None else _board_timer(library, arrays, target, board)
    return _choose([_Candidate(choice, name, []) for choice, name in zip(choices, named, strict=True)], timer)


def _choose(candidates: list[_Candidate], timer: Timer) -> Measured:
    """The first candidate is the guess."""
    _rounds(candidates, timer, FIRST_ROUNDS)
    best = min(min(c.times) for c in candidates)
    guess = candidates[0]
    kept = [c for c in candidates if c is guess or min(c.times) <= KEEP * best]
    _rounds(kept, timer, FINAL_ROUNDS)
    winner = min(kept, key=lambda c: min(c.times))
    pairs = [(min(c.times), statistics.median(c.times)) for c in (winner, guess)]
    if any(mine > NOISE * theirs for mine, theirs in zip(*pairs, strict=True)):
        pairs[0], winner = pairs[1], guess
    (least, median), (guess_least, guess_median) = pairs
    return Measured(winner.choice, least, guess_least, median, guess_median, len(candidates))


def _rounds(candidates: Sequence[_Candidate], timer: Timer, rounds: int) -> None:
    for _ in range(rounds):
        for candidate in candidates:
            candidate.times.append(timer(candidate.name))


def _timer(library: Any, arrays: Sequence[np.ndarray]) -> Timer:
    """The mean of a batch of calls in this process."""
    operands = _operands(arrays)

    def batch(name: str, number: int) -> float:
        kernel = library[name]
        kernel(*operands[0])
        start = time.perf_counter()
        for index in range(number):
            kernel(*operands[index % len(operands)])
        return (time.perf_counter() - start) / number * 1e6

    number = max(2, int(BATCH_SECONDS * 1e6 / batch("kernel0", len(operands))))
    return lambda name: batch(name, number)


def _board_timer(library: Any, arrays: Sequence[np.ndarray], target: Target, board: Board) -> Timer:
    """The median of a few calls on the board, each on cold weights."""
    module = board.load(shared_library(library, target))
    arguments = [board.tensor(array) for array in arrays]
    once = min(board.time(module, "kernel0", arguments, LEAST_CALLS, FLUSH))
    calls = min(MOST_CALLS, max(LEAST_CALLS, int(BATCH_SECONDS * 1e6 / once)))
    return lambda name: statistics.median(board.time(module, name, arguments, calls, FLUSH))


def shared_library(library: Any, target: Target) -> bytes:
    """What TVM compiled, as the target's linker makes it a file."""
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path = Path(folder) / "kernels.so"
        library.export_library(str(path), fcompile=cc.cross_compiler(linker(target).command))
        return path.read_bytes()


def _arrays(function: Any) -> list[np.ndarray]:
    """Random arguments: an input, what lies between, and the output."""
    rng = np.random.default_rng(0)
    arrays = []
    for buffer in function.params:
        shape, dtype = tuple(int(d) for d in buffer.shape), str(buffer.dtype)
        info = None if dtype in NUMPY else np.iinfo(dtype)
        if info is None:
            arrays.append(rng.standard_normal(shape).astype(NUMPY[dtype]))
        elif info.bits == 8:
            arrays.append(rng.integers(info.min, info.max + 1, shape).astype(dtype))
        else:
            # Biases, multipliers and shifts: 1 is in the range of each.
            arrays.append(np.ones(shape, dtype))
    return arrays


def _operands(arrays: Sequence[np.ndarray]) -> list[list[Any]]:
    """Argument lists to call in turn: one input and one output, and copies of everything between them."""
    first, *between, last = arrays
    copies = min(MOST_COPIES, 1 + ROTATION_BYTES // max(1, sum(a.nbytes for a in between)))
    x, y = _tensor(first), _tensor(last)
    return [[x, *(_tensor(a) for a in between), y] for _ in range(copies)]


def _tensor(array: np.ndarray) -> Any:
    """A TVM tensor over aligned memory with SLACK bytes behind it."""
    raw = np.zeros(array.nbytes + SLACK, np.uint8)
    raw[: array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory = aligned_copy(raw)[: array.nbytes]
    if array.dtype == NUMPY["bfloat16"]:  # numpy's DLPack has no bfloat16
        bits = memory.view(np.int16).reshape(array.shape)
        return tvm.runtime.from_dlpack(torch.from_numpy(bits).view(torch.bfloat16))
    return tvm.runtime.from_dlpack(memory.view(array.dtype).reshape(array.shape))
