"""Times every choice of a kernel on this machine and says whether one beats the analytical guess.

All candidates are compiled into one module and timed in turn, so that a drift of the machine's speed hits all alike. Weights
rotate over copies that together exceed the second-level cache: in a program they were last read one whole run ago. The winner
must beat the guess by more than NOISE both in its least time and in its median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tvm

from ...interrupt import deferred_interrupt
from ...target import Target
from ..cuda import measure as cuda_measure
from ..executor import aligned_copy, set_threads
from ..kernels.half import NUMPY
from ..pipeline import import_llvm
from ..target import require_run, tvm_target
from . import Choice
from .families import FAMILIES, Specification

#: A choice replaces the guess where it takes less than this share of the guess's time.
NOISE = 0.97

#: Bytes over which weights rotate, and most copies of them.
ROTATION_BYTES, MOST_COPIES = 8 << 20, 32

#: Rounds of the first pass; what is slower than the best by more than KEEP after it is dropped, the rest runs FINAL_ROUNDS more.
FIRST_ROUNDS, KEEP, FINAL_ROUNDS = 3, 1.15, 15

#: Length of one timed batch, seconds.
BATCH_SECONDS = 0.0015

#: Readable bytes after the end of every buffer: kernels may load a whole vector that starts inside.
SLACK = 64


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
    run: Callable[..., None]
    times: list[float]


def measure(generator: Any, spec: Specification, target: Target, threads: int) -> Measured:
    """Times the guess and every choice of one kernel specification.

    Raises:
        TargetError: the target does not run here. OptionError: this process cannot have that many threads. TuningError: no GPU.
    """
    family = FAMILIES[generator]
    if target.arch == "cuda":
        build = lambda choice: generator(*(spec if choice is None else family.chosen(spec, choice)))  # noqa: E731
        found = cuda_measure.measure(family.space(spec), build)
        least, guess = found.microseconds, found.guess_microseconds
        return Measured(found.choice, least, guess, least, guess, found.candidates)
    require_run(target)
    set_threads(threads)
    choices: list[Choice | None] = [None, *family.space(spec)]
    functions = [generator(*(spec if choice is None else family.chosen(spec, choice))) for choice in choices]
    named = {f"kernel{i}": f.with_attr("global_symbol", f"kernel{i}") for i, f in enumerate(functions)}
    with deferred_interrupt():
        library = tvm.compile(tvm.transform.Sequential([import_llvm])(tvm.IRModule(named)), target=tvm_target(target))
    candidates = [_Candidate(choice, library[name], []) for choice, name in zip(choices, named, strict=True)]
    operands = _operands(functions[0])
    number = _batch(candidates[0], operands)
    _rounds(candidates, operands, number, FIRST_ROUNDS)
    best = min(min(c.times) for c in candidates)
    guess = candidates[0]
    kept = [c for c in candidates if c is guess or min(c.times) <= KEEP * best]
    _rounds(kept, operands, number, FINAL_ROUNDS)
    winner = min(kept, key=lambda c: min(c.times))
    pairs = [(min(c.times), statistics.median(c.times)) for c in (winner, guess)]
    if any(mine > NOISE * theirs for mine, theirs in zip(*pairs, strict=True)):
        pairs[0], winner = pairs[1], guess
    (least, median), (guess_least, guess_median) = pairs
    return Measured(winner.choice, least, guess_least, median, guess_median, len(candidates))


def _operands(function: Any) -> list[list[Any]]:
    """Argument lists to call in turn: one input and one output, and copies of everything between them."""
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


def _batch(candidate: _Candidate, operands: Sequence[list[Any]]) -> int:
    """Calls that fill BATCH_SECONDS."""
    candidate.run(*operands[0])
    start = time.perf_counter()
    for arguments in operands:
        candidate.run(*arguments)
    return max(2, int(BATCH_SECONDS * len(operands) / (time.perf_counter() - start)))


def _rounds(candidates: Sequence[_Candidate], operands: Sequence[list[Any]], number: int, rounds: int) -> None:
    for _ in range(rounds):
        for candidate in candidates:
            candidate.run(*operands[0])
            start = time.perf_counter()
            for index in range(number):
                candidate.run(*operands[index % len(operands)])
            candidate.times.append((time.perf_counter() - start) / number * 1e6)
