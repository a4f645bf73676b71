"""Times launches of Triton kernels on this machine's GPU, as a program runs them: one after another in one CUDA graph.

Needs torch and Triton, no TVM. Kernels are compiled by workers into Triton's cache, all cores at once, before they are timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch

from .plans import Plan, function_of, run, torch_type

#: Launches of one captured graph.
LAUNCHES = 20


def cause_of(error: BaseException) -> str:
    """The end of what was said, where Triton names the cause."""
    return f"{type(error).__name__}: {error} {error.__cause__ or ''}"[-600:]


def compile_plan(plan: Plan) -> str:
    """Compiles into Triton's cache, in a worker; returns what went wrong."""
    if plan.first is not None and (error := compile_plan(plan.first)):
        return error
    try:
        function = function_of(plan)
        # Pointers (in lower case) come first, by place: Triton takes types in their stead only there.
        types = iter([torch_type(dtype) for _, _, dtype in plan.buffers])
        names = [name for name in function.arg_names if name.islower()]
        given = [None if name in plan.constants else next(types) for name in names]
        constants = {name: value for name, value in plan.constants.items() if name not in names}
        options = {"num_warps": plan.warps, "num_stages": plan.stages, "enable_fp_fusion": False}
        function.warmup(*given, **constants, **options, grid=plan.grid)
    except Exception as error:  # a block may not fit the chip: that is a result of tuning
        return cause_of(error)
    return ""


class Compiler:
    """Workers that compile. They are forked before this process touches the GPU."""

    def __init__(self) -> None:
        count = os.cpu_count() or 1
        self._pool = ProcessPoolExecutor(count)
        for future in [self._pool.submit(time.sleep, 0.3) for _ in range(count)]:
            future.result()

    def start(self, plan: Plan) -> Future[str]:
        return self._pool.submit(compile_plan, plan)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def operands(plan: Plan) -> list[torch.Tensor]:
    """Random inputs of a plan, in its order; the output last."""
    made = []
    for name, shape, dtype in plan.operands:
        kind = torch_type(dtype)
        if kind.is_floating_point:
            value = torch.rand(shape, device="cuda") * (1e-3 if name == "scale" else 1.0)
            made.append(value.to(kind))
        elif kind == torch.int32:
            made.append(torch.randint(-100, 100, shape, dtype=kind, device="cuda"))
        else:
            low, high = (0, 256) if kind == torch.uint8 else (-128, 128)
            made.append(torch.randint(low, high, shape, device="cuda", dtype=torch.int32).to(kind))
    return made


def microseconds(call: Callable[[], Any], launches: int = LAUNCHES, repeats: int = 5) -> float:
    """Least time of one call inside a captured graph of `launches`."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    best = float("inf")
    for _ in range(repeats):
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) * 1e3 / launches)
    return best


def timed(plan: Plan, tensors: list[torch.Tensor], repeats: int = 5) -> tuple[float, str]:
    """(least microseconds, "") of a launch, or (infinity, what went wrong)."""
    try:
        return microseconds(lambda: run(plan, tensors), repeats=repeats), ""
    except Exception as error:  # out of shared memory shows at the launch
        return float("inf"), cause_of(error)
