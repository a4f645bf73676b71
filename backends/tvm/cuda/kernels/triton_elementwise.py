"""Element-wise kernels that TVM's own schedules leave far from the memory's rate. Imports Triton and nothing else."""

# Triton compiles these functions: constants and ranges are not the Python objects that type checkers take them for.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lookup(x, table, y, SIZE: tl.constexpr, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """Y [SIZE] = table[X [SIZE] - FIRST]: 16 codes at a time; the 256 entries stay in the first cache."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    code = tl.load(x + at, mask=inside, other=0).to(tl.int32) - FIRST
    tl.store(y + at, tl.load(table + code), mask=inside)
