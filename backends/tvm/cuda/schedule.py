"""Threads for functions written as plain loops: before -> after

    for n, h, w, c: out[n, h, w, c] = f(x)      blockIdx.x, threadIdx.x over all of n h w (c / 4); 4 neighbours a thread

    for i: for k: acc[i] += x[i, k]             one thread an output, its sum in a register; where outputs are few and long,
    for i: out[i] = f(acc[i])                   one block an output, its threads share k

Maps between a function's inputs and its outputs are inlined into their readers. What is left are a few loop nests, each of which
becomes one launch. A block whose loops are not plain (a scan) keeps them and runs on one thread.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import ScheduleError
from tvm.sym import Analyzer
from tvm_ffi import structural_walk

from ....ir.errors import UnsupportedOpError
from ..kernels.schedule import extents, product

#: Neighbouring elements a thread takes: 16 bytes of floats; with bytes a warp still fills whole cache lines.
WIDTH = 4

WARP = 32

#: Threads of a block, and the most of one that shares a sum.
THREADS = 128

#: Steps of a sum that are written out one after the other.
MOST_UNROLLED = 64 * WIDTH

#: Fewer outputs than this leave most of a GPU idle; each is then worth a block where its sum has enough terms.
FEW_OUTPUTS = 4096

#: Terms from which on the threads of a block share a sum.
LONG_SUM = 128


def schedule_for_threads(name: str, function: Any) -> Any:
    """Binds the loops of a PrimFunc to a grid of threads; one whose loops are bound already is returned as it is.

    Raises:
        UnsupportedOpError: code written for CPUs, or a call of TVM's runtime.
    """
    if is_bound(function):
        return function
    if not isinstance(function.body, SBlockRealize) or function.body.block.name_hint != "root":
        raise UnsupportedOpError(f"kernel '{name}' has no version for CUDA: its code is written for CPUs")
    schedule: Any = Schedule(function)
    _inline(schedule)
    done: set[str] = set()
    for block in reversed(_blocks(schedule)):
        label = schedule.get(block).name_hint
        if label not in done:
            done |= _bind(schedule, block)
    return schedule.mod["main"].without_attr("global_symbol")


def is_bound(function: Any) -> bool:
    """Whether a function's loops run on threads already."""
    kinds: list[Any] = []
    structural_walk(function.body, (tirx.For, lambda loop: kinds.append(loop.kind)))
    return tirx.ForKind.THREAD_BINDING in kinds


def _blocks(schedule: Any) -> list[Any]:
    return list(schedule.get_child_blocks(schedule.get_sblock("root")))


def _inline(schedule: Any) -> None:
    """Maps whose value only this function reads are computed where they are read."""
    for block in _blocks(schedule):
        if schedule.get_consumers(block) and _is_map(schedule, block):
            try:
                schedule.compute_inline(block)
            except ScheduleError:
                continue  # its reader indexes it in a way that no map can follow: it keeps a launch of its own


def _kinds(schedule: Any, block: Any) -> list[Any]:
    return [variable.iter_type for variable in schedule.get(block).iter_vars]


def _is_map(schedule: Any, block: Any) -> bool:
    return all(kind == tirx.IterVar.DataPar for kind in _kinds(schedule, block))


def _plain(schedule: Any, block: Any) -> bool:
    """Whether every loop is one of the block's own axes, parallel or reduced."""
    kinds = _kinds(schedule, block)
    allowed = (tirx.IterVar.DataPar, tirx.IterVar.CommReduce)
    return len(kinds) == len(schedule.get_loops(block)) and all(kind in allowed for kind in kinds)


def _bind(schedule: Any, block: Any) -> set[str]:
    """Gives a block, and the sum that it alone reads, its threads. Returns the names of the blocks that are settled."""
    settled = {schedule.get(block).name_hint}
    if not _plain(schedule, block):
        return settled
    if not _is_map(schedule, block):
        _bind_sum(schedule, block, schedule.cache_write(block, 0, "local"))
        return settled
    for producer in schedule.get_producers(block):
        if _belongs_to(schedule, producer, block):
            _bind_sum(schedule, producer, block)
            return settled | {schedule.get(producer).name_hint}
    loops, lane = _loops_and_lane(schedule, block)
    _spread(schedule, _fused(schedule, loops))
    if lane is not None:
        schedule.vectorize(lane)
    return settled


def _belongs_to(schedule: Any, producer: Any, reader: Any) -> bool:
    """Whether `producer` is a sum of which each element is read for one element of `reader`, and by nobody else."""
    if _is_map(schedule, producer) or not _plain(schedule, producer) or len(schedule.get_consumers(producer)) != 1:
        return False
    spatial, _ = _loops(schedule, producer)
    return product(extents(schedule, spatial)) == product(extents(schedule, schedule.get_loops(reader)))


def _loops(schedule: Any, block: Any) -> tuple[list[Any], list[Any]]:
    """The parallel and the reduced loops of a plain block."""
    pairs = list(zip(schedule.get_loops(block), _kinds(schedule, block), strict=True))
    spatial = [loop for loop, kind in pairs if kind == tirx.IterVar.DataPar]
    return spatial, [loop for loop, kind in pairs if kind != tirx.IterVar.DataPar]


def _loops_and_lane(schedule: Any, block: Any) -> tuple[list[Any], Any | None]:
    """All loops of a map, and WIDTH neighbours of its last axis apart where they are neighbours in memory."""
    loops = list(schedule.get_loops(block)) or [schedule.add_unit_loop(block)]
    if int(schedule.get(loops[-1]).extent) % WIDTH or not _contiguous(schedule.get(block)):
        return loops, None
    chunk, lane = schedule.split(loops[-1], [None, WIDTH])
    return [*loops[:-1], chunk], lane


def _fused(schedule: Any, loops: list[Any]) -> Any:
    return schedule.fuse(*loops) if len(loops) > 1 else loops[0]


def _contiguous(block: Any) -> bool:
    """Whether the block's last axis only ever is the last index of what it reads and writes, all of types that CUDA has vectors
    of."""
    if any(str(region.source.dtype) in ("float16", "bfloat16") for region in (*block.reads, *block.writes)):
        return False
    axis = block.iter_vars[-1].var
    for region in (*block.reads, *block.writes):
        *outer, last = (part.min for part in region.region)
        if any(_mentions(index, axis) for index in outer):
            return False
        if _mentions(last, axis) and _mentions(last - axis, axis, simplified=True):
            return False
    return True


def _mentions(expression: Any, variable: Any, simplified: bool = False) -> bool:
    expression = Analyzer().simplify(expression) if simplified else expression
    found: list[Any] = []
    structural_walk(expression, (tirx.Var, found.append))
    return any(variable.same_as(other) for other in found)


def _spread(schedule: Any, rows: Any) -> None:
    """Binds a loop to blocks of threads."""
    block, thread = schedule.split(rows, [None, threads_of(int(schedule.get(rows).extent))])
    schedule.bind(block, "blockIdx.x")
    schedule.bind(thread, "threadIdx.x")


def threads_of(count: int) -> int:
    """Whole warps that cut `count` without a rest where some do: no thread then asks whether it has work. Small blocks where
    there are few threads, for as many multiprocessors as possible."""
    sizes = range(WARP, THREADS + 1, WARP) if count < FEW_OUTPUTS else range(THREADS, 0, -WARP)
    return next((size for size in sizes if count % size == 0), min(THREADS, -(-count // WARP) * WARP))


def _bind_sum(schedule: Any, total: Any, reader: Any) -> None:
    """Schedules the sum `total` for its only reader, a map with as many elements."""
    _, reduced = _loops(schedule, total)
    outputs = product(extents(schedule, schedule.get_loops(reader)))
    if outputs < FEW_OUTPUTS and product(extents(schedule, reduced)) >= LONG_SUM:
        _share_sum(schedule, total, reader)
        return
    loops, lane = _loops_and_lane(schedule, reader)
    # Before the loops become one: then TVM still sees that each step of them is an output of its own.
    schedule.compute_at(total, loops[-1])
    schedule.set_scope(total, 0, "local")
    inside = schedule.get_loops(total)[len(loops) :]  # the lane, then the reduced loops of more than one step
    whole = len(inside) == len(reduced) + (lane is not None)
    if lane is not None and whole:
        inside = [*inside[1:], inside[0]]
        schedule.reorder(*inside)
        schedule.vectorize(inside[-1])
    if lane is not None:
        schedule.vectorize(lane)
    _spread(schedule, _fused(schedule, loops))
    if whole:  # with loops of one step left out, TVM loses sight of the sum; its start then stays inside its loops
        init = schedule.decompose_reduction(total, inside[0])
        if lane is not None:
            schedule.vectorize(schedule.get_loops(init)[-1])
        if product(extents(schedule, inside)) <= MOST_UNROLLED:  # then the loads of a window wait for memory together
            for loop in inside[: len(inside) - (lane is not None)]:
                schedule.unroll(loop)


def _share_sum(schedule: Any, total: Any, reader: Any) -> None:
    """One block an output: its threads add their terms and then one another's."""
    rows = _fused(schedule, list(schedule.get_loops(reader)) or [schedule.add_unit_loop(reader)])
    schedule.bind(rows, "blockIdx.x")
    _, reduced = _loops(schedule, total)
    schedule.compute_at(total, rows)
    schedule.set_scope(total, 0, "shared")
    reduced = schedule.get_loops(total)[-len(reduced) :]
    _, thread = schedule.split(_fused(schedule, reduced), [None, THREADS])
    schedule.bind(thread, "threadIdx.x")
    # One thread writes the result.
    _, thread = schedule.split(schedule.add_unit_loop(reader), [None, THREADS])
    schedule.bind(thread, "threadIdx.x")
