"""From a lowered Relax module to launches: Triton kernels and functions of loops compiled, and the region planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import tvm
from tvm import tirx
from tvm.relax import transform

from ..region import Region, plan_region
from ..tasks import TaskKernel
from ..values import item_size
from .launch import Launch, TritonCall, call_before, triton_call
from .tir import Nests, generate, level_of, split_nests
from .triton_aot import compile_kernel


def build(module: tvm.IRModule, target: tvm.target.Target) -> Region:
    """Compiles a lowered module to the plan of its launches.

    Raises:
        UnsupportedOpError: a kernel without a version for CUDA. TargetError: nvcc or Triton is missing, or rejects a kernel.
    """
    with target:
        module = tvm.transform.Sequential(_relax_passes())(module)
    functions = {v.name_hint: f for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    calls = {name: call for name, function in functions.items() if (call := triton_call(function)) is not None}
    nests = split_nests({name: f for name, f in functions.items() if name not in calls}, target)
    level = level_of(target)
    kernels = {name: triton_kernel(name, functions[name], call, level) for name, call in calls.items()}
    if nests:
        kernels |= _nest_kernels(nests, generate(nests, target))
    return plan_region(module["main"], kernels)


def _relax_passes() -> list[Any]:
    """As for CPUs (`pipeline.relax_passes`), without a schedule: TVM's own GPU scans and sorts bring theirs."""
    return [
        transform.DeadCodeElimination(),
        tvm.relax.backend.DispatchSampling(),
        tvm.relax.backend.DispatchSortScan(),
        transform.LegalizeOps({"relax.reshape": lambda _builder, call: call}),
        transform.DeadCodeElimination(),
    ]


def triton_kernel(name: str, function: Any, call: TritonCall, level: str) -> TaskKernel[Launch]:
    """The launches that a function of `launch.device_function` stands for, compiled."""
    dtypes = [str(buffer.dtype) for buffer in function.params]
    before = call_before(function)
    if before is None:
        return TaskKernel((_launch(name, call, dtypes, level, None),), ())
    first, (scratch, shape, dtype) = before
    place, others = len(dtypes), tuple(range(1, len(dtypes)))  # scratch stands behind what the function declares
    launches = (
        _launch(f"{name}_{scratch}", first, [dtypes[0], dtype], level, (0, place)),
        _launch(name, call, [dtype, *dtypes[1:]], level, (place, *others)),
    )
    return TaskKernel(launches, (prod(shape) * item_size(dtype),))


def _launch(name: str, call: TritonCall, dtypes: Sequence[str], level: str, pointers: tuple[int, ...] | None) -> Launch:
    kernel = compile_kernel(call, dtypes, level)
    block = (kernel.threads, 1, 1)
    return Launch(name, kernel.entry, kernel.cubin, call.grid, block, kernel.shared, kernel.hidden, pointers)


def _nest_kernels(nests: Mapping[str, Nests], cubin: bytes) -> dict[str, TaskKernel[Launch]]:
    return {
        name: TaskKernel(tuple(Launch(n.name, n.symbol, cubin, n.grid, n.block) for n in kernel.launches), kernel.scratch)
        for name, kernel in nests.items()
    }
