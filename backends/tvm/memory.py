"""Static memory plan: one arena for every intermediate buffer of a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Alignment of every buffer: a cache line, and TVM's kAllocAlignment.
ALIGNMENT = 64
#: Readable bytes after every buffer. Vector kernels may read (never use) that much past a row's end.
SLACK = 64


@dataclass(frozen=True)
class Lifetime:
    """A buffer is written first by step `first` and read last by step `last`, both included."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_arena(lifetimes: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Offsets of the buffers in one arena, and the arena's size in bytes.

    Largest first, each at the lowest gap that fits among the buffers placed already that live at the same time (greedy by size:
    Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, section 4.2).
    """
    offsets = [0] * len(lifetimes)
    placed: list[int] = []
    total = 0
    for index in sorted(range(len(lifetimes)), key=lambda i: (-lifetimes[i].size, lifetimes[i].first)):
        lifetime = lifetimes[index]
        taken = sorted((offsets[i], offsets[i] + aligned(lifetimes[i].size)) for i in placed if lifetimes[i].meets(lifetime))
        offset, need = 0, aligned(lifetime.size)
        for begin, end in taken:
            if begin - offset >= need:
                break
            offset = max(offset, end)
        offsets[index] = offset
        placed.append(index)
        total = max(total, offset + need)
    return offsets, total + SLACK
