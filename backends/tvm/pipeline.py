"""From a lowered Relax module to a region and machine code: TVM's passes without any fusion, and a default schedule."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import tvm
from tvm import ir, s_tir, tirx
from tvm.relax import backend, transform
from tvm.s_tir import SBlockRealize, Schedule
from tvm.s_tir.schedule import ScheduleError
from tvm.tirx.build import codegen_build

from .kernels.base import LANES
from .kernels.emit import LLVM_CODE
from .kernels.schedule import finish, product, split_for_threads, vector_width
from .region import Region, plan_region
from .tasks import split_tasks, take_pointers

#: Reductions cost more than their output's size says; this many operations an element is assumed.
REDUCTION_COST = 16


def build(module: tvm.IRModule, target: tvm.target.Target, parts: int = 1) -> tuple[Region, bytes]:
    """Compiles a lowered module: the plan of its one parallel region, and the object code of its kernels.

    parts: times that the module's function runs for the whole batch.
    """
    with target:
        module = tvm.transform.Sequential(relax_passes())(module)
        functions = {v: f for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
        flat = flatten(tvm.IRModule(functions))
        kernels = {v.name_hint: split_tasks(v.name_hint, f) for v, f in flat.functions_items()}
        phases = [phase for kernel in kernels.values() for phase in kernel.phases]
        code = generate(tvm.IRModule({phase.name: phase.function for phase in phases}), target)
    return plan_region(module["main"], kernels, parts), code


def relax_passes() -> list[Any]:
    """No FuseOps and no FuseTIR: designed kernels are fused by design, and islands must round after every op."""
    return [
        transform.DeadCodeElimination(),
        backend.DispatchSampling(),
        backend.DispatchSortScan(),
        # A reshape stays an operator: the plan knows it as a view.
        transform.LegalizeOps({"relax.reshape": lambda _builder, call: call}),
        transform.DeadCodeElimination(),
        schedule_generic,
    ]


def flatten(module: tvm.IRModule) -> tvm.IRModule:
    """Blocks become loops and buffers one-dimensional: the first half of TVM's pipeline for schedulable TIR."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
    ]
    return tvm.transform.Sequential(passes)(module)


def generate(module: tvm.IRModule, target: tvm.target.Target) -> bytes:
    """Object code of flat functions: the second half of that pipeline (what concerns CPUs), and LLVM."""
    passes = [
        tirx.transform.BindTarget(target.with_host(target)),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        raw_pointers,
        import_llvm,
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]
    library = codegen_build(tvm.transform.Sequential(passes)(module), target)
    with tempfile.TemporaryDirectory(prefix="graphwright-") as folder:
        path = Path(folder) / "kernels.o"
        library.write_to_file(str(path))
        return path.read_bytes()


@tirx.transform.prim_func_pass(opt_level=0, name="RawPointers")
def raw_pointers(function: tirx.PrimFunc, _module: tvm.IRModule, _context: Any) -> tirx.PrimFunc:
    return take_pointers(function)


@tvm.transform.module_pass(opt_level=0, name="ImportLLVM")
def import_llvm(module: tvm.IRModule, _context: Any) -> tvm.IRModule:
    """Brings in the LLVM code that kernels call (attribute LLVM_CODE), each text once; it is inlined."""
    users = {str(f.attrs[LLVM_CODE]): v for v, f in module.functions_items() if LLVM_CODE in f.attrs}
    for code, variable in users.items():
        function: Any = module[variable]
        body = tirx.AttrStmt(0, "pragma_import_llvm", ir.StringImm(code), function.body)
        module.update_func(variable, tirx.PrimFunc(function.params, body, function.ret_type, function.attrs))
    return module


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
