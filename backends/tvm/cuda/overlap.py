"""Kernels that are placed while the one before them ends: programmatic dependent launch, from compute capability 9.0 on.

Every kernel waits, before it touches memory, until its predecessor is done and what that wrote can be seen; by induction
everything before the predecessor is done too, so kernels need no other order. In exchange the chip may place its programs as soon
as the predecessor's have ended: MiniLM-L6 at batch 1, 60 launches, takes 148 us on an H200 instead of 161. A predecessor could let
it start at its own beginning (`griddepcontrol.launch_dependents`): then programs that wait take room from those that work, 217 us.

The instruction is put in front of every kernel here, whatever generated it; `runtime/region_cuda.c` launches accordingly.
"""

from __future__ import annotations

import re

#: The first compute capability that has the instructions.
FIRST_CAPABILITY = 90

#: What a kernel says before it touches memory.
WAIT = "griddepcontrol.wait;"


#: Which `in_ptx` a compiled kernel went through: part of its name in caches.
PLACED = f"{WAIT} before memory"

#: Lines of PTX that may come before: declarations, labels of debuggers, and arithmetic on registers and parameters.
_OPERATIONS = (
    "abs|add|and|bfe|bfi|cvt|cvta|div|ld.param|lop3|mad|max|min|mov|mul|neg|not|or|prmt|rem|selp|setp|shf|shl|shr|sub|xor"
)
_IDLE = re.compile(rf"\s*(//.*|\.(reg|loc|pragma)\b.*|\$L__(tmp|func_begin)\d+:|({_OPERATIONS.replace('.', '[.]')})\b.*;.*)?\n")


def overlaps(level: str) -> bool:
    """Whether kernels for a chip (sm_90, ...) start by waiting."""
    return int(level.removeprefix("sm_")) >= FIRST_CAPABILITY


def in_ptx(ptx: str) -> str:
    """PTX whose only kernel waits before it touches memory or branches. Raises RuntimeError where it has none or several."""
    entries = list(re.finditer(r"\.entry\b[^{]*\{\n", ptx))
    if len(entries) != 1:
        raise RuntimeError(f"this PTX has {len(entries)} kernels, not one")
    place = entries[0].end()
    for line in ptx[place:].splitlines(keepends=True):
        if not _IDLE.fullmatch(line):
            break
        place += len(line)
    return f"{ptx[:place]}\t{WAIT}\n{ptx[place:]}"


def in_source(source: str) -> str:
    """CUDA C++ whose kernels, all `__global__` functions with a body, start by waiting."""
    return re.sub(r"(__global__[^;{]*\{\n)", rf'\1  asm volatile("{WAIT}" ::: "memory");\n', source)
