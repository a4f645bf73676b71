"""Functions written as loops, as CUDA: scheduled for threads, cut into launches, one source file for a program, one cubin.

A launch is one loop nest of a function. Memory that the launches of a function hand on to one another becomes a parameter of
each and lies in the program's arena, as for CPUs (`tasks.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.build import codegen_build
from tvm_ffi import structural_walk

from ....ir.errors import UnsupportedOpError
from ..tasks import NamedBetweenError, buffer_bytes, cut, statements_of, take_pointers
from .nvcc import compile_cubin
from .overlap import in_source, overlaps
from .schedule import schedule_for_threads

#: A TIR statement, variable or function; the stubs do not know their fields.
Node = Any

_DEVICE_KERNEL = 2  # CallingConv::kDeviceKernelLaunch


@dataclass(frozen=True)
class Nest:
    """One launch before code generation: a function whose body is one loop nest.

    symbol: its name in CUDA, where `exp` and `max` are taken. grid, block: extents along x, y, z.
    """

    name: str
    symbol: str
    function: Node
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@dataclass(frozen=True)
class Nests:
    """The launches of one kernel, in order. scratch: bytes of each buffer they share."""

    launches: tuple[Nest, ...]
    scratch: tuple[int, ...]


def split_nests(functions: Mapping[str, Node], target: tvm.target.Target) -> dict[str, Nests]:
    """Schedules functions of blocks and cuts them into launches.

    Raises:
        UnsupportedOpError: a function that is written for CPUs.
    """
    bound = {name: schedule_for_threads(name, function) for name, function in functions.items()}
    with target:
        flat = tvm.transform.Sequential(_flatten())(tvm.IRModule(bound))
    return {variable.name_hint: _nests(variable.name_hint, function) for variable, function in flat.functions_items()}


def level_of(target: tvm.target.Target) -> str:
    """The chip a CUDA target names: sm_90, ..."""
    attributes: Any = target.attrs  # a map, typed as a list
    return str(attributes["arch"])


def generate(nests: Mapping[str, Nests], target: tvm.target.Target) -> bytes:
    """The cubin that nvcc makes of all launches, one source file.

    Raises:
        TargetError: nvcc is missing or rejects the source.
    """
    launches = [launch for kernel in nests.values() for launch in kernel.launches]
    source = cuda_source(tvm.IRModule({launch.symbol: launch.function for launch in launches}), target)
    level = level_of(target)
    return compile_cubin(in_source(source) if overlaps(level) else source, level)


def cuda_source(module: tvm.IRModule, target: tvm.target.Target) -> str:
    """CUDA C++ of flat functions, whose parameters become raw pointers in their order."""
    with target:
        module = tvm.transform.Sequential(_lower(target))(module)
        module = tvm.IRModule({v: _device_kernel(f, target) for v, f in module.functions_items()})
        module = tvm.transform.Sequential(_finish())(module)
        return codegen_build(module, target).inspect_source()


def _nests(name: str, function: Node) -> Nests:
    try:
        prologue, shared, groups = cut(statements_of(function.body), is_launch)
    except NamedBetweenError as error:
        reason = f"its launches need what is computed between them on the host ({error})"
        raise UnsupportedOpError(f"kernel '{name}' has no version for CUDA: {reason}") from error
    labels = [name] if len(groups) == 1 else [f"{name}_{index}" for index in range(len(groups))]
    launches = []
    for label, group in zip(labels, groups, strict=True):
        symbol = f"gw_{label}"
        body = tirx.PrimFunc([*function.params, *shared], tirx.stmt_seq(*prologue, group.body))
        attributes = {**dict(function.attrs or {}), "tirx.noalias": True, "global_symbol": symbol}
        launches.append(Nest(label, symbol, body.with_attrs(attributes), *_extents(label, group.body)))
    return Nests(tuple(launches), tuple(buffer_bytes(buffer) for buffer in shared))


def is_launch(statement: Node) -> bool:
    return isinstance(statement, tirx.AttrStmt) and statement.attr_key == "thread_extent"


def _extents(name: str, body: Node) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Grid and block of a nest; (1, 1, 1) each where its loops are bound to nothing."""
    found: dict[str, int] = {}
    nodes: list[Node] = []
    structural_walk(body, (tirx.AttrStmt, nodes.append))
    for node in filter(is_launch, nodes):
        if not isinstance(node.value, tirx.IntImm):
            raise UnsupportedOpError(f"kernel '{name}' has no version for CUDA: its number of threads is only known as it runs")
        tag, extent = str(node.node.thread_tag), int(node.value)
        if found.setdefault(tag, extent) != extent:
            raise RuntimeError(f"launch '{name}' has two extents along {tag}: {found[tag]} and {extent}")
    grid, block = ([found.get(f"{kind}.{axis}", 1) for axis in "xyz"] for kind in ("blockIdx", "threadIdx"))
    return (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])


def _device_kernel(function: Node, target: tvm.target.Target) -> Node:
    attributes = {"calling_conv": _DEVICE_KERNEL, "tirx.is_global_func": True, "target": target}
    return take_pointers(function, runtime_calls=False).with_attrs(attributes)


def _flatten() -> list[Any]:
    """The first half of TVM's pipeline for schedulable TIR: blocks become loops, threads attributes, buffers one-dimensional."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerCrossThreadReduction(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
    ]


def _lower(target: tvm.target.Target) -> list[Any]:
    """The second half, as far as it concerns devices."""
    return [
        tirx.transform.BindTarget(target.with_host(tvm.target.Target("llvm"))),
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
        s_tir.transform.ThreadSync("shared"),
        s_tir.transform.ThreadSync("warp"),
        s_tir.transform.LowerThreadAllreduce(),
    ]


def _finish() -> list[Any]:
    return [
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerWarpMemory(),
        tirx.transform.StmtSimplify(),
        tirx.transform.LowerIntrin(),
    ]
