"""How a batch is cut: into parts that the tasks of a run compute one by one, each with activations that stay in its core's cache.

A kernel over a whole batch writes all images before the next kernel reads the first; on several cores, half of what each of them
reads lies in another one's cache besides, and all wait for one another between two kernels. Parts of few samples avoid all that;
what they cost is that weights are read once a part, and the calls of the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...ir.parts import in_parts
from ...ir.program import Program
from ..base import KernelRow, Progress
from ..target import Target
from .lower import Lowered, lower
from .tuning import TuningDatabase

#: Bytes that a kernel should read and write on average, weights not counted: what a core's second-level cache holds.
KEPT_BYTES = 1 << 20

#: Fewer parts share the cores of a machine badly, so a smaller batch is cut into its samples.
LEAST_PARTS = 4

#: Multiply-accumulates of a part for each byte of weights, at least: every core reads all weights for each of its parts, at a few
#: bytes a nanosecond. A perceptron has one or two a sample, a convolutional network or a transformer some tens.
LEAST_REUSE = 16

#: A batch that moves less is not worth a fork.
LEAST_BYTES = 1 << 19


def lower_parts(
    program: Program, target: Target, progress: Progress | None = None, tunings: TuningDatabase | None = None
) -> tuple[Lowered, int]:
    """(what is compiled, how many times it runs for the whole batch). Arguments, errors: as `lower`. GPUs want whole batches."""
    lowered = lower(program, target, progress, tunings)
    part, parts = (program, 1) if target.arch == "cuda" else cut(program, lowered.kernels)
    return (lower(part, target, progress, tunings) if parts > 1 else lowered), parts


def cut(program: Program, kernels: Sequence[KernelRow]) -> tuple[Program, int]:
    """(the program of one part, how many there are); the program itself and 1 where a batch is better computed as a whole.

    Args:
        kernels: of the whole program.
    """
    batch = program.input_specs[0].shape[0] if program.input_specs and program.input_specs[0].shape else None
    weights, macs = sum(row.weights for row in kernels), sum(row.macs for row in kernels)
    moved = sum(row.bytes for row in kernels) - weights
    if batch is None or batch < 2 or moved < LEAST_BYTES:
        return program, 1
    most = max(1, min(KEPT_BYTES * batch * len(kernels) // moved, batch // LEAST_PARTS))
    sizes = [s for s in range(1, batch) if batch % s == 0 and s <= most and macs * s >= LEAST_REUSE * weights * batch]
    part = in_parts(program, max(sizes)) if sizes else None
    return (program, 1) if part is None else (part, batch // max(sizes))


def whole_rows(kernels: Sequence[KernelRow], parts: int) -> tuple[KernelRow, ...]:
    """The rows of one part's kernels with the work of all parts."""
    return tuple(replace(row, macs=row.macs * parts, bytes=row.bytes * parts, weights=row.weights * parts) for row in kernels)
