"""How a product is cut on a GPU: the guess for a shape never seen, and the blocks worth measuring.

A block is what one program computes and how: BM x BN outputs, BK of the inner dimension a step, warps, stages of the software
pipeline, and how many row tiles sweep the columns together (`triton_tails.tile_of`). Any block serves any product; a row of the
tuning database can make a kernel slow but never wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

#: Shared memory that a program may use, bytes, by level: what the chip gives one program, less what the runtime keeps.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}

#: Multiprocessors of the largest chip of each level.
MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 144, "sm_90": 132}

#: Cycles of a step that nothing hides: barriers and addresses.
STEP_OVERHEAD = 80


@dataclass(frozen=True)
class Block:
    """rows x columns outputs a program, `depth` of the inner dimension a step; group: row tiles that sweep columns together."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Problem:
    """A product as the choice of a block sees it. unit: bytes of an operand's element. images: products in one launch."""

    rows: int
    columns: int
    depth: int
    unit: int = 1
    images: int = 1


def power_of_two(value: int) -> int:
    """The least power of two that is not below `value`."""
    return 1 << max(0, value - 1).bit_length()


def shared_bytes(block: Block, unit: int) -> int:
    return block.stages * (block.rows + block.columns) * block.depth * unit


def programs(block: Block, problem: Problem) -> int:
    return problem.images * ceil(problem.rows / block.rows) * ceil(problem.columns / block.columns)


def microseconds(block: Block, problem: Problem, level: str) -> float:
    """A count that orders blocks: multiply-adds, bytes through the second-level cache, latency of the steps and of the waves.

    Rates are those of one Hopper multiprocessor at 1.7 GHz, a tenth of them for tiles too small to fill the tensor cores' pipes.
    """
    together = MULTIPROCESSORS[level]
    steps = ceil(problem.depth / block.depth)
    resident = max(1, min(SHARED_BYTES[level] // max(1, shared_bytes(block, problem.unit)), 2048 // (32 * block.warps), 8))
    total = programs(block, problem)
    waves = ceil(total / (together * resident))
    sharing = min(resident, ceil(total / together))
    macs = block.rows * block.columns * block.depth
    # A tile of 128 x 128 keeps wgmma busy; smaller ones run at the rate of mma.sync, and their operands weigh more.
    rate = 4096 if block.rows * block.columns >= 128 * 128 and level == "sm_90" else 1600
    compute = macs * problem.unit / rate
    traffic = (block.rows + block.columns) * block.depth * problem.unit / 40
    latency = 700 / max(1, block.stages - 1) + 40
    step = max(sharing * compute, sharing * traffic, latency) + STEP_OVERHEAD
    epilogue = 900 + sharing * block.rows * block.columns / 64
    return waves * (steps * step + epilogue) / 1700


def candidates(problem: Problem, level: str) -> Iterator[Block]:
    """The blocks that fit the chip and waste no whole half of a tile."""
    most_rows, most_columns = max(16, power_of_two(problem.rows)), max(16, power_of_two(problem.columns))
    least = 32 // problem.unit
    for rows in (16, 32, 64, 128, 256):
        for columns in (16, 32, 64, 128, 256):
            if rows > most_rows or columns > most_columns or rows * columns > 128 * 256:
                continue
            for depth in (least, 2 * least, 4 * least, 8 * least):
                if depth > max(least, power_of_two(problem.depth)):
                    continue
                # One warpgroup holds 128 x 128 sums in its registers, and is faster there than two.
                warps = 8 if rows * columns > 128 * 128 else 4 if rows * columns > 32 * 32 else 2
                for stages in (3, 4, 5):
                    block = Block(rows, columns, depth, warps, stages)
                    if shared_bytes(block, problem.unit) <= SHARED_BYTES[level] - 4096:
                        yield block


def choose(problem: Problem, level: str) -> Block:
    """The analytical guess; of equal ones the smaller."""
    return min(candidates(problem, level), key=lambda b: (microseconds(b, problem, level), b.rows * b.columns, b.stages))


def space(problem: Problem, level: str, most: int = 16) -> list[Block]:
    """The blocks worth measuring, best guess first: for each tile its best depth and stages."""
    best: dict[tuple[int, int], Block] = {}
    for block in sorted(
        candidates(problem, level), key=lambda b: (microseconds(b, problem, level), b.rows * b.columns, b.stages)
    ):
        best.setdefault((block.rows, block.columns), block)
    return list(best.values())[:most]
