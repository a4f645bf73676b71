"""From a lowered Relax module to machine code: TVM's passes without any fusion, a memory plan, a default schedule."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import tirx
from tvm.relax import backend, transform
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import ScheduleError

from .kernels.base import LANES
from .kernels.schedule import finish, product, split_for_threads, vector_width

#: Reductions cost more than their output's size says; this many operations an element is assumed.
REDUCTION_COST = 16


def relax_passes() -> list[Any]:
    """No FuseOps and no FuseTIR: designed kernels are fused by design, and islands must round after every op."""
    return [
        backend.DispatchSampling(),
        backend.DispatchSortScan(),
        # A reshape stays an operator: the memory plan knows it as a view, and the runtime makes it one.
        transform.LegalizeOps({"relax.reshape": lambda _builder, call: call}),
        transform.DeadCodeElimination(),
        schedule_generic,
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ]


def build(module: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Compiles a lowered module; the result exports to a shared library."""
    with target:
        module = tvm.transform.Sequential([transform.DeadCodeElimination(), *relax_passes()])(module)
    return tvm.compile(module, target=target, relax_pipeline=None)


@tvm.transform.module_pass(opt_level=0, name="ScheduleGeneric")
def schedule_generic(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Gives every function that no generator scheduled a plain one: rows in parallel, the last axis in vectors."""
    updated = {}
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and "tirx.is_scheduled" not in function.attrs:
            updated[variable] = default_schedule(function)
    for variable, function in updated.items():
        module.update_func(variable, function)
    return module


def default_schedule(function: Any) -> Any:
    if not isinstance(function.body, SBlockRealize) or function.body.block.name_hint != "root":
        # One opaque call, such as a sort of the runtime: there are no loops to schedule.
        return function
    schedule: Any = Schedule(function)
    for block in schedule.get_child_blocks(schedule.get_sblock("root")):
        try:
            _schedule_block(schedule, block)
        except ScheduleError:
            # A block whose loops are not plain (a scan, a scatter) keeps the loops it came with.
            continue
    return finish(schedule)


def _schedule_block(schedule: Any, block: Any) -> None:
    loops = schedule.get_loops(block)
    kinds = [variable.iter_type for variable in schedule.get(block).iter_vars]
    if len(kinds) != len(loops) or not loops:
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == tirx.IterVar.DataPar]
    reductions = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != tirx.IterVar.DataPar]
    if not spatial:
        return
    sizes = [int(schedule.get(loop).extent) for loop in spatial]
    if reductions:
        _schedule_reduction(schedule, block, spatial, reductions, sizes)
        return
    flat = schedule.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    work = product(sizes)
    width = vector_width(work, LANES)
    if width > 1:
        flat, inner = schedule.split(flat, [None, width])
        schedule.vectorize(inner)
    split_for_threads(schedule, flat, work)


def _schedule_reduction(schedule: Any, block: Any, spatial: list, reductions: list, sizes: list[int]) -> None:
    work = product(sizes) * product(int(schedule.get(loop).extent) for loop in reductions)
    width = vector_width(sizes[-1], LANES)
    *outer, last = spatial
    if width > 1:
        chunk, lane = schedule.split(last, [None, width])
        schedule.reorder(*outer, chunk, *reductions, lane)
        schedule.vectorize(lane)
        outer = [*outer, chunk]
    else:
        schedule.reorder(*spatial, *reductions)
        outer = spatial
    rows = schedule.fuse(*outer) if len(outer) > 1 else outer[0]
    split_for_threads(schedule, rows, work)
    init = schedule.decompose_reduction(block, reductions[0])
    if width > 1:
        schedule.vectorize(schedule.get_loops(init)[-1])
